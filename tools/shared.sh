#!/bin/sh
# Builds the shared library as it is installed, and as it is packed for Python. Takes cargo's options, such as --features;
# CARGO_TARGET_DIR says where to.
#
# The soname is given here and not by build.rs, because cargo-c gives one of its own. With a frame pointer, unwind tables
# are smaller by 18 KB. The profile `release` (Cargo.toml) has the other options.
exec ${CARGO:-cargo} rustc --release --lib --crate-type cdylib "$@" -- \
    --cfg=tproxy_shared -Cforce-frame-pointers=yes -Clink-arg=-Wl,-soname,libtproxy.so.0
