//! Sets that learn: addresses that leave a set by themselves after a time, as the answers of a DNS server do.

use std::net::IpAddr;
use std::time::Duration;

use super::*;
use crate::backend::nft::set::{EXPIRING_MAX, Elements, Key, Set as NftSet};
use crate::memory;
use crate::model::Family;
use crate::plan::Learned;
use crate::prefix::Prefix;
use crate::sys;

/// Elements in one message, which may have 64 KiB of them: an element of IPv6 has 52 bytes.
const IN_A_MESSAGE: usize = 900;

/// How an element that may exist gets a new timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewal {
    /// The kernel changes it when the element is added again: since Linux 6.12.
    Add,
    /// The element is added, which does nothing if it exists, then deleted and added, in one transaction: a packet
    /// finds either the old element or the new.
    AddDeleteAdd,
}

impl Renewal {
    /// The one of this kernel. Both work since Linux 6.12; adding sends a third of the bytes.
    pub(super) fn of_this_kernel() -> Renewal {
        Renewal::of(&sys::kernel_release())
    }

    fn of(release: &str) -> Renewal {
        let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 12) => Renewal::Add,
            _ => Renewal::AddDeleteAdd,
        }
    }
}

impl Instance {
    /// Adds addresses to a set for a time. An address that was added before gets the new time.
    ///
    /// The set is one of its own beside that of the config. What it costs does not grow with the set. The first call for a set
    /// and family takes as long as [`Instance::replace`], since the rules do not ask a set before it exists.
    pub fn learn(&mut self, set: Set, addrs: &[IpAddr], ttl: Duration) -> Result<()> {
        self.learn_by(set, addrs, ttl, Renewal::of_this_kernel())
    }

    pub(super) fn learn_by(&mut self, set: Set, addrs: &[IpAddr], ttl: Duration, renewal: Renewal) -> Result<()> {
        let which = match set {
            Set::Dst => PrefixList::Dst,
            Set::Bypass => PrefixList::Bypass,
            Set::Src => return Err(Error::invalid("set: addresses can be learned for TP_SET_DST and TP_SET_BYPASS")),
        };
        // Timers of the kernel count milliseconds.
        let ttl = Duration::from_millis(ttl.as_nanos().div_ceil(1_000_000).try_into().unwrap_or(u64::MAX));
        if ttl.is_zero() || ttl > MAX_TTL {
            return Err(Error::invalid_with(format_args!(
                "a time of {} seconds: it is more than 0 and at most {}",
                ttl.as_secs(),
                MAX_TTL.as_secs()
            )));
        }
        self.require_current()?;
        if self.installed == Installed::Iptables {
            return Err(Error::new(
                libc::EOPNOTSUPP,
                "iptables has no sets whose elements expire: tp_learn_addresses needs rules by nf_tables \
                 (TP_BACKEND_NFT)",
            ));
        }
        if self.plan.mode == Mode::DivertOnly {
            return Err(Error::invalid("TP_RULES_DIVERT_ONLY intercepts nothing, and has no set to update"));
        }
        if which == PrefixList::Dst && self.plan.dst.is_none() {
            return Err(Error::invalid(
                "there is no dst set to learn for: the rules were installed with dst NULL, which means every destination \
                 already; tp_replace_rules can give one, which may be empty",
            ));
        }
        self.require_families(addrs.iter().map(|addr| Prefix::from(*addr)))?;
        let mut elements = Vec::new();
        for family in Families::ALL.iter() {
            let Some(set) = ruleset::learned_set(which, family) else { continue };
            let is_of_family = |addr: &IpAddr| addr.is_ipv4() == (family == Family::V4);
            let mut of_family = memory::gather(addrs.iter().copied().filter(is_of_family))?;
            // An element that is deleted twice in one transaction is ENOENT.
            of_family.sort_unstable();
            of_family.dedup();
            for piece in of_family.chunks(IN_A_MESSAGE) {
                let piece = memory::collect(piece.iter().map(|addr| Ok(*addr)))?;
                memory::push(&mut elements, Object::Elements { set, elements: Elements::Expiring(piece, ttl) })?;
            }
        }
        let present = *learned_of(&mut self.plan.learned, which);
        let missing = |family: Family| {
            !present.contains(family) && addrs.iter().any(|addr| addr.is_ipv4() == (family == Family::V4))
        };
        let missing = Families { v4: missing(Family::V4), v6: missing(Family::V6) };
        // Flows that a flow table has offloaded go on: to end them costs the kernel its cached routes, at each call.
        if missing.is_empty() {
            return self.add_learned(&elements, renewal);
        }
        self.changing(|rules| rules.learn_first(which, missing, &elements, renewal))
    }

    /// Makes the sets that do not exist, has the rules ask them, and fills them.
    fn learn_first(
        &mut self,
        which: PrefixList,
        missing: Families,
        elements: &[Object],
        renewal: Renewal,
    ) -> Result<()> {
        let before = self.plan.learned;
        let mut plan = self.plan.clone();
        let learned = learned_of(&mut plan.learned, which);
        (learned.v4, learned.v6) = (learned.v4 || missing.v4, learned.v6 || missing.v6);
        self.make_sets(which, missing)?;
        if let Err(error) = self.swap_for(plan, self.routing) {
            return Err(error.after(self.delete_sets(which, missing)));
        }
        let Err(error) = self.add_learned(elements, renewal) else { return Ok(()) };
        let mut plan = self.plan.clone();
        plan.learned = before;
        let undone = self.swap_for(plan, self.routing).and_then(|()| self.delete_sets(which, missing));
        Err(error.after(undone))
    }

    fn make_sets(&mut self, which: PrefixList, families: Families) -> Result<()> {
        let named = families.iter().filter_map(|family| Some((family, ruleset::learned_set(which, family)?)));
        let made: Vec<[Object; 2]> = named
            .enumerate()
            .map(|(index, (family, name))| {
                let id = index as u32 + 1;
                let none = match family {
                    Family::V4 => IpAddr::from([0; 4]),
                    Family::V6 => IpAddr::from([0; 16]),
                };
                let elements = Elements::Expiring(vec![none], Duration::from_secs(1));
                let set = Object::Set(NftSet { name, key: Key::Expiring(family), id });
                [set, Object::Elements { set: name, elements }]
            })
            .collect();
        // The kernel makes the hash table as large as the set may become (`nft_rhash_init`), which takes 16 MiB, and shrinks
        // it when an element is deleted (`rhashtable_remove_fast`): so one is.
        let mut changes = Vec::new();
        for [set, element] in &made {
            changes.extend([Change::Add(set), Change::Add(element)]);
            changes.extend(deletion(element));
        }
        commit(&mut self.nft, &self.table, None, &changes)
    }

    fn delete_sets(&mut self, which: PrefixList, families: Families) -> Result<()> {
        let names = families.iter().filter_map(|family| ruleset::learned_set(which, family));
        let changes: Vec<Change<'_>> = names.map(|name| Change::DeleteSet(name.to_string())).collect();
        commit(&mut self.nft, &self.table, None, &changes)
    }

    /// Adds elements to sets that exist, in one transaction.
    fn add_learned(&mut self, elements: &[Object], renewal: Renewal) -> Result<()> {
        if elements.is_empty() {
            return Ok(());
        }
        let add = || elements.iter().map(Change::Add);
        let delete = elements.iter().filter_map(deletion);
        let changes: Vec<Change<'_>> = match renewal {
            Renewal::Add => add().collect(),
            Renewal::AddDeleteAdd => add().chain(delete).chain(add()).collect(),
        };
        commit(&mut self.nft, &self.table, None, &changes).map_err(|error| match error.errno() {
            libc::ENFILE => Error::with(
                libc::ENOSPC,
                format_args!(
                    "a set of learned addresses has at most {EXPIRING_MAX} of a family; addresses leave it when their \
                     time is over"
                ),
            ),
            _ => error,
        })
    }
}

/// The longest time: that of `ttl_seconds`.
const MAX_TTL: Duration = Duration::from_secs(u32::MAX as u64);

/// Deletes the elements that an object adds.
fn deletion(object: &Object) -> Option<Change<'_>> {
    match object {
        Object::Elements { set, elements } => Some(Change::DeleteElements { set: *set, elements }),
        _ => None,
    }
}

fn learned_of(learned: &mut Learned, which: PrefixList) -> &mut Families {
    match which {
        PrefixList::Bypass => &mut learned.bypass,
        PrefixList::Dst | PrefixList::Src | PrefixList::BypassSrc => &mut learned.dst,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_by_adding_since_linux_6_12() {
        for release in ["6.12.0", "6.12", "6.18.44-fc", "7.0-rc1", "10.1.2"] {
            assert_eq!(Renewal::of(release), Renewal::Add, "{release}");
        }
        for release in ["6.11.9", "5.12.0", "6", "", "2.6.60", "unknown", "6.x", "99999999999.1"] {
            assert_eq!(Renewal::of(release), Renewal::AddDeleteAdd, "{release}");
        }
    }
}
