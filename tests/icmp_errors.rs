//! ICMP errors about packets that were sent from a foreign address: the socket that sent them gets the errors, not the owner of
//! the address.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];
const LEN: usize = 1 << 20;

/// A host behind a router, by a link with a small MTU. The host itself has the full MTU on its end, and announces segments of
/// full size.
fn narrow(lab: &Lab, router: &Net, neighbor: [IpAddr; 2]) -> Net {
    let far = Net::new();
    Net::link(
        (router, "narrow", &["192.0.2.1/24", "2001:db8:3::1/64"]),
        (&far, "eth0", &["192.0.2.2/24", "2001:db8:3::2/64"]),
    );
    router.ip("link set narrow mtu 1280");
    for (here, (far_net, via)) in ["192.0.2.1", "2001:db8:3::1"].iter().zip(FAR_NETS.iter().zip(neighbor)) {
        far.ip(&format!("route add default via {here}"));
        lab.proxy.ip(&format!("route add {far_net} via {via}"));
    }
    router.ready(&["narrow"]);
    far.ready(&["eth0"]);
    router.forward();
    far
}

const FAR_NETS: [&str; 2] = ["192.0.2.0/24", "2001:db8:3::/64"];
const FAR: [&str; 2] = ["192.0.2.2", "2001:db8:3::2"];

/// Rules for every port, or rules that only divert if there is no listener.
fn install(listener: Option<&dyn AsRawFd>, flags: u32, backend: u32, protocols: u32) -> Rules {
    let config = RulesConfig::new().flags(flags).backend(backend).protocols(protocols);
    listener.map_or(config.clone(), |listener| config.listeners(&[listener])).install().unwrap()
}

/// A proxied connection that carries many bytes from the client to the server, and a word back.
fn upload(lab: &Lab, client: &Net, server: &Net, to: IpAddr, listener: &TcpListener) {
    let to = at(to, 80);
    let accepting = server.run(|| TcpListener::bind(to).unwrap());
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let (mut stream, _) = accept(&accepting);
            let len = std::io::copy(&mut stream, &mut std::io::sink());
            stream.write_all(b"done").unwrap();
            len.unwrap()
        });
        scope.spawn(|| lab.proxy.run(|| proxy_one(listener, 0)));
        let answer = client.run(|| {
            let mut stream = connect(to);
            stream.set_write_timeout(Some(patience())).unwrap();
            stream.write_all(&vec![b'x'; LEN]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        assert_eq!(answer, "done");
        assert_eq!(served.join().unwrap(), LEN as u64);
    });
}

#[test]
fn connect_from_learns_path_mtu() {
    for (backend, flags) in [(TP_BACKEND_NFT, 0), (TP_BACKEND_NFT, TP_RULES_NOTRACK), (TP_BACKEND_IPTABLES, 0)] {
        let lab = Lab::new();
        let far = narrow(&lab, &lab.server, [v4().server, v6().server]);
        // A common firewall: packets that connection tracking calls invalid are dropped.
        lab.proxy.nft(
            "table inet firewall { chain input { type filter hook input priority 0; ct state invalid drop
            }
            }",
        );
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let rules = lab.proxy.run(|| install(Some(&listener), flags, backend, 0));
        for to in FAR {
            upload(&lab, &lab.client, &far, ip(to), &listener);
        }
        assert!(lab.proxy.run(|| rules.stats()).diverted_packets > 2);
    }
}

/// The proxy sends to the client from the server's address, which is foreign too.
#[test]
fn intercepted_connection_learns_path_mtu() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let far = narrow(&lab, &lab.client, [v4().client, v6().client]);
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| install(Some(&listener), 0, backend, 0));
        for (client, hosts) in FAR.into_iter().zip([v4(), v6()]) {
            download(&far, ip(client), hosts.server, &listener);
        }
    }
}

/// The proxy itself replies, with many bytes.
fn download(client: &Net, from: IpAddr, to: IpAddr, listener: &TcpListener) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, peer) = accept(listener);
            assert_eq!(peer.ip(), from);
            stream.set_write_timeout(Some(patience())).unwrap();
            stream.write_all(&vec![b'x'; LEN]).unwrap();
        });
        client.run(|| {
            let mut stream = connect(at(to, 80));
            stream.set_read_timeout(Some(patience())).unwrap();
            assert_eq!(std::io::copy(&mut stream, &mut std::io::sink()).unwrap(), LEN as u64);
        });
    });
}

/// The error that a connected socket has, if it has one in time.
fn error_within(socket: &UdpSocket, limit: Duration) -> Option<std::io::ErrorKind> {
    socket.set_read_timeout(Some(limit)).unwrap();
    loop {
        match socket.recv(&mut [0; 10]).err().map(|error| error.kind()) {
            Some(std::io::ErrorKind::Interrupted) => {}
            outcome => return outcome,
        }
    }
}

/// A connected datagram socket of the proxy, on the client's address, gets the error that the port is unreachable. The client,
/// whose socket has the same addresses and ports, does not. The client gets the errors about its own packets.
#[test]
fn connect_from_dgram_refused_gets_the_error_and_the_client_does_not() {
    use std::io::ErrorKind::{ConnectionRefused, WouldBlock};
    for backend in BACKENDS {
        for flags in [0, TP_RULES_DIVERT_ONLY] {
            let lab = Lab::new();
            let listener: Option<OwnedFd> = (flags == 0).then(|| lab.proxy.run(|| receiver(at(ip("::"), 3129))));
            let rules = lab.proxy.run(|| {
                let listener = listener.as_ref().map(|fd| fd as &dyn AsRawFd);
                install(listener, flags, backend, TP_PROTO_UDP)
            });
            for hosts in [v4(), v6()] {
                let (from, to) = (at(hosts.client, 4321), at(hosts.server, 9));
                let client = lab.client.run(|| UdpSocket::bind(from).unwrap());
                client.connect(to).unwrap();
                let upstream =
                    lab.proxy.run(|| connect_from(from, to, TP_CONNECT_DGRAM | TP_CONNECT_KEEP_PORT)).unwrap();
                let upstream = UdpSocket::from(upstream);
                let diverted = || lab.proxy.run(|| rules.stats()).diverted_packets;
                let before = diverted();
                upstream.send(b"is anybody there?").unwrap();
                assert_eq!(error_within(&upstream, patience()), Some(ConnectionRefused));
                assert_eq!(error_within(&client, silence()), Some(WouldBlock));
                assert_eq!(diverted(), before + 1);
                drop(upstream);
                if flags == TP_RULES_DIVERT_ONLY {
                    // Another test's child may have a copy of the proxy's socket for a moment, which takes the error.
                    wait_for("the client gets the error", || {
                        // A pending error of an earlier attempt makes send(2) fail.
                        let sent = client.send(b"is anybody there?").err().map(|error| error.kind());
                        let error = sent.or_else(|| error_within(&client, silence()));
                        (error == Some(ConnectionRefused)).then_some(())
                    });
                }
            }
        }
    }
}
