//! The proxy's host with its sockets, and the rest of the world, which is two links without hosts: frames are put on them,
//! and what the host sends is read from a packet socket on the host itself.

use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::{Domain, Protocol, Socket, Type};
use tproxy::ffi::*;

use crate::case::{DIVERT_PORT, FOREIGN, From, Instance, Packet};
use crate::common::*;
use crate::packet::{self, Sign};

/// Ports of services of the host.
pub const SERVICES: [u16; 4] = [53, 80, 443, 2000];
const DEFAULT_MARK: u32 = 0x2000;
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
/// With routing rules of its own the kernel checks more of a packet's source (`fib_validate_source`): here as with the
/// library's, before they are installed.
const BATCH: &str = "
link add eth0 address 02:00:00:00:00:01 type veth peer name c netns WORLD
link add eth1 address 02:00:00:00:00:02 type veth peer name s netns WORLD
link set lo up
link set eth0 addrgenmode none up
link set eth1 addrgenmode none up
addr add 198.51.100.1/24 brd + dev eth0
addr add 203.0.113.1/24 brd + dev eth1
addr add 2001:db8:1::1/64 dev eth0 nodad
addr add 2001:db8:2::1/64 dev eth1 nodad
addr add fe80::1/64 dev eth0 nodad
addr add fe80::2/64 dev eth1 nodad
neigh add 198.51.100.2 lladdr 02:00:00:00:01:01 dev eth0
neigh add 203.0.113.2 lladdr 02:00:00:00:01:02 dev eth1
neigh add 2001:db8:1::2 lladdr 02:00:00:00:01:01 dev eth0
neigh add 2001:db8:2::2 lladdr 02:00:00:00:01:02 dev eth1
route add 10.0.0.0/8 via 198.51.100.2
route add 2001:db8:a::/48 via 2001:db8:1::2
route add default via 203.0.113.2
route add default via 2001:db8:2::2
rule add pref 32000 lookup 253
";

fn batch(net: &Net, lines: &str) {
    let mut child = net.run(|| Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap());
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{lines}");
}

/// The Ethernet address from which packets come.
pub fn mac_of(from: From) -> [u8; 6] {
    [2, 0, 0, 0, 1, if from == From::Client { 1 } else { 2 }]
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    Forwarded,
    /// Taken by a service of the host.
    Service,
    /// Taken by the listener of the instance with this index.
    Listener(usize),
    /// Taken by the transparent socket.
    Diverted,
    Reset,
    Unreachable,
    Nothing,
}

/// Marks the tag of a packet whose answer was reset.
const RESET: u32 = 1 << 31;
const LISTENER_HOPS: u8 = 101;
const DIVERT_HOPS: u8 = 99;

pub struct Network {
    host: Net,
    world: [OwnedFd; 2],
    capture: OwnedFd,
    sockets: Vec<(Outcome, Socket)>,
    next_tag: AtomicU32,
}

fn packet_socket(protocol: u16, interface: &str) -> OwnedFd {
    // SAFETY: a plain system call that gives a new descriptor.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol.to_be())) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and has no other owner.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if !interface.is_empty() {
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: integers, for which all zero is valid.
        let mut addr: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        addr.sll_family = libc::AF_PACKET as u16;
        addr.sll_protocol = protocol.to_be();
        // SAFETY: a NUL-terminated name.
        addr.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        // SAFETY: an address of that length.
        let rc = unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), size_of_val(&addr) as u32) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }
    fd
}

fn dual(addr: SocketAddr, kind: Type) -> Socket {
    let socket = Socket::new(Domain::for_address(addr), kind, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    if addr.is_ipv6() {
        socket.set_only_v6(false).unwrap();
    }
    socket
}

fn ready(socket: Socket, addr: SocketAddr, hops: Option<u8>) -> Socket {
    if let Some(hops) = hops {
        socket.set_ttl_v4(u32::from(hops)).unwrap();
        if addr.is_ipv6() {
            socket.set_unicast_hops_v6(u32::from(hops)).unwrap();
        }
    }
    socket.bind(&addr.into()).unwrap_or_else(|e| panic!("{addr}: {e}"));
    if socket.r#type().unwrap() == Type::STREAM {
        socket.listen(4096).unwrap();
    }
    socket
}

/// Listeners of an instance, which are closed at the end of the scope.
pub type Listeners = Vec<(Outcome, Socket)>;

impl Network {
    pub fn new() -> Network {
        let (host, world) = (Net::new(), Net::new());
        batch(&host, &BATCH.replace("WORLD", &world.path()));
        batch(&world, "link set c addrgenmode none up\nlink set s addrgenmode none up\n");
        host.forward();
        for name in [
            "icmp_ratelimit",
            "conf/all/rp_filter",
            "conf/default/rp_filter",
            "conf/eth0/rp_filter",
            "conf/eth1/rp_filter",
        ] {
            host.sysctl(&format!("ipv4/{name}"), "0");
        }
        host.sysctl("ipv6/icmp/ratelimit", "0");
        host.sysctl("ipv4/conf/all/send_redirects", "0");
        let ends = world.run(|| ["c", "s"].map(|name| packet_socket(libc::ETH_P_ARP as u16, name)));
        let (capture, sockets) = host.run(|| {
            let capture = packet_socket(libc::ETH_P_ALL as u16, "");
            let mut sockets = Vec::new();
            for kind in [Type::STREAM, Type::DGRAM] {
                for port in SERVICES {
                    let addr = at(ip("::"), port);
                    sockets.push((Outcome::Service, ready(dual(addr, kind), addr, None)));
                }
                for foreign in FOREIGN {
                    let addr = at(ip(foreign), DIVERT_PORT);
                    let socket = dual(addr, kind);
                    transparent(&socket, addr);
                    sockets.push((Outcome::Diverted, ready(socket, addr, Some(DIVERT_HOPS))));
                }
            }
            (capture, sockets)
        });
        let network = Network { host, world: ends, capture, sockets, next_tag: AtomicU32::new(1) };
        // A link drops packets for a moment after it has come up.
        network.host.run(|| network.settle());
        network
    }

    pub fn host(&self) -> &Net {
        &self.host
    }

    /// The listeners of an instance.
    pub fn listen(&self, index: usize, instance: &Instance) -> Listeners {
        let addr = at(ip(instance.listen.0), instance.listen.1);
        let open = |kind| {
            let socket = dual(addr, kind);
            if !instance.has(TP_RULES_REDIRECT) {
                transparent(&socket, addr);
            }
            (Outcome::Listener(index), ready(socket, addr, Some(LISTENER_HOPS + index as u8)))
        };
        let kinds = [(TP_PROTO_TCP, Type::STREAM), (TP_PROTO_UDP, Type::DGRAM)];
        self.host.run(|| {
            kinds
                .into_iter()
                .filter(|(protocol, _)| instance.protocols & protocol != 0)
                .map(|(_, kind)| open(kind))
                .collect()
        })
    }

    /// Sends packets, each after what it answers, and gives what became of them.
    pub fn send(&self, packets: &[Packet], listeners: &[&Listeners]) -> Vec<Outcome> {
        self.host.run(|| {
            pin();
            let hosts = Senders::new();
            let (mut tags, mut seen) = (Vec::new(), HashMap::new());
            for p in packets {
                let mut answered = 0;
                if p.reply {
                    let opener = p.opener();
                    answered = self.tag();
                    self.inject(
                        &hosts,
                        &opener,
                        &packet::bytes(&opener, packet::port_of(answered), p.port, answered, None),
                    );
                }
                let tag = self.tag();
                tags.push((tag, answered));
                let (sport, dport) =
                    if p.reply { (p.port, packet::port_of(answered)) } else { (packet::port_of(tag), p.port) };
                if p.reply {
                    // The answer comes when the host has seen what it answers.
                    self.settle();
                }
                self.inject(&hosts, p, &packet::bytes(p, sport, dport, tag, p.reply.then_some(answered)));
                // The buffer of the socket is small.
                self.read_wire(&mut seen);
            }
            for _ in 0..4 {
                self.settle();
            }
            self.read_sockets(self.sockets.iter().chain(listeners.iter().flat_map(|l| l.iter())), &mut seen);
            self.read_wire(&mut seen);
            let of = |(tag, answered): &(u32, u32)| seen.get(tag).or_else(|| seen.get(&(RESET | answered))).copied();
            tags.iter().map(|tags| of(tags).unwrap_or(Outcome::Nothing)).collect()
        })
    }

    fn tag(&self) -> u32 {
        self.next_tag.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits until the host has handled everything that was sent before.
    fn settle(&self) {
        for (end, mac) in self.world.iter().zip(MACS) {
            // An ARP request for the host's own address, which it answers after what came before on this processor.
            let (own, other, index) = if mac == MACS[0] {
                ([198, 51, 100, 1], [198, 51, 100, 2], 1)
            } else {
                ([203, 0, 113, 1], [203, 0, 113, 2], 2)
            };
            let from = [2, 0, 0, 0, 1, index];
            let frame = [&mac[..], &from, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &from, &other, &[0; 6], &own].concat();
            drain(end);
            let answers = || {
                let mut frame = [0; 100];
                std::iter::from_fn(|| receive(end, &mut frame).map(|len| len > 21 && frame[21] == 2)).any(|reply| reply)
            };
            // The kernel drops packets when it has no memory for them: also these.
            eventually("the host answers ARP", || {
                send_frame(end, &frame);
                while datagrams::readable(end, limit(500)) {
                    if answers() {
                        return true;
                    }
                }
                false
            });
        }
    }

    fn inject(&self, hosts: &Senders, p: &Packet, bytes: &[u8]) {
        let (end, mac) = match p.from {
            From::Client => (&self.world[0], MACS[0]),
            From::Server => (&self.world[1], MACS[1]),
            From::Host => return hosts.send(p, bytes),
        };
        let ether_type: [u8; 2] = if p.dst.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] };
        // A multicast address goes to a multicast frame, as hosts send it.
        let to = match p.dst {
            IpAddr::V4(dst) if dst.is_broadcast() || dst.octets()[3] == 255 => [0xff; 6],
            IpAddr::V4(dst) if dst.is_multicast() => {
                [1, 0, 0x5e, dst.octets()[1] & 0x7f, dst.octets()[2], dst.octets()[3]]
            }
            IpAddr::V6(dst) if dst.is_multicast() => {
                let o = dst.octets();
                [0x33, 0x33, o[12], o[13], o[14], o[15]]
            }
            _ => mac,
        };
        send_frame(end, &[&to[..], &mac_of(p.from), &ether_type, bytes].concat());
    }

    fn read_sockets<'a>(&self, sockets: impl Iterator<Item = &'a (Outcome, Socket)>, seen: &mut HashMap<u32, Outcome>) {
        for (outcome, socket) in sockets.filter(|(_, socket)| socket.r#type().unwrap() == Type::DGRAM) {
            let mut words = [0; 100];
            while let Some(len) = receive(socket, &mut words) {
                if len >= 4 {
                    seen.entry(u32::from_be_bytes(words[..4].try_into().unwrap())).or_insert(*outcome);
                }
            }
        }
    }

    fn read_wire(&self, seen: &mut HashMap<u32, Outcome>) {
        let mut frame = [0; 2000];
        loop {
            // SAFETY: integers, for which all zero is valid.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut len = size_of_val(&from) as u32;
            // SAFETY: room for a frame and its address.
            let got = unsafe {
                let room = frame.as_mut_ptr().cast();
                let from = (&raw mut from).cast();
                libc::recvfrom(self.capture.as_raw_fd(), room, frame.len(), libc::MSG_DONTWAIT, from, &raw mut len)
            };
            if got < 0 {
                break;
            }
            let protocol = u16::from_be(from.sll_protocol);
            let by_lo = from.sll_hatype == libc::ARPHRD_LOOPBACK;
            if from.sll_pkttype != libc::PACKET_OUTGOING || ![0x0800, 0x86dd].contains(&protocol) {
                continue;
            }
            let Some((tag, sign)) = packet::read(&frame[14..got as usize]) else { continue };
            let outcome = match sign {
                Sign::Itself if by_lo => continue,
                Sign::Itself => Outcome::Forwarded,
                Sign::Reset => Outcome::Reset,
                Sign::AnswerReset => {
                    seen.insert(RESET | tag, Outcome::Reset);
                    continue;
                }
                Sign::Unreachable => Outcome::Unreachable,
                Sign::Accepted(DIVERT_HOPS) => Outcome::Diverted,
                Sign::Accepted(hops @ 101..=109) => Outcome::Listener(usize::from(hops - LISTENER_HOPS)),
                Sign::Accepted(_) => Outcome::Service,
            };
            seen.entry(tag).or_insert(outcome);
        }
    }
}

fn transparent(socket: &Socket, addr: SocketAddr) {
    checked(tp_set_transparent(socket.as_raw_fd())).unwrap_or_else(|e| panic!("{addr}: {e}"));
}

/// All frames are put on the links by one processor, which handles them in this order.
fn pin() {
    // SAFETY: a set of bits, for which all zero is valid; plain system calls.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let size = size_of_val(&set);
        libc::sched_getaffinity(0, size, &raw mut set);
        let first = (0..1024).find(|cpu| libc::CPU_ISSET(*cpu, &set)).unwrap();
        libc::CPU_ZERO(&mut set);
        libc::CPU_SET(first, &mut set);
        libc::sched_setaffinity(0, size, &raw const set);
    }
}

fn send_frame(end: &OwnedFd, frame: &[u8]) {
    // SAFETY: valid for reads of that length.
    let sent = unsafe { libc::send(end.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
}

fn receive(fd: &impl AsRawFd, room: &mut [u8]) -> Option<usize> {
    // SAFETY: room for that many bytes.
    let got = unsafe { libc::recv(fd.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), libc::MSG_DONTWAIT) };
    usize::try_from(got).ok()
}

fn drain(fd: &OwnedFd) {
    while receive(fd, &mut [0; 100]).is_some() {}
}

/// Sockets by which processes of the host send whole packets: ordinary ones, and transparent ones with the default mark.
struct Senders([Socket; 4]);

impl Senders {
    fn new() -> Senders {
        let raw = |v6: bool, exempt: bool| {
            let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).unwrap();
            if v6 {
                const IPV6_HDRINCL: i32 = 36; // include/uapi/linux/in6.h
                datagrams::set_option(&socket, libc::SOL_IPV6, IPV6_HDRINCL, 1);
            }
            if !v6 {
                socket.set_broadcast(true).unwrap();
            }
            if exempt {
                if v6 {
                    datagrams::set_option(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1);
                } else {
                    socket.set_ip_transparent_v4(true).unwrap();
                }
                socket.set_mark(DEFAULT_MARK).unwrap();
            }
            socket
        };
        Senders([raw(false, false), raw(true, false), raw(false, true), raw(true, true)])
    }

    fn send(&self, p: &Packet, bytes: &[u8]) {
        let socket = &self.0[usize::from(p.dst.is_ipv6()) + 2 * usize::from(p.exempt)];
        if !p.exempt {
            socket.set_mark(p.mark).unwrap();
        }
        // What cannot be sent is not sent: the kernel refuses some addresses.
        let _ = socket.send_to(bytes, &at(p.dst, 0).into());
    }
}
