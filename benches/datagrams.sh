#!/bin/bash
# Measures datagrams: time, and instructions in user space. benches/run.sh calls it.
#     datagrams.sh PROGRAM    benches/datagrams.c, built against the library
set -eu
program=$1
isolated="unshare --map-root-user --net"
[ "$(id -u)" != 0 ] || isolated="unshare --net"
counts=$(mktemp)
trap 'rm -f "$counts"' EXIT
status=0
$isolated "$program" || status=$?
# Status 1 means that a target was missed, which is a result and no failure of the benchmark.
[ "$status" -le 1 ]

echo 'instructions per datagram in user space (callgrind)'
# WAY FUNCTION COUNT LABEL
instructions() {
    $isolated valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect="$2" "$program" "$1" "$3" 2> "$counts"
    awk -v label="$4" -v n="$3" '/Collected/ { printf "  %-44s %7.1f\n", label, $NF / n; found = 1 } END { exit !found }' "$counts"
}
instructions reply tp_reply 12800 'tp_reply, 100 bytes, 20 ports, batch of 64'
instructions many tp_reply 12800 'tp_reply, 100 bytes, 20 ports, batch of 256'
instructions segments tp_reply 12800 'tp_reply, 1,200 bytes of one flow'
instructions receive tp_recv_datagrams 64000 'tp_recv_datagrams with UDP_GRO, trains of 50'
