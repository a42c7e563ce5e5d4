//! The rules of nf_tables, everybody's, dumped; `reader` understands each.

mod reader;

use super::filter::{Chain, Condition, Hook, Origin, Part, Place};
use crate::backend::nft::{SUBSYSTEM, header};
use crate::list::List;
use crate::model::Family;
use crate::netlink::{Channel, wire};
use crate::sort;
use crate::sys;
use crate::text::Owned;
use reader::{Read, Reader};

/// NFPROTO_INET, and NFPROTO_UNSPEC for every family.
const INET: u8 = 1;
const EVERY: u8 = 0;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_ELEMENTS: u16 = 13;

/// The elements of more sets than this are not asked for, for want of time: what they choose is not known.
const SETS_MAX: usize = 200;

/// Every chain of the families IPv4, IPv6 and inet, with its rules.
///
/// EPERM without CAP_NET_ADMIN.
pub(crate) fn chains(channel: &mut Channel) -> sys::Result<Vec<Chain>> {
    let mut chains: Vec<(u8, Chain)> =
        channel.dump(SUBSYSTEM | GET_CHAIN, &header(EVERY, 0), &|_| {})?.iter().filter_map(|p| parse_chain(p)).list();
    // A host of Kubernetes has thousands of chains.
    let names = |(family, chain): &(u8, Chain)| (*family, chain.table.clone(), chain.name.clone());
    let mut numbers: Vec<_> = chains.iter().map(names).zip(0..).list();
    sort::unique(&mut numbers);
    let mut found = Vec::new();
    for payload in channel.dump(SUBSYSTEM | GET_RULE, &header(EVERY, 0), &|_| {})? {
        if let Some((place, rule)) = parse_rule(&payload) {
            found.push((place, rule));
        }
    }
    let mut sets = 0;
    for (place, mut read) in found {
        for (at, set) in std::mem::take(&mut read.port_sets) {
            sets += 1;
            let asked = (sets <= SETS_MAX).then(|| ports_of(channel, &place, &set)).flatten();
            let ports = asked.unwrap_or_default();
            let known = (!ports.is_empty()).then_some(Condition::Ports(ports));
            if let Some(part) = read.rule.parts.get_mut(at) {
                let condition = known.unwrap_or(Condition::Other);
                *part = match part {
                    Part::OnlyIfNot(_) => Part::OnlyIfNot(condition),
                    _ => Part::OnlyIf(condition),
                };
            }
        }
        let wanted = (place.family, &place.table, &place.chain);
        let at = numbers.binary_search_by(|((family, table, chain), _)| (*family, table, chain).cmp(&wanted));
        let number = at.ok().and_then(|at| numbers.get(at)).map(|(_, number): &(_, usize)| *number);
        let of = number.and_then(|number| chains.get_mut(number));
        if let Some((_, chain)) = of {
            chain.rules.push(read.rule);
        }
    }
    for (_, chain) in &mut chains {
        if chain.origin == Origin::IptablesNft {
            chain.rules.iter_mut().zip(1..).for_each(|(rule, number)| rule.handle = number);
        }
    }
    Ok(chains.into_iter().map(|(_, chain)| chain).list())
}

/// The table and the name of every chain of a family.
pub(crate) fn chain_names(channel: &mut Channel, family: Family) -> sys::Result<Vec<(String, String)>> {
    let dumped = channel.dump(SUBSYSTEM | GET_CHAIN, &header(family.nfproto(), 0), &|_| {})?;
    Ok(dumped.iter().filter_map(|payload| parse_chain(payload)).map(|(_, chain)| (chain.table, chain.name)).list())
}

/// Whether the tables of a family that are `iptables-nft`'s have rules. No more is read than that takes.
pub(crate) fn iptables_has_rules(family: Family) -> sys::Result<bool> {
    for table in IPTABLES {
        let channel = Channel::open(libc::NETLINK_NETFILTER)?;
        let header = header(family.nfproto(), 0);
        let (rules, _) = channel.dump_first(SUBSYSTEM | GET_RULE, &header, &|a| a.string(1, table), 1)?;
        if !rules.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The families whose chains see IP packets as such.
fn family_of(nfproto: u8) -> Option<Option<Family>> {
    match nfproto {
        INET => Some(None),
        2 => Some(Some(Family::V4)),
        10 => Some(Some(Family::V6)),
        _ => None,
    }
}

/// The tables of `iptables-nft`, in the families of its own.
const IPTABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// `iptables-nft` has tables and base chains of these names.
fn origin_of(family: Option<Family>, table: &str) -> Origin {
    match (family, table) {
        (Some(_), table) if IPTABLES.contains(&table) => Origin::IptablesNft,
        _ => Origin::Nft,
    }
}

fn parse_chain(payload: &[u8]) -> Option<(u8, Chain)> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const HOOK: u16 = 4;
    const POLICY: u16 = 5;
    const HOOK_NUMBER: u16 = 1;
    const HOOK_PRIORITY: u16 = 2;
    let nfproto = *payload.first()?;
    let family = family_of(nfproto)?;
    let attrs = payload.get(header(0, 0).len()..)?;
    let text = |kind| Some(wire::string_of(attrs, kind)?.owned());
    let (table, name) = (text(TABLE)?, text(NAME)?);
    let hook = wire::attribute(attrs, HOOK).and_then(|hook| {
        let number = |kind| wire::be32_of(hook, kind);
        Some(Hook { place: Place::of_number(number(HOOK_NUMBER)?)?, priority: number(HOOK_PRIORITY)? as i32 })
    });
    // NF_DROP is 0.
    let drops = hook.is_some() && wire::be32_of(attrs, POLICY) == Some(0);
    let shouts = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase());
    let origin = match hook {
        Some(_) if !shouts(&name) => Origin::Nft,
        _ => origin_of(family, &table),
    };
    Some((nfproto, Chain { origin, family, table, name, hook, drops, rules: Vec::new() }))
}

/// The chain that a rule is in.
#[derive(Debug)]
struct Whereabouts {
    family: u8,
    table: String,
    chain: String,
}

fn parse_rule(payload: &[u8]) -> Option<(Whereabouts, Read)> {
    const TABLE: u16 = 1;
    const CHAIN: u16 = 2;
    const HANDLE: u16 = 3;
    const EXPRESSIONS: u16 = 4;
    let family = *payload.first()?;
    family_of(family)?;
    let attrs = payload.get(header(0, 0).len()..)?;
    let text = |kind| Some(wire::string_of(attrs, kind)?.owned());
    let place = Whereabouts { family, table: text(TABLE)?, chain: text(CHAIN)? };
    let mut reader = Reader::default();
    for (_, expression) in wire::attributes(wire::attribute(attrs, EXPRESSIONS).unwrap_or_default()) {
        reader.expression(expression);
    }
    reader.read.rule.handle = wire::attribute(attrs, HANDLE).and_then(wire::be64).unwrap_or(0);
    Some((place, reader.read))
}

/// The ranges of ports that a set holds; none if it is not one of ports.
fn ports_of(channel: &mut Channel, place: &Whereabouts, set: &str) -> Option<Vec<(u16, u16)>> {
    let dumped = channel.dump(SUBSYSTEM | GET_ELEMENTS, &header(place.family, 0), &|a| {
        a.string(1, &place.table);
        a.string(2, set);
    });
    let mut elements = Vec::new();
    for payload in dumped.ok()? {
        elements.extend(parse_elements(payload.get(header(0, 0).len()..)?));
    }
    Some(port_ranges(elements))
}

/// The keys of a message of elements, and which of them are ends of intervals.
fn parse_elements(attrs: &[u8]) -> Vec<(Vec<u8>, bool)> {
    const ELEMENTS: u16 = 3;
    const FLAGS: u16 = 3;
    const END: u32 = 1;
    let element = |(_, element): (u16, &[u8])| {
        let key = wire::attribute(wire::attribute(element, 1)?, 1)?.to_vec();
        let flags = wire::be32_of(element, FLAGS).unwrap_or(0);
        Some((key, flags & END != 0))
    };
    wire::attributes(wire::attribute(attrs, ELEMENTS).unwrap_or_default()).filter_map(element).list()
}

/// Keys as ranges: in a set of intervals each start goes up to the next end, in another each key is itself.
fn port_ranges(elements: Vec<(Vec<u8>, bool)>) -> Vec<(u16, u16)> {
    let intervals = elements.iter().any(|(_, end)| *end);
    let mut keys: Vec<(u16, bool)> = elements
        .iter()
        .filter_map(|(key, end)| Some((u16::from_be_bytes(key.get(..2)?.try_into().ok()?), *end)))
        .list();
    if keys.len() != elements.len() || elements.iter().any(|(key, _)| key.len() != 2) {
        return Vec::new();
    }
    // Where one range ends and the next begins, the end comes first.
    sort::by_key(&mut keys, |(port, end)| (*port, !*end));
    let mut ranges = Vec::new();
    let mut keys = keys.into_iter().peekable();
    while let Some((first, end)) = keys.next() {
        if end {
            continue;
        }
        let last = match keys.peek() {
            _ if !intervals => first,
            Some((next, _)) => next.saturating_sub(1),
            None => u16::MAX,
        };
        ranges.push((first, last));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::nft::object::{Object, Variant};
    use crate::backend::nft::statement::{Statement, Verdict as Ours};
    use crate::backend::seen::filter::{Rule, Verdict};
    use crate::model::{Mark, Protocol};
    use crate::netlink::wire::Buffer;
    use proptest::prelude::*;

    /// A rule of ours as the kernel would dump it: the attributes are the same.
    fn read_back(statements: Vec<Statement>) -> Rule {
        let object = Object::Rule { chain: "c", statements, comment: "" };
        let mut buffer = Buffer::default();
        buffer.message(1, 0, 1, &header(INET, 0), |a| object.encode("t", a));
        let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
        // NFTA_RULE_CHAIN is 2 in both directions; the expressions are attribute 4.
        parse_rule(message.payload).unwrap().1.rule
    }

    #[test]
    fn our_own_rules_are_understood() {
        let mark = Mark::DEFAULT;
        let rule = read_back(vec![
            Statement::Family(Family::V4),
            Statement::Protocol(Protocol::Tcp),
            Statement::DestinationPort(80),
            Statement::MarkIs(mark),
            Statement::DestinationIsLocal,
            Statement::TransparentSocket,
            Statement::Tproxy { family: Some(Family::V4), addr: Some([127, 0, 0, 1].into()), port: 3129 },
            Statement::SetMark(mark),
            Statement::Count("x"),
            Statement::Verdict(Ours::Accept),
        ]);
        let only = Part::OnlyIf;
        assert_eq!(
            rule.parts,
            [
                only(Condition::Family(Family::V4)),
                only(Condition::Protocol(6)),
                only(Condition::Ports(vec![(80, 80)])),
                only(Condition::Mark { mask: 0x3000, value: 0x2000 }),
                only(Condition::DestinationIsLocal),
                only(Condition::DestinationIsLocal),
                only(Condition::TransparentSocket),
                Part::Tproxy { family: Some(Family::V4), addr: Some([127, 0, 0, 1].into()), port: 3129 },
                Part::SetMark { keep: !0x3000, set: Some(0x2000) },
                Part::Verdict(Verdict::Accept),
            ]
        );
        let rule = read_back(vec![Statement::Redirect { port: 1 }]);
        assert_eq!(rule.parts, [Part::Redirect(Some(1))]);
        let rule = read_back(vec![Statement::Dnat { addr: [127, 0, 0, 1].into(), port: 1 }, Statement::NotTranslated]);
        let tracked = only(Condition::Connection { states: None });
        assert_eq!(rule.parts, [Part::TranslateDestination(Some([127, 0, 0, 1].into())), tracked.clone()]);
        let rule = read_back(vec![Statement::Answer, Statement::Verdict(Ours::Return)]);
        assert_eq!(rule.parts, [tracked, Part::Verdict(Verdict::Return)]);
        let set = crate::backend::nft::object::SetName { base: "ports", len: None, variant: Variant::First };
        let rule = read_back(vec![Statement::DestinationPortIn(set), Statement::Verdict(Ours::Jump("j"))]);
        assert_eq!(rule.parts, [only(Condition::Other), Part::Verdict(Verdict::Jump("j".to_owned()))]);
    }

    #[test]
    fn elements_become_ranges() {
        let be = |port: u16| port.to_be_bytes().to_vec();
        assert_eq!(port_ranges(vec![(be(443), false), (be(80), false)]), [(80, 80), (443, 443)]);
        let intervals =
            vec![(be(0), true), (be(80), false), (be(91), true), (be(91), false), (be(92), true), (be(9000), false)];
        assert_eq!(port_ranges(intervals), [(80, 90), (91, 91), (9000, u16::MAX)]);
        assert_eq!(port_ranges(vec![(vec![0; 4], false)]), []);
    }

    proptest! {
        #[test]
        fn no_dump_panics(payload in wire::odd::answer(4)) {
            parse_rule(&payload);
            parse_chain(&payload);
            parse_elements(&payload);
        }

        #[test]
        fn a_truncated_rule_is_read_as_far_as_it_goes(cut in 0..400usize) {
            let statements = vec![Statement::MarkIs(Mark::DEFAULT), Statement::Tproxy { family: None, addr: None, port: 1 }];
            let object = Object::Rule { chain: "c", statements, comment: "" };
            let mut buffer = Buffer::default();
            buffer.message(1, 0, 1, &header(INET, 0), |a| object.encode("t", a));
            let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
            parse_rule(message.payload.get(..cut.min(message.payload.len())).unwrap());
        }
    }
}
