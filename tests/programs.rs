//! The programs of iptables: which programs the library runs, and the result when a program fails, hangs or is missing.
//!
//! Each test runs in a separate process, in whose mount namespace it may replace the programs of the system.

mod common;

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use common::iptables::*;
use common::*;
use libc::{EAGAIN, EIO, ENOENT, EOPNOTSUPP, EPERM};
use tproxy::ffi::*;

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
        // The scripts record what the library runs:
        setup.install().unwrap().remove().unwrap();
        assert!(proof.exists());
        assert_nothing_left();
    });
}

/// Failures of a program: its action, the errno of the call, and a part of the message.
const FAILURES: [(&str, i32, &str); 9] = [
    ("exit 1", EIO, "exit status 1"),
    ("echo oh no >&2; exit 3", EIO, "oh no"),
    ("kill -KILL $$", EIO, "killed by signal 9"),
    ("exit 0", EIO, "before the end of its input"),
    ("echo \"$last\"; echo late complaint >&2; exit 3", EIO, "late complaint"),
    // The program reports the end of its input and has done nothing.
    ("echo \"$last\"; exit 0", EIO, "reported success"),
    (
        "echo 'line 3 failed: No chain/target/match by that name.' >&2; exit 1",
        EOPNOTSUPP,
        "CONFIG_NETFILTER_XT_MATCH_SOCKET",
    ),
    ("echo 'Fatal: can not open: Permission denied' >&2; exit 4", EPERM, "CAP_NET_ADMIN"),
    // iptables exits with 111 in a set-user-ID program.
    ("exit 111", EPERM, "setresuid(0, 0, 0)"),
];

/// Returns a script that reads its input and then fails.
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

/// The library would now choose the other variant for new rules.
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

/// Another program holds the lock: the call waits, and its message then names the lock.
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
