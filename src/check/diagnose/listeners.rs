//! Instances and their listeners.

use std::collections::HashMap;
use std::fmt::Write;

use super::commands::{named, removal, removal_of_jump};
use super::{Context, flag, host, routing};
use crate::backend::holder::Holder;
use crate::backend::nft::table;
use crate::backend::sockets::Listener;
use crate::check::findings::{self, Findings, Kind, Severity};
use crate::check::inspect::filter::{Origin, Part, Verdict};
use crate::check::instances::{self, Instance, Interception};
use crate::model::Protocol;

pub(super) fn check_listeners(context: &Context<'_>, found: &mut Findings) {
    context.instances.iter().for_each(|instance| owners(context, instance, found));
    if let Some(listeners) = &context.host.listeners {
        let mut by_port: HashMap<(u16, u8), Vec<&Listener>> = HashMap::new();
        for listener in &listeners.found {
            by_port.entry((listener.port, listener.protocol.number())).or_default().push(listener);
        }
        let choosing = instances::choosing_otherwise(&context.ruleset().chains);
        for interception in &context.interceptions {
            let instance = context.instance(interception);
            let orphan = instance.is_some_and(|instance| instance.owner.is_none());
            // A chain of ours that no instance speaks for is an orphan too.
            let forsaken = interception.instance.is_some() && instance.is_none();
            let protocols = [Protocol::Tcp, Protocol::Udp];
            let protocol = protocols.into_iter().find(|protocol| protocol.number() == interception.protocol);
            let known = protocol.is_some_and(|protocol| listeners.knows(protocol));
            if orphan || forsaken || !known {
                continue;
            }
            let at_port = by_port.get(&(interception.port, interception.protocol));
            let otherwise = match interception.instance {
                Some(name) => choosing.contains(&name),
                None => instances::chooses_otherwise(interception.rule),
            };
            listener(context, interception, at_port.map(Vec::as_slice).unwrap_or_default(), otherwise, found);
        }
    }
    forsaken_chains(context, found);
}

/// The command that ends the processes that own an instance, and so its rules. Empty: it is not known which they are, or
/// one is the first of its PID namespace, whose end is that of all others.
fn ending(owner: &Holder) -> String {
    let pids: Vec<String> = owner.processes().iter().map(|process| process.pid.to_string()).collect();
    match owner.processes() {
        [] => String::new(),
        processes if processes.iter().any(|process| process.pid == 1) => String::new(),
        _ => format!("kill {}", pids.join(" ")),
    }
}

/// Reports the owner of an instance, and whether the owner is stopped.
fn owners(context: &Context<'_>, instance: &Instance, found: &mut Findings) {
    let Instance { name, table, slot, .. } = instance;
    let Some(owner) = &instance.owner else {
        let finding = found.push(
            Severity::Failure,
            findings::ORPHAN,
            format_args!("instance {name} (table inet {table}) exists, and no process owns it"),
        );
        // The name has no characters that are special to nft or a shell.
        finding.fix_with(format_args!("nft delete table inet {table}"));
        let rules = &context.host.rules;
        let rules = if context.chains.step(rules.len()) { rules.as_slice() } else { &[] };
        for rule in rules.iter().filter(|rule| rule.protocol == routing::PROTOCOL) {
            let (flag, priority) = (flag(rule.family), rule.priority);
            if (slot.priority..slot.priority + 4).contains(&priority) {
                finding.and(format_args!("ip {flag} rule del pref {priority} protocol {}", routing::PROTOCOL));
            }
        }
        return;
    };
    let way = match instance.origin {
        Some(Origin::Nft) => "by nf_tables, ",
        Some(_) => "by iptables, ",
        None => "",
    };
    host::good(
        found,
        findings::INSTANCE,
        format_args!(
            "{name}: {way}of {}, routing rules from {} and routing table {}",
            owner.by_number(),
            slot.priority,
            slot.table
        ),
    );
    for process in owner.processes().iter().filter(|process| context.host.stopped.contains(&process.pid)) {
        found
            .push(
                Severity::Failure,
                findings::STOPPED,
                format_args!("process {}, which owns instance {name}, is stopped", process.pid),
            )
            .with("pid", &process.pid);
    }
}

fn listener(
    context: &Context<'_>,
    interception: &Interception<'_>,
    at_port: &[&Listener],
    chooses_otherwise: bool,
    found: &mut Findings,
) {
    let Interception { family, protocol, port, addr, .. } = interception;
    let candidates: Vec<&Listener> = at_port.iter().copied().filter(|listener| listener.serves(*family)).collect();
    let called = if *protocol == Protocol::Udp.number() { Protocol::Udp } else { Protocol::Tcp };
    let whose = std::fmt::from_fn(|f| match &interception.instance {
        Some(name) => write!(f, "instance {name}"),
        None => write!(f, "chain {}", named(interception.chain)),
    });
    let to = std::fmt::from_fn(|f| match addr {
        Some(addr) => write!(f, "{addr}"),
        None => f.write_str("any address"),
    });
    let mut say = |kind: &'static Kind, what: std::fmt::Arguments<'_>| {
        let finding = found.push(
            Severity::Failure,
            kind,
            format_args!("{whose} delivers {family} {called} packets to {to}, port {port}: {what}"),
        );
        match context.instance(interception).map(|instance| instance.owner.as_ref()) {
            Some(owner) => {
                let command = owner.map(ending).unwrap_or_default();
                finding.fix_with(format_args!("{command}"));
                if let (Some(owner), true) = (owner, command.is_empty()) {
                    let _ = write!(finding.message, "; the rules belong to {owner}");
                }
            }
            None => {
                let command = removal(interception.chain, interception.rule);
                finding.fix_with(format_args!("{command}"));
            }
        }
    };
    if candidates.is_empty() {
        return say(findings::LISTENER_GONE, format_args!("no socket listens there"));
    }
    if interception.nat {
        return;
    }
    let reachable = |listener: &&&Listener| match (addr, listener.addr.map(|addr| addr.to_canonical())) {
        (_, None) => true,
        (Some(wanted), Some(own)) => *wanted == own,
        // An address of some interface suffices, if packets arrive on that interface.
        (None, Some(own)) => !own.is_loopback(),
    };
    let reached: Vec<&&Listener> = candidates.iter().filter(reachable).collect();
    if reached.is_empty() {
        let addrs: Vec<String> =
            candidates.iter().filter_map(|l| l.addr).map(|addr| addr.to_string()).take(SHOWN).collect();
        return say(findings::UNREACHABLE, format_args!("the only listeners of this port are on {}", addrs.join(", ")));
    }
    if reached.iter().all(|listener| listener.transparent == Some(false)) {
        return say(findings::NOT_TRANSPARENT, format_args!("the listener is not transparent"));
    }
    let interface = |index: u32| context.host.interfaces.iter().find(|interface| interface.index == index);
    if reached.iter().all(|listener| listener.interface != 0) && !chooses_otherwise {
        let name = |l: &&&Listener| interface(l.interface).map_or("a deleted one".to_owned(), |i| i.name.to_string());
        let names: Vec<String> = reached.iter().map(name).take(SHOWN).collect();
        return say(findings::BOUND, format_args!("the listener is bound to an interface ({})", names.join(", ")));
    }
    // sk_acceptq_is_full: more than the backlog.
    if let Some(full) = reached.iter().find(|l| l.protocol == Protocol::Tcp && l.waiting > l.backlog) {
        let (waiting, backlog) = (full.waiting, full.backlog);
        found.push(
            Severity::Warning,
            findings::LISTENER_FULL,
            format_args!("port {port}: {waiting} connections wait to be accepted, and the backlog is {backlog}"),
        );
    }
}

/// Maximum number of addresses or names in a message.
const SHOWN: usize = 8;

/// Reports jumps to iptables chains of instances without a running owner.
fn forsaken_chains(context: &Context<'_>, found: &mut Findings) {
    // Only the tables of nf_tables show which instances have an owner.
    let able = context.host.tables.is_some();
    // Index of the finding of each instance.
    let mut said: HashMap<&str, usize> = HashMap::new();
    let bases = context.ruleset().chains.iter().filter(|c| able && c.origin != Origin::Nft && c.hook.is_some());
    for (chain, rule) in bases.flat_map(|chain| chain.rules.iter().map(move |rule| (chain, rule))) {
        let target = rule.parts.iter().find_map(|part| match part {
            Part::Verdict(Verdict::Jump(target)) => Some(target),
            _ => None,
        });
        let to = target.and_then(|target| Some((target.as_str()?, instances::instance_of_chain(target)?)));
        let Some((to, instance)) = to else { continue };
        let lives = |other: &Instance| table::name_of(instance) == other.table && other.owner.is_some();
        if context.instance_named(instance).is_some_and(lives) {
            continue;
        }
        let at = *said.entry(instance).or_insert_with(|| {
            found
                .push(
                    Severity::Failure,
                    findings::IPTABLES_ORPHAN,
                    format_args!("iptables has chains of instance {instance}, and no process owns it"),
                )
                .without_fix();
            found.0.len() - 1
        });
        if let Some(finding) = found.0.get_mut(at) {
            finding.and(format_args!("{}", removal_of_jump(chain, instance, to)));
        }
    }
}
