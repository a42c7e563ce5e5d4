//! Reads all routing policy rules, the routes of a table, and the interfaces. This needs no privilege.

use std::net::IpAddr;

use crate::model::{Family, Mark};
use crate::name::Name;
use crate::netlink::rtnl::link::{self, Link};
use crate::netlink::rtnl::route::RouteMessage;
use crate::netlink::rtnl::rule::{RuleMessage, RuleOption};
use crate::netlink::uapi::*;
use crate::netlink::{Channel, FirstRead, wire};
use crate::sys;

/// Action of a routing policy rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Lookup(u32),
    Goto(u32),
    Nop,
    Blackhole,
    Unreachable,
    Prohibit,
}

impl Action {
    /// Whether the action drops or refuses the packet.
    pub fn refuses(self) -> bool {
        matches!(self, Action::Blackhole | Action::Unreachable | Action::Prohibit)
    }
}

/// A routing policy rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub family: Family,
    pub priority: u32,
    pub protocol: u8,
    pub action: Action,
    /// `None`: any mark.
    pub mark: Option<Mark>,
    /// Interface on which the packet must arrive.
    pub incoming: Option<Name>,
    /// The rule has more conditions, or ignores some routes.
    pub conditional: bool,
    /// The rule is inverted (`not`).
    pub inverted: bool,
    /// The rule is for packets of sockets that are bound to an interface, or of VRFs.
    pub by_interface: bool,
    /// Further conditions: the option of `ip rule` and its value.
    pub others: Vec<(&'static str, Name)>,
    /// The rule has conditions whose option this library does not know.
    pub unknown: bool,
}

/// Maximum number of rules that are read per family. The kernel compares each packet with each rule, so hosts have few.
const RULES_MAX: usize = 10_000;

/// Reads the rules of a family, in the order of evaluation.
pub(crate) fn rules(family: Family) -> sys::Result<FirstRead<Rule>> {
    let mut channel = Channel::open_wide(libc::NETLINK_ROUTE)?;
    let header = RuleMessage::query(family.nfproto());
    channel.read_first(libc::RTM_GETRULE, &header, &|_| {}, RULES_MAX, &|payload| read_rule(family, payload))
}

fn read_rule(family: Family, payload: &[u8]) -> Option<Rule> {
    let read = RuleMessage::decode(payload)?;
    let mut others: Vec<(&'static str, Name)> = Vec::new();
    let mut other = |option: &'static str, value: String| others.push((option, Name::from(value.as_str())));
    let (mut unknown, mut conditional, mut by_interface) = (false, read.tos != 0, false);
    if read.tos != 0 {
        other("tos", format!("{:#x}", read.tos));
    }
    let mut outgoing = None;
    for condition in &read.others {
        let (option, words) = match *condition {
            RuleOption::Oifname(name) => {
                by_interface = true;
                outgoing = Some(Name::new(name));
                continue;
            }
            RuleOption::L3mdev => {
                by_interface = true;
                other("l3mdev", String::new());
                continue;
            }
            RuleOption::SuppressPrefixlen(len) => ("suppress_prefixlength", Some(len.to_string())),
            RuleOption::SuppressIfgroup(group) => ("suppress_ifgroup", Some(group.to_string())),
            RuleOption::Dst(addr) => ("to", prefix(addr, read.dst_len)),
            RuleOption::UidRange(first, last) => ("uidrange", Some(format!("{first}-{last}"))),
            RuleOption::IpProto(number) => ("ipproto", Some(number.to_string())),
            RuleOption::SportRange(first, last) => ("sport", Some(format!("{first}-{last}"))),
            RuleOption::DportRange(first, last) => ("dport", Some(format!("{first}-{last}"))),
            RuleOption::Unknown(_) => ("", None),
        };
        conditional = true;
        match words {
            Some(words) => other(option, words),
            None => unknown = true,
        }
    }
    if let Some(src) = read.src {
        conditional = true;
        match prefix(src, read.src_len) {
            Some(words) => other("from", words),
            None => unknown = true,
        }
    }
    others.extend(outgoing.map(|name| ("oif", name)));
    Some(Rule {
        family,
        priority: read.priority,
        protocol: read.protocol,
        action: match read.action {
            FR_ACT_TO_TBL => Action::Lookup(read.table),
            FR_ACT_GOTO => Action::Goto(read.goto?),
            FR_ACT_NOP => Action::Nop,
            FR_ACT_BLACKHOLE => Action::Blackhole,
            FR_ACT_UNREACHABLE => Action::Unreachable,
            _ => Action::Prohibit,
        },
        mark: read.fwmark.map(|value| Mark { value, mask: read.fwmask.unwrap_or(u32::MAX) }),
        incoming: read.iifname.map(Name::new),
        conditional,
        inverted: read.flags & FIB_RULE_INVERT != 0,
        by_interface,
        others,
        unknown,
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn prefix(bytes: &[u8], len: u8) -> Option<String> {
    Some(format!("{}/{len}", address(bytes)?))
}

/// The attributes of a route that affect interception.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub family: Family,
    pub table: u32,
    /// `None`: the default route.
    pub destination: Option<String>,
    /// RTN_*.
    pub kind: u8,
}

impl Route {
    /// Whether the route leads to this host.
    pub fn is_local(&self) -> bool {
        self.kind == libc::RTN_LOCAL
    }

    /// Returns the type by the name of `ip route`.
    pub fn kind_name(&self) -> Option<&'static str> {
        const NAMES: [(u8, &str); 9] = [
            (libc::RTN_UNICAST, "unicast"),
            (libc::RTN_LOCAL, "local"),
            (libc::RTN_BROADCAST, "broadcast"),
            (libc::RTN_ANYCAST, "anycast"),
            (libc::RTN_MULTICAST, "multicast"),
            (libc::RTN_BLACKHOLE, "blackhole"),
            (libc::RTN_UNREACHABLE, "unreachable"),
            (libc::RTN_PROHIBIT, "prohibit"),
            (libc::RTN_THROW, "throw"),
        ];
        NAMES.iter().find(|(kind, _)| *kind == self.kind).map(|(_, name)| *name)
    }
}

/// Reads the first routes of a table, which may have a million. `local`: only routes to this host.
///
/// A table of IPv4 begins with its default route; one of IPv6 ends with it (`fib6_walk_continue`).
pub(crate) fn routes(family: Family, table: u32, local: bool, most: usize) -> sys::Result<FirstRead<Route>> {
    let kind = if local { libc::RTN_LOCAL } else { libc::RTN_UNSPEC };
    let query = RouteMessage { family: family.nfproto(), table, kind, ..RouteMessage::default() };
    let mut channel = Channel::open(libc::NETLINK_ROUTE)?;
    // Linux before 4.20 sends the routes of all tables.
    let parse = |payload: &[u8]| read_route(family, payload).filter(|route| route.table == table);
    match channel.read_first(libc::RTM_GETROUTE, &query.header(), &|a| query.encode(a), most, &parse) {
        // The table has never had a route.
        Err(sys::Errno(libc::ENOENT)) => Ok(FirstRead { found: Vec::new(), objects: 0, all: true }),
        read => read,
    }
}

fn read_route(family: Family, payload: &[u8]) -> Option<Route> {
    let read = RouteMessage::decode(payload)?;
    let destination = match read.dst_len {
        0 => None,
        len => Some(prefix(read.dst?, len)?),
    };
    Some(Route { family, table: read.table, destination, kind: read.kind })
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub index: u32,
    pub name: Name,
    pub up: bool,
    /// "bridge", "veth", ...; empty for hardware.
    pub kind: Name,
    /// Index of the bridge or bond that it is a port of.
    pub master: u32,
    /// IPv4 sysctls (net.ipv4.conf.NAME) of [`SWITCHES`]; empty if the interface has no IPv4.
    pub switches: Vec<(&'static str, u32)>,
    /// IPv6 accept_ra; 1: router advertisements are accepted if this host is not a router. `None`: the interface has no IPv6.
    pub accept_ra: Option<u32>,
}

impl Interface {
    /// Returns an IPv4 sysctl; `None`: unknown.
    pub fn switch(&self, name: &str) -> Option<u64> {
        self.switches.iter().find(|(known, _)| *known == name).map(|(_, value)| u64::from(*value))
    }
}

/// IPV4_DEVCONF_* and the names of the sysctls. Reading one from /proc takes as long as this whole dump.
const SWITCHES: [(usize, &str); 5] = [
    (IPV4_DEVCONF_FORWARDING, "forwarding"),
    (IPV4_DEVCONF_RP_FILTER, "rp_filter"),
    (IPV4_DEVCONF_ACCEPT_LOCAL, "accept_local"),
    (IPV4_DEVCONF_SRC_VMARK, "src_valid_mark"),
    (IPV4_DEVCONF_ROUTE_LOCALNET, "route_localnet"),
];

/// Maximum number of interfaces that are read.
const INTERFACES_MAX: usize = 4096;

pub(crate) fn interfaces(channel: &mut Channel) -> sys::Result<FirstRead<Interface>> {
    let filter = |a: &mut wire::Attrs<'_>| a.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    channel.read_first(libc::RTM_GETLINK, &link::EVERY, &filter, INTERFACES_MAX, &read_interface)
}

fn read_interface(payload: &[u8]) -> Option<Interface> {
    let read = Link::decode(payload)?;
    let switch = |(number, name): (usize, _)| Some((name, read.ipv4_conf(number)?));
    Some(Interface {
        index: read.index,
        name: Name::new(read.name),
        up: read.flags & libc::IFF_UP as u32 != 0,
        kind: read.kind.map(Name::new).unwrap_or_default(),
        master: read.master.unwrap_or(0),
        switches: SWITCHES.into_iter().filter_map(switch).collect(),
        accept_ra: read.ipv6_conf(DEVCONF_ACCEPT_RA),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns the message of an interface, with a number of bytes of sysctls.
    fn interface(switches: usize) -> Vec<u8> {
        let mut buffer = crate::netlink::wire::Buffer::default();
        buffer.message(1, 0, 1, &[0; 16], |a| {
            a.string(IFLA_IFNAME, "eth0");
            let conf: Vec<u8> = (0..switches).map(|n| (n / 4) as u8).collect();
            a.nest(IFLA_AF_SPEC, |a| a.nest(libc::AF_INET as u16, |a| a.bytes(IFLA_INET_CONF, &conf)));
        });
        wire::messages(buffer.bytes().unwrap()).next().unwrap().payload.to_vec()
    }

    #[test]
    fn interface_sysctls_are_numbered_as_in_the_kernel() {
        let named = |number: u32| number * 0x0101_0101;
        let all =
            [("forwarding", 0), ("rp_filter", 7), ("accept_local", 22), ("src_valid_mark", 23), ("route_localnet", 25)];
        let expected = all.map(|(name, number)| (name, named(number)));
        assert_eq!(read_interface(&interface(33 * 4)).unwrap().switches, expected);
        // Older kernels have fewer.
        assert_eq!(read_interface(&interface(23 * 4)).unwrap().switches, expected[..3]);
    }

    proptest! {
        #[test]
        fn interface_truncated_is_read_as_far_as_it_goes(switches in 0..140usize, cut in 0..200usize) {
            let whole = interface(switches);
            let seen = read_interface(whole.get(..cut.min(whole.len())).unwrap());
            prop_assert!(seen.is_none_or(|seen| seen.switches.len() <= SWITCHES.len()));
        }

        #[test]
        fn routing_dump_of_any_bytes_does_not_panic(payload in prop_oneof![wire::odd::answer(12), wire::odd::answer(16)]) {
            for family in [Family::V4, Family::V6] {
                read_rule(family, &payload);
                read_route(family, &payload);
            }
            read_interface(&payload);
        }
    }
}
