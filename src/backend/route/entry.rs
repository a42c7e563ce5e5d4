//! One routing policy rule or route of an instance: as the kernel takes and shows it, and as the command that makes it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{PROTOCOL, RULES, is_system_table};
use crate::model::{Families, Family, Mark};
use crate::netlink::rtnl::link::LOOPBACK;
use crate::netlink::rtnl::route::RouteMessage;
use crate::netlink::rtnl::rule::{RuleMessage, RuleOption};
use crate::netlink::uapi::*;
use crate::netlink::wire::Buffer;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RuleKind {
    Goto(u32),
    Lookup(u32),
    /// What this host sends from a loopback address.
    LookupFromLoopback(u32),
    Nop,
    /// One that we never make.
    Foreign,
}

/// One thing to add or to delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    Rule {
        family: Family,
        priority: u32,
        kind: RuleKind,
        mark: Mark,
    },
    Route {
        family: Family,
        table: u32,
    },
    /// In place of the route.
    Blackhole {
        family: Family,
        table: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Delete,
}

impl Entry {
    /// The rule found is this one, of ours.
    pub(super) fn is(&self, rule: &FoundRule) -> bool {
        rule.ours && *self == rule.entry()
    }

    pub(super) fn encode(&self, messages: &mut Buffer, seq: u32, operation: Operation, ack: i32) {
        let (op, flags) = match operation {
            Operation::Add => (0, libc::NLM_F_CREATE | libc::NLM_F_EXCL),
            Operation::Delete => (1, 0),
        };
        let flags = (libc::NLM_F_REQUEST | ack | flags) as u16;
        match *self {
            Entry::Rule { family, priority, kind, mark } => {
                let source = Octets::of(loopback(family).0);
                let rule = rule_of(family, priority, kind, mark, &source);
                messages.message(libc::RTM_NEWRULE + op, flags, seq, &rule.header(), |a| rule.encode(a));
            }
            Entry::Route { family, table } => {
                let priority = (operation == Operation::Delete && family == Family::V6).then_some(IP6_RT_PRIO_USER);
                let (scope, kind) = (libc::RT_SCOPE_HOST, libc::RTN_LOCAL);
                let route = RouteMessage { scope, kind, oif: Some(LOOPBACK), priority, ..default_route(family, table) };
                messages.message(libc::RTM_NEWROUTE + op, flags, seq, &route.header(), |a| route.encode(a));
            }
            Entry::Blackhole { family, table } => {
                let (scope, kind, priority) = (libc::RT_SCOPE_UNIVERSE, libc::RTN_BLACKHOLE, Some(METRIC_LAST));
                let route = RouteMessage { scope, kind, priority, ..default_route(family, table) };
                messages.message(libc::RTM_NEWROUTE + op, flags, seq, &route.header(), |a| route.encode(a));
            }
        }
    }

    /// What follows `ip` in the command that would add it.
    pub fn addition(&self) -> impl fmt::Display {
        self.command(Operation::Add)
    }

    /// What follows `ip` in the command that would do the same.
    pub(super) fn command(&self, operation: Operation) -> impl fmt::Display {
        let verb = match operation {
            Operation::Add => "add",
            Operation::Delete => "del",
        };
        match *self {
            Entry::Rule { family, priority, kind, mark } => {
                let what = match kind {
                    RuleKind::Goto(target) => format!("iif lo fwmark {mark} goto {target}"),
                    RuleKind::Lookup(table) => format!("fwmark {mark} lookup {table}"),
                    RuleKind::LookupFromLoopback(table) => {
                        let (addr, len) = loopback(family);
                        format!("from {addr}/{len} iif lo lookup {table}")
                    }
                    RuleKind::Nop => "nop".to_owned(),
                    RuleKind::Foreign => String::new(),
                };
                format!("{} rule {verb} pref {priority} {what} protocol {PROTOCOL}", flag(family))
            }
            Entry::Route { family, table } => {
                format!("{} route {verb} local default dev lo table {table} protocol {PROTOCOL}", flag(family))
            }
            Entry::Blackhole { family, table } => format!(
                "{} route {verb} blackhole default table {table} metric {METRIC_LAST} protocol {PROTOCOL}",
                flag(family)
            ),
        }
    }
}

pub(super) fn flag(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

/// The bytes of an address.
enum Octets {
    V4([u8; 4]),
    V6([u8; 16]),
}

impl Octets {
    fn of(addr: IpAddr) -> Octets {
        match addr {
            IpAddr::V4(addr) => Octets::V4(addr.octets()),
            IpAddr::V6(addr) => Octets::V6(addr.octets()),
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Octets::V4(bytes) => bytes,
            Octets::V6(bytes) => bytes,
        }
    }
}

/// The loopback addresses of a family, and the length of their prefix.
fn loopback(family: Family) -> (IpAddr, u8) {
    match family {
        Family::V4 => (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
        Family::V6 => (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    }
}

/// Every other route comes first.
const METRIC_LAST: u32 = i32::MAX as u32;

/// A default route of ours, of no type yet.
fn default_route(family: Family, table: u32) -> RouteMessage<'static> {
    RouteMessage { family: family.nfproto(), table, protocol: PROTOCOL, ..RouteMessage::default() }
}

/// Whether a route of the dump of a table is a default route of this type, and ours.
pub(super) fn is_default_route(payload: &[u8], table: u32, kind: u8) -> bool {
    RouteMessage::decode(payload)
        .is_some_and(|route| (route.dst_len, route.protocol, route.kind, route.table) == (0, PROTOCOL, kind, table))
}

/// The rule of an entry; `source` has the loopback addresses of the family.
fn rule_of<'a>(family: Family, priority: u32, kind: RuleKind, mark: Mark, source: &'a Octets) -> RuleMessage<'a> {
    const LO: Option<&[u8]> = Some(b"lo");
    let marked = mark.mask != 0;
    let rule = RuleMessage {
        family: family.nfproto(),
        action: FR_ACT_TO_TBL,
        priority,
        protocol: PROTOCOL,
        fwmark: marked.then_some(mark.value),
        fwmask: marked.then_some(mark.mask),
        ..RuleMessage::default()
    };
    match kind {
        RuleKind::Goto(target) => RuleMessage { action: FR_ACT_GOTO, goto: Some(target), iifname: LO, ..rule },
        RuleKind::Lookup(table) => RuleMessage { table, ..rule },
        RuleKind::LookupFromLoopback(table) => {
            RuleMessage { table, src_len: loopback(family).1, src: Some(source.as_slice()), iifname: LO, ..rule }
        }
        RuleKind::Nop => RuleMessage { action: FR_ACT_NOP, ..rule },
        RuleKind::Foreign => rule,
    }
}

/// A routing policy rule that the kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FoundRule {
    pub family: Family,
    pub priority: u32,
    /// It has our protocol, and is one of the rules that we make.
    pub ours: bool,
    pub(super) kind: RuleKind,
    pub(super) mark: Mark,
    selectors: Selectors,
}

/// What a rule selects packets by, besides the mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Selectors {
    /// FIB_RULE_INVERT: the rule takes the packets that the selectors do not match.
    inverted: bool,
    /// Whether it selects packets of an interface, and whether that is `lo`.
    incoming: Option<bool>,
    /// An interface that packets leave by. None has been chosen for a packet that arrives.
    outgoing: bool,
    /// Anything else, which may match.
    others: bool,
}

impl FoundRule {
    /// Whether a rule of another program could decide where packets with one of these marks go. `looped`: the mark of
    /// packets that arrive by `lo`.
    pub fn may_take(&self, arriving: Mark, looped: Option<Mark>) -> bool {
        /// It has routes to this host's own addresses only.
        const LOCAL: u32 = libc::RT_TABLE_LOCAL as u32;
        if self.ours || matches!(self.kind, RuleKind::Nop | RuleKind::Lookup(LOCAL)) {
            return false;
        }
        let Selectors { inverted, incoming, outgoing, others } = self.selectors;
        let takes = |mark: Mark, by_lo: bool| {
            let common = self.mark.mask & mark.mask;
            let contradicts = self.mark.value & common != mark.value & common;
            let matches_mark = self.mark.mask & !mark.mask == 0 && !contradicts;
            match inverted {
                false => !contradicts && !outgoing && incoming.is_none_or(|lo| lo == by_lo),
                // Each packet, except those that every selector matches.
                true => outgoing || others || !matches_mark || incoming.is_some_and(|lo| !lo || !by_lo),
            }
        };
        takes(arriving, false) || looped.is_some_and(|mark| takes(mark, true))
    }

    /// It has one of the preferences of the instance that begins there.
    pub fn is_behind(&self, first: u32) -> bool {
        self.priority.checked_sub(first).is_some_and(|number| number < RULES)
    }

    /// The routing table that it leads to.
    pub fn table(&self) -> Option<u32> {
        match self.kind {
            RuleKind::Lookup(table) | RuleKind::LookupFromLoopback(table) => Some(table),
            _ => None,
        }
    }

    pub(super) fn entry(&self) -> Entry {
        Entry::Rule { family: self.family, priority: self.priority, kind: self.kind, mark: self.mark }
    }

    /// Reads a rule of the dump. `None`: it is of another family.
    pub(super) fn decode(payload: &[u8]) -> Option<FoundRule> {
        let rule = RuleMessage::decode(payload)?;
        let family = Families::ALL.iter().find(|family| family.nfproto() == rule.family)?;
        let (loopback, loopback_len) = loopback(family);
        let loopback = Octets::of(loopback);
        let from_loopback = rule.src == Some(loopback.as_slice()) && rule.src_len == loopback_len;
        let kind = match rule.action {
            FR_ACT_TO_TBL if from_loopback => RuleKind::LookupFromLoopback(rule.table),
            FR_ACT_TO_TBL => RuleKind::Lookup(rule.table),
            FR_ACT_GOTO => rule.goto.map_or(RuleKind::Foreign, RuleKind::Goto),
            FR_ACT_NOP => RuleKind::Nop,
            _ => RuleKind::Foreign,
        };
        let mark = match rule.fwmark {
            Some(value) => Mark { value, mask: rule.fwmask.unwrap_or(u32::MAX) },
            None => Mark { value: 0, mask: 0 },
        };
        let ours = is_ours(&rule, kind, mark);
        Some(FoundRule { family, priority: rule.priority, ours, kind, mark, selectors: Selectors::of(&rule) })
    }
}

impl Selectors {
    fn of(rule: &RuleMessage<'_>) -> Selectors {
        let other = |other: &RuleOption<'_>| match other {
            // Suppression selects routes, not packets.
            RuleOption::Oifname(_) | RuleOption::SuppressIfgroup(_) | RuleOption::SuppressPrefixlen(_) => false,
            RuleOption::Unknown(number) => *number <= FRA_DSCP_MASK,
            _ => true,
        };
        Selectors {
            inverted: rule.flags & FIB_RULE_INVERT != 0,
            incoming: rule.iifname.map(|name| name == b"lo"),
            outgoing: rule.others.iter().any(|other| matches!(other, RuleOption::Oifname(_))),
            others: (rule.dst_len, rule.src_len, rule.tos) != (0, 0, 0)
                || rule.others.iter().any(other)
                || rule.src.is_some(),
        }
    }
}

/// Whether a rule is one that we make: it has our protocol, selects by what ours do and nothing else, and leads where
/// ours may. Another program may have chosen the same protocol.
fn is_ours(rule: &RuleMessage<'_>, kind: RuleKind, mark: Mark) -> bool {
    // Later attributes than those known need not be conditions.
    let selects =
        rule.others.iter().any(|other| !matches!(other, RuleOption::Unknown(number) if *number > FRA_DSCP_MASK));
    let fits = match kind {
        RuleKind::Goto(target) => rule.priority.checked_add(RULES - 1) == Some(target) && mark.mask != 0,
        RuleKind::Lookup(table) => !is_system_table(table) && mark.mask != 0,
        RuleKind::LookupFromLoopback(table) => !is_system_table(table) && mark.mask == 0,
        RuleKind::Nop => mark.mask == 0,
        RuleKind::Foreign => false,
    };
    let has_source = rule.src_len != 0 || rule.src.is_some();
    let from_loopback = rule.iifname.map(|name| name == b"lo");
    rule.protocol == PROTOCOL
        && (rule.dst_len, rule.tos) == (0, 0)
        && rule.flags & FIB_RULE_INVERT == 0
        && !selects
        && fits
        && has_source == matches!(kind, RuleKind::LookupFromLoopback(_))
        && from_loopback == matches!(kind, RuleKind::Goto(_) | RuleKind::LookupFromLoopback(_)).then_some(true)
}
