//! Named sets and what is put in them: as the kernel takes them, and as `nft` shows them, side by side.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::model::{Family, IdRange, MacAddr, PortRange};
use crate::netlink::uapi::*;
use crate::netlink::wire::Attrs;
use crate::prefix::{self, Range};

/// A set's name, in one of two variants: so that a new set can be there, and
/// be full, before the rules turn from the old one to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SetName {
    pub base: &'static str,
    /// The prefixes in it are all of this length, and it is asked for the address without the other bits.
    pub len: Option<u8>,
    pub variant: Variant,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Variant {
    #[default]
    First,
    Second,
}

impl Variant {
    pub fn other(self) -> Variant {
        match self {
            Variant::First => Variant::Second,
            Variant::Second => Variant::First,
        }
    }

    /// The variant that a name is of. No set has prefixes of length 2: there are but four.
    pub fn of(name: &str) -> Variant {
        if name.ends_with(SECOND) { Variant::Second } else { Variant::First }
    }
}

const SECOND: &str = "-2";

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base)?;
        if let Some(len) = self.len {
            write!(f, "-{len}")?;
        }
        f.write_str(if self.variant == Variant::Second { SECOND } else { "" })
    }
}

/// A named set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Set {
    pub name: SetName,
    pub key: Key,
    pub id: u32,
}

/// The type of a set's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Port,
    Interface,
    Mac,
    /// Ranges of numbers of users, or of groups. The kernel compares ranges in network order.
    Uid,
    Gid,
    /// Ranges of addresses.
    Address(Family),
    /// Networks of one length, each by its first address.
    ///
    /// The kernel makes a hash table that grows and shrinks of a set without a size (`nft_rhash_type`); with one it
    /// would make a table that cannot grow, and refuse what is more.
    Network(Family),
    /// Addresses that leave the set at their timeout. The kernel stores such a set in the hash table of
    /// [`Key::Network`], with a size too (only `nft_rhash_type` supports timeouts).
    Expiring(Family),
}

/// The most addresses in one [`Key::Expiring`] set. The kernel refuses more with ENFILE.
pub(crate) const EXPIRING_MAX: u32 = 1_000_000;

/// Seconds between two walks in which the kernel frees expired elements. Lookups ignore expired elements at once. The
/// kernel's default is one second, in which a walk through a full set takes a noticeable part of a CPU.
const COLLECT_EVERY_SECONDS: u32 = 10;

/// What is put in a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Elements {
    /// Sorted and apart from each other.
    Ports(Vec<PortRange>),
    Interfaces(Vec<String>),
    Macs(Vec<MacAddr>),
    /// Sorted and apart from each other.
    Ids(Vec<IdRange>),
    /// Sorted and apart from each other.
    Addresses(Family, Vec<Range>),
    Networks(Vec<IpAddr>),
    /// Each leaves the set after a time.
    Expiring(Vec<IpAddr>, Duration),
}

impl Set {
    pub fn encode(&self, attrs: &mut Attrs<'_>) {
        let (flags, key_type, key_len) = match self.key {
            Key::Port => (NFT_SET_INTERVAL, TYPE_INET_SERVICE, 2),
            Key::Interface => (0, TYPE_IFNAME, libc::IFNAMSIZ as u32),
            Key::Mac => (0, TYPE_ETHER_ADDR, libc::ETH_ALEN as u32),
            Key::Uid => (NFT_SET_INTERVAL, TYPE_UID, 4),
            Key::Gid => (NFT_SET_INTERVAL, TYPE_GID, 4),
            Key::Address(Family::V4) => (NFT_SET_INTERVAL, TYPE_IPADDR, 4),
            Key::Address(Family::V6) => (NFT_SET_INTERVAL, TYPE_IP6ADDR, 16),
            Key::Network(Family::V4) => (0, TYPE_IPADDR, 4),
            Key::Network(Family::V6) => (0, TYPE_IP6ADDR, 16),
            Key::Expiring(Family::V4) => (NFT_SET_TIMEOUT, TYPE_IPADDR, 4),
            Key::Expiring(Family::V6) => (NFT_SET_TIMEOUT, TYPE_IP6ADDR, 16),
        };
        attrs.string(NFTA_SET_NAME, &self.name.to_string());
        attrs.be32(NFTA_SET_FLAGS, flags);
        attrs.be32(NFTA_SET_KEY_TYPE, key_type);
        attrs.be32(NFTA_SET_KEY_LEN, key_len);
        attrs.be32(NFTA_SET_ID, self.id);
        if matches!(self.key, Key::Interface | Key::Uid | Key::Gid) {
            attrs.bytes(NFTA_SET_USERDATA, &HOST_ORDER);
        }
        if let Key::Expiring(_) = self.key {
            attrs.nest(NFTA_SET_DESC, |a| a.be32(NFTA_SET_DESC_SIZE, EXPIRING_MAX));
            // In milliseconds.
            attrs.be32(NFTA_SET_GC_INTERVAL, COLLECT_EVERY_SECONDS * 1000);
        }
    }
}

// The types of keys, as `nft` numbers them in its `datatype.h`. The kernel only stores the numbers.
const TYPE_IPADDR: u32 = 7;
const TYPE_IP6ADDR: u32 = 8;
const TYPE_ETHER_ADDR: u32 = 9;
const TYPE_INET_SERVICE: u32 = 13;
const TYPE_UID: u32 = 24;
const TYPE_GID: u32 = 25;
const TYPE_IFNAME: u32 = 41;

/// What tells `nft` that a set's keys are in host order, without which it shows
/// none: NFTNL_UDATA_SET_KEYBYTEORDER, 4 bytes, BYTEORDER_HOST_ENDIAN.
const HOST_ORDER: [u8; 6] = {
    let [a, b, c, d] = 1u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Key::Expiring(family) = self.key {
            let addr = if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
            return write!(f, "type {addr}; size {EXPIRING_MAX}; flags timeout; gc-interval {COLLECT_EVERY_SECONDS}s;");
        }
        f.write_str(match self.key {
            Key::Port => "type inet_service; flags interval;",
            Key::Interface => "type ifname;",
            Key::Mac => "type ether_addr;",
            Key::Uid => "type uid; flags interval;",
            Key::Gid => "type gid; flags interval;",
            Key::Address(Family::V4) => "type ipv4_addr; flags interval;",
            Key::Address(Family::V6) => "type ipv6_addr; flags interval;",
            Key::Network(Family::V4) | Key::Expiring(Family::V4) => "type ipv4_addr;",
            Key::Network(Family::V6) | Key::Expiring(Family::V6) => "type ipv6_addr;",
        })
    }
}

impl Elements {
    /// The attributes of the message that adds them to a set, or deletes them from it.
    pub fn encode_in(&self, attrs: &mut Attrs<'_>, table: &str, set: &SetName) {
        attrs.string(NFTA_SET_ELEM_LIST_TABLE, table);
        attrs.string(NFTA_SET_ELEM_LIST_SET, &set.to_string());
        attrs.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |a| self.encode(a));
    }

    /// Each element by itself; of a range, its first key and the first key behind it. At the top there is none behind.
    fn encode(&self, list: &mut Attrs<'_>) {
        match self {
            Elements::Ports(ranges) => {
                for range in ranges {
                    element(list, &range.first.to_be_bytes(), false);
                    if let Some(end) = range.last.checked_add(1) {
                        element(list, &end.to_be_bytes(), true);
                    }
                }
            }
            Elements::Interfaces(names) => {
                for name in names {
                    let mut key = [0; libc::IFNAMSIZ];
                    key.iter_mut().zip(name.bytes()).for_each(|(slot, byte)| *slot = byte);
                    element(list, &key, false);
                }
            }
            Elements::Macs(macs) => macs.iter().for_each(|mac| element(list, &mac.0, false)),
            Elements::Ids(ranges) => {
                for range in ranges {
                    element(list, &range.first.to_be_bytes(), false);
                    if let Some(end) = range.last.checked_add(1) {
                        element(list, &end.to_be_bytes(), true);
                    }
                }
            }
            Elements::Addresses(family, ranges) => {
                let highest = prefix::highest(*family);
                let mut address = |number: u128, end: bool| match family {
                    Family::V4 => element(list, &(number as u32).to_be_bytes(), end),
                    Family::V6 => element(list, &number.to_be_bytes(), end),
                };
                for range in ranges {
                    address(range.first, false);
                    if range.last < highest {
                        address(range.last + 1, true);
                    }
                }
            }
            Elements::Networks(networks) => {
                for network in networks {
                    match network {
                        IpAddr::V4(addr) => element(list, &addr.octets(), false),
                        IpAddr::V6(addr) => element(list, &addr.octets(), false),
                    }
                }
            }
            Elements::Expiring(addrs, ttl) => {
                for addr in addrs {
                    match addr {
                        IpAddr::V4(addr) => expiring(list, &addr.octets(), *ttl),
                        IpAddr::V6(addr) => expiring(list, &addr.octets(), *ttl),
                    }
                }
            }
        }
    }
}

fn element(list: &mut Attrs<'_>, key: &[u8], end: bool) {
    list.nest(NFTA_LIST_ELEM, |a| {
        if end {
            a.be32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
        }
        a.nest(NFTA_SET_ELEM_KEY, |a| a.bytes(NFTA_DATA_VALUE, key));
    });
}

/// An element with its timeout and, equal to it, the time that is left. Linux 6.12 changes the time that is left of an
/// element that exists; earlier kernels leave the element as it is.
fn expiring(list: &mut Attrs<'_>, key: &[u8], ttl: Duration) {
    let milliseconds = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).to_be_bytes();
    list.nest(NFTA_LIST_ELEM, |a| {
        a.nest(NFTA_SET_ELEM_KEY, |a| a.bytes(NFTA_DATA_VALUE, key));
        a.bytes(NFTA_SET_ELEM_TIMEOUT, &milliseconds);
        a.bytes(NFTA_SET_ELEM_EXPIRATION, &milliseconds);
    });
}

impl fmt::Display for Elements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Elements::Ports(ranges) => comma_separated(f, ranges),
            Elements::Interfaces(names) => comma_separated(f, names.iter().map(|name| format!("\"{name}\""))),
            Elements::Macs(macs) => comma_separated(f, macs),
            Elements::Ids(ranges) => comma_separated(f, ranges),
            Elements::Addresses(family, ranges) => comma_separated(
                f,
                ranges.iter().map(|range| {
                    let first = prefix::address(*family, range.first);
                    match prefix::address(*family, range.last) {
                        last if last == first => first.to_string(),
                        last => format!("{first}-{last}"),
                    }
                }),
            ),
            Elements::Networks(networks) => comma_separated(f, networks),
            Elements::Expiring(addrs, ttl) => {
                let ms = ttl.as_millis();
                comma_separated(f, addrs.iter().map(|addr| format!("{addr} timeout {ms}ms expires {ms}ms")))
            }
        }
    }
}

fn comma_separated(f: &mut fmt::Formatter<'_>, items: impl IntoIterator<Item = impl fmt::Display>) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        write!(f, "{item}")?;
    }
    Ok(())
}
