//! Replies of connections that others began are not intercepted, whatever the selection, and nothing else passes for a
//! reply.

mod common;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::datagrams::{Replier, replier_config, reply_of};
use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];
/// The port of the services, and of the clients of one of them.
const SERVICE: u16 = 22;

/// A listener for TCP and one for UDP, on the proxy's host.
struct Listeners {
    tcp: TcpListener,
    udp: OwnedFd,
}

impl Listeners {
    fn on(net: &Net) -> Listeners {
        net.run(|| Listeners {
            tcp: listen("[::]:3129".parse().unwrap(), 0).unwrap(),
            udp: receiver("[::]:3129".parse().unwrap()),
        })
    }

    fn config(&self) -> RulesConfig {
        RulesConfig::new().listeners(&[&self.tcp, &self.udp])
    }
}

/// A UDP service that replies with some words.
fn echo(socket: &UdpSocket, words: &str, stop: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut [0; 10]) {
            socket.send_to(words.as_bytes(), from).unwrap();
        }
    }
}

/// Runs a function while a UDP service replies.
fn while_echoing<T>(socket: &UdpSocket, words: &str, body: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| echo(socket, words, &stop));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        stop.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The reply to one of several datagrams, if there is one.
fn asked(from: &UdpSocket, to: SocketAddr) -> Option<String> {
    from.set_read_timeout(Some(silence())).unwrap();
    let mut words = [0; 10];
    let len = (0..3).find_map(|_| {
        from.send_to(b"?", to).unwrap();
        from.recv(&mut words).ok()
    })?;
    Some(String::from_utf8_lossy(&words[..len]).into_owned())
}

/// A host outside uses services in the client's network while the client's own traffic is intercepted.
fn inbound_services_work(backend: u32, flags: u32, what: &str, select: impl Fn(RulesConfig) -> RulesConfig + Sync) {
    let lab = Lab::new();
    let listeners = Listeners::on(&lab.proxy);
    let redirect = flags & TP_RULES_REDIRECT != 0;
    let plain = redirect.then(|| lab.proxy.run(|| TcpListener::bind("[::]:3130").unwrap()));
    let config = match &plain {
        Some(plain) => RulesConfig::of(plain),
        None => listeners.config(),
    };
    let rules = lab.proxy.run(|| select(config).backend(backend).flags(flags).install()).unwrap();
    let tcp = plain.as_ref().unwrap_or(&listeners.tcp);
    let service = lab.client.run(|| TcpListener::bind(at(ip("::"), SERVICE)).unwrap());
    for hosts in [v4(), v6()] {
        let words = lab.client.run(|| UdpSocket::bind(at(hosts.client, SERVICE)).unwrap());
        let case = format!("{} {what} flags {flags:#x} backend {backend}", hosts.server);
        while_answering(&[(&service, "service"), (tcp, "proxy")], || {
            while_echoing(&words, "service", || {
                let heard = lab.server.run(|| said(at(hosts.client, SERVICE)));
                assert_eq!(heard.expect(&case), "service", "{case}");
                let outside = lab.server.run(|| UdpSocket::bind(at(hosts.server, 0)).unwrap());
                for _ in 0..3 {
                    assert_eq!(asked(&outside, at(hosts.client, SERVICE)).as_deref(), Some("service"), "{case}");
                }
                let own = lab.client.run(|| said(at(hosts.server, 80)));
                assert_eq!(own.expect(&case), "proxy", "{case}");
            });
        });
        if !redirect {
            let client = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
            client.send_to(b"own", at(hosts.server, 53)).unwrap();
            let seen = receive_datagram(&listeners.udp, patience());
            assert_eq!(seen.map(|(words, ..)| words).as_deref(), Some("own"), "{case}");
        }
    }
    if flags & TP_RULES_PERSIST == 0 {
        lab.proxy.run(|| rules.remove()).unwrap();
    } else {
        rules.abandon();
    }
}

#[test]
fn install_rules_by_interface_lets_replies_of_inbound_services_pass() {
    for backend in BACKENDS {
        inbound_services_work(backend, 0, "by interface", |config| config.interfaces(&["eth0"]));
    }
}

#[test]
fn install_rules_by_source_lets_replies_of_inbound_services_pass() {
    for backend in BACKENDS {
        inbound_services_work(backend, 0, "by source", |config| config.src(["198.51.100.0/24", "2001:db8:1::/64"]));
    }
}

#[test]
fn install_rules_of_everything_lets_replies_of_inbound_services_pass() {
    for backend in BACKENDS {
        let chosen = ["198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"];
        // The knocking host's own datagrams would be intercepted too: only the client's network is a source.
        inbound_services_work(backend, 0, "dst of both sides", move |config| {
            config.dst(chosen).interfaces(&["eth0"]).bypass(["192.0.2.0/24", "2001:db8:9::/48"])
        });
    }
}

#[test]
fn install_rules_notrack_lets_replies_of_inbound_services_pass() {
    inbound_services_work(TP_BACKEND_NFT, TP_RULES_NOTRACK, "by interface", |config| config.interfaces(&["eth0"]));
}

#[test]
fn install_rules_persist_lets_replies_of_inbound_services_pass() {
    inbound_services_work(TP_BACKEND_NFT, TP_RULES_PERSIST, "by interface", |config| config.interfaces(&["eth0"]));
}

#[test]
fn install_rules_redirect_lets_replies_of_inbound_services_pass() {
    for backend in BACKENDS {
        inbound_services_work(backend, TP_RULES_REDIRECT, "by interface", |config| config.interfaces(&["eth0"]));
    }
}

/// Every port of this host's own addresses is intercepted. Its own connections, TCP and UDP, work.
#[test]
fn install_rules_dst_of_own_address_lets_replies_to_this_host_pass() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let listeners = Listeners::on(&lab.proxy);
        let own = ["198.51.100.1/32", "203.0.113.1/32", "2001:db8:1::1/128", "2001:db8:2::1/128"];
        let _rules = lab.proxy.run(|| listeners.config().dst(own).backend(backend).install()).unwrap();
        let server = lab.serve(80);
        for hosts in [v4(), v6()] {
            let case = format!("{} backend {backend}", hosts.server);
            let words = lab.server.run(|| UdpSocket::bind(at(hosts.server, 53)).unwrap());
            while_answering(&[(&server, "server"), (&listeners.tcp, "proxy")], || {
                while_echoing(&words, "server", || {
                    assert_eq!(lab.proxy.run(|| said(at(hosts.server, 80))).expect(&case), "server", "{case}");
                    let any = if hosts.server.is_ipv4() { ip("0.0.0.0") } else { ip("::") };
                    let asking = lab.proxy.run(|| UdpSocket::bind(at(any, 0)).unwrap());
                    for _ in 0..3 {
                        assert_eq!(asked(&asking, at(hosts.server, 53)).as_deref(), Some("server"), "{case}");
                    }
                    assert_eq!(lab.client.run(|| said(at(hosts.proxy, 80))).expect(&case), "proxy", "{case}");
                });
            });
        }
    }
}

/// With the traffic of this host intercepted, its own UDP service replies to clients.
#[test]
fn install_rules_local_output_lets_own_datagram_service_reply() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let listeners = Listeners::on(&lab.proxy);
        let config = listeners.config().flags(TP_RULES_LOCAL_OUTPUT).backend(backend);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        for hosts in [v4(), v6()] {
            let words = lab.proxy.run(|| UdpSocket::bind(at(hosts.proxy, SERVICE)).unwrap());
            while_echoing(&words, "own", || {
                let client = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
                for _ in 0..3 {
                    let heard = asked(&client, at(hosts.proxy, SERVICE));
                    assert_eq!(heard.as_deref(), Some("own"), "{} backend {backend}", hosts.proxy);
                }
            });
        }
    }
}

/// A host outside sends a segment to the client's port first. The client's later connection from that port to that host is not
/// taken for a reply.
#[test]
fn install_rules_intercepts_connection_to_host_that_knocked() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let listeners = Listeners::on(&lab.proxy);
        let _rules = lab.proxy.run(|| listeners.config().interfaces(&["eth0"]).backend(backend).install()).unwrap();
        for hosts in [v4(), v6()] {
            let (own, other) = (at(hosts.client, 4321), at(hosts.server, 80));
            let bound = |from: SocketAddr| {
                let socket =
                    socket2::Socket::new(socket2::Domain::for_address(from), socket2::Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&from.into()).unwrap();
                socket
            };
            let knock = lab.server.run(|| bound(other).connect_timeout(&own.into(), silence()));
            assert!(knock.is_err());
            let heard = while_answering(&[(&listeners.tcp, "proxy")], || {
                lab.client.run(|| {
                    let socket = bound(own);
                    socket.connect_timeout(&other.into(), patience()).unwrap();
                    let mut stream = std::net::TcpStream::from(socket);
                    stream.set_read_timeout(Some(patience())).unwrap();
                    std::io::Write::write_all(&mut stream, b"who am I?").unwrap();
                    stream.shutdown(std::net::Shutdown::Write).unwrap();
                    let mut words = String::new();
                    std::io::Read::read_to_string(&mut stream, &mut words).unwrap();
                    words
                })
            });
            assert_eq!(heard, "proxy", "{} backend {backend}", hosts.server);
        }
    }
}

/// The first datagram of a flow that connection tracking sees is a late one of the proxy. What the client sends back is
/// intercepted.
#[test]
fn install_rules_intercepts_datagram_after_late_one_of_proxy() {
    for (backend, flags) in [(TP_BACKEND_NFT, 0), (TP_BACKEND_IPTABLES, 0), (TP_BACKEND_NFT, TP_RULES_NOTRACK)] {
        let lab = Lab::new();
        let listeners = Listeners::on(&lab.proxy);
        let config = listeners.config().interfaces(&["eth0"]).backend(backend).flags(flags);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        for hosts in [v4(), v6()] {
            let case = format!("{} flags {flags:#x} backend {backend}", hosts.server);
            let client = lab.client.run(|| UdpSocket::bind(at(hosts.client, 4321)).unwrap());
            let mut replier = lab.proxy.run(|| Replier::open(&replier_config())).unwrap();
            let mut late = *b"late";
            let mut datagrams = [reply_of(&mut late, at(hosts.server, 53), at(hosts.client, 4321))];
            assert_eq!(lab.proxy.run(|| replier.reply(&mut datagrams)), 1, "{case}");
            client.set_read_timeout(Some(patience())).unwrap();
            let (_, from) = client.recv_from(&mut [0; 10]).expect(&case);
            assert_eq!(from, at(hosts.server, 53), "{case}");
            client.send_to(b"answer", from).unwrap();
            let seen = receive_datagram(&listeners.udp, patience());
            assert_eq!(seen.map(|(words, ..)| words).as_deref(), Some("answer"), "{case}");
        }
    }
}
