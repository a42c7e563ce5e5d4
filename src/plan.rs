//! The plan: computed from a config (`rules/plan.rs`), and installed by a backend.

use std::net::IpAddr;

use crate::model::{Families, Family, Mark, Mode, PortRange, Protocol, Protocols};
use crate::prefix::PrefixSet;

/// A valid config with all defaults resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub name: String,
    pub mode: Mode,
    /// Mark of packets for local sockets.
    pub mark: Mark,
    /// Mark of this host's own packets that are looped back via `lo` to reach a proxy here; `None`: none are.
    pub loop_mark: Option<Mark>,
    /// Also intercept traffic that this host sends.
    pub local_output: bool,
    /// Deliver replies of this host's servers to transparent sockets.
    pub local_servers: bool,
    /// Intercept only TCP packets that begin a connection.
    pub new_only: bool,
    pub families: Families,
    /// The config selects no families: the families are those of the listeners, and only IPv4 on a host without IPv6.
    pub families_are_default: bool,
    pub protocols: Protocols,
    /// Listeners that receive intercepted packets; empty with [`Mode::DivertOnly`].
    pub intercepts: Vec<Intercept>,
    /// Drop packets addressed directly to the listeners.
    pub guard: bool,
    /// Forward matching traffic while no listener exists.
    pub fail_open: bool,
    /// Exempt intercepted packets from connection tracking.
    pub notrack: bool,
    /// Keep the rules after the process has ended.
    pub persist: bool,
    /// Sorted ranges that do not touch. `None`: every port; empty: none.
    pub ports: Option<Vec<PortRange>>,
    /// `None`: every destination except this host's own addresses, loopback, broadcast and multicast.
    pub dst: Option<PrefixSet>,
    /// `None`: every source.
    pub src: Option<PrefixSet>,
    /// `None`: no destination is exempt, and the rules have no such set.
    pub bypass: Option<PrefixSet>,
    /// Interfaces on which forwarded traffic arrives. `None`: every interface; empty: none.
    pub interfaces: Option<Interfaces>,
    /// `None`: a free one.
    pub table: Option<u32>,
    pub priority: Option<u32>,
}

/// Interfaces on which packets arrive: by name, and by the beginning of the name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interfaces {
    pub names: Vec<String>,
    pub prefixes: Vec<String>,
}

/// A listener, for one family or for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intercept {
    pub protocol: Protocol,
    /// `None`: both families.
    pub family: Option<Family>,
    /// `None`: the wildcard address. Otherwise `family` is set.
    pub addr: Option<IpAddr>,
    pub port: u16,
}

impl Plan {
    /// Returns the listeners that can be reached directly, and whose direct packets are dropped.
    pub fn direct_drops(&self) -> impl Iterator<Item = Intercept> {
        let reachable = |listener: &Intercept| listener.addr.is_none_or(|addr| !addr.is_loopback());
        self.intercepts.iter().copied().filter(move |listener| self.guard && reachable(listener))
    }

    /// Whether the selection could match replies of connections that other hosts began, which connection tracking must then
    /// recognize.
    ///
    /// Replies go to a client's port, which is above 1023: a selection of lower ports matches none. NAT rules see only the first
    /// packet of a connection and match none either, nor does a selection of packets that begin a TCP connection.
    pub fn may_match_replies(&self, protocol: Protocol) -> bool {
        const FIRST_OF_CLIENTS: u16 = 1024;
        let ports = self.ports.as_ref().is_none_or(|ports| ports.iter().any(|range| range.last >= FIRST_OF_CLIENTS));
        let begins_only = self.new_only && protocol == Protocol::Tcp;
        self.mode == Mode::Tproxy && ports && !begins_only && self.protocols.contains(protocol)
    }

    /// Returns the family over which a protocol is served, if it is exactly one.
    pub fn family_of(&self, protocol: Protocol) -> Option<Family> {
        let serves = |family: Family| {
            let listeners = self.intercepts.iter().filter(|listener| listener.protocol == protocol);
            listeners.map(|listener| listener.family).any(|served| served.is_none_or(|served| served == family))
        };
        let v4 = self.families.v4 && serves(Family::V4);
        let v6 = self.families.v6 && serves(Family::V6);
        Families { v4, v6 }.only()
    }

    /// Restricts the plan to IPv4, for a host without IPv6.
    pub fn leave_ipv6(&mut self) {
        self.families.v6 = false;
        self.intercepts.retain(|listener| listener.family != Some(Family::V6));
        for listener in &mut self.intercepts {
            listener.family = Some(Family::V4);
        }
    }
}
