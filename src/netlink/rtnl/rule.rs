//! Routing policy rules: RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE.

use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs};

/// A routing policy rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RuleMessage<'a> {
    pub family: u8,
    pub dst_len: u8,
    pub src_len: u8,
    pub tos: u8,
    /// FR_ACT_*.
    pub action: u8,
    /// FIB_RULE_*.
    pub flags: u32,
    pub priority: u32,
    /// Who made the rule.
    pub protocol: u8,
    /// Of FR_ACT_TO_TBL.
    pub table: u32,
    /// Target of FR_ACT_GOTO.
    pub goto: Option<u32>,
    pub fwmark: Option<u32>,
    pub fwmask: Option<u32>,
    pub src: Option<&'a [u8]>,
    pub iifname: Option<&'a [u8]>,
    /// What the rules of this library do not have, in the order of the attributes. It is not encoded.
    pub others: Vec<RuleOption<'a>>,
}

/// A condition, or an option, that only other programs use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RuleOption<'a> {
    Dst(&'a [u8]),
    Oifname(&'a [u8]),
    SuppressPrefixlen(u32),
    SuppressIfgroup(u32),
    L3mdev,
    UidRange(u32, u32),
    IpProto(u8),
    SportRange(u16, u16),
    DportRange(u16, u16),
    /// The number of an attribute.
    Unknown(u16),
}

impl<'a> RuleMessage<'a> {
    /// Size of `struct fib_rule_hdr`.
    const HEADER: usize = 12;

    /// The header of a dump of the rules of a family; AF_UNSPEC: of all families.
    pub fn query(family: u8) -> [u8; RuleMessage::HEADER] {
        RuleMessage { family, ..RuleMessage::default() }.header()
    }

    /// `struct fib_rule_hdr`. The table is an attribute.
    pub fn header(&self) -> [u8; RuleMessage::HEADER] {
        let [f0, f1, f2, f3] = self.flags.to_ne_bytes();
        [self.family, self.dst_len, self.src_len, self.tos, 0, 0, 0, self.action, f0, f1, f2, f3]
    }

    pub fn encode(&self, attrs: &mut Attrs<'_>) {
        attrs.u32(FRA_PRIORITY, self.priority);
        attrs.u8(FRA_PROTOCOL, self.protocol);
        if let Some(mark) = self.fwmark {
            attrs.u32(FRA_FWMARK, mark);
        }
        if let Some(mask) = self.fwmask {
            attrs.u32(FRA_FWMASK, mask);
        }
        if let Some(src) = self.src {
            attrs.bytes(FRA_SRC, src);
        }
        if let Some(name) = self.iifname {
            attrs.pieces(FRA_IIFNAME, [name, &[0]]);
        }
        if let Some(target) = self.goto {
            attrs.u32(FRA_GOTO, target);
        }
        if self.action == FR_ACT_TO_TBL {
            attrs.u32(FRA_TABLE, self.table);
        }
    }

    pub fn decode(payload: &'a [u8]) -> Option<RuleMessage<'a>> {
        let (header, attrs) = payload.split_first_chunk::<{ RuleMessage::HEADER }>()?;
        let [family, dst_len, src_len, tos, table, _, _, action, flags @ ..] = *header;
        let number = |kind| wire::u32_of(attrs, kind);
        Some(RuleMessage {
            family,
            dst_len,
            src_len,
            tos,
            action,
            flags: u32::from_ne_bytes(flags),
            priority: number(FRA_PRIORITY).unwrap_or(0),
            protocol: wire::u8_of(attrs, FRA_PROTOCOL).unwrap_or(0),
            table: number(FRA_TABLE).unwrap_or(table.into()),
            goto: number(FRA_GOTO),
            fwmark: number(FRA_FWMARK),
            fwmask: number(FRA_FWMASK),
            src: wire::attribute(attrs, FRA_SRC),
            iifname: wire::attribute(attrs, FRA_IIFNAME).map(wire::until_nul),
            others: wire::attributes(attrs).filter_map(|(kind, value)| RuleOption::decode(kind, value)).collect(),
        })
    }
}

impl<'a> RuleOption<'a> {
    /// `None`: an attribute that [`RuleMessage`] has, or one that says that there is no such condition.
    fn decode(kind: u16, value: &'a [u8]) -> Option<RuleOption<'a>> {
        let number = wire::u32_at(value, 0);
        let ports = wire::u16_at(value, 0).zip(wire::u16_at(value, 2));
        let other = match kind {
            FRA_IIFNAME | FRA_GOTO | FRA_PRIORITY | FRA_FWMARK | FRA_FWMASK | FRA_TABLE | FRA_PAD | FRA_PROTOCOL
            | FRA_SRC => return None,
            FRA_SUPPRESS_PREFIXLEN | FRA_SUPPRESS_IFGROUP if number == Some(u32::MAX) => return None,
            FRA_L3MDEV if value.first() != Some(&1) => return None,
            FRA_L3MDEV => Some(RuleOption::L3mdev),
            FRA_SUPPRESS_PREFIXLEN => number.map(RuleOption::SuppressPrefixlen),
            FRA_SUPPRESS_IFGROUP => number.map(RuleOption::SuppressIfgroup),
            FRA_DST => Some(RuleOption::Dst(value)),
            FRA_OIFNAME => Some(RuleOption::Oifname(wire::until_nul(value))),
            FRA_UID_RANGE => number.zip(wire::u32_at(value, 4)).map(|(first, last)| RuleOption::UidRange(first, last)),
            FRA_IP_PROTO => value.first().copied().map(RuleOption::IpProto),
            FRA_SPORT_RANGE => ports.map(|(first, last)| RuleOption::SportRange(first, last)),
            FRA_DPORT_RANGE => ports.map(|(first, last)| RuleOption::DportRange(first, last)),
            _ => None,
        };
        Some(other.unwrap_or(RuleOption::Unknown(kind)))
    }
}
