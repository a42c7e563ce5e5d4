//! What a kernel or a machine may lack without a fault of the library.
//!
//! Rust's test runner knows no skipped tests. A test that cannot run, or not all of it, prints a line that
//! `tests/check.sh` counts as skipped:
//!
//! ```text
//! skipped: TEST: REASON; needs `COMMAND`
//! ```
//!
//! If the command succeeds for root, the machine can run the test, and `tests/check.sh` fails.

use std::io::Write;
use std::process::Command;
use std::sync::LazyLock;

use super::Net;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// The tables of the legacy iptables, of both families. Their kernel modules cannot be loaded in a user namespace.
    LegacyIptables,
    /// A file below /proc/sys/net. Some appear only in the initial network namespace, or only with a module.
    Sysctl(&'static str),
    /// Flow tables of nf_tables.
    FlowTable,
}

impl Requirement {
    /// A shell command that succeeds in a fresh network namespace where the requirement is met.
    fn command(self) -> String {
        match self {
            Requirement::LegacyIptables => {
                "for t in raw mangle nat filter; do iptables-legacy -t $t -S; ip6tables-legacy -t $t -S; done"
                    .to_owned()
            }
            Requirement::Sysctl(name) => format!("ls /proc/sys/net/{name}"),
            Requirement::FlowTable => "nft 'table inet t { flowtable f { hook ingress priority 0; devices = { lo }; }; \
                                       chain c { type filter hook forward priority 0; ct state established flow add @f; }; }'"
                .to_owned(),
        }
    }

    /// The first complaint of the command if it fails.
    fn missing(self) -> Option<String> {
        let output = Net::new().run(|| Command::new("sh").args(["-ec", &self.command()]).output().unwrap());
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        (!output.status.success()).then(|| complaints.lines().next().unwrap_or("it fails").to_owned())
    }
}

/// The reason why this machine does not meet a requirement.
fn missing(requirement: Requirement) -> Option<String> {
    static LEGACY: LazyLock<Option<String>> = LazyLock::new(|| Requirement::LegacyIptables.missing());
    match requirement {
        Requirement::LegacyIptables => LEGACY.clone(),
        Requirement::Sysctl(_) | Requirement::FlowTable => requirement.missing(),
    }
}

/// Whether this machine meets a requirement.
pub fn is_met(requirement: Requirement) -> bool {
    missing(requirement).is_none()
}

/// Whether this machine meets a requirement. If not, the test that asks counts as skipped, and leaves out what needs it.
#[track_caller]
pub fn provided(requirement: Requirement) -> bool {
    let Some(reason) = missing(requirement) else { return true };
    // The runner names the thread of a test by the test.
    let thread = std::thread::current();
    let place = std::panic::Location::caller().to_string();
    let test = thread.name().filter(|name| *name != "main").unwrap_or(&place);
    report_skipped(&format!("skipped: {test}: {reason}; needs `{}`", requirement.command()));
    false
}

/// Writes such a line to the standard output itself: the runner would swallow what `println!` prints.
pub fn report_skipped(line: &str) {
    std::io::stdout().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}
