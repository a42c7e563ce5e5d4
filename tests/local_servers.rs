//! A server on the proxy's own host that sees the client's address: TP_RULES_LOCAL_SERVERS.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

/// Addresses of the proxy's host at which the server is asked.
fn places(hosts: Hosts) -> [IpAddr; 2] {
    [hosts.proxy, if hosts.proxy.is_ipv4() { ip("127.0.0.1") } else { ip("::1") }]
}

/// A client at this address sends a line to the server by way of the proxy; gives the address that the server saw.
fn relayed(lab: &Lab, server: &TcpListener, client: SocketAddr, to: SocketAddr) -> SocketAddr {
    let upstream: OwnedFd =
        lab.proxy.run(|| connect_from(client, to, 0)).unwrap_or_else(|e| panic!("{client} to {to}: {e}"));
    let mut upstream = TcpStream::from(upstream);
    upstream.set_read_timeout(Some(patience())).unwrap();
    let (mut accepted, seen) = accept(server);
    accepted.set_read_timeout(Some(patience())).unwrap();
    // More than a window in each direction.
    let words = vec![b'w'; 300_000];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut heard = vec![0; words.len()];
            accepted.read_exact(&mut heard).unwrap();
            accepted.write_all(&heard).unwrap();
        });
        upstream.write_all(&words[..1000]).unwrap();
        upstream.write_all(&words[1000..]).unwrap();
        let mut heard = vec![0; words.len()];
        upstream.read_exact(&mut heard).unwrap();
        assert_eq!(heard, words);
    });
    drop(accepted);
    // The server's FIN arrives too.
    assert_eq!(upstream.read(&mut [0]).unwrap(), 0);
    canonical(seen)
}

fn server_sees_client(backend: u32, flags: u32) {
    let lab = Lab::new();
    let before = lab.proxy.state();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let config = match flags & TP_RULES_DIVERT_ONLY {
        0 => RulesConfig::of(&listener).ports(&[9999]),
        _ => RulesConfig::new(),
    };
    let rules = lab.proxy.run(|| config.flags(flags | TP_RULES_LOCAL_SERVERS).backend(backend).install()).unwrap();
    let server = lab.proxy.run(|| TcpListener::bind("[::]:8080").unwrap());
    let found = lab.proxy.run(check);
    assert_eq!(troubles(&found), [] as [&Found; 0], "flags {flags:#x} backend {backend}");
    for hosts in [v4(), v6()] {
        for place in places(hosts) {
            let case = format!("{place} flags {flags:#x} backend {backend}");
            let seen = relayed(&lab, &server, at(hosts.client, 0), at(place, 8080));
            assert_eq!(seen.ip(), hosts.client, "{case}");
        }
        // Clients that connect directly to the server are not affected.
        let direct = while_answering(&[(&server, "server")], || lab.client.run(|| said(at(hosts.proxy, 8080))));
        assert_eq!(direct.unwrap(), "server");
    }
    lab.proxy.run(|| rules.remove()).unwrap();
    if backend == TP_BACKEND_NFT {
        assert_eq!(lab.proxy.state(), before);
    }
}

#[test]
fn install_rules_local_servers_lets_server_see_client() {
    for backend in BACKENDS {
        for flags in [0, TP_RULES_DIVERT_ONLY, TP_RULES_LOCAL_OUTPUT, TP_RULES_NEW_ONLY] {
            server_sees_client(backend, flags);
        }
    }
    server_sees_client(TP_BACKEND_NFT, TP_RULES_NOTRACK);
    server_sees_client(TP_BACKEND_NFT, TP_RULES_NOTRACK | TP_RULES_DIVERT_ONLY);
}

/// Without the flag, the server's replies leave by the network.
#[test]
fn install_rules_without_local_servers_does_not_return_replies() {
    let lab = Lab::new();
    let _rules = lab.proxy.run(divert_only).unwrap();
    let _server = lab.proxy.run(|| TcpListener::bind("[::]:8080").unwrap());
    let socket = lab.proxy.run(|| connect_from(at(v4().client, 0), at(v4().proxy, 8080), TP_NONBLOCK)).unwrap();
    let stream = TcpStream::from(socket);
    std::thread::sleep(silence());
    assert!(stream.peer_addr().is_err(), "the connection is established");
}

/// The service of a pod, whose proxy intercepts what comes for it, and connects to it with the client's address.
#[test]
fn install_rules_local_servers_serves_inbound_capture() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let own = ["198.51.100.1/32", "2001:db8:1::1/128"];
        let config = RulesConfig::of(&listener).dst(own).ports(&[80]).flags(TP_RULES_LOCAL_SERVERS).backend(backend);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        let server = lab.proxy.run(|| TcpListener::bind("[::]:80").unwrap());
        for hosts in [v4(), v6()] {
            let (heard, seen, served) = std::thread::scope(|scope| {
                let proxied = scope.spawn(|| lab.proxy.run(|| proxy_one(&listener, 0)));
                let served = scope.spawn(|| answer_one(&server));
                (lab.ask(at(hosts.proxy, 80)).unwrap(), proxied.join().unwrap(), served.join().unwrap())
            });
            assert_eq!(heard.answer, format!("seen {}, heard who am I?", hosts.client), "backend {backend}");
            assert_eq!((seen.peer.ip(), served.ip()), (hosts.client, hosts.client));
        }
    }
}

#[test]
fn install_rules_local_servers_serves_datagrams() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let config = RulesConfig::new().flags(TP_RULES_DIVERT_ONLY | TP_RULES_LOCAL_SERVERS).protocols(TP_PROTO_UDP);
        let _rules = lab.proxy.run(|| config.backend(backend).install()).unwrap();
        for hosts in [v4(), v6()] {
            for place in places(hosts) {
                let server = lab.proxy.run(|| UdpSocket::bind(at(place, 5353)).unwrap());
                let from = at(hosts.client, 4321);
                let upstream =
                    lab.proxy.run(|| connect_from(from, at(place, 5353), TP_CONNECT_DGRAM | TP_CONNECT_KEEP_PORT));
                let upstream = UdpSocket::from(upstream.unwrap());
                upstream.set_read_timeout(Some(patience())).unwrap();
                server.set_read_timeout(Some(patience())).unwrap();
                for _ in 0..3 {
                    upstream.send(b"question").unwrap();
                    let (len, seen) = server.recv_from(&mut [0; 10]).unwrap();
                    assert_eq!((len, canonical(seen)), (8, from), "{place} backend {backend}");
                    server.send_to(b"answer", seen).unwrap();
                    assert_eq!(upstream.recv(&mut [0; 10]).unwrap(), 6, "{place} backend {backend}");
                }
            }
        }
    }
}

#[test]
fn install_rules_local_servers_refuses_what_it_cannot_serve() {
    let lab = Net::new();
    lab.run(|| {
        let plain = TcpListener::bind("[::]:3130").unwrap();
        let redirect = RulesConfig::of(&plain).flags(TP_RULES_REDIRECT | TP_RULES_LOCAL_SERVERS).install();
        assert_eq!(redirect.err().unwrap().errno, libc::EOPNOTSUPP);
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let all = TP_RULES_NOTRACK | TP_RULES_LOCAL_SERVERS | TP_RULES_LOCAL_OUTPUT;
        assert_eq!(RulesConfig::of(&listener).flags(all).install().err().unwrap().errno, libc::EOPNOTSUPP);
        let mask = RulesConfig::of(&listener).mark(4).mark_mask(4).flags(TP_RULES_LOCAL_SERVERS).install();
        assert_eq!(mask.err().unwrap().errno, libc::EINVAL);
    });
}
