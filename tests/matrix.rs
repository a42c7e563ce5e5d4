//! Every selection of rules, for each backend, each protocol, each family, each kind of listener, and for forwarded and
//! locally generated packets: what is selected is intercepted, and the rest is left alone.

mod common;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use common::*;
use tproxy::ffi::*;

/// Addresses of one family. The rules select the first two of the server, and bypass the second.
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

/// A listener on any host.
enum Listener {
    Tcp(TcpListener),
    /// A transparent socket, which reports original destinations.
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

    /// The sender of a connection or datagram that has come, and the original destination if the listener knows it.
    fn poll(&self) -> Option<(SocketAddr, Option<SocketAddr>)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = accept_within(listener, Duration::ZERO)?;
                Some((peer, orig_dst(&stream).ok().map(canonical)))
            }
            Listener::Udp(fd) => {
                let (words, from, to) = receive_datagram(fd, Duration::ZERO)?;
                assert_eq!(words, "hello");
                Some((from, Some(to)))
            }
            Listener::PlainUdp(socket) => {
                socket.set_nonblocking(true).unwrap();
                let (_, from) = socket.recv_from(&mut [0; 10]).ok()?;
                Some((canonical(from), None))
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Listener::Tcp(listener) => listener.as_raw_fd(),
            Listener::Udp(fd) => fd.as_raw_fd(),
            Listener::PlainUdp(socket) => socket.as_raw_fd(),
        }
    }
}

/// Sends a datagram or connects, from an address of this host. The caller keeps the connection open.
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
}

/// Which of two listeners gets what is sent. It must see the address of the sender.
fn receiver_of(
    net: &Net,
    protocol: Protocol,
    from: IpAddr,
    to: SocketAddr,
    proxy: &Listener,
    server: &Listener,
) -> Got {
    let (sender, _open) = net.run(|| send(protocol, from, to));
    wait_for(&format!("a listener gets what {from} sends to {to}"), || match (proxy.poll(), server.poll()) {
        (None, None) => None,
        (Some((peer, original_destination)), None) => {
            assert_eq!(peer, sender);
            Some(Got::Proxy { original_destination })
        }
        (None, Some((peer, _))) => {
            assert_eq!(peer, sender);
            Some(Got::Server)
        }
        (Some(_), Some(_)) => Some(Got::Both),
    })
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
        // The library uses the variant that has rules already.
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
    let host = |addr: IpAddr| format!("{addr}/{}", a.len);
    let hosts = |addrs: &[IpAddr]| addrs.iter().map(|addr| host(*addr)).collect::<Vec<_>>();
    // The client as a destination and the server as a source select what comes in by the other interface, if that were
    // among the interfaces.
    let config = RulesConfig::of(&listener)
        .flags(if redirect { TP_RULES_REDIRECT } else { 0 } | if local_output { TP_RULES_LOCAL_OUTPUT } else { 0 })
        .backend(if backend == Backend::Nft { TP_BACKEND_NFT } else { TP_BACKEND_IPTABLES })
        .ports(&[PORT])
        .dst(&hosts(&[a.server, a.bypassed, a.client]))
        .src(&hosts(&[a.client, a.server, a.specific]))
        .bypass(&hosts(&[a.bypassed]))
        .interfaces(&["eth0"]);
    let rules = lab.proxy.run(|| config.install().unwrap());
    let server = lab.server.run(|| Listener::ordinary(protocol, PORT));
    let server_other_port = lab.server.run(|| Listener::ordinary(protocol, PORT + 1));
    let client = lab.client.run(|| Listener::ordinary(protocol, PORT));
    let case = format!("{backend:?}, {protocol:?} redirect {redirect} to {here}, local output {local_output}");

    let to = at(a.server, PORT);
    let proxied = Got::Proxy { original_destination: Some(to) };
    let from_client = |from, to, server| receiver_of(&lab.client, protocol, from, to, &listener, server);
    // Forwarded packets cannot be redirected to a listener on loopback.
    if !(redirect && listen_at.is_loopback()) {
        assert_eq!(from_client(a.client, to, &server), proxied, "{case}");
    }
    assert_eq!(from_client(a.other_client, to, &server), Got::Server, "{case}: other source");
    assert_eq!(from_client(a.client, at(a.bypassed, PORT), &server), Got::Server, "{case}: bypass");
    assert_eq!(from_client(a.client, at(a.other_server, PORT), &server), Got::Server, "{case}: other destination");
    let other_port = at(a.server, PORT + 1);
    assert_eq!(from_client(a.client, other_port, &server_other_port), Got::Server, "{case}: other port");
    let back = receiver_of(&lab.server, protocol, a.server, at(a.client, PORT), &listener, &client);
    assert_eq!(back, Got::Server, "{case}: other interface");

    let local = |to, server| receiver_of(&lab.proxy, protocol, a.specific, to, &listener, server);
    let expected = if local_output { proxied } else { Got::Server };
    assert_eq!(local(to, &server), expected, "{case}: local output");
    assert_eq!(local(at(a.bypassed, PORT), &server), Got::Server, "{case}: local output, bypass");
    assert_eq!(local(at(a.other_server, PORT), &server), Got::Server, "{case}: local output, other destination");
    assert_eq!(local(other_port, &server_other_port), Got::Server, "{case}: local output, other port");

    let family = if v6 { "ip6tables" } else { "iptables" };
    let is_in = |variant: &str| {
        if variant == "legacy" && !is_met(Requirement::LegacyIptables) {
            return false;
        }
        lab.proxy.command(&format!("{family}-{variant}-save"), &["-t", "mangle"]).contains("tp-tproxy-p")
    };
    assert_eq!(is_in("legacy"), backend == Backend::IptablesLegacy, "{case}");
    assert_eq!(is_in("nft"), backend == Backend::IptablesNft, "{case}");
    lab.proxy.run(|| rules.remove()).unwrap();
    assert!(!is_in("legacy") && !is_in("nft"), "{case}");
    let state = lab.proxy.state();
    assert!(!state.contains("libtproxy") && !state.contains("proto 116"), "{case}: {state}");
}

fn check_all(backend: Backend, v6: bool, protocol: Protocol, redirect: bool) {
    let a = addresses(v6);
    for local_output in [false, true] {
        for listen_at in [ip("::"), a.loopback, a.specific] {
            if !redirect || local_output || !listen_at.is_loopback() {
                check(backend, v6, protocol, redirect, listen_at, local_output);
            }
        }
    }
}

#[test]
fn install_rules_nft_selects_tcp_over_ipv4() {
    check_all(Backend::Nft, false, Protocol::Tcp, false);
}

#[test]
fn install_rules_nft_selects_tcp_over_ipv6() {
    check_all(Backend::Nft, true, Protocol::Tcp, false);
}

#[test]
fn install_rules_nft_selects_redirected_tcp_over_ipv4() {
    check_all(Backend::Nft, false, Protocol::Tcp, true);
}

#[test]
fn install_rules_nft_selects_redirected_tcp_over_ipv6() {
    check_all(Backend::Nft, true, Protocol::Tcp, true);
}

#[test]
fn install_rules_nft_selects_udp_over_ipv4() {
    check_all(Backend::Nft, false, Protocol::Udp, false);
}

#[test]
fn install_rules_nft_selects_udp_over_ipv6() {
    check_all(Backend::Nft, true, Protocol::Udp, false);
}

#[test]
fn install_rules_iptables_nft_selects_tcp_over_ipv4() {
    check_all(Backend::IptablesNft, false, Protocol::Tcp, false);
}

#[test]
fn install_rules_iptables_nft_selects_tcp_over_ipv6() {
    check_all(Backend::IptablesNft, true, Protocol::Tcp, false);
}

#[test]
fn install_rules_iptables_nft_selects_redirected_tcp_over_ipv4() {
    check_all(Backend::IptablesNft, false, Protocol::Tcp, true);
}

#[test]
fn install_rules_iptables_nft_selects_redirected_tcp_over_ipv6() {
    check_all(Backend::IptablesNft, true, Protocol::Tcp, true);
}

#[test]
fn install_rules_iptables_nft_selects_udp_over_ipv4() {
    check_all(Backend::IptablesNft, false, Protocol::Udp, false);
}

#[test]
fn install_rules_iptables_nft_selects_udp_over_ipv6() {
    check_all(Backend::IptablesNft, true, Protocol::Udp, false);
}

#[test]
fn install_rules_iptables_legacy_selects_tcp_over_ipv4() {
    if provided(Requirement::LegacyIptables) {
        check_all(Backend::IptablesLegacy, false, Protocol::Tcp, false);
    }
}

#[test]
fn install_rules_iptables_legacy_selects_tcp_over_ipv6() {
    if provided(Requirement::LegacyIptables) {
        check_all(Backend::IptablesLegacy, true, Protocol::Tcp, false);
    }
}

#[test]
fn install_rules_iptables_legacy_selects_redirected_tcp_over_ipv4() {
    if provided(Requirement::LegacyIptables) {
        check_all(Backend::IptablesLegacy, false, Protocol::Tcp, true);
    }
}

#[test]
fn install_rules_iptables_legacy_selects_redirected_tcp_over_ipv6() {
    if provided(Requirement::LegacyIptables) {
        check_all(Backend::IptablesLegacy, true, Protocol::Tcp, true);
    }
}

#[test]
fn install_rules_iptables_legacy_selects_udp_over_ipv4() {
    if provided(Requirement::LegacyIptables) {
        check_all(Backend::IptablesLegacy, false, Protocol::Udp, false);
    }
}

#[test]
fn install_rules_iptables_legacy_selects_udp_over_ipv6() {
    if provided(Requirement::LegacyIptables) {
        check_all(Backend::IptablesLegacy, true, Protocol::Udp, false);
    }
}
