#compdef tproxyctl
local -a commands rules every own
local command word
commands=(
    'check:report causes that break transparent proxying'
    'self-test:send probes through the rules'
    'install:install rules, and keep them until a signal'
    'render:print the equivalent script'
    'purge:remove the rules of a dead or persistent instance'
    'stats:print the counters of the rules'
)
every=(
    '--json[print JSON]'
    '--color[use of color]:when:(auto always never)'
    '(- *)--help[print a summary of the options]'
    '(- *)--version[print the version of the library]'
)
rules=(
    '--listen[address and port of the listener]:address and port:'
    '*--port[destination ports to intercept]:ports:'
    '*--dst[destinations to intercept]:prefix:'
    '*--src[sources to intercept]:prefix:'
    '*--bypass[destinations that are never intercepted]:prefix:'
    '*--interface[interface on which forwarded traffic arrives]:interface:_net_interfaces'
    '*--bypass-port[destination ports that are never intercepted]:ports:'
    '*--reject-port[destination ports that are refused]:ports:'
    '*--bypass-src[source that is never intercepted]:prefix:'
    '*--bypass-interface[interface whose traffic is never intercepted]:interface:_net_interfaces'
    '*--mac[Ethernet source to intercept]:address:' '*--bypass-mac[Ethernet source that is never intercepted]:address:'
    '*--uid[users whose traffic is intercepted]:numbers:' '*--bypass-uid[users whose traffic is never intercepted]:numbers:'
    '*--gid[groups whose traffic is intercepted]:numbers:' '*--bypass-gid[groups whose traffic is never intercepted]:numbers:'
    '*--cgroup[control group whose traffic is intercepted]:path:'
    '*--bypass-cgroup[control group whose traffic is never intercepted]:path:'
    '--bypass-mark[mark of packets that are never intercepted]:mark:'
    '--tcp[TCP]' '--udp[UDP]' '-4[IPv4]' '-6[IPv6]'
    '--redirect[intercept by NAT redirection]' '--divert-only[only deliver to existing transparent sockets]'
    '--local-output[also intercept traffic that this host sends]'
    '--fail-open[forward traffic while no listener exists]' '--allow-direct[accept packets addressed directly to the listener]'
    '--notrack[exempt packets from connection tracking]' '--persist[keep the rules when the process ends]'
    '--new-only[intercept only TCP packets that begin a connection]'
    '--local-servers[deliver replies of servers on this host to the proxy]'
    '--name[name of the instance]:name:' '--mark[packet mark]:mark:' '--table[routing table]:number:'
    '--priority[priority of the first routing rule]:number:' '--backend[kernel interface for the rules]:backend:(auto nft iptables)'
)
# Options may precede the command.
for word in ${words[2,CURRENT-1]}; do
    case $word in
        check | self-test | install | render | purge | stats) command=$word; break ;;
    esac
done
case $command in
    check) own=('--all[also print checks that passed]') ;;
    self-test) own=($rules '--all[also print checks that passed]') ;;
    install) own=($rules) ;;
    render) own=($rules '--format[programs that the script calls]:format:(nft iptables)') ;;
    purge) own=('2::instance:()') ;;
    stats) own=('--watch[repeat every second, or every SECONDS with --watch=SECONDS]' '2::instance:()') ;;
    *) own=("1:command:{_describe command commands}") ;;
esac
[[ -n $command ]] && own+=('1:command:()')
_arguments $every $own
