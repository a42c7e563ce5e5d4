//! The main job: connections between two hosts, intercepted by a third.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::*;
use tproxy::ffi::*;

/// One connection, and what all three hosts saw of it.
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
        if flags & TP_KEEP_PORT != 0 {
            assert_eq!(peer, heard.from, "the server sees the client's own port");
        }
    });
}

#[test]
fn both_families_through_one_dual_stack_listener() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    for hosts in [v4(), v6()] {
        proxied(&lab, hosts, &listener, &server, 0);
        proxied(&lab, hosts, &listener, &server, TP_KEEP_PORT);
    }
}

#[test]
fn a_listener_for_each_family_on_loopback() {
    for (hosts, listen_at) in [(v4(), "127.0.0.1:3129"), (v6(), "[::1]:3129")] {
        let lab = Lab::new();
        let server = lab.serve(80);
        let listener = lab.proxy.run(|| listen(listen_at.parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        proxied(&lab, hosts, &listener, &server, 0);
    }
}

#[test]
fn a_listener_on_one_of_the_hosts_own_addresses() {
    for (hosts, listen_at) in [(v4(), "203.0.113.1:3129"), (v6(), "[2001:db8:2::1]:3129")] {
        let lab = Lab::new();
        let server = lab.serve(80);
        let listener = lab.proxy.run(|| listen(listen_at.parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        proxied(&lab, hosts, &listener, &server, 0);
    }
}

#[test]
fn what_was_not_asked_for_goes_its_way() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    let other_port = lab.serve(81);
    // The proxy's host is no destination to intercept, even on the port.
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
fn port_ranges_are_intercepted_to_their_ends() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let ports = [(8000, 8010), (8011, 8011), (65_530, 65_535), (8005, 8006)];
    let ports = ports.map(|(first, last)| tp_port_range { first, last });
    let _rules = lab.proxy.run(|| intercept_ports(&listener, &ports)).unwrap();
    for (port, inside) in
        [(7999, false), (8000, true), (8005, true), (8011, true), (8012, false), (65_529, false), (65_535, true)]
    {
        // Nothing listens on the server: what is not intercepted is refused at once.
        let outcome = lab.client.run(|| TcpStream::connect_timeout(&at(v4().server, port), patience()));
        assert_eq!(outcome.is_ok(), inside, "port {port}");
        if inside {
            assert_eq!(canonical(orig_dst(&accept(&listener).0).unwrap()), at(v4().server, port));
        }
    }
}

/// The clients come by eth0. A trailing `*` is a pattern, and nothing else is, on both backends.
#[test]
fn interface_patterns_match_the_same_on_both_backends() {
    for backend in [TP_BACKEND_NFT, TP_BACKEND_IPTABLES] {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let install = |names: &[&std::ffi::CStr]| {
            let names: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
            Rules::install(&tp_rules_config {
                listeners: &raw const fd,
                n_listeners: 1,
                backend,
                interfaces: names.as_ptr(),
                n_interfaces: names.len(),
                ..config()
            })
        };
        for (names, matches) in [
            (&[c"e*"][..], true),
            (&[c"eth0*"], true),
            (&[c"ppp*", c"eth0"], true),
            (&[c"ppp0", c"et*"], true),
            (&[c"eth1*", c"et", c"th0", c"wg0"], false),
        ] {
            let _rules = lab.proxy.run(|| install(names)).unwrap();
            for hosts in [v4(), v6()] {
                // Nothing listens on the server: what is not intercepted is refused at once.
                let outcome = lab.client.run(|| TcpStream::connect_timeout(&at(hosts.server, 80), patience()));
                assert_eq!(outcome.is_ok(), matches, "{names:?} with backend {backend}");
            }
        }
        for bad in [c"*", c"e*0", c"eth0,eth1*x"] {
            let error = lab.proxy.run(|| install(&[bad])).unwrap_err();
            assert_eq!(error.errno, libc::EINVAL, "{error}");
        }
        // To iptables this is a pattern, to the kernel a name like another.
        match lab.proxy.run(|| install(&[c"eth+"])) {
            Err(error) => assert_eq!((backend, error.errno), (TP_BACKEND_IPTABLES, libc::EOPNOTSUPP), "{error}"),
            Ok(_rules) => {
                assert_eq!(backend, TP_BACKEND_NFT);
                assert!(lab.client.run(|| TcpStream::connect_timeout(&at(v4().server, 80), patience())).is_err());
            }
        }
    }
}

#[test]
fn megabytes_and_half_close_both_ways() {
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
            // The client has said all; the answer still goes through.
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

/// The most reported silent failure of the textbook recipe: every packet dropped as a martian.
#[test]
fn reverse_path_filters_that_look_at_marks_do_no_harm() {
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
fn no_listener_no_traffic() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    drop(listener);
    for hosts in [v4(), v6()] {
        let outcome = lab.client.run(|| TcpStream::connect_timeout(&at(hosts.server, 80), silence()));
        assert_eq!(outcome.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    assert!(accept_within(&server, silence()).is_none(), "a connection got past the dead proxy");
    // Without rules the same connections arrive: it was they that held the others back.
    lab.proxy.run(|| rules.remove()).unwrap();
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            scope.spawn(|| answer_one(&server));
            lab.ask(at(hosts.server, 80)).unwrap();
        });
    }
}

#[test]
fn connections_straight_to_the_listener_are_dropped_unless_allowed() {
    for (flags, allowed) in [(0, false), (TP_RULES_ALLOW_DIRECT, true)] {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
        let _rules = lab
            .proxy
            .run(|| Rules::install(&tp_rules_config { listeners: &raw const fd, n_listeners: 1, flags, ..config() }))
            .unwrap();
        for hosts in [v4(), v6()] {
            let outcome = lab.client.run(|| TcpStream::connect_timeout(&at(hosts.proxy, 3129), silence()));
            assert_eq!(outcome.is_ok(), allowed, "{outcome:?}");
        }
    }
}

#[test]
fn other_bits_of_the_mark_survive() {
    let lab = Lab::new();
    let server = lab.serve(80);
    // Another program's mark, set before our rules and needed behind them.
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

/// The server closes first, so that the proxy keeps the old connection in TIME_WAIT; then the client comes from the
/// same port again. That is a new connection, to be intercepted, and not the old one's last words.
#[test]
fn a_client_port_that_is_used_again_within_a_minute() {
    for rfc1337 in ["0", "1"] {
        let lab = Lab::new();
        lab.proxy.sysctl("ipv4/tcp_rfc1337", rfc1337);
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        for hosts in [v4(), v6()] {
            for _ in 0..3 {
                let to = at(hosts.server, 80);
                let begin = std::time::Instant::now();
                let attempt = || {
                    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
                    socket.set_reuse_address(true)?;
                    socket.bind(&at(hosts.client, 4321).into())?;
                    socket.connect_timeout(&to.into(), patience())?;
                    std::io::Result::Ok(TcpStream::from(socket))
                };
                let client = lab.client.run(|| {
                    loop {
                        match attempt() {
                            // The client's own last words are not acknowledged yet.
                            Err(e)
                                if e.kind() == std::io::ErrorKind::AddrNotAvailable && begin.elapsed() < silence() => {}
                            done => return done,
                        }
                    }
                });
                let mut client = client.unwrap();
                assert!(begin.elapsed() < silence(), "{:?}", begin.elapsed());
                let (accepted, peer) = accept(&listener);
                assert_eq!(peer, at(hosts.client, 4321));
                drop(accepted);
                let mut nothing = Vec::new();
                assert_eq!(client.read_to_end(&mut nothing).unwrap(), 0);
            }
        }
    }
}
