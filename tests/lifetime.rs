//! Rules are installed and removed completely, end with their process, and leave those of others alone.

mod common;

use std::net::TcpListener;
use std::os::fd::AsRawFd;

use common::process::Process;
use common::*;
use libc::{EADDRINUSE, EBADF, EBUSY, EEXIST, EINVAL, ENETDOWN, ENOTSOCK, EPERM};
use tproxy::ffi::*;

/// Rules last until their process removes them or ends. Other tests start this one as a process of its own, which has rules
/// for [::]:3129 in their namespace until it is killed. Its role is the name of the rules.
#[test]
fn install_rules_last_until_removed() {
    if let Some(name) = process::role() {
        let listener = listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT).unwrap();
        let _rules = config(&listener).name(&name).install().unwrap();
        println!("installed");
        process::wait_to_be_killed();
    }
    let net = Net::new();
    let listener = listener(&net);
    let rules = net.run(|| config(&listener).install()).unwrap();
    assert_eq!(net.nft("list tables"), "table inet libtproxy-tproxy\n");
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.nft("list tables"), "");
}

/// Rules for port 80.
fn config(listener: &impl AsRawFd) -> RulesConfig {
    RulesConfig::of(listener).ports(&[80])
}

/// Another process that has rules of this name in this namespace.
fn start(net: &Net, name: &str) -> Process {
    Process::start(net, process::in_role(install_rules_last_until_removed, name), "installed")
}

fn listener(net: &Net) -> TcpListener {
    net.run(|| listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT)).unwrap()
}

#[test]
fn install_rules_and_remove_rules_leave_the_host_unchanged() {
    let net = Net::new();
    let before = net.state();
    let listener = listener(&net);
    for _ in 0..20 {
        let rules = net.run(|| config(&listener).install()).unwrap();
        assert_ne!(net.state(), before);
        net.run(|| rules.remove()).unwrap();
        assert_eq!(net.state(), before);
    }
}

#[test]
fn install_rules_after_killed_process_works_at_once() {
    let lab = Lab::new();
    let before = lab.proxy.state();
    start(&lab.proxy, "tproxy").kill();
    assert_eq!(lab.proxy.nft("list tables"), "");
    // The routing rules that it left affect no traffic.
    let server = lab.serve(80);
    std::thread::scope(|scope| {
        scope.spawn(|| answer_one(&server));
        lab.ask(at(v4().server, 80)).unwrap();
    });
    let listener = listener(&lab.proxy);
    let rules = lab.proxy.run(|| config(&listener).install()).unwrap();
    let _client = lab.client.run(|| connect(at(v4().server, 80)));
    assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), at(v4().server, 80));
    lab.proxy.run(|| rules.remove()).unwrap();
    assert_eq!(lab.proxy.state(), before, "routing of the killed process is left");
}

#[test]
fn install_rules_under_name_of_living_process_is_busy() {
    let net = Net::new();
    let mut holder = start(&net, "mine");
    let listener = listener(&net);
    let before = net.state();
    let failed = net.run(|| config(&listener).name("mine").install()).err().unwrap();
    assert_eq!(failed.errno, EBUSY);
    assert!(failed.sentence.contains(&format!("process {} ", holder.id())), "{failed}");
    assert_eq!(net.state(), before);
    // Under another name both work side by side, and removing the second does not touch the first.
    let other = net.run(|| config(&listener).name("other").install()).unwrap();
    net.run(|| other.remove()).unwrap();
    assert_eq!(net.state(), before);
    // Its routing slot is busy too.
    let other = || config(&listener).name("other");
    for config in [other().priority(202), other().table(7470)] {
        let failed = net.run(|| config.install()).err().unwrap();
        assert_eq!(failed.errno, EBUSY, "{failed}");
    }
    assert_eq!(net.state(), before);
    holder.kill();
}

#[test]
fn install_rules_replaces_slot_of_dead_instance_only() {
    let net = Net::new();
    let before = net.state();
    let mut first = start(&net, "first");
    let mut second = start(&net, "second");
    first.kill();
    let listener = listener(&net);
    // The first slot is free, and the stale routing rules there are replaced.
    let rules = net.run(|| config(&listener).install()).unwrap();
    assert_eq!(net.ip("-4 rule").matches("proto 116").count(), 6);
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.ip("-4 rule").matches("proto 116").count(), 3, "the routing rules of the living instance are gone");
    second.kill();
    // The next instance in the second slot replaces the stale routing rules there.
    let one = net.run(|| config(&listener).name("one").install()).unwrap();
    let two = net.run(|| config(&listener).name("two").install()).unwrap();
    net.run(|| one.remove().and(two.remove())).unwrap();
    assert_eq!(net.state(), before);
}

/// Stale routing rules at the preferences of the next instance, or at its neighbors, do not misroute its packets.
#[test]
fn install_rules_with_stale_overlapping_slot_intercepts() {
    for priority in [198, 201, 203, 1000] {
        let lab = Lab::new();
        let before = lab.proxy.state();
        for interface in ["all", "eth0", "eth1"] {
            lab.proxy.sysctl(&format!("ipv4/conf/{interface}/src_valid_mark"), "1");
            lab.proxy.sysctl(&format!("ipv4/conf/{interface}/rp_filter"), "1");
        }
        start(&lab.proxy, "tproxy").kill();
        let listener = listener(&lab.proxy);
        let rules = lab.proxy.run(|| config(&listener).priority(priority).install()).unwrap();
        let to = at(v4().server, 80);
        let _client = lab.client.run(|| connect(to));
        assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), to);
        lab.proxy.run(|| rules.remove()).unwrap();
        assert_eq!(lab.proxy.state(), before);
    }
}

#[test]
fn install_rules_removes_routes_of_dead_instance() {
    let net = Net::new();
    let before = net.state();
    start(&net, "tproxy").kill();
    let listener = net.run(|| listen("0.0.0.0:3129".parse().unwrap(), 0)).unwrap();
    let rules = net.run(|| config(&listener).table(99).install()).unwrap();
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.state(), before);
}

/// A routing rule that has the library's protocol number but another form is not deleted, and does not stop the sweep.
#[test]
fn install_rules_with_similar_foreign_rule_works() {
    let net = Net::new();
    net.ip("rule add pref 500 goto 32766 protocol 116");
    let listener = listener(&net);
    let rules = net.run(|| config(&listener).install()).unwrap();
    net.run(|| rules.remove()).unwrap();
}

#[test]
fn install_rules_with_thousands_of_ports_and_interfaces_holds_all() {
    let net = Net::new();
    let listener = listener(&net);
    let names: Vec<_> = (0..4000).map(|n| format!("eth{n}")).collect();
    let config = RulesConfig::of(&listener).port_ranges((1..=4000).map(|n| (n * 2, n * 2))).interfaces(&names);
    let _rules = net.run(|| config.install()).unwrap();
    let sets = net.nft("list sets");
    assert!(sets.contains("eth3999") && sets.contains(" 8000"));
}

#[test]
fn install_rules_avoids_routing_table_in_use() {
    let net = Net::new();
    net.ip("route add local default dev lo table 7470");
    let before = net.state();
    let listener = listener(&net);
    let rules = net.run(|| config(&listener).install()).unwrap();
    assert!(net.ip("rule").contains("lookup 7471"), "{}", net.ip("rule"));
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.state(), before);
}

#[test]
fn install_rules_without_ipv6_intercepts_ipv4() {
    let lab = Lab::new();
    for interface in ["all", "default", "lo"] {
        lab.proxy.sysctl(&format!("ipv6/conf/{interface}/disable_ipv6"), "1");
    }
    let listener = listener(&lab.proxy);
    let failed = lab.proxy.run(|| config(&listener).families(TP_FAMILY_IPV4 | TP_FAMILY_IPV6).install()).err().unwrap();
    assert!(failed.sentence.contains("IPv6 is disabled on lo"), "{failed}");
    let _rules = lab.proxy.run(|| config(&listener).install()).unwrap();
    let to = at(v4().server, 80);
    let _client = lab.client.run(|| connect(to));
    assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), to);
}

#[test]
fn install_rules_survive_flush_ruleset() {
    let lab = Lab::new();
    let listener = listener(&lab.proxy);
    let _rules = lab.proxy.run(|| config(&listener).install()).unwrap();
    lab.proxy.nft("flush ruleset");
    let _client = lab.client.run(|| connect(at(v6().server, 80)));
    assert_eq!(orig_dst(&accept(&listener).0).unwrap(), at(v6().server, 80));
}

#[test]
fn install_rules_avoids_foreign_routing_rules() {
    let net = Net::new();
    net.ip("rule add pref 201 fwmark 9 lookup 77");
    net.ip("-6 rule add pref 203 fwmark 9 lookup 77");
    let before = net.state();
    let listener = listener(&net);
    let rules = net.run(|| config(&listener).install()).unwrap();
    assert!(net.ip("rule").contains("204:	from all fwmark 0x2000/0x3000 iif lo goto 207"), "{}", net.ip("rule"));
    net.run(|| rules.remove()).unwrap();
    assert_eq!(net.state(), before);
    // A chosen priority that is in use is refused.
    let failed = net.run(|| config(&listener).priority(199).install()).err().unwrap();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert!(failed.sentence.contains("IPv4 routing rule at 201"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn install_rules_with_foreign_table_is_eexist() {
    let net = Net::new();
    net.nft("add table inet libtproxy-tproxy");
    let before = net.state();
    let listener = listener(&net);
    let failed = net.run(|| config(&listener).install()).err().unwrap();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert!(failed.sentence.contains("nft delete table inet libtproxy-tproxy"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn install_rules_with_foreign_route_is_eexist() {
    let net = Net::new();
    net.ip("route add local default dev lo table 100");
    let before = net.state();
    let listener = listener(&net);
    let failed = net.run(|| config(&listener).table(100).install()).err().unwrap();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert!(failed.sentence.starts_with("ip -4 route add local default dev lo table 100"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn install_rules_without_loopback_is_enetdown() {
    let net = Net::new();
    net.ip("link set lo down");
    let before = net.state();
    let listener = listener(&net);
    let failed = net.run(|| config(&listener).install()).err().unwrap();
    assert_eq!(failed.errno, ENETDOWN, "{failed}");
    assert!(failed.sentence.contains("ip link set lo up"), "{failed}");
    assert_eq!(net.state(), before);
}

#[test]
fn install_rules_and_socket_without_capability_are_eperm() {
    let net = Net::new();
    let listener = listener(&net);
    net.run(|| {
        drop_capabilities();
        let failed = config(&listener).install().err().unwrap();
        assert_eq!(failed.errno, EPERM);
        assert!(failed.sentence.contains("CAP_NET_ADMIN"), "{failed}");
        let failed = socket(libc::AF_INET, libc::SOCK_STREAM).unwrap_err();
        assert_eq!(failed.errno, EPERM);
        assert!(failed.sentence.contains("CAP_NET_RAW"), "{failed}");
    });
}

/// Drops this thread's capabilities for good.
fn drop_capabilities() {
    // `struct __user_cap_header_struct`, version 3, this thread; and no data set (capset(2)).
    let header: [u32; 2] = [0x2008_0522, 0];
    let data = [0u32; 6];
    // SAFETY: both arrays have the sizes that version 3 reads.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }, 0);
}

#[test]
fn install_rules_with_unusable_listener_is_refused() {
    let net = Net::new();
    let before = net.state();
    net.run(|| {
        let refused = |fd: &dyn AsRawFd, errno: i32, reason: &str| {
            let failed = config(&fd.as_raw_fd()).install().err().unwrap();
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
fn listen_on_port_in_use_is_eaddrinuse() {
    let net = Net::new();
    let _listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    assert_eq!(net.run(|| listen("0.0.0.0:3129".parse().unwrap(), 0)).unwrap_err().errno, EADDRINUSE);
}

/// Claims are compare-and-swap: no two threads get the same name or slot, and none fails because of another.
#[test]
fn install_rules_in_eight_threads_gives_each_a_slot() {
    let net = Net::new();
    let before = net.state();
    let listener = listener(&net);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (net, listener) = (&net, &listener);
            scope.spawn(move || {
                let config = config(listener).name(&format!("n{thread}"));
                net.run(|| {
                    for _ in 0..25 {
                        config.install().unwrap().remove().unwrap();
                    }
                });
            });
        }
    });
    assert_eq!(net.state(), before);
}
