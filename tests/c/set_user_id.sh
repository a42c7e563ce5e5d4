#!/bin/bash
# Programs that have more rights than their user (set-user-ID, file capabilities), run by a user who chooses the
# environment: what the user put into PATH is not run, and nothing is left without an error. Needs root.
#
#     set_user_id.sh PROGRAM TPROXYCTL
set -eu
if [ "$(id -u)" != 0 ]; then
    echo 'skipped: set_user_id: only root can make set-user-ID programs of root; needs `test "$(id -u)" = 0`'
    exit
fi
if [ "${3:-}" != inside ]; then
    exec unshare --net --mount "$0" "$1" "$2" inside
fi

ip link set lo up
mount -t tmpfs tmpfs /run
directory=$(mktemp -d)
trap 'umount "$directory"; rmdir "$directory"' EXIT
# A file system on which set-user-ID and capabilities count.
mount -t tmpfs -o mode=755 tmpfs "$directory"
install -m 4755 "$1" "$directory/set_user_id"
install -m 755 "$1" "$directory/capabilities"
setcap cap_net_admin,cap_net_raw+ep "$directory/capabilities"
evil=$directory/evil proof=$directory/proof
mkdir "$evil"
for family in iptables ip6tables; do
    for name in $family{,-legacy,-nft}-{save,restore}; do
        printf '#!/bin/sh -p\necho "$0, as $(id -u)" >> %s\n' "$proof" > "$evil/$name"
    done
done
for name in sh env modprobe ip nft fuser; do cp "$evil/iptables-save" "$evil/$name"; done
chmod 755 "$evil"/*
touch "$proof"
chmod 666 "$proof"

# By a user without any rights; what it printed is in $said.
run() {
    said=$(setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all env PATH="$evil" XTABLES_LIBDIR="$evil" \
        XTABLES_LOCKFILE="$directory/lock" IPTABLES_LIB_DIR="$evil" TMPDIR="$evil" LC_ALL=C "$directory/$1" "${@:2}")
    printf '%s %s: %s\n' "$1" "${2:-}" "$said"
}
fail() {
    printf '%s\n' "$1"
    exit 1
}
says() { [[ $said == *"$1"* ]] || fail "expected: $1"; }
chains() { { iptables-nft-save; iptables-legacy-save; } 2> /dev/null | grep -c tp-tproxy || true; }
routing() { ip rule | grep -c 'proto 116' || true; }

leave() {
    "$2" render --format iptables --listen 0.0.0.0:3129 --port 80 | sed "s/tables-restore/tables-$1-restore/" | sh -e
    test "$(chains)" -gt 5
}
variants='nft legacy'
if ! iptables-legacy -t mangle -S > /dev/null 2>&1; then
    variants=nft
    echo 'skipped: set_user_id with legacy iptables: the kernel has no table for it; needs `iptables-legacy -t mangle -S`'
fi
for variant in $variants; do
    # Nothing is left: no program is run for that, and iptables does not install anything.
    run set_user_id
    says 'purge: 0'
    says 'install: EPERM'
    says 'setresuid(0, 0, 0)'
    test "$(chains) $(routing)" = '0 0' || fail 'the failed installation left something'
    run set_user_id become-root
    says 'install: 0'
    says 'remove: 0'
    test "$(chains) $(routing)" = '0 0' || fail 'something is left'
    run capabilities
    says 'purge: 0'
    says 'install: EPERM'
    says 'ambient'
    test "$(chains) $(routing)" = '0 0' || fail 'the failed installation left something'

    # Chains are left: they are removed, or that is an error.
    leave "$variant" "$2"
    run set_user_id
    says 'purge: EPERM'
    run capabilities
    says 'purge: EPERM'
    test "$(chains)" -gt 5 || fail 'the chains should be there still'
    run set_user_id become-root
    says 'purge: 0'
    test "$(chains) $(routing)" = '0 0' || fail 'something is left'
done
test ! -s "$proof" || fail "$(cat "$proof")"
