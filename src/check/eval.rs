//! Evaluates other programs' rules for a hypothetical packet. Each result is certain or possible.
//!
//! Other programs may have any number of rules, jumps and ports. Each chain is evaluated once per packet, rules for other ports
//! are skipped, and one packet stands for all packets that differ only in ports which no rule distinguishes. The remaining work is
//! bounded by a number of steps for all packets together.

use std::cell::Cell;
use std::collections::HashMap;

use super::host_state::Routes;
use crate::check::inspect::filter::{Chain, Condition, Origin, Part, PortSet, Rule, Ruleset, Verdict};
use crate::check::inspect::routing::{self, Action};
use crate::model::{Family, Mark};

/// Maximum number of rules, effects and chains that are evaluated, for all packets together. They take some hundredths of a second.
const STEPS_MAX: usize = 1_000_000;
/// Maximum depth of jumps: nf_tables allows 16 (NFT_JUMP_STACK_SIZE), legacy iptables any number.
const DEPTH_MAX: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ternary {
    Yes,
    No,
    Maybe,
}

impl Ternary {
    fn of(yes: bool) -> Ternary {
        if yes { Ternary::Yes } else { Ternary::No }
    }

    fn not(self) -> Ternary {
        match self {
            Ternary::Yes => Ternary::No,
            Ternary::No => Ternary::Yes,
            Ternary::Maybe => Ternary::Maybe,
        }
    }

    fn and(self, other: Ternary) -> Ternary {
        match (self, other) {
            (Ternary::No, _) | (_, Ternary::No) => Ternary::No,
            (Ternary::Yes, Ternary::Yes) => Ternary::Yes,
            _ => Ternary::Maybe,
        }
    }
}

/// The first packet of a connection from another host to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub family: Family,
    pub protocol: u8,
    /// `None`: any.
    pub port: Option<u16>,
    pub mark: u32,
    /// The packet is assigned to a transparent socket, or was sent by one.
    pub transparent: bool,
}

/// Effect of a rule on the packet, other than the verdict.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effect<'a> {
    pub part: &'a Part,
    pub chain: &'a Chain,
    pub rule: &'a Rule,
    pub sure: bool,
    /// The same rule has a `tproxy` statement.
    pub with_tproxy: bool,
}

/// Result of a base chain for a packet.
#[derive(Debug)]
pub(super) struct Outcome<'a> {
    /// Chain and rule that drop the packet (no rule: the policy), and whether this is certain.
    pub dropped: Option<(&'a Chain, Option<&'a Rule>, bool)>,
    pub effects: Vec<Effect<'a>>,
}

/// Chains, prepared for evaluation.
#[derive(Debug)]
pub(super) struct Chains<'a> {
    nodes: Vec<Node<'a>>,
    sets: &'a [PortSet],
    /// Remaining number of steps.
    left: Cell<usize>,
}

/// A chain, and the targets of its jumps.
#[derive(Debug)]
struct Node<'a> {
    chain: &'a Chain,
    /// Rule index and target chain of each jump, sorted by rule; `None`: the target is unknown.
    jumps: Vec<(usize, Option<usize>)>,
    /// Rules for only a few ports, by port, and all other rules.
    for_port: HashMap<u16, Vec<usize>>,
    others: Vec<usize>,
}

impl Node<'_> {
    /// Returns the rules that may match a packet with this port (`None`: any), in order.
    fn rules_for(&self, port: Option<u16>) -> impl Iterator<Item = usize> {
        let mut every = 0..if port.is_none() { self.chain.rules.len() } else { 0 };
        let of_port = port.and_then(|port| self.for_port.get(&port));
        let mut for_port = of_port.map(Vec::as_slice).unwrap_or_default();
        let mut others = if port.is_some() { self.others.as_slice() } else { &[] };
        std::iter::from_fn(move || {
            let from = match (for_port.first(), others.first()) {
                (Some(first), Some(other)) if first > other => &mut others,
                (None, _) => &mut others,
                _ => &mut for_port,
            };
            match from.split_first() {
                Some((first, rest)) => {
                    *from = rest;
                    Some(*first)
                }
                None => every.next(),
            }
        })
    }
}

/// The ports that a rule is for, if it is for few only.
fn few_ports(rule: &Rule, sets: &[PortSet]) -> Option<Vec<u16>> {
    const FEW: usize = 16;
    rule.parts.iter().find_map(|part| {
        let mut ports: Vec<u16> = match part {
            Part::OnlyIf(Condition::Ports(first, last)) => (*first..=*last).take(FEW + 1).collect(),
            Part::OnlyIf(Condition::PortSet(set)) => {
                let set = sets.get(*set).filter(|set| set.complete)?;
                set.ranges.iter().flat_map(|(first, last)| *first..=*last).take(FEW + 1).collect()
            }
            _ => return None,
        };
        ports.sort_unstable();
        ports.dedup();
        (ports.len() <= FEW).then_some(ports)
    })
}

/// Key of a chain: whether it belongs to legacy iptables, its family, its table, and its name.
type Key<'a> = (bool, Option<Family>, &'a [u8], &'a [u8]);

fn key<'a>(of: &'a Chain, name: &'a [u8]) -> Key<'a> {
    (of.origin == Origin::IptablesLegacy, of.family, of.table.as_bytes(), name)
}

impl<'a> Chains<'a> {
    pub fn new(ruleset: &'a Ruleset) -> Chains<'a> {
        let chains = &ruleset.chains;
        let numbers: HashMap<Key<'a>, usize> =
            chains.iter().map(|chain| key(chain, chain.name.as_bytes())).zip(0..).collect();
        let node = |chain: &'a Chain| {
            let mut node = Node { chain, jumps: Vec::new(), for_port: HashMap::new(), others: Vec::new() };
            for (number, rule) in chain.rules.iter().enumerate() {
                for part in &rule.parts {
                    if let Part::Verdict(Verdict::Jump(name) | Verdict::Goto(name)) = part {
                        node.jumps.push((number, numbers.get(&key(chain, name.as_bytes())).copied()));
                    }
                }
                match few_ports(rule, &ruleset.port_sets) {
                    Some(ports) => {
                        ports.into_iter().for_each(|port| node.for_port.entry(port).or_default().push(number))
                    }
                    None => node.others.push(number),
                }
            }
            node
        };
        Chains { nodes: chains.iter().map(node).collect(), sets: &ruleset.port_sets, left: Cell::new(STEPS_MAX) }
    }

    /// Returns the base chains and their indices.
    pub fn bases(&self) -> impl Iterator<Item = (usize, &'a Chain)> {
        let bases = self.nodes.iter().enumerate().filter(|(_, node)| node.chain.hook.is_some());
        bases.map(|(number, node)| (number, node.chain))
    }

    /// Uses up steps; false: none is left.
    pub fn step(&self, steps: usize) -> bool {
        match self.left.get().checked_sub(steps) {
            Some(left) => self.left.set(left),
            None => self.left.set(0),
        }
        self.left.get() > 0
    }

    /// Whether all steps are used up, so that results are missing.
    pub fn is_exhausted(&self) -> bool {
        self.left.get() == 0
    }

    /// Returns the number of used steps.
    #[cfg(test)]
    pub fn steps(&self) -> usize {
        STEPS_MAX - self.left.get()
    }

    /// Returns the sorted ports at which the match of some rule changes, for a base chain and its jump targets. All ports from one
    /// to before the next have the same result.
    pub fn ports_that_matter(&self, base: usize) -> Vec<u16> {
        let (mut next, mut known) = (vec![base], vec![false; self.nodes.len()]);
        let mut ports = Vec::new();
        let mut range = |first: u16, last: u16| {
            ports.push(first);
            ports.extend(last.checked_add(1));
        };
        while let Some(number) = next.pop() {
            let Some((node, known)) = self.nodes.get(number).zip(known.get_mut(number)) else { continue };
            if std::mem::replace(known, true) || !self.step(1 + node.chain.rules.len()) {
                continue;
            }
            next.extend(node.jumps.iter().filter_map(|(_, to)| *to));
            for part in node.chain.rules.iter().flat_map(|rule| &rule.parts) {
                match part {
                    Part::OnlyIf(Condition::Ports(first, last)) | Part::OnlyIfNot(Condition::Ports(first, last)) => {
                        range(*first, *last);
                    }
                    Part::OnlyIf(Condition::PortSet(set)) | Part::OnlyIfNot(Condition::PortSet(set)) => {
                        let Some(set) = self.sets.get(*set) else { continue };
                        self.step(set.ranges.len() + set.asked.len());
                        set.ranges.iter().for_each(|(first, last)| range(*first, *last));
                        set.asked.keys().for_each(|port| range(*port, *port));
                    }
                    _ => {}
                }
            }
        }
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Evaluates a base chain for a packet; `None`: no steps are left.
    pub fn eval_chain(&self, base: usize, packet: Packet) -> Option<Outcome<'a>> {
        let chain = self.nodes.get(base)?.chain;
        let mut evaluator =
            Evaluator { chains: self, packet, may_be_accepted: false, effects: Vec::new(), known: HashMap::new() };
        let dropped = match evaluator.chain(base, true, 0) {
            End::Dropped(chain, rule) => Some((chain, Some(rule), !evaluator.may_be_accepted)),
            End::FellThrough if chain.drops => Some((chain, None, !evaluator.may_be_accepted)),
            _ => None,
        };
        (!self.is_exhausted()).then_some(Outcome { dropped, effects: evaluator.effects })
    }
}

struct Evaluator<'a, 'c> {
    chains: &'c Chains<'a>,
    packet: Packet,
    /// A rule that possibly matches accepts the packet.
    may_be_accepted: bool,
    effects: Vec<Effect<'a>>,
    /// Results of evaluated chains, by index and by whether the packet certainly reaches them.
    known: HashMap<(usize, bool), End<'a>>,
}

#[derive(Debug, Clone, Copy)]
enum End<'a> {
    Accepted,
    Dropped(&'a Chain, &'a Rule),
    FellThrough,
}

impl<'a> Evaluator<'a, '_> {
    /// Evaluates a chain. A second evaluation would have the same effects and result.
    fn chain(&mut self, number: usize, sure: bool, depth: usize) -> End<'a> {
        if let Some(end) = self.known.get(&(number, sure)) {
            return *end;
        }
        // Ends loops, which the kernel refuses.
        self.known.insert((number, sure), End::FellThrough);
        let end = self.rules(number, sure, depth);
        self.known.insert((number, sure), end);
        end
    }

    fn rules(&mut self, number: usize, sure: bool, depth: usize) -> End<'a> {
        let chains = self.chains;
        let Some(node) = chains.nodes.get(number) else { return End::FellThrough };
        if depth > DEPTH_MAX {
            self.may_be_accepted = true;
            return End::FellThrough;
        }
        let chain = node.chain;
        for at in node.rules_for(self.packet.port) {
            let Some(rule) = chain.rules.get(at) else { continue };
            if !chains.step(1) {
                self.may_be_accepted = true;
                return End::Accepted;
            }
            let applies = applies(chains, &self.packet, rule);
            if applies == Ternary::No {
                continue;
            }
            let sure = sure && applies == Ternary::Yes;
            let with_tproxy = rule.parts.iter().any(|part| matches!(part, Part::Tproxy { .. }));
            for part in &rule.parts {
                let Part::Verdict(verdict) = part else {
                    if !matches!(part, Part::OnlyIf(_) | Part::OnlyIfNot(_)) {
                        chains.step(1);
                        self.effects.push(Effect { part, chain, rule, sure, with_tproxy });
                    }
                    continue;
                };
                match verdict {
                    Verdict::Accept if sure => return End::Accepted,
                    Verdict::Accept | Verdict::Other => self.may_be_accepted = true,
                    Verdict::Drop if sure => return End::Dropped(chain, rule),
                    Verdict::Drop => {}
                    Verdict::Return if sure => return End::FellThrough,
                    Verdict::Return => {}
                    Verdict::Jump(_) | Verdict::Goto(_) => {
                        let jump = node.jumps.partition_point(|(rule, _)| *rule < at);
                        let Some((_, Some(target))) = node.jumps.get(jump).filter(|(rule, _)| *rule == at) else {
                            // The target chain is unknown.
                            self.may_be_accepted = true;
                            continue;
                        };
                        match (self.chain(*target, sure, depth + 1), verdict) {
                            (End::FellThrough, Verdict::Goto(_)) if sure => return End::FellThrough,
                            (End::FellThrough, _) => {}
                            (end, _) => return end,
                        }
                    }
                }
            }
        }
        // A rule that was not read may accept.
        self.may_be_accepted |= chain.cut;
        End::FellThrough
    }
}

fn applies(chains: &Chains<'_>, packet: &Packet, rule: &Rule) -> Ternary {
    rule.parts.iter().fold(Ternary::Yes, |so_far, part| match part {
        Part::OnlyIf(condition) => so_far.and(holds(chains, packet, condition)),
        Part::OnlyIfNot(condition) => so_far.and(holds(chains, packet, condition).not()),
        _ => so_far,
    })
}

fn holds(chains: &Chains<'_>, packet: &Packet, condition: &Condition) -> Ternary {
    /// NF_CT_STATE_BIT(IP_CT_NEW).
    const NEW: u32 = 8;
    match condition {
        Condition::Family(family) => Ternary::of(*family == packet.family),
        Condition::Protocol(protocol) => Ternary::of(*protocol == packet.protocol),
        Condition::Ports(first, last) => match packet.port {
            Some(port) => Ternary::of((*first..=*last).contains(&port)),
            None => Ternary::Maybe,
        },
        Condition::PortSet(set) => match packet.port.and_then(|port| chains.sets.get(*set)?.contains(port)) {
            Some(contains) => Ternary::of(contains),
            None => Ternary::Maybe,
        },
        Condition::Mark { mask, value } => Ternary::of(packet.mark & mask == *value),
        // The packet is not looped back, is not addressed to this host, and passes the reverse-path check.
        Condition::Loopback | Condition::DestinationIsLocal | Condition::RpFilterMiss { .. } => Ternary::No,
        Condition::TransparentSocket => Ternary::of(packet.transparent),
        Condition::Connection { states: Some(states) } if states & NEW == 0 => Ternary::No,
        Condition::Connection { .. } | Condition::Other => Ternary::Maybe,
    }
}

/// Result of the routing policy rules for a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Way<'a> {
    /// Routed to a local socket by this rule.
    Local(&'a routing::Rule),
    /// Routed elsewhere by this rule, and whether this is certain.
    Elsewhere(&'a routing::Rule, bool),
    /// No rule has a route.
    Nowhere,
    /// A routing table could not be read.
    Unknown,
}

/// Routing tables and their routes.
pub(super) type Tables = HashMap<(Family, u32), Routes>;

/// Evaluates the rules of a family in order, as the kernel does, for a packet with a mark that arrived on an interface ("": any
/// except lo; `None`: a packet that this host sends, or the lookup of the reverse route).
pub(super) fn routed<'a>(
    rules: &'a [routing::Rule],
    tables: &Tables,
    family: Family,
    mark: Mark,
    incoming: Option<&str>,
) -> Way<'a> {
    let mut resume_at = 0;
    for rule in rules.iter().filter(|rule| rule.family == family) {
        if rule.priority < resume_at {
            continue;
        }
        let applies = selects(rule, mark, incoming);
        if applies == Ternary::No {
            continue;
        }
        let sure = applies == Ternary::Yes;
        match rule.action {
            Action::Nop => {}
            // The target of goto must have a higher priority value (`fib_nl2rule`).
            Action::Goto(target) if sure && target > rule.priority => resume_at = target,
            Action::Goto(_) => {}
            Action::Blackhole | Action::Unreachable | Action::Prohibit => return Way::Elsewhere(rule, sure),
            Action::Lookup(table) => match what_is_in(tables, family, table) {
                Contents::Nothing => {}
                Contents::Unknown => return Way::Unknown,
                Contents::Local if sure => return Way::Local(rule),
                Contents::Local => {}
                Contents::Something => return Way::Elsewhere(rule, false),
                Contents::Default => return Way::Elsewhere(rule, sure),
            },
        }
    }
    Way::Nowhere
}

enum Contents {
    Nothing,
    /// A local default route.
    Local,
    Something,
    Default,
    Unknown,
}

/// Returns the kind of route that a table has for an address of another host.
fn what_is_in(tables: &Tables, family: Family, table: u32) -> Contents {
    if table == u32::from(libc::RT_TABLE_LOCAL) || table == u32::from(libc::RT_TABLE_DEFAULT) {
        return Contents::Nothing;
    }
    // The table main is not read, and is assumed to have a default route.
    if table == u32::from(libc::RT_TABLE_MAIN) {
        return Contents::Default;
    }
    let Some(routes) = tables.get(&(family, table)) else { return Contents::Unknown };
    // A `throw` route continues with the next rule.
    let mut routing = routes.first.iter().filter(|route| route.kind != libc::RTN_THROW);
    match routing.clone().find(|route| route.destination.is_none()) {
        Some(route) if route.is_local() => Contents::Local,
        Some(_) => Contents::Default,
        None if routes.local_default == Some(true) => Contents::Local,
        None if routing.next().is_none() && routes.all => Contents::Nothing,
        None => Contents::Something,
    }
}

fn selects(rule: &routing::Rule, mark: Mark, incoming: Option<&str>) -> Ternary {
    if rule.by_interface {
        return Ternary::No;
    }
    let by_mark = match rule.mark {
        None => Ternary::Yes,
        // Bits outside of our mask may have any value.
        Some(wanted) => {
            let common = wanted.mask & mark.mask;
            match (wanted.value & common == mark.value & common, wanted.mask & !mark.mask & wanted.value) {
                (false, _) => Ternary::No,
                (true, 0) => Ternary::Yes,
                (true, _) => Ternary::Maybe,
            }
        }
    };
    let by_interface = match (&rule.incoming, incoming) {
        (None, _) => Ternary::Yes,
        (Some(wanted), None) => Ternary::of(*wanted == "lo"),
        (Some(wanted), Some("")) => {
            if *wanted == "lo" {
                Ternary::No
            } else {
                Ternary::Maybe
            }
        }
        (Some(wanted), Some(incoming)) => Ternary::of(*wanted == incoming),
    };
    let other = if rule.conditional { Ternary::Maybe } else { Ternary::Yes };
    let all = by_mark.and(by_interface).and(other);
    if rule.inverted { all.not() } else { all }
}
