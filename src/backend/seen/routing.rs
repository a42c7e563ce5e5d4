//! Everybody's routing policy rules, the routes of a table, and the interfaces. It needs no privilege.

use crate::list::List;
use crate::model::{Family, Mark};
use crate::netlink::{Channel, wire};
use crate::sys;
use crate::text::Owned;

/// What a routing policy rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Lookup(u32),
    Goto(u32),
    Nop,
    /// blackhole, unreachable, prohibit.
    Refuse,
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
    /// The interface that the packet has to come in by.
    pub incoming: Option<String>,
    /// There are more conditions, or not every route counts.
    pub conditional: bool,
    /// It says what packets it is not for.
    pub inverted: bool,
    /// It is for packets of sockets that are bound to an interface, or of VRFs.
    pub by_interface: bool,
}

// FR_ACT_*, FRA_* of `linux/fib_rules.h`.
const ACT_TO_TABLE: u8 = 1;
const ACT_GOTO: u8 = 2;
const ACT_NOP: u8 = 3;
const INVERT: u32 = 2;
const DST: u16 = 1;
const SRC: u16 = 2;
const IIF: u16 = 3;
const GOTO: u16 = 4;
const PRIORITY: u16 = 6;
const MARK: u16 = 10;
const SUPPRESS_PREFIX: u16 = 14;
const TABLE: u16 = 15;
const MASK: u16 = 16;
const OIF: u16 = 17;
const L3MDEV: u16 = 19;
const UIDS: u16 = 20;
const PROTOCOL: u16 = 21;
const IP_PROTOCOL: u16 = 22;
const SOURCE_PORT: u16 = 23;
const DESTINATION_PORT: u16 = 24;

/// The rules of a family, in the order in which they are asked.
pub(crate) fn rules(channel: &mut Channel, family: Family) -> sys::Result<Vec<Rule>> {
    let header = [family.nfproto(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let dumped = channel.dump(libc::RTM_GETRULE, &header, &|_| {})?;
    Ok(dumped.iter().filter_map(|payload| parse_rule(family, payload)).list())
}

fn parse_rule(family: Family, payload: &[u8]) -> Option<Rule> {
    let attrs = payload.get(12..)?;
    let number = |kind| wire::u32_of(attrs, kind);
    let has = |kind| wire::attribute(attrs, kind).is_some();
    let text = |kind| wire::string_of(attrs, kind).map(str::to_owned);
    let tos = *payload.get(3)?;
    // Without a prefix there is no suppression: the kernel says all ones.
    let suppresses = number(SUPPRESS_PREFIX).is_some_and(|len| len != u32::MAX);
    let by_interface = has(OIF) || wire::u8_of(attrs, L3MDEV) == Some(1);
    Some(Rule {
        family,
        priority: number(PRIORITY).unwrap_or(0),
        protocol: wire::u8_of(attrs, PROTOCOL).unwrap_or(0),
        action: match *payload.get(7)? {
            ACT_TO_TABLE => Action::Lookup(number(TABLE).unwrap_or(u32::from(*payload.get(4)?))),
            ACT_GOTO => Action::Goto(number(GOTO)?),
            ACT_NOP => Action::Nop,
            _ => Action::Refuse,
        },
        mark: number(MARK).map(|value| Mark { value, mask: number(MASK).unwrap_or(u32::MAX) }),
        incoming: text(IIF),
        conditional: tos != 0
            || suppresses
            || [DST, SRC, UIDS, IP_PROTOCOL, SOURCE_PORT, DESTINATION_PORT].into_iter().any(has),
        inverted: wire::u32_at(payload, 8)? & INVERT != 0,
        by_interface,
    })
}

/// A route, as far as interception cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub family: Family,
    pub table: u32,
    /// `None`: the default route.
    pub destination: Option<String>,
    /// To this host.
    pub local: bool,
}

/// So many routes of a table are read: the default route is among the first, and the Internet has a million.
const ROUTES_MAX: usize = 1000;

/// The first routes of a table, and whether they are all.
pub(crate) fn routes(family: Family, table: u32) -> sys::Result<(Vec<Route>, bool)> {
    const ROUTE_TABLE: u16 = 15;
    let mut header = [0; 12];
    header[0] = family.nfproto();
    let channel = Channel::open(libc::NETLINK_ROUTE)?;
    let (dumped, all) =
        match channel.dump_first(libc::RTM_GETROUTE, &header, &|a| a.u32(ROUTE_TABLE, table), ROUTES_MAX) {
            // A table that has never had a route.
            Err(sys::Errno(libc::ENOENT)) => (Vec::new(), true),
            dumped => dumped?,
        };
    let parsed = dumped.iter().filter_map(|payload| parse_route(family, payload));
    Ok((parsed.filter(|route| route.table == table).list(), all))
}

fn parse_route(family: Family, payload: &[u8]) -> Option<Route> {
    /// RTA_DST, RTA_TABLE; `struct rtmsg`: the destination's length, the table, the type.
    const DESTINATION: u16 = 1;
    const ROUTE_TABLE: u16 = 15;
    let attrs = payload.get(12..)?;
    let len = *payload.get(1)?;
    let destination = match (len, wire::attribute(attrs, DESTINATION)) {
        (0, _) => None,
        (_, Some(bytes)) => Some(match <[u8; 4]>::try_from(bytes) {
            Ok(v4) => std::net::IpAddr::from(v4),
            Err(_) => std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        }),
        (_, None) => return None,
    };
    let table = wire::u32_of(attrs, ROUTE_TABLE);
    Some(Route {
        family,
        table: table.unwrap_or(u32::from(*payload.get(4)?)),
        destination: destination.map(|addr| format!("{addr}/{len}")),
        local: *payload.get(7)? == libc::RTN_LOCAL,
    })
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub index: u32,
    pub name: String,
    pub up: bool,
    /// "bridge", "veth", ...; empty for hardware.
    pub kind: String,
    /// The index of the bridge or bond that it is a port of.
    pub master: u32,
    /// IPv4's switches (net.ipv4.conf.NAME), those of [`SWITCHES`]; none if it has no IPv4.
    pub switches: Vec<(&'static str, u32)>,
}

/// IPV4_DEVCONF_*, less one, and the names of their sysctls. A read of one from /proc takes as long as this whole dump.
const SWITCHES: [(usize, &str); 5] =
    [(0, "forwarding"), (7, "rp_filter"), (22, "accept_local"), (23, "src_valid_mark"), (25, "route_localnet")];

pub(crate) fn interfaces(channel: &mut Channel) -> sys::Result<Vec<Interface>> {
    Ok(channel.dump(libc::RTM_GETLINK, &[0; 16], &|_| {})?.iter().filter_map(|payload| parse_interface(payload)).list())
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
    let attrs = payload.get(16..)?;
    let kind = wire::attribute(attrs, LINK_INFO).and_then(|info| wire::string_of(info, KIND));
    let conf = wire::attribute(attrs, BY_FAMILY).and_then(|all| wire::attribute(wire::attribute(all, IPV4)?, CONF));
    let switch = |(at, name): (usize, _)| Some((name, wire::u32_at(conf?, 4 * at)?));
    Some(Interface {
        index: wire::u32_at(payload, 4)?,
        name: wire::string_of(attrs, NAME)?.owned(),
        up: wire::u32_at(payload, 8)? & libc::IFF_UP as u32 != 0,
        kind: kind.unwrap_or_default().owned(),
        master: wire::u32_of(attrs, MASTER).unwrap_or(0),
        switches: SWITCHES.into_iter().filter_map(switch).list(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An interface as kernels tell of it, with so many bytes of switches.
    fn interface(switches: usize) -> Vec<u8> {
        let mut buffer = crate::netlink::wire::Buffer::default();
        buffer.message(1, 0, 1, &[0; 16], |a| {
            a.string(3, "eth0");
            a.nest(26, |a| a.nest(2, |a| a.bytes(1, &(0..switches).map(|n| (n / 4) as u8).collect::<Vec<_>>())));
        });
        wire::messages(buffer.bytes().unwrap()).next().unwrap().payload.to_vec()
    }

    #[test]
    fn switches_are_those_of_the_kernel() {
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
        fn an_interface_is_read_as_far_as_it_goes(switches in 0..140usize, cut in 0..200usize) {
            let whole = interface(switches);
            let seen = parse_interface(whole.get(..cut.min(whole.len())).unwrap());
            prop_assert!(seen.is_none_or(|seen| seen.switches.len() <= SWITCHES.len()));
        }

        #[test]
        fn no_dump_panics(payload in prop_oneof![wire::odd::answer(12), wire::odd::answer(16)]) {
            for family in [Family::V4, Family::V6] {
                parse_rule(family, &payload);
                parse_route(family, &payload);
            }
            parse_interface(&payload);
        }
    }
}
