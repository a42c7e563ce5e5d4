//! nf_tables: a plan becomes objects (`ruleset`), each of which knows its bytes
//! and its command (`object`, and `statement` for what rules are made of);
//! changes are made all at once (`transaction`); `table` reads what is there, and `trace` follows packets.

pub(crate) mod object;
pub(crate) mod ruleset;
pub(crate) mod set;
pub(crate) mod statement;
pub(crate) mod table;
pub(crate) mod transaction;

/// NFNL_SUBSYS_NFTABLES, as the high byte of a message type.
pub(crate) const SUBSYSTEM: u16 = 10 << 8;

/// `struct nfgenmsg`: the family, a version that is always 0, and a resource id.
pub(crate) fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// NFPROTO_INET: tables that see IPv4 and IPv6.
const INET: u8 = 1;
