//! The programs of iptables: which programs run, when, and with what; what becomes of rules when a program fails, hangs or is
//! missing. The signals, descriptors and environment of the calling process do not matter.
//!
//! Each test runs in a process of its own, in which it may replace the programs of the system (a mount namespace) and change
//! what a process has only once.

mod common;

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use libc::{EAGAIN, EIO, EMFILE, ENOENT, EOPNOTSUPP, EPERM};
use tproxy::ffi::*;

/// Runs the body of a test in a process, a network and a mount namespace of its own.
fn alone(test: impl Fn(), body: impl FnOnce()) {
    process::alone(test, || {
        // The legacy iptables locks a file in /run.
        own_mounts();
        mount_tmpfs("/run");
        body();
    });
}

/// Gives this thread a mount namespace of its own.
fn own_mounts() {
    // SAFETY: a plain system call; it changes this thread alone.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", std::io::Error::last_os_error());
}

/// Runs a shell command in this thread's namespaces; gives its standard output.
fn shell(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const VARIANTS: [&str; 2] = ["legacy", "nft"];

/// The variants that work on this machine. Without the legacy one the test counts as skipped.
#[track_caller]
fn variants() -> &'static [&'static str] {
    if provided(Requirement::LegacyIptables) { &VARIANTS } else { &VARIANTS[1..] }
}

/// The library's chains and jumps in the tables of both families and both variants.
fn chains() -> String {
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

fn routing() -> String {
    shell("ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all")
        .lines()
        .filter(|line| line.contains("proto 116"))
        .collect()
}

/// Asserts that no instance has left anything.
fn assert_nothing_left() {
    assert_eq!(chains() + &routing(), "");
    assert_eq!(shell("nft list tables inet"), "");
}

/// A listener, and a configuration that intercepts port 80 for it.
struct Setup {
    listener: TcpListener,
}

impl Setup {
    fn new() -> Setup {
        Setup { listener: listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT).unwrap() }
    }

    fn config(&self) -> RulesConfig {
        RulesConfig::of(&self.listener).backend(TP_BACKEND_IPTABLES).ports(&[80])
    }

    fn install(&self) -> Result<Rules, Failed> {
        self.config().install()
    }

    /// Leaves the chains and the routing of a killed process in this variant.
    fn leave(&self, variant: &str) {
        let script = self.config().render(TP_FORMAT_IPTABLES);
        // The routing is there already if this is the second variant.
        let script = if routing().is_empty() { script } else { script.replace("\nip ", "\n: ") };
        shell(&script.replace("tables-restore", &format!("tables-{variant}-restore")));
        assert_eq!(chains().matches(&format!("tables-{variant}: -A PREROUTING")).count(), 2);
    }
}

/// Makes the library choose a variant: it uses the one that has rules already.
fn prefer(variant: &str) {
    for program in ["iptables", "ip6tables"] {
        shell(&format!("{program}-{variant} --wait -A INPUT -j ACCEPT"));
    }
}

/// The names of all programs that the library could run.
fn names() -> impl Iterator<Item = String> {
    ["iptables", "ip6tables"].into_iter().flat_map(|base| {
        ["", "-nft", "-legacy"]
            .into_iter()
            .flat_map(move |variant| ["save", "restore"].map(|action| format!("{base}{variant}-{action}")))
    })
}

/// Makes a directory for this process.
fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("tproxy-programs-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The directories of programs in this thread's mount namespace, in which only the programs of iptables and the tools of the
/// tests are. The original programs are in `originals`, for scripts that do something before or after.
struct Programs {
    originals: PathBuf,
}

impl Programs {
    fn new() -> Programs {
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

    fn put(&self, name: &str, text: &str) {
        let path = Path::new("/usr/sbin").join(name);
        let _ = std::fs::remove_file(&path);
        script(&path, text);
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(Path::new("/usr/sbin").join(name)).unwrap();
    }

    /// Puts the original program there again.
    fn restore(&self, name: &str) {
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

/// PATH and the variables that iptables reads have no effect.
#[test]
fn install_rules_with_iptables_ignores_environment_of_caller() {
    alone(install_rules_with_iptables_ignores_environment_of_caller, || {
        let (evil, proof) = (directory("evil"), directory("evil").join("proof"));
        for name in names().chain(["sh".to_owned(), "modprobe".to_owned(), "ip".to_owned(), "nft".to_owned()]) {
            script(&evil.join(name), &format!("echo \"$0 $*\" >> {}", proof.display()));
        }
        let setup = Setup::new();
        for variant in variants().iter().copied() {
            setup.leave(variant);
            let honest = std::env::var_os("PATH").unwrap();
            let variables = ["XTABLES_LOCKFILE", "XTABLES_LIBDIR", "IPTABLES_LIB_DIR", "TMPDIR", "LC_ALL"];
            // SAFETY: no other thread of this process reads the environment now.
            unsafe {
                std::env::set_var("PATH", &evil);
                variables.iter().for_each(|name| std::env::set_var(name, "/nonexistent"));
            }
            let rules = setup.install().unwrap();
            rules.stats();
            rules.replace(&setup.config()).unwrap();
            rules.remove().unwrap();
            purge(None).unwrap();
            // SAFETY: as above.
            unsafe {
                std::env::set_var("PATH", honest);
                variables.iter().for_each(|name| std::env::remove_var(name));
            }
            assert_nothing_left();
        }
        assert!(!proof.exists(), "{}", std::fs::read_to_string(&proof).unwrap());
        std::fs::remove_dir_all(&evil).unwrap();
    });
}

#[test]
fn install_rules_and_purge_rules_run_iptables_only_where_needed() {
    alone(install_rules_and_purge_rules_run_iptables_only_where_needed, || {
        let setup = Setup::new();
        // Rules of other programs do not make the library run anything.
        for variant in variants().iter().copied() {
            prefer(variant);
            shell(&format!("iptables-{variant} --wait -t mangle -A PREROUTING -p tcp --dport 9 -j ACCEPT"));
        }
        let programs = Programs::new();
        let proof = programs.originals.join("proof");
        for name in names() {
            let original = programs.originals.join(&name);
            programs.put(&name, &format!("echo \"$0 $*\" >> {}\nexec {} \"$@\"", proof.display(), original.display()));
        }
        purge(None).unwrap();
        purge(Some("tproxy")).unwrap();
        let by_nft = setup.config().backend(TP_BACKEND_NFT);
        let rules = by_nft.install().unwrap();
        rules.stats();
        rules.replace(&by_nft).unwrap();
        purge(None).unwrap();
        rules.remove().unwrap();
        check();
        assert!(!proof.exists(), "{}", std::fs::read_to_string(&proof).unwrap());
        // The scripts do record what the library runs:
        setup.install().unwrap().remove().unwrap();
        assert!(proof.exists());
        assert_nothing_left();
    });
}

/// Handles SIGCHLD in one of the ways of programs.
fn reap_children(how: &str) {
    extern "C" fn reap(_: i32) {
        // SAFETY: plain system calls.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
    }
    // SAFETY: a zeroed sigaction with a handler that makes system calls only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        match how {
            "ignored" => action.sa_sigaction = libc::SIG_IGN,
            "without zombies" => action.sa_flags = libc::SA_NOCLDWAIT,
            "handler" => action.sa_sigaction = reap as *const () as usize,
            _ => {}
        }
        assert_eq!(libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut()), 0);
    }
    if how == "thread" {
        std::thread::spawn(|| {
            loop {
                // SAFETY: a plain system call.
                if unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } < 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
    }
}

/// Makes calls in processes that handle SIGCHLD in each way, each after something else in the test's process.
fn with_children_reaped(test: impl Fn(), before: impl Fn(&Setup, &str), calls: impl Fn(&Setup)) {
    alone(test, || {
        let setup = Setup::new();
        for how in ["ignored", "without zombies", "handler", "thread"] {
            for variant in variants().iter().copied() {
                println!("{how}, {variant}");
                prefer(variant);
                before(&setup, variant);
                // SAFETY: the child makes calls of the library, and ends at once.
                match unsafe { libc::fork() } {
                    0 => {
                        reap_children(how);
                        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| calls(&setup)));
                        // SAFETY: ends this child alone.
                        unsafe { libc::_exit(i32::from(outcome.is_err())) };
                    }
                    child => {
                        let mut status = 0;
                        // SAFETY: room for the status.
                        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                        assert_eq!(status, 0, "{how}, {variant}");
                    }
                }
                assert_nothing_left();
                for program in ["iptables", "ip6tables"] {
                    shell(&format!("{program}-{variant} --wait -F INPUT"));
                }
            }
        }
    });
}

#[test]
fn install_rules_with_any_sigchld_disposition_works() {
    let nothing = |_: &Setup, _: &str| {};
    with_children_reaped(install_rules_with_any_sigchld_disposition_works, nothing, |setup| {
        let rules = setup.install().unwrap();
        rules.stats();
        rules.replace(&setup.config().ports(&[81])).unwrap();
        rules.update(TP_SET_BYPASS, &prefixes(&["192.0.2.0/24"]), &[]).unwrap();
        rules.remove().unwrap();
    });
}

#[test]
fn purge_rules_with_any_sigchld_disposition_works() {
    let left = |setup: &Setup, variant: &str| setup.leave(variant);
    with_children_reaped(purge_rules_with_any_sigchld_disposition_works, left, |_| purge(None).unwrap());
}

/// Ways in which a program fails: what it does, the errno of the call, and a part of its message.
const FAILURES: [(&str, i32, &str); 9] = [
    ("exit 1", EIO, "exit status 1"),
    ("echo oh no >&2; exit 3", EIO, "oh no"),
    ("kill -KILL $$", EIO, "killed by signal 9"),
    ("exit 0", EIO, "before the end of its input"),
    ("echo \"$last\"; echo late complaint >&2; exit 3", EIO, "late complaint"),
    // It reports the end of its input, and has done nothing.
    ("echo \"$last\"; exit 0", EIO, "reported success"),
    (
        "echo 'line 3 failed: No chain/target/match by that name.' >&2; exit 1",
        EOPNOTSUPP,
        "CONFIG_NETFILTER_XT_MATCH_SOCKET",
    ),
    ("echo 'Fatal: can not open: Permission denied' >&2; exit 4", EPERM, "CAP_NET_ADMIN"),
    // What iptables does in a set-user-ID program.
    ("exit 111", EPERM, "setresuid(0, 0, 0)"),
];

/// A program that reads its input and then fails.
fn failing(action: &str) -> String {
    format!("while read -r line; do last=$line; done\n{action}")
}

fn ignore_children(ignore: bool) {
    // SAFETY: neither disposition is a handler.
    unsafe { libc::signal(libc::SIGCHLD, if ignore { libc::SIG_IGN } else { libc::SIG_DFL }) };
}

/// The program for IPv4 works, the one for IPv6 fails: nothing is left of either family.
#[test]
fn install_rules_with_failing_program_leaves_nothing() {
    alone(install_rules_with_failing_program_leaves_nothing, || {
        let setup = Setup::new();
        prefer("nft");
        let programs = Programs::new();
        for (action, errno, sentence) in FAILURES {
            for ignored in [false, true] {
                programs.put("ip6tables-nft-restore", &failing(action));
                ignore_children(ignored);
                let failed = setup.install().err().unwrap_or_else(|| panic!("{action}"));
                ignore_children(false);
                assert!(failed.sentence.contains("ip6tables-nft-restore"), "{failed}");
                // With SIGCHLD ignored the kernel gives no exit status.
                if !ignored {
                    assert!(failed.errno == errno && failed.sentence.contains(sentence), "{action}: {failed}");
                }
                assert_nothing_left();
            }
        }
    });
}

#[test]
fn replace_rules_with_failing_program_keeps_old_rules() {
    alone(replace_rules_with_failing_program_keeps_old_rules, || {
        let setup = Setup::new();
        prefer("nft");
        let rules = setup.install().unwrap();
        let before = (chains(), routing());
        let programs = Programs::new();
        for (action, errno, sentence) in FAILURES {
            for ignored in [false, true] {
                programs.put("ip6tables-nft-restore", &failing(action));
                ignore_children(ignored);
                let replaced = rules.replace(&setup.config().ports(&[81]));
                ignore_children(false);
                programs.restore("ip6tables-nft-restore");
                // The chains of both configurations have the same names: if the program reports success, nothing shows that it
                // did nothing.
                let shows = sentence != "reported success" && (!ignored || sentence != "late complaint");
                if !shows {
                    rules.replace(&setup.config()).unwrap();
                } else {
                    let failed = replaced.expect_err(action);
                    assert!(
                        ignored || failed.errno == errno && failed.sentence.contains(sentence),
                        "{action}: {failed}"
                    );
                    assert_eq!((chains(), routing()), before, "{action}");
                }
            }
        }
        rules.remove().unwrap();
        assert_nothing_left();
    });
}

/// The family that the rules do not serve has chains of the same name, which a dead process has left.
#[test]
fn install_rules_for_one_family_removes_stale_chains_of_the_other() {
    alone(install_rules_for_one_family_removes_stale_chains_of_the_other, || {
        let setup = Setup::new();
        let programs = Programs::new();
        for variant in variants().iter().copied() {
            setup.leave(variant);
            let ipv4 = setup.config().families(TP_FAMILY_IPV4);
            programs.put(&format!("ip6tables-{variant}-restore"), &failing("echo oh no >&2; exit 1"));
            let failed = ipv4.install().err().unwrap();
            assert!(failed.errno == EIO && failed.sentence.contains("oh no"), "{failed}");
            programs.restore(&format!("ip6tables-{variant}-restore"));
            let rules = ipv4.install().unwrap();
            assert!(chains().contains("iptables") && !chains().contains("ip6tables"), "{}", chains());
            rules.remove().unwrap();
            assert_nothing_left();
        }
    });
}

/// Each table is a transaction of its own: the second may fail after the first.
#[test]
fn install_rules_and_replace_rules_that_fail_in_second_table_restore_the_first() {
    alone(install_rules_and_replace_rules_that_fail_in_second_table_restore_the_first, || {
        let setup = Setup::new();
        let programs = Programs::new();
        let plain = TcpListener::bind("[::]:3130").unwrap();
        let redirect = setup.config().listeners(&[&plain]).flags(TP_RULES_REDIRECT);
        let other = redirect.clone().ports(&[81]);
        for variant in variants().iter().copied() {
            prefer(variant);
            let restore = format!("ip6tables-{variant}-restore");
            let original = programs.originals.join(&restore);
            let half = format!("sed '/COMMIT/q' | {} \"$@\"; echo oh no >&2; exit 1", original.display());
            programs.put(&restore, &half);
            // The program fails again when the change is undone, which the message says.
            let failed = redirect.install().err().unwrap();
            assert!(failed.errno == EIO && failed.sentence.contains("oh no"), "{failed}");
            programs.restore(&restore);
            purge(None).unwrap();
            assert_nothing_left();
            let rules = redirect.install().unwrap();
            let before = chains();
            assert!(before.contains("-j REDIRECT"), "{before}");
            // This program fails once.
            let once = programs.originals.join(format!("once-{variant}"));
            let text = format!("if mkdir {}; then {half}; fi; exec {} \"$@\"", once.display(), original.display());
            programs.put(&restore, &text);
            let failed = rules.replace(&other).unwrap_err();
            assert!(failed.errno == EIO && failed.sentence.contains("oh no"), "{failed}");
            assert!(!failed.sentence.contains("could not be undone"), "{failed}");
            assert_eq!(chains(), before);
            programs.restore(&restore);
            rules.remove().unwrap();
            assert_nothing_left();
            for program in ["iptables", "ip6tables"] {
                shell(&format!("{program}-{variant} --wait -F INPUT"));
            }
        }
    });
}

#[test]
fn remove_rules_and_purge_rules_with_failing_program_are_errors() {
    alone(remove_rules_and_purge_rules_with_failing_program_are_errors, || {
        let setup = Setup::new();
        let programs = Programs::new();
        for variant in variants().iter().copied() {
            prefer(variant);
            for (action, errno, sentence) in FAILURES {
                for ignored in [false, true] {
                    let program = format!("iptables-{variant}-restore");
                    let rules = setup.install().unwrap();
                    programs.put(&program, &failing(action));
                    ignore_children(ignored);
                    let failures =
                        [rules.remove(), purge(None), purge(Some("tproxy"))].map(|outcome| outcome.expect_err(action));
                    ignore_children(false);
                    for failed in failures {
                        assert!(failed.sentence.contains(&program), "{failed}");
                        assert!(
                            ignored || failed.errno == errno && failed.sentence.contains(sentence),
                            "{action}: {failed}"
                        );
                    }
                    programs.restore(&program);
                    purge(None).unwrap();
                    assert_nothing_left();
                }
            }
            for program in ["iptables", "ip6tables"] {
                shell(&format!("{program}-{variant} --wait -F INPUT"));
            }
        }
    });
}

/// `iptables-save` lists less than there is: chains that it does not list would be left.
#[test]
fn purge_rules_and_install_rules_with_incomplete_list_are_eio() {
    alone(purge_rules_and_install_rules_with_incomplete_list_are_eio, || {
        let setup = Setup::new();
        let programs = Programs::new();
        for variant in variants().iter().copied() {
            let save = format!("iptables-{variant}-save");
            let original = programs.originals.join(&save);
            let cut = [
                "exit 0".to_owned(),
                format!("{} \"$@\" | head -n 8", original.display()),
                format!("{} \"$@\" | grep -v COMMIT", original.display()),
            ];
            for action in cut {
                for ignored in [false, true] {
                    setup.leave(variant);
                    programs.put(&save, &action);
                    ignore_children(ignored);
                    let failures = [purge(None).expect_err(&action), setup.install().expect_err(&action)];
                    ignore_children(false);
                    for failed in failures {
                        assert_eq!(failed.errno, EIO, "{failed}");
                        assert!(
                            failed.sentence.contains(&format!("{save} does not list chain tp-tproxy-")),
                            "{failed}"
                        );
                    }
                    programs.restore(&save);
                    purge(None).unwrap();
                    assert_nothing_left();
                }
            }
        }
    });
}

#[test]
fn purge_rules_without_programs_is_eopnotsupp_where_chains_are_left() {
    alone(purge_rules_without_programs_is_eopnotsupp_where_chains_are_left, || {
        let setup = Setup::new();
        let programs = Programs::new();
        for variant in variants().iter().copied() {
            setup.leave(variant);
            names().for_each(|name| programs.remove(&name));
            for name in [None, Some("tproxy")] {
                let failed = purge(name).unwrap_err();
                assert_eq!(failed.errno, EOPNOTSUPP, "{failed}");
                assert!(failed.sentence.contains(&format!("iptables-{variant}-save")), "{failed}");
                assert!(failed.sentence.contains("install the package iptables"), "{failed}");
            }
            // Another name has no chains.
            purge(Some("other")).unwrap();
            names().for_each(|name| programs.restore(&name));
            assert_eq!(chains().matches("-A PREROUTING").count(), 2);
            purge(None).unwrap();
            assert_nothing_left();
        }
        // Where nothing is left, no program is needed.
        names().for_each(|name| programs.remove(&name));
        purge(None).unwrap();
        assert_eq!(setup.install().err().unwrap().errno, EOPNOTSUPP);
        names().for_each(|name| programs.restore(&name));
        assert_nothing_left();
    });
}

/// Old versions have only the names without a variant.
#[test]
fn install_rules_finds_programs_by_their_plain_names() {
    alone(install_rules_finds_programs_by_their_plain_names, || {
        let setup = Setup::new();
        let programs = Programs::new();
        for variant in variants().iter().copied() {
            prefer(variant);
            names().for_each(|name| programs.remove(&name));
            for program in ["iptables", "ip6tables"] {
                for action in ["save", "restore"] {
                    let multi = programs.originals.join(format!("{variant}-multi"));
                    symlink(multi, format!("/usr/sbin/{program}-{action}")).unwrap();
                }
            }
            let rules = setup.install().unwrap();
            rules.stats();
            rules.replace(&setup.config()).unwrap();
            rules.remove().unwrap();
            names().for_each(|name| programs.restore(&name));
            assert_nothing_left();
            for program in ["iptables", "ip6tables"] {
                shell(&format!("{program}-{variant} --wait -F INPUT"));
            }
        }
    });
}

/// The library would choose the other variant now.
#[test]
fn replace_rules_and_remove_rules_find_the_variant_with_the_chains() {
    if !provided(Requirement::LegacyIptables) {
        return;
    }
    alone(replace_rules_and_remove_rules_find_the_variant_with_the_chains, || {
        let setup = Setup::new();
        let rules = setup.install().unwrap();
        assert!(chains().contains("iptables-nft:") && !chains().contains("-legacy:"));
        // Another program begins to use the legacy variant, which would be chosen now.
        prefer("legacy");
        rules.stats();
        rules.replace(&setup.config()).unwrap();
        assert!(!chains().contains("-legacy:"));
        rules.remove().unwrap();
        assert_nothing_left();
        // Chains are left in both variants: only one gets new ones.
        VARIANTS.into_iter().for_each(|variant| setup.leave(variant));
        let rules = setup.install().unwrap();
        assert_eq!(chains().matches("-A PREROUTING").count(), 2, "{}", chains());
        rules.remove().unwrap();
        assert_nothing_left();
        VARIANTS.into_iter().for_each(|variant| setup.leave(variant));
        purge(Some("tproxy")).unwrap();
        assert_nothing_left();
    });
}

/// Another program holds the lock: the call waits, then names it.
#[test]
fn purge_rules_with_held_legacy_lock_is_eagain() {
    if !provided(Requirement::LegacyIptables) {
        return;
    }
    alone(purge_rules_with_held_legacy_lock_is_eagain, || {
        let setup = Setup::new();
        setup.leave("legacy");
        let lock = std::fs::File::open("/run/xtables.lock").unwrap();
        // SAFETY: a plain system call.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        let begin = Instant::now();
        let failed = purge(None).unwrap_err();
        assert_eq!(failed.errno, EAGAIN, "{failed}");
        assert!(failed.sentence.contains("fuser -v /run/xtables.lock"), "{failed}");
        // iptables waits five seconds for the lock.
        let elapsed = begin.elapsed();
        assert!(elapsed >= Duration::from_secs(5) && elapsed < limit(60_000), "{elapsed:?}");
        drop(lock);
        purge(None).unwrap();
        assert_nothing_left();
    });
}

#[test]
fn purge_rules_with_unwritable_legacy_lock_is_eperm() {
    if !provided(Requirement::LegacyIptables) {
        return;
    }
    alone(purge_rules_with_unwritable_legacy_lock_is_eperm, || {
        let setup = Setup::new();
        setup.leave("legacy");
        let _programs = Programs::new();
        shell("mount -t tmpfs -o ro tmpfs /run");
        let failed = purge(None).unwrap_err();
        assert_eq!(failed.errno, EPERM, "{failed}");
        assert!(failed.sentence.contains("/run/xtables.lock"), "{failed}");
        shell("umount /run");
        purge(None).unwrap();
        assert_nothing_left();
    });
}

/// Each call with 0 to 19 free descriptors: a call that fails leaves nothing.
#[test]
fn rules_calls_without_descriptors_fail_or_complete() {
    alone(rules_calls_without_descriptors_fail_or_complete, || {
        let setup = Setup::new();
        let limited = |left: i32, call: &mut dyn FnMut() -> Result<(), Failed>| {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
            // SAFETY: room for the limit, and limits.
            let before = unsafe {
                libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
                let before = limit.rlim_cur;
                limit.rlim_cur = (next + left) as libc::rlim_t;
                assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
                before
            };
            let outcome = call();
            limit.rlim_cur = before;
            // SAFETY: a limit.
            unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
            outcome
        };
        for variant in variants().iter().copied() {
            prefer(variant);
            let (mut failures, mut successes) = ([0; 4], 0);
            for left in 0..20 {
                setup.leave(variant);
                match limited(left, &mut || purge(None)) {
                    Ok(()) => assert_nothing_left(),
                    Err(failed) => {
                        assert_eq!(failed.errno, EMFILE, "{left}: {failed}");
                        failures[0] += 1;
                    }
                }
                purge(None).unwrap();
                let mut rules = None;
                match limited(left, &mut || setup.install().map(|installed| rules = Some(installed))) {
                    Ok(()) => {}
                    Err(failed) => {
                        assert_eq!(failed.errno, EMFILE, "{left}: {failed}");
                        failures[1] += 1;
                        assert!(failed.sentence.contains("could not be undone") || chains().is_empty(), "{failed}");
                        purge(None).unwrap();
                        assert_nothing_left();
                    }
                }
                drop(rules);
                let rules = setup.install().unwrap();
                let before = (chains(), routing());
                let replacement = setup.config().ports(&[81]);
                if let Err(failed) = limited(left, &mut || rules.replace(&replacement)) {
                    assert_eq!(failed.errno, EMFILE, "{left}: {failed}");
                    assert!(
                        failed.sentence.contains("could not be undone") || (chains(), routing()) == before,
                        "{failed}"
                    );
                    failures[2] += 1;
                }
                let mut rules = Some(rules);
                match limited(left, &mut || rules.take().unwrap().remove()) {
                    Ok(()) => {
                        assert_nothing_left();
                        successes += 1;
                    }
                    Err(failed) => {
                        assert_eq!(failed.errno, EMFILE, "{left}: {failed}");
                        failures[3] += 1;
                        purge(None).unwrap();
                        assert_nothing_left();
                    }
                }
            }
            assert!(failures.iter().all(|count| *count > 3) && successes > 0, "{failures:?} {successes}");
            for program in ["iptables", "ip6tables"] {
                shell(&format!("{program}-{variant} --wait -F INPUT"));
            }
        }
    });
}

/// A daemon has closed its standard descriptors, whose numbers the pipes get.
#[test]
fn install_rules_with_closed_standard_descriptors_works() {
    alone(install_rules_with_closed_standard_descriptors_works, || {
        let setup = Setup::new();
        for variant in variants().iter().copied() {
            prefer(variant);
            for closed in [&[0][..], &[1], &[2], &[0, 1], &[1, 2], &[0, 2], &[0, 1, 2]] {
                // SAFETY: the child has descriptors of its own, and ends at once.
                match unsafe { libc::fork() } {
                    0 => {
                        // SAFETY: nothing in this child uses these descriptors.
                        closed.iter().for_each(|fd| unsafe { _ = libc::close(*fd) });
                        let works = || {
                            let rules = setup.install()?;
                            rules.replace(&setup.config())?;
                            rules.remove()
                        };
                        let outcome: Result<(), Failed> = works();
                        // SAFETY: ends this child alone.
                        unsafe { libc::_exit(outcome.map_or_else(|failed| failed.errno, |()| 0)) };
                    }
                    child => {
                        let mut status = 0;
                        // SAFETY: room for the status.
                        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                        assert_eq!(status, 0, "{variant}, {closed:?}");
                    }
                }
            }
            assert_nothing_left();
            for program in ["iptables", "ip6tables"] {
                shell(&format!("{program}-{variant} --wait -F INPUT"));
            }
        }
    });
}

/// Without /proc the legacy programs list nothing and report success.
#[test]
fn purge_rules_without_proc_removes_or_is_eio() {
    alone(purge_rules_without_proc_removes_or_is_eio, || {
        let setup = Setup::new();
        for variant in variants().iter().copied() {
            setup.leave(variant);
            let outcome = std::thread::scope(|scope| {
                let hidden = scope.spawn(|| {
                    own_mounts();
                    mount_tmpfs("/proc");
                    purge(None)
                });
                hidden.join().unwrap()
            });
            match outcome {
                Ok(()) => assert_nothing_left(),
                Err(failed) => assert_eq!(failed.errno, EIO, "{failed}"),
            }
            purge(None).unwrap();
            assert_nothing_left();
        }
    });
}

/// Rules of other programs that look like the jumps of the library are kept.
#[test]
fn purge_rules_keeps_foreign_chains_with_similar_names() {
    alone(purge_rules_keeps_foreign_chains_with_similar_names, || {
        let setup = Setup::new();
        for variant in variants().iter().copied() {
            for program in ["iptables", "ip6tables"] {
                let rules = [
                    "-N tp-link-p",
                    "-A PREROUTING -m comment --comment 'libtproxy tproxy' -j ACCEPT",
                    "-A PREROUTING -m comment --comment 'libtproxy link' -j RETURN",
                    "-A PREROUTING -j tp-link-p",
                    "-A PREROUTING -m comment --comment 'x --comment \"libtproxy link\" -j tp-link-p' -j ACCEPT",
                ];
                rules.iter().for_each(|rule| drop(shell(&format!("{program}-{variant} --wait -t mangle {rule}"))));
            }
            let save =
                || ["iptables", "ip6tables"].map(|p| shell(&format!("{p}-{variant}-save -t mangle | grep '^-A\\|^:'")));
            let before = save();
            setup.leave(variant);
            purge(None).unwrap();
            purge(Some("link")).unwrap();
            assert_eq!(save(), before);
            let rules = setup.install().unwrap();
            rules.remove().unwrap();
            assert_eq!(save(), before);
            for program in ["iptables", "ip6tables"] {
                shell(&format!("{program}-{variant} --wait -t mangle -F; {program}-{variant} --wait -t mangle -X"));
            }
        }
    });
}

/// Another program has deleted the chains.
#[test]
fn read_stats_of_deleted_chains_is_enoent() {
    alone(read_stats_of_deleted_chains_is_enoent, || {
        let setup = Setup::new();
        let rules = setup.install().unwrap();
        let read = || {
            // SAFETY: integers, for which all zero is valid.
            let mut stats: tp_rules_stats = unsafe { std::mem::zeroed() };
            // SAFETY: NULL is the default name, and there is room for the struct.
            checked(unsafe { tp_read_stats(std::ptr::null(), &raw mut stats, size_of::<tp_rules_stats>()) })
        };
        read().unwrap();
        for program in ["iptables", "ip6tables"] {
            shell(&format!("{program}-nft -t mangle -F; {program}-nft -t mangle -X"));
        }
        assert_eq!(read().unwrap_err().errno, ENOENT);
        rules.remove().unwrap();
        assert_nothing_left();
    });
}
