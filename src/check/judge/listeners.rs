//! Instances and their listeners.

use std::fmt;

use super::{Scene, filters, flag, host, quoted, routing};
use crate::backend::nft::table;
use crate::backend::seen::filter::{Origin, Part, Verdict};
use crate::backend::seen::sockets::Listener;
use crate::check::findings::{self, Findings, Kind, Severity};
use crate::check::instances::{self, Instance, Interception};
use crate::list::List;
use crate::model::{Family, Protocol};
use crate::text;

pub(super) fn judge(scene: &Scene<'_>, found: &mut Findings) {
    scene.instances.iter().for_each(|instance| owners(scene, instance, found));
    for interception in &scene.interceptions {
        let orphan = scene.instance(interception).is_some_and(|instance| instance.owner.is_none());
        // A chain of ours that no instance speaks for is an orphan too.
        let forsaken = interception.instance.is_some() && scene.instance(interception).is_none();
        if let (Some(listeners), false) = (&scene.facts.listeners, orphan || forsaken) {
            listener(scene, interception, listeners, found);
        }
    }
    forsaken_chains(scene, found);
}

/// Whose an instance is, and whether that one is well.
fn owners(scene: &Scene<'_>, instance: &Instance, found: &mut Findings) {
    let Instance { name, table, place, .. } = instance;
    let Some(pid) = instance.owner else {
        let finding = found.say(
            Severity::Failure,
            findings::ORPHAN,
            format_args!("instance {name} (table inet {table}) persists, and no process owns it"),
        );
        finding.cured_by(format_args!("nft delete table inet {}", quoted(table)));
        for rule in scene.facts.rules.iter().filter(|rule| rule.protocol == routing::PROTOCOL) {
            let (flag, priority) = (flag(rule.family), rule.priority);
            if (place.priority..place.priority + 4).contains(&priority) {
                finding.and(format_args!("ip {flag} rule del pref {priority} protocol {}", routing::PROTOCOL));
            }
        }
        return;
    };
    let way = if instance.by_iptables { "iptables" } else { "nf_tables" };
    host::good(
        found,
        findings::INSTANCE,
        format_args!(
            "{name}: by {way}, of process {pid}, routing rules from {} and routing table {}",
            place.priority, place.table
        ),
    );
    if scene.facts.stopped.contains(&pid) {
        found
            .say(
                Severity::Failure,
                findings::STOPPED,
                format_args!("process {pid}, which instance {name} belongs to, is stopped"),
            )
            .with("pid", &pid);
    }
}

fn listener(scene: &Scene<'_>, interception: &Interception, listeners: &[Listener], found: &mut Findings) {
    let Interception { family, protocol, port, addr, .. } = interception;
    let served = |listener: &&Listener| {
        listener.port == *port && listener.protocol.number() == *protocol && listener.serves(*family)
    };
    let candidates: Vec<&Listener> = listeners.iter().filter(served).list();
    let named = if *protocol == Protocol::Udp.number() { Protocol::Udp } else { Protocol::Tcp };
    let whose = text::by(|f| match &interception.instance {
        Some(name) => write!(f, "instance {name}"),
        None => write!(f, "chain {}", filters::named(&interception.chain)),
    });
    let to = text::by(|f| match addr {
        Some(addr) => write!(f, "{addr}"),
        None => f.write_str("any address"),
    });
    let mut say = |kind: &'static Kind, what: fmt::Arguments<'_>| {
        let finding = found.say(
            Severity::Failure,
            kind,
            format_args!("{whose} gives {family} {named} packets to {to}, port {port}, where {what}"),
        );
        match scene.instance(interception).and_then(|instance| instance.owner) {
            Some(pid) => finding.with("pid", &pid),
            None => {
                let removal = filters::removal(&interception.chain, Some(&interception.rule), *family);
                finding.cured_by(format_args!("{removal}"))
            }
        };
    };
    if candidates.is_empty() {
        return say(findings::LISTENER_GONE, format_args!("nothing listens"));
    }
    if interception.nat {
        return;
    }
    let reachable = |listener: &&&Listener| match (addr, listener.addr.map(|addr| addr.to_canonical())) {
        (_, None) => true,
        (Some(wanted), Some(own)) => *wanted == own,
        // The address of some interface will do, if it is the one that the packets come in by.
        (None, Some(own)) => !own.is_loopback(),
    };
    let reached: Vec<&&Listener> = candidates.iter().filter(reachable).list();
    if reached.is_empty() {
        let addrs: Vec<String> = candidates.iter().filter_map(|l| l.addr).map(|addr| addr.to_string()).list();
        return say(findings::UNREACHABLE, format_args!("a listener is, but on {}", addrs.join(", ")));
    }
    if reached.iter().all(|listener| listener.transparent == Some(false)) {
        return say(findings::NOT_TRANSPARENT, format_args!("the listener is not transparent"));
    }
    let interface = |index: u32| scene.facts.interfaces.iter().find(|interface| interface.index == index);
    if reached.iter().all(|listener| listener.interface != 0)
        && !instances::chooses_otherwise(scene.facts.chains.as_deref().unwrap_or_default(), interception)
    {
        let name = |l: &&&Listener| interface(l.interface).map_or("one that is gone", |i| &i.name);
        let names: Vec<&str> = reached.iter().map(name).list();
        return say(findings::BOUND, format_args!("the listener is bound to an interface ({})", names.join(", ")));
    }
    // sk_acceptq_is_full: more than the backlog.
    if let Some(full) = reached.iter().find(|l| l.protocol == Protocol::Tcp && l.waiting > l.backlog) {
        let (waiting, backlog) = (full.waiting, full.backlog);
        found.say(
            Severity::Warning,
            findings::LISTENER_FULL,
            format_args!("port {port}: {waiting} connections wait to be accepted, and {backlog} may"),
        );
    }
}

/// Jumps to iptables chains of instances that have no living owner.
fn forsaken_chains(scene: &Scene<'_>, found: &mut Findings) {
    // On a host without nf_tables nobody can tell who lives.
    let able = scene.facts.features.iter().any(|(kind, outcome)| *kind == findings::NF_TABLES && outcome.is_ok());
    // Where the finding of each instance is.
    let mut said: Vec<(&str, usize)> = Vec::new();
    for chain in scene.facts.chains.iter().flatten().filter(|c| able && c.origin != Origin::Nft && c.hook.is_some()) {
        // The last first, so that the numbers of the others stay.
        for rule in chain.rules.iter().rev() {
            let target = rule.parts.iter().find_map(|part| match part {
                Part::Verdict(Verdict::Jump(target)) => Some(target),
                _ => None,
            });
            let Some(instance) = target.and_then(|target| crate::backend::iptables::instance_of(target)) else {
                continue;
            };
            let lives = |other: &Instance| table::name_of(instance) == other.table && other.owner.is_some();
            if scene.instances.iter().any(lives) {
                continue;
            }
            let at = match said.iter().find(|(name, _)| *name == instance) {
                Some((_, at)) => *at,
                None => {
                    said.push((instance, found.0.len()));
                    found
                        .say(
                            Severity::Failure,
                            findings::IPTABLES_ORPHAN,
                            format_args!("iptables has chains of instance {instance}, which no process owns"),
                        )
                        .not_cured();
                    found.0.len() - 1
                }
            };
            let family = chain.family.unwrap_or(Family::V4);
            found.0[at].and(format_args!("{}", filters::removal(chain, Some(rule), family)));
        }
    }
}
