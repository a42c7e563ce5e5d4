//! Where the library does not do what the contract says: packets that are not compared. Each entry goes when the library or
//! the manual is corrected.

use tproxy::ffi::*;

use crate::model::{DIVERT_PORT, From, Instance, Kind, Packet, within};

pub fn differs(instances: &[Instance], p: &Packet, iptables: bool) -> bool {
    let zero = |addr| within(addr, "0.0.0.0/8");
    // Without dst, packets from and to 0.0.0.0/8 are intercepted, not dropped.
    let unspecified = (zero(p.src) || zero(p.dst)) && instances.iter().any(|i| i.dst.is_none());
    // A connection to a transparent listener on a foreign address is not diverted with iptables.
    let listener = iptables
        && p.kind == Kind::Syn
        && p.port == DIVERT_PORT
        && instances.iter().any(|i| !i.has(TP_RULES_DIVERT_ONLY));
    // Packets of this host to reserved addresses are intercepted, if there is one instance.
    let local = p.from == From::Host && within(p.dst, "::/80") && !within(p.dst, "::1/128");
    // Of two instances that redirect with nf_tables, the last installed has the packet.
    let redirect = !iptables && instances.iter().filter(|i| i.has(TP_RULES_REDIRECT)).count() > 1;
    // With NOTRACK, packets to a foreign host are not tracked if a wildcard listener has their port.
    let untracked = p.reply && (3129..=3131).contains(&p.port) && instances.iter().any(|i| i.has(TP_RULES_NOTRACK));
    unspecified || untracked || listener || local || redirect
}
