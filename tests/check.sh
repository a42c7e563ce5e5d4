#!/bin/bash
# All checks, and one line that counts them. `make check` calls it.
#
# A test that cannot run on this machine prints "skipped: TEST: REASON; needs `COMMAND`", and counts as skipped, not as
# passed. If root runs the checks, a skipped test is a failure if its command succeeds: the machine can run the test.
set -u
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
passed=0 failed=0 skipped=0
root=
[ "$(id -u)" != 0 ] || root=yes

say() { printf '== %s\n' "$*"; }

count() {
    passed=$((passed + $1))
    failed=$((failed + $2))
    skipped=$((skipped + ${3:-0}))
}

# The lines about skipped tests in a log, one for each test. What stands before them belongs to the test runner.
skips() { sed -n 's/.*\(skipped: .*\)/\1/p' "$1" | sort -t : -k 2,2 -u; }

# Runs a shell command as root in a network namespace, with an empty /run, where the legacy iptables has its lock.
as_root() { unshare --net --mount sh -ec "mount -t tmpfs tmpfs /run; $1" > /dev/null 2>&1; }

# How many of the skipped tests in a log this machine could run. Each of them is printed.
possible() {
    [ -n "$root" ] || { echo 0; return; }
    local line command number=0
    while read -r line; do
        command=$(sed -n 's/.*; needs `\(.*\)`$/\1/p' <<< "$line")
        if [ -z "$command" ] || as_root "$command"; then
            number=$((number + 1))
            echo "FAILED  this machine can run it: $line" >&2
        fi
    done < <(skips "$1")
    echo $number
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

# Rust's test runner, or several runs of it: its own totals, and the end of its output if a test failed.
rust_tests() {
    "$@" > "$work/log" 2>&1
    local status=$? good bad skips
    read -r good bad < <(awk '/^test result:/ { p += $4; f += $6 } END { print p + 0, f + 0 }' "$work/log")
    # A runner that breaks off has failed too, whatever it counted.
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    [ "$bad" = 0 ] || tail -n 100 "$work/log"
    # For the runner a skipped test has passed.
    skips=$(skips "$work/log" | tee -a /dev/stderr | wc -l)
    good=$((good - skips)) bad=$((bad + $(possible "$work/log")))
    echo "$good passed, $bad failed, $skips skipped"
    count "$good" "$bad" "$skips"
}

# Another script that counts, and prints a line for each check.
script() {
    bash "$1" 2>&1 | tee "$work/log" | grep -v '^ok'
    # Without such a line the script has broken off.
    count $(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' "$work/log" | tail -n 1 | grep . || echo 0 1)
    count 0 "$(possible "$work/log")"
}

# Kernel modules cannot be loaded in user namespaces, in which the tests run.
if [ -n "$root" ]; then
    modprobe -aq br_netfilter nf_conntrack 2> /dev/null
    for program in iptables-legacy ip6tables-legacy; do
        for table in raw mangle nat filter; do as_root "$program -t $table -S"; done
    done
fi

# Tests wait for packets more than they compute: more of them at a time than there are processors.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-4}

say 'source: format, lints, documentation'
one 'cargo fmt' cargo fmt --check
one 'cargo clippy' cargo clippy --all-targets --quiet -- -D warnings
# With some of the features, and with none: the library and its unit tests.
for features in '' capi check self-test iptables 'check capi' 'check iptables capi'; do
    one "cargo clippy: features \"$features\"" cargo clippy --lib --profile test --no-default-features --features "$features" --quiet -- -D warnings
    one "cargo clippy: library with features \"$features\"" cargo clippy --lib --no-default-features --features "$features" --quiet -- -D warnings
done
one 'cargo package: the crate builds from what is published' cargo package --offline --allow-dirty --quiet
one 'rustdoc' env RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --document-private-items --quiet

say 'Rust: unit, property, golden and namespace tests, the header'
rust_tests cargo test --no-fail-fast
say 'Rust: unit tests without features'
rust_tests cargo test --lib --no-default-features

say 'C and C++: the installed library'
script tests/c/run.sh

say 'Python: the package, with every version that there is'
script bindings/python/check.sh

say 'demo'
one 'make demo' make -s demo

if [ -n "$root" ]; then
    # The same binaries, run by a user without privileges.
    nobody='setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all'
    say 'as an ordinary user: namespace tests, demo'
    cp -r build/examples build/stage examples-c "$work"
    # Where cargo has them: the tests in a directory beside that of the examples.
    mkdir "$work/deps"
    cp target/debug/examples/proxy "$work/examples"
    # Those that compare the source tree with what is generated from it, or compile a part of it, do not run here.
    cargo test --no-run --message-format=json 2> /dev/null |
        sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' |
        while read -r name path; do
            [ "$name" = header ] || [ "$name" = man ] || [ "$name" = dscp ] || cp "$path" "$work/deps/$name"
        done
    as_nobody() {
        local test
        for test in "$work"/deps/*; do
            (cd / && $nobody unshare --map-root-user --net --mount "$test") || return 1
        done
    }
    rust_tests as_nobody
    one 'demo' env -C / LD_LIBRARY_PATH="$work/stage/lib" $nobody /usr/bin/python3 "$work/examples-c/demo.py" "$work/examples"
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
