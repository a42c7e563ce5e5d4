//! nf_tables: a plan becomes objects (`ruleset`), each of which knows its bytes
//! and its command (`object`, and `statement` for what rules are made of);
//! changes are made all at once (`transaction`); `table` reads what is there, and `trace` follows packets.

pub(crate) mod expression;
pub(crate) mod object;
pub(crate) mod ruleset;
pub(crate) mod set;
pub(crate) mod statement;
pub(crate) mod table;
pub(crate) mod transaction;

use crate::netlink::uapi::NFNL_SUBSYS_NFTABLES;

/// The subsystem is the high byte of a message type.
pub(crate) const SUBSYSTEM: u16 = NFNL_SUBSYS_NFTABLES << 8;

/// `struct nfgenmsg`: the family, a version that is always 0, and a resource id.
pub(crate) fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}
