//! Expressions that give, change and compare the values of registers.

use super::{Encode, decode_string, decode_value, encode_value};
use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bitwise<'a> {
    pub sreg: u32,
    pub dreg: u32,
    pub operation: BitwiseOperation<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BitwiseOperation<'a> {
    /// NFT_BITWISE_BOOL: (value & mask) ^ xor.
    Bool { mask: &'a [u8], xor: &'a [u8] },
    /// A shift, or an operation on two registers. Our rules have none.
    Other,
}

impl Encode for Bitwise<'_> {
    const NAME: &'static str = "bitwise";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_BITWISE_SREG, self.sreg);
        data.be32(NFTA_BITWISE_DREG, self.dreg);
        if let BitwiseOperation::Bool { mask, xor } = self.operation {
            data.be32(NFTA_BITWISE_LEN, mask.len() as u32);
            encode_value(data, NFTA_BITWISE_MASK, mask);
            encode_value(data, NFTA_BITWISE_XOR, xor);
        }
    }
}

impl<'a> Bitwise<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Option<Bitwise<'a>> {
        // Linux before 5.6 has no NFTA_BITWISE_OP.
        let bool = wire::be32_of(data, NFTA_BITWISE_OP).unwrap_or(NFT_BITWISE_BOOL) == NFT_BITWISE_BOOL;
        let operation = match (decode_value(data, NFTA_BITWISE_MASK), decode_value(data, NFTA_BITWISE_XOR)) {
            (Some(mask), Some(xor)) if bool => BitwiseOperation::Bool { mask, xor },
            _ => BitwiseOperation::Other,
        };
        let number = |kind| wire::be32_of(data, kind);
        Some(Bitwise { sreg: number(NFTA_BITWISE_SREG)?, dreg: number(NFTA_BITWISE_DREG)?, operation })
    }
}

/// Changes the byte order of a number of 4 bytes. No decoder: nothing depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::nft) struct Byteorder {
    pub sreg: u32,
    pub dreg: u32,
    /// NFT_BYTEORDER_*.
    pub op: u32,
}

impl Encode for Byteorder {
    const NAME: &'static str = "byteorder";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_BYTEORDER_SREG, self.sreg);
        data.be32(NFTA_BYTEORDER_DREG, self.dreg);
        data.be32(NFTA_BYTEORDER_OP, self.op);
        data.be32(NFTA_BYTEORDER_LEN, 4);
        data.be32(NFTA_BYTEORDER_SIZE, 4);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cmp<'a> {
    pub sreg: u32,
    /// NFT_CMP_*.
    pub op: u32,
    pub value: &'a [u8],
}

impl Encode for Cmp<'_> {
    const NAME: &'static str = "cmp";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_CMP_SREG, self.sreg);
        data.be32(NFTA_CMP_OP, self.op);
        encode_value(data, NFTA_CMP_DATA, self.value);
    }
}

impl<'a> Cmp<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Option<Cmp<'a>> {
        let (sreg, op) = (wire::be32_of(data, NFTA_CMP_SREG)?, wire::be32_of(data, NFTA_CMP_OP)?);
        Some(Cmp { sreg, op, value: decode_value(data, NFTA_CMP_DATA)? })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Immediate<'a> {
    Value {
        dreg: u32,
        value: &'a [u8],
    },
    Verdict {
        /// NF_ACCEPT, NF_DROP, NFT_JUMP and others.
        code: u32,
        /// The chain to jump or go to.
        chain: Option<&'a [u8]>,
    },
}

impl Encode for Immediate<'_> {
    const NAME: &'static str = "immediate";

    fn encode(&self, data: &mut Attrs<'_>) {
        match *self {
            Immediate::Value { dreg, value } => {
                data.be32(NFTA_IMMEDIATE_DREG, dreg);
                encode_value(data, NFTA_IMMEDIATE_DATA, value);
            }
            Immediate::Verdict { code, chain } => {
                data.be32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
                data.nest(NFTA_IMMEDIATE_DATA, |a| {
                    a.nest(NFTA_DATA_VERDICT, |a| {
                        a.be32(NFTA_VERDICT_CODE, code);
                        if let Some(chain) = chain {
                            a.pieces(NFTA_VERDICT_CHAIN, [chain, &[0]]);
                        }
                    });
                });
            }
        }
    }
}

impl<'a> Immediate<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Option<Immediate<'a>> {
        if let Some(value) = decode_value(data, NFTA_IMMEDIATE_DATA) {
            return Some(Immediate::Value { dreg: wire::be32_of(data, NFTA_IMMEDIATE_DREG)?, value });
        }
        let verdict = wire::attribute(wire::attribute(data, NFTA_IMMEDIATE_DATA)?, NFTA_DATA_VERDICT)?;
        let chain = decode_string(verdict, NFTA_VERDICT_CHAIN);
        Some(Immediate::Verdict { code: wire::be32_of(verdict, NFTA_VERDICT_CODE)?, chain })
    }
}

/// Looks up a value in a set or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lookup<'a> {
    pub sreg: u32,
    pub set: &'a [u8],
    /// NFT_LOOKUP_F_*.
    pub flags: u32,
    /// Register for the value in a map.
    pub dreg: Option<u32>,
}

impl Encode for Lookup<'_> {
    const NAME: &'static str = "lookup";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_LOOKUP_SREG, self.sreg);
        data.pieces(NFTA_LOOKUP_SET, [self.set, &[0]]);
        if self.flags != 0 {
            data.be32(NFTA_LOOKUP_FLAGS, self.flags);
        }
        if let Some(dreg) = self.dreg {
            data.be32(NFTA_LOOKUP_DREG, dreg);
        }
    }
}

impl<'a> Lookup<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Option<Lookup<'a>> {
        let number = |kind| wire::be32_of(data, kind);
        Some(Lookup {
            sreg: number(NFTA_LOOKUP_SREG)?,
            set: decode_string(data, NFTA_LOOKUP_SET)?,
            flags: number(NFTA_LOOKUP_FLAGS).unwrap_or(0),
            dreg: number(NFTA_LOOKUP_DREG),
        })
    }
}

/// Compares with both ends of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RangeCmp<'a> {
    pub sreg: u32,
    /// NFT_RANGE_*.
    pub op: u32,
    pub from: &'a [u8],
    pub to: &'a [u8],
}

impl Encode for RangeCmp<'_> {
    const NAME: &'static str = "range";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_RANGE_SREG, self.sreg);
        data.be32(NFTA_RANGE_OP, self.op);
        encode_value(data, NFTA_RANGE_FROM_DATA, self.from);
        encode_value(data, NFTA_RANGE_TO_DATA, self.to);
    }
}

impl<'a> RangeCmp<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Option<RangeCmp<'a>> {
        let (sreg, op) = (wire::be32_of(data, NFTA_RANGE_SREG)?, wire::be32_of(data, NFTA_RANGE_OP)?);
        let (from, to) = (decode_value(data, NFTA_RANGE_FROM_DATA)?, decode_value(data, NFTA_RANGE_TO_DATA)?);
        Some(RangeCmp { sreg, op, from, to })
    }
}
