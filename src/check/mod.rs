//! What on this host breaks, or weakens, transparent proxying, and what cures it.
//!
//! `host_state` gathers (read only), `diagnose` decides, with no look at the kernel; `findings` has the words.

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

/// Looks at this process, its network namespace and the kernel, and says what it found.
///
/// Nothing is changed. What cannot be seen (for want of a privilege, mostly) is said too.
///
/// ```no_run
/// for finding in tproxy::check::check() {
///     println!("{:?} {}: {}", finding.severity, finding.kind.id, finding.message);
/// }
/// ```
pub fn check() -> Vec<Finding> {
    diagnose::diagnose(&host_state::HostState::collect())
}
