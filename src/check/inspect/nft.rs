//! Reads all rules of nf_tables; `reader` interprets each. Other programs may have any number of rules and elements: the amount that
//! is read is bounded, and the rest is unknown.

mod reader;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::filter::{Chain, Condition, Hook, HookPoint, Origin, Part, PortSet, Ruleset};
use crate::backend::nft::{SUBSYSTEM, header, table};
use crate::backend::xtables::NFT_TABLES;
use crate::model::Family;
use crate::name::Name;
use crate::netlink::uapi::*;
use crate::netlink::{Channel, FirstRead, wire};
use crate::sys;
use reader::{Read, Reader};

/// Maximum number of chains and of rules. A Kubernetes host has about ten thousand. Each takes some microseconds and some hundred
/// bytes.
const CHAINS_MAX: usize = 20_000;
const RULES_MAX: usize = 20_000;
const SETS_MAX: usize = 20_000;
/// Maximum number of elements of port sets that are read in total. For further or large sets, single ports are queried.
const ELEMENTS_MAX: usize = 8_000;
/// Maximum number of lookups of a set by name. The kernel searches a list, so each lookup takes longer the more sets exist.
const LOOKUPS_MAX: usize = 1_000;
const COMPARED_MAX: usize = 500_000;

/// Result of reading nf_tables.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub ruleset: Ruleset,
    /// Number of objects that the kernel sent.
    pub objects: usize,
    /// Descriptions of lists that were not read completely.
    pub cut: Vec<String>,
    /// Names of the port sets, in the order of `ruleset.port_sets`; `None`: not a set of ports.
    places: Vec<Option<SetPlace>>,
    /// Remaining number of lookups of sets.
    lookups: usize,
}

/// Name of a set: the family and the name of its table, and its own name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct SetPlace {
    family: u8,
    table: Name,
    set: Name,
}

/// Reads every chain of the families IPv4, IPv6 and inet, with its rules.
///
/// EPERM without CAP_NET_ADMIN.
pub(crate) fn read() -> sys::Result<Found> {
    let mut found = Found::default();
    let (chains, _) = found.first(NFT_MSG_GETCHAIN, CHAINS_MAX, "chains", &parse_chain)?;
    let mut numbers = HashMap::new();
    for (family, chain) in chains {
        numbers.insert((family, chain.table.clone(), chain.name.clone()), found.ruleset.chains.len());
        found.ruleset.chains.push(chain);
    }
    let (rules, all) = found.first(NFT_MSG_GETRULE, RULES_MAX, "rules", &parse_rule)?;
    let mut sets: HashMap<SetPlace, usize> = HashMap::new();
    // Chains of this library are read first.
    let mut first: Vec<usize> = Vec::new();
    let mut last = 0;
    for (Whereabouts { family, table, chain }, read) in rules {
        let Some(number) = numbers.get(&(family, table.clone(), chain)).copied() else { continue };
        last = last.max(number);
        let mut rule = read.rule;
        for (at, set) in read.port_sets {
            if let Some(Part::OnlyIf(condition) | Part::OnlyIfNot(condition)) = rule.parts.get_mut(at) {
                let place = SetPlace { family, table: table.clone(), set };
                let number = *sets.entry(place).or_insert_with_key(|place| {
                    found.places.push(Some(place.clone()));
                    found.places.len() - 1
                });
                *condition = Condition::PortSet(number);
                let ours = table.as_str().is_some_and(|table| table::instance_of(table).is_some());
                if ours || rule.parts.iter().any(|part| matches!(part, Part::Tproxy { .. })) {
                    first.push(number);
                }
            }
        }
        if let Some(chain) = found.ruleset.chains.get_mut(number) {
            rule.number = chain.rules.len() + 1;
            chain.rules.push(rule);
        }
    }
    // The kernel sends rules in the order of their chains (`nf_tables_dump_rules`).
    for chain in found.ruleset.chains.iter_mut().skip(last).filter(|_| !all) {
        chain.cut = true;
    }
    found.read_sets(&first)?;
    Ok(found)
}

impl Found {
    /// Returns the first objects of a kind, and whether they are all. Notes an incomplete list.
    fn first<T>(
        &mut self,
        kind: u16,
        most: usize,
        what: &str,
        parse: &dyn Fn(&[u8]) -> Option<T>,
    ) -> sys::Result<(Vec<T>, bool)> {
        let mut channel = Channel::open_wide(libc::NETLINK_NETFILTER)?;
        let read = channel.read_first(SUBSYSTEM | kind, &header(NFPROTO_UNSPEC, 0), &|_| {}, most, parse)?;
        let FirstRead { found, objects, all } = read;
        self.objects += objects;
        if !all {
            self.cut.push(format!("nf_tables {what}: only the first {objects} were read"));
        }
        Ok((found, all))
    }

    /// Reads the small port sets, up to the maximum number of elements. Those of given chains come first.
    fn read_sets(&mut self, first: &[usize]) -> sys::Result<()> {
        self.ruleset.port_sets = vec![PortSet::default(); self.places.len()];
        if self.places.is_empty() {
            return Ok(());
        }
        // Other sets may be concatenations that begin with a port, and are not interpreted.
        let before = self.objects;
        let (of_ports, _) = self.first(NFT_MSG_GETSET, SETS_MAX, "sets", &parse_set)?;
        let of_ports: HashSet<SetPlace> = of_ports.into_iter().collect();
        for place in &mut self.places {
            place.take_if(|place| !of_ports.contains(place));
        }
        self.lookups = (COMPARED_MAX / (self.objects - before).max(1)).min(LOOKUPS_MAX);
        let (mut channel, mut left) = (None, ELEMENTS_MAX);
        for number in first.iter().copied().chain(0..self.places.len()) {
            let places = self.places.get(number).zip(self.ruleset.port_sets.get_mut(number));
            let Some((Some(place), set)) = places else { continue };
            if left == 0 || self.lookups == 0 || *set != PortSet::default() {
                continue;
            }
            let open = match channel.take() {
                Some(open) => open,
                None => Channel::open(libc::NETLINK_NETFILTER)?,
            };
            let (read, open) = elements(open, place);
            channel = open;
            self.lookups -= 1;
            if let Some((elements, all)) = read {
                self.objects += elements.len();
                left = left.saturating_sub(elements.len());
                *set = port_set(&elements, all);
            }
        }
        Ok(())
    }

    /// Queries the kernel whether these ports are in the incompletely known sets.
    pub fn ask(&mut self, ports: &[u16]) -> sys::Result<()> {
        let sets = self.places.iter().zip(&mut self.ruleset.port_sets);
        let mut sets: Vec<(&SetPlace, &mut PortSet)> =
            sets.filter_map(|(place, set)| Some((place.as_ref()?, set))).filter(|(_, set)| !set.complete).collect();
        if sets.is_empty() || ports.is_empty() {
            return Ok(());
        }
        let mut channel = Channel::open(libc::NETLINK_NETFILTER)?;
        let mut cut = false;
        for port in ports {
            // If the query fails, the set is not a set of ports.
            sets.retain_mut(|(place, set)| {
                if self.lookups == 0 {
                    cut = true;
                    return false;
                }
                self.lookups -= 1;
                self.objects += 1;
                match is_in(&mut channel, place, *port) {
                    Some(contained) => {
                        set.asked.insert(*port, contained);
                        true
                    }
                    None => false,
                }
            });
        }
        if cut {
            self.cut.push("nf_tables sets of ports: there are more than are looked up".to_owned());
        }
        Ok(())
    }
}

/// Families whose chains process IP packets.
fn family_of(nfproto: u8) -> Option<Option<Family>> {
    match nfproto {
        NFPROTO_INET => Some(None),
        NFPROTO_IPV4 => Some(Some(Family::V4)),
        NFPROTO_IPV6 => Some(Some(Family::V6)),
        _ => None,
    }
}

/// Whether `iptables-nft` uses a table and a base chain of these names.
fn origin_of(family: Option<Family>, table: &Name) -> Origin {
    match family {
        Some(_) if NFT_TABLES.iter().any(|name| *table == **name) => Origin::IptablesNft,
        _ => Origin::Nft,
    }
}

fn parse_chain(payload: &[u8]) -> Option<(u8, Chain)> {
    let nfproto = *payload.first()?;
    let family = family_of(nfproto)?;
    let attrs = payload.get(header(0, 0).len()..)?;
    let (table, name) = (wire::name_of(attrs, NFTA_CHAIN_TABLE)?, wire::name_of(attrs, NFTA_CHAIN_NAME)?);
    let hook = wire::attribute(attrs, NFTA_CHAIN_HOOK).and_then(|hook| {
        let number = |kind| wire::be32_of(hook, kind);
        Some(Hook {
            point: HookPoint::of_number(number(NFTA_HOOK_HOOKNUM)?)?,
            priority: number(NFTA_HOOK_PRIORITY)? as i32,
        })
    });
    let drops = hook.is_some() && wire::be32_of(attrs, NFTA_CHAIN_POLICY) == Some(NF_DROP);
    let shouts = |name: &Name| !name.as_bytes().is_empty() && name.as_bytes().iter().all(u8::is_ascii_uppercase);
    let origin = match hook {
        Some(_) if !shouts(&name) => Origin::Nft,
        _ => origin_of(family, &table),
    };
    Some((nfproto, Chain { origin, family, table, name, hook, drops, rules: Vec::new(), cut: false }))
}

/// Returns the chain of a rule.
#[derive(Debug)]
struct Whereabouts {
    family: u8,
    table: Name,
    chain: Name,
}

fn parse_rule(payload: &[u8]) -> Option<(Whereabouts, Read)> {
    let family = *payload.first()?;
    family_of(family)?;
    let attrs = payload.get(header(0, 0).len()..)?;
    let place = Whereabouts {
        family,
        table: wire::name_of(attrs, NFTA_RULE_TABLE)?,
        chain: wire::name_of(attrs, NFTA_RULE_CHAIN)?,
    };
    let mut reader = Reader::default();
    for (_, expression) in wire::attributes(wire::attribute(attrs, NFTA_RULE_EXPRESSIONS).unwrap_or_default()) {
        reader.expression(expression);
    }
    reader.read.rule.handle = wire::attribute(attrs, NFTA_RULE_HANDLE).and_then(wire::be64).unwrap_or(0);
    Some((place, reader.read))
}

/// Returns a set whose keys have the size of a port.
fn parse_set(payload: &[u8]) -> Option<SetPlace> {
    let family = *payload.first()?;
    let attrs = payload.get(header(0, 0).len()..)?;
    let place =
        SetPlace { family, table: wire::name_of(attrs, NFTA_SET_TABLE)?, set: wire::name_of(attrs, NFTA_SET_NAME)? };
    (wire::be32_of(attrs, NFTA_SET_KEY_LEN) == Some(2)).then_some(place)
}

/// Returns the first elements of a set and whether they are all, if the set exists; and the channel, if it can still be used.
fn elements(mut channel: Channel, place: &SetPlace) -> (Option<(Vec<Element>, bool)>, Option<Channel>) {
    /// A message has some hundred elements. Another message or the end follows the first.
    const MESSAGES_MAX: usize = 2;
    let of = |a: &mut wire::Attrs<'_>| {
        a.name(NFTA_SET_ELEM_LIST_TABLE, &place.table);
        a.name(NFTA_SET_ELEM_LIST_SET, &place.set);
    };
    let parse = |payload: &[u8]| Some(parse_elements(payload.get(header(0, 0).len()..)?));
    match channel.read_first(SUBSYSTEM | NFT_MSG_GETSETELEM, &header(place.family, 0), &of, MESSAGES_MAX, &parse) {
        Ok(FirstRead { found, all, .. }) => (Some((found.concat(), all)), Some(channel).filter(|_| all)),
        Err(_) => (None, None),
    }
}

/// Queries whether a set contains a port; `None`: the query fails. (The element `*`, which matches all other keys, is not queried.)
fn is_in(channel: &mut Channel, place: &SetPlace, port: u16) -> Option<bool> {
    let named = |a: &mut wire::Attrs<'_>| {
        a.name(NFTA_SET_ELEM_LIST_TABLE, &place.table);
        a.name(NFTA_SET_ELEM_LIST_SET, &place.set);
        a.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |a| {
            a.nest(NFTA_LIST_ELEM, |a| a.nest(NFTA_SET_ELEM_KEY, |a| a.bytes(NFTA_DATA_VALUE, &port.to_be_bytes())));
        });
    };
    match channel.get_with(SUBSYSTEM | NFT_MSG_GETSETELEM, &header(place.family, 0), &named) {
        Ok(Some(_)) => Some(true),
        Err(sys::Errno(libc::ENOENT)) => Some(false),
        _ => None,
    }
}

/// Element of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Element {
    /// `None`: it matches every key (`*`).
    key: Option<Vec<u8>>,
    /// The element is the end of an interval.
    end: bool,
}

fn parse_elements(attrs: &[u8]) -> Vec<Element> {
    let element = |(_, element): (u16, &[u8])| {
        let flags = wire::be32_of(element, NFTA_SET_ELEM_FLAGS).unwrap_or(0);
        let key = wire::attribute(element, NFTA_SET_ELEM_KEY)
            .and_then(|key| wire::attribute(key, NFTA_DATA_VALUE))
            .map(<[u8]>::to_vec);
        (key.is_some() || flags & NFT_SET_ELEM_CATCHALL != 0)
            .then_some(Element { key, end: flags & NFT_SET_ELEM_INTERVAL_END != 0 })
    };
    wire::attributes(wire::attribute(attrs, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default())
        .filter_map(element)
        .collect()
}

/// Converts elements to ranges. The set may have more elements.
fn port_set(elements: &[Element], all: bool) -> PortSet {
    if elements.iter().any(|element| element.key.is_none()) {
        return PortSet { ranges: vec![(0, u16::MAX)], complete: true, asked: BTreeMap::new() };
    }
    let intervals = elements.iter().any(|element| element.end);
    // If a range ends where the next begins, the end is sorted first.
    let key = |element: &Element| {
        let port = u16::from_be_bytes(element.key.as_deref()?.try_into().ok()?);
        Some(u32::from(port) << 1 | u32::from(!element.end))
    };
    let mut keys: Vec<u32> = elements.iter().filter_map(key).collect();
    if keys.len() != elements.len() {
        return PortSet::default();
    }
    keys.sort_unstable();
    let mut ranges = Vec::new();
    let mut keys = keys.into_iter().map(|key| ((key >> 1) as u16, key & 1 == 0)).peekable();
    while let Some((first, end)) = keys.next() {
        if end {
            continue;
        }
        let last = match keys.peek() {
            _ if !intervals => first,
            Some((next, true)) => next.saturating_sub(1),
            // If two begins follow each other, the end between them was not read. A begin without a following element extends to
            // the last port.
            Some((next, false)) if all => next.saturating_sub(1),
            None if all => u16::MAX,
            _ => first,
        };
        ranges.push((first, last));
    }
    PortSet { ranges, complete: all, asked: BTreeMap::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::nft::object::Object;
    use crate::backend::nft::set::{SetName, Variant};
    use crate::backend::nft::statement::{Statement, Verdict as Ours};
    use crate::check::inspect::filter::{Rule, Verdict};
    use crate::model::{Mark, Protocol};
    use crate::netlink::wire::Buffer;
    use proptest::prelude::*;

    /// Returns a rule of this library as the kernel would dump it: the attributes are the same.
    fn read_back(statements: Vec<Statement>) -> Rule {
        let object = Object::Rule { chain: "c", statements, comment: "" };
        let mut buffer = Buffer::default();
        buffer.message(1, 0, 1, &header(NFPROTO_INET, 0), |a| object.encode("t", a));
        let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
        parse_rule(message.payload).unwrap().1.rule
    }

    #[test]
    fn nft_rules_of_the_library_are_understood() {
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
                only(Condition::Ports(80, 80)),
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
        let rule = read_back(vec![Statement::CtReply, Statement::Verdict(Ours::Return)]);
        assert_eq!(rule.parts, [tracked, Part::Verdict(Verdict::Return)]);
        let set = SetName { base: "ports", len: None, variant: Variant::First };
        let rule = read_back(vec![Statement::DestinationPortIn(set), Statement::Verdict(Ours::Jump("j"))]);
        assert_eq!(rule.parts, [only(Condition::Other), Part::Verdict(Verdict::Jump("j".into()))]);
    }

    fn elements_of(elements: &[(u16, bool)]) -> Vec<Element> {
        elements.iter().map(|(port, end)| Element { key: Some(port.to_be_bytes().to_vec()), end: *end }).collect()
    }

    #[test]
    fn nft_set_elements_become_ranges() {
        let ranges = |elements: &[(u16, bool)]| port_set(&elements_of(elements), true).ranges;
        assert_eq!(ranges(&[(443, false), (80, false)]), [(80, 80), (443, 443)]);
        let intervals = [(0, true), (80, false), (91, true), (91, false), (92, true), (9000, false)];
        assert_eq!(ranges(&intervals), [(80, 90), (91, 91), (9000, u16::MAX)]);
        let long = Element { key: Some(vec![0; 4]), end: false };
        assert_eq!(port_set(&[long], true), PortSet::default());
        let every = Element { key: None, end: false };
        assert_eq!(port_set(&[every], false).contains(7), Some(true));
    }

    #[test]
    fn nft_set_not_read_whole_is_unknown() {
        let set = port_set(&elements_of(&[(0, true), (80, false), (91, true), (9000, false)]), false);
        assert_eq!([85, 9000].map(|port| set.contains(port)), [Some(true); 2]);
        assert_eq!([79, 91, 9001].map(|port| set.contains(port)), [None; 3]);
        let set = PortSet { asked: [(91, false)].into(), ..set };
        assert_eq!(set.contains(91), Some(false));
    }

    proptest! {
        #[test]
        fn nft_dump_of_any_bytes_does_not_panic(payload in wire::odd::answer(4)) {
            parse_rule(&payload);
            parse_chain(&payload);
            parse_set(&payload);
            port_set(&parse_elements(&payload), payload.len() % 2 == 0);
        }

        #[test]
        fn nft_rule_truncated_is_read_as_far_as_it_goes(cut in 0..400usize) {
            let statements = vec![Statement::MarkIs(Mark::DEFAULT), Statement::Tproxy { family: None, addr: None, port: 1 }];
            let object = Object::Rule { chain: "c", statements, comment: "" };
            let mut buffer = Buffer::default();
            buffer.message(1, 0, 1, &header(NFPROTO_INET, 0), |a| object.encode("t", a));
            let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
            parse_rule(message.payload.get(..cut.min(message.payload.len())).unwrap());
        }
    }
}
