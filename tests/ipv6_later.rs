//! Hosts on which IPv6 is enabled after the rules were installed: selected packets never bypass the proxy.

mod common;

use std::net::UdpSocket;

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

/// A lab whose proxy has IPv6 on its links, and not on `lo`: the kernel refuses the route of IPv6.
fn lab_without_ipv6_on_lo() -> Lab {
    let lab = Lab::new();
    lab.proxy.sysctl("ipv6/conf/lo/disable_ipv6", "1");
    lab
}

fn enable_ipv6(lab: &Lab) {
    lab.proxy.sysctl("ipv6/conf/lo/disable_ipv6", "0");
}

/// How many of three datagrams from a host reach the server.
fn datagrams_that_reach(from: &Net, server: &UdpSocket, to: std::net::SocketAddr) -> usize {
    from.run(|| {
        let client = UdpSocket::bind(at(ip("::"), 0)).unwrap();
        (0..3).for_each(|_| drop(client.send_to(b"x", to)));
    });
    let mut buffer = [0; 16];
    (0..3).take_while(|_| server.recv_from(&mut buffer).is_ok()).count()
}

#[test]
fn install_rules_while_lo_has_no_ipv6_drops_ipv6() {
    for backend in BACKENDS {
        let lab = lab_without_ipv6_on_lo();
        let (listener, socket) =
            lab.proxy.run(|| (listen(at(ip("::"), 3129), 0).unwrap(), receiver(at(ip("::"), 3053))));
        let _server = lab.serve(80);
        let server = lab.server.run(|| UdpSocket::bind(at(ip("::"), 80)).unwrap());
        server.set_read_timeout(Some(silence())).unwrap();
        // Forwarded without rules.
        assert_eq!(datagrams_that_reach(&lab.client, &server, at(v6().server, 80)), 3);
        let config = RulesConfig::new().listeners(&[&listener]).backend(backend).ports(&[80]);
        let datagrams = RulesConfig::new().name("udp").listeners(&[&socket]).backend(backend).ports(&[80]);
        let before = lab.proxy.state();
        let (rules, other) = lab.proxy.run(|| (config.install().unwrap(), datagrams.install().unwrap()));
        // IPv4 is intercepted; selected IPv6 packets are dropped.
        std::thread::scope(|scope| {
            let served = scope.spawn(|| accept(&listener));
            lab.client.run(|| std::net::TcpStream::connect(at(v4().server, 80))).unwrap();
            served.join().unwrap();
        });
        lab.client.run(|| connect_in_vain(at(v6().server, 80))).unwrap_err();
        assert_eq!(datagrams_that_reach(&lab.client, &server, at(v6().server, 80)), 0);
        // What is not selected is forwarded.
        let unselected = lab.serve(81);
        lab.client.run(|| std::net::TcpStream::connect(at(v6().server, 81))).unwrap();
        drop(unselected);
        // A replacement while IPv6 is enabled on lo completes the rules.
        enable_ipv6(&lab);
        lab.proxy.run(|| rules.replace(&config)).unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| accept(&listener));
            lab.client.run(|| std::net::TcpStream::connect(at(v6().server, 80))).unwrap();
            served.join().unwrap();
        });
        lab.proxy.run(|| {
            rules.remove().unwrap();
            other.remove().unwrap();
        });
        if backend == TP_BACKEND_NFT {
            assert_eq!(lab.proxy.state(), before);
        }
    }
}

/// What this host sends has no socket of the proxy: only the routing can drop it.
#[test]
fn install_rules_local_output_while_lo_has_no_ipv6_drops_ipv6() {
    for backend in BACKENDS {
        let lab = lab_without_ipv6_on_lo();
        let socket = lab.proxy.run(|| receiver(at(ip("::"), 3053)));
        let server = lab.server.run(|| UdpSocket::bind(at(ip("::"), 80)).unwrap());
        server.set_read_timeout(Some(silence())).unwrap();
        assert_eq!(datagrams_that_reach(&lab.proxy, &server, at(v6().server, 80)), 3);
        let config = RulesConfig::of(&socket).backend(backend).ports(&[80]).flags(TP_RULES_LOCAL_OUTPUT);
        let rules = lab.proxy.run(|| config.install()).unwrap();
        assert_eq!(datagrams_that_reach(&lab.proxy, &server, at(v6().server, 80)), 0);
        drop(rules);
        assert_eq!(datagrams_that_reach(&lab.proxy, &server, at(v6().server, 80)), 3);
    }
}

/// NAT needs no route.
#[test]
fn install_rules_redirect_before_ipv6_intercepts_ipv6_later() {
    for backend in BACKENDS {
        let lab = Lab::new();
        for name in ["all", "default", "lo", "eth0", "eth1"] {
            lab.proxy.sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
        }
        let listener = lab.proxy.run(|| std::net::TcpListener::bind(at(ip("::"), 3129))).unwrap();
        let config = RulesConfig::of(&listener).backend(backend).ports(&[80]).flags(TP_RULES_REDIRECT);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        for name in ["all", "lo", "eth0", "eth1"] {
            lab.proxy.sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "0");
        }
        lab.proxy.ip("addr add 2001:db8:1::1/64 dev eth0 nodad");
        std::thread::scope(|scope| {
            let served = scope.spawn(|| accept(&listener));
            let connect = || lab.client.run(|| std::net::TcpStream::connect(at(v6().server, 80))).ok();
            wait_for("IPv6 is enabled", connect);
            served.join().unwrap();
        });
    }
}
