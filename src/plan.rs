//! The plan: computed from a config (`rules/plan.rs`), and installed by a backend.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::backend::nft::table::Record;
use crate::model::{Backend, Families, Family, IdRange, MacAddr, Mark, Mode, Options, PortRange, Protocol, Protocols};
use crate::ports;
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
    /// Destination ports to intercept: sorted ranges that do not touch. `None`: every port; empty: none.
    pub ports: ByProtocol<Option<Vec<PortRange>>>,
    /// Destination ports that are refused instead, likewise. They need no listener of the protocol.
    pub reject: ByProtocol<Vec<PortRange>>,
    /// `None`: every destination except this host's own addresses, loopback, broadcast and multicast.
    pub dst: Option<PrefixSet>,
    /// `None`: every source.
    pub src: Option<PrefixSet>,
    /// `None`: no source is exempt, and the rules have no such set.
    pub bypass_src: Option<PrefixSet>,
    /// `None`: no destination is exempt, and the rules have no such set.
    pub bypass: Option<PrefixSet>,
    /// Interfaces on which forwarded traffic arrives. `None`: every interface; empty: none.
    pub interfaces: Option<Interfaces>,
    /// Interfaces of which nothing is intercepted.
    pub bypass_interfaces: Interfaces,
    /// Ethernet sources of forwarded traffic, sorted. `None`: every source, by Ethernet or not; empty: none.
    pub macs: Option<Vec<MacAddr>>,
    pub bypass_macs: Vec<MacAddr>,
    /// Whose traffic is intercepted, of that which this host sends.
    pub owners: Owners,
    /// `None`: a free one.
    pub table: Option<u32>,
    pub priority: Option<u32>,
    /// Sets of addresses with a timeout that exist in the table; empty until the first address is learned.
    pub learned: Learned,
}

/// The families that have a set of learned addresses. Rules ask only sets that exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Learned {
    pub dst: Families,
    pub bypass: Families,
}

/// A value for each protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ByProtocol<T> {
    pub tcp: T,
    pub udp: T,
}

impl<T> ByProtocol<T> {
    pub fn of(&self, protocol: Protocol) -> &T {
        match protocol {
            Protocol::Tcp => &self.tcp,
            Protocol::Udp => &self.udp,
        }
    }
}

/// The owners of sockets whose packets are selected, and of those that are exempt. Ranges are sorted and do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Owners {
    pub uids: Option<Vec<IdRange>>,
    pub bypass_uids: Vec<IdRange>,
    pub gids: Option<Vec<IdRange>>,
    pub bypass_gids: Vec<IdRange>,
    pub cgroups: Option<Vec<Cgroup>>,
    pub bypass_cgroups: Vec<Cgroup>,
    /// The mark of packets that are exempt.
    pub bypass_mark: Option<Mark>,
}

impl Owners {
    /// Only some owners are selected.
    pub fn narrow(&self) -> bool {
        self.uids.is_some() || self.gids.is_some() || self.cgroups.is_some()
    }

    /// Every owner is selected.
    pub fn is_everyone(&self) -> bool {
        *self == Owners::default()
    }

    pub fn all_cgroups(&mut self) -> impl Iterator<Item = &mut Cgroup> {
        self.cgroups.iter_mut().flatten().chain(&mut self.bypass_cgroups)
    }
}

/// A control group of cgroup v2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    /// Path below the root, without a slash before and behind.
    pub path: String,
    /// The number by which the kernel knows it: the inode number of its directory. 0 until it has been looked up.
    pub id: u64,
}

impl Cgroup {
    /// How far below the root it is.
    pub fn level(&self) -> u32 {
        self.path.split('/').filter(|part| !part.is_empty()).count() as u32
    }
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
        let candidates = self.candidate_ports(protocol);
        let ports = candidates.is_none_or(|ports| ports.iter().any(|range| range.last >= FIRST_OF_CLIENTS));
        let begins_only = self.new_only && protocol == Protocol::Tcp;
        self.mode == Mode::Tproxy && ports && !begins_only
    }

    /// The ports of a protocol that are intercepted or refused. `None`: every port; empty: none.
    pub fn candidate_ports(&self, protocol: Protocol) -> Option<Vec<PortRange>> {
        let rejected = self.reject.of(protocol);
        match self.ports.of(protocol) {
            None if self.protocols.contains(protocol) => None,
            Some(ports) if self.protocols.contains(protocol) => Some(ports::union(ports, rejected)),
            _ => Some(rejected.clone()),
        }
    }

    /// The protocols of which packets are intercepted or refused.
    pub fn candidate_protocols(&self) -> impl Iterator<Item = Protocol> {
        let chosen = |protocol: &Protocol| self.candidate_ports(*protocol).is_none_or(|ports| !ports.is_empty());
        [Protocol::Tcp, Protocol::Udp].into_iter().filter(chosen).collect::<Vec<_>>().into_iter()
    }

    /// Returns the family over which a protocol is served, if it is exactly one.
    pub fn family_of(&self, protocol: Protocol) -> Option<Family> {
        let serves = |family: Family| {
            let listeners = self.intercepts.iter().filter(|listener| listener.protocol == protocol);
            listeners.map(|listener| listener.family).any(|served| served.is_none_or(|served| served == family))
        };
        if !self.protocols.contains(protocol) {
            return self.families.only();
        }
        let v4 = self.families.v4 && serves(Family::V4);
        let v6 = self.families.v6 && serves(Family::V6);
        Families { v4, v6 }.only()
    }

    /// What the table says of the plan.
    pub fn record(&self, backend: Backend) -> Record {
        let address = |listener: &Intercept| {
            let wildcard = match self.families.only().or(listener.family) {
                Some(Family::V4) => Ipv4Addr::UNSPECIFIED.into(),
                _ => Ipv6Addr::UNSPECIFIED.into(),
            };
            SocketAddr::new(listener.addr.unwrap_or(wildcard), listener.port)
        };
        Record {
            backend,
            options: Options {
                mode: self.mode,
                local_output: self.local_output,
                fail_open: self.fail_open,
                allow_direct: !self.guard,
                notrack: self.notrack,
                persist: self.persist,
                new_only: self.new_only,
                local_servers: self.local_servers,
            },
            families: self.families,
            protocols: self.protocols,
            mark: self.mark,
            listen_addr: self.intercepts.first().map(address),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Config, Listener};
    use Protocol::{Tcp, Udp};

    fn listener(protocol: Protocol, families: Families) -> Listener {
        Listener { protocol, families, addr: None, port: 3129 }
    }

    fn plan(config: &Config) -> Plan {
        crate::rules::plan::make(config).unwrap()
    }

    #[test]
    fn plan_exempts_replies_where_their_ports_may_be_chosen() {
        let every_port = Config::new([listener(Tcp, Families::ALL)]);
        let of = |ranges: &[(u16, u16)]| every_port.clone().ports(ranges.iter().map(|(first, last)| *first..=*last));
        // Replies go to the ports of clients, from 1024 on.
        for (chosen, replies) in [
            (every_port.clone(), true),
            (of(&[]), false),
            (of(&[(80, 80)]), false),
            (of(&[(80, 80), (443, 443)]), false),
            (of(&[(1, 1023)]), false),
            (of(&[(1000, 1024)]), true),
            (of(&[(80, 80), (1024, 1024)]), true),
            (of(&[(3000, 4000)]), true),
        ] {
            assert_eq!(plan(&chosen).may_match_replies(Tcp), replies, "{chosen:?}");
            assert!(!plan(&chosen).may_match_replies(Udp));
            assert!(!plan(&chosen.clone().new_only(true)).may_match_replies(Tcp));
            assert!(!plan(&chosen.mode(Mode::Redirect)).may_match_replies(Tcp));
        }
        let both = Config::new([listener(Tcp, Families::ALL), listener(Udp, Families::ALL)]);
        let matched = |config: Config| [Tcp, Udp].map(|protocol| plan(&config).may_match_replies(protocol));
        assert_eq!(matched(both.clone()), [true, true]);
        assert_eq!(matched(both.new_only(true)), [false, true]);
    }

    #[test]
    fn plan_knows_the_only_family_of_each_protocol() {
        let (v4, v6) = (Families { v4: true, v6: false }, Families { v4: false, v6: true });
        let of = |listeners: &[Listener], families: Option<Families>| {
            let config = Config::new(listeners.to_vec());
            let plan = plan(&families.map_or(config.clone(), |families| config.families(families)));
            [plan.family_of(Tcp), plan.family_of(Udp)]
        };
        assert_eq!(of(&[listener(Tcp, Families::ALL)], None), [None, None]);
        assert_eq!(of(&[listener(Tcp, Families::ALL)], Some(v4)), [Some(Family::V4), Some(Family::V4)]);
        assert_eq!(of(&[listener(Tcp, Families::ALL)], Some(v6)), [Some(Family::V6), Some(Family::V6)]);
        assert_eq!(of(&[listener(Tcp, v4), listener(Udp, v6)], None), [Some(Family::V4), Some(Family::V6)]);
        assert_eq!(of(&[listener(Tcp, v6), listener(Udp, Families::ALL)], None), [Some(Family::V6), None]);
        let two = [listener(Tcp, v4), Listener { port: 3130, ..listener(Tcp, v6) }];
        assert_eq!(of(&two, None), [None, None]);
    }

    #[test]
    fn plan_without_ipv6_keeps_what_serves_ipv4() {
        let (v4, v6) = (Families { v4: true, v6: false }, Families { v4: false, v6: true });
        let mut both = plan(&Config::new([listener(Tcp, Families::ALL), listener(Udp, v4)]));
        both.leave_ipv6();
        let kept = |plan: &Plan| plan.intercepts.iter().map(|i| (i.protocol, i.family)).collect::<Vec<_>>();
        assert_eq!(kept(&both), [(Tcp, Some(Family::V4)), (Udp, Some(Family::V4))]);
        assert_eq!(both.families.only(), Some(Family::V4));
        let mut mixed = plan(&Config::new([listener(Tcp, v6), listener(Udp, v4)]));
        mixed.leave_ipv6();
        assert_eq!(kept(&mixed), [(Udp, Some(Family::V4))]);
    }
}
