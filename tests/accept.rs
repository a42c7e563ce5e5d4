//! `tp_accept`: an intercepted connection and both its addresses; and listeners that serve IPv6 only.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use common::*;
use libc::{
    AF_INET6, EADDRINUSE, EAGAIN, EBADF, EINVAL, ENOENT, F_GETFD, F_GETFL, FD_CLOEXEC, IPV6_V6ONLY, O_NONBLOCK,
    SOL_IPV6, fcntl,
};
use tproxy::ffi::*;

/// The client sends a request to the server's address; the proxy accepts it with both flags and answers.
#[test]
fn accept_intercepted_connection_gives_client_and_destination() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    for hosts in [v4(), v6()] {
        for flags in [0, TP_ACCEPT_TPROXY] {
            let heard = std::thread::scope(|scope| {
                let asked = scope.spawn(|| lab.ask(at(hosts.server, 80)).unwrap());
                let (mut stream, client, to) = accept_intercepted(&listener, flags).unwrap();
                // Both have the family of the listener.
                assert!(client.is_ipv6() && to.is_ipv6());
                assert_eq!(unmap_addr(to), at(hosts.server, 80));
                let mut words = String::new();
                stream.read_to_string(&mut words).unwrap();
                write!(stream, "{words} you are {}", unmap_addr(client)).unwrap();
                drop(stream);
                asked.join().unwrap()
            });
            assert_eq!(heard.answer, format!("who am I? you are {}", heard.from));
            assert_eq!(heard.from.ip(), hosts.client);
        }
    }
}

/// The same through the crate, with an IPv4 listener, whose addresses are IPv4.
#[test]
fn accept_of_the_crate_gives_socket_and_addresses() {
    use tproxy::{AcceptOptions, accept};
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("0.0.0.0:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    let to = at(v4().server, 80);
    for transparent in [false, true] {
        let client = lab.client.run(|| connect(to));
        let accepted = accept(&listener, AcceptOptions::new().nonblocking(true).transparent(transparent)).unwrap();
        assert_eq!((accepted.client, accepted.orig_dst), (client.local_addr().unwrap(), to));
        assert!(accepted.socket.nonblocking().unwrap());
        assert_eq!(accepted.socket.local_addr().unwrap().as_socket(), Some(to));
    }
}

#[test]
fn accept_redirected_connection_gives_destination() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| TcpListener::bind("[::]:3129")).unwrap();
    let _rules = lab.proxy.run(|| RulesConfig::of(&listener).flags(TP_RULES_REDIRECT).ports(&[80]).install()).unwrap();
    for hosts in [v4(), v6()] {
        let client = lab.client.run(|| connect(at(hosts.server, 80)));
        let (_stream, from, to) = accept_intercepted(&listener, 0).unwrap();
        assert_eq!(unmap_addr(from), client.local_addr().unwrap());
        assert_eq!(unmap_addr(to), at(hosts.server, 80));
    }
}

/// The client of an ordinary listener that was not intercepted sees its connection end.
#[test]
fn accept_connection_that_was_not_intercepted_closes_it() {
    let net = Net::new();
    net.run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = connect(listener.local_addr().unwrap());
        client.set_read_timeout(Some(patience())).unwrap();
        let failed = accept_intercepted(&listener, 0).unwrap_err();
        assert_eq!(failed.errno, ENOENT, "{failed}");
        assert!(failed.sentence.contains("not intercepted"), "{failed}");
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "the client's connection did not end");
        // With the flag the answer is the listener's own address, as the header says.
        let client = connect(listener.local_addr().unwrap());
        let (_stream, from, to) = accept_intercepted(&listener, TP_ACCEPT_TPROXY).unwrap();
        assert_eq!((from, to), (client.local_addr().unwrap(), listener.local_addr().unwrap()));
    });
}

#[test]
fn accept_socket_is_close_on_exec_and_nonblocking_if_asked() {
    let net = Net::new();
    net.run(|| {
        let listener = listen("[::1]:0".parse().unwrap(), TP_NONBLOCK).unwrap();
        assert_eq!(accept_intercepted(&listener, TP_ACCEPT_TPROXY).unwrap_err().errno, EAGAIN);
        for (flags, expected) in
            [(TP_ACCEPT_TPROXY, 0), (TP_ACCEPT_TPROXY | TP_NONBLOCK, O_NONBLOCK), (TP_NONBLOCK, O_NONBLOCK)]
        {
            let _client = connect(listener.local_addr().unwrap());
            let (stream, ..) = wait_for("no connection waits", || accept_intercepted(&listener, flags).ok());
            // SAFETY: plain system calls on a descriptor that is open.
            let (fd_flags, mode) = unsafe { (fcntl(stream.as_raw_fd(), F_GETFD), fcntl(stream.as_raw_fd(), F_GETFL)) };
            assert_eq!((fd_flags, mode & O_NONBLOCK), (FD_CLOEXEC, expected));
        }
    });
}

#[test]
fn accept_of_other_descriptors_says_why_not() {
    Net::new().run(|| {
        let failed = accept_intercepted(&socket(AF_INET6, libc::SOCK_STREAM).unwrap(), 0).unwrap_err();
        assert_eq!(failed.errno, EINVAL);
        assert!(failed.sentence.contains("does not listen"), "{failed}");
        assert_eq!(accept_intercepted(&-1, 0).unwrap_err().errno, EBADF);
    });
}

/// Each listener gets the connections of its family, on one port, with rules for each.
#[test]
fn listen_v6only_serves_ipv6_beside_ipv4_listener() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let [v6_only, v4_only] = lab.proxy.run(|| {
        [("[::]:3129", TP_LISTEN_V6ONLY), ("0.0.0.0:3129", 0)]
            .map(|(addr, flags)| listen(addr.parse().unwrap(), flags).unwrap())
    });
    assert_eq!(option(&OwnedFd::from(v6_only.try_clone().unwrap()), SOL_IPV6, IPV6_V6ONLY), 1);
    // The IPv4 listener's port would be in use for one that serves both.
    assert_eq!(lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap_err().errno, EADDRINUSE);

    // The rules of the IPv6 listener alone leave IPv4 to the server.
    let rules = lab.proxy.run(|| intercept(&v6_only, 80)).unwrap();
    let reaches_server = |to: SocketAddr| {
        let client: TcpStream = lab.client.run(|| connect(to));
        let (_stream, peer) = accept(&server);
        assert_eq!(peer, client.local_addr().unwrap());
    };
    reaches_server(at(v4().server, 80));
    let is_intercepted = |listener: &TcpListener, hosts: Hosts| {
        let client = lab.client.run(|| connect(at(hosts.server, 80)));
        let (_stream, from, to) = accept_intercepted(listener, TP_ACCEPT_TPROXY).unwrap();
        assert_eq!((from, to), (client.local_addr().unwrap(), at(hosts.server, 80)));
    };
    is_intercepted(&v6_only, v6());
    drop(rules);
    let _rules = lab.proxy.run(|| RulesConfig::new().listeners(&[&v6_only, &v4_only]).ports(&[80]).install()).unwrap();
    is_intercepted(&v6_only, v6());
    is_intercepted(&v4_only, v4());
}

#[test]
fn listen_v6only_on_ipv4_address_is_einval() {
    Net::new().run(|| {
        for addr in ["127.0.0.1:0", "[::ffff:127.0.0.1]:0"] {
            let failed = listen(addr.parse().unwrap(), TP_LISTEN_V6ONLY).unwrap_err();
            assert_eq!(failed.errno, EINVAL);
            assert!(failed.sentence.contains("IPv6 only"), "{failed}");
        }
        let fd = OwnedFd::from(listen("[::1]:0".parse().unwrap(), TP_LISTEN_V6ONLY | TP_NONBLOCK).unwrap());
        assert_eq!(option(&fd, SOL_IPV6, IPV6_V6ONLY), 1);
    });
}

#[test]
fn unmap_addr_converts_only_v4_mapped_addresses() {
    for (addr, expected) in [
        ("[::ffff:192.0.2.1]:80", "192.0.2.1:80"),
        ("[::ffff:0.0.0.0]:0", "0.0.0.0:0"),
        ("192.0.2.1:80", "192.0.2.1:80"),
        ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("[fe80::1%3]:80", "[fe80::1%3]:80"),
        ("[::]:80", "[::]:80"),
        ("[::192.0.2.1]:80", "[::192.0.2.1]:80"),
        ("[64:ff9b::192.0.2.1]:80", "[64:ff9b::192.0.2.1]:80"),
    ] {
        let (addr, expected): (SocketAddr, SocketAddr) = (addr.parse().unwrap(), expected.parse().unwrap());
        assert_eq!(unmap_addr(addr), expected);
        assert_eq!(tproxy::unmap_addr(addr), expected);
    }
}
