//! Instances and their listeners.

use std::net::IpAddr;

use super::{Scene, all_of, filters, flag, host, quoted};
use crate::backend::nft::table;
use crate::backend::seen::filter::{Origin, Part, Verdict};
use crate::backend::seen::sockets::Listener;
use crate::check::findings::{self, Finding, Kind, Severity};
use crate::check::instances::{self, Instance, Interception};
use crate::model::Protocol;

pub(super) fn judge(scene: &Scene<'_>) -> Vec<Finding> {
    let mut found: Vec<Finding> = scene.instances.iter().flat_map(|instance| owners(scene, instance)).collect();
    for interception in &scene.interceptions {
        let orphan = scene.instance(interception).is_some_and(|instance| instance.owner.is_none());
        // A chain of ours that no instance speaks for is an orphan too.
        let forsaken = interception.instance.is_some() && scene.instance(interception).is_none();
        if let (Some(listeners), false) = (&scene.facts.listeners, orphan || forsaken) {
            found.extend(listener(scene, interception, listeners));
        }
    }
    found.extend(forsaken_chains(scene));
    found
}

/// Whose an instance is, and whether that one is well.
fn owners(scene: &Scene<'_>, instance: &Instance) -> Vec<Finding> {
    let Instance { name, table, place, .. } = instance;
    let Some(pid) = instance.owner else {
        let rules = scene.facts.rules.iter().filter(|rule| rule.protocol == super::routing::PROTOCOL);
        let own = rules.filter(|rule| (place.priority..place.priority + 4).contains(&rule.priority));
        let delete = format!("nft delete table inet {}", quoted(table));
        let commands = own.map(|rule| format!("ip {} rule del pref {} protocol 116", flag(rule.family), rule.priority));
        let words = format!("instance {name} (table inet {table}) persists, and no process owns it");
        let cure = all_of(std::iter::once(delete).chain(commands));
        return vec![Finding::new(Severity::Failure, findings::ORPHAN, words).cured_by(cure)];
    };
    let way = if instance.by_iptables { "iptables" } else { "nf_tables" };
    let words = format!(
        "{name}: by {way}, of process {pid}, routing rules from {} and routing table {}",
        place.priority, place.table
    );
    let mut found = vec![host::good(findings::INSTANCE, words)];
    if scene.facts.stopped.contains(&pid) {
        let words = format!("process {pid}, which instance {name} belongs to, is stopped");
        found.push(Finding::new(Severity::Failure, findings::STOPPED, words).with("pid", pid));
    }
    found
}

fn listener(scene: &Scene<'_>, interception: &Interception, listeners: &[Listener]) -> Option<Finding> {
    let Interception { family, protocol, port, addr, .. } = interception;
    let served = |listener: &&Listener| {
        listener.port == *port && listener.protocol.number() == *protocol && listener.serves(*family)
    };
    let candidates: Vec<&Listener> = listeners.iter().filter(served).collect();
    let named = if *protocol == Protocol::Udp.number() { Protocol::Udp } else { Protocol::Tcp };
    let whose = match &interception.instance {
        Some(name) => format!("instance {name}"),
        None => format!("chain {}", filters::named(&interception.chain)),
    };
    let to = addr.map_or("any address".to_owned(), |addr| addr.to_string());
    let finding = |kind: &'static Kind, what: String| {
        let words = format!("{whose} gives {family} {named} packets to {to}, port {port}, where {what}");
        let finding = Finding::new(Severity::Failure, kind, words);
        Some(match scene.instance(interception).and_then(|instance| instance.owner) {
            Some(pid) => finding.with("pid", pid),
            None => finding.cured_by(filters::removal(&interception.chain, Some(&interception.rule), *family)),
        })
    };
    if candidates.is_empty() {
        return finding(findings::LISTENER_GONE, "nothing listens".to_owned());
    }
    if interception.nat {
        return None;
    }
    let reachable = |listener: &&&Listener| match (addr, listener.addr.map(|addr| addr.to_canonical())) {
        (_, None) => true,
        (Some(wanted), Some(own)) => *wanted == own,
        // The address of some interface will do, if it is the one that the packets come in by.
        (None, Some(own)) => !own.is_loopback(),
    };
    let reached: Vec<&&Listener> = candidates.iter().filter(reachable).collect();
    if reached.is_empty() {
        let addrs: Vec<String> =
            candidates.iter().filter_map(|l| l.addr).map(|addr: IpAddr| addr.to_string()).collect();
        return finding(findings::UNREACHABLE, format!("a listener is, but on {}", addrs.join(", ")));
    }
    if reached.iter().all(|listener| listener.transparent == Some(false)) {
        return finding(findings::NOT_TRANSPARENT, "the listener is not transparent".to_owned());
    }
    let interface = |index: u32| scene.facts.interfaces.iter().find(|interface| interface.index == index);
    if reached.iter().all(|listener| listener.interface != 0)
        && !instances::chooses_otherwise(scene.facts.chains.as_deref().unwrap_or_default(), interception)
    {
        let named = |l: &&&Listener| interface(l.interface).map_or("one that is gone".to_owned(), |i| i.name.clone());
        let names: Vec<String> = reached.iter().map(named).collect();
        return finding(findings::BOUND, format!("the listener is bound to an interface ({})", names.join(", ")));
    }
    // sk_acceptq_is_full: more than the backlog.
    let full = reached.iter().find(|l| l.protocol == Protocol::Tcp && l.waiting > l.backlog)?;
    let words = format!("port {port}: {} connections wait to be accepted, and {} may", full.waiting, full.backlog);
    Some(Finding::new(Severity::Warning, findings::LISTENER_FULL, words))
}

/// Jumps to iptables chains of instances that have no living owner.
fn forsaken_chains(scene: &Scene<'_>) -> Vec<Finding> {
    // On a host without nf_tables nobody can tell who lives.
    let able = scene.facts.features.iter().any(|(kind, outcome)| *kind == findings::NF_TABLES && outcome.is_ok());
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
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
            let family = chain.family.unwrap_or(crate::model::Family::V4);
            let command = filters::removal(chain, Some(rule), family);
            match found.iter_mut().find(|(name, _)| name == instance) {
                Some((_, commands)) => commands.push(command),
                None => found.push((instance.to_owned(), vec![command])),
            }
        }
    }
    let finding = |(instance, commands): (String, Vec<String>)| {
        let words = format!("iptables has chains of instance {instance}, which no process owns");
        Finding::new(Severity::Failure, findings::IPTABLES_ORPHAN, words).cured_by(all_of(commands))
    };
    found.into_iter().map(finding).collect()
}
