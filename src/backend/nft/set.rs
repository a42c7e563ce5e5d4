//! Named sets and what is put in them: as the kernel takes them, and as `nft` shows them, side by side.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::model::{Family, IdRange, MacAddr, PortRange};
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
    /// NFT_SET_INTERVAL.
    const INTERVAL: u32 = 4;
    /// NFT_SET_TIMEOUT.
    const TIMEOUT: u32 = 16;

    pub fn encode(&self, attrs: &mut Attrs<'_>) {
        // `nft` knows the key types by these numbers; to the kernel they mean nothing.
        let (flags, key_type, key_len) = match self.key {
            Key::Port => (Self::INTERVAL, 13, 2),
            Key::Interface => (0, 41, 16),
            Key::Mac => (0, 9, 6),
            Key::Uid => (Self::INTERVAL, 24, 4),
            Key::Gid => (Self::INTERVAL, 25, 4),
            Key::Address(Family::V4) => (Self::INTERVAL, 7, 4),
            Key::Address(Family::V6) => (Self::INTERVAL, 8, 16),
            Key::Network(Family::V4) => (0, 7, 4),
            Key::Network(Family::V6) => (0, 8, 16),
            Key::Expiring(Family::V4) => (Self::TIMEOUT, 7, 4),
            Key::Expiring(Family::V6) => (Self::TIMEOUT, 8, 16),
        };
        attrs.string(2, &self.name.to_string());
        attrs.be32(3, flags);
        attrs.be32(4, key_type);
        attrs.be32(5, key_len);
        attrs.be32(10, self.id);
        if matches!(self.key, Key::Interface | Key::Uid | Key::Gid) {
            attrs.bytes(13, &HOST_ORDER);
        }
        if let Key::Expiring(_) = self.key {
            // NFTA_SET_DESC, NFTA_SET_DESC_SIZE; NFTA_SET_GC_INTERVAL in milliseconds.
            attrs.nest(9, |a| a.be32(1, EXPIRING_MAX));
            attrs.be32(12, COLLECT_EVERY_SECONDS * 1000);
        }
    }
}

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
    /// Each element by itself; of a range, its first key and the first key behind it. At the top there is none behind.
    pub fn encode(&self, list: &mut Attrs<'_>) {
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
    /// NFT_SET_ELEM_INTERVAL_END.
    const END: u32 = 1;
    list.nest(1, |a| {
        if end {
            a.be32(3, END);
        }
        a.nest(1, |a| a.bytes(1, key));
    });
}

/// An element with its timeout and, equal to it, the time that is left. Linux 6.12 changes the time that is left of an
/// element that exists; earlier kernels leave the element as it is.
fn expiring(list: &mut Attrs<'_>, key: &[u8], ttl: Duration) {
    let milliseconds = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).to_be_bytes();
    list.nest(1, |a| {
        a.nest(1, |a| a.bytes(1, key));
        // NFTA_SET_ELEM_TIMEOUT, NFTA_SET_ELEM_EXPIRATION.
        a.bytes(4, &milliseconds);
        a.bytes(5, &milliseconds);
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
