//! Several instances on one host: each takes what its own selection chose, and the first that was installed wins.

mod common;

use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

fn tcp_listener(lab: &Lab, port: u16) -> TcpListener {
    lab.proxy.run(|| listen(at(ip("::"), port), 0)).unwrap()
}

/// An instance whose traffic is that of this host too.
fn of_this_host(config: RulesConfig, name: &str, backend: u32) -> RulesConfig {
    config.name(name).flags(TP_RULES_LOCAL_OUTPUT).backend(backend)
}

/// What this host hears when it connects, from the first of the proxies or another.
fn own_connection(lab: &Lab, to: std::net::SocketAddr, proxies: &[(&TcpListener, &str)]) -> String {
    while_answering(proxies, || lab.proxy.run(|| said(to))).unwrap_or_else(|e| e.to_string())
}

/// This host's datagram reaches the UDP listener, and its connection the TCP listener, in whichever order they were installed.
#[test]
fn local_output_instances_of_two_protocols_do_not_take_each_others_packets() {
    for backend in BACKENDS {
        for udp_first in [false, true] {
            let lab = Lab::new();
            let tcp = tcp_listener(&lab, 3129);
            let udp: OwnedFd = lab.proxy.run(|| receiver("[::]:3130".parse().unwrap()));
            let mut configs = [
                of_this_host(RulesConfig::of(&tcp), "tcp", backend),
                of_this_host(RulesConfig::of(&udp), "udp", backend),
            ];
            if udp_first {
                configs.reverse();
            }
            let _rules = configs.map(|config| lab.proxy.run(|| config.install()).unwrap());
            for hosts in [v4(), v6()] {
                let case = format!("{} backend {backend} udp_first {udp_first}", hosts.server);
                assert_eq!(own_connection(&lab, at(hosts.server, 443), &[(&tcp, "proxy")]), "proxy", "{case}");
                let any = if hosts.server.is_ipv4() { ip("0.0.0.0") } else { ip("::") };
                let socket = lab.proxy.run(|| UdpSocket::bind(at(any, 0)).unwrap());
                socket.send_to(b"own", at(hosts.server, 53)).unwrap();
                let seen = receive_datagram(&udp, patience());
                assert_eq!(seen.map(|(words, ..)| words).as_deref(), Some("own"), "{case}");
            }
        }
    }
}

/// The instance for one family, or for other ports or destinations, leaves the rest to the other.
#[test]
fn local_output_instances_of_two_selections_do_not_take_each_others_packets() {
    for backend in BACKENDS {
        for case in ["families", "ports", "destinations", "interfaces"] {
            let lab = Lab::new();
            let (one, other) = (tcp_listener(&lab, 3129), tcp_listener(&lab, 3130));
            let one_config = of_this_host(RulesConfig::of(&one), "one", backend);
            let other_config = of_this_host(RulesConfig::of(&other), "other", backend);
            let (one_config, other_config) = match case {
                "families" => (one_config.families(TP_FAMILY_IPV4), other_config.families(TP_FAMILY_IPV6)),
                "ports" => (one_config.ports(&[80]), other_config.ports(&[443])),
                "destinations" => (one_config.dst(["203.0.113.0/24"]), other_config.dst(["2001:db8:2::/64"])),
                // What this host sends is not restricted by interfaces: the first instance has it.
                _ => (one_config.interfaces(&["eth0"]), other_config.interfaces(&["eth1"])),
            };
            let _rules = [&one_config, &other_config].map(|config| lab.proxy.run(|| config.install()).unwrap());
            let proxies = [(&one, "one"), (&other, "other")];
            let (first, second) = match case {
                "ports" => (at(v4().server, 80), at(v4().server, 443)),
                _ => (at(v4().server, 80), at(v6().server, 80)),
            };
            let expected = if case == "interfaces" { "one" } else { "other" };
            assert_eq!(own_connection(&lab, first, &proxies), "one", "{case} backend {backend}");
            assert_eq!(own_connection(&lab, second, &proxies), expected, "{case} backend {backend}");
        }
    }
}

/// An instance without a listener drops what it selects, and nothing of the other's.
#[test]
fn local_output_instance_without_listener_drops_only_its_own_packets() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let (one, dead) = (tcp_listener(&lab, 3129), tcp_listener(&lab, 3130));
        let config = of_this_host(RulesConfig::of(&dead).ports(&[443]), "dead", backend);
        let _dead = lab.proxy.run(|| config.install()).unwrap();
        let config = of_this_host(RulesConfig::of(&one).ports(&[80]), "one", backend);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        close(dead);
        let server = lab.serve(443);
        for hosts in [v4(), v6()] {
            assert_eq!(own_connection(&lab, at(hosts.server, 80), &[(&one, "one")]), "one", "backend {backend}");
            lab.proxy.run(|| assert!(connect_in_vain(at(hosts.server, 443)).is_err()));
        }
        assert!(accept_within(&server, std::time::Duration::ZERO).is_none());
    }
}

/// Where selections overlap, the first installed instance intercepts: forwarded traffic, and this host's own.
#[test]
fn overlapping_instances_first_installed_wins() {
    for backend in BACKENDS {
        for flags in [0, TP_RULES_LOCAL_OUTPUT] {
            let lab = Lab::new();
            let (one, other) = (tcp_listener(&lab, 3129), tcp_listener(&lab, 3130));
            let install = |listener: &TcpListener, name: &str| {
                lab.proxy.run(|| RulesConfig::of(listener).name(name).flags(flags).backend(backend).install()).unwrap()
            };
            let first = install(&one, "one");
            let _second = install(&other, "other");
            let proxies = [(&one, "one"), (&other, "other")];
            let ask = |hosts: Hosts| {
                let forwarded = while_answering(&proxies, || lab.client.run(|| said(at(hosts.server, 80)))).unwrap();
                let own = (flags != 0).then(|| own_connection(&lab, at(hosts.server, 80), &proxies));
                (forwarded, own)
            };
            for hosts in [v4(), v6()] {
                let (forwarded, own) = ask(hosts);
                let case = format!("{} flags {flags} backend {backend}", hosts.server);
                assert_eq!(forwarded, "one", "{case}");
                assert!(own.is_none_or(|own| own == "one"), "{case}");
            }
            lab.proxy.run(|| first.remove()).unwrap();
            for hosts in [v4(), v6()] {
                assert_eq!(ask(hosts).0, "other");
            }
        }
    }
}

/// An instance for forwarded traffic, installed first, does not take what the other loops.
#[test]
fn instance_without_local_output_leaves_looped_packets_to_the_other() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let (one, other) = (tcp_listener(&lab, 3129), tcp_listener(&lab, 3130));
        let _one = lab.proxy.run(|| RulesConfig::of(&one).name("one").backend(backend).install()).unwrap();
        let config = of_this_host(RulesConfig::of(&other), "other", backend);
        let _other = lab.proxy.run(|| config.install()).unwrap();
        let proxies = [(&one, "one"), (&other, "other")];
        for hosts in [v4(), v6()] {
            assert_eq!(own_connection(&lab, at(hosts.server, 80), &proxies), "other", "backend {backend}");
        }
    }
}

/// The first wins even if the marks differ.
#[test]
fn overlapping_instances_of_two_marks_first_installed_wins() {
    let lab = Lab::new();
    let (one, other) = (tcp_listener(&lab, 3129), tcp_listener(&lab, 3130));
    let flags = TP_RULES_LOCAL_OUTPUT;
    let _one = lab.proxy.run(|| RulesConfig::of(&one).name("one").flags(flags).install()).unwrap();
    let config = RulesConfig::of(&other).name("other").flags(flags).mark(0x10000).mark_mask(0x30000);
    let _other = lab.proxy.run(|| config.install()).unwrap();
    let proxies = [(&one, "one"), (&other, "other")];
    for hosts in [v4(), v6()] {
        let forwarded = while_answering(&proxies, || lab.client.run(|| said(at(hosts.server, 80)))).unwrap();
        assert_eq!(forwarded, "one");
        assert_eq!(own_connection(&lab, at(hosts.server, 80), &proxies), "one");
    }
}
