//! Datagrams, intercepted and answered: each family, each kind of listener, forwarded and locally generated, received one by
//! one and as GRO batches, answered by bound and by raw sockets. Every reply that the client gets is compared.

mod common;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;

use common::datagrams::*;
use common::*;
use tproxy::ffi::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Family {
    V4,
    V6,
    /// IPv4 on an IPv6 socket.
    Dual,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    family: Family,
    loopback: bool,
    local_output: bool,
    gro: bool,
    raw: bool,
}

const PORTS: [u16; 3] = [53, 7000, 7001];
const LISTENER: u16 = 3129;

impl Case {
    fn v6(self) -> bool {
        self.family == Family::V6
    }

    fn listener(self) -> SocketAddr {
        let ip_of = match (self.family, self.loopback) {
            (Family::V4, false) => "0.0.0.0",
            (Family::V4, true) => "127.0.0.1",
            (Family::V6, true) => "::1",
            (Family::Dual, true) => "::ffff:127.0.0.1",
            (_, false) => "::",
        };
        at(ip(ip_of), LISTENER)
    }

    fn rules(self, listener: &OwnedFd) -> Rules {
        let flags = if self.local_output { TP_RULES_LOCAL_OUTPUT } else { 0 };
        RulesConfig::of(listener).ports(&PORTS).flags(flags).install().unwrap()
    }
}

/// Several datagrams from one sender to one destination, which differ from all others.
fn words(sender: SocketAddr, to: SocketAddr, len: usize) -> Vec<Vec<u8>> {
    (0..5)
        .map(|number| {
            let mut word = format!("{number} from {sender} to {to} ").into_bytes();
            word.resize(if number == 4 { len.min(70) } else { len }, b'.');
            word
        })
        .collect()
}

/// Receives so many datagrams, and sends each back to its sender from its original destination.
fn echo(case: Case, listener: &OwnedFd, replier: &mut Replier, expected: usize) {
    let mut rooms = rooms(8, 65536);
    let mut batch = datagrams(&mut rooms);
    let mut seen = 0;
    while seen < expected {
        assert!(readable(listener, patience()), "{case:?}: {seen} of {expected} came");
        let count = recv_datagrams(listener, &mut batch, 0).unwrap();
        for datagram in &batch[..count] {
            let (client, to) = (datagram.client().unwrap(), datagram.orig_dst().unwrap());
            assert_eq!(client.is_ipv6(), case.family != Family::V4, "{case:?}");
            assert_eq!(to.is_ipv6(), client.is_ipv6(), "{case:?}");
            let said = String::from_utf8_lossy(datagram.data());
            let of_them = format!("from {} to {} ", canonical(client), canonical(to));
            assert!(said.contains(&of_them), "{case:?}: {of_them} has {said}");
            let segment_len = datagram.segment_len() as usize;
            seen += if segment_len == 0 { 1 } else { datagram.data().len().div_ceil(segment_len) };
            assert_eq!(case.gro, segment_len != 0, "{case:?}");
        }
        let sent = replier.reply(&mut batch[..count]);
        let errors: Vec<_> = batch[..count].iter().map(|datagram| datagram.error()).collect();
        assert_eq!(sent, count, "{case:?}: {errors:?}");
    }
}

fn check(case: Case) {
    let lab = Lab::new();
    let hosts = if case.v6() { v6() } else { v4() };
    let listener = lab.proxy.run(|| receiver(case.listener()));
    if case.gro {
        set_option(&listener, libc::SOL_UDP, UDP_GRO, 1);
    }
    let _rules = lab.proxy.run(|| case.rules(&listener));
    // Sockets that do not share their ports: replies from these ports go through a raw socket.
    let everywhere = at(if case.v6() { ip("::") } else { ip("0.0.0.0") }, 0);
    let holders: Vec<UdpSocket> =
        if case.raw { lab.proxy.run(|| PORTS.map(|port| udp(at(everywhere.ip(), port))).into()) } else { Vec::new() };
    let (net, source) = if case.local_output { (&lab.proxy, hosts.proxy) } else { (&lab.client, hosts.client) };
    let senders: Vec<UdpSocket> = net.run(|| (0..2).map(|_| udp(at(source, 0))).collect());
    let destinations: Vec<SocketAddr> = [hosts.server, nobody(case.v6(), 1), nobody(case.v6(), 2)]
        .iter()
        .flat_map(|ip: &IpAddr| PORTS.map(|port| at(*ip, port)))
        .collect();

    let len = if case.gro { 1200 } else { 100 };
    let mut replier = lab.proxy.run(|| Replier::open(&replier_config()).unwrap());
    let mut count = 0;
    net.run(|| {
        for sender in &senders {
            for to in &destinations {
                let words = words(sender.local_addr().unwrap(), *to, len);
                count += words.len();
                if case.gro {
                    send_segments(sender, &words.concat(), len as u16, *to);
                } else {
                    words.iter().for_each(|word| assert_eq!(sender.send_to(word, to).unwrap(), word.len()));
                }
            }
        }
    });
    lab.proxy.run(|| echo(case, &listener, &mut replier, count));

    for sender in &senders {
        let mut heard: HashMap<SocketAddr, Vec<Vec<u8>>> = HashMap::new();
        for (word, from) in hear(sender, count / senders.len()) {
            heard.entry(from).or_default().push(word);
        }
        for to in &destinations {
            let expected = words(sender.local_addr().unwrap(), *to, len);
            assert_eq!(heard.remove(to), Some(expected), "{case:?}: replies from {to}");
        }
        assert!(heard.is_empty(), "{case:?}: replies from others: {heard:?}");
    }
    let stats = replier.stats();
    assert_eq!((stats.errors, stats.evictions), (0, 0), "{case:?}");
    assert_eq!(stats.raw != 0, case.raw, "{case:?}");
    assert_eq!(stats.sockets, if case.raw { 1 } else { PORTS.len() as u64 }, "{case:?}");
    // The sockets that hold the ports have received nothing.
    for holder in holders {
        holder.set_nonblocking(true).unwrap();
        assert!(holder.recv_from(&mut [0; 10]).is_err(), "{case:?}");
    }
}

fn check_all(family: Family, gro: bool) {
    for loopback in [false, true] {
        for local_output in [false, true] {
            for raw in [false, true] {
                check(Case { family, loopback, local_output, gro, raw });
            }
        }
    }
}

#[test]
fn reply_to_ipv4_datagrams_reaches_clients() {
    check_all(Family::V4, false);
}

#[test]
fn reply_to_ipv4_gro_batches_reaches_clients() {
    check_all(Family::V4, true);
}

#[test]
fn reply_to_ipv6_datagrams_reaches_clients() {
    check_all(Family::V6, false);
}

#[test]
fn reply_to_ipv6_gro_batches_reaches_clients() {
    check_all(Family::V6, true);
}

#[test]
fn reply_to_ipv4_datagrams_on_dual_stack_reaches_clients() {
    check_all(Family::Dual, false);
}

#[test]
fn reply_to_ipv4_gro_batches_on_dual_stack_reaches_clients() {
    check_all(Family::Dual, true);
}
