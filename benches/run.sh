#!/bin/bash
# Builds and runs the benchmarks, and writes their results to docs/benchmarks.md. `make bench` calls it.
#     run.sh [SECTION ...]    only these sections; the others stay on the page as they are
# Environment:
#     QUICK=1    tests in seconds that every benchmark works; the results go to build/bench/quick
#     DOCS       the directory of the page and its plots, instead of docs
set -eu -o pipefail
cd "$(dirname "$0")/.."
sections=$(python3 benches/page.py names "$@")
docs=${DOCS:-docs}
case ${QUICK:-0} in
0) unset QUICK ;;
*)
    export QUICK=1
    docs=build/bench/quick
    rm -rf "$docs"
    ;;
esac
mkdir -p "$docs" build/bench
if [ "$(id -u)" != 0 ] && [ -z "${QUICK:-}" ] && [[ " $sections " = *' destinations '* ]]; then
    echo 'section destinations needs root: in a user namespace nft cannot load large sets (net.core.wmem_max)' >&2
    exit 1
fi

make -s install DESTDIR= PREFIX="$PWD/build/stage" LIBDIR="$PWD/build/stage/lib"
export PKG_CONFIG_PATH=$PWD/build/stage/lib/pkgconfig
make -s -C examples-c OUT="$PWD/build/examples"
build() {
    local name=$1
    shift
    cc -std=gnu11 -O2 -g -Wall -Wextra -pthread "$@" -o "build/bench/$name"
}
with_library=$(pkg-config --cflags --libs tproxy)
with_library="$with_library -Wl,-rpath,$PWD/build/stage/lib"
build load benches/load.c
# The same relay with equivalent C code in place of the library.
build relay-raw -Ibenches/raw examples-c/relay.c examples-c/relay_*.c
# callgrind counts by function: the equivalent C code must not be inlined, cloned or tail-called.
build calls-raw -Wno-uninitialized -Ibenches/raw -fno-inline -fno-ipa-cp -fno-ipa-sra -fno-optimize-sibling-calls benches/calls.c
# shellcheck disable=SC2086
build calls benches/calls.c $with_library
# shellcheck disable=SC2086
build datagrams -Werror benches/datagrams.c $with_library
echo 'int nothing;' | cc -shared -fPIC -s -x c - -o build/bench/libnothing.so

rules() {
    local host runner=()
    host=$(rustc -vV | sed -n 's/^host: //p')
    # In a user namespace nft cannot load large sets, so root uses only a network namespace.
    [ "$(id -u)" != 0 ] || runner=(--config "target.$host.runner=[\"unshare\", \"--net\"]")
    "${CARGO:-cargo}" "${runner[@]}" bench --quiet --bench rules
}

fenced() {
    echo '```'
    "$@"
    echo '```'
}

for section in $sections; do
    printf '\n== %s\n' "$section"
    case $section in
    datagrams) fenced bash benches/datagrams.sh build/bench/datagrams ;;
    rules) fenced rules ;;
    *) python3 benches/relay.py "$PWD/build" "$docs" "$section" ;;
    esac | tee "build/bench/$section.md"
    python3 benches/page.py write "$docs" "$section" < "build/bench/$section.md"
done
printf '\nwritten: %s/benchmarks.md\n' "$docs"
