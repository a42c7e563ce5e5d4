#!/bin/sh
# Runs cargo-mutants on source files, and prints the mutants that no test has noticed and docs/mutants.md does not explain.
# `make mutants` calls it, with FILES, TESTS and SHARD in the environment.
set -u
cd "$(dirname "$0")/.." || exit 1
cargo mutants --version > /dev/null 2>&1 || {
    echo 'cargo-mutants is missing; `cargo install cargo-mutants --locked` installs it' >&2
    exit 1
}
out=build/mutants
mkdir -p "$out"
set -- --output "$out" --timeout 300 --no-shuffle
for file in ${FILES:?names the source files}; do set -- "$@" --file "$file"; done
[ -z "${SHARD:-}" ] || set -- "$@" --shard "$SHARD"
# shellcheck disable=SC2086 # several arguments
cargo mutants "$@" -- ${TESTS:---lib --test golden}
[ -e "$out/mutants.out/missed.txt" ] || exit 1
# Lines and columns change: a mutant is known by its file and what follows.
sed 's/^\([^:]*\):[0-9]*:[0-9]*: /\1: /' "$out/mutants.out/missed.txt" | sort -u > "$out/missed"
sed -n '/^## Not decided/q; s/^    \(src\/.*\)/\1/p' docs/mutants.md | sort -u > "$out/known"
if comm -23 "$out/missed" "$out/known" | grep .; then
    echo 'no test notices these mutants, and docs/mutants.md does not explain them' >&2
    exit 1
fi
