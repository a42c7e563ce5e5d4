//! Connections between two hosts, intercepted by a third.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use common::*;
use tproxy::ffi::*;

/// Makes one connection, and asserts what each host sees of it.
fn proxied(lab: &Lab, hosts: Hosts, listener: &std::net::TcpListener, server: &std::net::TcpListener, flags: u32) {
    let to = at(hosts.server, 80);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| answer_one(server));
        let seen = scope.spawn(|| lab.proxy.run(|| proxy_one(listener, flags)));
        let heard = lab.ask(to).unwrap();
        let seen = seen.join().unwrap();
        assert_eq!(heard.answer, format!("seen {}, heard who am I?", hosts.client));
        assert_eq!(seen.orig_dst, to);
        assert_eq!(seen.peer, heard.from);
        let peer = served.join().unwrap();
        assert_eq!(peer.ip(), hosts.client);
        if flags & TP_CONNECT_KEEP_PORT != 0 {
            assert_eq!(peer, heard.from, "the server sees the client's own port");
        }
    });
}

#[test]
fn intercept_tcp_with_dual_stack_listener_proxies_both_families() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    for hosts in [v4(), v6()] {
        proxied(&lab, hosts, &listener, &server, 0);
        proxied(&lab, hosts, &listener, &server, TP_CONNECT_KEEP_PORT);
    }
}

#[test]
fn intercept_tcp_with_listener_on_loopback_proxies() {
    for (hosts, listen_at) in [(v4(), "127.0.0.1:3129"), (v6(), "[::1]:3129")] {
        let lab = Lab::new();
        let server = lab.serve(80);
        let listener = lab.proxy.run(|| listen(listen_at.parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        proxied(&lab, hosts, &listener, &server, 0);
    }
}

#[test]
fn intercept_tcp_with_listener_on_own_address_proxies() {
    for (hosts, listen_at) in [(v4(), "203.0.113.1:3129"), (v6(), "[2001:db8:2::1]:3129")] {
        let lab = Lab::new();
        let server = lab.serve(80);
        let listener = lab.proxy.run(|| listen(listen_at.parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        proxied(&lab, hosts, &listener, &server, 0);
    }
}

#[test]
fn install_rules_leaves_other_ports_and_own_addresses_alone() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    let other_port = lab.serve(81);
    // Connections to the proxy's host itself are not intercepted, whatever their port.
    let own = lab.proxy.run(|| std::net::TcpListener::bind("[::]:80")).unwrap();
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(answer_one(&other_port).ip(), hosts.client));
            lab.ask(at(hosts.server, 81)).unwrap();
        });
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(answer_one(&own).ip(), hosts.client));
            lab.ask(at(hosts.proxy, 80)).unwrap();
        });
    }
    assert!(accept_within(&listener, silence()).is_none());
}

#[test]
fn install_rules_with_port_ranges_intercepts_their_ends() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let config = RulesConfig::of(&listener).port_ranges([(8000, 8010), (8011, 8011), (65_530, 65_535), (8005, 8006)]);
    let _rules = lab.proxy.run(|| config.install()).unwrap();
    for (port, inside) in
        [(7999, false), (8000, true), (8005, true), (8011, true), (8012, false), (65_529, false), (65_535, true)]
    {
        // No server listens on these ports: a connection that is not intercepted is refused.
        let outcome = lab.client.run(|| TcpStream::connect_timeout(&at(v4().server, port), patience()));
        assert_eq!(outcome.is_ok(), inside, "port {port}");
        if inside {
            assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), at(v4().server, port));
        }
    }
}

/// The clients come in by eth0. Only a trailing `*` is a pattern, on both backends.
#[test]
fn install_rules_interface_patterns_match_the_same_on_both_backends() {
    for backend in [TP_BACKEND_NFT, TP_BACKEND_IPTABLES] {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let install =
            |names: &[&str]| RulesConfig::of(&listener).ports(&[80]).backend(backend).interfaces(names).install();
        for (names, matches) in [
            (&["e*"][..], true),
            (&["eth0*"], true),
            (&["ppp*", "eth0"], true),
            (&["ppp0", "et*"], true),
            (&["eth1*", "et", "th0", "wg0"], false),
        ] {
            let _rules = lab.proxy.run(|| install(names)).unwrap();
            for hosts in [v4(), v6()] {
                // No server listens: a connection that is not intercepted is refused.
                let outcome = lab.client.run(|| TcpStream::connect_timeout(&at(hosts.server, 80), patience()));
                assert_eq!(outcome.is_ok(), matches, "{names:?} with backend {backend}");
            }
        }
        for bad in ["*", "e*0", "eth0,eth1*x"] {
            let error = lab.proxy.run(|| install(&[bad])).unwrap_err();
            assert_eq!(error.errno, libc::EINVAL, "{error}");
        }
        // iptables takes a trailing `+` for a pattern; the kernel takes it for a part of the name.
        match lab.proxy.run(|| install(&["eth+"])) {
            Err(error) => assert_eq!((backend, error.errno), (TP_BACKEND_IPTABLES, libc::EOPNOTSUPP), "{error}"),
            Ok(_rules) => {
                assert_eq!(backend, TP_BACKEND_NFT);
                assert!(lab.client.run(|| TcpStream::connect_timeout(&at(v4().server, 80), patience())).is_err());
            }
        }
    }
}

#[test]
fn intercept_tcp_megabytes_and_half_close_arrive() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| lab.proxy.run(|| proxy_one(&listener, 0)));
        scope.spawn(|| {
            let (mut stream, _) = accept(&server);
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            // The client has closed its direction; the reply still arrives.
            got.reverse();
            stream.write_all(&got).unwrap();
        });
        let mut stream = lab.client.run(|| TcpStream::connect(at(v6().server, 80))).unwrap();
        stream.write_all(&data).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back.reverse();
        assert!(back == data);
    });
}

/// With src_valid_mark the rules of the kernel's documentation have every packet dropped as a martian.
#[test]
fn install_rules_with_src_valid_mark_and_rp_filter_intercepts() {
    for rp_filter in ["0", "1", "2"] {
        let lab = Lab::new();
        for interface in ["all", "default", "eth0", "eth1", "lo"] {
            lab.proxy.sysctl(&format!("ipv4/conf/{interface}/src_valid_mark"), "1");
            lab.proxy.sysctl(&format!("ipv4/conf/{interface}/rp_filter"), rp_filter);
        }
        let server = lab.serve(80);
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        for hosts in [v4(), v6()] {
            proxied(&lab, hosts, &listener, &server, 0);
        }
    }
}

#[test]
fn install_rules_without_listener_drops_until_removed() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    lab.proxy.run(|| close(listener));
    for hosts in [v4(), v6()] {
        let outcome = lab.client.run(|| connect_in_vain(at(hosts.server, 80)));
        assert_eq!(outcome.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    assert!(accept_within(&server, silence()).is_none(), "a connection was forwarded although the listener is closed");
    // Without the rules the same connections arrive: the rules dropped the others.
    lab.proxy.run(|| rules.remove()).unwrap();
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            scope.spawn(|| answer_one(&server));
            lab.ask(at(hosts.server, 80)).unwrap();
        });
    }
}

#[test]
fn install_rules_drops_direct_connections_unless_allowed() {
    for (flags, allowed) in [(0, false), (TP_RULES_ALLOW_DIRECT, true)] {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let config = RulesConfig::of(&listener).flags(flags);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        for hosts in [v4(), v6()] {
            let outcome = lab.client.run(|| connect_in_vain(at(hosts.proxy, 3129)));
            assert_eq!(outcome.is_ok(), allowed, "{outcome:?}");
        }
    }
}

#[test]
fn install_rules_preserves_other_bits_of_mark() {
    let lab = Lab::new();
    let server = lab.serve(80);
    // Another program sets its mark before the library's rules, and needs it after them.
    lab.proxy.nft(
        "table inet other {
            chain before { type filter hook prerouting priority -200; iifname eth0 meta mark set 0x40000
            }
            chain after { type filter hook input priority 0; iifname eth0 tcp dport 80 meta mark != 0x42000 drop
            }
        }",
    );
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    proxied(&lab, v4(), &listener, &server, 0);
    proxied(&lab, v6(), &listener, &server, 0);
}

/// The server closes first, so that the proxy keeps the old connection in TIME_WAIT. Then the client connects from the same
/// port again: a new connection, which must be intercepted, not a late packet of the old one.
#[test]
fn intercept_tcp_port_in_time_wait_is_a_new_connection() {
    for rfc1337 in ["0", "1"] {
        let lab = Lab::new();
        lab.proxy.sysctl("ipv4/tcp_rfc1337", rfc1337);
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        let repeated = lab.client.syns_repeated();
        for hosts in [v4(), v6()] {
            for _ in 0..3 {
                let mut client = lab.client.run(|| connect_from_port(at(hosts.client, 4321), at(hosts.server, 80)));
                let (accepted, peer) = accept(&listener);
                assert_eq!(peer, at(hosts.client, 4321));
                drop(accepted);
                assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
            }
        }
        assert_eq!(lab.client.syns_repeated(), repeated, "a first packet was lost");
    }
}

/// Connects from a port, as soon as the last packet of the former connection from there is acknowledged.
fn connect_from_port(from: SocketAddr, to: SocketAddr) -> TcpStream {
    wait_for("the port of the client is in use", || {
        let attempt = || {
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            socket.connect_timeout(&to.into(), patience())?;
            std::io::Result::Ok(TcpStream::from(socket))
        };
        match attempt() {
            Err(e) if e.kind() == std::io::ErrorKind::AddrNotAvailable => None,
            done => Some(done.unwrap()),
        }
    })
}
