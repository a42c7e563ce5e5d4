//! What on this host breaks, or weakens, transparent proxying, and what cures it.
//!
//! `facts` gathers (read only), `judge` decides, with no look at the kernel; `findings` has the words.

mod facts;
pub(crate) mod findings;
mod instances;
mod judge;
mod probes;
mod procfs;
mod shell;
mod walk;

pub use findings::{ENTRIES, Entry, Finding, Kind, Severity, page};

/// Looks at this process, its network namespace and the kernel, and says what it found.
///
/// Nothing is changed. What cannot be seen (for want of a privilege, mostly) is said too.
pub fn check() -> Vec<Finding> {
    judge::judge(&facts::Facts::gather())
}
