#!/bin/sh
# Installs, from Debian's packages, what the demo and the tests need and the
# machine lacks. Does nothing when all is there, so that it needs no root then.
#
# `deps.sh bench` does the same for the benchmarks, and `deps.sh python` for the
# Python package: virtual environments in build/python, with what its checks
# need from PyPI.
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
setcap:libcap2-bin
zsh:zsh
mandoc:mandoc
'
# The programs that `make bench` compares with and measures with.
[ "${1:-}" != bench ] || needed="$needed haproxy:haproxy valgrind:valgrind"

PATH=$PATH:/usr/sbin:/sbin
missing=
for pair in $needed; do
    command -v "${pair%%:*}" > /dev/null || missing="$missing ${pair##*:}"
done
command -v cargo > /dev/null || { echo 'cargo is missing: install Rust 1.93 or newer' >&2; exit 1; }

# Debian's Python has no ensurepip without this.
if [ "${1:-}" = python ]; then
    python3 -c 'import ensurepip, venv' 2> /dev/null || missing="$missing python3-venv"
fi

# One environment for the tools, and one for each version of Python that the tests run with.
python_environments() {
    environments=$(dirname "$0")/../build/python
    tools='build editables hatchling mypy pytest ruff twine'
    if [ "$(cat "$environments/tools/installed" 2> /dev/null)" != "$tools" ]; then
        rm -rf "$environments/tools"
        python3 -m venv "$environments/tools"
        "$environments/tools/bin/pip" install -q --disable-pip-version-check $tools
        echo "$tools" > "$environments/tools/installed"
    fi
    # What building the package takes, for pip to do it in isolation without asking PyPI again.
    if [ ! -e "$environments/wheels/downloaded" ]; then
        "$environments/tools/bin/pip" download -q --disable-pip-version-check -d "$environments/wheels" hatchling editables
        touch "$environments/wheels/downloaded"
    fi
    for version in 3.9 3.10 3.11 3.12 3.13; do
        [ ! -e "$environments/$version/installed" ] || continue
        # In PATH, or one of pyenv's.
        for python in "python$version" "$(pyenv root 2> /dev/null)/versions/$version".*/bin/python3; do
            "$python" -c 'import ctypes, venv' 2> /dev/null || continue
            rm -rf "$environments/$version"
            "$python" -m venv --without-pip "$environments/$version"
            "$environments/tools/bin/pip" --python "$environments/$version/bin/python" install -q --disable-pip-version-check \
                pytest pytest-xdist
            touch "$environments/$version/installed"
            break
        done
    done
}
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "missing packages:$missing; install them (apt-get install$missing), or run this as root" >&2
        exit 1
    fi
    echo "installing:$missing"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
fi
[ "${1:-}" != python ] || python_environments
