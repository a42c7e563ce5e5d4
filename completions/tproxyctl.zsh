#compdef tproxyctl
local -a commands rules every own
local command word
commands=(
    'check:what breaks transparent proxying here, and what fixes it'
    'self-test:send probes through rules'
    'install:install rules, and hold them until a signal'
    'render:show the script that would do the same'
    'purge:remove what a dead or persistent instance left'
    'stats:what rules have done'
)
every=(
    '--json[output for programs]'
    '--color[colours]:when:(auto always never)'
    '(- *)--help[how to use it]'
    '(- *)--version[the version of the library]'
)
rules=(
    '--listen[where the packets go]:address and port:'
    '*--port[destination ports]:ports:'
    '*--dst[destinations]:prefix:'
    '*--src[sources]:prefix:'
    '*--bypass[destinations never to intercept]:prefix:'
    '*--interface[where traffic comes in]:interface:_net_interfaces'
    '--tcp[TCP]' '--udp[UDP]' '-4[IPv4]' '-6[IPv6]'
    '--redirect[by NAT]' '--divert-only[for transparent sockets alone]' '--local-output[the own traffic of this host too]'
    '--fail-open[pass by without a listener]' '--allow-direct[leave the own port of the listener alone]'
    '--notrack[without connection tracking]' '--persist[outlive the process]'
    '--name[the instance]:name:' '--mark[packet mark]:mark:' '--table[routing table]:number:'
    '--priority[of the first routing rule]:number:' '--backend[what carries it out]:backend:(auto nft iptables)'
)
# Options may come before the command, too.
for word in ${words[2,CURRENT-1]}; do
    case $word in
        check | self-test | install | render | purge | stats) command=$word; break ;;
    esac
done
case $command in
    check) own=('--all[what is fine, too]') ;;
    self-test) own=($rules '--all[what is fine, too]') ;;
    install) own=($rules) ;;
    render) own=($rules '--format[the commands]:format:(nft iptables)') ;;
    purge) own=('2::instance:()') ;;
    stats) own=('--watch[again and again; --watch=SECONDS, less often]' '2::instance:()') ;;
    *) own=("1:command:{_describe command commands}") ;;
esac
[[ -n $command ]] && own+=('1:command:()')
_arguments $every $own
