//! Calls that run iptables programs do not depend on the signals, descriptors, environment and /proc of the calling process.
//!
//! Each test runs in a separate process, because these belong to the whole process.

mod common;

use std::os::fd::AsRawFd;
use std::time::Duration;

use common::iptables::*;
use common::*;
use libc::{EIO, EMFILE};
use tproxy::ffi::*;

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

/// Sets a disposition of SIGCHLD, or starts a thread that waits for children.
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

/// Makes calls in child processes, one for each handling of SIGCHLD. `before` runs in the process of the test before each child.
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

/// Makes each call with 0 to 19 free descriptors. A call that fails leaves nothing behind.
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

/// A daemon has closed its standard descriptors. The pipes to the programs get their numbers.
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

/// Without /proc, the legacy programs list nothing and report success.
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
