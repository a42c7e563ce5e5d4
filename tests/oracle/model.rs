//! The contract of tp_install_rules() as a function: instances and a packet to the packet's fate.

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
}

/// An instance in the order of installation.
#[derive(Clone, Debug, Default)]
pub struct Instance {
    pub flags: u32,
    pub families: u32,
    pub protocols: u32,
    pub ports: Option<Vec<(u16, u16)>>,
    pub dst: Option<Vec<&'static str>>,
    pub src: Option<Vec<&'static str>>,
    pub bypass: Option<Vec<&'static str>>,
    pub interfaces: Option<Vec<&'static str>>,
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
    /// The host answers for a redirected connection that nobody listens for.
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

fn in_any(addr: IpAddr, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| within(addr, prefix))
}

pub fn is_own(addr: IpAddr) -> bool {
    in_any(addr, &OWN)
}

pub fn is_shared(addr: IpAddr) -> bool {
    in_any(addr, &SHARED)
}

fn is_local(addr: IpAddr) -> bool {
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
    fn dport(&self) -> u16 {
        if self.reply { 20000 } else { self.port }
    }

    /// What the packet answers.
    pub fn opener(&self) -> Packet {
        let from = match self.from {
            From::Server if is_own(self.dst) => From::Host,
            From::Client => From::Server,
            From::Server | From::Host => From::Client,
        };
        let kind = if self.kind == Kind::Udp { Kind::Udp } else { Kind::Syn };
        Packet { from, kind, src: self.dst, dst: self.src, reply: false, exempt: false, ..*self }
    }
}

impl Instance {
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    fn addr(&self) -> IpAddr {
        self.listen.0.parse().unwrap()
    }

    pub fn serves_family(&self, family: u32) -> bool {
        let listener = self.addr();
        let own = if listener.is_ipv4() { TP_FAMILY_IPV4 } else { TP_FAMILY_IPV6 };
        self.families & family != 0 && (self.listen.0 == "::" || own == family || self.has(TP_RULES_DIVERT_ONLY))
    }

    fn serves(&self, p: &Packet) -> bool {
        self.serves_family(p.family()) && self.protocols & p.protocol() != 0
    }

    /// To the listener's own address and port, not intercepted.
    fn drops_direct(&self, p: &Packet) -> bool {
        let addr = self.addr();
        !self.has(TP_RULES_ALLOW_DIRECT | TP_RULES_DIVERT_ONLY)
            && self.serves(p)
            && p.dport() == self.listen.1
            && (is_local(p.dst) || within(p.dst, "fe80::/10"))
            && !addr.is_loopback()
            && (addr.is_unspecified() || addr == p.dst)
    }

    /// The configuration names the packet, apart from whether it is a reply.
    fn names(&self, p: &Packet) -> bool {
        let listed = |list: &Option<Vec<&str>>, addr| list.as_ref().is_none_or(|list| in_any(addr, list));
        let interface = if p.from == From::Client { "eth0" } else { "eth1" };
        let by = |list: &Vec<&str>| {
            list.iter().any(|n| *n == interface || n.ends_with('*') && interface.starts_with(&n[..n.len() - 1]))
        };
        !self.has(TP_RULES_DIVERT_ONLY)
            && self.serves(p)
            && !(self.has(TP_RULES_NEW_ONLY) && p.protocol() == TP_PROTO_TCP && p.kind != Kind::Syn)
            && self.ports.as_ref().is_none_or(|ports| ports.iter().any(|(a, z)| (*a..=*z).contains(&p.dport())))
            && (p.from == From::Host || self.interfaces.as_ref().is_none_or(by))
            && listed(&self.src, p.src)
            && !self.bypass.as_ref().is_some_and(|list| in_any(p.dst, list))
            && if self.dst.is_some() { listed(&self.dst, p.dst) } else { !is_local(p.dst) }
    }
}

/// Whether connection tracking knows what the packet answers.
fn is_reply(instances: &[Instance], p: &Packet) -> bool {
    let untracked = |i: &Instance, p: &Packet| i.has(TP_RULES_NOTRACK) && i.names(p);
    p.reply && {
        let opener = p.opener();
        let redirected = |n: usize| instances[n].has(TP_RULES_REDIRECT);
        let known = match fate(instances, &opener) {
            Fate::Taken(index) => !redirected(index),
            fate => fate == Fate::Untouched || fate == Fate::Diverted,
        };
        known && !instances.iter().any(|i| untracked(i, &opener))
    }
}

/// Addresses that no other host can have sent from or to.
fn is_hostile(p: &Packet) -> bool {
    is_local(p.src) || is_reserved(p.src) || is_reserved(p.dst)
}

fn is_reserved(addr: IpAddr) -> bool {
    in_any(addr, &["127.0.0.0/8", "0.0.0.0/8", "::/80"])
}

pub fn fate(instances: &[Instance], p: &Packet) -> Fate {
    let exempt = p.exempt || !is_own(p.src);
    let known_reply = is_reply(instances, p);
    let selects = |i: &Instance| i.names(p) && !(known_reply && p.kind != Kind::Syn);
    let mut looped = None;
    if p.from == From::Host {
        looped = instances.iter().position(|i| i.has(TP_RULES_LOCAL_OUTPUT) && !exempt && selects(i));
        if looped.is_none() && !is_own(p.dst) {
            return Fate::Untouched;
        }
    }
    if instances.iter().any(|i| i.drops_direct(p)) {
        return Fate::Dropped;
    }
    if in_any(p.dst, &FOREIGN) && p.dport() == DIVERT_PORT {
        let diverts = |i: &Instance| {
            let any = i.families & p.family() != 0 && !i.has(TP_RULES_REDIRECT);
            any && (p.kind == Kind::Error || i.protocols & p.protocol() != 0)
        };
        if instances.iter().any(diverts) {
            return if p.dst.is_ipv6() && is_hostile_v6(p) { Fate::Dropped } else { Fate::Diverted };
        }
    }
    let deliver = |index: usize| match &instances[index] {
        i if !i.dead => Fate::Taken(index),
        i if i.has(TP_RULES_REDIRECT) => Fate::Refused,
        _ => Fate::Dropped,
    };
    if let Some(index) = looped {
        return if is_reserved(p.dst) && !is_own(p.dst) { Fate::Dropped } else { deliver(index) };
    }
    if p.from == From::Host {
        return Fate::Untouched;
    }
    let first = (0..instances.len())
        .find(|n| selects(&instances[*n]) && !(instances[*n].dead && instances[*n].has(TP_RULES_FAIL_OPEN)));
    match first {
        None => Fate::Untouched,
        Some(_) if is_hostile(p) => Fate::Dropped,
        Some(index) => deliver(index),
    }
}

fn is_hostile_v6(p: &Packet) -> bool {
    in_any(p.src, &["::/80"]) || in_any(p.dst, &["::/80"])
}
