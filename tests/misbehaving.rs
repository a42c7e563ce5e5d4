//! Processes that have rules and do not serve, or have left them: each is named by its finding's id, and the command
//! that the finding prints makes traffic flow again.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use tproxy::ffi::*;

const HOLD: &str = "TPROXY_TEST_HOLD";

/// What a process does that has rules, until it is killed.
fn hold(how: &str) {
    if how == "report" {
        let port = listen("[::]:3129".parse().unwrap(), 0);
        println!("listens: {}", port.is_ok());
        return check()
            .iter()
            .filter(|f| f.severity >= TP_SEVERITY_WARNING)
            .for_each(|f| println!("\n{} {}", f.id, f.fix));
    }
    let flags = if how == "persist" { TP_RULES_PERSIST } else { 0 };
    let backend = if how == "iptables" { TP_BACKEND_IPTABLES } else { TP_BACKEND_NFT };
    let port = tp_port_range { first: 80, last: 80 };
    let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
    let fd = listener.as_raw_fd();
    let _rules = Rules::install(&tp_rules_config {
        listeners: &raw const fd,
        n_listeners: 1,
        ports: &raw const port,
        n_ports: 1,
        flags,
        backend,
        ..config()
    })
    .unwrap();
    let replaced = |by: fn() -> TcpListener, listener| {
        drop(listener);
        by()
    };
    let listener = match how {
        "plain" => replaced(|| TcpListener::bind("[::]:3129").unwrap(), listener),
        "loopback" => replaced(|| listen("127.0.0.1:3129".parse().unwrap(), 0).unwrap(), listener),
        "gone" => replaced(|| TcpListener::bind("[::]:3130").unwrap(), listener),
        _ => listener,
    };
    if how == "bound" {
        socket2::SockRef::from(&listener).bind_device(Some(b"eth1")).unwrap();
    }
    if how == "full" {
        // SAFETY: a listening socket of ours; the number of connections that may wait is made smaller.
        assert_eq!(unsafe { libc::listen(fd, 1) }, 0);
    }
    if how == "few" {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: room for the limit, and a limit.
        unsafe {
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
            // The next descriptor would have this number.
            limit.rlim_cur = std::fs::File::open("/dev/null").unwrap().as_raw_fd() as libc::rlim_t;
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
        }
    }
    println!("held");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while how != "full" && std::time::Instant::now() < deadline {
        if how == "few" {
            // What the process can say of itself.
            let command =
                check().into_iter().find(|f| f.id == "limit.descriptors" && f.severity == TP_SEVERITY_WARNING);
            command.into_iter().for_each(|finding| println!("fix: {}", finding.fix));
        }
        if let Ok((mut stream, _)) = listener.accept() {
            stream.set_read_timeout(Some(limit(900))).unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(b"proxy"));
        } else {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    std::thread::sleep(Duration::from_secs(60));
}

/// A process that holds rules in a lab, in which a server answers too.
fn held(how: &str, test: impl FnOnce(&Lab, &mut Child)) {
    held_by(&[std::env::current_exe().unwrap().to_str().unwrap()], how, test);
}

/// What makes this program do something.
fn arguments<'a>(program: &[&'a str]) -> Vec<&'a str> {
    [program, &["--exact", "rules_and_their_process", "--nocapture"]].concat()
}

/// The same, by a program and its first arguments.
fn held_by(program: &[&str], how: &str, test: impl FnOnce(&Lab, &mut Child)) {
    let lab = Lab::new();
    let server = lab.serve(80);
    let arguments = arguments(program);
    let mut child = lab.proxy.run(|| {
        Command::new(arguments[0]).args(&arguments[1..]).env(HOLD, how).stdout(Stdio::piped()).spawn().unwrap()
    });
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.ends_with("held\n") {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "{how}: it installed nothing");
    }
    child.stdout = Some(output.into_inner());
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| answer_all(&server, "server", &enough));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&lab, &mut child)));
        enough.store(true, Ordering::Relaxed);
        let _ = child.kill();
        child.wait().unwrap();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Somebody answers on the port that is intercepted.
fn answered(lab: &Lab, hosts: Hosts) -> bool {
    lab.client.run(|| said(at(hosts.server, 80))).is_ok()
}

/// The same, on a machine that may be too busy for the first try.
fn answered_at_last(lab: &Lab, hosts: Hosts) -> bool {
    (0..5).any(|_| answered(lab, hosts))
}

#[test]
fn rules_and_their_process() {
    if let Ok(how) = std::env::var(HOLD) {
        return hold(&how);
    }
    for (how, id, hosts) in [
        ("gone", "listener.gone", v4 as fn() -> Hosts),
        ("gone", "listener.gone", v6),
        ("plain", "listener.not_transparent", v4),
        ("plain", "listener.not_transparent", v6),
        ("loopback", "listener.unreachable", v4),
        ("bound", "listener.bound_to_interface", v4),
        ("bound", "listener.bound_to_interface", v6),
    ] {
        held(how, |lab, child| {
            assert!(!answered(lab, hosts()), "{id}: it works");
            cured(&lab.proxy, id, TP_SEVERITY_FAILURE);
            child.wait().unwrap();
            assert!(answered_at_last(lab, hosts()), "{id}: not cured");
        });
    }
}

#[test]
fn a_process_that_is_stopped() {
    held("serve", |lab, child| {
        assert!(answered_at_last(lab, v4()));
        lab.proxy.sh(&format!("kill -STOP {}", child.id()));
        // Each of its threads stops when it is its turn to run.
        let running = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
            let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).unwrap();
            tasks.map(Result::unwrap).map(stat).any(|stat| !stat.rsplit_once(") ").unwrap().1.starts_with('T'))
        };
        let deadline = std::time::Instant::now() + patience();
        while running() {
            assert!(std::time::Instant::now() < deadline, "it goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!answered(lab, v4()));
        cured(&lab.proxy, "owner.stopped", TP_SEVERITY_FAILURE);
        assert!(answered_at_last(lab, v4()) && answered_at_last(lab, v6()));
    });
}

#[test]
fn rules_that_outlive_their_process() {
    for (how, id) in [("persist", "instance.orphaned"), ("iptables", "instance.iptables_orphaned")] {
        held(how, |lab, child| {
            assert!(answered_at_last(lab, v4()) && answered_at_last(lab, v6()));
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!answered(lab, v4()) && !answered(lab, v6()), "{id}: it works");
            cured(&lab.proxy, id, TP_SEVERITY_FAILURE);
            assert!(answered_at_last(lab, v4()) && answered_at_last(lab, v6()), "{id}: not cured");
            let left = lab.proxy.run(check);
            if let Some(routing) = left.iter().find(|finding| finding.id == "rule.orphaned") {
                lab.proxy.sh(&routing.fix);
            }
            assert!(!lab.proxy.ip("rule").contains("7470"), "routing is left");
        });
    }
}

#[test]
fn a_queue_that_is_full() {
    held("full", |lab, _| {
        let attempt = || lab.client.run(|| TcpStream::connect_timeout(&at(v4().server, 80), limit(900))).ok();
        let open: Vec<Option<TcpStream>> = (0..5).map(|_| attempt()).collect();
        assert!(open.iter().any(Option::is_none), "the queue has room");
        let found = lab.proxy.run(check);
        assert!(found.iter().any(|f| f.id == "listener.full" && f.severity == TP_SEVERITY_WARNING), "{found:#?}");
    });
}

#[test]
fn a_process_with_few_descriptors() {
    held("few", |lab, child| {
        assert!(!answered(lab, v4()), "it has descriptors");
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let found = lab.proxy.run(check);
        let named = found.iter().find(|f| f.id == "limit.descriptors" && f.severity == TP_SEVERITY_WARNING).unwrap();
        assert_eq!(line, format!("fix: {}\n", named.fix), "the process itself says the same");
        cured(&lab.proxy, "limit.descriptors", TP_SEVERITY_WARNING);
        // The connection that waited is served first, to nobody.
        assert!(answered_at_last(lab, v4()) && answered_at_last(lab, v6()));
        child.stdout = Some(output.into_inner());
    });
}

#[test]
fn program_started_as_its_finding_says_has_the_capabilities() {
    let net = Net::new();
    let program = std::env::current_exe().unwrap();
    // Root is a user like others here, who has what programs are started with.
    let plain = ["setpriv", "--securebits=+noroot", "--inh-caps=-all", "--", program.to_str().unwrap()];
    let report = format!("{HOLD}=report");
    let before = net.command("env", &[&[report.as_str()], &arguments(&plain)[..]].concat());
    assert!(before.contains("listens: false\n"), "{before}");
    for id in ["privilege.net_admin", "privilege.transparent"] {
        let fix = before.lines().find_map(|line| line.strip_prefix(&format!("{id} "))).expect(&before);
        assert!(!fix.contains("setcap"), "{fix}");
        let command = fix.replacen("setpriv ", "setpriv --securebits=+noroot ", 1);
        let command = command.replace("PROGRAM", program.to_str().unwrap());
        let words: Vec<&str> = command.split(' ').collect();
        let after = net.command("env", &[&[report.as_str()], &arguments(&words)[..]].concat());
        assert!(after.contains("listens: true\n") && !after.contains("\nprivilege."), "{after}");
        held_by(&words, "serve", |lab, _| {
            for hosts in [v4(), v6()] {
                let ask = |_| lab.client.run(|| said(at(hosts.server, 80))).ok();
                assert_eq!((0..5).find_map(ask).as_deref(), Some("proxy"));
            }
        });
    }
}
