//! The programs of iptables, which tests replace, and the chains of the library.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use tproxy::ffi::*;

/// Runs the body of a test in a separate process with new network and mount namespaces.
pub fn alone(test: impl Fn(), body: impl FnOnce()) {
    process::alone(test, || {
        // Legacy iptables locks a file in /run.
        own_mounts();
        mount_tmpfs("/run");
        body();
    });
}

/// Gives this thread a new mount namespace.
pub fn own_mounts() {
    // SAFETY: a plain system call; it changes this thread alone.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", std::io::Error::last_os_error());
}

/// Runs a shell command in this thread's namespaces, and returns its standard output.
pub fn shell(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The variants of iptables.
pub const VARIANTS: [&str; 2] = ["legacy", "nft"];

/// Returns the variants that work on this machine. Without the legacy variant, the test counts as skipped.
#[track_caller]
pub fn variants() -> &'static [&'static str] {
    if provided(Requirement::LegacyIptables) { &VARIANTS } else { &VARIANTS[1..] }
}

/// Returns the library's chains and jumps in the tables of both families and both variants.
pub fn chains() -> String {
    let mut found = String::new();
    for program in ["iptables", "ip6tables"] {
        for variant in VARIANTS {
            if variant == "legacy" && !is_met(Requirement::LegacyIptables) {
                continue;
            }
            let save = shell(&format!("{program}-{variant}-save"));
            for line in save.lines().filter(|line| line.contains("tp-") && !line.contains("-link-")) {
                found.push_str(&format!("{program}-{variant}: {line}\n"));
            }
        }
    }
    found
}

/// Returns the library's routing policy rules and routes.
pub fn routing() -> String {
    shell("ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all")
        .lines()
        .filter(|line| line.contains("proto 116"))
        .collect()
}

/// Asserts that no chain, routing rule, route or table of the library remains.
pub fn assert_nothing_left() {
    assert_eq!(chains() + &routing(), "");
    assert_eq!(shell("nft list tables inet"), "");
}

/// A listener, and a configuration that intercepts port 80 for it.
pub struct Setup {
    listener: TcpListener,
}

impl Setup {
    pub fn new() -> Setup {
        Setup { listener: listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT).unwrap() }
    }

    pub fn config(&self) -> RulesConfig {
        RulesConfig::of(&self.listener).backend(TP_BACKEND_IPTABLES).ports(&[80])
    }

    pub fn install(&self) -> Result<Rules, Failed> {
        self.config().install()
    }

    /// Creates the chains and the routing that a killed process leaves in this variant.
    pub fn leave(&self, variant: &str) {
        let script = self.config().render(TP_FORMAT_IPTABLES);
        // The routing exists if this is the second variant.
        let script = if routing().is_empty() { script } else { script.replace("\nip ", "\n: ") };
        shell(&script.replace("tables-restore", &format!("tables-{variant}-restore")));
        assert_eq!(chains().matches(&format!("tables-{variant}: -A PREROUTING")).count(), 2);
    }
}

/// Makes the library choose a variant, by adding rules to it.
pub fn prefer(variant: &str) {
    for program in ["iptables", "ip6tables"] {
        shell(&format!("{program}-{variant} --wait -A INPUT -j ACCEPT"));
    }
}

/// Returns the names of all programs that the library may run.
pub fn names() -> impl Iterator<Item = String> {
    ["iptables", "ip6tables"].into_iter().flat_map(|base| {
        ["", "-nft", "-legacy"]
            .into_iter()
            .flat_map(move |variant| ["save", "restore"].map(|action| format!("{base}{variant}-{action}")))
    })
}

/// Creates a directory for this process.
pub fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("tproxy-programs-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Writes a shell script.
pub fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Directories of programs in this thread's mount namespace that have only the iptables programs and the tools of the tests.
/// `originals` has the original programs, which the replacing scripts can call.
pub struct Programs {
    pub originals: PathBuf,
}

impl Programs {
    pub fn new() -> Programs {
        own_mounts();
        let originals = directory("originals");
        for variant in VARIANTS {
            let program = std::fs::canonicalize(format!("/usr/sbin/iptables-{variant}-save")).unwrap();
            std::fs::copy(program, originals.join(format!("{variant}-multi"))).unwrap();
        }
        for name in names() {
            let variant = if name.contains("-legacy") { "legacy" } else { "nft" };
            symlink(originals.join(format!("{variant}-multi")), originals.join(&name)).unwrap();
        }
        for program in ["iptables", "ip6tables"] {
            for variant in VARIANTS {
                symlink(originals.join(format!("{variant}-multi")), originals.join(format!("{program}-{variant}")))
                    .unwrap();
            }
        }
        // The tools of the tests themselves.
        for tool in ["ip", "nft"] {
            let path = shell(&format!("PATH=$PATH:/usr/sbin:/sbin command -v {tool}"));
            std::fs::copy(path.trim(), originals.join(tool)).unwrap();
        }
        mount_tmpfs("/usr/sbin");
        if !std::fs::symlink_metadata("/sbin").unwrap().is_symlink() {
            mount_tmpfs("/sbin");
        }
        let programs = Programs { originals };
        for tool in ["ip", "nft", "iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"] {
            symlink(programs.originals.join(tool), Path::new("/usr/sbin").join(tool)).unwrap();
        }
        names().for_each(|name| programs.restore(&name));
        programs
    }

    /// Replaces a program by a shell script.
    pub fn put(&self, name: &str, text: &str) {
        let path = Path::new("/usr/sbin").join(name);
        let _ = std::fs::remove_file(&path);
        script(&path, text);
    }

    /// Removes a program.
    pub fn remove(&self, name: &str) {
        std::fs::remove_file(Path::new("/usr/sbin").join(name)).unwrap();
    }

    /// Restores the original program.
    pub fn restore(&self, name: &str) {
        let path = Path::new("/usr/sbin").join(name);
        let _ = std::fs::remove_file(&path);
        symlink(self.originals.join(name), path).unwrap();
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.originals);
    }
}
