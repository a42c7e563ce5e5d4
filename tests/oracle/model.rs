//! The contract of tp_install_rules() as a function: instances and a packet to the packet's fate.

use std::net::IpAddr;

use tproxy::ffi::*;

use crate::case::*;

impl Instance {
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
        let interface = if p.from == From::Client { "eth0" } else { "eth1" };
        let on = |list: &Vec<&str>| {
            list.iter().any(|name| name.strip_suffix('*').map_or(*name == interface, |n| interface.starts_with(n)))
        };
        // Of the proxy's host: root.
        let root = |list: &Vec<(u32, u32)>| list.iter().any(|(first, _)| *first == 0);
        let listed = |list: &Option<Vec<&str>>, addr| list.as_ref().is_none_or(|list| in_any(addr, list));
        let ports = self.ports.as_ref().is_none_or(|ports| has_port(ports, p));
        let (bypass_mark, mask) = self.bypass_mark;
        let by_origin = match p.from {
            From::Host => {
                let bypassed = mask != 0 && p.mark & mask == bypass_mark;
                let included = self.uids.as_ref().is_none_or(root) && self.gids.as_ref().is_none_or(root);
                included && !bypassed && !root(&self.bypass_uids) && !root(&self.bypass_gids)
            }
            _ => {
                let included = self.interfaces.as_ref().is_none_or(on)
                    && self.macs.as_ref().is_none_or(|macs| macs.contains(&p.from));
                included && !on(&self.bypass_interfaces) && !self.bypass_macs.contains(&p.from)
            }
        };
        let begins = p.kind == Kind::Syn || p.protocol() != TP_PROTO_TCP;
        !self.has(TP_RULES_DIVERT_ONLY)
            && (begins || !self.has(TP_RULES_NEW_ONLY))
            && (self.refuses(p) || self.serves(p) && ports)
            && !has_port(&self.bypass_ports, p)
            && by_origin
            && listed(&self.src, p.src)
            && !in_any(p.src, &self.bypass_src)
            && !self.bypass.as_ref().is_some_and(|list| in_any(p.dst, list))
            && if self.dst.is_some() { listed(&self.dst, p.dst) } else { !is_local(p.dst) }
    }

    /// Packets to these ports are refused if they are selected, whatever the listeners are.
    fn refuses(&self, p: &Packet) -> bool {
        self.families & p.family() != 0 && has_port(&self.reject_ports, p)
    }
}

fn has_port(ports: &[PortRange], p: &Packet) -> bool {
    let has = |(first, last, protocols): &PortRange| {
        (*first..=*last).contains(&p.dport()) && (*protocols == 0 || protocols & p.protocol() != 0)
    };
    p.protocol() != 0 && ports.iter().any(has)
}

/// Whether connection tracking knows what the packet answers.
fn is_reply(instances: &[Instance], p: &Packet, iptables: bool) -> bool {
    // Datagrams are tracked where the selection has ports of clients.
    let low = |i: &Instance| i.ports.as_ref().is_some_and(|ports| ports.iter().all(|(_, last, _)| *last < 1024));
    let untracked = |i: &Instance, p: &Packet| i.has(TP_RULES_NOTRACK) && i.names(p) && (p.kind != Kind::Udp || low(i));
    p.reply && {
        let opener = p.opener();
        let redirected = |n: usize| instances[n].has(TP_RULES_REDIRECT);
        let known = match fate(instances, &opener, iptables) {
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

pub fn is_reserved(addr: IpAddr) -> bool {
    in_any(addr, &["127.0.0.0/8", "0.0.0.0/8", "::/80"])
}

/// The packet's fate with these instances, of the iptables backend or else of nf_tables.
pub fn fate(instances: &[Instance], p: &Packet, iptables: bool) -> Fate {
    let exempt = p.exempt || !is_own(p.src);
    let known_reply = is_reply(instances, p, iptables);
    // NAT decides on the first packet of a connection, in either direction, and on none that connection tracking refuses.
    let redirects = |i: &Instance| i.has(TP_RULES_REDIRECT);
    let by_nat = |i: &Instance| redirects(i) && !(iptables && i.refuses(p));
    let leaves = |i: &Instance| match by_nat(i) {
        true => known_reply || p.kind == Kind::SynAck,
        false => known_reply && p.kind != Kind::Syn,
    };
    let selects = |i: &Instance| i.names(p) && !leaves(i);
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
            // The kernel itself drops packets from such addresses.
            let refused = if p.dst.is_ipv4() { is_local(p.src) } else { is_reserved(p.src) || p.src.is_multicast() };
            return if refused && p.from != From::Host { Fate::Dropped } else { Fate::Diverted };
        }
    }
    let deliver = |index: usize| match &instances[index] {
        i if i.refuses(p) => Fate::Refused,
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
    let passes = |i: &Instance| i.dead && i.has(TP_RULES_FAIL_OPEN) && !i.refuses(p);
    let first = instances.iter().position(|i| selects(i) && !passes(i));
    match first {
        None => Fate::Untouched,
        // The nat table of iptables cannot drop.
        Some(index) if is_hostile(p) && iptables && redirects(&instances[index]) => Fate::Untouched,
        Some(_) if is_hostile(p) => Fate::Dropped,
        Some(index) => deliver(index),
    }
}
