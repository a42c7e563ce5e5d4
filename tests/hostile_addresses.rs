//! Packets with addresses that no honest host sends: with neither backend do they reach a listener, a service on loopback or a
//! transparent socket.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::*;
use tproxy::ffi::*;

/// The Ethernet addresses that [`Net::link`] gives to its first and its second end.
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x0a];
const PROXY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x0b];
const PORT: u16 = 80;

/// A socket that sends whole frames through an interface of this namespace.
struct Injector {
    socket: OwnedFd,
    index: u32,
}

impl Injector {
    fn new(interface: &str) -> Injector {
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: a NUL-terminated name, and a plain system call that gives a new descriptor.
        let (index, fd) =
            unsafe { (libc::if_nametoindex(name.as_ptr()), libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor is new, and has no other owner.
        Injector { socket: unsafe { OwnedFd::from_raw_fd(fd) }, index }
    }

    fn send(&self, packet: &[u8]) {
        let ether_type: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
        let frame = [&PROXY_MAC[..], &CLIENT_MAC, &ether_type.to_be_bytes(), packet].concat();
        // SAFETY: a struct of integers, for which zero is valid.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = self.index as i32;
        // SAFETY: both are valid for reads of the lengths given.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as u32,
            )
        };
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An IP packet from port 4444 to a port: a datagram with some words, or the first segment of a connection.
fn packet(protocol: i32, src: IpAddr, dst: IpAddr, port: u16, words: &str) -> Vec<u8> {
    let ports = [4444u16.to_be_bytes(), port.to_be_bytes()].concat();
    let mut segment = match protocol {
        libc::IPPROTO_UDP => [&ports[..], &(8 + words.len() as u16).to_be_bytes(), &[0; 2], words.as_bytes()].concat(),
        _ => [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]].concat(),
    };
    let octets = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let pseudo = [&(segment.len() as u32).to_be_bytes()[..], &(protocol as u32).to_be_bytes()].concat();
    let sum = checksum(&[&octets(src), &octets(dst), &pseudo, &segment]);
    let at = if protocol == libc::IPPROTO_UDP { 6 } else { 16 };
    segment[at..at + 2].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    let len = segment.len() as u16;
    let mut header = match src {
        IpAddr::V4(_) => {
            [&[0x45, 0][..], &(20 + len).to_be_bytes(), &[0, 0, 0x40, 0, 64, protocol as u8, 0, 0]].concat()
        }
        IpAddr::V6(_) => [&[0x60, 0, 0, 0][..], &len.to_be_bytes(), &[protocol as u8, 64]].concat(),
    };
    header.extend(octets(src));
    header.extend(octets(dst));
    if src.is_ipv4() {
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    header.extend(segment);
    header
}

/// Every pair of addresses of which at least one is hostile.
fn hostile_pairs() -> Vec<(IpAddr, IpAddr)> {
    let reserved =
        ["::ffff:127.0.0.1", "::ffff:198.51.100.1", "::ffff:192.0.2.7", "::", "::1", "::ffff:0.0.0.0", "::7f00:1"];
    let own_v6 = ["2001:db8:1::1", "2001:db8:2::1"];
    let odd_v4 = ["127.0.0.1", "127.1.2.3", "0.0.0.0", "255.255.255.255", "224.0.0.1", "198.51.100.255"];
    let own_v4 = ["198.51.100.1", "203.0.113.1"];
    let mut pairs = Vec::new();
    for (bad_sources, bad_destinations, client, server) in [
        ([&reserved[..], &own_v6].concat(), reserved.to_vec(), v6().client, v6().server),
        ([&odd_v4[..], &own_v4].concat(), vec!["127.0.0.1", "0.0.0.0"], v4().client, v4().server),
    ] {
        for src in bad_sources.iter().map(|text| ip(text)).chain([client]) {
            for dst in bad_destinations.iter().map(|text| ip(text)).chain([server]) {
                if (src, dst) != (client, server) {
                    pairs.push((src, dst));
                }
            }
        }
    }
    pairs
}

/// The words of the datagrams that a socket has received so far.
fn words(socket: &UdpSocket) -> Vec<String> {
    socket.set_nonblocking(true).unwrap();
    let mut heard = Vec::new();
    let mut buffer = [0; 200];
    while let Ok((len, from)) = socket.recv_from(&mut buffer) {
        heard.push(format!("{} from {from}", String::from_utf8_lossy(&buffer[..len])));
    }
    heard
}

/// Sends every hostile pair by UDP and TCP, then an honest datagram for each family, which the receiver gets: only these two
/// come, and the counters count only these.
fn refused_with(backend: u32, flags: u32, dst: &[&str]) {
    let lab = Lab::new();
    // IPv4 routing lets all of them through, so that the rules must refuse them.
    for name in ["accept_local", "route_localnet"] {
        lab.proxy.sysctl(&format!("ipv4/conf/all/{name}"), "1");
        lab.proxy.sysctl(&format!("ipv4/conf/eth0/{name}"), "1");
    }
    for interface in ["all", "eth0"] {
        lab.proxy.sysctl(&format!("ipv4/conf/{interface}/rp_filter"), "0");
    }
    lab.proxy.run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let receiver = receiver("[::]:3129".parse().unwrap());
        let config = RulesConfig::new().listeners(&[&listener, &receiver]).flags(flags).backend(backend).ports(&[PORT]);
        let rules = if dst.is_empty() { config } else { config.dst(dst) }.install().unwrap();
        // Services of this host that must not be reachable from the network, and transparent sockets on other addresses.
        let services: Vec<UdpSocket> = ["127.0.0.1:80", "[::1]:80"].map(|a| UdpSocket::bind(a).unwrap()).into();
        let transparent: Vec<UdpSocket> = ["[::ffff:192.0.2.7]:80", "[::ffff:127.3.3.3]:80"]
            .map(|addr| {
                let socket = socket(libc::AF_INET6, libc::SOCK_DGRAM).unwrap();
                bind_nonlocal(&socket, addr.parse().unwrap()).unwrap();
                UdpSocket::from(socket)
            })
            .into();
        let before = rules.stats();
        lab.client.run(|| {
            let injector = Injector::new("eth0");
            for (src, dst) in hostile_pairs() {
                for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
                    injector.send(&packet(protocol, src, dst, PORT, &format!("{src} to {dst}")));
                }
            }
            for hosts in [v4(), v6()] {
                injector.send(&packet(libc::IPPROTO_UDP, hosts.client, hosts.server, PORT, "honest"));
            }
        });
        let mut heard: Vec<_> =
            (0..2).map(|_| receive_datagram(&receiver, patience()).expect("an honest datagram")).collect();
        heard.sort_by_key(|(.., to)| to.is_ipv6());
        for ((words, from, to), hosts) in heard.iter().zip([v4(), v6()]) {
            assert_eq!(
                (words.as_str(), canonical(*from), canonical(*to)),
                ("honest", at(hosts.client, 4444), at(hosts.server, PORT))
            );
        }
        assert!(receive_datagram(&receiver, limit(50)).is_none());
        // With route_localnet the kernel itself delivers IPv4 packets to loopback.
        let by_ipv6 = |words: &String| words.contains("::");
        let reached: Vec<String> = services.iter().chain(&transparent).flat_map(words).filter(by_ipv6).collect();
        assert_eq!(reached, [""; 0], "hostile datagrams reached services of this host");
        let after = rules.stats();
        assert_eq!(after.intercepted_packets - before.intercepted_packets, 2, "only the honest datagrams");
        assert_eq!(after.diverted_packets, before.diverted_packets);
    });
}

#[test]
fn install_rules_nft_does_not_intercept_hostile_addresses() {
    refused_with(TP_BACKEND_NFT, 0, &[]);
}

#[test]
fn install_rules_nft_with_dst_of_everything_does_not_intercept_hostile_addresses() {
    refused_with(TP_BACKEND_NFT, 0, &["0.0.0.0/0", "::/0"]);
}

#[test]
fn install_rules_nft_local_output_notrack_does_not_intercept_hostile_addresses() {
    refused_with(TP_BACKEND_NFT, TP_RULES_LOCAL_OUTPUT | TP_RULES_NOTRACK, &[]);
}

#[test]
fn install_rules_iptables_does_not_intercept_hostile_addresses() {
    refused_with(TP_BACKEND_IPTABLES, 0, &[]);
}

#[test]
fn install_rules_iptables_with_dst_of_everything_does_not_intercept_hostile_addresses() {
    refused_with(TP_BACKEND_IPTABLES, TP_RULES_LOCAL_OUTPUT, &["0.0.0.0/0", "::/0"]);
}

/// Sends to every kind of address that leads to a listener on the wildcard address without interception.
fn direct_is_refused(backend: u32) {
    let lab = Lab::new();
    let (listener, receiver) =
        lab.proxy.run(|| (listen("[::]:3129".parse().unwrap(), 0).unwrap(), receiver("[::]:3129".parse().unwrap())));
    let config = RulesConfig::new().listeners(&[&listener, &receiver]).backend(backend).ports(&[PORT]);
    let rules = lab.proxy.run(|| config.install().unwrap());
    let link_local = |net: &Net, name: &str| {
        let shown = net.ip(&format!("-o -6 addr show dev {name} scope link"));
        let addr: Ipv6Addr = shown.split_whitespace().nth(3).unwrap().split('/').next().unwrap().parse().unwrap();
        let index: u32 = net.ip(&format!("-o link show dev {name}")).split(':').next().unwrap().trim().parse().unwrap();
        (addr, index)
    };
    let (addr, proxy_index) = link_local(&lab.proxy, "eth0");
    let (_, client_index) = link_local(&lab.client, "eth0");
    let scoped = |ip: Ipv6Addr, scope: u32| std::net::SocketAddrV6::new(ip, 3129, 0, scope).into();
    let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
    let own: Vec<(&Net, std::net::SocketAddr)> = vec![
        (&lab.proxy, scoped(addr, proxy_index)),
        (&lab.proxy, at(v4().proxy, 3129)),
        (&lab.proxy, at(v6().proxy, 3129)),
        (&lab.proxy, at(Ipv4Addr::LOCALHOST.into(), 3129)),
        (&lab.proxy, at(Ipv6Addr::LOCALHOST.into(), 3129)),
        (&lab.client, scoped(addr, client_index)),
        (&lab.client, at(v4().proxy, 3129)),
        (&lab.client, at(v6().proxy, 3129)),
        (&lab.client, at(ip("198.51.100.255"), 3129)),
        (&lab.client, at(ip("224.0.0.1"), 3129)),
        (&lab.client, scoped(all_nodes, client_index)),
    ];
    for (from, to) in own {
        from.run(|| {
            let socket = UdpSocket::bind(at(if to.is_ipv4() { ip("0.0.0.0") } else { ip("::") }, 0)).unwrap();
            socket.set_broadcast(true).unwrap();
            socket.send_to(format!("to {to}").as_bytes(), to).unwrap();
            if !to.ip().is_multicast() && to.ip() != ip("198.51.100.255") {
                assert!(std::net::TcpStream::connect_timeout(&to, limit(100)).is_err(), "{to}");
            }
        });
    }
    lab.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"honest", at(v4().server, PORT)).unwrap();
    });
    let heard = lab.proxy.run(|| receive_datagram(&receiver, patience())).expect("the honest datagram");
    assert_eq!(heard.0, "honest");
    assert!(accept_within(&listener, limit(50)).is_none());
    drop(rules);
}

#[test]
fn install_rules_nft_drops_direct_datagrams_and_connections() {
    direct_is_refused(TP_BACKEND_NFT);
}

#[test]
fn install_rules_iptables_drops_direct_datagrams_and_connections() {
    direct_is_refused(TP_BACKEND_IPTABLES);
}

#[test]
fn connect_from_unspecified_address_is_refused() {
    let net = Net::new();
    net.run(|| {
        let real = std::net::TcpListener::bind("[::]:80").unwrap();
        for (src, dst) in [
            ("0.0.0.0:0", "127.0.0.1:80"),
            ("[::]:0", "[::1]:80"),
            ("[::ffff:0.0.0.0]:0", "127.0.0.1:80"),
            ("127.0.0.1:0", "0.0.0.0:80"),
            ("[::1]:0", "[::]:80"),
            ("127.0.0.1:0", "[::ffff:0.0.0.0]:80"),
            ("224.0.0.1:0", "127.0.0.1:80"),
            ("255.255.255.255:0", "127.0.0.1:80"),
            ("[::ffff:255.255.255.255]:0", "127.0.0.1:80"),
            ("[ff02::1]:0", "[::1]:80"),
        ] {
            for flags in [0, TP_CONNECT_KEEP_PORT, TP_CONNECT_DGRAM] {
                let error = connect_from(src.parse().unwrap(), dst.parse().unwrap(), flags).unwrap_err();
                assert_eq!(error.errno, libc::EINVAL, "{src} {dst}: {error}");
            }
        }
        drop(real);
    });
}

/// Datagrams and connections of the proxy's host to its own addresses and an intercepted port reach its own services, and
/// none comes to the proxy, which would send its own ones to itself for ever.
fn own_traffic_is_not_intercepted(backend: u32, dst: &[&str]) {
    let lab = Lab::new();
    lab.proxy.run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let receiver = receiver("[::]:3129".parse().unwrap());
        let config = RulesConfig::new().listeners(&[&listener, &receiver]).backend(backend).ports(&[PORT]);
        let rules = if dst.is_empty() { config } else { config.dst(dst) }.install().unwrap();
        let shown = lab.proxy.ip("-o -6 addr show dev eth0 scope link");
        let link_local: Ipv6Addr = shown.split_whitespace().nth(3).unwrap().split('/').next().unwrap().parse().unwrap();
        // SAFETY: a NUL-terminated name.
        let index = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
        let own = [
            std::net::SocketAddrV6::new(link_local, PORT, 0, index).into(),
            at(v4().proxy, PORT),
            at(v6().proxy, PORT),
            at(Ipv4Addr::LOCALHOST.into(), PORT),
            at(Ipv6Addr::LOCALHOST.into(), PORT),
        ];
        let service = std::net::TcpListener::bind(("::", PORT)).unwrap();
        let datagrams = UdpSocket::bind(("::", PORT)).unwrap();
        datagrams.set_read_timeout(Some(patience())).unwrap();
        for to in own {
            std::net::TcpStream::connect_timeout(&to, patience()).unwrap_or_else(|e| panic!("{to}: {e}"));
            service.accept().unwrap();
            let client = UdpSocket::bind(at(if to.is_ipv4() { ip("0.0.0.0") } else { ip("::") }, 0)).unwrap();
            client.send_to(to.to_string().as_bytes(), to).unwrap();
            let mut words = [0; 100];
            let (len, _) = datagrams.recv_from(&mut words).unwrap_or_else(|e| panic!("{to}: {e}"));
            assert_eq!(std::str::from_utf8(&words[..len]), Ok(to.to_string().as_str()));
        }
        assert_eq!(rules.stats().intercepted_packets, 0);
        assert!(receive_datagram(&receiver, limit(50)).is_none());
    });
}

#[test]
fn install_rules_nft_leaves_traffic_of_a_host_to_itself() {
    own_traffic_is_not_intercepted(TP_BACKEND_NFT, &[]);
}

#[test]
fn install_rules_nft_with_dst_of_everything_leaves_traffic_of_a_host_to_itself() {
    own_traffic_is_not_intercepted(TP_BACKEND_NFT, &["0.0.0.0/0", "::/0"]);
}

#[test]
fn install_rules_iptables_leaves_traffic_of_a_host_to_itself() {
    own_traffic_is_not_intercepted(TP_BACKEND_IPTABLES, &[]);
}

#[test]
fn install_rules_iptables_with_dst_of_everything_leaves_traffic_of_a_host_to_itself() {
    own_traffic_is_not_intercepted(TP_BACKEND_IPTABLES, &["0.0.0.0/0", "::/0"]);
}
