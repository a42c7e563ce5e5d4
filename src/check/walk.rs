//! A packet's way through other people's rules, as far as it can be told without the packet: what is sure, what may be.

use crate::backend::seen::filter::{Chain, Condition, Part, Rule, Verdict};
use crate::backend::seen::routing::{self, Action, Route};
use crate::list::List;
use crate::model::{Family, Mark};
use crate::sort;

/// More rules than this are not walked through, for want of time.
const STEPS_MAX: usize = 20_000;
const DEPTH_MAX: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Yes,
    No,
    Maybe,
}

impl Truth {
    fn of(yes: bool) -> Truth {
        if yes { Truth::Yes } else { Truth::No }
    }

    fn not(self) -> Truth {
        match self {
            Truth::Yes => Truth::No,
            Truth::No => Truth::Yes,
            Truth::Maybe => Truth::Maybe,
        }
    }

    fn and(self, other: Truth) -> Truth {
        match (self, other) {
            (Truth::No, _) | (_, Truth::No) => Truth::No,
            (Truth::Yes, Truth::Yes) => Truth::Yes,
            _ => Truth::Maybe,
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

/// Chains, and their places in the order of their names: a host of Kubernetes has thousands, and as many jumps.
#[derive(Debug)]
pub(super) struct Chains<'a> {
    chains: &'a [Chain],
    named: Vec<(Name<'a>, usize)>,
}

/// Table, name and family.
type Name<'a> = (&'a str, &'a str, Option<Family>);

impl<'a> Chains<'a> {
    pub fn new(chains: &'a [Chain]) -> Chains<'a> {
        let name = |chain: &'a Chain| -> Name<'a> { (&chain.table, &chain.name, chain.family) };
        let mut named = chains.iter().map(name).zip(0..).list();
        sort::unique(&mut named);
        Chains { chains, named }
    }

    /// Where a jump leads. Tables of one name may be of both variants of iptables.
    fn called(&self, name: &str, from: &Chain) -> Option<&'a Chain> {
        let wanted: Name<'_> = (&from.table, name, from.family);
        let first = self.named.partition_point(|(name, _)| *name < wanted);
        let places = self.named.get(first..)?.iter().take_while(|(name, _)| *name == wanted);
        let mut called = places.filter_map(|(_, place)| self.chains.get(*place));
        called.find(|other| other.origin == from.origin || from.hook.is_none() || other.hook.is_none())
    }
}

/// Sends a packet through a base chain.
pub(super) fn through<'a>(chains: &Chains<'a>, base: &'a Chain, packet: Packet) -> Outcome<'a> {
    let mut walk = Walk { chains, packet, may_be_accepted: false, effects: Vec::new(), steps: 0 };
    let dropped = match walk.chain(base, true, 0) {
        End::Dropped(chain, rule) => Some((chain, Some(rule), !walk.may_be_accepted)),
        End::Fallen if base.drops => Some((base, None, !walk.may_be_accepted)),
        _ => None,
    };
    Outcome { dropped, effects: walk.effects }
}

struct Walk<'a, 'c> {
    chains: &'c Chains<'a>,
    packet: Packet,
    /// A rule that may apply accepts.
    may_be_accepted: bool,
    effects: Vec<Effect<'a>>,
    steps: usize,
}

enum End<'a> {
    Accepted,
    Dropped(&'a Chain, &'a Rule),
    Fallen,
}

impl<'a> Walk<'a, '_> {
    fn chain(&mut self, chain: &'a Chain, sure: bool, depth: usize) -> End<'a> {
        if depth > DEPTH_MAX {
            return End::Fallen;
        }
        for rule in &chain.rules {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                self.may_be_accepted = true;
                return End::Accepted;
            }
            let applies = self.applies(rule);
            if applies == Truth::No {
                continue;
            }
            let sure = sure && applies == Truth::Yes;
            let with_tproxy = rule.parts.iter().any(|part| matches!(part, Part::Tproxy { .. }));
            for part in &rule.parts {
                let Part::Verdict(verdict) = part else {
                    if !matches!(part, Part::OnlyIf(_) | Part::OnlyIfNot(_)) {
                        self.effects.push(Effect { part, chain, rule, sure, with_tproxy });
                    }
                    continue;
                };
                match verdict {
                    Verdict::Accept if sure => return End::Accepted,
                    Verdict::Accept | Verdict::Other => self.may_be_accepted = true,
                    Verdict::Drop if sure => return End::Dropped(chain, rule),
                    Verdict::Drop => {}
                    Verdict::Return if sure => return End::Fallen,
                    Verdict::Return => {}
                    Verdict::Jump(name) | Verdict::Goto(name) => {
                        let target = self.chains.called(name, chain);
                        let end = target.map_or(End::Fallen, |target| self.chain(target, sure, depth + 1));
                        match (end, verdict) {
                            (End::Fallen, Verdict::Goto(_)) if sure => return End::Fallen,
                            (End::Fallen, _) => {}
                            (end, _) => return end,
                        }
                    }
                }
            }
        }
        End::Fallen
    }

    fn applies(&self, rule: &Rule) -> Truth {
        rule.parts.iter().fold(Truth::Yes, |so_far, part| match part {
            Part::OnlyIf(condition) => so_far.and(self.holds(condition)),
            Part::OnlyIfNot(condition) => so_far.and(self.holds(condition).not()),
            _ => so_far,
        })
    }

    fn holds(&self, condition: &Condition) -> Truth {
        /// NF_CT_STATE_BIT(IP_CT_NEW).
        const NEW: u32 = 8;
        let packet = &self.packet;
        match condition {
            Condition::Family(family) => Truth::of(*family == packet.family),
            Condition::Protocol(protocol) => Truth::of(*protocol == packet.protocol),
            Condition::Ports(ports) => match packet.port {
                Some(port) => Truth::of(ports.iter().any(|(first, last)| (*first..=*last).contains(&port))),
                None => Truth::Maybe,
            },
            Condition::Mark { mask, value } => Truth::of(packet.mark & mask == *value),
            // What loops by `lo`, what goes to this host, and what has no way back are another's concern.
            Condition::Loopback | Condition::DestinationIsLocal | Condition::NoWayBack { .. } => Truth::No,
            Condition::TransparentSocket => Truth::of(packet.transparent),
            Condition::Connection { states: Some(states) } if states & NEW == 0 => Truth::No,
            Condition::Connection { .. } | Condition::Other => Truth::Maybe,
        }
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
}

/// Asks the rules of a family, in their order, as the kernel would for a packet with a mark that came in by an
/// interface (`None`: one that the host sends, or the look-up of the way back).
pub(super) fn routed<'a>(
    rules: &'a [routing::Rule],
    routes: &[Route],
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
        if applies == Truth::No {
            continue;
        }
        let sure = applies == Truth::Yes;
        match rule.action {
            Action::Nop => {}
            // Backwards there is no way (`fib_nl2rule`).
            Action::Goto(target) if sure && target > rule.priority => resume_at = target,
            Action::Goto(_) => {}
            Action::Refuse => return Way::Elsewhere(rule, sure),
            Action::Lookup(table) => match what_is_in(routes, family, table) {
                Contents::Nothing => {}
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
}

/// What a table has for an address that is not this host's.
fn what_is_in(routes: &[Route], family: Family, table: u32) -> Contents {
    if table == u32::from(libc::RT_TABLE_LOCAL) || table == u32::from(libc::RT_TABLE_DEFAULT) {
        return Contents::Nothing;
    }
    // It was not read; nobody has an empty one.
    if table == u32::from(libc::RT_TABLE_MAIN) {
        return Contents::Default;
    }
    let mut in_table = routes.iter().filter(|route| route.family == family && route.table == table).peekable();
    if in_table.peek().is_none() {
        return Contents::Nothing;
    }
    match in_table.find(|route| route.destination.is_none()) {
        Some(route) if route.local => Contents::Local,
        Some(_) => Contents::Default,
        None => Contents::Something,
    }
}

fn selects(rule: &routing::Rule, mark: Mark, incoming: Option<&str>) -> Truth {
    if rule.by_interface {
        return Truth::No;
    }
    let by_mark = match rule.mark {
        None => Truth::Yes,
        // Bits that are not ours may be anything.
        Some(wanted) => {
            let common = wanted.mask & mark.mask;
            match (wanted.value & common == mark.value & common, wanted.mask & !mark.mask & wanted.value) {
                (false, _) => Truth::No,
                (true, 0) => Truth::Yes,
                (true, _) => Truth::Maybe,
            }
        }
    };
    let by_interface = match (&rule.incoming, incoming) {
        (None, _) => Truth::Yes,
        (Some(wanted), None) => Truth::of(wanted == "lo"),
        (Some(wanted), Some("")) => {
            if wanted == "lo" {
                Truth::No
            } else {
                Truth::Maybe
            }
        }
        (Some(wanted), Some(incoming)) => Truth::of(wanted == incoming),
    };
    let other = if rule.conditional { Truth::Maybe } else { Truth::Yes };
    let all = by_mark.and(by_interface).and(other);
    if rule.inverted { all.not() } else { all }
}
