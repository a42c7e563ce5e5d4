//! tp_self_test: probes through rules, in a network of their own.

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::*;
use socket2::SockAddr;
use tproxy::ffi::*;

fn self_test(config: &tp_rules_config) -> Result<Vec<Found>, Failed> {
    let mut found: Vec<Found> = Vec::new();
    let begin = Instant::now();
    // SAFETY: the function that takes such a context; the config's pointers are the caller's, alive.
    let rc = unsafe { tp_self_test(config, size_of::<tp_rules_config>(), Some(take), (&raw mut found).cast()) };
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let failures = checked(rc)?;
    assert_eq!(failures as usize, found.iter().filter(|f| f.severity == TP_SEVERITY_FAILURE).count());
    Ok(found)
}

/// A test of rules for a listener at an address.
fn tested(listen: &str, change: impl FnOnce(&mut tp_rules_config)) -> Vec<Found> {
    let addr = SockAddr::from(listen.parse::<SocketAddr>().unwrap());
    let mut config = tp_rules_config { listen_addr: addr.as_ptr().cast(), listen_addrlen: addr.len(), ..config() };
    change(&mut config);
    self_test(&config).unwrap()
}

/// Severity, id, and the first words.
fn short(found: &[Found]) -> Vec<(u32, &str, &str)> {
    found.iter().map(|f| (f.severity, f.id.as_str(), f.message.split(" from ").next().unwrap())).collect()
}

const BOTH: u32 = TP_PROTO_TCP | TP_PROTO_UDP;

fn served(v4: bool, v6: bool, udp: bool) -> Vec<(u32, &'static str, &'static str)> {
    let mut expected = Vec::new();
    for (served, connection, datagram) in
        [(v4, "IPv4 connection", "IPv4 datagram"), (v6, "IPv6 connection", "IPv6 datagram")]
    {
        if served {
            expected.push((TP_SEVERITY_OK, "self_test.connection", connection));
            if udp {
                expected.push((TP_SEVERITY_OK, "self_test.datagram", datagram));
            }
        }
    }
    for (absent, words) in [(!v4, "IPv4: not asked for"), (!v6, "IPv6: not asked for"), (!udp, "udp: not asked for")] {
        if absent {
            expected.push((TP_SEVERITY_NOTE, "self_test.skipped", words));
        }
    }
    expected
}

#[test]
fn what_works_is_delivered_and_answered() {
    let port = tp_port_range { first: 443, last: 8443 };
    let dst = prefixes(&["192.0.2.128/25", "2001:db8:77::/48"]);
    let src = prefixes(&["10.0.0.0/8", "fd00::/8"]);
    let bypass = prefixes(&["203.0.113.0/24", "2001:db8:2::/48"]);
    let eth7 = [c"eth7".as_ptr()];
    assert_eq!(short(&tested("[::]:3129", |c| c.protocols = BOTH)), served(true, true, true));
    assert_eq!(short(&tested("[::]:3129", |_| {})), served(true, true, false));
    assert_eq!(short(&tested("0.0.0.0:3129", |c| c.protocols = BOTH)), served(true, false, true));
    assert_eq!(short(&tested("127.0.0.1:3129", |c| c.protocols = BOTH)), served(true, false, true));
    assert_eq!(short(&tested("[::1]:3129", |c| c.protocols = BOTH)), served(false, true, true));
    let chosen = tested("[::]:3129", |c| {
        (c.protocols, c.ports, c.n_ports, c.mark, c.mark_mask) = (BOTH, &raw const port, 1, 0x10, 0x10);
        (c.dst, c.n_dst, c.src, c.n_src) = (dst.as_ptr(), 2, src.as_ptr(), 2);
        (c.bypass, c.n_bypass, c.interfaces, c.n_interfaces) = (bypass.as_ptr(), 2, eth7.as_ptr(), 1);
    });
    assert_eq!(short(&chosen), served(true, true, true));
    assert!(
        chosen[0].message.contains(" from 10.0.0.2:") && chosen[0].message.contains(" to 192.0.2.130:443:"),
        "{chosen:?}"
    );
    let aside = tested("[::]:3129", |c| (c.bypass, c.n_bypass) = (bypass.as_ptr(), 2));
    assert_eq!(short(&aside), served(true, true, false));
    for flags in [TP_RULES_LOCAL_OUTPUT, TP_RULES_FAIL_OPEN, TP_RULES_ALLOW_DIRECT, TP_RULES_NOTRACK, TP_RULES_PERSIST]
    {
        assert_eq!(short(&tested("[::]:3129", |c| (c.flags, c.protocols) = (flags, BOTH))), served(true, true, true));
    }
    assert_eq!(short(&tested("[::]:3129", |c| c.flags = TP_RULES_REDIRECT)), served(true, true, false));
    assert_eq!(short(&tested("203.0.113.1:3129", |c| c.flags = TP_RULES_REDIRECT)), served(true, false, false));
    let iptables = tested("[::]:3129", |c| (c.backend, c.protocols) = (TP_BACKEND_IPTABLES, BOTH));
    assert_eq!(short(&iptables), served(true, true, true));
}

#[test]
fn sockets_on_foreign_addresses_get_theirs() {
    let config = tp_rules_config { flags: TP_RULES_DIVERT_ONLY, protocols: BOTH, ..config() };
    assert_eq!(short(&self_test(&config).unwrap()), served(true, true, true));
}

/// The listener is on loopback, and what is translated to there is a martian.
#[test]
fn what_is_lost_was_last_seen_at_a_hook() {
    let found = tested("127.0.0.1:3129", |c| c.flags = TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT);
    assert_eq!(found[0].severity, TP_SEVERITY_FAILURE, "{found:#?}");
    let words = "lost; last seen at hook prerouting, last: routing did not deliver it (a martian, or no route)";
    assert!(found[0].message.ends_with(words), "{found:#?}");
}

/// What the rules drop themselves is named by chain: here the destination is the listener itself, which is guarded.
#[test]
fn what_is_dropped_was_dropped_by_a_rule() {
    let own = prefixes(&["192.0.2.1/32"]);
    let port = tp_port_range { first: 3129, last: 3129 };
    let found =
        tested("0.0.0.0:3129", |c| (c.dst, c.n_dst, c.ports, c.n_ports) = (own.as_ptr(), 1, &raw const port, 1));
    assert_eq!(found[0].severity, TP_SEVERITY_FAILURE, "{found:#?}");
    let words = "; last seen in chain direct of table libtproxy-tproxy, where rule ";
    assert!(found[0].message.contains(words) && found[0].message.ends_with(" dropped it"), "{found:#?}");
}

#[test]
fn the_callers_network_is_left_alone() {
    let net = Net::new();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let before = net.state() + &net.ip("-o link") + &net.ip("addr");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
    net.run(|| {
        let namespace = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let mine = namespace();
        let found = self_test(&tp_rules_config { listeners: &raw const fd, n_listeners: 1, ..config() }).unwrap();
        assert_eq!(short(&found), served(true, true, false));
        assert_eq!(namespace(), mine);
    });
    assert_eq!(net.state() + &net.ip("-o link") + &net.ip("addr"), before);
}

#[test]
fn bad_wishes_and_missing_privileges_are_refused() {
    let failed = self_test(&config()).unwrap_err();
    assert_eq!(failed.errno, libc::EINVAL);
    assert!(failed.sentence.contains("no listeners"), "{failed}");
    // SAFETY: NULL is allowed to be tried.
    let failed = checked(unsafe { tp_self_test(&config(), size_of::<tp_rules_config>(), None, std::ptr::null_mut()) });
    assert_eq!(failed.unwrap_err().errno, libc::EFAULT);
    const ALONE: &str = "TPROXY_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        let failed = self_test(&tp_rules_config { flags: TP_RULES_DIVERT_ONLY, ..config() }).unwrap_err();
        println!("errno {}: {}", failed.errno, failed.sentence);
        return;
    }
    let test = std::env::current_exe().unwrap();
    let name = "bad_wishes_and_missing_privileges_are_refused";
    let output = std::process::Command::new("setpriv")
        .args(["--bounding-set=-sys_admin", "--inh-caps=-all", "--"])
        .arg(test)
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.contains("errno 1: unshare(CLONE_NEWNET): ") && output.contains("`unshare -r PROGRAM`"), "{output}");
}

/// By itself in a process: neither a descriptor nor a thread is left, and no signal is lost or goes astray.
#[test]
fn nothing_is_left_behind() {
    const ALONE: &str = "TPROXY_TEST_LEAVINGS";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "nothing_is_left_behind", "--test-threads=1"])
            .env(ALONE, "1")
            .status()
            .unwrap();
        return assert!(status.success());
    }
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let blocked = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().find(|line| line.starts_with("SigBlk")).unwrap().to_owned()
    };
    let config = tp_rules_config { flags: TP_RULES_DIVERT_ONLY, ..config() };
    self_test(&config).unwrap();
    let before = (count("fd"), count("task"), blocked());
    for _ in 0..5 {
        self_test(&config).unwrap();
        assert_eq!(check().iter().filter(|finding| finding.severity == TP_SEVERITY_FAILURE).count(), 0);
    }
    assert_eq!((count("fd"), count("task"), blocked()), before);
}
