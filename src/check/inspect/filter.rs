//! Packet filter rules of any origin, in as many words as it takes to say what they do to an intercepted packet.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::Family;
use crate::name::Name;

/// Who made a chain, and so by which program it can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Nft,
    /// nf_tables, by `iptables-nft`.
    IptablesNft,
    IptablesLegacy,
}

/// Where a base chain hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPoint {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl HookPoint {
    /// NF_INET_PRE_ROUTING to NF_INET_POST_ROUTING.
    pub fn of_number(number: u32) -> Option<HookPoint> {
        let places =
            [HookPoint::Prerouting, HookPoint::Input, HookPoint::Forward, HookPoint::Output, HookPoint::Postrouting];
        places.get(number as usize).copied()
    }
}

/// A base chain's hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    pub point: HookPoint,
    pub priority: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub origin: Origin,
    /// `None`: both (`inet`).
    pub family: Option<Family>,
    pub table: Name,
    pub name: Name,
    /// `None`: others jump to it.
    pub hook: Option<Hook>,
    /// What no rule decides is dropped.
    pub drops: bool,
    pub rules: Vec<Rule>,
    /// There may be more rules, which were not read.
    pub cut: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// nf_tables' handle; legacy iptables has none.
    pub handle: u64,
    /// The rule's number in its chain, as iptables counts.
    pub number: usize,
    pub parts: Vec<Part>,
}

/// What is known of the ports in a set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PortSet {
    /// These ranges are in it, in order, both ends included.
    pub ranges: Vec<(u16, u16)>,
    /// No others are.
    pub complete: bool,
    /// For further ports, whether they are in it.
    pub asked: BTreeMap<u16, bool>,
}

impl PortSet {
    /// Whether a port is in it; `None`: it is not known.
    pub fn contains(&self, port: u16) -> Option<bool> {
        let before = self.ranges.partition_point(|(first, _)| *first <= port).checked_sub(1);
        match before.and_then(|at| self.ranges.get(at)) {
            Some((_, last)) if port <= *last => Some(true),
            _ if self.complete => Some(false),
            _ => self.asked.get(&port).copied(),
        }
    }
}

/// Chains, and the sets of ports that their rules name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub chains: Vec<Chain>,
    pub port_sets: Vec<PortSet>,
}

/// One part of a rule: all conditions have to hold, then the rest happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    OnlyIf(Condition),
    /// The condition turned round.
    OnlyIfNot(Condition),
    /// mark = mark & keep ^ set; without `set`, to something unknown in the bits that are not kept.
    SetMark {
        keep: u32,
        set: Option<u32>,
    },
    Tproxy {
        family: Option<Family>,
        addr: Option<IpAddr>,
        port: u16,
    },
    /// Translates the destination; `None`: to this host, or unknown.
    TranslateDestination(Option<IpAddr>),
    /// `redirect`: to this host, at this port.
    Redirect(Option<u16>),
    TranslateSource,
    Verdict(Verdict),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    Family(Family),
    Protocol(u8),
    /// The destination port is one of these, both ends included.
    Ports(u16, u16),
    /// The destination port is in the port set of this number.
    PortSet(usize),
    Mark {
        mask: u32,
        value: u32,
    },
    /// The packet came in by `lo`.
    Loopback,
    DestinationIsLocal,
    TransparentSocket,
    /// There is no way back to the source by the interface that the packet came in by; whether the mark is considered.
    RpFilterMiss {
        mark: bool,
    },
    /// The connection is in one of these states (NF_CT_STATE_BIT); `None`: something else about it.
    Connection {
        states: Option<u32>,
    },
    /// Anything else.
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(Name),
    Goto(Name),
    /// Someone in user space decides, or nobody knows.
    Other,
}
