//! Destinations to be left alone, where the rules choose by nothing else: the answers of these are packets to other
//! hosts too, and are left alone as well. What belongs to an intercepted connection is not, dead or alive.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

/// Rules for these sockets, and every port of every destination but these.
fn leave_alone(sockets: &[i32], bypass: &[&str], flags: u32, backend: u32) -> Rules {
    let bypass = prefixes(bypass);
    Rules::install(&tp_rules_config {
        listeners: sockets.as_ptr(),
        n_listeners: sockets.len(),
        bypass: bypass.as_ptr(),
        n_bypass: bypass.len(),
        flags,
        backend,
        ..config()
    })
    .unwrap()
}

/// Answers datagrams with some words, until that is enough.
fn answer_datagrams(socket: &UdpSocket, words: &str, enough: &AtomicBool) {
    socket.set_read_timeout(Some(std::time::Duration::from_millis(20))).unwrap();
    while !enough.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut [0; 10]) {
            socket.send_to(words.as_bytes(), from).unwrap();
        }
    }
}

/// What is answered to a datagram.
fn answered(from: &UdpSocket, to: std::net::SocketAddr) -> Option<String> {
    from.set_read_timeout(Some(limit(900))).unwrap();
    from.send_to(b"?", to).unwrap();
    let mut words = [0; 10];
    let len = from.recv(&mut words).ok()?;
    Some(String::from_utf8_lossy(&words[..len]).into_owned())
}

fn answers_come_back(hosts: Hosts, flags: u32, backend: u32) {
    let lab = Lab::new();
    let server = lab.serve(80);
    let words = lab.server.run(|| UdpSocket::bind(at(hosts.server, 53)).unwrap());
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let udp = lab.proxy.run(|| receiver("[::]:3129".parse().unwrap()));
    let sockets = [listener.as_raw_fd(), udp.as_raw_fd()];
    let _rules = lab.proxy.run(|| leave_alone(&sockets, &["203.0.113.2/32", "2001:db8:2::2/128"], flags, backend));
    let enough = AtomicBool::new(false);
    let (connection, datagrams, other) = std::thread::scope(|scope| {
        for (listener, words) in [(&server, "server"), (&listener, "proxy")] {
            scope.spawn(|| answer_all(listener, words, &enough));
        }
        scope.spawn(|| answer_datagrams(&words, "server", &enough));
        let connection = lab.client.run(|| said(at(hosts.server, 80)));
        let client = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
        let datagrams = [(); 3].map(|()| answered(&client, at(hosts.server, 53)));
        let elsewhere = if hosts.server.is_ipv4() { ip("203.0.113.3") } else { ip("2001:db8:2::3") };
        let other = lab.client.run(|| said(at(elsewhere, 80)));
        client.send_to(b"intercept", at(elsewhere, 53)).unwrap();
        enough.store(true, Ordering::Relaxed);
        (connection, datagrams, other)
    });
    let case = format!("{} flags {flags} backend {backend}", hosts.server);
    assert_eq!(connection.expect(&case), "server", "{case}");
    assert_eq!(datagrams, [(); 3].map(|()| Some("server".to_owned())), "{case}");
    assert_eq!(other.expect(&case), "proxy", "{case}");
    assert_eq!(receive_datagram(&udp, patience()).map(|(words, ..)| words).as_deref(), Some("intercept"), "{case}");
}

#[test]
fn answers_of_what_is_left_alone_come_back() {
    for hosts in [v4(), v6()] {
        for backend in BACKENDS {
            answers_come_back(hosts, 0, backend);
        }
        answers_come_back(hosts, TP_RULES_NOTRACK, TP_BACKEND_NFT);
    }
}

/// Rules that left nothing alone, and then do.
#[test]
fn what_is_left_alone_from_now_on_is_answered_too() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let rules = lab.proxy.run(|| leave_alone(&[listener.as_raw_fd()], &[], 0, TP_BACKEND_NFT));
    let enough = AtomicBool::new(false);
    let heard = std::thread::scope(|scope| {
        for (listener, words) in [(&server, "server"), (&listener, "proxy")] {
            scope.spawn(|| answer_all(listener, words, &enough));
        }
        let ask = || lab.client.run(|| said(at(v4().server, 80)).map_err(|e| e.to_string()));
        let before = ask();
        let update = |add: &[&str], remove: &[&str]| rules.update(TP_SET_BYPASS, &prefixes(add), &prefixes(remove));
        lab.proxy.run(|| update(&["203.0.113.0/24"], &[])).unwrap();
        let between = ask();
        lab.proxy.run(|| update(&[], &["203.0.113.0/24"])).unwrap();
        let after = ask();
        enough.store(true, Ordering::Relaxed);
        [before, between, after]
    });
    assert_eq!(heard.map(Result::unwrap), ["proxy", "server", "proxy"]);
}

/// Ends a connection without a word to the other side, as a host that loses power does.
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

/// The clients are among what is left alone, as private networks are: what they send is no answer.
fn nothing_leaks(hosts: Hosts, flags: u32, backend: u32) {
    let lab = Lab::new();
    let (server, listener): (TcpListener, TcpListener) =
        (lab.serve(80), lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap());
    let udp: OwnedFd = lab.proxy.run(|| receiver("[::]:3129".parse().unwrap()));
    let sockets = [listener.as_raw_fd(), udp.as_raw_fd()];
    let clients = ["198.51.100.0/24", "2001:db8:1::/48"];
    let _rules = lab.proxy.run(|| leave_alone(&sockets, &clients, flags, backend));
    lab.server.nft(
        "table inet seen { counter seen { }; chain c { type filter hook prerouting priority 0; \
                    meta l4proto { tcp, udp } counter name seen; }; }",
    );
    let case = format!("{} flags {flags} backend {backend}", hosts.server);
    let mut client = lab.client.run(|| TcpStream::connect_timeout(&at(hosts.server, 80), patience())).expect(&case);
    client.set_read_timeout(Some(patience())).unwrap();
    let (mut accepted, _) = accept(&listener);
    client.write_all(b"?").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    lab.proxy.run(|| forget(accepted));
    // Nobody has this connection any more; the client learns so, by the proxy's host.
    // Another test's child may have had the socket a moment longer, and what came for it is lost: it is said again.
    client.set_read_timeout(Some(silence())).unwrap();
    let told = (0..20).any(|_| {
        let said = client.write_all(b"secret").and_then(|()| client.read_exact(&mut [0]));
        said.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset)
    });
    assert!(told, "{case}");
    let datagrams = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
    for _ in 0..3 {
        datagrams.send_to(b"secret", at(hosts.server, 53)).unwrap();
        assert!(receive_datagram(&udp, patience()).is_some(), "{case}");
    }
    let seen = lab.server.nft("list counter inet seen seen");
    assert!(seen.contains("packets 0 "), "{case}: {seen}");
    assert!(accept_within(&server, std::time::Duration::ZERO).is_none());
}

#[test]
fn packets_of_dead_connections_of_clients_that_are_left_alone_do_not_leak() {
    for hosts in [v4(), v6()] {
        for backend in BACKENDS {
            nothing_leaks(hosts, 0, backend);
        }
        nothing_leaks(hosts, TP_RULES_NOTRACK, TP_BACKEND_NFT);
    }
}

/// The host is a server too: what it answers is not to be intercepted, though its own connections are.
#[test]
fn the_hosts_own_services_answer() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let own = lab.proxy.run(|| TcpListener::bind("[::]:22").unwrap());
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let sockets = [listener.as_raw_fd()];
        let _rules = lab.proxy.run(|| leave_alone(&sockets, &[], TP_RULES_LOCAL_OUTPUT, backend));
        let enough = AtomicBool::new(false);
        let heard = std::thread::scope(|scope| {
            for (listener, words) in [(&own, "own"), (&listener, "proxy")] {
                scope.spawn(|| answer_all(listener, words, &enough));
            }
            let ask = |net: &Net, to| net.run(|| said(at(to, 22)).map_err(|e| e.to_string()));
            let heard = [v4(), v6()].map(|hosts| (ask(&lab.client, hosts.proxy), ask(&lab.proxy, hosts.server)));
            enough.store(true, Ordering::Relaxed);
            heard
        });
        assert_eq!(heard, [(); 2].map(|()| (Ok("own".to_owned()), Ok("proxy".to_owned()))), "backend {backend}");
    }
}

/// Who knocks at a port from which this host connects to him later does not make that connection an answer.
#[test]
fn knocking_first_does_not_get_past_the_proxy() {
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
        let _rules = lab.proxy.run(|| leave_alone(&[listener.as_raw_fd()], &[], TP_RULES_LOCAL_OUTPUT, backend));
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
