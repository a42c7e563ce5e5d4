//! Checks the process and the kernel, and reports state that could not be read.

use std::fmt;

use super::Context;
use crate::check::findings::{self, Findings, Kind, Severity};
use crate::check::host_state::{Descriptors, NET_ADMIN, NET_BIND_SERVICE, NET_RAW};
use crate::check::inspect::filter::Origin;
use crate::check::probes::Transparency;
use crate::check::procfs;
use crate::model::Family;

/// Default descriptor limit of most systems. A lower limit was set deliberately.
const DESCRIPTORS: u64 = 1024;
const DESCRIPTORS_WANTED: u64 = 65_536;

pub(super) fn check_host(context: &Context<'_>, found: &mut Findings) {
    let host = context.host;
    let version = procfs::version(&host.kernel);
    let old = version.is_some_and(|version| version < (5, 12));
    let severity = if old { Severity::Warning } else { Severity::Ok };
    if !host.kernel.is_empty() {
        report!(found, severity, findings::VERSION, "Linux {}", host.kernel);
    }

    let namespace = match host.initial_user_namespace {
        Some(true) => " in the initial user namespace",
        Some(false) => " in a user namespace",
        None => "",
    };
    match host.has(NET_ADMIN) {
        Some(false) => {
            let why = refused(context, &[NET_ADMIN]);
            report!(
                found,
                Severity::Warning,
                findings::NET_ADMIN,
                "this process has no CAP_NET_ADMIN in effect{namespace}{why}"
            )
            .fix_with(format_args!("{}", starting(context)));
        }
        Some(true) if host.powerless => {
            report!(
                found,
                Severity::Warning,
                findings::NET_ADMIN,
                "CAP_NET_ADMIN is in effect{namespace}, but another user namespace owns this network namespace"
            )
            .without_fix();
        }
        Some(true) => good(found, findings::NET_ADMIN, format_args!("CAP_NET_ADMIN is in effect{namespace}")),
        None => {}
    }
    if host.has(NET_BIND_SERVICE) == Some(false) {
        report!(found, Severity::Note, findings::BIND_SERVICE, "this process has no CAP_NET_BIND_SERVICE in effect");
    }
    for (family, outcome) in &host.transparent {
        let kind = findings::TRANSPARENT;
        match outcome {
            Transparency::Yes => good(found, kind, format_args!("an {family} socket was made transparent")),
            Transparency::NoFamily => {
                report!(found, Severity::Note, findings::FAMILY, "this process cannot create {family} sockets");
            }
            Transparency::Refused(e) => {
                let capable = [NET_ADMIN, NET_RAW].into_iter().any(|capability| host.has(capability) == Some(true));
                let why = if capable { String::new() } else { refused(context, &[NET_ADMIN, NET_RAW]) };
                // A process that has the capability is not helped by a restart with it.
                let command = if capable { String::new() } else { starting(context) };
                report!(found, Severity::Failure, kind, "{family}: {e}{why}").fix_with(format_args!("{command}"));
            }
            Transparency::Unknown(e) => {
                let kind = findings::UNSEEN;
                report!(found, Severity::Note, kind, "transparent {family} sockets: not tested, socket(): {e}");
            }
        }
    }
    for (kind, outcome) in &host.features {
        let needed = if *kind == findings::PERSIST { Severity::Note } else { Severity::Failure };
        match outcome {
            Ok(()) => good(found, kind, format_args!("the kernel supports it")),
            Err(e) => _ = report!(found, needed, kind, "{e}"),
        }
    }
    for family in host.unrouted.iter() {
        report!(found, Severity::Failure, findings::RULE_TABLES, "the kernel has no routing policy rules for {family}");
    }
    for family in host.routed.iter() {
        good(found, findings::RULE_TABLES, format_args!("{family} has routing policy rules"));
    }
    iptables(context, found);
    host.descriptors.iter().for_each(|of| descriptors(of, found));
    for what in &host.unseen {
        report!(found, Severity::Note, findings::UNSEEN, "{what}");
    }
}

/// Returns why this process cannot have the capabilities, or an empty text if that is unknown.
fn refused(context: &Context<'_>, capabilities: &[u32]) -> String {
    match capabilities.iter().all(|capability| context.host.out_of_bounds.contains(capability)) {
        true => "; no program that it starts can have it either, because the bounding set lacks it: the container or \
             service manager must grant it"
            .to_owned(),
        false => String::new(),
    }
}

/// Returns the command that starts a program with only the required capabilities, as the user of this process. Empty: the
/// bounding set does not allow it.
///
/// The command never is setcap(8): every user who can execute a file has the file's capabilities, and every script has
/// those of its interpreter. The arguments of this process are omitted, because they may contain secrets.
fn starting(context: &Context<'_>) -> String {
    let host = context.host;
    if [NET_ADMIN, NET_RAW].into_iter().any(|capability| host.out_of_bounds.contains(&capability)) {
        return String::new();
    }
    let ids = match host.ids {
        Some((uid, gid)) if uid != 0 => format!("--reuid={uid} --regid={gid} --clear-groups "),
        _ => String::new(),
    };
    format!("setpriv {ids}--inh-caps=+net_admin,+net_raw --ambient-caps=+net_admin,+net_raw PROGRAM")
}

/// Warns if the limit is low or nearly reached.
fn descriptors(of: &Descriptors, found: &mut Findings) {
    let Descriptors { pid, soft, hard, used } = *of;
    let whose = std::fmt::from_fn(|f| match pid == std::process::id() {
        true => f.write_str("this process"),
        false => write!(f, "process {pid}"),
    });
    let exhausted = used.filter(|used| *used >= soft.saturating_sub(soft / 10));
    let kind = findings::DESCRIPTORS;
    let words = std::fmt::from_fn(|f| match exhausted {
        Some(used) => write!(f, "{whose} has {used} open descriptors, and its limit is {soft}"),
        None if soft < DESCRIPTORS => {
            write!(f, "the descriptor limit of {whose} is {soft}, which allows about {} connections", soft / 2)
        }
        None => write!(f, "the descriptor limit of {whose} is {soft}"),
    });
    if exhausted.is_none() && soft >= DESCRIPTORS {
        return good(found, kind, format_args!("{words}"));
    }
    report!(found, Severity::Warning, kind, "{words}").with("pid", &pid).with("limit", &wanted(soft, hard));
}

/// Returns the limits to set. Only an administrator of the whole host can raise the hard limit.
fn wanted(soft: u64, hard: u64) -> impl fmt::Display {
    let wanted = DESCRIPTORS_WANTED.max(soft.saturating_mul(2));
    std::fmt::from_fn(move |f| match hard {
        u64::MAX => write!(f, "{wanted}:unlimited"),
        hard if hard < DESCRIPTORS || hard <= soft => write!(f, "{wanted}:{wanted}"),
        hard => write!(f, "{}:{hard}", hard.min(wanted)),
    })
}

/// Reports a passed check, which has no fix.
pub(super) fn good(found: &mut Findings, kind: &'static Kind, words: fmt::Arguments<'_>) {
    found.push(Severity::Ok, kind, words).without_fix();
}

fn iptables(context: &Context<'_>, found: &mut Findings) {
    let host = context.host;
    let installed = if host.iptables.is_empty() { "none".to_owned() } else { host.iptables.join(", ") };
    let mut by_nft = Vec::new();
    for chain in &context.ruleset().chains {
        if chain.origin == Origin::IptablesNft && chain.hook.is_some() {
            let family = chain.family.map_or("inet", Family::name);
            let table = format!("{family} {}", chain.table);
            if !by_nft.contains(&table) {
                by_nft.push(table);
            }
        }
    }
    let listed = |tables: &[String]| if tables.is_empty() { "no tables".to_owned() } else { tables.join(", ") };
    let unknown = || "unknown".to_owned();
    let by_nft = if host.ruleset.is_some() { listed(&by_nft) } else { unknown() };
    let legacy = if host.legacy_known { listed(&host.legacy_tables) } else { unknown() };
    report!(
        found,
        Severity::Note,
        findings::IPTABLES,
        "installed: {installed}; nft variant: {by_nft}; legacy: {legacy}"
    );
}
