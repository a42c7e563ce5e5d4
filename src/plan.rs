//! What the kernel shall hold: what the rules make of a config (`rules/plan.rs`), and what backends carry out.

use std::net::IpAddr;

use crate::model::{Families, Family, Mark, Mode, PortRange, Protocol, Protocols};
use crate::prefix::PrefixSet;

/// A config that can be carried out, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub name: String,
    pub mode: Mode,
    /// The mark of packets for local sockets.
    pub mark: Mark,
    /// The mark of packets that this host sends and that return by `lo`, to reach a proxy here; `None`: none do.
    pub loop_mark: Option<Mark>,
    /// Traffic that this host sends is intercepted.
    pub local_output: bool,
    /// Replies of this host's servers to transparent sockets return to these.
    pub local_servers: bool,
    /// Of TCP, only packets that begin a connection are intercepted.
    pub new_only: bool,
    pub families: Families,
    /// The config names no families: these are what the listeners serve, and IPv4 alone will do where there is no IPv6.
    pub families_are_default: bool,
    pub protocols: Protocols,
    /// Who gets what is intercepted; none with [`Mode::DivertOnly`].
    pub intercepts: Vec<Intercept>,
    /// Connections made straight to the listeners are dropped.
    pub guard: bool,
    /// Without a listener, traffic passes by.
    pub fail_open: bool,
    /// What is intercepted is kept out of connection tracking.
    pub notrack: bool,
    /// The rules outlive the process.
    pub persist: bool,
    /// Sorted and apart from each other. `None`: every port; empty: none.
    pub ports: Option<Vec<PortRange>>,
    /// `None`: every destination but those that are the host's own, or nobody's.
    pub dst: Option<PrefixSet>,
    /// `None`: every source.
    pub src: Option<PrefixSet>,
    /// `None`: there are none, and the rules do not look for any.
    pub bypass: Option<PrefixSet>,
    /// Where forwarded traffic comes in. `None`: by every interface; empty: by none.
    pub interfaces: Option<Interfaces>,
    /// `None`: whatever is free.
    pub table: Option<u32>,
    pub priority: Option<u32>,
}

/// Interfaces by which packets come in: those of these names, and those whose names begin so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interfaces {
    pub names: Vec<String>,
    pub prefixes: Vec<String>,
}

/// A listener, for one family or for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intercept {
    pub protocol: Protocol,
    /// `None`: both.
    pub family: Option<Family>,
    /// `None`: it is bound to every address. Else there is a family.
    pub addr: Option<IpAddr>,
    pub port: u16,
}

impl Plan {
    /// The listeners that can be reached without interception, and shall not be.
    pub fn direct_drops(&self) -> impl Iterator<Item = Intercept> {
        let reachable = |listener: &Intercept| listener.addr.is_none_or(|addr| !addr.is_loopback());
        self.intercepts.iter().copied().filter(move |listener| self.guard && reachable(listener))
    }

    /// The selection may match replies of connections that others began, so that connection tracking has to tell them.
    ///
    /// Replies go to a client's port, which is above 1023: a selection of lower ports matches none. Nor does NAT, which
    /// sees the first packets of connections only, nor a selection of packets that begin a TCP connection.
    pub fn may_match_replies(&self, protocol: Protocol) -> bool {
        const FIRST_OF_CLIENTS: u16 = 1024;
        let ports = self.ports.as_ref().is_none_or(|ports| ports.iter().any(|range| range.last >= FIRST_OF_CLIENTS));
        let begins_only = self.new_only && protocol == Protocol::Tcp;
        self.mode == Mode::Tproxy && ports && !begins_only && self.protocols.contains(protocol)
    }

    /// The family over which a protocol is served, if there is but one.
    pub fn family_of(&self, protocol: Protocol) -> Option<Family> {
        let serves = |family: Family| {
            let listeners = self.intercepts.iter().filter(|listener| listener.protocol == protocol);
            listeners.map(|listener| listener.family).any(|served| served.is_none_or(|served| served == family))
        };
        let v4 = self.families.v4 && serves(Family::V4);
        let v6 = self.families.v6 && serves(Family::V6);
        Families { v4, v6 }.only()
    }

    /// The same for IPv4 alone, on a host that has no IPv6.
    pub fn leave_ipv6(&mut self) {
        self.families.v6 = false;
        self.intercepts.retain(|listener| listener.family != Some(Family::V6));
        for listener in &mut self.intercepts {
            listener.family = Some(Family::V4);
        }
    }
}
