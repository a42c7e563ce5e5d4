#!/bin/bash
# Checks the Python package: lints, types, packaging, and its tests with every
# Python that is installed. Prints a line for each check, and the totals.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/build/python
tools=$work/tools/bin
passed=0 failed=0 skipped=0
sh "$root/tests/deps.sh" python || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
cd "$here" || exit 1

# A command that is one check: it succeeds, or its output is shown.
expect() {
    local what=$1
    shift
    if "$@" > "$work/output" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $what"
    else
        failed=$((failed + 1))
        echo "FAILED  $what: $*"
        tail -n 40 "$work/output"
    fi
}

expect 'ruff check' "$tools/ruff" check --no-cache .
expect 'ruff format' "$tools/ruff" format --no-cache --check .
expect 'mypy --strict' "$tools/mypy" --strict --cache-dir "$work/mypy"

# A source distribution, and a wheel out of it alone: the wheel that the tests are run with.
rm -rf "$work/dist" "$work/unpacked"
build() { "$tools/python" -m build --no-isolation --outdir "$work/dist" "$@" .; }
expect 'build: source distribution' build --sdist
unpack() { mkdir -p "$work/unpacked" && tar -xzf "$work"/dist/tproxy-*.tar.gz -C "$work/unpacked" --strip-components 1; }
build_alone() { unpack && (cd "$work/unpacked" && build --wheel); }
expect 'build: wheel from the source distribution' build_alone
expect 'twine check' "$tools/twine" check --strict "$work"/dist/*
wheel=$(ls "$work"/dist/tproxy-*-py3-none-linux_*.whl)
has_its_files() {
    "$tools/python" -m zipfile -l "$wheel" > "$work/files"
    for file in libtproxy.so.0 py.typed LICENSE-MIT LICENSE-APACHE; do grep -q "^tproxy/$file " "$work/files" || return 1; done
}
expect 'the wheel is for any Python 3, and has the library' has_its_files
pip() { "$tools/python" -m pip --quiet --disable-pip-version-check --python "$@"; }

# From the repository as a user would, in isolation: what pyproject.toml says that building needs is all there is.
# It is not downloaded again.
fresh=$work/fresh/bin/python
for way in --no-deps --editable; do
    rm -rf "$work/fresh" && "$tools/python" -m venv --without-pip "$work/fresh"
    install() { PIP_NO_INDEX=1 PIP_FIND_LINKS=$work/wheels pip "$fresh" install "$way" "$here"; }
    expect "pip install $way ./bindings/python" install
    expect 'and its library is there' env -C / "$fresh" -W error -m tproxy version
done

# The suite, with every Python at once and in several processes each: it waits more than it works. What counts 10,000
# calls is for the oldest and the newest.
versions=$(cd "$work" && ls -d 3.* | grep -v log | sort -V)
oldest=$(head -n 1 <<< "$versions") newest=$(tail -n 1 <<< "$versions")
# In seconds.
limit=$(awk "BEGIN { print 600 * ${TPROXY_TEST_TIME_FACTOR:-1} }")
pids=
for version in $versions; do
    python=$work/$version/bin/python
    which=
    case $version in "$oldest" | "$newest") ;; *) which='not costly' ;; esac
    # The tests use the installed wheel, not the folder beside them.
    (
        pip "$python" install --force-reinstall --no-deps "$wheel" &&
            cd / && timeout "$limit" "$python" -m pytest -q -rs -n 3 -m "$which" "$here/tests"
    ) > "$work/$version.log" 2>&1 &
    pids="$pids $version:$!"
done
for pair in $pids; do
    version=${pair%:*}
    wait "${pair#*:}"
    status=$?
    # pytest's last line: "1 failed, 202 passed, 1 error in 60.00s".
    count() { tail -n 1 "$work/$version.log" | tr ',' '\n' | awk -v what="$1" '$2 ~ what { n = $1 } END { print n + 0 }'; }
    good=$(count passed) left_out=$(count skipped) bad=$(($(count failed) + $(count error)))
    # A runner that breaks off has failed too, whatever it counted.
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    echo "Python $version: $good passed, $bad failed, $left_out skipped"
    [ "$bad" = 0 ] || tail -n 100 "$work/$version.log"
    passed=$((passed + good)) failed=$((failed + bad)) skipped=$((skipped + left_out))
    sed -n 's/^SKIPPED \[[0-9]*\] \([^ ]*\): \(.*\)/skipped: \1 \2/p' "$work/$version.log"
done

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
