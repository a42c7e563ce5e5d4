//! Sets of prefixes, divided into parts that the kernel can look up and change
//! fast.
//!
//! The kernel searches a set of ranges in a number of steps that grows with its
//! size, and walks the whole set at every change (`nft_rbtree_commit`). A set of
//! single keys is a hash table: to find, add or remove a key takes one step,
//! whatever the size. Prefixes of a frequent length therefore become keys of a
//! separate set. Rules look up the packet's address in it after clearing the
//! bits after the prefix length. All other prefixes become ranges.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{Prefix, Range, address, host_mask, merged, without};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::{Families, Family};

/// Minimum number of prefixes of a length for a separate set. Fewer prefixes cost no more as ranges: a search takes about 25 ns
/// for each doubling of the set; the lookup in a separate set, including the mask, takes about 50 ns for any size.
const MANY: usize = 64;

/// Maximum number of separate sets. Each of them costs one lookup per packet. Four cost as much as a search among a few hundred
/// ranges. Lists have few very frequent lengths: that of single addresses, and those in which networks are assigned. The remaining
/// prefixes become ranges.
pub(crate) const LENGTHS: usize = 4;

/// Upper bound of the memory per prefix while it is sent to the kernel, without the messages: in the set, in its contents, and in
/// an object.
pub(crate) const BYTES_EACH: usize = 160;

/// Prefixes of both families, each once. They may overlap: an address remains in
/// the set until the last prefix that contains it is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PrefixSet {
    v4: FamilySet,
    v6: FamilySet,
}

/// Prefixes of one family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FamilySet {
    /// The lengths with a separate set, and the prefixes of each.
    hashed: Vec<(u8, BTreeSet<Prefix>)>,
    /// All other prefixes,
    rest: BTreeSet<Prefix>,
    /// and their number per length, sorted by length.
    counts: Vec<(u8, usize)>,
}

/// Contents of the kernel's sets of one family, or a part of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// Prefixes in the separate sets, by length.
    pub networks: Vec<(u8, Vec<IpAddr>)>,
    /// Sorted ranges that do not touch.
    pub ranges: Vec<Range>,
}

/// Change of a set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    added: Vec<Prefix>,
    removed: Vec<Prefix>,
    /// Removed and added contents of IPv4 and of IPv6.
    pub gone: [Contents; 2],
    pub new: [Contents; 2],
}

impl PrefixSet {
    pub fn new(prefixes: &[Prefix]) -> PrefixSet {
        PrefixSet::with_many(prefixes, MANY)
    }

    /// Like [`PrefixSet::new`], with another minimum for separate sets.
    fn with_many(prefixes: &[Prefix], many: usize) -> PrefixSet {
        let of = |family| FamilySet::new(prefixes.iter().filter(move |prefix| prefix.family() == family), many);
        PrefixSet { v4: of(Family::V4), v6: of(Family::V6) }
    }

    pub fn len(&self) -> usize {
        Families::ALL.iter().map(|family| self.of(family).count()).sum()
    }

    pub fn of(&self, family: Family) -> impl Iterator<Item = Prefix> {
        let family_set = self.family_set(family);
        family_set.hashed.iter().flat_map(|(_, networks)| networks.iter()).chain(family_set.rest.iter()).copied()
    }

    /// Returns the lengths of a family that have a separate set.
    pub fn lengths(&self, family: Family) -> impl Iterator<Item = u8> {
        self.family_set(family).hashed.iter().map(|(len, _)| *len)
    }

    /// Returns the contents of the kernel's sets of a family.
    pub fn contents(&self, family: Family) -> Result<Contents> {
        let family_set = self.family_set(family);
        let addresses = |(len, networks): &(u8, BTreeSet<Prefix>)| {
            let mut list = Vec::new();
            list.try_reserve_exact(networks.len()).map_err(|_| Error::no_memory())?;
            list.extend(networks.iter().map(|prefix| prefix.addr));
            Ok((*len, list))
        };
        let networks = memory::collect(family_set.hashed.iter().map(addresses))?;
        Ok(Contents { networks, ranges: merged(family_set.rest.iter().map(Prefix::range))? })
    }

    /// Adds and removes prefixes.
    ///
    /// The work depends on the size of the change and of the affected ranges,
    /// not on the size of the set. A prefix that is in the set may be added
    /// again. If a prefix to remove is not in the set, nothing is changed.
    pub fn update(&mut self, add: &[Prefix], remove: &[Prefix]) -> Result<Change> {
        memory::require((add.len() + remove.len()) * BYTES_EACH)?;
        let sorted = |prefixes: &[Prefix]| {
            let mut prefixes = memory::collect(prefixes.iter().map(|prefix| Ok(*prefix)))?;
            prefixes.sort_unstable();
            prefixes.dedup();
            Ok(prefixes)
        };
        let (add, remove): (Vec<Prefix>, Vec<Prefix>) = (sorted(add)?, sorted(remove)?);
        let among = |prefix: &Prefix, prefixes: &[Prefix]| prefixes.binary_search(prefix).is_ok();
        let has = |prefix: &Prefix| self.family_set(prefix.family()).has(prefix);
        if let Some(prefix) = remove.iter().find(|prefix| !has(prefix) && !among(prefix, &add)) {
            return Err(Error::with(libc::ENOENT, format_args!("prefix {prefix} to be removed is not in the set")));
        }
        let added = memory::gather(add.into_iter().filter(|prefix| !among(prefix, &remove) && !has(prefix)))?;
        let removed = memory::gather(remove.into_iter().filter(has))?;
        let (gone_4, new_4) = self.v4.change(Family::V4, &removed, &added)?;
        let (gone_6, new_6) = self.v6.change(Family::V6, &removed, &added).inspect_err(|_| {
            self.v4.swap(Family::V4, &added, &removed);
        })?;
        Ok(Change { added, removed, gone: [gone_4, gone_6], new: [new_4, new_6] })
    }

    /// Reverts a change.
    pub fn undo(&mut self, change: &Change) {
        for (family, family_set) in [(Family::V4, &mut self.v4), (Family::V6, &mut self.v6)] {
            family_set.swap(family, &change.added, &change.removed);
        }
    }

    /// Returns the set divided anew, if so many prefixes of one length have become ranges that a new division pays off.
    pub fn regrouped(&self) -> Result<Option<PrefixSet>> {
        let outgrown = Families::ALL.iter().any(|family| self.family_set(family).is_outgrown());
        let regroup = || {
            let all = memory::gather(Families::ALL.iter().flat_map(|family| self.of(family)))?;
            Ok(PrefixSet::new(&all))
        };
        outgrown.then(regroup).transpose()
    }

    fn family_set(&self, family: Family) -> &FamilySet {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

impl FamilySet {
    fn new<'a>(prefixes: impl Iterator<Item = &'a Prefix> + Clone, many: usize) -> FamilySet {
        let mut lengths: Vec<(u8, usize)> = Vec::new();
        prefixes.clone().for_each(|prefix| *count_of(&mut lengths, prefix.len) += 1);
        lengths.retain(|(_, count)| *count >= many);
        lengths.sort_unstable_by_key(|(len, count)| (std::cmp::Reverse(*count), *len));
        lengths.truncate(LENGTHS);
        let hashed = lengths.iter().map(|(len, _)| (*len, BTreeSet::new())).collect::<Vec<_>>();
        let mut family_set = FamilySet { hashed, ..FamilySet::default() };
        prefixes.for_each(|prefix| family_set.insert(prefix));
        family_set
    }

    fn is_hashed(&self, len: u8) -> bool {
        self.hashed.iter().any(|(hashed, _)| *hashed == len)
    }

    fn has(&self, prefix: &Prefix) -> bool {
        match self.hashed.iter().find(|(len, _)| *len == prefix.len) {
            Some((_, networks)) => networks.contains(prefix),
            None => self.rest.contains(prefix),
        }
    }

    fn insert(&mut self, prefix: &Prefix) {
        match self.hashed.iter_mut().find(|(len, _)| *len == prefix.len) {
            Some((_, networks)) => _ = networks.insert(*prefix),
            None if self.rest.insert(*prefix) => *count_of(&mut self.counts, prefix.len) += 1,
            None => {}
        }
    }

    fn remove(&mut self, prefix: &Prefix) {
        match self.hashed.iter_mut().find(|(len, _)| *len == prefix.len) {
            Some((_, networks)) => _ = networks.remove(prefix),
            None if self.rest.remove(prefix) => {
                *count_of(&mut self.counts, prefix.len) -= 1;
                self.counts.retain(|(_, count)| *count > 0);
            }
            None => {}
        }
    }

    /// Removes and adds the prefixes of this family.
    fn swap(&mut self, family: Family, remove: &[Prefix], add: &[Prefix]) {
        let of_family = |prefix: &&Prefix| prefix.family() == family;
        remove.iter().filter(of_family).for_each(|prefix| self.remove(prefix));
        add.iter().filter(of_family).for_each(|prefix| self.insert(prefix));
    }

    /// Like [`FamilySet::swap`]; returns the removed and the added contents. On failure nothing is changed.
    fn change(&mut self, family: Family, remove: &[Prefix], add: &[Prefix]) -> Result<(Contents, Contents)> {
        let affected =
            self.affected_ranges(family, remove.iter().chain(add).filter(|prefix| prefix.family() == family))?;
        let old = self.ranges_within(family, &affected)?;
        self.swap(family, remove, add);
        let difference = || {
            let new = self.ranges_within(family, &affected)?;
            let gone = self.contents_of(family, remove, without(&old, &new)?)?;
            Ok((gone, self.contents_of(family, add, without(&new, &old)?)?))
        };
        let changed = difference();
        if changed.is_err() {
            self.swap(family, add, remove);
        }
        changed
    }

    /// Returns contents of these ranges, and of the prefixes that are in separate sets.
    fn contents_of(&self, family: Family, prefixes: &[Prefix], ranges: Vec<Range>) -> Result<Contents> {
        let mut networks = Vec::new();
        for (len, _) in &self.hashed {
            let of_length = prefixes.iter().filter(|prefix| prefix.family() == family && prefix.len == *len);
            let these = memory::gather(of_length.map(|prefix| prefix.addr))?;
            if !these.is_empty() {
                networks.push((*len, these));
            }
        }
        Ok(Contents { networks, ranges })
    }

    /// Returns the disjoint parts of the address space whose ranges a change may affect.
    fn affected_ranges<'a>(&self, family: Family, changed: impl Iterator<Item = &'a Prefix>) -> Result<Vec<Range>> {
        // Extended by the ranges that overlap or touch it.
        let around = changed.filter(|prefix| !self.is_hashed(prefix.len)).map(|p| self.around(family, p.range()));
        let mut affected = memory::gather(around)?;
        affected.sort_unstable_by_key(|range| range.first);
        merged(affected.into_iter())
    }

    /// Returns the union of `own` and of all ranges that overlap or touch it, directly or through others.
    fn around(&self, family: Family, own: Range) -> Range {
        let mut grown = own;
        // Upwards: prefixes in order, while each begins within the range or directly above it.
        for prefix in self.from(family, own.first) {
            if !grown.reaches(&prefix.range()) {
                break;
            }
            grown.last = grown.last.max(prefix.range().last);
        }
        // Downwards: a prefix that overlaps the beginning contains its first address, and a prefix that touches it ends directly
        // below.
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

    /// Returns the shortest prefix that contains an address.
    fn covering(&self, family: Family, number: u128) -> Option<Range> {
        self.counts.iter().find_map(|(len, _)| {
            let prefix = Prefix { addr: address(family, number & !host_mask(family, *len)), len: *len };
            self.rest.contains(&prefix).then(|| prefix.range())
        })
    }

    /// Returns the prefixes that begin at an address or above it.
    fn from(&self, family: Family, first: u128) -> impl Iterator<Item = &Prefix> {
        self.rest.range(Prefix { addr: address(family, first), len: 0 }..)
    }

    /// Returns the ranges within `affected`, which no range crosses.
    fn ranges_within(&self, family: Family, affected: &[Range]) -> Result<Vec<Range>> {
        let mut all = Vec::new();
        for window in affected {
            let above = self.from(family, window.first).map(Prefix::range);
            let within = merged(above.take_while(|range| range.first <= window.last))?;
            all.try_reserve(within.len()).map_err(|_| Error::no_memory())?;
            all.extend(within);
        }
        Ok(all)
    }

    /// Whether a length should get a separate set: the maximum number is not reached, or another length has become rarer.
    fn is_outgrown(&self) -> bool {
        let most = self.counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
        let least = self.hashed.iter().map(|(_, networks)| networks.len()).min().unwrap_or(0);
        most >= MANY && (self.hashed.len() < LENGTHS || most >= 2 * least)
    }
}

/// Returns the counter of a length in a list sorted by length.
fn count_of(counts: &mut Vec<(u8, usize)>, len: u8) -> &mut usize {
    let at = match counts.binary_search_by_key(&len, |(len, _)| *len) {
        Ok(at) => at,
        Err(at) => {
            counts.insert(at, (len, 0));
            at
        }
    };
    &mut counts[at].1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefix::mask;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        let (addr, len) = text.split_once('/').unwrap();
        Prefix::new(addr.parse().unwrap(), len.parse().unwrap()).unwrap()
    }

    fn set(prefixes: &[&str]) -> PrefixSet {
        PrefixSet::new(&prefixes.iter().map(|p| prefix(p)).collect::<Vec<_>>())
    }

    /// Returns a number of prefixes of a length, no two of which touch.
    fn scattered(count: usize, len: u8) -> Vec<Prefix> {
        let network = |n: u32| Prefix::new(std::net::Ipv4Addr::from_bits(n << (33 - len)).into(), len).unwrap();
        (0..count as u32).map(network).collect()
    }

    fn shown(family: Family, ranges: &[Range]) -> Vec<String> {
        ranges.iter().map(|r| format!("{}-{}", address(family, r.first), address(family, r.last))).collect()
    }

    #[test]
    fn prefix_set_merges_overlaps_duplicates_and_neighbors() {
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
            shown(Family::V4, &set.contents(Family::V4).unwrap().ranges),
            ["0.0.0.0-0.0.0.0", "10.0.0.0-10.0.1.255", "255.255.255.255-255.255.255.255"]
        );
        assert_eq!(set.contents(Family::V6).unwrap().ranges, [Range { first: 0, last: u128::MAX }]);
    }

    #[test]
    fn prefix_set_without_cover_has_covered_prefix_again() {
        let mut set = set(&["10.0.0.0/8", "10.1.0.0/16"]);
        let change = set.update(&[], &[prefix("10.0.0.0/8")]).unwrap();
        assert_eq!(shown(Family::V4, &change.gone[0].ranges), ["10.0.0.0-10.255.255.255"]);
        assert_eq!(shown(Family::V4, &change.new[0].ranges), ["10.1.0.0-10.1.255.255"]);
        assert_eq!((&change.gone[1], &change.new[1]), (&Contents::default(), &Contents::default()));
        assert_eq!(set.update(&[], &[prefix("10.0.0.0/8")]).unwrap_err().errno(), libc::ENOENT);
    }

    #[test]
    fn prefix_set_gives_lengths_with_many_prefixes_their_own_sets() {
        let counts = [(24, MANY), (25, MANY + 4), (26, MANY + 3), (27, MANY + 2), (28, MANY + 1), (20, MANY - 1)];
        let prefixes: Vec<Prefix> = counts.iter().flat_map(|(len, count)| scattered(*count, *len)).collect();
        let set = PrefixSet::new(&prefixes);
        assert_eq!(set.lengths(Family::V4).collect::<Vec<_>>(), [25, 26, 27, 28]);
        assert_eq!(set.lengths(Family::V6).count(), 0);
        assert_eq!(set.len(), prefixes.len());
        assert_eq!(set.of(Family::V4).collect::<BTreeSet<_>>(), prefixes.into_iter().collect());
    }

    #[test]
    fn prefix_set_with_many_additions_is_regrouped_once() {
        let mut set = PrefixSet::new(&scattered(MANY - 1, 24));
        assert_eq!(set.regrouped().unwrap(), None);
        set.update(&scattered(MANY, 24), &[]).unwrap();
        let mut set = set.regrouped().unwrap().unwrap();
        assert_eq!(set.lengths(Family::V4).collect::<Vec<_>>(), [24]);
        assert_eq!(set.contents(Family::V4).unwrap().ranges, []);
        for len in 25..29 {
            assert_eq!(set.regrouped().unwrap(), None);
            set.update(&scattered(2 * MANY, len), &[]).unwrap();
            set = set.regrouped().unwrap().unwrap();
        }
        // The rarest length lost its set, and gets one again only if others lose theirs.
        assert_eq!(set.lengths(Family::V4).collect::<BTreeSet<_>>(), (25..29).collect());
        assert_eq!(set.regrouped().unwrap(), None);
        set.update(&[], &scattered(2 * MANY, 28)[MANY / 2..]).unwrap();
        let set = set.regrouped().unwrap().unwrap();
        assert_eq!(set.lengths(Family::V4).collect::<BTreeSet<_>>(), (24..28).collect());
        assert_eq!(set.regrouped().unwrap(), None);
    }

    #[test]
    fn prefix_set_is_regrouped_while_there_is_room_for_another_length() {
        let mut set = PrefixSet::new(&scattered(3 * MANY, 24));
        set.update(&scattered(MANY - 1, 25), &[]).unwrap();
        assert_eq!(set.regrouped().unwrap(), None);
        set.update(&scattered(MANY, 25), &[]).unwrap();
        let set = set.regrouped().unwrap().unwrap();
        assert_eq!(set.lengths(Family::V4).collect::<BTreeSet<_>>(), (24..26).collect());
    }

    #[test]
    fn prefix_set_without_room_is_regrouped_for_twice_as_many_of_a_length() {
        let four: Vec<Prefix> = (24..28).flat_map(|len| scattered(3 * MANY, len)).collect();
        let mut set = PrefixSet::new(&four);
        set.update(&scattered(6 * MANY - 1, 28), &[]).unwrap();
        assert_eq!(set.regrouped().unwrap(), None);
        set.update(&scattered(6 * MANY, 28), &[]).unwrap();
        let set = set.regrouped().unwrap().unwrap();
        assert_eq!(set.lengths(Family::V4).collect::<BTreeSet<_>>(), (24..27).chain([28]).collect());
    }

    /// Prefixes in a small part of the address space, where they often overlap.
    fn corner() -> impl Strategy<Value = Prefix> {
        (0..64u8, 24..=32u8, any::<bool>()).prop_map(|(host, len, v6)| match v6 {
            true => Prefix::new(address(Family::V6, host.into()), len + 96).unwrap(),
            false => Prefix::new(address(Family::V4, 0xFFFF_FFC0 + u128::from(host)), len).unwrap(),
        })
    }

    /// Small minimums for separate sets.
    fn many() -> impl Strategy<Value = usize> {
        prop_oneof![Just(1), Just(3), Just(8), Just(MANY)]
    }

    /// Removes elements from a model of the kernel's sets, and adds others. The model refuses what the kernel refuses.
    fn applied(mut held: Contents, gone: &Contents, new: &Contents) -> Contents {
        for (len, networks) in &gone.networks {
            let (_, held) = held.networks.iter_mut().find(|(found, _)| found == len).unwrap();
            held.retain(|network| !networks.contains(network));
        }
        for (len, networks) in &new.networks {
            let (_, held) = held.networks.iter_mut().find(|(found, _)| found == len).unwrap();
            assert!(!held.iter().any(|network| networks.contains(network)));
            held.extend(networks);
            held.sort_unstable();
        }
        assert!(gone.ranges.iter().all(|range| held.ranges.contains(range)));
        held.ranges.retain(|range| !gone.ranges.contains(range));
        held.ranges.extend(&new.ranges);
        held.ranges.sort_unstable_by_key(|range| range.first);
        held
    }

    proptest! {
        #[test]
        fn prefix_set_change_turns_old_contents_into_new(
            start in proptest::collection::vec(corner(), 0..40),
            add in proptest::collection::vec(corner(), 0..90),
            remove in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6),
            many in many(),
        ) {
            let mut set = PrefixSet::with_many(&start, many);
            let remove: Vec<Prefix> =
                if start.is_empty() { Vec::new() } else { remove.iter().map(|i| *i.get(&start)).collect() };
            let before = set.clone();
            let change = set.update(&add, &remove).unwrap();
            let wanted: BTreeSet<Prefix> =
                start.iter().chain(&add).filter(|p| !remove.contains(p)).copied().collect();
            for (at, family) in Families::ALL.iter().enumerate() {
                let these: BTreeSet<Prefix> = set.of(family).collect();
                prop_assert_eq!(these, wanted.iter().filter(|p| p.family() == family).copied().collect());
                let changed = applied(before.contents(family).unwrap(), &change.gone[at], &change.new[at]);
                prop_assert_eq!(changed, set.contents(family).unwrap());
            }
            set.undo(&change);
            prop_assert_eq!(set, before);
        }

        #[test]
        fn prefix_set_covers_what_its_prefixes_cover(
            prefixes in proptest::collection::vec(corner(), 0..40),
            many in many(),
        ) {
            let set = PrefixSet::with_many(&prefixes, many);
            for family in [Family::V4, Family::V6] {
                let contents = set.contents(family).unwrap();
                for pair in contents.ranges.windows(2) {
                    prop_assert!(pair[0].last + 1 < pair[1].first);
                }
                let base = if family == Family::V4 { 0xFFFF_FF00u128 } else { 0 };
                for number in base..base + 256 {
                    let covered = prefixes.iter().any(|p| p.family() == family && (p.range().first..=p.range().last).contains(&number));
                    // The lookup of the rules: the masked address in the set of the length.
                    let found = |(len, networks): &(u8, Vec<IpAddr>)| {
                        let bits = mask(family, Some(*len)).map_or(u128::MAX, super::super::number);
                        networks.contains(&address(family, number & bits))
                    };
                    let in_range = contents.ranges.iter().any(|r| (r.first..=r.last).contains(&number));
                    prop_assert_eq!(covered, in_range || contents.networks.iter().any(found));
                }
            }
        }
    }
}
