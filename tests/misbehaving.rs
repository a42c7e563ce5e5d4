//! Processes that have rules and do not serve, or have left their rules behind: `tp_check` names each by a finding, and the
//! command that the finding prints makes traffic flow again.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use common::process::Process;
use common::*;
use tproxy::ffi::*;

/// A process with rules for port 80 that behaves as its role says, until it is killed.
fn behave(role: &str) -> ! {
    let flags = if role == "persist" { TP_RULES_PERSIST } else { 0 };
    let backend = if role == "iptables" { TP_BACKEND_IPTABLES } else { TP_BACKEND_NFT };
    let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
    let _rules = RulesConfig::of(&listener).ports(&[80]).flags(flags).backend(backend).install().unwrap();
    let replaced = |by: fn() -> TcpListener, listener| {
        drop(listener);
        by()
    };
    let listener = match role {
        "plain" => replaced(|| TcpListener::bind("[::]:3129").unwrap(), listener),
        "loopback" => replaced(|| listen("127.0.0.1:3129".parse().unwrap(), 0).unwrap(), listener),
        "gone" => replaced(|| TcpListener::bind("[::]:3130").unwrap(), listener),
        _ => listener,
    };
    match role {
        "bound" => socket2::SockRef::from(&listener).bind_device(Some(b"eth1")).unwrap(),
        // SAFETY: a listening socket; its queue becomes shorter.
        "full" => assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 1) }, 0),
        "few" => allow_no_more_descriptors(),
        _ => {}
    }
    println!("ready");
    if role == "full" {
        process::wait_to_be_killed();
    }
    std::thread::spawn(move || {
        loop {
            serve_or_report(&listener);
        }
    });
    process::wait_to_be_killed()
}

/// Serves one connection. If that fails for lack of descriptors, prints once what `tp_check` says of this process.
fn serve_or_report(listener: &TcpListener) {
    if let Ok((mut stream, _)) = listener.accept() {
        stream.set_read_timeout(Some(silence())).unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(b"proxy"));
        return;
    }
    pause();
    static REPORTED: std::sync::Once = std::sync::Once::new();
    let finding = check().into_iter().find(|f| f.id == "limit.descriptors" && f.severity == TP_SEVERITY_WARNING);
    if let Some(finding) = finding {
        REPORTED.call_once(|| println!("fix: {}", finding.fix));
    }
}

fn allow_no_more_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: room for the limit, and a limit.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        // The next descriptor would have this number.
        limit.rlim_cur = std::fs::File::open("/dev/null").unwrap().as_raw_fd() as libc::rlim_t;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}

/// A lab with a server, where a process with rules behaves as its role says.
fn with_process(role: &str, test: impl FnOnce(&Lab, &mut Process)) {
    with_program(&[], role, test);
}

/// The same, with a program and its arguments that start the process.
fn with_program(program: &[&str], role: &str, test: impl FnOnce(&Lab, &mut Process)) {
    let lab = Lab::new();
    let server = lab.serve(80);
    let command = process::by_program(program, check_names_process_that_does_not_serve, role);
    let mut process = Process::start(&lab.proxy, command, "ready");
    while_answering(&[(&server, "server")], || test(&lab, &mut process));
}

/// Whether no host answers on the port that is intercepted.
fn is_broken(lab: &Lab, hosts: Hosts) -> bool {
    lab.client.run(|| said_within(at(hosts.server, 80), silence())).is_err()
}

/// Whether a host answers on that port, at the latest after some attempts.
fn works(lab: &Lab, hosts: Hosts) -> bool {
    lab.client.run(|| said_eventually(at(hosts.server, 80))).is_some()
}

#[test]
fn check_names_process_that_does_not_serve() {
    if let Some(role) = process::role() {
        behave(&role);
    }
    for (role, id, hosts) in [
        ("gone", "listener.gone", v4 as fn() -> Hosts),
        ("gone", "listener.gone", v6),
        ("plain", "listener.not_transparent", v4),
        ("plain", "listener.not_transparent", v6),
        ("loopback", "listener.unreachable", v4),
        ("bound", "listener.bound_to_interface", v4),
        ("bound", "listener.bound_to_interface", v6),
    ] {
        with_process(role, |lab, process| {
            assert!(is_broken(lab, hosts()), "{id}: it works");
            fix_finding(&lab.proxy, id, TP_SEVERITY_FAILURE);
            process.child.wait().unwrap();
            assert!(works(lab, hosts()), "{id}: not fixed");
        });
    }
}

#[test]
fn check_names_process_that_is_stopped() {
    with_process("serve", |lab, process| {
        assert!(works(lab, v4()));
        lab.proxy.sh(&format!("kill -STOP {}", process.id()));
        // Each of its threads stops when it is its turn to run.
        let stopped = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
            let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).unwrap();
            tasks.map(Result::unwrap).map(stat).all(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('T'))
        };
        eventually("the process is stopped", stopped);
        assert!(is_broken(lab, v4()));
        fix_finding(&lab.proxy, "owner.stopped", TP_SEVERITY_FAILURE);
        assert!(works(lab, v4()) && works(lab, v6()));
    });
}

#[test]
fn check_names_rules_that_outlive_their_process() {
    for (role, id) in [("persist", "instance.orphaned"), ("iptables", "instance.iptables_orphaned")] {
        with_process(role, |lab, process| {
            assert!(works(lab, v4()) && works(lab, v6()));
            process.kill();
            assert!(is_broken(lab, v4()) && is_broken(lab, v6()), "{id}: it works");
            fix_finding(&lab.proxy, id, TP_SEVERITY_FAILURE);
            assert!(works(lab, v4()) && works(lab, v6()), "{id}: not fixed");
            let left = lab.proxy.run(check);
            if let Some(routing) = left.iter().find(|finding| finding.id == "rule.orphaned") {
                lab.proxy.sh(&routing.fix);
            }
            assert!(!lab.proxy.ip("rule").contains("7470"), "routing is left");
        });
    }
}

#[test]
fn check_names_listener_whose_queue_is_full() {
    with_process("full", |lab, _| {
        let attempt = || lab.client.run(|| connect_in_vain(at(v4().server, 80))).ok();
        let open: Vec<Option<TcpStream>> = (0..5).map(|_| attempt()).collect();
        assert!(open.iter().any(Option::is_none), "the queue is not full");
        let found = lab.proxy.run(check);
        assert!(found.iter().any(|f| f.id == "listener.full" && f.severity == TP_SEVERITY_WARNING), "{found:#?}");
    });
}

#[test]
fn check_names_process_with_few_descriptors() {
    with_process("few", |lab, process| {
        assert!(is_broken(lab, v4()), "the process has descriptors");
        let line = process.line();
        let found = lab.proxy.run(check);
        let named = found.iter().find(|f| f.id == "limit.descriptors" && f.severity == TP_SEVERITY_WARNING).unwrap();
        assert_eq!(line, format!("fix: {}", named.fix), "the process itself reports another command");
        fix_finding(&lab.proxy, "limit.descriptors", TP_SEVERITY_WARNING);
        // The first connection that is served is the one that waited, whose client has given up.
        assert!(works(lab, v4()) && works(lab, v6()));
    });
}

#[test]
fn check_privilege_fix_gives_started_program_its_capabilities() {
    if process::role().is_some() {
        println!("listens: {}", listen("[::]:3129".parse().unwrap(), 0).is_ok());
        return check()
            .iter()
            .filter(|f| f.severity >= TP_SEVERITY_WARNING)
            .for_each(|f| println!("\n{} {}", f.id, f.fix));
    }
    let net = Net::new();
    let report = |program: &[&str]| {
        net.output(process::by_program(program, check_privilege_fix_gives_started_program_its_capabilities, "report"))
    };
    // Root has no capabilities here except those that programs are started with.
    let before = report(&["setpriv", "--securebits=+noroot", "--inh-caps=-all", "--"]);
    assert!(before.contains("listens: false\n"), "{before}");
    for id in ["privilege.net_admin", "privilege.transparent"] {
        let fix = before.lines().find_map(|line| line.strip_prefix(&format!("{id} "))).expect(&before);
        assert!(!fix.contains("setcap"), "{fix}");
        let command = fix.replacen("setpriv ", "setpriv --securebits=+noroot ", 1);
        let words: Vec<&str> = command.strip_suffix(" PROGRAM").expect(fix).split(' ').collect();
        let after = report(&words);
        assert!(after.contains("listens: true\n") && !after.contains("\nprivilege."), "{after}");
        with_program(&words, "serve", |lab, _| {
            for hosts in [v4(), v6()] {
                assert_eq!(lab.client.run(|| said_eventually(at(hosts.server, 80))).as_deref(), Some("proxy"));
            }
        });
    }
}
