#!/bin/bash
# All checks, and one line that counts them. `make check` calls it.
set -u
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
passed=0 failed=0

say() { printf '== %s\n' "$*"; }

count() {
    passed=$((passed + $1))
    failed=$((failed + $2))
}

# A command that is one check: it succeeds, or its output is shown.
one() {
    local what=$1
    shift
    if "$@" > "$work/log" 2>&1; then
        echo "ok      $what"
        count 1 0
    else
        echo "FAILED  $what"
        tail -n 60 "$work/log"
        count 0 1
    fi
}

# Rust's test runner, or several runs of it: its own totals, and what failed.
rust_tests() {
    "$@" > "$work/log" 2>&1
    local status=$?
    local totals
    totals=$(awk '/^test result:/ { p += $4; f += $6 } END { print p + 0, f + 0 }' "$work/log")
    set -- $totals
    # A runner that breaks off has failed too, whatever it counted.
    if [ "$status" != 0 ] && [ "$2" = 0 ]; then set -- "$1" 1; fi
    [ "$2" = 0 ] || tail -n 100 "$work/log"
    echo "$1 passed, $2 failed"
    count "$1" "$2"
}

say 'source: format, lints, documentation'
one 'cargo fmt' cargo fmt --check
one 'cargo clippy' cargo clippy --all-targets --quiet -- -D warnings
one 'rustdoc' env RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --document-private-items --quiet

say 'Rust: unit, property, golden and namespace tests, the header'
rust_tests cargo test

say 'C and C++: the installed library'
bash tests/c/run.sh 2>&1 | tee "$work/c" | grep -v '^ok'
counts=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$work/c" | tail -n 1)
count ${counts:-0 1}

say 'Python: the package, with every version that there is'
bash bindings/python/check.sh 2>&1 | tee "$work/python" | grep -v '^ok'
counts=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$work/python" | tail -n 1)
count ${counts:-0 1}

say 'demo'
one 'make demo' make -s demo

if [ "$(id -u)" = 0 ]; then
    # The same binaries, run by somebody who may do nothing on this host.
    nobody='setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all'
    say 'as an ordinary user: namespace tests, demo'
    cp -r build/examples build/stage examples-c "$work"
    cargo test --no-run --message-format=json 2> /dev/null |
        sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' |
        while read -r name path; do
            [ "$name" = header ] || [ "$name" = man ] || [ "$name" = troubleshooting ] || cp "$path" "$work/test-$name"
        done
    as_nobody() {
        local test
        for test in "$work"/test-*; do
            (cd / && $nobody unshare --map-root-user --net --mount "$test") || return 1
        done
    }
    rust_tests as_nobody
    one 'demo' env -C / LD_LIBRARY_PATH="$work/stage/lib" $nobody /usr/bin/python3 "$work/examples-c/demo.py" "$work/examples"
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
