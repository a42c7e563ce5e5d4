# bash completion for tproxyctl
_tproxyctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= word
    local rules='--listen --port --dst --src --bypass --interface
        --bypass-port --reject-port --bypass-src --bypass-interface --mac --bypass-mac --uid --gid --cgroup
        --bypass-uid --bypass-gid --bypass-cgroup --bypass-mark --tcp --udp -4 -6 --redirect --divert-only --local-output
        --fail-open --allow-direct --notrack --persist --new-only --local-servers --name --mark --table --priority --backend'
    local every='--json --color --help --version'
    # bash splits --color=auto into three words.
    [[ $cur == = ]] && cur=
    [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}
    case $prev in
        --backend) COMPREPLY=($(compgen -W 'auto nft iptables' -- "$cur")); return ;;
        --format) COMPREPLY=($(compgen -W 'nft iptables' -- "$cur")); return ;;
        --color) COMPREPLY=($(compgen -W 'auto always never' -- "$cur")); return ;;
        --interface | --bypass-interface) COMPREPLY=($(compgen -W "$(ls /sys/class/net 2> /dev/null)" -- "$cur")); return ;;
        --listen | --port | --*-port | --dst | --src | --bypass | --*-src | --mac | --*-mac | --uid | --gid | --cgroup | \
            --*-uid | --*-gid | --*-cgroup | --name | --mark | --*-mark | --table | --priority) return ;;
    esac
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $word in
            check | self-test | install | render | purge | stats) command=$word; break ;;
        esac
    done
    case $command in
        check) every+=' --all' ;;
        self-test) every+=" --all $rules" ;;
        install) every+=" $rules" ;;
        render) every+=" --format $rules" ;;
        stats) every+=' --watch' ;;
        purge) ;;
        *) every+=' check self-test install render purge stats' ;;
    esac
    COMPREPLY=($(compgen -W "$every" -- "$cur"))
}
complete -F _tproxyctl tproxyctl
