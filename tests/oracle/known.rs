//! Where the library does not do what the contract says: packets that are not compared. Each entry goes when the library or
//! the manual is corrected.

use tproxy::ffi::*;

use crate::case::{DIVERT_PORT, Fate, From, Instance, Kind, Packet, is_local, is_own, is_shared, within};
use crate::model::{fate, is_reserved};

pub fn differs(instances: &[Instance], p: &Packet, iptables: bool) -> bool {
    let any = |holds: fn(&Instance) -> bool| instances.iter().any(holds);
    let later = |holds: fn(&Instance) -> bool| instances.iter().skip(1).any(holds);
    let has = |flag| instances.iter().any(|i| i.has(flag));
    let refuses = |i: &Instance| !i.reject_ports.is_empty();
    let zero = |addr| within(addr, "0.0.0.0/8");
    let by_backend = match iptables {
        true => {
            // A connection to a transparent listener on a foreign address is not diverted.
            (p.kind == Kind::Syn && p.port == DIVERT_PORT && any(|i| !i.has(TP_RULES_DIVERT_ONLY)))
                // An instance delivers or intercepts what is sent straight to the listener of a later one.
                || instances.iter().skip(1).any(|i| p.port == i.listen.1)
                // Refusals come before interception by earlier instances, and before hostile packets are dropped.
                || later(refuses)
                || any(refuses) && (is_local(p.src) || is_reserved(p.src) || is_reserved(p.dst))
                // Packets of a transparent socket are refused.
                || any(refuses) && p.port == DIVERT_PORT
                // The host's own resets are refused.
                || any(refuses) && is_own(p.dst) && p.protocol() == TP_PROTO_TCP && has(TP_RULES_LOCAL_OUTPUT)
        }
        false => {
            // An instance whose listener is on one address, or is closed, or that refuses ports, has what an instance
            // before it selects, too.
            later(|i| !["::", "0.0.0.0"].contains(&i.listen.0) || i.dead || !i.reject_ports.is_empty())
                // Of two instances that redirect, the last installed has the packet.
                || later(|i| i.has(TP_RULES_REDIRECT))
                // No ICMP error comes for a refused datagram of this host over IPv4.
                || any(refuses) && p.from == From::Host && p.dst.is_ipv4() && p.kind == Kind::Udp
                // Packets to a foreign host are not tracked if a wildcard listener has their port.
                || has(TP_RULES_NOTRACK) && p.reply && (3129..=3131).contains(&p.port)
        }
    };
    // Without dst, packets from 0.0.0.0/8 are intercepted; routing drops them.
    let unspecified = zero(p.src) && any(|i| i.dst.is_none());
    // Packets with reserved addresses to the port of a wildcard listener are dropped, whether they are selected or not.
    let reserved = (within(p.src, "::/80") || within(p.dst, "::/80")) && (3129..=3131).contains(&p.port);
    // Packets of this host to reserved addresses are intercepted, if there is one instance.
    let own = p.from == From::Host && is_reserved(p.dst) && !is_own(p.dst);
    // Some refusals of what is sent to several hosts are answered.
    let to_several = is_shared(p.dst) && any(refuses);
    // Datagrams of transparent sockets are refused by an instance for TCP, and replies by one that redirects.
    let refused = any(refuses) && (p.exempt && p.kind == Kind::Udp || p.reply && has(TP_RULES_REDIRECT));
    // The kernel finds the routes of this host's multicasts before the library's rules.
    let multicast = p.from == From::Host && p.dst.is_multicast();
    refused
        || multicast
        || by_backend
        || unspecified
        || reserved
        || own
        || to_several
        || is_undetermined(instances, p, iptables)
}

/// Whether connection tracking takes the packet for a part of the connection depends on a random sequence number: a
/// listener here has answered what it seems to answer.
fn is_undetermined(instances: &[Instance], p: &Packet, iptables: bool) -> bool {
    p.reply && p.protocol() == TP_PROTO_TCP && matches!(fate(instances, &p.opener(), iptables), Fate::Taken(_))
}
