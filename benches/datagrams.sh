#!/bin/bash
# What datagrams cost, and how many instructions of user space each takes. `make bench` calls it.
set -eu
cd "$(dirname "$0")/.."
stage=$PWD/build/stage
make -s install DESTDIR= PREFIX="$stage" LIBDIR="$stage/lib"
program=$(mktemp)
counts=$(mktemp)
trap 'rm -f "$program" "$counts"' EXIT
# shellcheck disable=SC2046
cc -std=c11 -O2 -Wall -Wextra -Werror $(PKG_CONFIG_PATH=$stage/lib/pkgconfig pkg-config --cflags tproxy) benches/datagrams.c \
    $(PKG_CONFIG_PATH=$stage/lib/pkgconfig pkg-config --libs tproxy) -Wl,-rpath,"$stage/lib" -o "$program"
alone="unshare --map-root-user --net"
[ "$(id -u)" != 0 ] || alone="unshare --net"
status=0
$alone "$program" || status=$?

echo 'instructions of user space for each datagram (callgrind)'
instructions() {
    $alone valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect="$2" "$program" "$1" "$3" 2> "$counts"
    awk -v what="$4" -v n="$3" '/Collected/ { printf "  %-44s %7.1f\n", what, $NF / n }' "$counts"
}
instructions reply tp_reply 12800 'tp_reply, 100 bytes, 20 ports, 64 at once'
instructions many tp_reply 12800 'tp_reply, 100 bytes, 20 ports, 256 at once'
instructions segments tp_reply 12800 'tp_reply, 1,200 bytes of one flow'
instructions receive tp_recv_datagrams 64000 'tp_recv_datagrams with UDP_GRO'
# A target that is missed is a result, not a failure of the benchmark.
[ "$status" -le 1 ]
