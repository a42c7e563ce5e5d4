#compdef tproxyctl
local -a commands rules every
commands=(
    'check:what breaks transparent proxying here, and what cures it'
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
if (( CURRENT == 2 )); then
    _describe command commands
    _arguments $every
    return
fi
case $words[2] in
    check) _arguments $every '--all[what is fine, too]' ;;
    self-test) _arguments $every $rules '--all[what is fine, too]' '1:command:' ;;
    install) _arguments $every $rules '1:command:' ;;
    render) _arguments $every $rules '--format[the commands]:format:(nft iptables)' '1:command:' ;;
    purge) _arguments $every '1:command:' '2:instance:' ;;
    stats) _arguments $every '--watch=-[again and again]::seconds:' '1:command:' '2:instance:' ;;
esac
