//! Rules begin whole, end whole, and leave others alone.

mod common;

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use common::*;
use libc::{EADDRINUSE, EBADF, EBUSY, EEXIST, EINVAL, ENETDOWN, ENOTSOCK, EPERM};
use tproxy::ffi::*;

const HOLD: &str = "TPROXY_TEST_HOLD";

/// Rules last until their process removes them or ends. Other tests start this one as a process of its own, which
/// listens on [::]:3129 in their namespace, under the name that the environment gives, until it is killed.
#[test]
fn rules_last_as_long_as_their_holder() {
    if let Ok(name) = std::env::var(HOLD) {
        let name = std::ffi::CString::new(name).unwrap();
        let listener = listen("[::]:3129".parse().unwrap(), TP_REUSEPORT).unwrap();
        let _rules = install(&listener, |config| config.name = name.as_ptr()).unwrap();
        println!("held");
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
    let net = Net::new();
    let listener = listener(&net);
    let rules = net.run(|| install(&listener, |_| {})).unwrap();
    assert_eq!(net.nft("list tables"), "table inet libtproxy-tproxy\n");
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.nft("list tables"), "");
}

fn install(listener: &impl AsRawFd, change: impl FnOnce(&mut tp_rules_config)) -> Result<Rules, Failed> {
    let fd = listener.as_raw_fd();
    let port = tp_port_range { first: 80, last: 80 };
    let mut config =
        tp_rules_config { listeners: &raw const fd, n_listeners: 1, ports: &raw const port, n_ports: 1, ..config() };
    change(&mut config);
    Rules::install(&config)
}

/// Another process with rules in this namespace.
struct Holder(Child);

impl Holder {
    fn start(net: &Net, name: &str) -> Holder {
        let mut child = net.run(|| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "rules_last_as_long_as_their_holder", "--nocapture"])
                .env(HOLD, name)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.ends_with("held")), "the other process installed nothing");
        Holder(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn listener(net: &Net) -> std::net::TcpListener {
    net.run(|| listen("[::]:3129".parse().unwrap(), TP_REUSEPORT)).unwrap()
}

#[test]
fn installing_and_removing_leaves_the_host_as_it_was() {
    let net = Net::new();
    let before = net.state();
    let listener = listener(&net);
    for _ in 0..20 {
        let rules = net.run(|| install(&listener, |_| {})).unwrap();
        assert_ne!(net.state(), before);
        net.run(|| rules.remove()).unwrap();
        assert_eq!(net.state(), before);
    }
}

#[test]
fn a_killed_process_leaves_no_table_and_the_next_start_works_at_once() {
    let lab = Lab::new();
    let before = lab.proxy.state();
    Holder::start(&lab.proxy, "").kill();
    assert_eq!(lab.proxy.nft("list tables"), "");
    // What it left of routing affects nothing: the server is reached as if it had never been.
    let server = lab.serve(80);
    std::thread::scope(|scope| {
        scope.spawn(|| answer_one(&server));
        lab.ask(at(v4().server, 80)).unwrap();
    });
    let listener = listener(&lab.proxy);
    let rules = lab.proxy.run(|| install(&listener, |_| {})).unwrap();
    let _client = lab.client.run(|| connect(at(v4().server, 80)));
    assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), at(v4().server, 80));
    lab.proxy.run(|| rules.remove()).unwrap();
    assert_eq!(lab.proxy.state(), before, "what the killed process left is gone too");
}

#[test]
fn a_name_that_a_living_process_has_is_busy_and_another_is_not() {
    let net = Net::new();
    let holder = Holder::start(&net, "mine");
    let listener = listener(&net);
    let before = net.state();
    let failed = net.run(|| install(&listener, |c| c.name = c"mine".as_ptr())).err().unwrap();
    assert_eq!(failed.errno, EBUSY);
    assert!(failed.sentence.contains(&format!("process {} ", holder.0.id())), "{failed}");
    assert_eq!(net.state(), before);
    // Side by side under another name, and the first is not touched when the second ends.
    let other = net.run(|| install(&listener, |c| c.name = c"other".as_ptr())).unwrap();
    net.run(|| other.remove()).unwrap();
    assert_eq!(net.state(), before);
    // A place that the living process has cannot be had either.
    for change in [(|c| c.priority = 202) as fn(&mut tp_rules_config), |c| c.table = 7470] {
        let failed = net
            .run(|| {
                install(&listener, |c| {
                    c.name = c"other".as_ptr();
                    change(c);
                })
            })
            .err()
            .unwrap();
        assert_eq!(failed.errno, EBUSY, "{failed}");
    }
    assert_eq!(net.state(), before);
    holder.kill();
}

#[test]
fn a_dead_instances_place_is_not_taken_for_a_living_ones() {
    let net = Net::new();
    let before = net.state();
    let first = Holder::start(&net, "first");
    let second = Holder::start(&net, "second");
    first.kill();
    let listener = listener(&net);
    // The first place is free again, and what was left there is replaced.
    let rules = net.run(|| install(&listener, |_| {})).unwrap();
    assert_eq!(net.ip("-4 rule").matches("proto 116").count(), 6);
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.ip("-4 rule").matches("proto 116").count(), 3, "the living instance keeps its own");
    second.kill();
    // The second's leftovers are in the second place; whoever comes there replaces them.
    let one = net.run(|| install(&listener, |c| c.name = c"one".as_ptr())).unwrap();
    let two = net.run(|| install(&listener, |c| c.name = c"two".as_ptr())).unwrap();
    net.run(|| one.remove().and(two.remove())).unwrap();
    assert_eq!(net.state(), before);
}

/// Whatever place the next instance has, nothing of a dead one stays to send its packets astray.
#[test]
fn leftovers_that_overlap_the_next_place_do_no_harm() {
    for priority in [198, 201, 203, 1000] {
        let lab = Lab::new();
        let before = lab.proxy.state();
        for interface in ["all", "eth0", "eth1"] {
            lab.proxy.sysctl(&format!("ipv4/conf/{interface}/src_valid_mark"), "1");
            lab.proxy.sysctl(&format!("ipv4/conf/{interface}/rp_filter"), "1");
        }
        Holder::start(&lab.proxy, "").kill();
        let listener = listener(&lab.proxy);
        let rules = lab.proxy.run(|| install(&listener, |c| c.priority = priority)).unwrap();
        let to = at(v4().server, 80);
        let _client = lab.client.run(|| TcpStream::connect_timeout(&to, patience())).unwrap();
        assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), to);
        lab.proxy.run(|| rules.remove()).unwrap();
        assert_eq!(lab.proxy.state(), before);
    }
}

#[test]
fn a_dead_instances_routes_go_with_its_rules() {
    let net = Net::new();
    let before = net.state();
    Holder::start(&net, "").kill();
    let listener = net.run(|| listen("0.0.0.0:3129".parse().unwrap(), 0)).unwrap();
    let rules = net.run(|| install(&listener, |c| c.table = 99)).unwrap();
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.state(), before);
}

/// A rule with our protocol number that we did not make cannot be deleted as ours; it must not be tried for ever.
#[test]
fn a_rule_that_only_looks_like_ours_does_not_stop_anybody() {
    let net = Net::new();
    net.ip("rule add pref 500 goto 32766 protocol 116");
    let listener = listener(&net);
    let rules = net.run(|| install(&listener, |_| {})).unwrap();
    net.run(|| rules.remove()).unwrap();
}

#[test]
fn thousands_of_ports_and_interfaces() {
    let net = Net::new();
    let listener = listener(&net);
    let ports: Vec<_> = (1..=4000).map(|n| tp_port_range { first: n * 2, last: n * 2 }).collect();
    let names: Vec<_> = (0..4000).map(|n| std::ffi::CString::new(format!("eth{n}")).unwrap()).collect();
    let _rules = net
        .run(|| {
            let names: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
            install(&listener, |c| {
                (c.ports, c.n_ports) = (ports.as_ptr(), ports.len());
                (c.interfaces, c.n_interfaces) = (names.as_ptr(), names.len());
            })
        })
        .unwrap();
    let sets = net.nft("list sets");
    assert!(sets.contains("eth3999") && sets.contains(" 8000"));
}

#[test]
fn a_routing_table_that_someone_else_uses_is_avoided() {
    let net = Net::new();
    net.ip("route add local default dev lo table 7470");
    let before = net.state();
    let listener = listener(&net);
    let rules = net.run(|| install(&listener, |_| {})).unwrap();
    assert!(net.ip("rule").contains("lookup 7471"), "{}", net.ip("rule"));
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.state(), before);
}

#[test]
fn a_host_without_ipv6_is_served_ipv4() {
    let lab = Lab::new();
    for interface in ["all", "default", "lo"] {
        lab.proxy.sysctl(&format!("ipv6/conf/{interface}/disable_ipv6"), "1");
    }
    let listener = listener(&lab.proxy);
    let failed = lab.proxy.run(|| install(&listener, |c| c.families = TP_IPV4 | TP_IPV6)).err().unwrap();
    assert!(failed.sentence.contains("IPv6 is disabled on lo"), "{failed}");
    let _rules = lab.proxy.run(|| install(&listener, |_| {})).unwrap();
    let to = at(v4().server, 80);
    let _client = lab.client.run(|| TcpStream::connect_timeout(&to, patience())).unwrap();
    assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), to);
}

#[test]
fn a_firewall_reload_leaves_the_rules_alone() {
    let lab = Lab::new();
    let listener = listener(&lab.proxy);
    let _rules = lab.proxy.run(|| install(&listener, |_| {})).unwrap();
    lab.proxy.nft("flush ruleset");
    let _client = lab.client.run(|| connect(at(v6().server, 80)));
    assert_eq!(orig_dst(&accept(&listener).0).unwrap(), at(v6().server, 80));
}

#[test]
fn rules_of_others_are_avoided_and_never_touched() {
    let net = Net::new();
    net.ip("rule add pref 201 fwmark 9 lookup 77");
    net.ip("-6 rule add pref 203 fwmark 9 lookup 77");
    let before = net.state();
    let listener = listener(&net);
    let rules = net.run(|| install(&listener, |_| {})).unwrap();
    assert!(net.ip("rule").contains("204:	from all fwmark 0x2000/0x3000 iif lo goto 207"), "{}", net.ip("rule"));
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.state(), before);
    // Asked for by number, they are refused instead.
    let failed = net.run(|| install(&listener, |c| c.priority = 199)).err().unwrap();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert!(failed.sentence.contains("IPv4 routing rule at 201"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn a_table_of_someone_else_is_not_replaced() {
    let net = Net::new();
    net.nft("add table inet libtproxy-tproxy");
    let before = net.state();
    let listener = listener(&net);
    let failed = net.run(|| install(&listener, |_| {})).err().unwrap();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert!(failed.sentence.contains("nft delete table inet libtproxy-tproxy"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn a_route_of_someone_else_is_not_replaced_and_nothing_is_left() {
    let net = Net::new();
    net.ip("route add local default dev lo table 100");
    let before = net.state();
    let listener = listener(&net);
    let failed = net.run(|| install(&listener, |c| c.table = 100)).err().unwrap();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert!(failed.sentence.starts_with("ip -4 route add local default dev lo table 100"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn without_loopback_the_sentence_says_how_to_have_it() {
    let net = Net::new();
    net.ip("link set lo down");
    let before = net.state();
    let listener = listener(&net);
    let failed = net.run(|| install(&listener, |_| {})).err().unwrap();
    assert_eq!(failed.errno, ENETDOWN, "{failed}");
    assert!(failed.sentence.contains("ip link set lo up"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn without_privilege_the_sentence_names_the_capability() {
    let net = Net::new();
    let listener = listener(&net);
    net.run(|| {
        drop_capabilities();
        let failed = install(&listener, |_| {}).err().unwrap();
        assert_eq!(failed.errno, EPERM);
        assert!(failed.sentence.contains("CAP_NET_ADMIN"), "{failed}");
        let failed = socket(libc::AF_INET, libc::SOCK_STREAM).unwrap_err();
        assert_eq!(failed.errno, EPERM);
        assert!(failed.sentence.contains("CAP_NET_RAW"), "{failed}");
    });
}

/// This thread's capabilities, for good.
fn drop_capabilities() {
    // `struct __user_cap_header_struct`, version 3, this thread; and no data set (capset(2)).
    let header: [u32; 2] = [0x2008_0522, 0];
    let data = [0u32; 6];
    // SAFETY: both have the sizes that version 3 reads.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }, 0);
}

#[test]
fn a_listener_that_cannot_be_reached_is_refused_with_the_reason() {
    let net = Net::new();
    let before = net.state();
    net.run(|| {
        let refused = |fd: &dyn AsRawFd, errno: i32, reason: &str| {
            let failed = install(&fd.as_raw_fd(), |_| {}).err().unwrap();
            assert_eq!(failed.errno, errno, "{failed}");
            assert!(failed.sentence.contains(reason), "{failed}");
            assert!(failed.sentence.starts_with("listeners[0], descriptor "), "{failed}");
        };
        refused(&std::net::TcpListener::bind("[::]:0").unwrap(), EINVAL, "not transparent");
        refused(&socket(libc::AF_INET6, libc::SOCK_STREAM).unwrap(), EINVAL, "not bound");
        let bound = socket(libc::AF_INET6, libc::SOCK_STREAM).unwrap();
        bind_nonlocal(&bound, "[::]:3130".parse().unwrap()).unwrap();
        refused(&bound, EINVAL, "does not listen");
        refused(&socket(libc::AF_INET, libc::SOCK_DGRAM).unwrap(), EINVAL, "not bound");
        refused(&std::os::unix::net::UnixDatagram::unbound().unwrap(), EINVAL, "not a socket of IPv4 or IPv6");
        refused(&std::fs::File::open("/dev/null").unwrap(), ENOTSOCK, "");
        refused(&-1, EBADF, "");
        refused(&9999, EBADF, "");
    });
    assert_eq!(net.state(), before);
}

#[test]
fn the_listeners_port_is_held_while_it_lives() {
    let net = Net::new();
    let _listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    assert_eq!(net.run(|| listen("0.0.0.0:3129".parse().unwrap(), 0)).unwrap_err().errno, EADDRINUSE);
}

/// Claims are compare-and-swap: nobody gets another's name or place, and nobody fails for another's sake.
#[test]
fn many_at_once_get_a_place_each() {
    let net = Net::new();
    let before = net.state();
    let listener = listener(&net);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (net, listener) = (&net, &listener);
            scope.spawn(move || {
                let name = std::ffi::CString::new(format!("n{thread}")).unwrap();
                net.run(|| {
                    for _ in 0..25 {
                        install(listener, |c| c.name = name.as_ptr()).unwrap().remove().unwrap();
                    }
                });
            });
        }
    });
    assert_eq!(net.state(), before);
}
