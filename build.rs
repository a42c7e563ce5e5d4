//! Gives the shared library its soname. cargo-c (feature `capi`) sets one of
//! its own, and two would be an error.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CAPI").is_none() {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libtproxy.so.0");
    }
}
