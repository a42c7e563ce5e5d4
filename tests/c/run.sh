#!/bin/bash
# Tests the installed library from C and C++: the files, the header, the symbols, pkg-config, bad input, system calls, and the
# examples. Installs the library into build/stage. Prints a line for each test and the totals. The exit status is not 0 if a test
# failed. A test that cannot run on this machine prints a line with "skipped: " (tests/check.sh).
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
stage=$root/build/stage
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

# Runs the command in the remaining arguments, which must succeed. Prints its output if it fails.
expect() {
    local name=$1
    shift
    if ! "$@" > "$work/output" 2>&1; then
        failed=$((failed + 1))
        echo "FAILED  $name: $*"
        head -n 40 "$work/output"
    elif grep -q '^skipped: ' "$work/output"; then
        skipped=$((skipped + 1))
        grep '^skipped: ' "$work/output"
    else
        passed=$((passed + 1))
        echo "ok      $name"
    fi
}

# Runs a command in a new network namespace with loopback up, and with a new /run, where legacy iptables has its lock.
isolated() { unshare --map-root-user --net --mount sh -c 'ip link set lo up && mount -t tmpfs tmpfs /run && exec "$@"' sh "$@"; }

make -C "$root" -s install DESTDIR= PREFIX="$stage" LIBDIR="$stage/lib" || exit 1
export PKG_CONFIG_PATH=$stage/lib/pkgconfig
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
library=$stage/lib/libtproxy.so.$version
flags="-pedantic -Wall -Wextra -Werror"

# The installed files.
expect "soname" test "$(readelf -d "$library" | sed -n 's/.*soname: \[\(.*\)\]/\1/p')" = libtproxy.so.0
expect "three names" test "$(readlink "$stage/lib/libtproxy.so") $(readlink "$stage/lib/libtproxy.so.0")" = "libtproxy.so.0 libtproxy.so.$version"
nm -D --defined-only "$library" | awk '{ print $3 }' | sort > "$work/symbols"
expect "exported symbols" diff "$here/symbols.txt" "$work/symbols"
# Strips comments, which mention calls too.
cc -fpreprocessed -dD -E -P "$stage/include/tproxy.h" | grep -o '\btp_[a-z_]*(' | tr -d '(' | sort -u > "$work/declared"
declares_all() { comm -23 "$here/symbols.txt" "$work/declared" | grep . && return 1 || return 0; }
expect "the header declares every symbol" declares_all
# Without link-time optimization, the archive contains the whole standard library (22 MB).
expect "link-time optimization" test "$(stat -c %s "$stage/lib/libtproxy.a")" -lt 12000000
# libgcc unwinds the stack. The dynamic loader may be listed too.
needed_ok() { ! readelf -d "$library" | grep NEEDED | grep -vF -e '[libc.so.6]' -e '[libgcc_s.so.1]'; }
expect "needs the C library and libgcc only" needed_ok
# Budgets of the stripped library, in KiB. What a feature adds should be worth what it weighs; where readable code costs some
# KiB, a budget may grow. Full: it was 740 with compiler options that LLVM does not document; with opt-level "s" the same code
# takes a tenth more. Small, without the features check, self-test and iptables: a router's flash memory has some MB for all.
# With the standard library's backtraces (src/ffi/no_backtrace.rs) either would have some 300 more.
full=1020 small=560
is_small() {
    strip -o "$work/stripped.so" "$1" && stat -c '%s bytes' "$work/stripped.so" &&
        test "$(stat -c %s "$work/stripped.so")" -le $(($2 * 1024))
}
expect "size: at most $full KiB" is_small "$library" $full

# make install into a DESTDIR installs exactly these files, and make uninstall removes all of them.
installs_cleanly() {
    make -C "$root" -s install DESTDIR="$work/dest" PREFIX=/usr LIBDIR=/usr/lib/multi &&
        test "$(cd "$work/dest" && find . ! -type d ! -path './usr/share/man/man3/*' | sort | tr '\n' ' ')" = "./usr/bin/tproxyctl ./usr/include/tproxy.h ./usr/lib/multi/libtproxy.a \
./usr/lib/multi/libtproxy.so ./usr/lib/multi/libtproxy.so.0 ./usr/lib/multi/libtproxy.so.$version ./usr/lib/multi/pkgconfig/tproxy.pc \
./usr/share/bash-completion/completions/tproxyctl ./usr/share/man/man7/tproxy.7 ./usr/share/man/man8/tproxyctl.8 ./usr/share/zsh/site-functions/_tproxyctl " &&
        ls "$work/dest/usr/share/man/man3" | sed 's/\.3$//' | diff "$here/symbols.txt" - &&
        grep -qx 'prefix=/usr' "$work/dest/usr/lib/multi/pkgconfig/tproxy.pc" &&
        make -C "$root" -s uninstall DESTDIR="$work/dest" PREFIX=/usr LIBDIR=/usr/lib/multi &&
        test -z "$(find "$work/dest" ! -type d)"
}
expect "install and uninstall" installs_cleanly
expect "man pages: mandoc reports nothing" mandoc -Tlint "$root"/man/*.[378]

# Only the header, in every language version.
echo '#include <tproxy.h>' > "$work/header.c"
cp "$work/header.c" "$work/header.cc"
for std in c99 c11 c17 c2x; do
    expect "header, $std" cc -std=$std $flags -fsyntax-only $(pkg-config --cflags tproxy) "$work/header.c"
done
for std in c++11 c++14 c++17 c++20; do
    expect "header, $std" g++ -std=$std $flags -fsyntax-only $(pkg-config --cflags tproxy) "$work/header.cc"
done

# pkg-config, from C and C++, shared and static.
cp "$here/link.c" "$work/link.cc"
# Names the archive explicitly: otherwise the linker uses the shared library in the same directory.
static=$(pkg-config --static --libs tproxy | sed 's/-ltproxy/-l:libtproxy.a/')
for language in "cc c" "g++ cc"; do
    set -- $language
    source=$here/link.c
    [ "$2" = cc ] && source=$work/link.cc
    expect "$1, shared: link" "$1" $flags $(pkg-config --cflags tproxy) "$source" $(pkg-config --libs tproxy) -o "$work/shared-$1"
    expect "$1, shared: run" env LD_LIBRARY_PATH="$stage/lib" "$work/shared-$1"
    expect "$1, --static: link" "$1" $flags $(pkg-config --cflags tproxy) "$source" $static -o "$work/static-$1"
    expect "$1, --static: run" env LD_LIBRARY_PATH=/nowhere "$work/static-$1"
    expect "$1, fully static: link" "$1" $flags -static $(pkg-config --cflags tproxy) "$source" \
        $(pkg-config --static --libs tproxy | sed 's/-lgcc_s/-lgcc_eh/') -o "$work/fully-$1"
    expect "$1, fully static: run" "$work/fully-$1"
done

# Bad input, and system calls.
for program in bad_input syscalls environment; do
    expect "$program: build" cc -std=c11 -O2 $flags $(pkg-config --cflags tproxy) "$here/$program.c" $(pkg-config --libs tproxy) \
        -Wl,-rpath,"$stage/lib" -o "$work/$program"
done
expect "bad input: errno, outputs, descriptors" isolated "$work/bad_input"
expect "no call reads an environment variable" isolated "$work/environment"
expect "set_user_id: build" cc -std=c11 -O2 $flags -static $(pkg-config --cflags tproxy) "$here/set_user_id.c" \
    $(pkg-config --static --libs tproxy | sed 's/-lgcc_s/-lgcc_eh/') -o "$work/set_user_id"
expect "set-user-ID programs and file capabilities: no program of the user is run" "$here/set_user_id.sh" \
    "$work/set_user_id" "$stage/bin/tproxyctl"

# Lists the system calls between the two marks with their arguments, without descriptors, ports, and the buffer sizes of
# addresses.
traced() {
    isolated strace -o "$work/trace" "$work/syscalls" "$1" "$2" &&
        awk '/^write\(-1, "mark"/ { inside = !inside; next } inside' "$work/trace" |
        sed -e 's/(\([0-9]*\),/(fd,/' -e 's/sin6*_port=htons([0-9]*)/port/g' -e 's/ = [0-9]*$/ = n/' \
            -e '/^getsockname/s/, \[[0-9]* => /, [/' -e '/^accept4/s/ \[[0-9]* => / [/'
}
same_calls() {
    traced "$1" hand > "$work/equivalent" && traced "$1" library > "$work/library" && test -s "$work/equivalent" &&
        diff "$work/equivalent" "$work/library"
}
for name in socket4-stream socket6-stream socket4-dgram socket6-dgram connect4 connect6 connect4-keep connect6-keep connect4-data connect6-data connect4-dgram connect6-dgram connect4-given-dgram connect6-given-dgram orig_dst4 orig_dst6 \
    connect4-same connect6-same connect4-given connect6-given connect4-given-same connect6-given-same \
    accept4 accept6 accept4-tproxy accept6-tproxy accept4-tproxy-null accept6-tproxy-null; do
    expect "system calls of equivalent C code: $name" same_calls "$name"
done
two_calls() { traced "$1" library > "$work/library" && test "$(grep -c . "$work/library")" -le 2; }
expect "tp_orig_dst: at most two system calls" two_calls orig_dst6
expect "tp_accept of a transparent listener: at most two system calls" two_calls accept6-tproxy
# The only system call is the given one, with the given number of calls.
calls() {
    traced "$1" library > "$work/library" && test "$(grep -c "^$2(" "$work/library")" = "$3" &&
        test "$(wc -l < "$work/library")" = "$3"
}
for family in 4 6; do
    expect "tp_recvfrom: one system call, IPv$family" calls recvfrom$family recvmsg 1
    expect "tp_recv_datagrams: one system call for 64, IPv$family" calls recv_datagrams$family recvmmsg 1
    expect "tp_reply: one system call for each of 3 ports, with 64 datagrams each, IPv$family" calls reply$family sendmmsg 3
    expect "tp_reply: one system call for all raw replies, IPv$family" calls reply$family-raw sendmmsg 1
done

expect "calls: build" cc -std=gnu11 -O2 -Wall -Wextra $(pkg-config --cflags tproxy) "$root/benches/calls.c" \
    $(pkg-config --libs tproxy) -Wl,-rpath,"$stage/lib" -o "$work/calls"
expect "hot calls: instructions" isolated python3 "$root/benches/instructions.py" "$work/calls"

# The library without the features check, self-test and iptables, with the same header and the same symbols.
small_stage=$root/build/stage-small
expect "small library: build without a warning" bash -c '
    make -C "$1" -s install FEATURES= DESTDIR= PREFIX="$2" LIBDIR="$2/lib" > "$3" 2>&1; status=$?; cat "$3"
    [ $status = 0 ] && ! grep "^warning" "$3"' sh "$root" "$small_stage" "$work/small.log"
expect "small library: size at most $small KiB" is_small "$small_stage/lib/libtproxy.so" $small
expect "small library: soname" test "$(readelf -d "$small_stage/lib/libtproxy.so" | sed -n 's/.*soname: \[\(.*\)\]/\1/p')" = libtproxy.so.0
has_same_symbols() { nm -D --defined-only "$1" | awk '{ print $3 }' | sort | diff "$here/symbols.txt" -; }
expect "small library: exported symbols" has_same_symbols "$small_stage/lib/libtproxy.so"
small_flags=$(PKG_CONFIG_PATH=$small_stage/lib/pkgconfig pkg-config --cflags --libs tproxy)
expect "small library: build of its test" cc -std=c11 -O2 $flags "$here/small.c" $small_flags -Wl,-rpath,"$small_stage/lib" -o "$work/small"
expect "small library: what is left out fails with EOPNOTSUPP, and the rest works" isolated sh -c '
    ip addr add 198.51.100.1/32 dev lo && ip route add 192.0.2.0/24 dev lo src 198.51.100.1 && exec "$1"' sh "$work/small"

# The installed tool.
expect "tproxyctl: output, JSON, exit status, completion" isolated python3 "$here/tproxyctl.py" "$stage"

# The examples, built with pkg-config.
expect "examples: build" make -s -C "$root/examples-c" OUT="$root/build/examples"
expect "tcp_proxy: half-closed, few descriptors, bad arguments" python3 "$here/tcp_proxy.py" "$root/build/examples"
expect "udp_proxy: both ways, --to, idle, few sessions, refusals, bad arguments" python3 "$here/udp_proxy.py" "$root/build/examples"
expect "dns_interceptor: listed names until their TTL, hostile messages, bad arguments" \
    python3 "$here/dns_interceptor.py" "$root/build/examples"
expect "deny.h: build" cc -std=c11 -pedantic -O2 -D_GNU_SOURCE $flags "$here/deny.c" -o "$work/deny"
expect "deny.h: refused destinations, and addresses of this host" isolated "$work/deny"
expect "deny.h: the same on a host whose sockets bind to any address" isolated sh -c \
    'for v in 4 6; do echo 1 > /proc/sys/net/ipv$v/ip_nonlocal_bind; done; exec "$1"' sh "$work/deny"
expect "examples attacked: silent clients, no descriptors, denied destinations, addresses of the host" python3 "$here/attacked.py" "$root/build/examples"
expect "udp_load: build" cc -std=c11 -O2 $flags "$here/udp_load.c" -o "$work/udp_load"
expect "udp_proxy: a thousand clients, fifty servers, twenty ports" python3 "$here/udp_stress.py" "$root/build/examples" "$work/udp_load"
expect "tcp_load: build" cc -std=c11 -pedantic -O2 $flags -pthread "$here/tcp_load.c" -o "$work/tcp_load"
expect "relay: ends, resets, back-pressure, limits, idle, stop, and a mixed load with kills" python3 "$here/relay.py" "$root/build/examples" "$work/tcp_load"
expect "load: build" cc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread "$root/benches/load.c" -o "$work/load"
expect "networks: built twice beside named namespaces, no mount changes" python3 "$here/network.py" "$work/load"

# A library in which a call can be made to panic: no panic may leave the library, print a message, or be reported as success.
with_panics() {
    CARGO_TARGET_DIR="$root/build/panics" RUSTFLAGS=--cfg=tproxy_panics sh tools/shared.sh &&
        ln -sf libtproxy.so "$root/build/panics/release/libtproxy.so.0" &&
        cc -std=gnu11 -O2 $flags $(pkg-config --cflags tproxy) "$here/panics.c" $(pkg-config --libs tproxy) -o "$work/panics"
}
expect "panics: build" env -C "$root" bash -c "$(declare -f with_panics); root=$root here=$here work=$work flags='$flags' with_panics"
panics() {
    isolated env LD_LIBRARY_PATH="$root/build/panics/release" "$work/panics" > "$work/panicked" 2> "$work/printed" || return 1
    test ! -s "$work/printed" && sort "$work/panicked" | diff - <(sort "$here/symbols.txt")
}
expect "panics: every exported call fails with ENOTRECOVERABLE, and prints nothing" panics

expect "stack: build" cc -std=gnu11 -O2 $flags -pthread $(pkg-config --cflags tproxy) "$here/stack.c" \
    $(pkg-config --libs tproxy) -Wl,-rpath,"$stage/lib" -o "$work/stack"
expect "stack: no call needs more than the header states" isolated "$work/stack"
expect "memory: build" cc -std=gnu11 -O2 $flags $(pkg-config --cflags tproxy) "$here/memory.c" \
    $(pkg-config --libs tproxy) -Wl,-rpath,"$stage/lib" -o "$work/memory"
expect "memory: failed large allocations are ENOMEM, and leave nothing behind" isolated "$work/memory"
expect "cancel: build" cc -std=gnu11 -O2 $flags -pthread $(pkg-config --cflags tproxy) "$here/cancel.c" \
    $(pkg-config --libs tproxy) -Wl,-rpath,"$stage/lib" -o "$work/cancel"
expect "pthread_cancel: no call is interrupted" isolated "$work/cancel" recvfrom recv_datagrams accept connect socket-error \
    reply install iptables purge check self_test
is_no_cancellation_point() { isolated "$work/cancel" > "$work/made" && sort -u "$work/made" | diff - <(sort "$here/symbols.txt"); }
expect "pthread_cancel: no exported call is a cancellation point" is_no_cancellation_point
expect "lifecycle: build" cc -std=gnu11 -O2 $flags -pthread $(pkg-config --cflags tproxy) "$here"/lifecycle*.c \
    $(pkg-config --libs tproxy) -Wl,-rpath,"$stage/lib" -o "$work/lifecycle"
expect "lifecycle: fork, daemon, exec, exit, closefrom, chroot, users, capabilities, networks, threads" \
    python3 "$here/lifecycle.py" "$root/build/examples" "$work/lifecycle"

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
