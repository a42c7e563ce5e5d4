#!/bin/bash
# Builds what the benchmarks need, runs them all, and writes docs/benchmarks.md. `make bench` calls it.
#     run.sh [SECONDS [REPETITIONS]]    of a figure of the relay's
set -eu
cd "$(dirname "$0")/.."
make -s install DESTDIR= PREFIX="$PWD/build/stage" LIBDIR="$PWD/build/stage/lib"
export PKG_CONFIG_PATH=$PWD/build/stage/lib/pkgconfig
make -s -C examples-c OUT="$PWD/build/examples"
mkdir -p build/bench
flags="-std=gnu11 -O2 -g -Wall -Wextra -pthread"
cc $flags benches/load.c -o build/bench/load
# The same relay, the same calls, by hand.
cc $flags -Ibenches/raw -DTPROXY_ALONE examples-c/relay.c -o build/bench/relay-raw
# Calls that can be told apart: not inlined, and each by its own name.
cc $flags -Wno-uninitialized -Ibenches/raw -fno-inline -fno-ipa-cp -fno-ipa-sra -fno-optimize-sibling-calls benches/calls.c \
    -o build/bench/calls-raw
# shellcheck disable=SC2046
cc $flags $(pkg-config --cflags tproxy) benches/calls.c $(pkg-config --libs tproxy) -Wl,-rpath,"$PWD/build/stage/lib" -o build/bench/calls
echo 'int nothing;' | cc -shared -fPIC -s -x c - -o build/bench/libnothing.so
python3 benches/relay.py "$PWD/build" "$PWD/docs" "$@"

section() {
    title=$1
    shift
    printf '\n## %s\n\n```\n' "$title" | tee -a docs/benchmarks.md
    "$@" | tee -a docs/benchmarks.md
    printf '```\n' | tee -a docs/benchmarks.md
}
section 'Datagrams' bash benches/datagrams.sh
# As root without a user namespace, where nft cannot send a large set.
host=$(rustc -vV | sed -n 's/^host: //p')
runner=()
[ "$(id -u)" != 0 ] || runner=(--config "target.$host.runner=[\"unshare\", \"--net\"]")
section 'Rules' "${CARGO:-cargo}" "${runner[@]}" bench --quiet --bench rules
cat benches/missed.md >> docs/benchmarks.md
