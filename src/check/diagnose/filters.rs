//! Effects of other programs' packet filters on intercepted packets.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;

use super::Context;
use super::commands::{Clause, insertion, named, removal};
use crate::check::eval::{Effect, Outcome, Packet};
use crate::check::findings::{self, Finding, Findings, Kind, Severity};
use crate::check::inspect::filter::{Chain, Condition, Hook, HookPoint, Origin, Part, Rule, Verdict};
use crate::check::instances::{self, Interception};
use crate::model::{Family, Mark};
use crate::netlink::uapi::{IP_CT_ESTABLISHED, NF_CT_STATE_BIT};

pub(super) fn check_filters(context: &Context<'_>, found: &mut Findings) {
    let mut groups: HashMap<Group, Vec<&Interception<'_>>> = HashMap::new();
    let mut order = Vec::new();
    for interception in &context.interceptions {
        let alive = context.instance(interception).is_some_and(|instance| instance.owner.is_some());
        if alive || interception.instance.is_none() {
            let group = Group::of(interception);
            let members = groups.entry(group).or_default();
            if members.is_empty() {
                order.push(group);
            }
            members.push(interception);
        }
    }
    for (number, base) in context.chains.bases() {
        // A table of this library has no rules of other programs. An iptables base chain that jumps to a chain of this
        // library may have some.
        if base.origin == Origin::Nft && instances::is_ours(base) {
            continue;
        }
        let of_family = |group: &&Group| base.family.is_none_or(|family| family == group.family);
        let mut ports = None;
        for group in order.iter().filter(of_family) {
            let ports = ports.get_or_insert_with(|| context.chains.ports_that_matter(number));
            let members = groups.get(group).map(Vec::as_slice).unwrap_or_default();
            eval_chain(context, (number, base), ports, group, members, found);
        }
    }
    if context.chains.is_exhausted() {
        report!(
            found,
            Severity::Note,
            findings::UNSEEN,
            "rules: the host has too many rules and interceptions; their effects were evaluated only in part"
        );
    }
    collisions(context, found);
    keep_port(context, found);
}

/// Key of interceptions whose packets differ only in their ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Group {
    family: Family,
    protocol: u8,
    mark: Option<Mark>,
    priority: i32,
    by_iptables: bool,
}

impl Group {
    fn of(interception: &Interception<'_>) -> Group {
        let Interception { family, protocol, mark, priority, chain, .. } = *interception;
        Group { family, protocol, mark, priority, by_iptables: chain.origin != Origin::Nft }
    }

    /// Of two chains with the same priority, the one created last comes first (`nf_hook_entries_grow`). The kernel does not
    /// report which one that is.
    fn is_behind(&self, hook: Hook) -> Order {
        match hook.priority.cmp(&self.priority) {
            Ordering::Greater => Order::Behind,
            // All iptables rules of a hook are in one chain, in their own order.
            Ordering::Equal if !self.by_iptables => Order::Unknown,
            _ => Order::Before,
        }
    }

    /// The packet at a hook. It has no mark and no socket before the rules that intercept it, and both after them.
    fn packet(&self, hook: Hook, port: Option<u16>) -> Packet {
        let met = match hook.point {
            HookPoint::Prerouting => self.is_behind(hook) != Order::Before,
            HookPoint::Input => true,
            _ => false,
        };
        Packet {
            family: self.family,
            protocol: self.protocol,
            port,
            mark: self.mark.filter(|_| met).map_or(0, |mark| mark.value),
            transparent: (met || is_for_replies(hook)) && self.mark.is_some(),
        }
    }
}

/// At this hook, the packets are those that the proxy sends, with any port.
fn is_for_replies(hook: Hook) -> bool {
    matches!(hook.point, HookPoint::Output | HookPoint::Postrouting)
}

/// Whether a base chain sees packets before or after the rules that intercept them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Before,
    Behind,
    Unknown,
}

/// Evaluates a base chain for a group of interceptions. One packet stands for all interceptions whose ports are in the same
/// interval between two elements of `ports`, because no rule distinguishes them.
fn eval_chain(
    context: &Context<'_>,
    (number, base): (usize, &Chain),
    ports: &[u16],
    group: &Group,
    members: &[&Interception<'_>],
    found: &mut Findings,
) {
    let Some(hook) = base.hook else { return };
    let mut classes: HashMap<Option<usize>, usize> = HashMap::new();
    let mut of_class: Vec<(Option<u16>, Vec<&Interception<'_>>)> = Vec::new();
    for member in members {
        if !context.chains.step(1) {
            return;
        }
        let port = member.sample_port().filter(|_| !is_for_replies(hook));
        let class = port.map(|port| ports.partition_point(|matters| *matters <= port));
        let at = *classes.entry(class).or_insert(of_class.len());
        match of_class.get_mut(at) {
            Some((_, others)) => others.push(member),
            None => of_class.push((port, vec![member])),
        }
    }
    for (port, members) in &of_class {
        let Some(outcome) = context.chains.eval_chain(number, group.packet(hook, *port)) else { return };
        FilterCheck { context, base, hook, group, members }.check(&outcome, found);
    }
}

/// Interceptions whose packets have the same result in a base chain of another program.
struct FilterCheck<'a> {
    context: &'a Context<'a>,
    base: &'a Chain,
    hook: Hook,
    group: &'a Group,
    members: &'a [&'a Interception<'a>],
}

impl FilterCheck<'_> {
    fn check(&self, outcome: &Outcome<'_>, found: &mut Findings) {
        if let Some((chain, rule, sure)) = outcome.dropped.filter(|(chain, ..)| !instances::is_ours(chain)) {
            self.dropped(chain, rule, sure, found);
        }
        for effect in &outcome.effects {
            if !self.context.chains.step(1) {
                return;
            }
            if !instances::is_ours(effect.chain) && !self.is_itself(effect) {
                self.affected(effect, found);
            }
        }
    }

    /// Whether the effect is the interception itself.
    fn is_itself(&self, effect: &Effect<'_>) -> bool {
        self.members.iter().all(|member| std::ptr::eq(effect.rule, member.rule))
    }

    fn report<'f>(
        &self,
        found: &'f mut Findings,
        kind: &'static Kind,
        sure: bool,
        words: fmt::Arguments<'_>,
    ) -> &'f mut Finding {
        let severity = if sure { Severity::Failure } else { Severity::Warning };
        let unsure = if sure { "" } else { ", unless another rule of the chain prevents it" };
        report!(found, severity, kind, "{words}{unsure}")
    }

    fn dropped(&self, chain: &Chain, rule: Option<&Rule>, sure: bool, found: &mut Findings) {
        let (kind, whose, fix) = match self.hook.point {
            // With NAT, the listener is an ordinary socket: the owner of the firewall must accept its port.
            HookPoint::Input if self.group.mark.is_some() => {
                (findings::INPUT_DROP, "packets that are intercepted", self.exempt())
            }
            HookPoint::Prerouting => {
                let fix = match self.group.is_behind(self.hook) == Order::Behind {
                    true => self.exempt(),
                    false => self.exempt_selected(),
                };
                (findings::PREROUTING_DROP, "packets that are intercepted", fix)
            }
            HookPoint::Output if sure && self.group.mark.is_some() => {
                let fix = insertion(self.base, self.group.family, &[Clause::FromTransparent]);
                (findings::OUTPUT_DROP, "packets that the proxy sends", fix)
            }
            _ => return,
        };
        let by = std::fmt::from_fn(|f| match rule {
            Some(rule) => write!(f, "{}", ruled(rule, chain)),
            None => write!(f, "the policy of chain {}", named(chain)),
        });
        self.report(found, kind, sure, format_args!("{by} drops {}{whose}", of_family(self.base)))
            .fix_with(format_args!("{fix}"));
    }

    fn affected(&self, effect: &Effect<'_>, found: &mut Findings) {
        let order = self.group.is_behind(self.hook);
        let (after, sure) = (order != Order::Before, effect.sure && order == Order::Behind);
        let of = of_family(self.base);
        let rule = std::fmt::from_fn(|f| write!(f, "{}", ruled(effect.rule, effect.chain)));
        match (self.hook.point, effect.part) {
            (HookPoint::Prerouting, Part::SetMark { keep, set }) if after && !effect.with_tproxy => {
                let Some(mark) = self.group.mark else { return };
                let kept = match set {
                    Some(set) => (mark.value & keep ^ set) & mark.mask == mark.value,
                    None => mark.mask & !keep == 0,
                };
                if !kept {
                    self.report(
                        found,
                        findings::MARK_OVERWRITTEN,
                        sure,
                        format_args!(
                            "{rule} sets the mark of intercepted {of}packets, and does not preserve mark {mark}"
                        ),
                    )
                    .fix_with(format_args!("{}", self.exempt()));
                }
            }
            (HookPoint::Prerouting, Part::Tproxy { port, .. }) if after => {
                self.report(
                    found,
                    findings::TPROXY_ELSEWHERE,
                    sure,
                    format_args!("{rule} assigns intercepted {of}packets to a listener on port {port}"),
                )
                .fix_with(format_args!("{}", self.exempt()));
            }
            (HookPoint::Prerouting, Part::TranslateDestination(_) | Part::Redirect(_)) => {
                let fix = if after { self.exempt() } else { self.exempt_selected() };
                self.report(
                    found,
                    findings::NAT,
                    effect.sure,
                    format_args!("{rule} translates the destination of {of}packets that should be intercepted"),
                )
                .fix_with(format_args!("{fix}"));
            }
            (HookPoint::Postrouting, Part::TranslateSource) if self.group.mark.is_some() => {
                let clauses = [Clause::FromSocket, Clause::NotFromThisHost];
                let fix = insertion(self.base, self.group.family, &clauses);
                report!(
                    found,
                    Severity::Note,
                    findings::MASQUERADE,
                    "{rule} translates the source of {of}packets that leave this host"
                )
                .fix_with(format_args!("{fix}"));
            }
            _ => {}
        }
    }

    /// Returns the command that makes the base chain accept packets with this library's mark.
    fn exempt(&self) -> String {
        match self.group.mark {
            Some(mark) => insertion(self.base, self.group.family, &[Clause::Marked(mark)]),
            None => self.exempt_selected(),
        }
    }

    /// Returns the command that makes the base chain accept only the packets that will be intercepted and have no mark yet.
    /// Other programs rely on the chain to drop all other packets.
    fn exempt_selected(&self) -> String {
        // A range is encoded as one number: the first port in the upper half, the last in the lower half.
        let mut ports: Vec<u32> = Vec::new();
        for member in self.members {
            if member.ports.is_empty() {
                ports.clear();
                break;
            }
            ports.extend(member.ports.iter().map(|(first, last)| u32::from(*first) << 16 | u32::from(*last)));
        }
        ports.sort_unstable();
        ports.dedup();
        let ports: Vec<(u16, u16)> = ports.into_iter().map(|range| ((range >> 16) as u16, range as u16)).collect();
        let Group { family, protocol, .. } = *self.group;
        insertion(self.base, family, &[Clause::OfFamily(family), Clause::To(protocol, &ports), Clause::NotToThisHost])
    }
}

/// Displays a rule by the name that its program uses.
pub(super) fn ruled(rule: &Rule, chain: &Chain) -> impl fmt::Display {
    std::fmt::from_fn(move |f| {
        let number = if chain.origin == Origin::Nft { rule.handle } else { rule.number as u64 };
        write!(f, "rule {number} of chain {}", named(chain))
    })
}

/// Returns "IPv4 " or "IPv6 " if the chain is for one family, and "" otherwise.
fn of_family(chain: &Chain) -> &'static str {
    match chain.family {
        None => "",
        Some(Family::V4) => "IPv4 ",
        Some(Family::V6) => "IPv6 ",
    }
}

/// Reports rules of other programs that set this library's mark.
fn collisions(context: &Context<'_>, found: &mut Findings) {
    let mut marking = Vec::new();
    for chain in context.others() {
        // In reverse order, so that a deletion does not change the numbers of the remaining rules.
        for rule in chain.rules.iter().rev() {
            let delivers = rule.parts.iter().any(|part| matches!(part, Part::Tproxy { .. }));
            let sets = rule.parts.iter().filter_map(|part| match part {
                Part::SetMark { set: Some(set), .. } => Some(*set),
                _ => None,
            });
            marking.extend(sets.filter(|_| !delivers).map(|set| (chain, rule, set)));
        }
    }
    for instance in context.instances.iter().filter(|instance| instance.owner.is_some()) {
        let Some(mark) = instance.mark else { continue };
        for (chain, rule, set) in &marking {
            if !context.chains.step(1) {
                return;
            }
            if set & mark.mask != mark.value {
                continue;
            }
            // Deleting the rule would also delete its other effects.
            let harmless = |part: &Part| matches!(part, Part::OnlyIf(_) | Part::OnlyIfNot(_) | Part::SetMark { .. });
            let fix = if rule.parts.iter().all(harmless) { removal(chain, rule) } else { String::new() };
            let (rule, name) = (ruled(rule, chain), &instance.name);
            found
                .push(
                    Severity::Warning,
                    findings::MARK_COLLISION,
                    format_args!("{rule} sets mark {mark}, which instance {name} uses"),
                )
                .fix_with(format_args!("{fix}"));
        }
    }
}

/// Reports connection tracking, which treats both halves of a connection that keeps its port as one connection.
fn keep_port(context: &Context<'_>, found: &mut Findings) {
    let tracked = context.interceptions.iter().any(|interception| {
        interception.mark.is_some() && context.instance(interception).is_none_or(|instance| !instance.notrack)
    });
    let tracks = |part: &Part| {
        matches!(
            part,
            Part::OnlyIf(Condition::Connection { .. })
                | Part::TranslateSource
                | Part::TranslateDestination(_)
                | Part::Redirect(_)
        )
    };
    let rules = || context.rules().map(|(_, rule)| rule);
    let spared = context.ruleset().chains.iter().any(|chain| chain.table == UNTRACKED);
    if !tracked || spared || !rules().any(|rule| rule.parts.iter().any(tracks)) {
        return;
    }
    let finding = report!(found, Severity::Note, findings::KEEP_PORT, "connection tracking is in use").without_fix();
    // A firewall that accepts replies by connection state would drop untracked packets.
    if context.others().flat_map(|chain| &chain.rules).any(accepts_answers) {
        return;
    }
    // Exempts the packets that transparent sockets send and receive.
    finding.fix_with(format_args!("nft add table inet {UNTRACKED}"));
    for hook in ["prerouting", "output"] {
        finding
            .and(format_args!("nft 'add chain inet {UNTRACKED} {hook} {{ type filter hook {hook} priority raw; }}'"))
            .and(format_args!("nft add rule inet {UNTRACKED} {hook} socket transparent 1 notrack"));
    }
}

/// Whether a rule accepts packets because their connection is established.
fn accepts_answers(rule: &Rule) -> bool {
    const ESTABLISHED: u32 = NF_CT_STATE_BIT(IP_CT_ESTABLISHED);
    let known = |part: &Part| match part {
        Part::OnlyIf(Condition::Connection { states }) => states.is_none_or(|states| states & ESTABLISHED != 0),
        _ => false,
    };
    let accepts = |part: &Part| matches!(part, Part::Verdict(Verdict::Accept | Verdict::Return | Verdict::Other));
    rule.parts.iter().any(known) && rule.parts.iter().any(accepts)
}

/// Name of the table that the fix creates.
const UNTRACKED: &str = "transparent-untracked";
