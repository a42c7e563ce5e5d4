//! A packet's way through other people's rules, as far as it can be told without the packet: what is sure, what may be.
//!
//! Other programs may have any number of rules, jumps and ports. Each chain is looked at once for a packet, rules for
//! other ports are skipped without a look, and packets that differ only in ports between which no rule distinguishes
//! are one. What that leaves is bounded by a number of steps, for all packets together.

use std::cell::Cell;
use std::collections::HashMap;

use super::host_state::Routes;
use crate::check::inspect::filter::{Chain, Condition, Origin, Part, PortSet, Rule, Ruleset, Verdict};
use crate::check::inspect::routing::{self, Action};
use crate::model::{Family, Mark};

/// So many rules, effects and chains are looked at, for all packets together, to bound the time: it is some hundredths
/// of a second.
const STEPS_MAX: usize = 1_000_000;
/// Chains that lead to each other: nf_tables allows 16 (NFT_JUMP_STACK_SIZE), legacy iptables any number.
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
    /// A transparent socket has it, or has sent it.
    pub transparent: bool,
}

/// What a rule does to the packet, but for the verdict.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effect<'a> {
    pub part: &'a Part,
    pub chain: &'a Chain,
    pub rule: &'a Rule,
    pub sure: bool,
    /// It comes with a `tproxy` in the same rule.
    pub with_tproxy: bool,
}

/// How a packet leaves a base chain.
#[derive(Debug)]
pub(super) struct Outcome<'a> {
    /// By which chain and rule it is dropped (no rule: the policy), and whether that is sure.
    pub dropped: Option<(&'a Chain, Option<&'a Rule>, bool)>,
    pub effects: Vec<Effect<'a>>,
}

/// Chains, made ready for packets to go through.
#[derive(Debug)]
pub(super) struct Chains<'a> {
    nodes: Vec<Node<'a>>,
    sets: &'a [PortSet],
    /// How many steps may still be made.
    left: Cell<usize>,
}

/// A chain, and where its rules lead.
#[derive(Debug)]
struct Node<'a> {
    chain: &'a Chain,
    /// By the number of a rule, in that order: the chain that it jumps to; `None`: it is not known.
    jumps: Vec<(usize, Option<usize>)>,
    /// The rules that are for few ports only, by each of these, and all others.
    for_port: HashMap<u16, Vec<usize>>,
    others: Vec<usize>,
}

impl Node<'_> {
    /// The rules that may apply to a packet to a port (`None`: any), in their order.
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

/// A chain's name: whether it is of legacy iptables, its family and table, and its own.
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

    /// The base chains, and their numbers.
    pub fn bases(&self) -> impl Iterator<Item = (usize, &'a Chain)> {
        let bases = self.nodes.iter().enumerate().filter(|(_, node)| node.chain.hook.is_some());
        bases.map(|(number, node)| (number, node.chain))
    }

    /// Takes so many steps; false: there are no more.
    pub fn step(&self, steps: usize) -> bool {
        match self.left.get().checked_sub(steps) {
            Some(left) => self.left.set(left),
            None => self.left.set(0),
        }
        self.left.get() > 0
    }

    /// Steps ran out: what was found is not all.
    pub fn is_exhausted(&self) -> bool {
        self.left.get() == 0
    }

    /// How many steps were made.
    #[cfg(test)]
    pub fn steps(&self) -> usize {
        STEPS_MAX - self.left.get()
    }

    /// The ports at which rules begin or end to apply, on the way from a base chain, in order: what happens to one port
    /// happens to all up to the next of these.
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

    /// Sends a packet through a base chain; `None`: there are no steps left for it.
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
    /// A rule that may apply accepts.
    may_be_accepted: bool,
    effects: Vec<Effect<'a>>,
    /// How the chains end that were looked at, if it is sure that the packet comes there, and if not.
    known: HashMap<(usize, bool), End<'a>>,
}

#[derive(Debug, Clone, Copy)]
enum End<'a> {
    Accepted,
    Dropped(&'a Chain, &'a Rule),
    FellThrough,
}

impl<'a> Evaluator<'a, '_> {
    /// What becomes of the packet in a chain. The second time it has the same effects, and ends in the same way.
    fn chain(&mut self, number: usize, sure: bool, depth: usize) -> End<'a> {
        if let Some(end) = self.known.get(&(number, sure)) {
            return *end;
        }
        // Chains that lead in a circle, which the kernel refuses, end where they meet.
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
                            // Nobody knows what is there.
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
        // What was not read may accept.
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
        // What loops by `lo`, what goes to this host, and what has no way back are another's concern.
        Condition::Loopback | Condition::DestinationIsLocal | Condition::RpFilterMiss { .. } => Ternary::No,
        Condition::TransparentSocket => Ternary::of(packet.transparent),
        Condition::Connection { states: Some(states) } if states & NEW == 0 => Ternary::No,
        Condition::Connection { .. } | Condition::Other => Ternary::Maybe,
    }
}

/// Where routing policy rules lead a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Way<'a> {
    /// To a local socket, by this rule.
    Local(&'a routing::Rule),
    /// Elsewhere, by this rule; whether that is sure.
    Elsewhere(&'a routing::Rule, bool),
    /// Nowhere.
    Nowhere,
    /// Into a table that was not read.
    Unknown,
}

/// The tables, and what is in each.
pub(super) type Tables = HashMap<(Family, u32), Routes>;

/// Asks the rules of a family, in their order, as the kernel would for a packet with a mark that came in by an
/// interface (`None`: one that the host sends, or the look-up of the way back).
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
            // Backwards there is no way (`fib_nl2rule`).
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
    /// The default route is local.
    Local,
    Something,
    Default,
    Unknown,
}

/// What a table has for an address that is not this host's.
fn what_is_in(tables: &Tables, family: Family, table: u32) -> Contents {
    if table == u32::from(libc::RT_TABLE_LOCAL) || table == u32::from(libc::RT_TABLE_DEFAULT) {
        return Contents::Nothing;
    }
    // It was not read; nobody has an empty one.
    if table == u32::from(libc::RT_TABLE_MAIN) {
        return Contents::Default;
    }
    let Some(routes) = tables.get(&(family, table)) else { return Contents::Unknown };
    // A `throw` sends the packet on to the next rule.
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
        // Bits that are not ours may be anything.
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
