//! Sets of address prefixes, and the ranges of addresses that they cover.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::{Error, Result};
use crate::model::Family;

/// An address and how many of its leading bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    /// IPv4 before IPv6, then in the order of addresses.
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// A prefix; bits of the address behind its length do not count.
    pub fn new(addr: IpAddr, len: u8) -> Result<Prefix> {
        let family = Prefix { addr, len }.family();
        let bits = bits(family);
        if u32::from(len) > bits {
            return Err(Error::invalid(format!("prefix {addr}/{len}: the length is at most {bits}")));
        }
        Ok(Prefix { addr: address(family, number(addr) & !host_mask(family, len)), len })
    }

    /// The family of its address.
    pub fn family(&self) -> Family {
        match self.addr {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// It has the address in it.
    pub(crate) fn covers(&self, addr: IpAddr) -> bool {
        let family = Prefix { addr, len: 0 }.family();
        family == self.family() && (self.range().first..=self.range().last).contains(&number(addr))
    }

    /// One of its addresses: not the network's own, if it has others.
    pub(crate) fn sample(&self) -> IpAddr {
        let range = self.range();
        address(self.family(), (range.first + 2).min(range.last))
    }

    fn range(&self) -> Range {
        let first = number(self.addr);
        Range { first, last: first | host_mask(self.family(), self.len) }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

/// Addresses of one family as numbers, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub first: u128,
    pub last: u128,
}

impl Range {
    /// Overlaps the other, or touches it from below.
    fn reaches(&self, next: &Range) -> bool {
        self.last.checked_add(1).is_none_or(|end| next.first <= end)
    }
}

/// A number of this family as an address.
pub(crate) fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// The highest address of a family.
pub(crate) fn highest(family: Family) -> u128 {
    host_mask(family, 0)
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

/// Prefixes of both families, each once. They may overlap: what is covered
/// stays covered until the last prefix that covers it is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PrefixSet {
    sorted: Vec<Prefix>,
}

/// So many changes at once are cheaper sorted in than one by one.
const MANY: usize = 64;

/// How what a set covers changes, of one family.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Delta {
    pub gone: Vec<Range>,
    pub new: Vec<Range>,
}

impl PrefixSet {
    pub fn new(prefixes: &[Prefix]) -> PrefixSet {
        let mut sorted = prefixes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        PrefixSet { sorted }
    }

    /// What the prefixes of a family cover: ranges in order, with gaps between them, as the kernel's sets want them.
    pub fn ranges(&self, family: Family) -> Vec<Range> {
        merge(self.of(family).iter())
    }

    pub fn of(&self, family: Family) -> &[Prefix] {
        let split = self.sorted.partition_point(|prefix| prefix.family() == Family::V4);
        let (v4, v6) = self.sorted.split_at(split);
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }

    /// Adds and removes prefixes. Gives how the ranges of each family change (IPv4, IPv6).
    ///
    /// The work is in proportion to the change and to the ranges that it
    /// touches, not to the set. A prefix that is there already may be added;
    /// one that is not there cannot be removed, and then nothing is changed.
    pub fn update(&mut self, add: &[Prefix], remove: &[Prefix]) -> Result<[Delta; 2]> {
        let (add, remove) = (PrefixSet::new(add).sorted, PrefixSet::new(remove).sorted);
        let has = |sorted: &[Prefix], prefix: &Prefix| sorted.binary_search(prefix).is_ok();
        if let Some(prefix) = remove.iter().find(|prefix| !has(&self.sorted, prefix) && !has(&add, prefix)) {
            return Err(Error::new(libc::ENOENT, format!("prefix {prefix} to be removed is not in the set")));
        }
        let changed = || add.iter().chain(&remove);
        let before = [Family::V4, Family::V6].map(|family| self.touched(family, changed()));
        if add.len() + remove.len() > MANY {
            self.sorted.extend_from_slice(&add);
            self.sorted.sort_unstable();
            self.sorted.dedup();
            self.sorted.retain(|prefix| !has(&remove, prefix));
        } else {
            for prefix in &add {
                if let Err(place) = self.sorted.binary_search(prefix) {
                    self.sorted.insert(place, *prefix);
                }
            }
            for prefix in &remove {
                if let Ok(place) = self.sorted.binary_search(prefix) {
                    self.sorted.remove(place);
                }
            }
        }
        Ok(before.map(|(family, windows, old)| {
            let new: Vec<Range> = windows.iter().flat_map(|window| merge(self.within(family, *window))).collect();
            Delta { gone: without(&old, &new), new: without(&new, &old) }
        }))
    }

    /// The parts of the address space that a change may touch, apart from each other, and the ranges there now.
    fn touched<'a>(
        &self,
        family: Family,
        changed: impl Iterator<Item = &'a Prefix>,
    ) -> (Family, Vec<Range>, Vec<Range>) {
        let mut windows: Vec<Range> = changed
            .filter(|prefix| prefix.family() == family)
            .map(|prefix| {
                // As far as the ranges reach that it lies in or touches.
                let own = prefix.range();
                let around = self.around(family, own);
                Range { first: around.first.min(own.first), last: around.last.max(own.last) }
            })
            .collect();
        windows.sort_unstable_by_key(|range| range.first);
        let windows = merge_sorted(windows.into_iter());
        let old = windows.iter().flat_map(|window| merge(self.within(family, *window))).collect();
        (family, windows, old)
    }

    /// The range that is made of everything which overlaps or touches `own`.
    fn around(&self, family: Family, own: Range) -> Range {
        let all = self.of(family);
        let mut grown = own;
        // Upwards: prefixes in order, as long as each begins within reach.
        let start = all.partition_point(|prefix| prefix.range().first < own.first);
        for prefix in &all[start..] {
            if !grown.reaches(&prefix.range()) {
                break;
            }
            grown.last = grown.last.max(prefix.range().last);
        }
        // Downwards: a prefix that reaches so far begins at the prefix of some length of an address
        // within, or ends right below.
        loop {
            let below = grown.first;
            for target in [Some(below), below.checked_sub(1)].into_iter().flatten() {
                if let Some(covering) = self.covering(family, target) {
                    grown.first = grown.first.min(covering.first);
                    grown.last = grown.last.max(covering.last);
                }
            }
            if grown.first == below {
                return grown;
            }
        }
    }

    /// The widest prefix that an address lies in.
    fn covering(&self, family: Family, number: u128) -> Option<Range> {
        (0..=bits(family) as u8).find_map(|len| {
            let first = number & !host_mask(family, len);
            let prefix = Prefix { addr: address(family, first), len };
            self.sorted.binary_search(&prefix).is_ok().then(|| prefix.range())
        })
    }

    /// The prefixes that begin in a window.
    fn within(&self, family: Family, window: Range) -> impl Iterator<Item = &Prefix> {
        let all = self.of(family);
        let from = all.partition_point(|prefix| prefix.range().first < window.first);
        all[from..].iter().take_while(move |prefix| prefix.range().first <= window.last)
    }
}

/// The ranges of one sorted list that are not in another.
fn without(list: &[Range], other: &[Range]) -> Vec<Range> {
    let in_other =
        |range: &Range| other.binary_search_by_key(&range.first, |r| r.first).is_ok_and(|i| other[i] == *range);
    list.iter().filter(|range| !in_other(range)).copied().collect()
}

fn merge<'a>(sorted: impl Iterator<Item = &'a Prefix>) -> Vec<Range> {
    merge_sorted(sorted.map(Prefix::range))
}

fn merge_sorted(ranges: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut merged: Vec<Range> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.reaches(&range) => last.last = last.last.max(range.last),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        let (addr, len) = text.split_once('/').unwrap();
        Prefix::new(addr.parse().unwrap(), len.parse().unwrap()).unwrap()
    }

    fn set(prefixes: &[&str]) -> PrefixSet {
        PrefixSet::new(&prefixes.iter().map(|p| prefix(p)).collect::<Vec<_>>())
    }

    fn shown(family: Family, ranges: &[Range]) -> Vec<String> {
        ranges.iter().map(|r| format!("{}-{}", address(family, r.first), address(family, r.last))).collect()
    }

    #[test]
    fn overlaps_duplicates_and_neighbours_become_one_range() {
        let set = set(&[
            "10.0.1.0/24",
            "10.0.0.0/24",
            "10.0.0.0/25",
            "10.0.1.0/24",
            "0.0.0.0/32",
            "255.255.255.255/32",
            "::/0",
        ]);
        assert_eq!(
            shown(Family::V4, &set.ranges(Family::V4)),
            ["0.0.0.0-0.0.0.0", "10.0.0.0-10.0.1.255", "255.255.255.255-255.255.255.255"]
        );
        assert_eq!(set.ranges(Family::V6), [Range { first: 0, last: u128::MAX }]);
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        let refused = |addr: &str, len| Prefix::new(addr.parse().unwrap(), len).unwrap_err().errno();
        assert_eq!(refused("10.0.0.0", 33), libc::EINVAL);
        assert_eq!(refused("::", 129), libc::EINVAL);
        assert_eq!(prefix("10.0.0.1/24"), prefix("10.0.0.0/24"));
    }

    #[test]
    fn a_covered_prefix_comes_back_when_its_cover_goes() {
        let mut set = set(&["10.0.0.0/8", "10.1.0.0/16"]);
        let [v4, v6] = set.update(&[], &[prefix("10.0.0.0/8")]).unwrap();
        assert_eq!(shown(Family::V4, &v4.gone), ["10.0.0.0-10.255.255.255"]);
        assert_eq!(shown(Family::V4, &v4.new), ["10.1.0.0-10.1.255.255"]);
        assert_eq!(v6, Delta::default());
        assert_eq!(set.update(&[], &[prefix("10.0.0.0/8")]).unwrap_err().errno(), libc::ENOENT);
    }

    /// In a small corner of the address space, where prefixes meet often.
    fn corner() -> impl Strategy<Value = Prefix> {
        (0..64u8, 24..=32u8, any::<bool>()).prop_map(|(host, len, v6)| {
            if v6 {
                let number = u128::from(host) & !host_mask(Family::V6, len + 96);
                Prefix::new(address(Family::V6, number), len + 96).unwrap()
            } else {
                let number = (0xFFFF_FFC0u128 + u128::from(host)) & !host_mask(Family::V4, len);
                Prefix::new(address(Family::V4, number), len).unwrap()
            }
        })
    }

    proptest! {
        #[test]
        fn an_update_is_the_difference_of_the_ranges(
            start in proptest::collection::vec(corner(), 0..20),
            add in proptest::collection::vec(corner(), 0..90),
            remove in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6),
        ) {
            let mut set = PrefixSet::new(&start);
            let remove: Vec<Prefix> = if set.sorted.is_empty() { Vec::new() } else {
                remove.iter().map(|i| *i.get(&set.sorted)).collect()
            };
            let before = set.clone();
            let deltas = set.update(&add, &remove).unwrap();
            let wanted: Vec<Prefix> =
                start.iter().chain(&add).filter(|p| !remove.contains(p)).copied().collect();
            prop_assert_eq!(&set, &PrefixSet::new(&wanted));
            for (family, delta) in [Family::V4, Family::V6].into_iter().zip(deltas) {
                let (old, new) = (before.ranges(family), set.ranges(family));
                let only = |a: &[Range], b: &[Range]| a.iter().filter(|r| !b.contains(r)).copied().collect::<Vec<_>>();
                prop_assert_eq!(delta.gone, only(&old, &new));
                prop_assert_eq!(delta.new, only(&new, &old));
            }
        }

        #[test]
        fn ranges_cover_what_the_prefixes_cover(prefixes in proptest::collection::vec(corner(), 0..20)) {
            let set = PrefixSet::new(&prefixes);
            for family in [Family::V4, Family::V6] {
                let ranges = set.ranges(family);
                for pair in ranges.windows(2) {
                    prop_assert!(pair[0].last + 1 < pair[1].first);
                }
                let base = if family == Family::V4 { 0xFFFF_FF00u128 } else { 0 };
                for number in base..base + 256 {
                    let covered = prefixes.iter().any(|p| p.family() == family && (p.range().first..=p.range().last).contains(&number));
                    prop_assert_eq!(covered, ranges.iter().any(|r| (r.first..=r.last).contains(&number)));
                }
            }
        }
    }
}
