//! Connections from the source's own port, and on sockets that the caller has made.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use common::*;
use libc::{
    AF_INET, AF_INET6, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EBADF, ECONNREFUSED, EINPROGRESS, EINVAL, EISCONN,
    ENOTSOCK, ESOCKTNOSUPPORT, IP_BIND_ADDRESS_NO_PORT, IP_TRANSPARENT, SO_MARK, SO_REUSEADDR, SOCK_DGRAM, SOCK_RAW,
    SOCK_STREAM, SOL_IP, SOL_SOCKET, SOL_TCP, TCP_FASTOPEN_CONNECT, TCP_QUICKACK, c_int,
};
use tproxy::ffi::*;

/// An ordinary socket, as a program makes it.
fn plain(domain: c_int, kind: c_int) -> OwnedFd {
    socket2::Socket::new(domain.into(), kind.into(), None).unwrap().into()
}

fn domain_of(addr: SocketAddr) -> c_int {
    if addr.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn set(fd: &OwnedFd, level: c_int, name: c_int, value: c_int) {
    // SAFETY: an int.
    let rc = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), 4) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// The options that tp_connect_socket may change.
fn state(fd: &OwnedFd) -> Vec<c_int> {
    let mut state = vec![
        option(fd, SOL_IP, IP_TRANSPARENT),
        option(fd, SOL_SOCKET, SO_REUSEADDR),
        option(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT),
    ];
    if option(fd, SOL_SOCKET, libc::SO_TYPE) == SOCK_STREAM {
        state.push(option(fd, SOL_TCP, TCP_QUICKACK));
    }
    state
}

/// Server and client exchange words on a connection; gives the address that the server saw.
fn exchange(server: &TcpListener, fd: OwnedFd) -> SocketAddr {
    let mut stream = TcpStream::from(fd);
    stream.write_all(b"question").unwrap();
    let (mut accepted, peer) = accept(server);
    let mut words = [0; 8];
    accepted.read_exact(&mut words).unwrap();
    accepted.write_all(b"answer").unwrap();
    drop(accepted);
    let mut answer = String::new();
    stream.set_read_timeout(Some(patience())).unwrap();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!((&words, answer.as_str()), (b"question", "answer"));
    peer
}

#[test]
fn connect_from_same_port_has_the_port_or_is_eaddrinuse() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for hosts in [v4(), v6()] {
        let src = at(hosts.client, 4321);
        let elsewhere = ip(if hosts.client.is_ipv4() { "203.0.113.3" } else { "2001:db8:2::3" });
        let from_same_port = |dst| lab.proxy.run(|| connect_from(src, at(dst, 80), TP_CONNECT_SAME_PORT));
        let first = from_same_port(hosts.server).unwrap();
        let (_accepted, peer) = accept(&server);
        assert_eq!(peer, src);
        // Another destination shares the port.
        let other = from_same_port(elsewhere).unwrap();
        assert_eq!(accept(&server).1, src);
        // The same pair of addresses again: connect(2) finds it in use.
        let failed = from_same_port(hosts.server).unwrap_err();
        assert_eq!(failed.errno, EADDRINUSE, "{failed}");
        assert!(failed.sentence.contains(&format!("connect() from {src} to")), "{failed}");
        assert!(failed.sentence.contains("TIME_WAIT"), "{failed}");
        // No connection came from another port.
        assert!(accept_within(&server, Duration::from_millis(50)).is_none());
        drop((first, other));
        // A socket that does not share its port: bind(2) finds it in use.
        let held = at(hosts.client, 4322);
        let _holder = lab.proxy.run(|| {
            let fd = plain(domain_of(held), SOCK_STREAM);
            bind_nonlocal(&fd, held).unwrap();
            fd
        });
        let failed = lab.proxy.run(|| connect_from(held, at(hosts.server, 80), TP_CONNECT_SAME_PORT)).unwrap_err();
        assert_eq!(failed.errno, EADDRINUSE, "{failed}");
        assert!(failed.sentence.starts_with(&format!("bind() from {held}")), "{failed}");
    }
}

#[test]
fn connect_from_same_port_of_datagrams_has_the_port_or_is_eaddrinuse() {
    let lab = Lab::new();
    let _rules = lab.proxy.run(|| RulesConfig::new().flags(TP_RULES_DIVERT_ONLY).protocols(TP_PROTO_UDP).install());
    for hosts in [v4(), v6()] {
        let server = lab.server.run(|| UdpSocket::bind(at(hosts.server, 53)).unwrap());
        server.set_read_timeout(Some(patience())).unwrap();
        let src = at(hosts.client, 4321);
        let flags = TP_CONNECT_DGRAM | TP_CONNECT_SAME_PORT;
        let fd = lab.proxy.run(|| connect_from(src, at(hosts.server, 53), flags)).unwrap();
        UdpSocket::from(fd).send(b"question").unwrap();
        assert_eq!(server.recv_from(&mut [0; 100]).unwrap(), (8, src));
        let _holder = lab.proxy.run(|| {
            let fd = plain(domain_of(src), SOCK_DGRAM);
            bind_nonlocal(&fd, src).unwrap();
            fd
        });
        let failed = lab.proxy.run(|| connect_from(src, at(hosts.server, 53), flags)).unwrap_err();
        assert_eq!(failed.errno, EADDRINUSE, "{failed}");
    }
}

#[test]
fn connect_from_same_port_zero_or_with_keep_port_is_einval() {
    Net::new().run(|| {
        let (src, dst) = (at(ip("127.0.0.1"), 0), at(ip("127.0.0.1"), 1));
        assert_eq!(connect_from(src, dst, TP_CONNECT_SAME_PORT).unwrap_err().errno, EINVAL);
        let both = TP_CONNECT_SAME_PORT | TP_CONNECT_KEEP_PORT;
        assert_eq!(connect_from(dst, dst, both).unwrap_err().errno, EINVAL);
        let fd = plain(AF_INET, SOCK_STREAM);
        assert_eq!(connect_socket(&fd, src, dst, TP_CONNECT_SAME_PORT).unwrap_err().errno, EINVAL);
        assert_eq!(connect_socket(&fd, dst, dst, both).unwrap_err().errno, EINVAL);
    });
}

/// The port is below net.ipv4.ip_unprivileged_port_start, and the thread has CAP_NET_ADMIN but not CAP_NET_BIND_SERVICE.
#[test]
fn connect_from_same_port_without_privilege_for_the_port_is_eacces() {
    Net::new().run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (src, dst) = (at(ip("127.0.0.1"), 99), listener.local_addr().unwrap());
        drop_capability(10);
        assert_eq!(connect_from(src, dst, TP_CONNECT_SAME_PORT).unwrap_err().errno, libc::EACCES);
        let fd = connect_from(src, dst, TP_CONNECT_KEEP_PORT).unwrap();
        assert_ne!(local_addr(&fd).port(), 99);
        let fd = plain(AF_INET, SOCK_STREAM);
        let before = state(&fd);
        assert_eq!(connect_socket(&fd, src, dst, TP_CONNECT_SAME_PORT).unwrap_err().errno, libc::EACCES);
        assert_eq!(state(&fd), before);
        connect_socket(&fd, src, dst, TP_CONNECT_KEEP_PORT).unwrap();
        assert_ne!(local_addr(&fd).port(), 99);
    });
}

/// Takes a capability from this thread's effective set.
fn drop_capability(number: u32) {
    // _LINUX_CAPABILITY_VERSION_3.
    let mut header = [0x2008_0522u32, 0];
    let mut sets = [0u32; 6];
    // SAFETY: a header, and room for the sets of two words.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()), 0);
        sets[0] &= !(1 << number);
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()), 0);
    }
}

/// The server sees the client's address; the socket is the caller's, with the options that the caller set.
#[test]
fn connect_socket_of_each_family_connects_from_client() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    let mapped = |addr: &str| addr.parse::<SocketAddr>().unwrap();
    let v4_ends = (at(v4().client, 0), at(v4().server, 80));
    let v6_ends = (at(v6().client, 0), at(v6().server, 80));
    let mapped_ends = (mapped("[::ffff:198.51.100.2]:0"), mapped("[::ffff:203.0.113.2]:80"));
    for (domain, (src, dst)) in
        [(AF_INET, v4_ends), (AF_INET, mapped_ends), (AF_INET6, v6_ends), (AF_INET6, v4_ends), (AF_INET6, mapped_ends)]
    {
        let fd = lab.proxy.run(|| {
            let fd = plain(domain, SOCK_STREAM);
            set(&fd, SOL_SOCKET, SO_MARK, 7);
            connect_socket(&fd, src, dst, 0).unwrap();
            fd
        });
        assert_eq!((option(&fd, SOL_SOCKET, SO_MARK), option(&fd, SOL_IP, IP_TRANSPARENT)), (7, 1));
        let local = canonical(local_addr(&fd));
        assert_eq!(local.ip(), canonical(src).ip());
        assert_eq!(exchange(&server, fd), local);
    }
}

#[test]
fn connect_socket_of_datagrams_exchanges_with_server() {
    let lab = Lab::new();
    let config = RulesConfig::new().flags(TP_RULES_DIVERT_ONLY).protocols(TP_PROTO_UDP);
    let _rules = lab.proxy.run(|| config.install()).unwrap();
    for (domain, hosts) in [(AF_INET, v4()), (AF_INET6, v6()), (AF_INET6, v4())] {
        let server = lab.server.run(|| UdpSocket::bind(at(hosts.server, 53)).unwrap());
        server.set_read_timeout(Some(patience())).unwrap();
        for (flags, port) in [(0, None), (TP_CONNECT_SAME_PORT, Some(4321)), (TP_CONNECT_KEEP_PORT, Some(4321))] {
            let fd = lab.proxy.run(|| {
                let fd = plain(domain, SOCK_DGRAM);
                connect_socket(&fd, at(hosts.client, 4321), at(hosts.server, 53), flags).unwrap();
                fd
            });
            let socket = UdpSocket::from(fd);
            socket.set_read_timeout(Some(patience())).unwrap();
            socket.send(b"question").unwrap();
            let mut bytes = [0; 100];
            let (len, peer) = server.recv_from(&mut bytes).unwrap();
            assert_eq!((&bytes[..len], peer.ip()), (&b"question"[..], hosts.client));
            assert_eq!(peer, canonical(socket.local_addr().unwrap()));
            assert!(port.is_none_or(|port| port == peer.port()));
            server.send_to(b"answer", peer).unwrap();
            assert_eq!(socket.recv(&mut bytes).unwrap(), 6);
        }
    }
}

/// A socket that is bound to the client's side of the proxy does not reach the server (SO_BINDTODEVICE).
#[test]
fn connect_socket_bound_to_device_uses_that_device() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    let (src, dst) = (at(v4().client, 4321), at(v4().server, 80));
    let on_device = |device: &'static str| {
        lab.proxy.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind_device(Some(device.as_bytes())).unwrap();
            socket.set_nonblocking(true).unwrap();
            let fd = OwnedFd::from(socket);
            connect_socket(&fd, src, dst, TP_CONNECT_SAME_PORT).unwrap();
            fd
        })
    };
    let _elsewhere = on_device("eth0");
    assert!(accept_within(&server, Duration::from_millis(100)).is_none());
    let _connected = on_device("eth1");
    assert_eq!(accept(&server).1, src);
}

/// With TCP Fast Open the first connection gets a cookie; the second sends its data with the first packet.
#[test]
fn connect_socket_with_fast_open_sends_data_with_first_packet() {
    let lab = Lab::new();
    lab.server.sysctl("ipv4/tcp_fastopen", "3");
    lab.proxy.sysctl("ipv4/tcp_fastopen", "1");
    let server = lab.serve(80);
    set(&OwnedFd::from(server.try_clone().unwrap()), SOL_TCP, libc::TCP_FASTOPEN, 10);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for hosts in [v4(), v6()] {
        for _ in 0..2 {
            let fd = lab.proxy.run(|| {
                let fd = plain(domain_of(at(hosts.client, 0)), SOCK_STREAM);
                set(&fd, SOL_TCP, TCP_FASTOPEN_CONNECT, 1);
                connect_socket(&fd, at(hosts.client, 0), at(hosts.server, 80), 0).unwrap();
                fd
            });
            assert_eq!(exchange(&server, fd).ip(), hosts.client);
        }
    }
    let carried = lab.server.run(|| extended_counter("TCPFastOpenPassive"));
    assert_eq!(carried, 2, "no packet with SYN carried data");
}

/// A counter of /proc/net/netstat.
fn extended_counter(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    names.iter().zip(&values).find(|(found, _)| **found == name).unwrap().1.parse().unwrap()
}

#[test]
fn connect_socket_of_multipath_tcp_connects_from_client() {
    const IPPROTO_MPTCP: c_int = 262;
    if !provided(Requirement::Sysctl("mptcp/enabled")) {
        return;
    }
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for (domain, hosts) in [(AF_INET, v4()), (AF_INET6, v6()), (AF_INET6, v4())] {
        for (port, flags) in [(0, 0), (4321, TP_CONNECT_SAME_PORT)] {
            let fd = lab.proxy.run(|| {
                let socket = socket2::Socket::new(domain.into(), socket2::Type::STREAM, Some(IPPROTO_MPTCP.into()));
                let fd = OwnedFd::from(socket.unwrap());
                connect_socket(&fd, at(hosts.client, port), at(hosts.server, 80), flags).unwrap();
                fd
            });
            let peer = exchange(&server, fd);
            assert_eq!(peer.ip(), hosts.client);
            assert!(port == 0 || port == peer.port());
        }
    }
}

/// The call refuses these sockets before it changes anything.
#[test]
fn connect_socket_that_cannot_connect_is_left_as_it_was() {
    Net::new().run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (src, dst) = (at(ip("192.0.2.1"), 0), listener.local_addr().unwrap());
        let (src6, dst6) = (at(ip("2001:db8::1"), 0), at(ip("::1"), 1));
        let bound = plain(AF_INET, SOCK_STREAM);
        socket2::SockRef::from(&bound).bind(&at(ip("127.0.0.1"), 0).into()).unwrap();
        let bound_to_any = plain(AF_INET6, SOCK_DGRAM);
        socket2::SockRef::from(&bound_to_any).bind(&at(ip("::"), 0).into()).unwrap();
        let v6_only = plain(AF_INET6, SOCK_STREAM);
        socket2::SockRef::from(&v6_only).set_only_v6(true).unwrap();
        let connected = OwnedFd::from(TcpStream::connect(dst).unwrap());
        let datagrams = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        socket2::SockRef::from(&datagrams).connect(&dst.into()).unwrap();
        for (fd, src, dst, errno) in [
            (bound, src, dst, EINVAL),
            (bound_to_any, src, dst, EINVAL),
            (connected, src, dst, EISCONN),
            (datagrams, src, dst, EISCONN),
            (OwnedFd::from(listener.try_clone().unwrap()), src, dst, EINVAL),
            (v6_only, src, dst, EAFNOSUPPORT),
            (plain(AF_INET, SOCK_STREAM), src6, dst6, EAFNOSUPPORT),
            (plain(AF_INET, SOCK_STREAM), src, dst6, EAFNOSUPPORT),
            (plain(AF_INET, SOCK_STREAM), at(ip("224.0.0.1"), 0), dst, EINVAL),
            (plain(AF_INET, SOCK_STREAM), src, at(ip("0.0.0.0"), 80), EINVAL),
        ] {
            let before = (state(&fd), local_addr(&fd));
            let failed = connect_socket(&fd, src, dst, 0).unwrap_err();
            assert_eq!(failed.errno, errno, "{failed}");
            assert_eq!((state(&fd), local_addr(&fd)), before, "{failed}");
        }
        let raw =
            OwnedFd::from(socket2::Socket::new(AF_INET.into(), SOCK_RAW.into(), Some(socket2::Protocol::TCP)).unwrap());
        assert_eq!(connect_socket(&raw, src, dst, 0).unwrap_err().errno, ESOCKTNOSUPPORT);
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(connect_socket(&unix, src, dst, 0).unwrap_err().errno, EAFNOSUPPORT);
        assert_eq!(connect_socket(&std::fs::File::open("/").unwrap(), src, dst, 0).unwrap_err().errno, ENOTSOCK);
        assert_eq!(connect_socket(&-1, src, dst, 0).unwrap_err().errno, EBADF);
        let fd = plain(AF_INET, SOCK_STREAM);
        for flags in [TP_NONBLOCK, TP_CONNECT_DGRAM, 1 << 31] {
            assert_eq!(connect_socket(&fd, src, dst, flags).unwrap_err().errno, EINVAL);
        }
        let udp = plain(AF_INET, SOCK_DGRAM);
        assert_eq!(connect_socket(&udp, src, dst, TP_CONNECT_DATA_FOLLOWS).unwrap_err().errno, EINVAL);
        assert_eq!(state(&udp)[0], 0);
    });
}

/// bind(2) fails: the socket is as it was, and can be given again with another port.
#[test]
fn connect_socket_whose_port_is_in_use_is_left_as_it_was() {
    Net::new().run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (src, dst) = (at(ip("192.0.2.1"), 4321), listener.local_addr().unwrap());
        for kind in [SOCK_STREAM, SOCK_DGRAM] {
            let holder = plain(AF_INET, kind);
            bind_nonlocal(&holder, src).unwrap();
            let fd = plain(AF_INET, kind);
            let before = state(&fd);
            let more = if kind == SOCK_STREAM { TP_CONNECT_DATA_FOLLOWS } else { 0 };
            let failed = connect_socket(&fd, src, dst, TP_CONNECT_SAME_PORT | more).unwrap_err();
            assert_eq!(failed.errno, EADDRINUSE);
            assert_eq!((state(&fd), local_addr(&fd)), (before, at(ip("0.0.0.0"), 0)));
            // Options that were set before stay set.
            let prepared = plain(AF_INET, kind);
            checked(tp_set_transparent(prepared.as_raw_fd())).unwrap();
            set(&prepared, SOL_SOCKET, SO_REUSEADDR, 1);
            let before = state(&prepared);
            assert_eq!(connect_socket(&prepared, src, dst, TP_CONNECT_SAME_PORT).unwrap_err().errno, EADDRINUSE);
            assert_eq!(state(&prepared), before);
            // Another port may be taken: the same socket connects.
            let src = at(ip("127.0.0.1"), 4321);
            bind_nonlocal(&plain(AF_INET, kind), src).unwrap();
            let holder = plain(AF_INET, kind);
            bind_nonlocal(&holder, src).unwrap();
            connect_socket(&fd, src, dst, TP_CONNECT_KEEP_PORT).unwrap();
            assert_ne!(local_addr(&fd).port(), 4321);
            assert_eq!(option(&fd, SOL_SOCKET, SO_REUSEADDR), 0, "the option is of no use without the port");
        }
    });
}

/// Without the capability the socket is as it was, and connects as any other.
#[test]
fn connect_socket_without_privilege_is_eperm() {
    Net::new().run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // CAP_NET_ADMIN and CAP_NET_RAW.
        drop_capability(12);
        drop_capability(13);
        let fd = plain(AF_INET, SOCK_STREAM);
        let before = state(&fd);
        let dst = listener.local_addr().unwrap();
        let failed = connect_socket(&fd, at(ip("192.0.2.1"), 0), dst, 0).unwrap_err();
        assert_eq!(failed.errno, libc::EPERM);
        assert!(failed.sentence.contains("CAP_NET_RAW"), "{failed}");
        assert_eq!((state(&fd), local_addr(&fd)), (before, at(ip("0.0.0.0"), 0)));
        socket2::SockRef::from(&fd).connect(&dst.into()).unwrap();
    });
}

/// connect(2) fails: the socket stays bound to its source, from which connect(2) reaches another server.
#[test]
fn connect_socket_refused_can_connect_elsewhere_from_its_source() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for hosts in [v4(), v6()] {
        let (src, dst) = (at(hosts.client, 0), at(hosts.server, 80));
        let fd = lab.proxy.run(|| {
            let fd = plain(domain_of(src), SOCK_STREAM);
            let failed = connect_socket(&fd, src, at(hosts.server, 1), 0).unwrap_err();
            assert_eq!(failed.errno, ECONNREFUSED, "{failed}");
            assert!(failed.sentence.contains(&format!("connect() from {src} to")), "{failed}");
            assert_eq!(connect_socket(&fd, src, dst, 0).unwrap_err().errno, EINVAL);
            socket2::SockRef::from(&fd).connect(&dst.into()).unwrap();
            fd
        });
        assert_eq!(exchange(&server, fd).ip(), hosts.client);
    }
}

#[test]
fn connect_socket_whose_addresses_have_a_connection_is_eaddrinuse() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for flags in [TP_CONNECT_SAME_PORT, TP_CONNECT_KEEP_PORT] {
        let (src, dst) = (at(v4().client, 4000 + flags as u16), at(v4().server, 80));
        let connect = || {
            lab.proxy.run(|| {
                let fd = plain(AF_INET, SOCK_STREAM);
                connect_socket(&fd, src, dst, flags).map(|()| fd)
            })
        };
        let _first = connect().unwrap();
        assert_eq!(accept(&server).1, src);
        let failed = connect().unwrap_err();
        assert_eq!(failed.errno, EADDRINUSE, "{failed}");
        assert!(failed.sentence.contains("another port needs another socket"), "{failed}");
    }
}

/// The socket decides whether the call waits: not at all, or as long as SO_SNDTIMEO.
#[test]
fn connect_socket_waits_as_its_socket_does() {
    let lab = Lab::new();
    // The server's host has no route back to this source.
    lab.server.ip("route del default via 203.0.113.1");
    let (src, dst) = (at(v4().client, 0), at(v4().server, 80));
    lab.proxy.run(|| {
        let nonblocking = plain(AF_INET, SOCK_STREAM);
        socket2::SockRef::from(&nonblocking).set_nonblocking(true).unwrap();
        connect_socket(&nonblocking, src, dst, 0).unwrap();
        let limited = plain(AF_INET, SOCK_STREAM);
        socket2::SockRef::from(&limited).set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let failed = connect_socket(&limited, src, dst, 0).unwrap_err();
        assert_eq!(failed.errno, EINPROGRESS);
        assert!(failed.sentence.contains("SO_SNDTIMEO"), "{failed}");
    });
}

#[test]
fn connect_socket_without_free_port_is_eaddrnotavail() {
    let lab = Lab::new();
    lab.proxy.sysctl("ipv4/ip_local_port_range", "40000 40019");
    let failed = lab.proxy.run(|| {
        let mut all = Vec::new();
        loop {
            let fd = plain(AF_INET, SOCK_STREAM);
            socket2::SockRef::from(&fd).set_nonblocking(true).unwrap();
            match connect_socket(&fd, at(v4().client, 0), at(v4().server, 80), 0) {
                Ok(()) => all.push(fd),
                Err(failed) => return failed,
            }
            assert!(all.len() <= 20);
        }
    });
    assert_eq!(failed.errno, EADDRNOTAVAIL);
}
