//! Reads all routing policy rules, the routes of a table, and the interfaces. This needs no privilege.

use std::net::IpAddr;

use crate::model::{Family, Mark};
use crate::name::Name;
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

// FR_ACT_*, FRA_* of `linux/fib_rules.h`.
const ACT_TO_TABLE: u8 = 1;
const ACT_GOTO: u8 = 2;
const ACT_NOP: u8 = 3;
const ACT_BLACKHOLE: u8 = 6;
const ACT_UNREACHABLE: u8 = 7;
const INVERT: u32 = 2;
const DST: u16 = 1;
const SRC: u16 = 2;
const IIF: u16 = 3;
const GOTO: u16 = 4;
const PRIORITY: u16 = 6;
const MARK: u16 = 10;
const SUPPRESS_GROUP: u16 = 13;
const SUPPRESS_PREFIX: u16 = 14;
const TABLE: u16 = 15;
const MASK: u16 = 16;
const OIF: u16 = 17;
const PADDING: u16 = 18;
const L3MDEV: u16 = 19;
const UIDS: u16 = 20;
const PROTOCOL: u16 = 21;
const IP_PROTOCOL: u16 = 22;
const SOURCE_PORT: u16 = 23;
const DESTINATION_PORT: u16 = 24;

/// Maximum number of rules that are read per family. The kernel compares each packet with each rule, so hosts have few.
const RULES_MAX: usize = 10_000;

/// Reads the rules of a family, in the order of evaluation.
pub(crate) fn rules(family: Family) -> sys::Result<FirstRead<Rule>> {
    let header = [family.nfproto(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut channel = Channel::open_wide(libc::NETLINK_ROUTE)?;
    channel.read_first(libc::RTM_GETRULE, &header, &|_| {}, RULES_MAX, &|payload| parse_rule(family, payload))
}

fn parse_rule(family: Family, payload: &[u8]) -> Option<Rule> {
    let attrs = payload.get(12..)?;
    let number = |kind| wire::u32_of(attrs, kind);
    // `struct fib_rule_hdr`: the lengths of both prefixes, and the type of service.
    let (to_len, from_len, tos) = (*payload.get(1)?, *payload.get(2)?, *payload.get(3)?);
    let mut others: Vec<(&'static str, Name)> = Vec::new();
    let mut other = |option: &'static str, value: String| others.push((option, Name::from(value.as_str())));
    let (mut unknown, mut conditional, mut by_interface) = (false, tos != 0, false);
    if tos != 0 {
        other("tos", format!("{tos:#x}"));
    }
    let mut outgoing = None;
    for (kind, value) in wire::attributes(attrs) {
        let two = |at| wire::u16_at(value, at);
        let ports = || Some(format!("{}-{}", two(0)?, two(2)?));
        let (option, words) = match kind {
            IIF | GOTO | PRIORITY | MARK | MASK | TABLE | PADDING | PROTOCOL => continue,
            // The kernel reports all ones if nothing is suppressed.
            SUPPRESS_PREFIX | SUPPRESS_GROUP if wire::u32_at(value, 0) == Some(u32::MAX) => continue,
            L3MDEV if value.first() != Some(&1) => continue,
            OIF => {
                by_interface = true;
                outgoing = Some(Name::new(value));
                continue;
            }
            L3MDEV => {
                by_interface = true;
                ("l3mdev", Some(String::new()))
            }
            SUPPRESS_PREFIX => ("suppress_prefixlength", wire::u32_at(value, 0).map(|len| len.to_string())),
            SUPPRESS_GROUP => ("suppress_ifgroup", wire::u32_at(value, 0).map(|group| group.to_string())),
            DST => ("to", prefix(value, to_len)),
            SRC => ("from", prefix(value, from_len)),
            UIDS => {
                let range = || Some(format!("{}-{}", wire::u32_at(value, 0)?, wire::u32_at(value, 4)?));
                ("uidrange", range())
            }
            IP_PROTOCOL => ("ipproto", value.first().map(|number| number.to_string())),
            SOURCE_PORT => ("sport", ports()),
            DESTINATION_PORT => ("dport", ports()),
            _ => ("", None),
        };
        conditional |= kind != L3MDEV;
        match words {
            Some(words) => other(option, words),
            None => unknown = true,
        }
    }
    others.extend(outgoing.map(|name| ("oif", name)));
    Some(Rule {
        family,
        priority: number(PRIORITY).unwrap_or(0),
        protocol: wire::u8_of(attrs, PROTOCOL).unwrap_or(0),
        action: match *payload.get(7)? {
            ACT_TO_TABLE => Action::Lookup(number(TABLE).unwrap_or(u32::from(*payload.get(4)?))),
            ACT_GOTO => Action::Goto(number(GOTO)?),
            ACT_NOP => Action::Nop,
            ACT_BLACKHOLE => Action::Blackhole,
            ACT_UNREACHABLE => Action::Unreachable,
            _ => Action::Prohibit,
        },
        mark: number(MARK).map(|value| Mark { value, mask: number(MASK).unwrap_or(u32::MAX) }),
        incoming: wire::name_of(attrs, IIF),
        conditional,
        inverted: wire::u32_at(payload, 8)? & INVERT != 0,
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
    const ROUTE_TABLE: u16 = 15;
    let mut header = [0; 12];
    header[0] = family.nfproto();
    if local {
        header[7] = libc::RTN_LOCAL;
    }
    let mut channel = Channel::open(libc::NETLINK_ROUTE)?;
    // Linux before 4.20 sends the routes of all tables.
    let parse = |payload: &[u8]| parse_route(family, payload).filter(|route| route.table == table);
    match channel.read_first(libc::RTM_GETROUTE, &header, &|a| a.u32(ROUTE_TABLE, table), most, &parse) {
        // The table has never had a route.
        Err(sys::Errno(libc::ENOENT)) => Ok(FirstRead { found: Vec::new(), objects: 0, all: true }),
        read => read,
    }
}

fn parse_route(family: Family, payload: &[u8]) -> Option<Route> {
    /// RTA_DST, RTA_TABLE; `struct rtmsg`: the destination's length, the table, the type.
    const DESTINATION: u16 = 1;
    const ROUTE_TABLE: u16 = 15;
    let attrs = payload.get(12..)?;
    let len = *payload.get(1)?;
    let destination = match (len, wire::attribute(attrs, DESTINATION)) {
        (0, _) => None,
        (_, Some(bytes)) => Some(prefix(bytes, len)?),
        (_, None) => return None,
    };
    let table = wire::u32_of(attrs, ROUTE_TABLE);
    Some(Route { family, table: table.unwrap_or(u32::from(*payload.get(4)?)), destination, kind: *payload.get(7)? })
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

/// IPV4_DEVCONF_* minus one, and the names of the sysctls. Reading one from /proc takes as long as this whole dump.
const SWITCHES: [(usize, &str); 5] =
    [(0, "forwarding"), (7, "rp_filter"), (22, "accept_local"), (23, "src_valid_mark"), (25, "route_localnet")];

/// Maximum number of interfaces that are read.
const INTERFACES_MAX: usize = 4096;

pub(crate) fn interfaces(channel: &mut Channel) -> sys::Result<FirstRead<Interface>> {
    // IFLA_EXT_MASK; RTEXT_FILTER_SKIP_STATS.
    const FILTER: u16 = 29;
    const NO_STATISTICS: u32 = 1 << 3;
    let filter = |a: &mut wire::Attrs<'_>| a.u32(FILTER, NO_STATISTICS);
    channel.read_first(libc::RTM_GETLINK, &[0; 16], &filter, INTERFACES_MAX, &parse_interface)
}

fn parse_interface(payload: &[u8]) -> Option<Interface> {
    /// IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_AF_SPEC, AF_INET, IFLA_INET_CONF (numbers in the order
    /// of IPV4_DEVCONF_*); `struct ifinfomsg`: index, flags.
    const NAME: u16 = 3;
    const MASTER: u16 = 10;
    const LINK_INFO: u16 = 18;
    const KIND: u16 = 1;
    const BY_FAMILY: u16 = 26;
    const IPV4: u16 = libc::AF_INET as u16;
    const CONF: u16 = 1;
    /// AF_INET6, IFLA_INET6_CONF, DEVCONF_ACCEPT_RA.
    const IPV6: u16 = libc::AF_INET6 as u16;
    const CONF_V6: u16 = 2;
    const ACCEPT_RA: usize = 3;
    let attrs = payload.get(16..)?;
    let kind = wire::attribute(attrs, LINK_INFO).and_then(|info| wire::name_of(info, KIND));
    let conf = wire::attribute(attrs, BY_FAMILY).and_then(|all| wire::attribute(wire::attribute(all, IPV4)?, CONF));
    let switch = |(at, name): (usize, _)| Some((name, wire::u32_at(conf?, 4 * at)?));
    let conf_v6 =
        wire::attribute(attrs, BY_FAMILY).and_then(|all| wire::attribute(wire::attribute(all, IPV6)?, CONF_V6));
    Some(Interface {
        index: wire::u32_at(payload, 4)?,
        name: wire::name_of(attrs, NAME)?,
        up: wire::u32_at(payload, 8)? & libc::IFF_UP as u32 != 0,
        kind: kind.unwrap_or_default(),
        master: wire::u32_of(attrs, MASTER).unwrap_or(0),
        switches: SWITCHES.into_iter().filter_map(switch).collect(),
        accept_ra: conf_v6.and_then(|conf| wire::u32_at(conf, 4 * ACCEPT_RA)),
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
            a.string(3, "eth0");
            a.nest(26, |a| a.nest(2, |a| a.bytes(1, &(0..switches).map(|n| (n / 4) as u8).collect::<Vec<_>>())));
        });
        wire::messages(buffer.bytes().unwrap()).next().unwrap().payload.to_vec()
    }

    #[test]
    fn interface_sysctls_are_numbered_as_in_the_kernel() {
        let named = |number: u32| number * 0x0101_0101;
        let all =
            [("forwarding", 0), ("rp_filter", 7), ("accept_local", 22), ("src_valid_mark", 23), ("route_localnet", 25)];
        let expected = all.map(|(name, number)| (name, named(number)));
        assert_eq!(parse_interface(&interface(33 * 4)).unwrap().switches, expected);
        // Older kernels have fewer.
        assert_eq!(parse_interface(&interface(23 * 4)).unwrap().switches, expected[..3]);
    }

    proptest! {
        #[test]
        fn interface_truncated_is_read_as_far_as_it_goes(switches in 0..140usize, cut in 0..200usize) {
            let whole = interface(switches);
            let seen = parse_interface(whole.get(..cut.min(whole.len())).unwrap());
            prop_assert!(seen.is_none_or(|seen| seen.switches.len() <= SWITCHES.len()));
        }

        #[test]
        fn routing_dump_of_any_bytes_does_not_panic(payload in prop_oneof![wire::odd::answer(12), wire::odd::answer(16)]) {
            for family in [Family::V4, Family::V6] {
                parse_rule(family, &payload);
                parse_route(family, &payload);
            }
            parse_interface(&payload);
        }
    }
}
