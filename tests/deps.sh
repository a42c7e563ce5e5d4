#!/bin/sh
# Installs, from Debian's packages, what the demo and the tests need and the
# machine lacks. Does nothing when all is there, so that it needs no root then.
set -eu

# A command that must be there, and the package that brings it.
needed='
nft:nftables
iptables:iptables
ip:iproute2
unshare:util-linux
setpriv:util-linux
curl:curl
python3:python3
cc:gcc
g++:g++
pkg-config:pkg-config
strace:strace
dnsmasq:dnsmasq-base
dig:bind9-dnsutils
sysctl:procps
'

PATH=$PATH:/usr/sbin:/sbin
missing=
for pair in $needed; do
    command -v "${pair%%:*}" > /dev/null || missing="$missing ${pair##*:}"
done
command -v cargo > /dev/null || { echo 'cargo is missing: install Rust 1.88 or newer' >&2; exit 1; }
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "missing packages:$missing; install them (apt-get install$missing), or run this as root" >&2
    exit 1
fi
echo "installing:$missing"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
