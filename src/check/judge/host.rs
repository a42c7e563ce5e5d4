//! The process, the kernel, and what could not be seen.

use std::fmt;

use super::{Scene, quoted};
use crate::backend::seen::filter::Origin;
use crate::check::facts::Descriptors;
use crate::check::findings::{self, Findings, Kind, Severity};
use crate::check::procfs::{self, Capabilities};
use crate::model::Family;
use crate::text::Owned;
use crate::{sort, text};

/// The default limit of most systems; a proxy that has less was given less.
const DESCRIPTORS: u64 = 1024;
const DESCRIPTORS_WANTED: u64 = 65_536;

pub(super) fn judge(scene: &Scene<'_>, found: &mut Findings) {
    let facts = scene.facts;
    let version = procfs::version(&facts.kernel);
    let old = version.is_some_and(|version| version < (5, 12));
    let severity = if old { Severity::Warning } else { Severity::Ok };
    say!(found, severity, findings::VERSION, "Linux {}", facts.kernel);

    let namespace = if facts.initial_user_namespace { "the initial user namespace" } else { "a user namespace" };
    let missing = |number| !facts.capabilities.has(number);
    if missing(Capabilities::NET_ADMIN) {
        say!(
            found,
            Severity::Warning,
            findings::NET_ADMIN,
            "this process has no CAP_NET_ADMIN in effect (it is in {namespace})"
        )
        .with("program", &quoted(&facts.program));
    } else if facts.powerless {
        say!(
            found,
            Severity::Warning,
            findings::NET_ADMIN,
            "CAP_NET_ADMIN is in effect in {namespace}, and this network belongs to another"
        )
        .not_cured();
    } else {
        good(found, findings::NET_ADMIN, format_args!("CAP_NET_ADMIN is in effect, in {namespace}"));
    }
    if missing(Capabilities::NET_BIND_SERVICE) {
        say!(found, Severity::Note, findings::BIND_SERVICE, "this process has no CAP_NET_BIND_SERVICE in effect");
    }
    for (family, outcome) in &facts.transparent {
        let kind = findings::TRANSPARENT;
        match outcome {
            Ok(()) => good(found, kind, format_args!("an {family} socket was made transparent")),
            Err(e) if e.errno() == libc::EAFNOSUPPORT => {
                say!(found, Severity::Note, findings::FAMILY, "{family}: {e}");
            }
            Err(e) => {
                let finding = say!(found, Severity::Failure, kind, "{family}: {e}");
                finding.with("program", &quoted(&facts.program));
                // What has a capability that is no good here gets none by another command.
                if facts.powerless {
                    finding.not_cured();
                }
            }
        }
    }
    for (kind, outcome) in &facts.features {
        let needed = if *kind == findings::PERSIST { Severity::Note } else { Severity::Failure };
        match outcome {
            Ok(()) => good(found, kind, format_args!("the kernel would take it")),
            Err(e) => _ = say!(found, needed, kind, "{e}"),
        }
    }
    for family in facts.unrouted.iter() {
        say!(found, Severity::Failure, findings::RULE_TABLES, "the kernel has no routing policy rules for {family}");
    }
    for family in facts.routed.iter() {
        good(found, findings::RULE_TABLES, format_args!("{family} has routing policy rules"));
    }
    iptables(scene, found);
    facts.descriptors.iter().for_each(|of| descriptors(of, found));
    for what in &facts.unseen {
        say!(found, Severity::Note, findings::UNSEEN, "{what}");
    }
}

/// Few are a proxy's end, and so are many when it has them all.
fn descriptors(of: &Descriptors, found: &mut Findings) {
    let Descriptors { pid, soft, hard, used } = *of;
    let whose = text::by(|f| match pid == std::process::id() {
        true => f.write_str("this process"),
        false => write!(f, "process {pid}"),
    });
    let exhausted = used.filter(|used| *used >= soft - soft / 10);
    let kind = findings::DESCRIPTORS;
    let words = text::by(|f| match exhausted {
        Some(used) => write!(f, "{whose} has {used} of the {soft} descriptors that it may have"),
        None if soft < DESCRIPTORS => write!(f, "{whose} may have {soft} descriptors: some {} connections", soft / 2),
        None => write!(f, "{whose} may have {soft} descriptors"),
    });
    if exhausted.is_none() && soft >= DESCRIPTORS {
        return good(found, kind, format_args!("{words}"));
    }
    say!(found, Severity::Warning, kind, "{words}").with("pid", &pid).with("limit", &wanted(soft, hard));
}

/// As many as the hard limit lets; only the administrator of the whole host can raise that one.
fn wanted(soft: u64, hard: u64) -> impl fmt::Display {
    let wanted = DESCRIPTORS_WANTED.max(soft.saturating_mul(2));
    text::by(move |f| match hard {
        u64::MAX => write!(f, "{wanted}:unlimited"),
        hard if hard < DESCRIPTORS || hard <= soft => write!(f, "{wanted}:{wanted}"),
        hard => write!(f, "{}:{hard}", hard.min(wanted)),
    })
}

/// As it should be: there is nothing to cure.
pub(super) fn good(found: &mut Findings, kind: &'static Kind, words: fmt::Arguments<'_>) {
    found.say(Severity::Ok, kind, words).not_cured();
}

fn iptables(scene: &Scene<'_>, found: &mut Findings) {
    let facts = scene.facts;
    let installed = if facts.iptables.is_empty() { "none".owned() } else { facts.iptables.join(", ") };
    let mut by_nft = Vec::new();
    for chain in facts.chains.iter().flatten() {
        if chain.origin == Origin::IptablesNft && chain.hook.is_some() {
            let family = chain.family.map_or("inet", Family::name);
            by_nft.push(format!("{family} {}", chain.table));
        }
    }
    sort::unique(&mut by_nft);
    let listed = |tables: &[String]| if tables.is_empty() { "no tables".owned() } else { tables.join(", ") };
    let (by_nft, legacy) = (listed(&by_nft), listed(&facts.legacy_tables));
    say!(found, Severity::Note, findings::IPTABLES, "installed: {installed}; nft variant: {by_nft}; legacy: {legacy}");
}
