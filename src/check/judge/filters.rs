//! Other people's packet filters, and what they do to what is intercepted.

use std::cmp::Ordering;
use std::fmt;

use super::{Scene, is_plain};
use crate::backend::seen::filter::{Chain, Condition, Hook, Origin, Part, Place, Rule};
use crate::check::findings::{self, Finding, Findings, Kind, Severity};
use crate::check::instances::{self, Interception};
use crate::check::walk::{self, Effect, Packet};
use crate::model::{Family, Mark};
use crate::text;

pub(super) fn judge(scene: &Scene<'_>, found: &mut Findings) {
    for interception in &scene.interceptions {
        let alive = scene.instance(interception).is_some_and(|instance| instance.owner.is_some());
        if alive || interception.instance.is_none() {
            Judged { scene, interception }.judge(found);
        }
    }
    collisions(scene, found);
    keep_port(scene, found);
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
    fn judge(&self, found: &mut Findings) {
        let chains = self.scene.facts.chains.as_deref().unwrap_or_default();
        for base in chains {
            let Some(hook) = base.hook else { continue };
            let other_family = base.family.is_some_and(|family| family != self.interception.family);
            // A table of ours has nothing of others; an iptables chain that leads to ours may.
            if other_family || base.origin == Origin::Nft && instances::is_ours(base) {
                continue;
            }
            let outcome = walk::through(&self.scene.chains, base, self.packet(hook));
            if let Some((chain, rule, sure)) = outcome.dropped.filter(|(chain, ..)| !instances::is_ours(chain)) {
                self.dropped(base, hook, chain, rule, sure, found);
            }
            for effect in &outcome.effects {
                if !instances::is_ours(effect.chain) && !self.is_itself(effect) {
                    self.affected(base, hook, effect, found);
                }
            }
        }
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

    fn say<'f>(
        &self,
        found: &'f mut Findings,
        kind: &'static Kind,
        sure: bool,
        words: fmt::Arguments<'_>,
    ) -> &'f mut Finding {
        let severity = if sure { Severity::Failure } else { Severity::Warning };
        let unsure = if sure { "" } else { ", unless one of its rules says otherwise" };
        say!(found, severity, kind, "{words}{unsure}")
    }

    fn dropped(&self, base: &Chain, hook: Hook, chain: &Chain, rule: Option<&Rule>, sure: bool, found: &mut Findings) {
        let family = self.interception.family;
        let (kind, whose, cure) = match hook.place {
            // NAT's listener is an ordinary one: the firewall's owner has to let its port in.
            Place::Input if self.interception.mark.is_some() => {
                (findings::INPUT_DROP, "packets that are intercepted", self.exempt(base, Some(chain), rule))
            }
            Place::Prerouting => {
                let cure = match self.is_behind(hook) == Order::Behind {
                    true => self.exempt(base, Some(chain), rule),
                    false => removal(chain, rule, family),
                };
                (findings::PREROUTING_DROP, "packets that are intercepted", cure)
            }
            Place::Output if sure && self.interception.mark.is_some() => {
                let cure = insertion(
                    base,
                    family,
                    format_args!("socket transparent 1"),
                    format_args!("-m addrtype ! --src-type LOCAL"),
                );
                (findings::OUTPUT_DROP, "packets that the proxy sends", cure)
            }
            _ => return,
        };
        let by = text::by(|f| match rule {
            Some(rule) => write!(f, "rule {} of chain {}", rule.handle, named(chain)),
            None => write!(f, "the policy of chain {}", named(chain)),
        });
        self.say(found, kind, sure, format_args!("{by} drops {}{whose}", of_family(base)))
            .cured_by(format_args!("{cure}"));
    }

    fn affected(&self, base: &Chain, hook: Hook, effect: &Effect<'_>, found: &mut Findings) {
        let (family, order) = (self.interception.family, self.is_behind(hook));
        let (after, sure) = (order != Order::Before, effect.sure && order == Order::Behind);
        let of = of_family(base);
        let rule = text::by(|f| write!(f, "rule {} of chain {}", effect.rule.handle, named(effect.chain)));
        match (hook.place, effect.part) {
            (Place::Prerouting, Part::SetMark { keep, set }) if after && !effect.with_tproxy => {
                let Some(mark) = self.interception.mark else { return };
                let kept = match set {
                    Some(set) => (mark.value & keep ^ set) & mark.mask == mark.value,
                    None => mark.mask & !keep == 0,
                };
                if !kept {
                    self.say(
                        found,
                        findings::MARK_OVERWRITTEN,
                        sure,
                        format_args!("{rule} sets the mark of {of}packets that are intercepted, and keeps not {mark}"),
                    )
                    .cured_by(format_args!("{}", self.exempt(base, None, None)));
                }
            }
            (Place::Prerouting, Part::Tproxy { port, .. }) if after => {
                self.say(
                    found,
                    findings::TPROXY_ELSEWHERE,
                    sure,
                    format_args!("{rule} gives {of}packets that are intercepted to a listener on port {port}"),
                )
                .cured_by(format_args!("{}", self.exempt(base, None, None)));
            }
            (Place::Prerouting, Part::TranslateDestination(_) | Part::Redirect(_)) => {
                let cure = match after && self.interception.mark.is_some() {
                    true => self.exempt(base, None, None),
                    false => removal(effect.chain, Some(effect.rule), family),
                };
                self.say(
                    found,
                    findings::NAT,
                    effect.sure,
                    format_args!("{rule} translates the destination of {of}packets that are to be intercepted"),
                )
                .cured_by(format_args!("{cure}"));
            }
            (Place::Postrouting, Part::TranslateSource) if self.interception.mark.is_some() => {
                let cure = insertion(
                    base,
                    family,
                    format_args!("meta skuid >= 0 fib saddr type != local"),
                    format_args!("-m owner --socket-exists -m addrtype ! --src-type LOCAL"),
                );
                say!(
                    found,
                    Severity::Note,
                    findings::MASQUERADE,
                    "{rule} translates the source of {of}packets that leave"
                )
                .cured_by(format_args!("{cure}"));
            }
            _ => {}
        }
    }

    /// Lets what has our mark through a base chain; where there is no mark to know it by, the culprit goes.
    fn exempt(&self, base: &Chain, chain: Option<&Chain>, rule: Option<&Rule>) -> String {
        match self.interception.mark {
            Some(Mark { value, mask }) => insertion(
                base,
                self.interception.family,
                format_args!("meta mark and {mask:#x} == {value:#x}"),
                format_args!("-m mark --mark {value:#x}/{mask:#x}"),
            ),
            None => removal(chain.unwrap_or(base), rule, self.interception.family),
        }
    }
}

/// "IPv4 ", if a chain is for that alone.
fn of_family(chain: &Chain) -> &'static str {
    match chain.family {
        None => "",
        Some(Family::V4) => "IPv4 ",
        Some(Family::V6) => "IPv6 ",
    }
}

/// Rules of others that give packets the mark that is ours.
fn collisions(scene: &Scene<'_>, found: &mut Findings) {
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
                let cure = removal(chain, Some(rule), chain.family.unwrap_or(Family::V4));
                found
                    .say(
                        Severity::Warning,
                        findings::MARK_COLLISION,
                        format_args!(
                            "rule {} of chain {} gives packets the mark {mark}, which is instance {}'s",
                            rule.handle,
                            named(chain),
                            instance.name
                        ),
                    )
                    .cured_by(format_args!("{cure}"));
            }
        }
    }
}

/// Connection tracking, where both halves of a connection that keeps its port are one.
fn keep_port(scene: &Scene<'_>, found: &mut Findings) {
    let Some(chains) = &scene.facts.chains else { return };
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
    if tracked && !spared && rules().any(|rule| rule.parts.iter().any(tracks)) {
        let finding = say!(found, Severity::Note, findings::KEEP_PORT, "connection tracking is in use");
        // Keeps what transparent sockets send and get out of it.
        finding.cured_by(format_args!("nft add table inet {UNTRACKED}"));
        for hook in ["prerouting", "output"] {
            finding
                .and(format_args!(
                    "nft 'add chain inet {UNTRACKED} {hook} {{ type filter hook {hook} priority raw; }}'"
                ))
                .and(format_args!("nft add rule inet {UNTRACKED} {hook} socket transparent 1 notrack"));
        }
    }
}

/// The table that the cure makes.
const UNTRACKED: &str = "transparent-untracked";

/// A chain as its program calls it.
pub(super) fn named(chain: &Chain) -> impl fmt::Display {
    text::by(move |f| {
        let Chain { table, name, .. } = chain;
        match chain.origin {
            Origin::Nft => write!(f, "{} {table} {name}", nft_family(chain)),
            origin => write!(f, "{} -t {table} {name}", program(origin, chain.family.unwrap_or(Family::V4))),
        }
    })
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
fn insertion(chain: &Chain, family: Family, by_nft: fmt::Arguments<'_>, by_iptables: fmt::Arguments<'_>) -> String {
    match chain.origin {
        _ if !can_be_named(chain) => String::new(),
        Origin::Nft => format!("nft 'insert rule {} {by_nft} accept'", named(chain)),
        origin => format!("{} -t {} -I {} {by_iptables} -j ACCEPT", program(origin, family), chain.table, chain.name),
    }
}

/// The command that removes a rule; without one, a chain's policy.
pub(super) fn removal(chain: &Chain, rule: Option<&Rule>, family: Family) -> String {
    let Chain { table, name, .. } = chain;
    let program = program(chain.origin, family);
    match (chain.origin, rule) {
        _ if !can_be_named(chain) => String::new(),
        (Origin::Nft, Some(rule)) => format!("nft delete rule {} handle {}", named(chain), rule.handle),
        (Origin::Nft, None) => format!("nft 'chain {} {{ policy accept; }}'", named(chain)),
        (_, Some(rule)) => format!("{program} -t {table} -D {name} {}", rule.handle),
        (_, None) => format!("{program} -t {table} -P {name} ACCEPT"),
    }
}
