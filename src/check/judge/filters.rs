//! Other people's packet filters, and what they do to what is intercepted.

use std::cmp::Ordering;

use super::{Scene, all_of, is_plain};
use crate::backend::seen::filter::{Chain, Condition, Hook, Origin, Part, Place, Rule};
use crate::check::findings::{self, Finding, Kind, Severity};
use crate::check::instances::{self, Interception};
use crate::check::walk::{self, Effect, Packet};
use crate::model::{Family, Mark};

pub(super) fn judge(scene: &Scene<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for interception in &scene.interceptions {
        let alive = scene.instance(interception).is_some_and(|instance| instance.owner.is_some());
        if alive || interception.instance.is_none() {
            found.extend(Judged { scene, interception }.findings());
        }
    }
    found.extend(collisions(scene));
    found.extend(keep_port(scene));
    found
}

/// Whether a base chain sees packets before the rules that intercept them, or behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Before,
    Behind,
    Unknown,
}

/// One interception against every base chain of others.
struct Judged<'a> {
    scene: &'a Scene<'a>,
    interception: &'a Interception,
}

impl Judged<'_> {
    fn findings(&self) -> Vec<Finding> {
        let chains = self.scene.facts.chains.as_deref().unwrap_or_default();
        let mut found = Vec::new();
        for base in chains {
            let Some(hook) = base.hook else { continue };
            let other_family = base.family.is_some_and(|family| family != self.interception.family);
            // A table of ours has nothing of others; an iptables chain that leads to ours may.
            if other_family || base.origin == Origin::Nft && instances::is_ours(base) {
                continue;
            }
            let outcome = walk::through(&self.scene.chains, base, self.packet(hook));
            if let Some((chain, rule, sure)) = outcome.dropped.filter(|(chain, ..)| !instances::is_ours(chain)) {
                found.extend(self.dropped(base, hook, chain, rule, sure));
            }
            let foreign =
                outcome.effects.iter().filter(|effect| !instances::is_ours(effect.chain) && !self.is_itself(effect));
            found.extend(foreign.filter_map(|effect| self.affected(base, hook, effect)));
        }
        found
    }

    fn is_itself(&self, effect: &Effect<'_>) -> bool {
        effect.chain == &self.interception.chain && effect.rule == &self.interception.rule
    }

    /// The packet at a hook: until it meets the rules it is anybody's, from then on it has the mark and a socket.
    fn packet(&self, hook: Hook) -> Packet {
        let Interception { family, protocol, ports, mark, .. } = self.interception;
        let met = match hook.place {
            Place::Prerouting => self.is_behind(hook) != Order::Before,
            Place::Input => true,
            _ => false,
        };
        let replies = matches!(hook.place, Place::Output | Place::Postrouting);
        Packet {
            family: *family,
            protocol: *protocol,
            port: ports.first().map(|(first, _)| *first).filter(|_| !replies),
            mark: mark.filter(|_| met).map_or(0, |mark| mark.value),
            transparent: (met || replies) && mark.is_some(),
        }
    }

    /// Of two chains of one priority that comes first which was made last (`nf_hook_entries_grow`); nobody can see which.
    fn is_behind(&self, hook: Hook) -> Order {
        match hook.priority.cmp(&self.interception.priority) {
            Ordering::Greater => Order::Behind,
            // Chains by iptables are all in one, in an order of their own.
            Ordering::Equal if self.interception.chain.origin == Origin::Nft => Order::Unknown,
            _ => Order::Before,
        }
    }

    fn finding(&self, kind: &'static Kind, sure: bool, words: String) -> Finding {
        let severity = if sure { Severity::Failure } else { Severity::Warning };
        let unsure = if sure { "" } else { ", unless one of its rules says otherwise" };
        Finding::new(severity, kind, format!("{words}{unsure}"))
    }

    fn dropped(&self, base: &Chain, hook: Hook, chain: &Chain, rule: Option<&Rule>, sure: bool) -> Option<Finding> {
        let by = match rule {
            Some(rule) => format!("rule {} of chain {}", rule.handle, named(chain)),
            None => format!("the policy of chain {}", named(chain)),
        };
        let words = format!("{by} drops {}packets that are intercepted", of_family(base));
        match hook.place {
            // NAT's listener is an ordinary one: the firewall's owner has to let its port in.
            Place::Input if self.interception.mark.is_none() => None,
            Place::Input => {
                Some(self.finding(findings::INPUT_DROP, sure, words).cured_by(self.exempt(base, Some(chain), rule)))
            }
            Place::Prerouting => {
                let cure = match self.is_behind(hook) == Order::Behind {
                    true => self.exempt(base, Some(chain), rule),
                    false => removal(chain, rule, self.interception.family),
                };
                Some(self.finding(findings::PREROUTING_DROP, sure, words).cured_by(cure))
            }
            Place::Output if sure && self.interception.mark.is_some() => {
                let words = format!("{by} drops {}packets that the proxy sends", of_family(base));
                let cure =
                    insertion(base, self.interception.family, "socket transparent 1", "-m addrtype ! --src-type LOCAL");
                Some(self.finding(findings::OUTPUT_DROP, true, words).cured_by(cure))
            }
            _ => None,
        }
    }

    fn affected(&self, base: &Chain, hook: Hook, effect: &Effect<'_>) -> Option<Finding> {
        let (family, order) = (self.interception.family, self.is_behind(hook));
        let (after, sure) = (order != Order::Before, effect.sure && order == Order::Behind);
        let of = of_family(base);
        let rule = format!("rule {} of chain {}", effect.rule.handle, named(effect.chain));
        match (hook.place, effect.part) {
            (Place::Prerouting, Part::SetMark { keep, set }) if after && !effect.with_tproxy => {
                let mark = self.interception.mark?;
                let kept = match set {
                    Some(set) => (mark.value & keep ^ set) & mark.mask == mark.value,
                    None => mark.mask & !keep == 0,
                };
                let words = format!("{rule} sets the mark of {of}packets that are intercepted, and keeps not {mark}");
                (!kept).then(|| {
                    self.finding(findings::MARK_OVERWRITTEN, sure, words).cured_by(self.exempt(base, None, None))
                })
            }
            (Place::Prerouting, Part::Tproxy { port, .. }) if after => {
                let words = format!("{rule} gives {of}packets that are intercepted to a listener on port {port}");
                Some(self.finding(findings::TPROXY_ELSEWHERE, sure, words).cured_by(self.exempt(base, None, None)))
            }
            (Place::Prerouting, Part::TranslateDestination(_) | Part::Redirect(_)) => {
                let words = format!("{rule} translates the destination of {of}packets that are to be intercepted");
                let cure = match after && self.interception.mark.is_some() {
                    true => self.exempt(base, None, None),
                    false => removal(effect.chain, Some(effect.rule), family),
                };
                Some(self.finding(findings::NAT, effect.sure, words).cured_by(cure))
            }
            (Place::Postrouting, Part::TranslateSource) if self.interception.mark.is_some() => {
                let words = format!("{rule} translates the source of {of}packets that leave");
                let cure = insertion(
                    base,
                    family,
                    "meta skuid >= 0 fib saddr type != local",
                    "-m owner --socket-exists -m addrtype ! --src-type LOCAL",
                );
                Some(Finding::new(Severity::Note, findings::MASQUERADE, words).cured_by(cure))
            }
            _ => None,
        }
    }

    /// Lets what has our mark through a base chain; where there is no mark to know it by, the culprit goes.
    fn exempt(&self, base: &Chain, chain: Option<&Chain>, rule: Option<&Rule>) -> String {
        match self.interception.mark {
            Some(Mark { value, mask }) => insertion(
                base,
                self.interception.family,
                &format!("meta mark and {mask:#x} == {value:#x}"),
                &format!("-m mark --mark {value:#x}/{mask:#x}"),
            ),
            None => removal(chain.unwrap_or(base), rule, self.interception.family),
        }
    }
}

/// "IPv4 ", if a chain is for that alone.
fn of_family(chain: &Chain) -> String {
    chain.family.map_or(String::new(), |family| format!("{family} "))
}

/// Rules of others that give packets the mark that is ours.
fn collisions(scene: &Scene<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for instance in scene.instances.iter().filter(|instance| instance.owner.is_some()) {
        let Some(mark) = instance.mark else { continue };
        for chain in scene.facts.chains.iter().flatten().filter(|chain| !instances::is_ours(chain)) {
            for rule in &chain.rules {
                let delivers = rule.parts.iter().any(|part| matches!(part, Part::Tproxy { .. }));
                let ours =
                    |part: &Part| matches!(part, Part::SetMark { set: Some(set), .. } if set & mark.mask == mark.value);
                if delivers || !rule.parts.iter().any(ours) {
                    continue;
                }
                let words = format!(
                    "rule {} of chain {} gives packets the mark {mark}, which is instance {}'s",
                    rule.handle,
                    named(chain),
                    instance.name
                );
                let cure = removal(chain, Some(rule), chain.family.unwrap_or(Family::V4));
                found.push(Finding::new(Severity::Warning, findings::MARK_COLLISION, words).cured_by(cure));
            }
        }
    }
    found
}

/// Connection tracking, where both halves of a connection that keeps its port are one.
fn keep_port(scene: &Scene<'_>) -> Option<Finding> {
    let chains = scene.facts.chains.as_deref()?;
    let tracked = scene.interceptions.iter().any(|interception| {
        interception.mark.is_some() && scene.instance(interception).is_none_or(|instance| !instance.notrack)
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
    let rules = || chains.iter().flat_map(|chain| &chain.rules);
    let spared = chains.iter().any(|chain| chain.table == UNTRACKED);
    if !tracked || spared || !rules().any(|rule| rule.parts.iter().any(tracks)) {
        return None;
    }
    let words = "connection tracking is in use";
    Some(Finding::new(Severity::Note, findings::KEEP_PORT, words).cured_by(untrack()))
}

/// The table that the cure makes.
const UNTRACKED: &str = "transparent-untracked";

/// Keeps what transparent sockets send and get out of connection tracking.
fn untrack() -> String {
    let chain = |hook: &str| {
        [
            format!("nft 'add chain inet {UNTRACKED} {hook} {{ type filter hook {hook} priority raw; }}'"),
            format!("nft add rule inet {UNTRACKED} {hook} socket transparent 1 notrack"),
        ]
    };
    let first = format!("nft add table inet {UNTRACKED}");
    all_of(std::iter::once(first).chain(chain("prerouting")).chain(chain("output")))
}

/// A chain as its program calls it.
pub(super) fn named(chain: &Chain) -> String {
    match chain.origin {
        Origin::Nft => format!("{} {} {}", nft_family(chain), chain.table, chain.name),
        origin => format!("{} -t {} {}", program(origin, chain.family.unwrap_or(Family::V4)), chain.table, chain.name),
    }
}

/// Its names can be part of a command.
fn can_be_named(chain: &Chain) -> bool {
    is_plain(&chain.table) && is_plain(&chain.name)
}

fn nft_family(chain: &Chain) -> &'static str {
    match chain.family {
        None => "inet",
        Some(Family::V4) => "ip",
        Some(Family::V6) => "ip6",
    }
}

fn program(origin: Origin, family: Family) -> &'static str {
    match (origin, family) {
        (Origin::IptablesLegacy, Family::V4) => "iptables-legacy",
        (Origin::IptablesLegacy, Family::V6) => "ip6tables-legacy",
        (_, Family::V4) => "iptables-nft",
        (_, Family::V6) => "ip6tables-nft",
    }
}

/// The command that puts a rule first in a chain: what matches (in nft's words, and in iptables') leaves it accepted.
fn insertion(chain: &Chain, family: Family, by_nft: &str, by_iptables: &str) -> String {
    match chain.origin {
        _ if !can_be_named(chain) => String::new(),
        Origin::Nft => format!("nft 'insert rule {} {by_nft} accept'", named(chain)),
        origin => format!("{} -t {} -I {} {by_iptables} -j ACCEPT", program(origin, family), chain.table, chain.name),
    }
}

/// The command that removes a rule; without one, a chain's policy.
pub(super) fn removal(chain: &Chain, rule: Option<&Rule>, family: Family) -> String {
    match (chain.origin, rule) {
        _ if !can_be_named(chain) => String::new(),
        (Origin::Nft, Some(rule)) => format!("nft delete rule {} handle {}", named(chain), rule.handle),
        (Origin::Nft, None) => format!("nft 'chain {} {{ policy accept; }}'", named(chain)),
        (origin, Some(rule)) => {
            format!("{} -t {} -D {} {}", program(origin, family), chain.table, chain.name, rule.handle)
        }
        (origin, None) => format!("{} -t {} -P {} ACCEPT", program(origin, family), chain.table, chain.name),
    }
}
