//! Address prefixes, and the ranges of addresses that they cover.

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::memory;
use crate::model::Family;
use crate::name;

mod set;

pub(crate) use set::{BYTES_EACH, Change, Contents, LENGTHS, PrefixSet};

/// Address prefix: an address, and the number of its leading bits that count.
///
/// Prefixes are ordered by family (IPv4 first), then by address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// Creates a prefix. Bits of the address after the length are cleared.
    ///
    /// ```
    /// use tproxy::rules::Prefix;
    ///
    /// let network = Prefix::new("192.0.2.7".parse()?, 24)?;
    /// assert_eq!((network.addr().to_string().as_str(), network.prefix_len()), ("192.0.2.0", 24));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(addr: IpAddr, len: u8) -> Result<Prefix> {
        let family = Prefix { addr, len }.family();
        let bits = bits(family);
        if u32::from(len) > bits {
            return Err(Error::invalid_with(format_args!("prefix {addr}/{len}: the length is at most {bits}")));
        }
        Ok(Prefix { addr: address(family, number(addr) & !host_mask(family, len)), len })
    }

    /// Returns the first address.
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// Returns the length in bits.
    pub fn prefix_len(&self) -> u8 {
        self.len
    }

    /// Returns the family.
    pub fn family(&self) -> Family {
        match self.addr {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Whether the prefix contains the address.
    pub(crate) fn covers(&self, addr: IpAddr) -> bool {
        let family = Prefix { addr, len: 0 }.family();
        family == self.family() && (self.range().first..=self.range().last).contains(&number(addr))
    }

    /// Returns one of its addresses; if it has several, not the network address.
    pub(crate) fn sample(&self) -> IpAddr {
        let range = self.range();
        address(self.family(), (range.first + 2).min(range.last))
    }

    fn range(&self) -> Range {
        let first = number(self.addr);
        Range { first, last: first | host_mask(self.family(), self.len) }
    }
}

impl From<IpAddr> for Prefix {
    /// Creates a full-length prefix of the address.
    fn from(addr: IpAddr) -> Prefix {
        Prefix { addr, len: if addr.is_ipv4() { 32 } else { 128 } }
    }
}

impl From<Ipv4Addr> for Prefix {
    /// Creates a full-length prefix of the address.
    fn from(addr: Ipv4Addr) -> Prefix {
        IpAddr::from(addr).into()
    }
}

impl From<Ipv6Addr> for Prefix {
    /// Creates a full-length prefix of the address.
    fn from(addr: Ipv6Addr) -> Prefix {
        IpAddr::from(addr).into()
    }
}

impl FromStr for Prefix {
    type Err = Error;

    /// Parses `ADDR/LEN`, or an address as a full-length prefix.
    ///
    /// ```
    /// use tproxy::rules::Prefix;
    ///
    /// let network: Prefix = "192.0.2.0/24".parse()?;
    /// assert_eq!(network.to_string(), "192.0.2.0/24");
    /// assert_eq!("2001:db8::1".parse::<Prefix>()?.to_string(), "2001:db8::1/128");
    /// assert!("192.0.2.0/33".parse::<Prefix>().is_err());
    /// # Ok::<(), tproxy::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<Prefix> {
        let invalid = || Error::invalid_with(format_args!("{} is not a prefix (ADDR/LEN)", name::quoted(text)));
        let (addr, len) = match text.split_once('/') {
            Some((addr, len)) => (addr, Some(len)),
            None => (text, None),
        };
        let addr: IpAddr = addr.parse().map_err(|_| invalid())?;
        match len {
            Some(len) if len.bytes().all(|byte| byte.is_ascii_digit()) => {
                Prefix::new(addr, len.parse().map_err(|_| invalid())?)
            }
            Some(_) => Err(invalid()),
            None => Ok(addr.into()),
        }
    }
}

/// The same order as the derived one, but compares numbers: long lists are sorted.
impl Ord for Prefix {
    fn cmp(&self, other: &Prefix) -> Ordering {
        let order = |prefix: &Prefix| (prefix.addr.is_ipv6(), number(prefix.addr), prefix.len);
        order(self).cmp(&order(other))
    }
}

impl PartialOrd for Prefix {
    fn partial_cmp(&self, other: &Prefix) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

/// Range of addresses of one family as numbers, including both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub first: u128,
    pub last: u128,
}

impl Range {
    /// Whether it overlaps the other range, or ends directly below it.
    fn reaches(&self, next: &Range) -> bool {
        self.last.checked_add(1).is_none_or(|end| next.first <= end)
    }
}

/// Converts a number to an address of the family.
pub(crate) fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// Returns the highest address of a family.
pub(crate) fn highest(family: Family) -> u128 {
    host_mask(family, 0)
}

/// Returns the mask of a number of leading bits; `None`: all bits.
pub(crate) fn mask(family: Family, len: Option<u8>) -> Option<IpAddr> {
    let host = host_mask(family, len?);
    (host != 0).then(|| address(family, highest(family) ^ host))
}

fn number(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => addr.to_bits().into(),
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

fn bits(family: Family) -> u32 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

fn host_mask(family: Family, len: u8) -> u128 {
    let host_bits = bits(family).saturating_sub(len.into());
    1u128.checked_shl(host_bits).map_or(u128::MAX, |bit| bit - 1)
}
/// Returns the ranges of one sorted list that are not in another.
fn without(list: &[Range], other: &[Range]) -> Result<Vec<Range>> {
    let in_other =
        |range: &Range| other.binary_search_by_key(&range.first, |r| r.first).is_ok_and(|i| other[i] == *range);
    memory::gather(list.iter().filter(|range| !in_other(range)).copied())
}

/// Sorts ranges, and merges those that overlap or touch.
fn merged(ranges: impl Iterator<Item = Range>) -> Result<Vec<Range>> {
    let mut all: Vec<Range> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.reaches(&range) => last.last = last.last.max(range.last),
            _ => memory::push(&mut all, range)?,
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn prefix_order_is_by_address_then_length(a: (IpAddr, u8), b: (IpAddr, u8)) {
            let made = |(addr, len): (IpAddr, u8)| Prefix::new(addr, if addr.is_ipv4() { len % 33 } else { len % 129 }).unwrap();
            let (a, b) = (made(a), made(b));
            prop_assert_eq!(a.cmp(&b), (a.addr, a.len).cmp(&(b.addr, b.len)));
        }
    }

    #[test]
    fn prefix_invalid_is_refused() {
        let made = |addr: &str, len| Prefix::new(addr.parse().unwrap(), len);
        assert_eq!(made("10.0.0.0", 33).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(made("::", 129).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(made("10.0.0.1", 24).unwrap(), made("10.0.0.0", 24).unwrap());
    }

    #[test]
    fn prefix_text_is_an_address_with_or_without_a_length() {
        let parsed = |text: &str| text.parse::<Prefix>().map(|prefix| prefix.to_string()).ok();
        assert_eq!(parsed("192.0.2.9/24").as_deref(), Some("192.0.2.0/24"));
        assert_eq!(parsed("192.0.2.9").as_deref(), Some("192.0.2.9/32"));
        assert_eq!(parsed("2001:db8::1").as_deref(), Some("2001:db8::1/128"));
        for bad in ["192.0.2.0/+24", "192.0.2.0/ 24", "192.0.2.0/", "192.0.2.0/33", "192.0.2.0/256", "/24", "", "eth0"]
        {
            assert_eq!(bad.parse::<Prefix>().unwrap_err().errno(), libc::EINVAL, "{bad}");
        }
    }

    #[test]
    fn prefix_mask_has_leading_bits() {
        let shown = |family, len| mask(family, Some(len)).map(|mask| mask.to_string());
        assert_eq!(shown(Family::V4, 0).unwrap(), "0.0.0.0");
        assert_eq!(shown(Family::V4, 20).unwrap(), "255.255.240.0");
        assert_eq!(shown(Family::V6, 48).unwrap(), "ffff:ffff:ffff::");
        assert_eq!((shown(Family::V4, 32), shown(Family::V6, 128), mask(Family::V4, None)), (None, None, None));
    }
}
