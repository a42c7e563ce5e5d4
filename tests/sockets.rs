//! Sockets that the calls make: their options, addresses and ports.

mod common;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use common::*;
use libc::{
    AF_INET, AF_INET6, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, ECONNREFUSED, EPROTONOSUPPORT, F_GETFD, F_GETFL,
    FD_CLOEXEC, IP_RECVORIGDSTADDR, IP_TRANSPARENT, IPV6_RECVORIGDSTADDR, IPV6_TRANSPARENT, IPV6_V6ONLY, O_NONBLOCK,
    POLLOUT, SO_DOMAIN, SO_ERROR, SO_TYPE, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_RAW, SOCK_STREAM, SOL_IP, SOL_IPV6,
    SOL_SOCKET, c_int, fcntl, pollfd,
};
use tproxy::ffi::*;

#[test]
fn socket_is_transparent_dual_stack_and_close_on_exec() {
    Net::new().run(|| {
        for (domain, kind) in
            [(AF_INET, SOCK_STREAM), (AF_INET, SOCK_DGRAM), (AF_INET6, SOCK_STREAM), (AF_INET6, SOCK_DGRAM)]
        {
            let fd = socket(domain, kind).unwrap();
            assert_eq!(option(&fd, SOL_SOCKET, SO_DOMAIN), domain);
            assert_eq!(option(&fd, SOL_SOCKET, SO_TYPE), kind);
            assert_eq!(option(&fd, SOL_IP, IP_TRANSPARENT), 1);
            let datagrams = c_int::from(kind == SOCK_DGRAM);
            assert_eq!(option(&fd, SOL_IP, IP_RECVORIGDSTADDR), datagrams);
            if domain == AF_INET6 {
                assert_eq!(option(&fd, SOL_IPV6, IPV6_TRANSPARENT), 1);
                assert_eq!(option(&fd, SOL_IPV6, IPV6_V6ONLY), 0);
                assert_eq!(option(&fd, SOL_IPV6, IPV6_RECVORIGDSTADDR), datagrams);
            }
            // SAFETY: plain system call on a descriptor that is open.
            assert_eq!(unsafe { fcntl(fd.as_raw_fd(), F_GETFD) }, FD_CLOEXEC);
        }
        let fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK).unwrap();
        // SAFETY: as above.
        assert_ne!(unsafe { fcntl(fd.as_raw_fd(), F_GETFL) } & O_NONBLOCK, 0);
        assert_eq!(socket(AF_INET, SOCK_RAW).unwrap_err().errno, EPROTONOSUPPORT, "not the errno of socket(2)");
    });
}

/// The sysctl makes "IPv6 only" the default of the host.
#[test]
fn socket_with_bindv6only_is_dual_stack() {
    let net = Net::new();
    net.sysctl("ipv6/bindv6only", "1");
    let fd = net.run(|| socket(AF_INET6, SOCK_STREAM)).unwrap();
    assert_eq!(option(&fd, SOL_IPV6, IPV6_V6ONLY), 0);
}

#[test]
fn set_transparent_of_existing_socket_sets_options() {
    Net::new().run(|| {
        let tcp = OwnedFd::from(TcpListener::bind("[::]:0").unwrap());
        let udp = OwnedFd::from(UdpSocket::bind("[::]:0").unwrap());
        for fd in [&tcp, &udp] {
            checked(tp_set_transparent(fd.as_raw_fd())).unwrap();
            assert_eq!(option(fd, SOL_IP, IP_TRANSPARENT), 1);
        }
        assert_eq!(option(&udp, SOL_IP, IP_RECVORIGDSTADDR), 1);
        assert_eq!(option(&udp, SOL_IPV6, IPV6_RECVORIGDSTADDR), 1);
        assert_eq!(option(&tcp, SOL_IP, IP_RECVORIGDSTADDR), 0);
    });
}

#[test]
fn bind_nonlocal_of_any_socket_binds_foreign_address() {
    Net::new().run(|| {
        for (domain, addr) in [
            (AF_INET, "222.173.190.239:51966"),
            (AF_INET6, "[2001:db8:dead::beef]:51966"),
            (AF_INET6, "[::ffff:222.173.190.239]:51967"),
        ] {
            for kind in [SOCK_STREAM, SOCK_DGRAM] {
                let fd = OwnedFd::from(socket2::Socket::new(domain.into(), kind.into(), None).unwrap());
                let addr: SocketAddr = addr.parse().unwrap();
                bind_nonlocal(&fd, addr).unwrap();
                assert_eq!(local_addr(&fd), addr);
            }
        }
    });
}

#[test]
fn bind_nonlocal_to_port_zero_chooses_datagram_port_now_and_stream_port_later() {
    Net::new().run(|| {
        let any: SocketAddr = "192.0.2.1:0".parse().unwrap();
        let dgram = socket(AF_INET, SOCK_DGRAM).unwrap();
        bind_nonlocal(&dgram, any).unwrap();
        assert_ne!(local_addr(&dgram).port(), 0, "the datagram socket has no port");
        let stream = socket(AF_INET, SOCK_STREAM).unwrap();
        bind_nonlocal(&stream, any).unwrap();
        assert_eq!(local_addr(&stream).port(), 0);
        // SAFETY: plain system call.
        assert_eq!(unsafe { libc::listen(stream.as_raw_fd(), 1) }, 0);
        assert_ne!(local_addr(&stream).port(), 0, "listen(2) chose no port");
    });
}

#[test]
fn bind_nonlocal_and_connect_from_with_other_family_are_eafnosupport() {
    Net::new().run(|| {
        for (domain, addr) in [(AF_INET, "[2001:db8::1]:1"), (AF_INET6, "192.0.2.1:1")] {
            let failed = bind_nonlocal(&socket(domain, SOCK_STREAM).unwrap(), addr.parse().unwrap()).unwrap_err();
            assert_eq!(failed.errno, EAFNOSUPPORT, "{failed}");
        }
        let failed = connect_from("192.0.2.1:1".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap(), 0).unwrap_err();
        assert_eq!(failed.errno, EAFNOSUPPORT, "{failed}");
    });
}

#[test]
fn listen_with_reuseport_shares_port() {
    Net::new().run(|| {
        let first = listen("[::]:0".parse().unwrap(), TP_LISTEN_REUSEPORT | TP_NONBLOCK).unwrap();
        assert_eq!(first.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        let addr = first.local_addr().unwrap();
        let _second = listen(addr, TP_LISTEN_REUSEPORT).unwrap();
        let failed = listen(addr, 0).unwrap_err();
        assert_eq!(failed.errno, EADDRINUSE);
        assert!(failed.sentence.contains("bind() from [::]:"), "{failed}");
    });
}

#[test]
fn connect_from_refused_names_both_addresses() {
    let lab = Lab::new();
    let _rules = lab.proxy.run(divert_only).unwrap();
    let (src, dst) = (at(v4().client, 0), at(v4().server, 1));
    let failed = lab.proxy.run(|| connect_from(src, dst, 0)).unwrap_err();
    assert_eq!(failed.errno, ECONNREFUSED);
    let sentence = "connect() from 198.51.100.2:0 to 203.0.113.2:1: Connection refused";
    assert!(failed.sentence.starts_with(sentence), "{failed}");
    let fd = lab.proxy.run(|| connect_from(src, dst, TP_NONBLOCK)).unwrap();
    let mut poll = pollfd { fd: fd.as_raw_fd(), events: POLLOUT, revents: 0 };
    // SAFETY: one pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, patience().as_millis() as c_int) }, 1);
    assert_eq!(option(&fd, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
}

/// A dual-stack listener reports IPv4-mapped addresses.
#[test]
fn connect_from_with_ipv4_mapped_addresses_uses_ipv4() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for src in ["[::ffff:198.51.100.2]:0", "198.51.100.2:0"] {
        let dst = "[::ffff:203.0.113.2]:80".parse().unwrap();
        let fd = lab.proxy.run(|| connect_from(src.parse().unwrap(), dst, 0)).unwrap();
        assert_eq!(option(&fd, SOL_SOCKET, SO_DOMAIN), AF_INET);
        assert_eq!(accept(&server).1.ip(), v4().client);
    }
}

#[test]
fn connect_from_keep_port_serves_several_destinations_and_falls_back() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    let src = at(v4().client, 4321);
    let kept = |dst: &str| {
        let fd = lab.proxy.run(|| connect_from(src, at(ip(dst), 80), TP_CONNECT_KEEP_PORT)).unwrap();
        let (stream, peer) = accept(&server);
        (fd, stream, peer.port())
    };
    let first = kept("203.0.113.2");
    let elsewhere = kept("203.0.113.3");
    assert_eq!((first.2, elsewhere.2), (4321, 4321), "the port was not kept");
    // The same pair of addresses again: connect(2) finds it in use.
    let again = kept("203.0.113.2");
    assert_ne!(again.2, 4321);
    // Another socket does not share its port: bind(2) finds it in use.
    drop((first, elsewhere, again));
    let _holder = lab.proxy.run(|| {
        let fd = socket(AF_INET, SOCK_STREAM).unwrap();
        bind_nonlocal(&fd, at(v4().client, 4322)).unwrap();
        fd
    });
    let fd = lab.proxy.run(|| connect_from(at(v4().client, 4322), at(v4().server, 80), TP_CONNECT_KEEP_PORT)).unwrap();
    assert_ne!(local_addr(&fd).port(), 4322);
    assert_eq!(accept(&server).1, local_addr(&fd));
}

/// Both ends send one segment less when the ACK of the handshake carries the data.
#[test]
fn connect_from_data_follows_saves_a_segment() {
    let segments = |flags, any: &str| {
        let server = TcpListener::bind(any).unwrap();
        let before = counter("Tcp", "OutSegs");
        let to = server.local_addr().unwrap();
        let mut client = TcpStream::from(connect_from(at(to.ip(), 0), to, flags).unwrap());
        client.write_all(b"question").unwrap();
        let mut asked = [0; 8];
        let mut accepted = server.accept().unwrap().0;
        accepted.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"question");
        counter("Tcp", "OutSegs") - before
    };
    // The least of several attempts: if the machine is busy, the timer of the delayed ACK may expire before the data come.
    let fewest = |flags| {
        ["127.0.0.1:0", "[::1]:0"].map(|any| (0..5).map(|_| Net::new().run(|| segments(flags, any))).min().unwrap())
    };
    assert_eq!(fewest(TP_CONNECT_DATA_FOLLOWS), fewest(0).map(|sent| sent - 1));
}

/// One foreign address has more connections than there are ephemeral ports, since each port serves every destination. The test
/// makes as many as the limit of descriptors allows, in a range of ports that is a third of that.
#[test]
fn connect_from_one_address_makes_more_connections_than_ports() {
    let destinations = ["203.0.113.2", "203.0.113.3", "203.0.113.4"].map(|d| at(ip(d), 80));
    let ports = ((descriptor_limit() - 500) / destinations.len()).min(12_000);
    let each = ports * 95 / 100;
    let lab = Lab::new();
    lab.proxy.sysctl("ipv4/ip_local_port_range", &format!("40000 {}", 40_000 + ports - 1));
    let _rules = lab.proxy.run(divert_only).unwrap();
    // No program accepts: the connections wait in the queues of several listeners, each of the default length.
    let _listeners = destinations.map(|addr| {
        lab.server.run(|| {
            [(); 8].map(|()| {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.set_reuse_port(true).unwrap();
                socket.bind(&addr.into()).unwrap();
                socket.listen(4096).unwrap();
                socket
            })
        })
    });
    let src = at(v4().client, 0);
    let connections: Vec<OwnedFd> = lab.proxy.run(|| {
        let each_of = destinations.iter().flat_map(|dst| std::iter::repeat_n(dst, each));
        each_of.map(|dst| connect_from(src, *dst, 0).unwrap()).collect()
    });
    assert!(connections.len() > 2 * ports, "{} connections of {ports} ports", connections.len());
    let pairs: HashSet<_> = connections
        .into_iter()
        .map(|fd| {
            let stream = TcpStream::from(fd);
            let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
            assert_eq!(local.ip(), src.ip());
            assert!(usize::from(local.port()) >= 40_000 && usize::from(local.port()) < 40_000 + ports);
            (local, peer)
        })
        .collect();
    assert_eq!(pairs.len(), destinations.len() * each);
}

#[test]
fn connect_from_without_free_port_is_eaddrnotavail() {
    let lab = Lab::new();
    lab.proxy.sysctl("ipv4/ip_local_port_range", "40000 40019");
    let failed = lab.proxy.run(|| {
        let mut all = Vec::new();
        loop {
            match connect_from(at(v4().client, 0), at(v4().server, 80), TP_NONBLOCK) {
                Ok(fd) => all.push(fd),
                Err(failed) => return failed,
            }
            assert!(all.len() <= 20);
        }
    });
    assert_eq!(failed.errno, EADDRNOTAVAIL);
    assert!(failed.sentence.contains("ip_local_port_range"), "{failed}");
}

/// Raises the limit of descriptors as far as possible, and gives it.
fn descriptor_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid struct for both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    usize::try_from(limit.rlim_cur).unwrap()
}
