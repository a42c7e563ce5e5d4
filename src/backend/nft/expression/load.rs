//! Expressions that load something about the packet into a register.

use super::Encode;
use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs};

/// Whether an expression loads a key into a register, or sets it to the value of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Load { dreg: u32 },
    Set { sreg: u32 },
}

/// Connection tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ct {
    /// NFT_CT_*.
    pub key: u32,
    pub access: Access,
}

impl Encode for Ct {
    const NAME: &'static str = "ct";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_CT_KEY, self.key);
        match self.access {
            Access::Load { dreg } => data.be32(NFTA_CT_DREG, dreg),
            Access::Set { sreg } => data.be32(NFTA_CT_SREG, sreg),
        }
    }
}

impl Ct {
    pub(super) fn decode(data: &[u8]) -> Option<Ct> {
        let load = wire::be32_of(data, NFTA_CT_DREG).map(|dreg| Access::Load { dreg });
        let set = || wire::be32_of(data, NFTA_CT_SREG).map(|sreg| Access::Set { sreg });
        Some(Ct { key: wire::be32_of(data, NFTA_CT_KEY)?, access: load.or_else(set)? })
    }
}

/// Looks up a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fib {
    /// NFTA_FIB_F_*.
    pub flags: u32,
    /// NFT_FIB_RESULT_*.
    pub result: u32,
    pub dreg: u32,
}

impl Encode for Fib {
    const NAME: &'static str = "fib";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_FIB_FLAGS, self.flags);
        data.be32(NFTA_FIB_RESULT, self.result);
        data.be32(NFTA_FIB_DREG, self.dreg);
    }
}

impl Fib {
    pub(super) fn decode(data: &[u8]) -> Option<Fib> {
        let number = |kind| wire::be32_of(data, kind);
        Some(Fib { flags: number(NFTA_FIB_FLAGS)?, result: number(NFTA_FIB_RESULT)?, dreg: number(NFTA_FIB_DREG)? })
    }
}

/// A property of the packet that is not in its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    /// NFT_META_*.
    pub key: u32,
    pub access: Access,
}

impl Encode for Meta {
    const NAME: &'static str = "meta";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_META_KEY, self.key);
        match self.access {
            Access::Load { dreg } => data.be32(NFTA_META_DREG, dreg),
            Access::Set { sreg } => data.be32(NFTA_META_SREG, sreg),
        }
    }
}

impl Meta {
    pub(super) fn decode(data: &[u8]) -> Option<Meta> {
        let set = wire::be32_of(data, NFTA_META_SREG).map(|sreg| Access::Set { sreg });
        let load = || wire::be32_of(data, NFTA_META_DREG).map(|dreg| Access::Load { dreg });
        Some(Meta { key: wire::be32_of(data, NFTA_META_KEY)?, access: set.or_else(load)? })
    }
}

/// Loads bytes of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Payload {
    pub dreg: u32,
    /// NFT_PAYLOAD_*.
    pub base: u32,
    pub offset: u32,
    pub len: u32,
}

impl Encode for Payload {
    const NAME: &'static str = "payload";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_PAYLOAD_DREG, self.dreg);
        data.be32(NFTA_PAYLOAD_BASE, self.base);
        data.be32(NFTA_PAYLOAD_OFFSET, self.offset);
        data.be32(NFTA_PAYLOAD_LEN, self.len);
    }
}

impl Payload {
    /// `None`: it writes to the packet.
    pub(super) fn decode(data: &[u8]) -> Option<Payload> {
        let number = |kind| wire::be32_of(data, kind);
        Some(Payload {
            dreg: number(NFTA_PAYLOAD_DREG)?,
            base: number(NFTA_PAYLOAD_BASE)?,
            offset: number(NFTA_PAYLOAD_OFFSET)?,
            len: number(NFTA_PAYLOAD_LEN)?,
        })
    }
}

/// Looks for the socket that the packet belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Socket {
    /// NFT_SOCKET_*.
    pub key: u32,
    pub dreg: u32,
    /// Of NFT_SOCKET_CGROUPV2: how far down the control group is.
    pub level: Option<u32>,
}

impl Encode for Socket {
    const NAME: &'static str = "socket";

    fn encode(&self, data: &mut Attrs<'_>) {
        data.be32(NFTA_SOCKET_KEY, self.key);
        data.be32(NFTA_SOCKET_DREG, self.dreg);
        if let Some(level) = self.level {
            data.be32(NFTA_SOCKET_LEVEL, level);
        }
    }
}

impl Socket {
    pub(super) fn decode(data: &[u8]) -> Option<Socket> {
        let number = |kind| wire::be32_of(data, kind);
        let level = number(NFTA_SOCKET_LEVEL);
        Some(Socket { key: number(NFTA_SOCKET_KEY)?, dreg: number(NFTA_SOCKET_DREG)?, level })
    }
}
