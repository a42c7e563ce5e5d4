//! Reads matches and targets of iptables, which both variants use, and the tables of legacy iptables.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::filter::{Chain, Condition, Hook, HookPoint, Origin, Part, Rule, Verdict};
use crate::backend::xtables::{Layout, LegacyEntry, entries_of, extension, layout, legacy_entries};
use crate::model::Family;
use crate::name::Name;
use crate::netlink::uapi::*;
use crate::netlink::wire::{u16_at, u32_at};
use crate::sys;

/// Converts a match (`-m`), by its name and its `struct xt_*_info`.
pub(crate) fn matched(name: &str, info: &[u8]) -> Vec<Part> {
    let number = |at| u32_at(info, at).unwrap_or(0);
    let (condition, inverted) = match name {
        "comment" => return Vec::new(),
        // xt_mark_mtinfo1: mark, mask, invert.
        "mark" => (Condition::Mark { mask: number(4), value: number(0) }, info.get(8) == Some(&1)),
        // xt_addrtype_info_v1: source, dest, flags.
        "addrtype" => match u16_at(info, 2) {
            Some(XT_ADDRTYPE_LOCAL) => (Condition::DestinationIsLocal, number(4) & XT_ADDRTYPE_INVERT_DEST != 0),
            _ => (Condition::Other, false),
        },
        "tcp" | "udp" => return ports(name, info),
        "socket" => (Condition::TransparentSocket, false),
        // xt_rpfilter_info: flags.
        "rpfilter" => {
            let flags = info.first().copied().unwrap_or(0);
            (Condition::RpFilterMiss { mark: flags & XT_RPFILTER_VALID_MARK != 0 }, flags & XT_RPFILTER_INVERT == 0)
        }
        // xt_conntrack_mtinfo3: state_mask is the 16-bit number behind the addresses, ports and match flags.
        "conntrack" | "state" => (Condition::Connection { states: connection_states(name, info) }, false),
        _ => (Condition::Other, false),
    };
    vec![if inverted { Part::OnlyIfNot(condition) } else { Part::OnlyIf(condition) }]
}

/// xt_tcp and xt_udp: source ports, destination ports; for TCP an option, a mask and a value of flags; inversion flags
/// (XT_TCP_INV_DSTPT, the same for UDP).
fn ports(name: &str, info: &[u8]) -> Vec<Part> {
    const ALL: (u16, u16) = (0, u16::MAX);
    let range = |at| (u16_at(info, at).unwrap_or(ALL.0), u16_at(info, at + 2).unwrap_or(ALL.1));
    let byte = |at: usize| info.get(at).copied().unwrap_or(0);
    let tcp = name == "tcp";
    let inverted = byte(if tcp { 11 } else { 8 });
    let (first, last) = range(4);
    let mut parts = Vec::new();
    if inverted & XT_TCP_INV_DSTPT != 0 {
        parts.push(Part::OnlyIfNot(Condition::Ports(first, last)));
    } else if (first, last) != ALL {
        parts.push(Part::OnlyIf(Condition::Ports(first, last)));
    }
    if range(0) != ALL || tcp && (byte(8) != 0 || byte(9) != 0) {
        parts.push(Part::OnlyIf(Condition::Other));
    }
    parts
}

fn connection_states(name: &str, info: &[u8]) -> Option<u32> {
    /// xt_conntrack_mtinfo3: 128 bytes of addresses, two 32-bit and five 16-bit numbers, the flags, then the mask.
    const STATE_MASK_AT: usize = 128 + 2 * 4 + 5 * 2 + 2 * 2;
    match name {
        "state" => u32_at(info, 0),
        _ => u16_at(info, STATE_MASK_AT).map(u32::from),
    }
}

/// Converts a target (`-j`), by its name, revision and `struct xt_*_info`.
pub(crate) fn target(name: &str, revision: u32, info: &[u8]) -> Vec<Part> {
    let number = |at| u32_at(info, at).unwrap_or(0);
    match name {
        // xt_mark_tginfo2: mark, mask.
        "MARK" => vec![Part::SetMark { keep: !number(4), set: Some(number(0)) }],
        // xt_connmark_tginfo1: ctmark, ctmask, nfmask, mode.
        "CONNMARK" if info.get(12) == Some(&XT_CONNMARK_RESTORE) => vec![Part::SetMark { keep: !number(8), set: None }],
        "TPROXY" => tproxy(revision, info),
        // nf_nat_range2: flags, lowest address. In revision 0, the number of ranges precedes them.
        "DNAT" => {
            let addr = info.get(4..20).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
            vec![Part::TranslateDestination(addr.and_then(|addr| translated(revision, addr)))]
        }
        "REDIRECT" => vec![Part::Redirect(redirected(info))],
        "NETMAP" => vec![Part::TranslateDestination(None)],
        "SNAT" | "MASQUERADE" => vec![Part::TranslateSource],
        "REJECT" => vec![Part::Verdict(Verdict::Drop)],
        "NFQUEUE" => vec![Part::Verdict(Verdict::Other)],
        _ => Vec::new(),
    }
}

/// xt_tproxy_target_info (and _v1): mask, value, address (16 bytes), port.
fn tproxy(revision: u32, info: &[u8]) -> Vec<Part> {
    let addr_len = if revision == 0 { 4 } else { 16 };
    let (Some(mask), Some(value), Some(addr), Some(port)) =
        (u32_at(info, 0), u32_at(info, 4), info.get(8..8 + addr_len), info.get(8 + addr_len..10 + addr_len))
    else {
        return Vec::new();
    };
    let port = u16::from_be_bytes(port.try_into().unwrap_or_default());
    // The chain determines the family. An IPv4 address is in the first four bytes.
    let addr = match (<[u8; 4]>::try_from(addr), <[u8; 16]>::try_from(addr)) {
        (Ok([0, 0, 0, 0]), _) | (_, Ok([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])) => None,
        (Ok(v4), _) => Some(IpAddr::from(v4)),
        (_, Ok([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])) => Some(IpAddr::from([a, b, c, d])),
        (_, Ok(v6)) => Some(IpAddr::from(v6)),
        _ => None,
    };
    let deliver = Part::Tproxy { family: None, addr, port };
    vec![deliver, Part::SetMark { keep: !mask, set: Some(value) }, Part::Verdict(Verdict::Accept)]
}

fn translated(revision: u32, addr: [u8; 16]) -> Option<IpAddr> {
    let [a, b, c, d, rest @ ..] = addr;
    match revision {
        0 => Some(Ipv4Addr::new(rest[0], rest[1], rest[2], rest[3]).into()),
        _ if rest == [0; 12] => Some(Ipv4Addr::new(a, b, c, d).into()),
        _ => Some(Ipv6Addr::from(addr).into()),
    }
}

/// nf_nat_ipv4_multi_range_compat: count, flags, two addresses, the lowest port; IPv6's range has 16-byte addresses.
fn redirected(info: &[u8]) -> Option<u16> {
    let at = if info.len() >= 36 { 36 } else { 16 };
    let port = u16::from_be_bytes(info.get(at..at + 2)?.try_into().ok()?);
    (port != 0).then_some(port)
}

/// Returns the chains of a table of legacy iptables. EFBIG: the table is too large.
pub(crate) fn legacy_chains(family: Family, table: &str) -> sys::Result<Vec<Chain>> {
    /// About twenty thousand rules.
    const MOST: usize = 4 << 20;
    let (info, entries) = legacy_entries(family, table, MOST)?;
    Ok(parse_legacy(family, table, &info, &entries))
}

fn parse_legacy(family: Family, table: &str, info: &[u8], blob: &[u8]) -> Vec<Chain> {
    let layout = layout(family);
    let entries: Vec<LegacyEntry<'_>> = entries_of(family, blob).collect();
    // A chain begins at the entry of a hook, or after an entry with the target ERROR.
    let mut chains: Vec<(usize, Chain, Option<usize>)> = Vec::new();
    let new = |name: Name, hook: Option<Hook>| Chain {
        origin: Origin::IptablesLegacy,
        family: Some(family),
        table: table.into(),
        name,
        hook,
        drops: false,
        rules: Vec::new(),
        cut: false,
    };
    // Sorted by their beginning, as the entries are.
    for entry in &entries {
        if let Some(name) = entry.begins() {
            chains.push((entry.next, new(name, None), None));
        }
    }
    for number in 0..5u32 {
        let valid = u32_at(info, 32).unwrap_or(0) & 1 << number != 0;
        let offset = |at: usize| u32_at(info, at + 4 * number as usize).map(|offset| offset as usize);
        if let (true, Some(start), Some(point)) = (valid, offset(36), HookPoint::of_number(number)) {
            let hook = Hook { point, priority: legacy_priority(table, point) };
            let at = chains.partition_point(|(other, ..)| *other < start);
            chains.insert(at, (start, new(legacy_name(point).into(), Some(hook)), offset(56)));
        }
    }
    let names: HashMap<usize, Name> = chains.iter().map(|(start, chain, _)| (*start, chain.name.clone())).collect();
    // After an invalid entry, more entries may follow.
    let cut = entries.last().map_or(0, |entry| entry.next) < blob.len();
    for entry in entries.iter().filter(|entry| entry.target.0 != "ERROR") {
        let Some(point) = chains.partition_point(|(start, ..)| *start <= entry.at).checked_sub(1) else { continue };
        let Some((_, chain, policy_at)) = chains.get_mut(point) else { continue };
        let parts = legacy_rule(layout, entry, &names);
        if *policy_at == Some(entry.at) {
            chain.drops = parts.contains(&Part::Verdict(Verdict::Drop));
        } else {
            chain.rules.push(Rule { handle: 0, number: chain.rules.len() + 1, parts });
        }
    }
    let chain = |(_, chain, _)| Chain { cut, ..chain };
    chains.into_iter().map(chain).collect()
}

fn legacy_rule(layout: &Layout, entry: &LegacyEntry<'_>, chains: &HashMap<usize, Name>) -> Vec<Part> {
    let mut parts = Vec::new();
    let bytes = entry.bytes;
    let inverted = bytes.get(layout.flags + 1).copied().unwrap_or(0);
    let only_if = |condition, inverting| match inverted & inverting {
        0 => Part::OnlyIf(condition),
        _ => Part::OnlyIfNot(condition),
    };
    let protocol = u16_at(bytes, layout.protocol).unwrap_or(0);
    if protocol != 0 {
        parts.push(only_if(Condition::Protocol(protocol as u8), XT_INV_PROTO));
    }
    let addresses = bytes.get(..layout.in_interface).unwrap_or_default();
    // Addresses with their masks, interfaces, and inversion flags.
    let interface = bytes.get(layout.in_interface..layout.in_interface + 16).unwrap_or_default();
    let outgoing = bytes.get(layout.out_interface).copied().unwrap_or(0);
    if interface.starts_with(b"lo\0") {
        parts.push(only_if(Condition::Loopback, IPT_INV_VIA_IN));
    } else if interface.first().is_some_and(|byte| *byte != 0) {
        parts.push(Part::OnlyIf(Condition::Other));
    }
    let others = inverted & !(IPT_INV_VIA_IN | XT_INV_PROTO);
    if addresses.iter().any(|byte| *byte != 0) || outgoing != 0 || others != 0 {
        parts.push(Part::OnlyIf(Condition::Other));
    }
    let mut at = layout.len;
    while at < entry.target_offset {
        let Some((size, name, _, data)) = bytes.get(at..entry.target_offset).and_then(extension) else { break };
        parts.extend(matched(name, data));
        at += size;
    }
    let (name, revision, data) = entry.target;
    let goto = bytes.get(layout.flags).is_some_and(|flags| flags & layout.goto != 0);
    match (name, u32_at(data, 0).map(|verdict| verdict as i32)) {
        ("", Some(verdict)) => parts.extend(standard(verdict, entry.next, goto, chains).map(Part::Verdict)),
        _ => parts.extend(target(name, revision, data)),
    }
    parts
}

/// Converts the standard target: -1 - NF_DROP, -1 - NF_ACCEPT, XT_RETURN, or the offset of a chain. The offset of the next rule means no
/// verdict.
fn standard(verdict: i32, next: usize, goto: bool, chains: &HashMap<usize, Name>) -> Option<Verdict> {
    const DROP: i32 = -1 - NF_DROP as i32;
    const ACCEPT: i32 = -1 - NF_ACCEPT as i32;
    match verdict {
        DROP => Some(Verdict::Drop),
        ACCEPT => Some(Verdict::Accept),
        XT_RETURN => Some(Verdict::Return),
        at if usize::try_from(at).is_ok_and(|at| at == next) => None,
        at => {
            let name = usize::try_from(at).ok().and_then(|at| chains.get(&at));
            Some(match name {
                Some(name) if goto => Verdict::Goto(name.clone()),
                Some(name) => Verdict::Jump(name.clone()),
                None => Verdict::Other,
            })
        }
    }
}

fn legacy_name(point: HookPoint) -> &'static str {
    match point {
        HookPoint::Prerouting => "PREROUTING",
        HookPoint::Input => "INPUT",
        HookPoint::Forward => "FORWARD",
        HookPoint::Output => "OUTPUT",
        HookPoint::Postrouting => "POSTROUTING",
    }
}

/// The priorities, which are those of IPv6 too.
fn legacy_priority(table: &str, point: HookPoint) -> i32 {
    match (table, point) {
        ("raw", _) => NF_IP_PRI_RAW,
        ("mangle", _) => NF_IP_PRI_MANGLE,
        ("nat", HookPoint::Prerouting | HookPoint::Output) => NF_IP_PRI_NAT_DST,
        ("nat", _) => NF_IP_PRI_NAT_SRC,
        ("security", _) => NF_IP_PRI_SECURITY,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn xtables_extension_of_any_bytes_does_not_panic(info in proptest::collection::vec(any::<u8>(), 0..200), revision in 0..4u32) {
            for name in ["mark", "addrtype", "tcp", "udp", "socket", "rpfilter", "conntrack", "state", "comment", "x"] {
                matched(name, &info);
            }
            for name in ["MARK", "CONNMARK", "TPROXY", "DNAT", "REDIRECT", "SNAT", "x"] {
                target(name, revision, &info);
            }
        }

        #[test]
        fn xtables_table_of_any_bytes_does_not_panic_or_loop(info in proptest::collection::vec(any::<u8>(), 0..90), blob in proptest::collection::vec(any::<u8>(), 0..900)) {
            for family in [Family::V4, Family::V6] {
                parse_legacy(family, "mangle", &info, &blob);
            }
        }

        /// Entries with valid lengths and arbitrary contents.
        #[test]
        fn xtables_entry_of_any_bytes_does_not_panic(fill: u8, target_offset in 0..400u16, next in 0..400u16) {
            let mut blob = vec![fill; 800];
            blob[88..90].copy_from_slice(&target_offset.to_ne_bytes());
            blob[90..92].copy_from_slice(&next.to_ne_bytes());
            let mut info = [0u8; 84];
            info[32..36].copy_from_slice(&31u32.to_ne_bytes());
            parse_legacy(Family::V4, "mangle", &info, &blob);
        }
    }
}
