//! Reads matches and targets of iptables, which both variants use, and the tables of legacy iptables.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use socket2::{Domain, Socket, Type};

use super::filter::{Chain, Condition, Hook, HookPoint, Origin, Part, Rule, Verdict};
use crate::model::Family;
use crate::name::Name;
use crate::netlink::wire::{u16_at, u32_at};
use crate::sys;

/// Converts a match (`-m`), by its name and its `struct xt_*_info`.
pub(crate) fn matched(name: &str, info: &[u8]) -> Vec<Part> {
    let number = |at| u32_at(info, at).unwrap_or(0);
    let (condition, inverted) = match name {
        "comment" => return Vec::new(),
        // xt_mark_mtinfo1: mark, mask, invert.
        "mark" => (Condition::Mark { mask: number(4), value: number(0) }, info.get(8) == Some(&1)),
        // xt_addrtype_info_v1: source, dest, flags (XT_ADDRTYPE_INVERT_DEST 2); XT_ADDRTYPE_LOCAL is 4.
        "addrtype" => match u16_at(info, 2) {
            Some(4) => (Condition::DestinationIsLocal, number(4) & 2 != 0),
            _ => (Condition::Other, false),
        },
        "tcp" | "udp" => return ports(name, info),
        "socket" => (Condition::TransparentSocket, false),
        // xt_rpfilter_info: XT_RPFILTER_VALID_MARK 2, _INVERT 8.
        "rpfilter" => {
            let flags = info.first().copied().unwrap_or(0);
            (Condition::RpFilterMiss { mark: flags & 2 != 0 }, flags & 8 == 0)
        }
        // xt_conntrack_mtinfo3: state_mask is the 16-bit number behind the addresses, ports and match flags.
        "conntrack" | "state" => (Condition::Connection { states: connection_states(name, info) }, false),
        _ => (Condition::Other, false),
    };
    vec![if inverted { Part::OnlyIfNot(condition) } else { Part::OnlyIf(condition) }]
}

/// xt_tcp and xt_udp: source ports, destination ports; for TCP an option, a mask and a value of flags; inversion flags
/// (XT_TCP_INV_DSTPT 2, the same for UDP).
fn ports(name: &str, info: &[u8]) -> Vec<Part> {
    const ALL: (u16, u16) = (0, u16::MAX);
    let range = |at| (u16_at(info, at).unwrap_or(ALL.0), u16_at(info, at + 2).unwrap_or(ALL.1));
    let byte = |at: usize| info.get(at).copied().unwrap_or(0);
    let tcp = name == "tcp";
    let inverted = byte(if tcp { 11 } else { 8 });
    let (first, last) = range(4);
    let mut parts = Vec::new();
    if inverted & 2 != 0 {
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
        // xt_connmark_tginfo1: ctmark, ctmask, nfmask, mode (XT_CONNMARK_RESTORE 2).
        "CONNMARK" if info.get(12) == Some(&2) => vec![Part::SetMark { keep: !number(8), set: None }],
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

/// Returns the names of the existing tables of legacy iptables. (A query for another table would create it.)
///
/// EACCES: only root may read the names. ENOENT: /proc does not exist.
pub(crate) fn legacy_tables(family: Family) -> sys::Result<Vec<String>> {
    const DIRECTORY: &str = "/proc/thread-self/net";
    let file = match family {
        Family::V4 => "ip_tables_names",
        Family::V6 => "ip6_tables_names",
    };
    match std::fs::read_to_string(format!("{DIRECTORY}/{file}")).map_err(sys::Errno::from) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        // The kernel has no legacy iptables.
        Err(sys::Errno(libc::ENOENT)) if std::fs::exists(DIRECTORY).unwrap_or(false) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Returns the chains of a table of legacy iptables. EFBIG: the table is too large.
pub(crate) fn legacy_chains(family: Family, table: &str) -> sys::Result<Vec<Chain>> {
    /// About twenty thousand rules.
    const MOST: usize = 4 << 20;
    let (info, entries) = legacy_entries(family, table, MOST)?;
    Ok(parse_legacy(family, table, &info, &entries))
}

/// Returns the names of all user-defined chains in a table of legacy iptables. Names that are not UTF-8 are omitted.
pub(crate) fn legacy_chain_names(family: Family, table: &str) -> sys::Result<Vec<String>> {
    /// A table of this size has about 200,000 rules.
    const MOST: usize = 64 << 20;
    let (_, entries) = legacy_entries(family, table, MOST)?;
    let names = entries_of(family, &entries).filter_map(|entry| Some(entry.begins()?.as_str()?.to_owned()));
    Ok(names.collect())
}

/// Whether a table of legacy iptables has more than its built-in chains and policies.
pub(crate) fn legacy_has_rules(family: Family, table: &str) -> sys::Result<bool> {
    let socket = legacy_socket(family)?;
    let info = legacy_info(&socket, family, table)?;
    // struct ipt_getinfo: valid_hooks, number of entries. Each hook has a policy, and an entry ends the table.
    let hooks = u32_at(&info, 32).unwrap_or(0).count_ones();
    Ok(u32_at(&info, INFO - 8).unwrap_or(0) > hooks + 1)
}

/// Sizes of `struct ipt_getinfo`, which is the same for IPv6, and of the name in it.
const INFO: usize = 84;
const NAME: usize = 32;

/// The options can be read from any socket of the family.
fn legacy_socket(family: Family) -> sys::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    Ok(Socket::new(domain, Type::DGRAM.cloexec(), None)?)
}

/// Reads an option whose buffer begins with the name of the table.
fn ask_legacy(socket: &Socket, family: Family, option: i32, table: &str, buffer: &mut [u8]) -> sys::Result<()> {
    let level = match family {
        Family::V4 => libc::SOL_IP,
        Family::V6 => libc::SOL_IPV6,
    };
    buffer.iter_mut().zip(table.bytes().take(NAME - 1)).for_each(|(point, byte)| *point = byte);
    sys::getsockopt_bytes(socket.as_fd(), level, option, buffer).map(drop)
}

fn legacy_info(socket: &Socket, family: Family, table: &str) -> sys::Result<[u8; INFO]> {
    /// IPT_SO_GET_INFO, the same number for IPv6.
    const GET_INFO: i32 = 64;
    let mut info = [0; INFO];
    ask_legacy(socket, family, GET_INFO, table, &mut info)?;
    Ok(info)
}

/// Reads a table: `struct ipt_getinfo` and the entries. EFBIG: the entries exceed the maximum size.
fn legacy_entries(family: Family, table: &str, most: usize) -> sys::Result<([u8; INFO], Vec<u8>)> {
    /// IPT_SO_GET_ENTRIES, the same number for IPv6, and the head of `struct ipt_get_entries`.
    const GET_ENTRIES: i32 = 65;
    const HEAD: usize = 40;
    /// EAGAIN: the table was replaced between the two queries, and its size has changed.
    const TRIES: usize = 16;
    let socket = legacy_socket(family)?;
    for _ in 0..TRIES {
        let info = legacy_info(&socket, family, table)?;
        let size = u32_at(&info, INFO - 4).unwrap_or(0) as usize;
        if size > most {
            return Err(sys::Errno(libc::EFBIG));
        }
        let mut entries = Vec::new();
        entries.try_reserve_exact(HEAD + size).map_err(|_| sys::Errno(libc::ENOMEM))?;
        entries.resize(HEAD + size, 0);
        if let Some(point) = entries.get_mut(NAME..NAME + 4) {
            point.copy_from_slice(&(size as u32).to_ne_bytes());
        }
        match ask_legacy(&socket, family, GET_ENTRIES, table, &mut entries) {
            Ok(()) => {
                entries.drain(..HEAD);
                return Ok((info, entries));
            }
            Err(sys::Errno(libc::EAGAIN)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(sys::Errno(libc::EAGAIN))
}

/// Offsets of the parts of `struct ipt_entry` or `ip6t_entry`.
struct Layout {
    in_interface: usize,
    out_interface: usize,
    protocol: usize,
    flags: usize,
    goto: u8,
    target_offset: usize,
    next_offset: usize,
    len: usize,
}

const V4: Layout = Layout {
    in_interface: 16,
    out_interface: 32,
    protocol: 80,
    flags: 82,
    goto: 2,
    target_offset: 88,
    next_offset: 90,
    len: 112,
};
const V6: Layout = Layout {
    in_interface: 64,
    out_interface: 80,
    protocol: 128,
    flags: 131,
    goto: 4,
    target_offset: 140,
    next_offset: 142,
    len: 168,
};
/// `struct xt_entry_match` and `xt_entry_target`: size, name, revision.
const XT_HEADER: usize = 32;

struct Entry<'a> {
    at: usize,
    next: usize,
    bytes: &'a [u8],
    target_offset: usize,
    target: (&'a str, u32, &'a [u8]),
}

impl Entry<'_> {
    /// Returns the name of the chain that begins after this entry: the entry has the target ERROR with the name.
    fn begins(&self) -> Option<Name> {
        let ("ERROR", _, name) = self.target else { return None };
        // The last entry of a table has the same target.
        Some(Name::new(name))
    }
}

/// Reads a match or a target: its size, name, revision and data. A name that is not UTF-8 is unknown.
fn extension(bytes: &[u8]) -> Option<(usize, &str, u32, &[u8])> {
    let size = usize::from(u16_at(bytes, 0)?);
    let name = bytes.get(2..31)?.split(|byte| *byte == 0).next()?;
    let data = bytes.get(XT_HEADER..size)?;
    Some((size, std::str::from_utf8(name).unwrap_or("?"), u32::from(*bytes.get(31)?), data))
}

fn layout(family: Family) -> &'static Layout {
    if family == Family::V4 { &V4 } else { &V6 }
}

/// Reads the entries of a table up to the first invalid one.
fn entries_of(family: Family, blob: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let entry = entry(layout(family), blob, at)?;
        at = entry.next;
        Some(entry)
    })
}

fn parse_legacy(family: Family, table: &str, info: &[u8], blob: &[u8]) -> Vec<Chain> {
    let layout = layout(family);
    let entries: Vec<Entry<'_>> = entries_of(family, blob).collect();
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

fn entry<'a>(layout: &Layout, blob: &'a [u8], at: usize) -> Option<Entry<'a>> {
    let rest = blob.get(at..)?;
    let target_offset = usize::from(u16_at(rest, layout.target_offset)?);
    let len = usize::from(u16_at(rest, layout.next_offset)?);
    if target_offset < layout.len || len < target_offset + XT_HEADER {
        return None;
    }
    let bytes = rest.get(..len)?;
    let (_, name, revision, data) = extension(bytes.get(target_offset..)?)?;
    Some(Entry { at, next: at + len, bytes, target_offset, target: (name, revision, data) })
}

fn legacy_rule(layout: &Layout, entry: &Entry<'_>, chains: &HashMap<usize, Name>) -> Vec<Part> {
    let mut parts = Vec::new();
    let bytes = entry.bytes;
    /// IPT_INV_VIA_IN, IPT_INV_PROTO, the same for IPv6.
    const NOT_INTERFACE: u8 = 1;
    const NOT_PROTOCOL: u8 = 0x40;
    let inverted = bytes.get(layout.flags + 1).copied().unwrap_or(0);
    let only_if = |condition, inverting| match inverted & inverting {
        0 => Part::OnlyIf(condition),
        _ => Part::OnlyIfNot(condition),
    };
    let protocol = u16_at(bytes, layout.protocol).unwrap_or(0);
    if protocol != 0 {
        parts.push(only_if(Condition::Protocol(protocol as u8), NOT_PROTOCOL));
    }
    let addresses = bytes.get(..layout.in_interface).unwrap_or_default();
    // Addresses with their masks, interfaces, and inversion flags.
    let interface = bytes.get(layout.in_interface..layout.in_interface + 16).unwrap_or_default();
    let outgoing = bytes.get(layout.out_interface).copied().unwrap_or(0);
    if interface.starts_with(b"lo\0") {
        parts.push(only_if(Condition::Loopback, NOT_INTERFACE));
    } else if interface.first().is_some_and(|byte| *byte != 0) {
        parts.push(Part::OnlyIf(Condition::Other));
    }
    let others = inverted & !(NOT_INTERFACE | NOT_PROTOCOL);
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
    const DROP: i32 = -1;
    const ACCEPT: i32 = -2;
    const RETURN: i32 = -5;
    match verdict {
        DROP => Some(Verdict::Drop),
        ACCEPT => Some(Verdict::Accept),
        RETURN => Some(Verdict::Return),
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

/// NF_IP_PRI_* of `linux/netfilter_ipv4.h`.
fn legacy_priority(table: &str, point: HookPoint) -> i32 {
    match (table, point) {
        ("raw", _) => -300,
        ("mangle", _) => -150,
        ("nat", HookPoint::Prerouting | HookPoint::Output) => -100,
        ("nat", _) => 100,
        ("security", _) => 50,
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
