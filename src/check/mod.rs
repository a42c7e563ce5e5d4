//! Diagnoses this host: reports the causes that break or weaken transparent proxying, with the commands that fix them.
//!
//! `host_state` collects the state (read only), `diagnose` derives findings from it without access to the kernel, and `findings` has
//! their texts.

mod diagnose;
mod eval;
pub(crate) mod findings;
mod host_state;
pub(crate) mod inspect;
mod instances;
mod probes;
mod procfs;
mod shell;
#[cfg(test)]
mod troubleshooting;

pub use findings::{Finding, Kind, Severity};

/// Inspects this process, its network namespace and the kernel, and returns the findings.
///
/// Changes nothing. Reports which state it cannot read, for example because a privilege is missing.
///
/// ```no_run
/// for finding in tproxy::check::check() {
///     println!("{:?} {}: {}", finding.severity, finding.kind.id, finding.message);
/// }
/// ```
pub fn check() -> Vec<Finding> {
    diagnose::diagnose(&host_state::HostState::collect())
}
