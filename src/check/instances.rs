//! Instances of this library, and TPROXY rules of other programs, as derived from the rules of the host.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::backend::holder::Holder;
use crate::backend::nft::ruleset;
use crate::backend::nft::table::{self, RoutingSlot, Table};
use crate::backend::route::RULES;
use crate::backend::xtables;
use crate::check::inspect::filter::{self, Chain, Condition, Origin, Part, PortSet, Rule, Ruleset};
use crate::model::{Families, Family, Mark};
use crate::name::Name;

/// An instance of this library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Instance {
    pub name: String,
    pub table: String,
    pub slot: RoutingSlot,
    /// `None`: no process owns it (TP_RULES_PERSIST).
    pub owner: Option<Holder>,
    /// Families that it serves.
    pub families: Families,
    /// `None`: it uses NAT, and needs no routing.
    pub mark: Option<Mark>,
    pub output_mark: Option<Mark>,
    pub notrack: bool,
    /// Backend of its rules, nf_tables or iptables; `None`: the rules could not be read.
    pub origin: Option<Origin>,
}

/// A rule that delivers packets to a listener.
#[derive(Debug, Clone)]
pub(super) struct Interception<'a> {
    /// The instance; `None`: the rule belongs to another program.
    pub instance: Option<&'a str>,
    pub chain: &'a Chain,
    pub rule: &'a Rule,
    pub family: Family,
    pub protocol: u8,
    pub addr: Option<IpAddr>,
    pub port: u16,
    /// Mark that a TPROXY rule sets; `None`: unknown, or NAT.
    pub mark: Option<Mark>,
    /// The rule translates destinations (NAT).
    pub nat: bool,
    /// Destination ports of intercepted packets; empty: all, or unknown.
    pub ports: Vec<(u16, u16)>,
    /// Priority of the chain.
    pub priority: i32,
}

/// Maximum number of port ranges that are read per interception.
const RANGES_MAX: usize = 64;

/// Whether this library created the chain.
pub(super) fn is_ours(chain: &Chain) -> bool {
    owner_of(chain).is_some()
}

/// Returns the instance of a chain, by names that only this library uses.
fn owner_of(chain: &Chain) -> Option<&str> {
    let by_table = || table::instance_of(chain.table.as_str()?);
    let by_chain = || instance_of_chain(&chain.name).filter(|_| chain.origin != Origin::Nft);
    by_table().or_else(by_chain).filter(|name| is_name(name))
}

/// Returns the instance whose iptables chain would have this name.
pub(super) fn instance_of_chain(name: &Name) -> Option<&str> {
    xtables::instance_of(name.as_str()?).filter(|name| is_name(name))
}

/// Whether an instance can have this name.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

/// Returns the chains of each instance.
fn by_instance(chains: &[Chain]) -> HashMap<&str, Vec<&Chain>> {
    let mut own: HashMap<&str, Vec<&Chain>> = HashMap::new();
    for chain in chains {
        if let Some(name) = owner_of(chain) {
            own.entry(name).or_default().push(chain);
        }
    }
    own
}

/// Returns the instances among the tables of nf_tables.
pub(super) fn instances(tables: &[Table], chains: &[Chain], holders: &HashMap<u32, Holder>) -> Vec<Instance> {
    let chains = by_instance(chains);
    let instance = |table: &Table| {
        let name = table::instance_of(&table.name).filter(|name| is_name(name))?;
        let mut slot = table::speaker(tables, table).slot?;
        // Any program can write such a comment. Four consecutive priorities must exist.
        slot.priority = slot.priority.min(u32::MAX - RULES);
        let own: &[&Chain] = chains.get(name).map(Vec::as_slice).unwrap_or_default();
        let by_iptables = own.iter().find(|chain| chain.origin != Origin::Nft);
        let mark_in = |wanted: &[&str]| {
            let mut named = own.iter().filter(|chain| wanted.iter().any(|part| is_part(chain, name, part)));
            named.find_map(|chain| chain.rules.iter().find_map(mark_of))
        };
        Some(Instance {
            name: name.to_owned(),
            table: table.name.clone(),
            slot,
            owner: table.owner_port.map(|port| holders.get(&port).cloned().unwrap_or(Holder::Unknown)),
            families: families(own),
            mark: mark_in(&[ruleset::DIVERT, "d"]),
            output_mark: mark_in(&[ruleset::REROUTE, ruleset::REROUTE_REPLY, "l"]),
            notrack: own.iter().any(|chain| chain.name == ruleset::UNTRACK),
            origin: by_iptables.or(own.first()).map(|chain| chain.origin),
        })
    };
    tables.iter().filter_map(instance).collect()
}

/// Whether the chain has this role, by its name without the prefix of iptables chains.
fn is_part(chain: &Chain, instance: &str, part: &str) -> bool {
    match chain.origin {
        Origin::Nft => chain.name == part,
        _ => chain.name.as_bytes().get(instance.len() + 4..) == Some(part.as_bytes()),
    }
}

/// Returns the families that the chains serve.
fn families(own: &[&Chain]) -> Families {
    let mut families = Families::default();
    for chain in own {
        for family in Families::ALL.iter().filter(|family| chain.family.is_none_or(|own| own == *family)) {
            let for_family = |rule: &&Rule| {
                let only = only(rule, |condition| match condition {
                    Condition::Family(only) => Some(*only),
                    _ => None,
                });
                chain.name != ruleset::DEFRAGMENT && only.is_none_or(|only| only == family)
            };
            if chain.rules.iter().any(|rule| for_family(&rule) && !rule.parts.is_empty() && chain.hook.is_some())
                || chain.origin != Origin::Nft && !chain.rules.is_empty()
            {
                match family {
                    Family::V4 => families.v4 = true,
                    Family::V6 => families.v6 = true,
                }
            }
        }
    }
    families
}

/// Returns the mark that a rule sets.
fn mark_of(rule: &Rule) -> Option<Mark> {
    rule.parts.iter().find_map(|part| match part {
        Part::SetMark { keep, set: Some(value) } => Some(Mark { value: value & !keep, mask: !keep }),
        _ => None,
    })
}

fn only<T>(rule: &Rule, what: impl Fn(&Condition) -> Option<T>) -> Option<T> {
    rule.parts.iter().find_map(|part| match part {
        Part::OnlyIf(condition) => what(condition),
        _ => None,
    })
}

/// Returns the destination ports of a rule's condition; `None`: it has none.
fn ports_of(rule: &Rule, sets: &[PortSet]) -> Option<Vec<(u16, u16)>> {
    // A rule may have two conditions: a lowest and a highest port.
    let mut range: Option<(u16, u16)> = None;
    for part in &rule.parts {
        match part {
            Part::OnlyIf(Condition::Ports(first, last)) => {
                let (low, high) = range.unwrap_or((0, u16::MAX));
                range = Some((low.max(*first), high.min(*last)));
            }
            Part::OnlyIf(Condition::PortSet(number)) => {
                let ranges = &sets.get(*number)?.ranges;
                return Some(ranges.iter().copied().take(RANGES_MAX).collect());
            }
            _ => {}
        }
    }
    range.map(|range| vec![range])
}

/// Returns all rules that deliver packets to a local listener by TPROXY, and those of this library that do so by NAT.
pub(super) fn interceptions(ruleset: &Ruleset) -> Vec<Interception<'_>> {
    let Ruleset { chains, port_sets } = ruleset;
    let mut ports: HashMap<&str, Vec<(u16, u16)>> = HashMap::new();
    for (name, own) in by_instance(chains) {
        let leading = own.iter().flat_map(|chain| &chain.rules).filter(|rule| leads_on(rule));
        let all = leading.filter_map(|rule| ports_of(rule, port_sets)).flatten().take(RANGES_MAX).collect();
        ports.insert(name, all);
    }
    let mut found = Vec::new();
    for chain in chains.iter().filter(|chain| chain.name != ruleset::DEFRAGMENT) {
        let instance = owner_of(chain);
        for rule in &chain.rules {
            let target = rule.parts.iter().find_map(|part| match part {
                Part::Tproxy { family, addr, port } => Some((*family, *addr, *port, false)),
                Part::Redirect(Some(port)) if instance.is_some() => Some((None, None, *port, true)),
                _ => None,
            });
            let Some((family, addr, port, nat)) = target else { continue };
            let family = family.or(chain.family).or_else(|| {
                only(rule, |condition| match condition {
                    Condition::Family(family) => Some(*family),
                    _ => None,
                })
            });
            let protocol = only(rule, |condition| match condition {
                Condition::Protocol(protocol) => Some(*protocol),
                _ => None,
            });
            let of_instance = || ports.get(instance?).cloned();
            let ports = ports_of(rule, port_sets).or_else(of_instance).unwrap_or_default();
            for family in Families::ALL.iter().filter(|other| family.is_none_or(|only| only == *other)) {
                found.push(Interception {
                    instance,
                    chain,
                    rule,
                    family,
                    protocol: protocol.unwrap_or(libc::IPPROTO_TCP as u8),
                    addr,
                    port,
                    mark: mark_of(rule).filter(|_| !nat),
                    nat,
                    ports: ports.clone(),
                    priority: chain.hook.map_or(MANGLE, |hook| hook.priority),
                });
            }
        }
    }
    found
}

impl Interception<'_> {
    /// Returns one of the intercepted ports; `None`: any.
    pub fn sample_port(&self) -> Option<u16> {
        self.ports.first().map(|(first, _)| *first)
    }
}

/// Returns one intercepted port of each interception, sorted.
pub(super) fn sample_ports(ruleset: &Ruleset) -> Vec<u16> {
    let mut ports: Vec<u16> = interceptions(ruleset).iter().filter_map(Interception::sample_port).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Priority of this library's chains, and of iptables chains with TPROXY.
const MANGLE: i32 = -150;

/// Whether a rule jumps to another chain. Such rules have the ports of an instance. The rule with the listener's port does not
/// count: it jumps to a chain that only drops.
fn leads_on(rule: &Rule) -> bool {
    let on = |part: &Part| match part {
        Part::Verdict(filter::Verdict::Goto(to) | filter::Verdict::Jump(to)) => {
            !to.as_str().is_some_and(ruleset::only_refuses)
        }
        _ => false,
    };
    rule.parts.iter().any(on)
}

/// Whether the rule has a condition that is not evaluated here, such as an interface.
pub(super) fn chooses_otherwise(rule: &Rule) -> bool {
    rule.parts.contains(&Part::OnlyIf(Condition::Other))
}

/// Returns the instances whose rules have conditions that are not evaluated here.
pub(super) fn choosing_otherwise(chains: &[Chain]) -> Vec<&str> {
    let chooses = |own: &Vec<&Chain>| {
        own.iter().flat_map(|chain| &chain.rules).any(|rule| leads_on(rule) && chooses_otherwise(rule))
    };
    by_instance(chains).into_iter().filter(|(_, own)| chooses(own)).map(|(name, _)| name).collect()
}
