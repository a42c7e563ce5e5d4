//! The process, the kernel, and what could not be seen.

use super::{Scene, quoted};
use crate::check::facts::Descriptors;
use crate::check::findings::{self, Finding, Severity};
use crate::check::procfs::{self, Capabilities};

/// The default limit of most systems; a proxy that has less was given less.
const DESCRIPTORS: u64 = 1024;
const DESCRIPTORS_WANTED: u64 = 65_536;

pub(super) fn judge(scene: &Scene<'_>) -> Vec<Finding> {
    let facts = scene.facts;
    let mut found = Vec::new();
    let version = procfs::version(&facts.kernel);
    let old = version.is_some_and(|version| version < (5, 12));
    let severity = if old { Severity::Warning } else { Severity::Ok };
    found.push(Finding::new(severity, findings::VERSION, format!("Linux {}", facts.kernel)));

    let namespace = if facts.initial_user_namespace { "the initial user namespace" } else { "a user namespace" };
    let missing = |number| !facts.capabilities.has(number);
    found.push(match missing(Capabilities::NET_ADMIN) {
        true => Finding::new(
            Severity::Warning,
            findings::NET_ADMIN,
            format!("this process has no CAP_NET_ADMIN in effect (it is in {namespace})"),
        )
        .with("program", quoted(&facts.program)),
        false if facts.powerless => {
            let words = format!("CAP_NET_ADMIN is in effect in {namespace}, and this network belongs to another");
            Finding::new(Severity::Warning, findings::NET_ADMIN, words).cured_by("")
        }
        false => good(findings::NET_ADMIN, format!("CAP_NET_ADMIN is in effect, in {namespace}")),
    });
    if missing(Capabilities::NET_BIND_SERVICE) {
        let words = "this process has no CAP_NET_BIND_SERVICE in effect";
        found.push(Finding::new(Severity::Note, findings::BIND_SERVICE, words));
    }
    for (family, outcome) in &facts.transparent {
        found.push(match outcome {
            Ok(()) => good(findings::TRANSPARENT, format!("an {family} socket was made transparent")),
            Err(e) if e.errno() == libc::EAFNOSUPPORT => {
                Finding::new(Severity::Note, findings::FAMILY, format!("{family}: {e}"))
            }
            // What has a capability that is no good here gets none by another command.
            Err(e) if facts.powerless => {
                Finding::new(Severity::Failure, findings::TRANSPARENT, format!("{family}: {e}")).cured_by("")
            }
            Err(e) => Finding::new(Severity::Failure, findings::TRANSPARENT, format!("{family}: {e}"))
                .with("program", quoted(&facts.program)),
        });
    }
    for (kind, outcome) in &facts.features {
        let needed = if *kind == findings::PERSIST { Severity::Note } else { Severity::Failure };
        found.push(match outcome {
            Ok(()) => good(kind, "the kernel would take it".to_owned()),
            Err(e) => Finding::new(needed, kind, e.to_string()),
        });
    }
    for family in facts.unrouted.iter() {
        let words = format!("the kernel has no routing policy rules for {family}");
        found.push(Finding::new(Severity::Failure, findings::RULE_TABLES, words));
    }
    for family in facts.routed.iter() {
        found.push(good(findings::RULE_TABLES, format!("{family} has routing policy rules")));
    }
    found.push(Finding::new(Severity::Note, findings::IPTABLES, iptables(scene)));
    found.extend(facts.descriptors.iter().map(descriptors));
    found.extend(facts.unseen.iter().map(|what| Finding::new(Severity::Note, findings::UNSEEN, what)));
    found
}

/// Few are a proxy's end, and so are many when it has them all.
fn descriptors(of: &Descriptors) -> Finding {
    let Descriptors { pid, soft, hard, used } = *of;
    let whose = if pid == std::process::id() { "this process".to_owned() } else { format!("process {pid}") };
    let exhausted = used.filter(|used| *used >= soft - soft / 10);
    let words = match exhausted {
        Some(used) => format!("{whose} has {used} of the {soft} descriptors that it may have"),
        None if soft < DESCRIPTORS => format!("{whose} may have {soft} descriptors: some {} connections", soft / 2),
        None => return good(findings::DESCRIPTORS, format!("{whose} may have {soft} descriptors")),
    };
    Finding::new(Severity::Warning, findings::DESCRIPTORS, words).with("pid", pid).with("limit", wanted(soft, hard))
}

/// As many as the hard limit lets; only the administrator of the whole host can raise that one.
fn wanted(soft: u64, hard: u64) -> String {
    let wanted = DESCRIPTORS_WANTED.max(soft.saturating_mul(2));
    match hard {
        u64::MAX => format!("{wanted}:unlimited"),
        hard if hard < DESCRIPTORS || hard <= soft => format!("{wanted}:{wanted}"),
        hard => format!("{}:{hard}", hard.min(wanted)),
    }
}

/// As it should be: there is nothing to cure.
pub(super) fn good(kind: &'static findings::Kind, found: String) -> Finding {
    Finding::new(Severity::Ok, kind, found).cured_by("")
}

fn iptables(scene: &Scene<'_>) -> String {
    let facts = scene.facts;
    let installed = if facts.iptables.is_empty() { "none".to_owned() } else { facts.iptables.join(", ") };
    let by_nft = facts.chains.iter().flatten();
    let mut by_nft: Vec<String> = by_nft
        .filter(|chain| chain.origin == crate::backend::seen::filter::Origin::IptablesNft && chain.hook.is_some())
        .map(|chain| format!("{} {}", chain.family.map_or("inet".to_owned(), |f| f.to_string()), chain.table))
        .collect();
    crate::sort::unique(&mut by_nft);
    let listed = |tables: &[String]| if tables.is_empty() { "no tables".to_owned() } else { tables.join(", ") };
    format!("installed: {installed}; nft variant: {}; legacy: {}", listed(&by_nft), listed(&facts.legacy_tables))
}
