//! Makes the relocations of the shared library small. Its soname comes from whoever builds it: tools/shared.sh or cargo-c.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if packs_relocations() {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,pack-relative-relocs");
    }
}

/// Relative relocations (15 KB of them) can be a bitmap, which glibc reads since 2.36.
fn packs_relocations() -> bool {
    let var = |name| env::var(name).unwrap_or_default();
    let native = var("HOST") == var("TARGET") && var("CARGO_CFG_TARGET_ENV") == "gnu";
    let Some(output) = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok().filter(|_| native) else {
        return false;
    };
    // "glibc 2.36"
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split([' ', '.']).skip(1).map_while(|number| number.trim().parse::<u32>().ok());
    version.collect::<Vec<_>>() >= vec![2, 36]
}
