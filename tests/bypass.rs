//! Destinations that are bypassed, where the rules select by nothing else: replies from there are packets to other hosts too,
//! and are not intercepted either. Packets of intercepted connections never get past the proxy, also when the connection is
//! gone.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

/// Rules for these sockets that select every port and every destination, except those that are bypassed.
fn install(sockets: &[&dyn AsRawFd], bypass: &[&str], flags: u32, backend: u32) -> Rules {
    let config = RulesConfig::new().listeners(sockets).flags(flags).backend(backend);
    if bypass.is_empty() { config } else { config.bypass(bypass) }.install().unwrap()
}

/// Answers datagrams with some words, until it is told to stop.
fn answer_datagrams(socket: &UdpSocket, words: &str, stop: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut [0; 10]) {
            socket.send_to(words.as_bytes(), from).unwrap();
        }
    }
}

/// The reply to a datagram, which is sent until a reply comes or it is clear that none does.
fn answered(from: &UdpSocket, to: std::net::SocketAddr) -> Option<String> {
    from.set_read_timeout(Some(silence())).unwrap();
    let mut words = [0; 10];
    let len = (0..10).find_map(|_| {
        from.send_to(b"?", to).unwrap();
        from.recv(&mut words).ok()
    })?;
    Some(String::from_utf8_lossy(&words[..len]).into_owned())
}

fn replies_come_back(hosts: Hosts, flags: u32, backend: u32) {
    let lab = Lab::new();
    let server = lab.serve(80);
    let words = lab.server.run(|| UdpSocket::bind(at(hosts.server, 53)).unwrap());
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let udp = lab.proxy.run(|| receiver("[::]:3129".parse().unwrap()));
    let bypass = ["203.0.113.2/32", "2001:db8:2::2/128"];
    let _rules = lab.proxy.run(|| install(&[&listener, &udp], &bypass, flags, backend));
    let (connection, datagrams, other) = while_answering(&[(&server, "server"), (&listener, "proxy")], || {
        let connection = lab.client.run(|| said(at(hosts.server, 80)));
        let client = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
        let stop = AtomicBool::new(false);
        let datagrams = std::thread::scope(|scope| {
            scope.spawn(|| answer_datagrams(&words, "server", &stop));
            let datagrams = [(); 3].map(|()| answered(&client, at(hosts.server, 53)));
            stop.store(true, Ordering::Relaxed);
            datagrams
        });
        let elsewhere = if hosts.server.is_ipv4() { ip("203.0.113.3") } else { ip("2001:db8:2::3") };
        let other = lab.client.run(|| said(at(elsewhere, 80)));
        client.send_to(b"intercept", at(elsewhere, 53)).unwrap();
        (connection, datagrams, other)
    });
    let case = format!("{} flags {flags} backend {backend}", hosts.server);
    assert_eq!(connection.expect(&case), "server", "{case}");
    assert_eq!(datagrams, [(); 3].map(|()| Some("server".to_owned())), "{case}");
    assert_eq!(other.expect(&case), "proxy", "{case}");
    assert_eq!(receive_datagram(&udp, patience()).map(|(words, ..)| words).as_deref(), Some("intercept"), "{case}");
}

#[test]
fn bypass_replies_are_not_intercepted() {
    for hosts in [v4(), v6()] {
        for backend in BACKENDS {
            replies_come_back(hosts, 0, backend);
        }
        replies_come_back(hosts, TP_RULES_NOTRACK, TP_BACKEND_NFT);
    }
}

/// Rules without a bypass, to which one is added.
#[test]
fn update_rules_bypass_lets_replies_come_back() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let rules = lab.proxy.run(|| install(&[&listener], &[], 0, TP_BACKEND_NFT));
    let heard = while_answering(&[(&server, "server"), (&listener, "proxy")], || {
        let ask = || lab.client.run(|| said(at(v4().server, 80)).map_err(|e| e.to_string()));
        let before = ask();
        let update = |add: &[&str], remove: &[&str]| rules.update(TP_SET_BYPASS, &prefixes(add), &prefixes(remove));
        lab.proxy.run(|| update(&["203.0.113.0/24"], &[])).unwrap();
        let between = ask();
        lab.proxy.run(|| update(&[], &["203.0.113.0/24"])).unwrap();
        [before, between, ask()]
    });
    assert_eq!(heard.map(Result::unwrap), ["proxy", "server", "proxy"]);
}

/// Ends a connection without a packet to the other side, as a host that loses power does.
fn forget(stream: TcpStream) {
    let on: libc::c_int = 1;
    // SAFETY: an int, and its size.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// The clients are in a network that is bypassed, as private networks often are: what they send is not a reply.
fn nothing_leaks(hosts: Hosts, flags: u32, backend: u32) {
    let lab = Lab::new();
    let (server, listener): (TcpListener, TcpListener) =
        (lab.serve(80), lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap());
    let udp: OwnedFd = lab.proxy.run(|| receiver("[::]:3129".parse().unwrap()));
    let clients = ["198.51.100.0/24", "2001:db8:1::/48"];
    let _rules = lab.proxy.run(|| install(&[&listener, &udp], &clients, flags, backend));
    lab.server.nft(
        "table inet seen { counter seen { }; chain c { type filter hook prerouting priority 0; \
                    meta l4proto { tcp, udp } counter name seen; }; }",
    );
    let case = format!("{} flags {flags} backend {backend}", hosts.server);
    let mut client = lab.client.run(|| connect(at(hosts.server, 80)));
    client.set_read_timeout(Some(patience())).unwrap();
    let (mut accepted, _) = accept(&listener);
    client.write_all(b"?").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    lab.proxy.run(|| forget(accepted));
    // No socket has this connection any more, and the proxy's host resets it. Another test's child may have a copy of the
    // socket for a moment, which takes what comes: the client sends again.
    client.set_read_timeout(Some(limit(400))).unwrap();
    wait_for(&format!("{case}: the connection is reset"), || {
        let sent = client.write_all(b"secret").and_then(|()| client.read_exact(&mut [0]));
        sent.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset).then_some(())
    });
    let datagrams = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
    for _ in 0..3 {
        datagrams.send_to(b"secret", at(hosts.server, 53)).unwrap();
        assert!(receive_datagram(&udp, patience()).is_some(), "{case}");
    }
    let seen = lab.server.nft("list counter inet seen seen");
    assert!(seen.contains("packets 0 "), "{case}: {seen}");
    assert!(accept_within(&server, Duration::ZERO).is_none());
}

#[test]
fn bypass_of_clients_does_not_leak_packets_of_dead_connections() {
    for hosts in [v4(), v6()] {
        for backend in BACKENDS {
            nothing_leaks(hosts, 0, backend);
        }
        nothing_leaks(hosts, TP_RULES_NOTRACK, TP_BACKEND_NFT);
    }
}

/// The host is a server too. Its connections are intercepted, its replies to clients are not.
#[test]
fn install_rules_local_output_lets_own_services_reply() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let own = lab.proxy.run(|| TcpListener::bind("[::]:22").unwrap());
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| install(&[&listener], &[], TP_RULES_LOCAL_OUTPUT, backend));
        let heard = while_answering(&[(&own, "own"), (&listener, "proxy")], || {
            let ask = |net: &Net, to| net.run(|| said(at(to, 22)).map_err(|e| e.to_string()));
            [v4(), v6()].map(|hosts| (ask(&lab.client, hosts.proxy), ask(&lab.proxy, hosts.server)))
        });
        assert_eq!(heard, [(); 2].map(|()| (Ok("own".to_owned()), Ok("proxy".to_owned()))), "backend {backend}");
    }
}

/// A remote host sends to a local port first, from the address to which this host connects later. Connection tracking does not
/// take the later connection for a reply.
#[test]
fn install_rules_local_output_intercepts_connection_to_host_that_knocked() {
    const KNOCKED: u16 = 4321;
    let bound = |to: std::net::SocketAddr, from| {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&std::net::SocketAddr::into(from)).unwrap();
        socket
    };
    for backend in BACKENDS {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| install(&[&listener], &[], TP_RULES_LOCAL_OUTPUT, backend));
        lab.server.nft(
            "table inet seen { counter seen { }; chain c { type filter hook prerouting priority 0; \
                        tcp sport 4321 tcp flags & (syn | rst) == 0 counter name seen; }; }",
        );
        for hosts in [v4(), v6()] {
            let (own, other) = (at(hosts.proxy, KNOCKED), at(hosts.server, 80));
            let knock = lab.server.run(|| bound(own, other).connect_timeout(&own.into(), silence()));
            assert!(knock.is_err());
            let stream = lab.proxy.run(|| {
                let socket = bound(other, own);
                socket.connect_timeout(&other.into(), patience()).unwrap();
                TcpStream::from(socket)
            });
            let (mut accepted, _) = accept(&listener);
            (&stream).write_all(b"?").unwrap();
            accepted.read_exact(&mut [0]).unwrap();
        }
        let seen = lab.server.nft("list counter inet seen seen");
        assert!(seen.contains("packets 0 "), "backend {backend}: {seen}");
    }
}
