//! Expressions that do something with the packet, and the extensions of iptables.

use super::Encode;
use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nat {
    /// NFT_NAT_SNAT or NFT_NAT_DNAT.
    pub kind: u32,
    /// NFPROTO_*.
    pub family: u32,
    pub reg_addr_min: Option<u32>,
    pub reg_proto_min: Option<u32>,
    /// NF_NAT_RANGE_*.
    pub flags: u32,
}

impl Encode for Nat {
    const NAME: &'static str = "nat";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_NAT_TYPE, self.kind);
        data.be32(NFTA_NAT_FAMILY, self.family);
        if let Some(register) = self.reg_addr_min {
            data.be32(NFTA_NAT_REG_ADDR_MIN, register);
        }
        if let Some(register) = self.reg_proto_min {
            data.be32(NFTA_NAT_REG_PROTO_MIN, register);
        }
        if self.flags != 0 {
            data.be32(NFTA_NAT_FLAGS, self.flags);
        }
    }
}

impl Nat {
    pub(super) fn decode(data: &[u8]) -> Option<Nat> {
        let number = |kind| wire::be32_of(data, kind);
        Some(Nat {
            kind: number(NFTA_NAT_TYPE)?,
            family: number(NFTA_NAT_FAMILY)?,
            reg_addr_min: number(NFTA_NAT_REG_ADDR_MIN),
            reg_proto_min: number(NFTA_NAT_REG_PROTO_MIN),
            flags: number(NFTA_NAT_FLAGS).unwrap_or(0),
        })
    }
}

/// Exempts the packet from connection tracking. It has no attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::nft) struct Notrack;

impl Encode for Notrack {
    const NAME: &'static str = "notrack";

    fn encode(&self, _: &mut Attrs<'_>) {}
}

/// Uses an object of the table. No decoder: nothing depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::nft) struct Objref<'a> {
    /// NFT_OBJECT_*.
    pub kind: u32,
    pub name: &'a str,
}

impl Encode for Objref<'_> {
    const NAME: &'static str = "objref";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_OBJREF_IMM_TYPE, self.kind);
        data.string(NFTA_OBJREF_IMM_NAME, self.name);
    }
}

/// Translates the destination to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Redir {
    pub reg_proto_min: Option<u32>,
    /// NF_NAT_RANGE_*.
    pub flags: u32,
}

impl Encode for Redir {
    const NAME: &'static str = "redir";

    fn encode(&self, data: &mut Attrs<'_>) {
        if let Some(register) = self.reg_proto_min {
            data.be32(NFTA_REDIR_REG_PROTO_MIN, register);
        }
        if self.flags != 0 {
            data.be32(NFTA_REDIR_FLAGS, self.flags);
        }
    }
}

impl Redir {
    pub(super) fn decode(data: &[u8]) -> Redir {
        let number = |kind| wire::be32_of(data, kind);
        Redir { reg_proto_min: number(NFTA_REDIR_REG_PROTO_MIN), flags: number(NFTA_REDIR_FLAGS).unwrap_or(0) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tproxy {
    /// NFPROTO_*; NFPROTO_UNSPEC: both families.
    pub family: u32,
    pub reg_addr: Option<u32>,
    pub reg_port: Option<u32>,
}

impl Encode for Tproxy {
    const NAME: &'static str = "tproxy";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_TPROXY_FAMILY, self.family);
        if let Some(register) = self.reg_addr {
            data.be32(NFTA_TPROXY_REG_ADDR, register);
        }
        if let Some(register) = self.reg_port {
            data.be32(NFTA_TPROXY_REG_PORT, register);
        }
    }
}

impl Tproxy {
    pub(super) fn decode(data: &[u8]) -> Tproxy {
        let number = |kind| wire::be32_of(data, kind);
        Tproxy {
            family: number(NFTA_TPROXY_FAMILY).unwrap_or(NFPROTO_UNSPEC.into()),
            reg_addr: number(NFTA_TPROXY_REG_ADDR),
            reg_port: number(NFTA_TPROXY_REG_PORT),
        }
    }
}

/// Refuses the packet, by a reset or an ICMP error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reject {
    /// NFT_REJECT_*.
    pub kind: u32,
    /// A code of ICMP or NFT_REJECT_ICMPX_*.
    pub icmp_code: u8,
}

impl Encode for Reject {
    const NAME: &'static str = "reject";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_REJECT_TYPE, self.kind);
        data.u8(NFTA_REJECT_ICMP_CODE, self.icmp_code);
    }
}

impl Reject {
    pub(super) fn decode(data: &[u8]) -> Option<Reject> {
        // The kernel leaves out the code of a reset.
        let icmp_code = wire::u8_of(data, NFTA_REJECT_ICMP_CODE).unwrap_or(0);
        Some(Reject { kind: wire::be32_of(data, NFTA_REJECT_TYPE)?, icmp_code })
    }
}

/// A match or target of iptables. Our rules have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extension<'a> {
    pub name: &'a str,
    pub revision: u32,
    /// `struct xt_*_info`.
    pub info: &'a [u8],
}

impl<'a> Extension<'a> {
    pub(super) fn decode_match(data: &'a [u8]) -> Extension<'a> {
        Extension::decode(data, [NFTA_MATCH_NAME, NFTA_MATCH_REV, NFTA_MATCH_INFO])
    }

    pub(super) fn decode_target(data: &'a [u8]) -> Extension<'a> {
        Extension::decode(data, [NFTA_TARGET_NAME, NFTA_TARGET_REV, NFTA_TARGET_INFO])
    }

    pub(super) fn decode(data: &'a [u8], [name, revision, info]: [u16; 3]) -> Extension<'a> {
        Extension {
            name: wire::string_of(data, name).unwrap_or_default(),
            revision: wire::be32_of(data, revision).unwrap_or(0),
            info: wire::attribute(data, info).unwrap_or_default(),
        }
    }
}
