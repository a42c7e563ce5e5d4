//! Prefixes in their order, each once.
//!
//! (A `BTreeSet` does the same with 17 KB of code, most of it for what is
//! removed.)

use super::Prefix;

/// As many are moved at most for one that comes or goes.
const BLOCK: usize = 128;

/// A list in blocks, none of them empty.
#[derive(Debug, Clone, Default)]
pub(super) struct Ordered {
    blocks: Vec<Vec<Prefix>>,
    len: usize,
}

impl Ordered {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn iter(&self) -> impl Iterator<Item = &Prefix> {
        self.blocks.iter().flatten()
    }

    pub fn contains(&self, prefix: &Prefix) -> bool {
        self.find(prefix).1.is_ok()
    }

    /// A prefix, or where it would be, and all behind.
    pub fn from(&self, prefix: Prefix) -> impl Iterator<Item = &Prefix> {
        let (block, Ok(place) | Err(place)) = self.find(&prefix);
        self.blocks.iter().skip(block).flatten().skip(place)
    }

    /// Whether it is new.
    pub fn insert(&mut self, prefix: Prefix) -> bool {
        let (at, Err(place)) = self.find(&prefix) else { return false };
        match self.blocks.get_mut(at) {
            Some(block) if block.len() < BLOCK => block.insert(place, prefix),
            Some(block) => {
                // Of a list that comes in order all blocks are full.
                let mut next = block.split_off(if place == BLOCK { BLOCK } else { BLOCK / 2 });
                match place.checked_sub(block.len()) {
                    Some(place) => next.insert(place, prefix),
                    None => block.insert(place, prefix),
                }
                self.blocks.insert(at + 1, next);
            }
            None => self.blocks.push(vec![prefix]),
        }
        self.len += 1;
        true
    }

    /// Whether it was there.
    pub fn remove(&mut self, prefix: &Prefix) -> bool {
        let (at, Ok(place)) = self.find(prefix) else { return false };
        self.blocks[at].remove(place);
        if self.blocks[at].is_empty() {
            self.blocks.remove(at);
        }
        self.len -= 1;
        true
    }

    /// The block that it is in, or belongs into, and the place there.
    fn find(&self, prefix: &Prefix) -> (usize, Result<usize, usize>) {
        // Lists come in order, as a rule.
        if let Some((last, at)) = self.blocks.last().zip(self.blocks.len().checked_sub(1))
            && last.last() < Some(prefix)
        {
            return (at, Err(last.len()));
        }
        let behind = self.blocks.partition_point(|block| block.first() <= Some(prefix));
        let at = behind.saturating_sub(1);
        (at, self.blocks.get(at).map_or(Err(0), |block| block.binary_search(prefix)))
    }
}

impl PartialEq for Ordered {
    fn eq(&self, other: &Ordered) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Ordered {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    fn host(number: u16) -> Prefix {
        Prefix::new(Ipv4Addr::from_bits(number.into()).into(), 32).unwrap()
    }

    proptest! {
        #[test]
        fn holds_what_a_tree_would(steps in proptest::collection::vec((any::<bool>(), 0..2000u16), 0..4000), from: u16) {
            let (mut list, mut tree) = (Ordered::default(), BTreeSet::new());
            for number in 0..1000 {
                prop_assert_eq!(list.insert(host(number)), tree.insert(host(number)));
            }
            for (add, number) in steps {
                let prefix = host(number);
                prop_assert_eq!(list.contains(&prefix), tree.contains(&prefix));
                if add {
                    prop_assert_eq!(list.insert(prefix), tree.insert(prefix));
                } else {
                    prop_assert_eq!(list.remove(&prefix), tree.remove(&prefix));
                }
                prop_assert_eq!(list.len(), tree.len());
            }
            prop_assert!(list.iter().eq(&tree));
            let from = host(from % 2000);
            prop_assert!(list.from(from).eq(tree.range(from..)));
            prop_assert!(list.blocks.iter().all(|block| (1..=BLOCK).contains(&block.len())));
        }
    }
}
