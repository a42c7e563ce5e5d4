//! Tests a configuration on this kernel. Installs its rules in a temporary network namespace, with listeners as the configuration
//! describes them, and sends probes through them from a second namespace.
//!
//! ```text
//!   client (a namespace) --- veth --- inside (another): the rules, the listeners, and a trace of every packet
//! ```
//!
//! A network namespace belongs to a thread. The test therefore runs in a new thread, which receives no signals and has ended when
//! the call returns. (A child process would not do: in a program with threads, a child may do little before exec.) The host's own
//! rules are not tested; `check` inspects them.

mod link;
mod network;
mod probe;
mod trace;

use crate::check::findings::{self, Finding, Findings, Severity};
use crate::error::{Error, Result};
use crate::model::{Family, Protocol};
use crate::plan::Interfaces;
use crate::rules::{Config, plan};
use crate::sys;
use probe::{Probe, ProbeResult};

/// Returns the name of an interface that the configuration selects.
fn interface(interfaces: Option<&Interfaces>) -> String {
    let first = |list: fn(&Interfaces) -> &Vec<String>| interfaces.and_then(|interfaces| list(interfaces).first());
    match (first(|interfaces| &interfaces.names), first(|interfaces| &interfaces.prefixes)) {
        (Some(name), _) => name.clone(),
        // "ppp*" matches "ppp" too. This name is used if a longer one would not fit.
        (None, Some(prefix)) if prefix.len() + 1 < libc::IFNAMSIZ => format!("{prefix}0"),
        (None, Some(prefix)) => prefix.clone(),
        (None, None) => "eth0".to_owned(),
    }
}

/// Sends a connection and a datagram of each selected family through the rules of a config.
///
/// Does so in a network namespace that exists only during the call, and gives a finding for each.
///
/// ```no_run
/// use tproxy::rules::{Config, Listener, Protocol};
///
/// let listener = Listener::at("[::]:3129".parse()?, Protocol::Tcp)?;
/// for finding in tproxy::self_test(&Config::new([listener]).ports([80]))? {
///     println!("{:?} {}", finding.severity, finding.message);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn self_test(config: &Config) -> Result<Vec<Finding>> {
    // The probes have Ethernet addresses of their own.
    let config = &Config { macs: None, bypass_macs: Vec::new(), ..config.clone() };
    let plan = plan::make(config)?;
    let worker = || -> Result<Vec<Finding>> {
        let network = network::Network::new(&interface(plan.interfaces.as_ref()))?;
        let mut found = Findings::default();
        probe::run(config, &plan, &network)?.iter().for_each(|probe| report(probe, &mut found));
        skipped(config, &plan, &mut found);
        Ok(found.0)
    };
    // Signals of the program are delivered to its own threads.
    let outcome = sys::without_signals(|| sys::in_a_thread("tp_self_test", worker));
    let panicked = || Error::new(libc::ENOTRECOVERABLE, "internal error of libtproxy (a panic); please report it");
    outcome.map_err(|e| Error::io(format_args!("cannot start a thread"), e))?.ok_or_else(panicked)?
}

fn report(probe: &Probe, found: &mut Findings) {
    let (kind, what) = match probe.protocol {
        Protocol::Tcp => (findings::SELF_CONNECTION, "connection"),
        Protocol::Udp => (findings::SELF_DATAGRAM, "datagram"),
    };
    let severity = if probe.result == ProbeResult::Served { Severity::Ok } else { Severity::Failure };
    let result = std::fmt::from_fn(|f| match &probe.result {
        ProbeResult::Served => f.write_str("delivered, and the reply was received"),
        ProbeResult::Wrong(what) => f.write_str(what),
        ProbeResult::Failed(e) => write!(f, "{e}{}", probe.seen()),
        ProbeResult::Unanswered => write!(f, "delivered, but the reply was not received{}", probe.seen()),
        ProbeResult::Lost => write!(f, "lost{}", probe.seen()),
    });
    let (family, from, to) = (probe.family, probe.from, probe.to);
    found.push(severity, kind, format_args!("{family} {what} from {from} to {to}: {result}")).without_fix();
}

/// Reports the families and protocols that the config does not select.
fn skipped(config: &Config, plan: &crate::plan::Plan, found: &mut Findings) {
    let mut skip = |name: &dyn std::fmt::Display| {
        found.push(Severity::Note, findings::SELF_SKIPPED, format_args!("{name}: not selected by the configuration"));
    };
    for family in [Family::V4, Family::V6] {
        if !plan.families.contains(family) || !probe::intercepts(config, family) {
            skip(&family);
        }
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        if !plan.protocols.contains(protocol) {
            skip(&protocol);
        }
    }
}
