//! TP_RULES_NEW_ONLY: of TCP, only packets that begin a connection are intercepted.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

/// One byte each way.
fn exchange(a: &mut TcpStream, b: &mut TcpStream) -> std::io::Result<()> {
    a.write_all(b"x")?;
    b.read_exact(&mut [0])?;
    b.write_all(b"x")?;
    a.read_exact(&mut [0])
}

fn established(lab: &Lab, server: &TcpListener, hosts: Hosts) -> (TcpStream, TcpStream) {
    let client = lab.client.run(|| connect(at(hosts.server, 80)));
    let (accepted, _) = accept(server);
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(patience())).unwrap();
    }
    (client, accepted)
}

#[test]
fn install_rules_new_only_lets_existing_connections_continue() {
    for backend in BACKENDS {
        for hosts in [v4(), v6()] {
            let lab = Lab::new();
            let server = lab.serve(80);
            let (mut client, mut accepted) = established(&lab, &server, hosts);
            exchange(&mut client, &mut accepted).unwrap();
            let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
            let config = RulesConfig::of(&listener).flags(TP_RULES_NEW_ONLY).backend(backend);
            let _rules = lab.proxy.run(|| config.install()).unwrap();
            exchange(&mut client, &mut accepted).unwrap();
            let heard = while_answering(&[(&listener, "proxy")], || lab.client.run(|| said(at(hosts.server, 80))));
            assert_eq!(heard.unwrap(), "proxy", "{} backend {backend}", hosts.server);
            exchange(&mut client, &mut accepted).unwrap();
        }
    }
}

/// Without the flag, a segment of a connection that the proxy does not have is answered by a reset.
#[test]
fn install_rules_without_new_only_resets_existing_connections() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let (mut client, mut accepted) = established(&lab, &server, v4());
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| RulesConfig::of(&listener).ports(&[80]).install()).unwrap();
    let error = exchange(&mut client, &mut accepted).unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::WouldBlock), "{error}");
}

/// With NAT too: connection tracking takes up a connection in its middle, and would translate it.
#[test]
fn install_rules_redirect_new_only_lets_existing_connections_continue() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let server = lab.serve(80);
        let (mut client, mut accepted) = established(&lab, &server, v4());
        let listener = lab.proxy.run(|| TcpListener::bind("[::]:3129").unwrap());
        let config = RulesConfig::of(&listener).flags(TP_RULES_REDIRECT | TP_RULES_NEW_ONLY).backend(backend);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        exchange(&mut client, &mut accepted).unwrap();
        let heard = while_answering(&[(&listener, "proxy")], || lab.client.run(|| said(at(v4().server, 80))));
        assert_eq!(heard.unwrap(), "proxy", "backend {backend}");
    }
}

#[test]
fn install_rules_new_only_refuses_what_it_cannot_serve() {
    Net::new().run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let own = RulesConfig::of(&listener).flags(TP_RULES_NEW_ONLY | TP_RULES_LOCAL_OUTPUT).install();
        assert_eq!(own.err().unwrap().errno, libc::EOPNOTSUPP);
        let nothing = RulesConfig::new().flags(TP_RULES_NEW_ONLY | TP_RULES_DIVERT_ONLY).install();
        assert_eq!(nothing.err().unwrap().errno, libc::EINVAL);
    });
}
