//! Rules that only divert, as in the kernel's documentation: sockets on foreign addresses get their packets, and nothing is
//! intercepted.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::*;
use tproxy::ffi::*;

/// 0xDEADBEEF, the foreign address in the kernel's documentation.
const FOREIGN: [&str; 2] = ["222.173.190.239:51966", "[2001:db8:dead::beef]:51966"];

#[test]
fn listen_on_foreign_address_with_divert_only_accepts() {
    for foreign in FOREIGN {
        let lab = Lab::new();
        let foreign = foreign.parse().unwrap();
        let listener = lab.proxy.run(|| listen(foreign, 0)).unwrap();
        // Without the rules the packets are not delivered to this host.
        let outcome = lab.client.run(|| connect_in_vain(foreign));
        assert!(outcome.is_err());
        let _rules = lab.proxy.run(divert_only).unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| answer_one(&listener));
            let heard = lab.ask(foreign).unwrap();
            assert_eq!(served.join().unwrap(), heard.from);
            assert_eq!(heard.answer, format!("seen {}, heard who am I?", heard.from.ip()));
        });
    }
}

#[test]
fn connect_from_foreign_address_with_divert_only_gets_replies() {
    for hosts in [v4(), v6()] {
        let lab = Lab::new();
        let server = lab.serve(80);
        let _rules = lab.proxy.run(divert_only).unwrap();
        // The proxy's host connects from the client's address.
        for flags in [0, TP_CONNECT_KEEP_PORT] {
            let src = at(hosts.client, 4321);
            std::thread::scope(|scope| {
                let served = scope.spawn(|| answer_one(&server));
                let fd = lab.proxy.run(|| connect_from(src, at(hosts.server, 80), flags)).unwrap();
                let mut stream = TcpStream::from(fd);
                stream.write_all(b"hello").unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert_eq!(answer, format!("seen {}, heard hello", hosts.client));
                let peer = served.join().unwrap();
                assert_eq!(peer.ip(), hosts.client);
                assert_eq!(peer.port() == 4321, flags == TP_CONNECT_KEEP_PORT);
            });
        }
    }
}

#[test]
fn divert_only_with_wildcard_listener_diverts_nothing() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:80".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(divert_only).unwrap();
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            scope.spawn(|| answer_one(&server));
            lab.ask(at(hosts.server, 80)).unwrap();
        });
    }
    assert!(accept_within(&listener, silence()).is_none(), "a connection was diverted to the wildcard listener");
}

/// Only the first fragment has the ports that select a socket.
#[test]
fn divert_only_fragmented_datagram_arrives_whole() {
    for foreign in FOREIGN {
        let lab = Lab::new();
        let foreign = foreign.parse().unwrap();
        let socket = lab.proxy.run(|| receiver(foreign));
        let config = RulesConfig::new().flags(TP_RULES_DIVERT_ONLY).protocols(TP_PROTO_UDP);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        lab.client.run(|| {
            let any = if foreign.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            std::net::UdpSocket::bind(any).unwrap().send_to(&[b'x'; 4000], foreign).unwrap();
        });
        let (_, _, to) = receive_datagram(&socket, patience()).expect("nothing came");
        assert_eq!(to, foreign);
    }
}
