//! Packet filter rules of any origin, in as many words as it takes to say what they do to an intercepted packet.

use std::net::IpAddr;

use crate::model::Family;

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
pub(crate) enum Place {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl Place {
    /// NF_INET_PRE_ROUTING to NF_INET_POST_ROUTING.
    pub fn of_number(number: u32) -> Option<Place> {
        let places = [Place::Prerouting, Place::Input, Place::Forward, Place::Output, Place::Postrouting];
        places.get(number as usize).copied()
    }
}

/// A base chain's hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    pub place: Place,
    pub priority: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub origin: Origin,
    /// `None`: both (`inet`).
    pub family: Option<Family>,
    pub table: String,
    pub name: String,
    /// `None`: others jump to it.
    pub hook: Option<Hook>,
    /// What no rule decides is dropped.
    pub drops: bool,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// nf_tables' handle; of iptables, the rule's number in its chain.
    pub handle: u64,
    pub parts: Vec<Part>,
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
    Ports(Vec<(u16, u16)>),
    Mark {
        mask: u32,
        value: u32,
    },
    /// The packet came in by `lo`.
    Loopback,
    DestinationIsLocal,
    TransparentSocket,
    /// There is no way back to the source by the interface that the packet came in by; whether the mark is considered.
    NoWayBack {
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
    Jump(String),
    Goto(String),
    /// Someone in user space decides, or nobody knows.
    Other,
}
