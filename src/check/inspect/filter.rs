//! Packet filter rules of any origin, reduced to the conditions and effects that matter for an intercepted packet.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::Family;
use crate::name::Name;
use crate::netlink::uapi::*;

/// Origin of a chain, which determines the program that can change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Nft,
    /// nf_tables, by `iptables-nft`.
    IptablesNft,
    IptablesLegacy,
}

/// Hook of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPoint {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl HookPoint {
    /// Of NF_INET_*.
    pub fn of_number(number: u32) -> Option<HookPoint> {
        match number {
            NF_INET_PRE_ROUTING => Some(HookPoint::Prerouting),
            NF_INET_LOCAL_IN => Some(HookPoint::Input),
            NF_INET_FORWARD => Some(HookPoint::Forward),
            NF_INET_LOCAL_OUT => Some(HookPoint::Output),
            NF_INET_POST_ROUTING => Some(HookPoint::Postrouting),
            _ => None,
        }
    }
}

/// Hook and priority of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    pub point: HookPoint,
    pub priority: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub origin: Origin,
    /// `None`: both families (`inet`).
    pub family: Option<Family>,
    pub table: Name,
    pub name: Name,
    /// `None`: not a base chain.
    pub hook: Option<Hook>,
    /// The policy is drop.
    pub drops: bool,
    pub rules: Vec<Rule>,
    /// The chain may have more rules, which were not read.
    pub cut: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Handle in nf_tables; legacy iptables has none.
    pub handle: u64,
    /// Number of the rule in its chain, as iptables counts.
    pub number: usize,
    pub parts: Vec<Part>,
}

/// Known ports of a set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PortSet {
    /// Ranges in the set, sorted, including both ends.
    pub ranges: Vec<(u16, u16)>,
    /// The set has no other ranges.
    pub complete: bool,
    /// Results of queries for single ports.
    pub asked: BTreeMap<u16, bool>,
}

impl PortSet {
    /// Whether the set contains a port; `None`: unknown.
    pub fn contains(&self, port: u16) -> Option<bool> {
        let before = self.ranges.partition_point(|(first, _)| *first <= port).checked_sub(1);
        match before.and_then(|at| self.ranges.get(at)) {
            Some((_, last)) if port <= *last => Some(true),
            _ if self.complete => Some(false),
            _ => self.asked.get(&port).copied(),
        }
    }
}

/// Chains, and the sets of ports that their rules refer to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub chains: Vec<Chain>,
    pub port_sets: Vec<PortSet>,
}

/// One part of a rule. The effects apply if all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    OnlyIf(Condition),
    /// The negated condition.
    OnlyIfNot(Condition),
    /// mark = mark & keep ^ set. `set` is `None`: the bits that are not kept get an unknown value.
    SetMark {
        keep: u32,
        set: Option<u32>,
    },
    Tproxy {
        family: Option<Family>,
        addr: Option<IpAddr>,
        port: u16,
    },
    /// Translates the destination; `None`: to an address of this host, or unknown.
    TranslateDestination(Option<IpAddr>),
    /// `redirect` to this port of this host.
    Redirect(Option<u16>),
    TranslateSource,
    Verdict(Verdict),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    Family(Family),
    Protocol(u8),
    /// The destination port is in this range, including both ends.
    Ports(u16, u16),
    /// The destination port is in the port set with this index.
    PortSet(usize),
    Mark {
        mask: u32,
        value: u32,
    },
    /// The packet arrived on `lo`.
    Loopback,
    DestinationIsLocal,
    TransparentSocket,
    /// The source has no reverse route on the interface on which the packet arrived; whether the lookup uses the mark.
    RpFilterMiss {
        mark: bool,
    },
    /// The connection is in one of these states (NF_CT_STATE_BIT); `None`: another condition on the connection.
    Connection {
        states: Option<u32>,
    },
    /// Any other condition.
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(Name),
    Goto(Name),
    /// A program decides (nfqueue), or the verdict is unknown.
    Other,
}
