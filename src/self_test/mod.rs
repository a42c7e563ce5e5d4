//! Does a configuration work on this kernel? Its rules are installed in a network that exists only meanwhile, with
//! listeners as it wants them, and probes are sent through, from outside.
//!
//! ```text
//!   outside (a namespace) --- veth --- inside (another): the rules, the listeners, and a trace of every packet
//! ```
//!
//! A network namespace belongs to a thread, and so this is done in a thread of its own, which has ended when the call
//! returns; it gets no signals. (A child process could do it too, but in a program with threads a child may hardly do
//! anything before exec.) The host's own rules are not there: `check` judges those.

mod network;
mod probe;

use crate::check::findings::{self, Finding, Severity};
use crate::error::{Error, Result};
use crate::model::{Family, Protocol};
use crate::rules::{Config, plan};
use crate::sys;
use probe::{Fate, Probe};

/// Sends a connection and a datagram of each family, as far as the wish asks for them, through its rules.
pub fn self_test(config: &Config) -> Result<Vec<Finding>> {
    let plan = plan::make(config)?;
    let worker = || -> Result<Vec<Finding>> {
        let network = network::Network::new(config.interfaces.first().map_or("eth0", String::as_str))?;
        Ok(probe::run(config, &plan, &network)?.iter().map(judge).chain(skipped(config, &plan)).collect())
    };
    let failed =
        |e: std::io::Error| Error::new(e.raw_os_error().unwrap_or(libc::EIO), format!("starting a thread: {e}"));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("tp_self_test".to_owned());
        // A program's signals are for its own threads.
        let thread = sys::without_signals(|| thread.spawn_scoped(scope, worker)).map_err(failed)?;
        let panicked =
            |_| Error::new(libc::ENOTRECOVERABLE, "an error in libtproxy itself (a panic); please report it");
        thread.join().map_err(panicked)?
    })
}

fn judge(probe: &Probe) -> Finding {
    let (kind, what) = match probe.protocol {
        Protocol::Tcp => (findings::SELF_CONNECTION, "connection"),
        Protocol::Udp => (findings::SELF_DATAGRAM, "datagram"),
    };
    let words = format!("{} {what} from {} to {}", probe.family, probe.from, probe.to);
    match &probe.fate {
        Fate::Served => Finding::new(Severity::Ok, kind, format!("{words}: delivered, and answered")).cured_by(""),
        Fate::Wrong(what) => Finding::new(Severity::Failure, kind, format!("{words}: {what}")),
        Fate::Failed(e) => Finding::new(Severity::Failure, kind, format!("{words}: {e}{}", probe.seen())),
        Fate::Unanswered => Finding::new(
            Severity::Failure,
            kind,
            format!("{words}: delivered, but no answer came back{}", probe.seen()),
        ),
        Fate::Lost => Finding::new(Severity::Failure, kind, format!("{words}: lost{}", probe.seen())),
    }
}

/// What the wish does not ask for was not tried.
fn skipped(config: &Config, plan: &crate::model::Plan) -> Vec<Finding> {
    let tried = |family: Family| plan.families.contains(family) && probe::destination(config, family).is_some();
    let families = [Family::V4, Family::V6].into_iter().filter(|family| !tried(*family));
    let protocols = [Protocol::Tcp, Protocol::Udp].into_iter().filter(|protocol| !plan.protocols.contains(*protocol));
    let names = families.map(|family| family.to_string()).chain(protocols.map(|protocol| protocol.to_string()));
    names.map(|name| Finding::new(Severity::Note, findings::SELF_SKIPPED, format!("{name}: not asked for"))).collect()
}
