//! Everything that rules choose by, for every way in which a packet can come
//! and every listener that it can go to: intercepted where asked, untouched
//! elsewhere.

mod common;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use common::*;
use tproxy::ffi::*;

/// The addresses of one family; the rules name the server's first two, and let the second alone.
struct Addresses {
    client: IpAddr,
    other_client: IpAddr,
    server: IpAddr,
    bypassed: IpAddr,
    other_server: IpAddr,
    loopback: IpAddr,
    specific: IpAddr,
    len: u8,
}

fn addresses(v6: bool) -> Addresses {
    let pick = |a: &str, b: &str| ip(if v6 { b } else { a });
    Addresses {
        client: pick("198.51.100.2", "2001:db8:1::2"),
        other_client: pick("198.51.100.9", "2001:db8:1::9"),
        server: pick("203.0.113.2", "2001:db8:2::2"),
        bypassed: pick("203.0.113.3", "2001:db8:2::3"),
        other_server: pick("203.0.113.4", "2001:db8:2::4"),
        loopback: pick("127.0.0.1", "::1"),
        specific: pick("203.0.113.1", "2001:db8:2::1"),
        len: if v6 { 128 } else { 32 },
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Protocol {
    Tcp,
    Udp,
}

/// What listens, on the proxy's host or elsewhere.
enum Listener {
    Tcp(TcpListener),
    /// With original destinations.
    Udp(OwnedFd),
    PlainUdp(UdpSocket),
}

impl Listener {
    fn ordinary(protocol: Protocol, port: u16) -> Listener {
        let any = at(ip("::"), port);
        match protocol {
            Protocol::Tcp => Listener::Tcp(TcpListener::bind(any).unwrap()),
            Protocol::Udp => Listener::PlainUdp(UdpSocket::bind(any).unwrap()),
        }
    }

    /// Who came, and where they were going if that can be known.
    fn got(&self, patience: Duration) -> Option<(SocketAddr, Option<SocketAddr>)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = accept_within(listener, patience)?;
                Some((peer, orig_dst(&stream).ok().map(canonical)))
            }
            Listener::Udp(fd) => {
                let (words, from, to) = receive_datagram(fd, patience)?;
                assert_eq!(words, "hello");
                Some((from, Some(to)))
            }
            Listener::PlainUdp(socket) => {
                socket.set_read_timeout(Some(patience.max(Duration::from_millis(1)))).unwrap();
                let (_, from) = socket.recv_from(&mut [0; 10]).ok()?;
                Some((canonical(from), None))
            }
        }
    }
}

/// Sends something from an address of a host; the connection, if it is one, is kept open.
fn send(protocol: Protocol, from: IpAddr, to: SocketAddr) -> (SocketAddr, Option<TcpStream>) {
    match protocol {
        Protocol::Udp => {
            let socket = UdpSocket::bind(at(from, 0)).unwrap();
            socket.send_to(b"hello", to).unwrap();
            (socket.local_addr().unwrap(), None)
        }
        Protocol::Tcp => {
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
            socket.bind(&at(from, 0).into()).unwrap();
            socket.connect_timeout(&to.into(), patience()).unwrap_or_else(|e| panic!("{from} to {to}: {e}"));
            let stream = TcpStream::from(socket);
            (stream.local_addr().unwrap(), Some(stream))
        }
    }
}

#[derive(Debug, PartialEq)]
enum Got {
    Proxy { original_destination: Option<SocketAddr> },
    Server,
    Both,
    Nobody,
}

/// Which of two listeners gets what is sent. The peer that it sees must be the sender.
fn who_gets(net: &Net, protocol: Protocol, from: IpAddr, to: SocketAddr, proxy: &Listener, server: &Listener) -> Got {
    let (sender, _open) = net.run(|| send(protocol, from, to));
    let deadline = Instant::now() + patience();
    let step = Duration::from_millis(2);
    while Instant::now() < deadline {
        match (proxy.got(step), server.got(step)) {
            (None, None) => {}
            (Some((peer, original_destination)), None) => {
                assert_eq!(peer, sender);
                return Got::Proxy { original_destination };
            }
            (None, Some((peer, _))) => {
                assert_eq!(peer, sender);
                return Got::Server;
            }
            (Some(_), Some(_)) => return Got::Both,
        }
    }
    Got::Nobody
}

const PORT: u16 = 7000;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Backend {
    Nft,
    IptablesNft,
    IptablesLegacy,
}

fn check(backend: Backend, v6: bool, protocol: Protocol, redirect: bool, listen_at: IpAddr, local_output: bool) {
    let a = addresses(v6);
    let lab = Lab::new();
    if backend == Backend::IptablesLegacy {
        // The library goes where rules are already.
        for program in ["iptables-legacy", "ip6tables-legacy"] {
            lab.proxy.command(program, &["--wait", "-A", "INPUT", "-j", "ACCEPT"]);
        }
    }
    let here = at(listen_at, 3129);
    let listener = lab.proxy.run(|| match (protocol, redirect) {
        (Protocol::Tcp, false) => Listener::Tcp(listen(here, 0).unwrap()),
        (Protocol::Tcp, true) => Listener::Tcp(TcpListener::bind(here).unwrap()),
        (Protocol::Udp, _) => Listener::Udp(receiver(here)),
    });
    let fd = match &listener {
        Listener::Tcp(listener) => listener.as_raw_fd(),
        Listener::Udp(fd) => fd.as_raw_fd(),
        Listener::PlainUdp(_) => unreachable!(),
    };
    let host = |addr: IpAddr| format!("{addr}/{}", a.len);
    let set = |addrs: &[IpAddr]| {
        let texts: Vec<String> = addrs.iter().map(|addr| host(*addr)).collect();
        prefixes(&texts.iter().map(String::as_str).collect::<Vec<_>>())
    };
    // The client as a destination and the server as a source: for the other interface.
    let (dst, bypass) = (set(&[a.server, a.bypassed, a.client]), set(&[a.bypassed]));
    let src = set(&[a.client, a.server, a.specific]);
    let ports = [tp_port_range { first: PORT, last: PORT }];
    let flags = if redirect { TP_RULES_REDIRECT } else { 0 } | if local_output { TP_RULES_LOCAL_OUTPUT } else { 0 };
    let rules = lab.proxy.run(|| {
        let interfaces = [c"eth0".as_ptr()];
        Rules::install(&tp_rules_config {
            listeners: &raw const fd,
            n_listeners: 1,
            flags,
            backend: if backend == Backend::Nft { TP_BACKEND_NFT } else { TP_BACKEND_IPTABLES },
            ports: ports.as_ptr(),
            n_ports: ports.len(),
            dst: dst.as_ptr(),
            n_dst: dst.len(),
            src: src.as_ptr(),
            n_src: src.len(),
            bypass: bypass.as_ptr(),
            n_bypass: bypass.len(),
            interfaces: interfaces.as_ptr(),
            n_interfaces: 1,
            ..config()
        })
        .unwrap()
    });
    let server = lab.server.run(|| Listener::ordinary(protocol, PORT));
    let server_other_port = lab.server.run(|| Listener::ordinary(protocol, PORT + 1));
    let client = lab.client.run(|| Listener::ordinary(protocol, PORT));
    let case = format!("{backend:?}, {protocol:?} redirect {redirect} to {here}, local output {local_output}");

    let to = at(a.server, PORT);
    let proxied = Got::Proxy { original_destination: Some(to) };
    let from_client = |from, to, server| who_gets(&lab.client, protocol, from, to, &listener, server);
    // A loopback listener cannot be the target of redirection from outside.
    if !(redirect && listen_at.is_loopback()) {
        assert_eq!(from_client(a.client, to, &server), proxied, "{case}");
    }
    assert_eq!(from_client(a.other_client, to, &server), Got::Server, "{case}: other source");
    assert_eq!(from_client(a.client, at(a.bypassed, PORT), &server), Got::Server, "{case}: bypass");
    assert_eq!(from_client(a.client, at(a.other_server, PORT), &server), Got::Server, "{case}: other destination");
    let other_port = at(a.server, PORT + 1);
    assert_eq!(from_client(a.client, other_port, &server_other_port), Got::Server, "{case}: other port");
    let back = who_gets(&lab.server, protocol, a.server, at(a.client, PORT), &listener, &client);
    assert_eq!(back, Got::Server, "{case}: other interface");

    let local = |to, server| who_gets(&lab.proxy, protocol, a.specific, to, &listener, server);
    let expected = if local_output { proxied } else { Got::Server };
    assert_eq!(local(to, &server), expected, "{case}: the host's own");
    assert_eq!(local(at(a.bypassed, PORT), &server), Got::Server, "{case}: the host's own, bypass");
    assert_eq!(local(at(a.other_server, PORT), &server), Got::Server, "{case}: the host's own, other destination");
    assert_eq!(local(other_port, &server_other_port), Got::Server, "{case}: the host's own, other port");

    let family = if v6 { "ip6tables" } else { "iptables" };
    let where_they_are = |variant: &str| {
        lab.proxy.command(&format!("{family}-{variant}-save"), &["-t", "mangle"]).contains("tp-tproxy-p")
    };
    assert_eq!(where_they_are("legacy"), backend == Backend::IptablesLegacy, "{case}");
    assert_eq!(where_they_are("nft"), backend == Backend::IptablesNft, "{case}");
    lab.proxy.run(|| rules.remove()).unwrap();
    assert!(!where_they_are("legacy") && !where_they_are("nft"), "{case}");
    let state = lab.proxy.state();
    assert!(!state.contains("libtproxy") && !state.contains("proto 116"), "{case}: {state}");
}

fn check_all(v6: bool, protocol: Protocol, redirect: bool) {
    let a = addresses(v6);
    for backend in [Backend::Nft, Backend::IptablesNft, Backend::IptablesLegacy] {
        for local_output in [false, true] {
            for listen_at in [ip("::"), a.loopback, a.specific] {
                if !redirect || local_output || !listen_at.is_loopback() {
                    check(backend, v6, protocol, redirect, listen_at, local_output);
                }
            }
        }
    }
}

#[test]
fn tcp_over_ipv4_to_transparent_listeners() {
    check_all(false, Protocol::Tcp, false);
}

#[test]
fn tcp_over_ipv6_to_transparent_listeners() {
    check_all(true, Protocol::Tcp, false);
}

#[test]
fn tcp_over_ipv4_by_redirection() {
    check_all(false, Protocol::Tcp, true);
}

#[test]
fn tcp_over_ipv6_by_redirection() {
    check_all(true, Protocol::Tcp, true);
}

#[test]
fn udp_over_ipv4_to_transparent_sockets() {
    check_all(false, Protocol::Udp, false);
}

#[test]
fn udp_over_ipv6_to_transparent_sockets() {
    check_all(true, Protocol::Udp, false);
}
