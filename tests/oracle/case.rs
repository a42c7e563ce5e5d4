//! What a case consists of: instances and packets.

use std::net::IpAddr;

use tproxy::ffi::*;

/// Where a packet comes from: the network of the clients, that of the servers, or a process of the proxy's host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum From {
    Client,
    Server,
    Host,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Syn,
    Ack,
    SynAck,
    Udp,
    /// An ICMP error that quotes a datagram from the packet's destination and port.
    Error,
}

#[derive(Clone, Debug)]
pub struct Packet {
    pub from: From,
    pub kind: Kind,
    pub src: IpAddr,
    pub dst: IpAddr,
    /// The port of the server: the destination's, or the source's if the packet is a reply.
    pub port: u16,
    /// The packet answers another, which dst has sent to src and port before.
    pub reply: bool,
    /// The process that sends it has a transparent socket, which bears the default mark.
    pub exempt: bool,
    /// The mark (SO_MARK) of the other sockets of the proxy's host.
    pub mark: u32,
}

/// The first and the last port, and the protocols.
pub type PortRange = (u16, u16, u32);

/// An instance in the order of installation.
#[derive(Clone, Debug, Default)]
pub struct Instance {
    pub flags: u32,
    pub families: u32,
    pub protocols: u32,
    pub ports: Option<Vec<PortRange>>,
    pub bypass_ports: Vec<PortRange>,
    pub reject_ports: Vec<PortRange>,
    pub dst: Option<Vec<&'static str>>,
    pub src: Option<Vec<&'static str>>,
    pub bypass: Option<Vec<&'static str>>,
    pub bypass_src: Vec<&'static str>,
    pub interfaces: Option<Vec<&'static str>>,
    pub bypass_interfaces: Vec<&'static str>,
    pub macs: Option<Vec<From>>,
    pub bypass_macs: Vec<From>,
    pub uids: Option<Vec<(u32, u32)>>,
    pub gids: Option<Vec<(u32, u32)>>,
    pub bypass_uids: Vec<(u32, u32)>,
    pub bypass_gids: Vec<(u32, u32)>,
    pub bypass_mark: (u32, u32),
    /// The address of the listeners, "::" for both families, and their port.
    pub listen: (&'static str, u16),
    /// The listeners are closed after the installation.
    pub dead: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// The kernel does with it what it would do without rules.
    Untouched,
    /// The listener of the instance with this index gets it.
    Taken(usize),
    /// The transparent socket gets it.
    Diverted,
    Dropped,
    /// With a reset or an ICMP error.
    Refused,
}

/// The transparent socket's port; its addresses are FOREIGN.
pub const DIVERT_PORT: u16 = 7777;
pub const FOREIGN: [&str; 2] = ["192.0.2.77", "2001:db8:9::77"];
/// The addresses of the proxy's host, by which packets are for the host itself.
pub const OWN: [&str; 8] =
    ["198.51.100.1", "203.0.113.1", "127.0.0.0/8", "2001:db8:1::1", "2001:db8:2::1", "::1", "fe80::1", "fe80::2"];
/// Addresses that no single host has: broadcast, multicast, and anycast of a router.
const SHARED: [&str; 7] =
    ["198.51.100.255", "203.0.113.255", "255.255.255.255", "224.0.0.0/4", "ff00::/8", "2001:db8:1::", "2001:db8:2::"];

pub fn within(addr: IpAddr, prefix: &str) -> bool {
    let (net, len) = prefix.split_once('/').unwrap_or((prefix, "128"));
    let bits = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => u128::from(addr.to_bits()) << 96,
        IpAddr::V6(addr) => addr.to_bits(),
    };
    let (net, len): (IpAddr, u32) = (net.parse().unwrap(), len.parse().unwrap());
    net.is_ipv4() == addr.is_ipv4() && (bits(net) ^ bits(addr)).checked_shr(128 - len).unwrap_or(0) == 0
}

pub fn in_any(addr: IpAddr, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| within(addr, prefix))
}

pub fn is_own(addr: IpAddr) -> bool {
    in_any(addr, &OWN)
}

pub fn is_shared(addr: IpAddr) -> bool {
    in_any(addr, &SHARED)
}

pub fn is_local(addr: IpAddr) -> bool {
    is_own(addr) || is_shared(addr)
}

impl Packet {
    pub fn protocol(&self) -> u32 {
        match self.kind {
            Kind::Udp => TP_PROTO_UDP,
            Kind::Error => 0,
            _ => TP_PROTO_TCP,
        }
    }

    pub fn family(&self) -> u32 {
        if self.dst.is_ipv4() { TP_FAMILY_IPV4 } else { TP_FAMILY_IPV6 }
    }

    /// The destination port; that of a reply is one of the ports above 20000, from which all packets are sent.
    pub fn dport(&self) -> u16 {
        if self.reply { 20000 } else { self.port }
    }

    /// What the packet answers.
    pub fn opener(&self) -> Packet {
        let from = match self.from {
            From::Client | From::Server if is_own(self.dst) => From::Host,
            From::Client => From::Server,
            From::Server | From::Host => From::Client,
        };
        let kind = if self.kind == Kind::Udp { Kind::Udp } else { Kind::Syn };
        Packet { from, kind, src: self.dst, dst: self.src, reply: false, exempt: false, mark: 0, ..*self }
    }
}

impl Instance {
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}
