//! Who intercepts what: instances of this library, and everybody else's TPROXY rules, read back from the rules.

use std::net::IpAddr;

use crate::backend::iptables;
use crate::backend::nft::ruleset;
use crate::backend::nft::table::{self, Place, Table};
use crate::backend::route::RULES;
use crate::backend::seen::filter::{self, Chain, Condition, Origin, Part, Rule};
use crate::list::List;
use crate::model::{Families, Family, Mark};
use crate::text::Owned;

/// An instance of this library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Instance {
    pub name: String,
    pub table: String,
    pub place: Place,
    /// `None`: it persists without.
    pub owner: Option<u32>,
    /// The families that it serves.
    pub families: Families,
    /// `None`: it translates (NAT), and needs no routing.
    pub mark: Option<Mark>,
    pub output_mark: Option<Mark>,
    pub notrack: bool,
    pub by_iptables: bool,
}

/// What a packet is given to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interception {
    /// The instance; `None`: it is somebody else's, in this chain and rule.
    pub instance: Option<String>,
    pub chain: Chain,
    pub rule: Rule,
    pub family: Family,
    pub protocol: u8,
    pub addr: Option<IpAddr>,
    pub port: u16,
    /// A TPROXY rule's; `None`: unknown, or it translates.
    pub mark: Option<Mark>,
    /// It translates destinations.
    pub nat: bool,
    /// The ports that clients ask for; none: all, or unknown.
    pub ports: Vec<(u16, u16)>,
    /// The priority of the chain.
    pub priority: i32,
}

/// A chain that this library made.
pub(super) fn is_ours(chain: &Chain) -> bool {
    table::instance_of(&chain.table).is_some()
        || chain.origin != Origin::Nft && iptables::instance_of(&chain.name).is_some()
}

/// The instance that a chain belongs to.
fn owner_of(chain: &Chain) -> Option<&str> {
    table::instance_of(&chain.table)
        .or_else(|| iptables::instance_of(&chain.name).filter(|_| chain.origin != Origin::Nft))
}

/// The instances among the tables of nf_tables.
pub(super) fn instances(tables: &[Table], chains: &[Chain]) -> Vec<Instance> {
    let instance = |table: &Table| {
        let (name, mut place) = (table::instance_of(&table.name)?, table.place?);
        // Anybody may write such a comment; four preferences in a row there must be.
        place.priority = place.priority.min(u32::MAX - RULES);
        let own: Vec<&Chain> = chains.iter().filter(|chain| owner_of(chain) == Some(name)).list();
        let by_iptables = own.iter().all(|chain| chain.origin != Origin::Nft);
        let in_chain = |wanted: &[&str]| {
            let named = own.iter().filter(|chain| wanted.contains(&part_of(chain, name)));
            named.flat_map(|chain| &chain.rules).list()
        };
        Some(Instance {
            name: name.owned(),
            table: table.name.clone(),
            place,
            owner: table.owner,
            families: families(&own),
            mark: in_chain(&["divert", "d"]).into_iter().find_map(mark_of),
            output_mark: in_chain(&["loop", "l"]).into_iter().find_map(mark_of),
            notrack: own.iter().any(|chain| chain.name == "untrack"),
            by_iptables,
        })
    };
    tables.iter().filter_map(instance).list()
}

/// What the chain is for: its name, without what iptables puts before.
fn part_of<'a>(chain: &'a Chain, instance: &str) -> &'a str {
    match chain.origin {
        Origin::Nft => &chain.name,
        _ => chain.name.get(instance.len() + 4..).unwrap_or_default(),
    }
}

/// Those that some chain serves.
fn families(own: &[&Chain]) -> Families {
    let mut families = Families::default();
    for chain in own {
        for family in Families::ALL.iter().filter(|family| chain.family.is_none_or(|own| own == *family)) {
            let for_family = |rule: &&Rule| {
                let only = only(rule, |condition| match condition {
                    Condition::Family(only) => Some(*only),
                    _ => None,
                });
                chain.name != "defragment" && only.is_none_or(|only| only == family)
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

/// The mark that a rule sets.
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

fn ports_of(rule: &Rule) -> Option<Vec<(u16, u16)>> {
    only(rule, |condition| match condition {
        Condition::Ports(ports) => Some(ports.clone()),
        _ => None,
    })
}

/// Everything that gives packets to a local listener by TPROXY, and what of ours does so by NAT.
pub(super) fn interceptions(chains: &[Chain]) -> Vec<Interception> {
    let mut found = Vec::new();
    for chain in chains.iter().filter(|chain| chain.name != "defragment") {
        let instance = owner_of(chain).map(str::to_owned);
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
            let ports = ports_of(rule).or_else(|| ports_of_instance(chains, instance.as_deref()?)).unwrap_or_default();
            let served = Families::ALL.iter().filter(|f| family.is_none_or(|only| only == *f));
            served
                .map(|family| Interception {
                    instance: instance.clone(),
                    chain: chain.clone(),
                    rule: rule.clone(),
                    family,
                    protocol: protocol.unwrap_or(libc::IPPROTO_TCP as u8),
                    addr,
                    port,
                    mark: mark_of(rule).filter(|_| !nat),
                    nat,
                    ports: ports.clone(),
                    priority: chain.hook.map_or(MANGLE, |hook| hook.priority),
                })
                .onto(&mut found);
        }
    }
    found
}

/// Where our chains hang, and those of iptables that have TPROXY.
const MANGLE: i32 = -150;

/// The ports in an instance's base chains: not that of the listener, which leads to a chain that only drops.
fn ports_of_instance(chains: &[Chain], instance: &str) -> Option<Vec<(u16, u16)>> {
    let ports: Vec<_> = leading_on(chains, instance).filter_map(ports_of).flatten().list();
    (!ports.is_empty()).then_some(ports)
}

/// The rules of an instance that lead from one chain to another.
fn leading_on<'a>(chains: &'a [Chain], instance: &str) -> impl Iterator<Item = &'a Rule> {
    let own = chains.iter().filter(move |chain| owner_of(chain) == Some(instance));
    own.flat_map(|chain| &chain.rules).filter(|rule| {
        let on = |part: &Part| match part {
            Part::Verdict(filter::Verdict::Goto(to) | filter::Verdict::Jump(to)) => !ruleset::only_refuses(to),
            _ => false,
        };
        rule.parts.iter().any(on)
    })
}

/// Packets are chosen by what is not told here, such as interfaces.
pub(super) fn chooses_otherwise(chains: &[Chain], interception: &Interception) -> bool {
    let otherwise = |rule: &Rule| rule.parts.contains(&Part::OnlyIf(Condition::Other));
    match &interception.instance {
        Some(name) => leading_on(chains, name).any(otherwise),
        None => otherwise(&interception.rule),
    }
}
