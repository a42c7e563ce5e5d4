//! From facts to findings, with no look at the kernel: each file judges one part.

mod filters;
mod host;
mod listeners;
mod routing;
mod sysctls;

use super::facts::Facts;
use super::findings::Finding;
use super::instances::{self, Instance, Interception};

/// Who intercepts what, on the host that the facts are of.
struct Scene<'a> {
    facts: &'a Facts,
    instances: Vec<Instance>,
    interceptions: Vec<Interception>,
}

/// Everything that is to be said, the host itself first; each thing once.
pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let chains = facts.chains.as_deref().unwrap_or_default();
    let scene = Scene {
        facts,
        instances: instances::instances(&facts.tables, chains),
        interceptions: instances::interceptions(chains),
    };
    let mut findings: Vec<Finding> = Vec::new();
    for judged in [
        host::judge(&scene),
        listeners::judge(&scene),
        routing::judge(&scene),
        sysctls::judge(&scene),
        filters::judge(&scene),
    ] {
        for finding in judged {
            // One command cures both families, often.
            let known = |other: &Finding| {
                *other == finding || other.kind == finding.kind && other.cure == finding.cure && !other.cure.is_empty()
            };
            if !findings.iter().any(known) {
                findings.push(finding);
            }
        }
    }
    findings
}

impl Scene<'_> {
    fn instance(&self, interception: &Interception) -> Option<&Instance> {
        let name = interception.instance.as_ref()?;
        self.instances.iter().find(|instance| instance.name == *name)
    }

    /// Something is intercepted here.
    fn intercepts(&self) -> bool {
        !self.interceptions.is_empty()
    }
}

/// The option of `ip` that means a family.
fn flag(family: crate::model::Family) -> &'static str {
    match family {
        crate::model::Family::V4 => "-4",
        crate::model::Family::V6 => "-6",
    }
}

/// Commands that are all to be done.
fn all_of(commands: impl IntoIterator<Item = String>) -> String {
    commands.into_iter().collect::<Vec<_>>().join(" && ")
}
