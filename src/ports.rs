//! Lists of port ranges as sets: sorted ranges that do not touch.

use crate::model::PortRange;

/// Every port, 0 included, which a packet may have.
const EVERY: PortRange = PortRange { first: 0, last: u16::MAX };

/// Sorts ranges, and merges those that overlap or touch: the kernel's sets take no overlaps.
pub(crate) fn merge(ranges: impl IntoIterator<Item = PortRange>) -> Vec<PortRange> {
    let mut sorted: Vec<PortRange> = ranges.into_iter().collect();
    sorted.sort_unstable_by_key(|range| range.first);
    let mut merged: Vec<PortRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => last.last = last.last.max(range.last),
            _ => merged.push(range),
        }
    }
    merged
}

pub(crate) fn union(one: &[PortRange], other: &[PortRange]) -> Vec<PortRange> {
    merge(one.iter().chain(other).copied())
}

/// The ports of `ranges` that are not in `without`; both are sorted and do not touch. `None`: every port.
pub(crate) fn subtract(ranges: Option<&[PortRange]>, without: &[PortRange]) -> Option<Vec<PortRange>> {
    if without.is_empty() {
        return ranges.map(<[PortRange]>::to_vec);
    }
    let mut rest = Vec::new();
    for range in ranges.unwrap_or(&[EVERY]) {
        // The first port that is not decided yet; `None`: all are.
        let mut next = Some(range.first);
        for hole in without.iter().filter(|hole| hole.last >= range.first && hole.first <= range.last) {
            let Some(first) = next else { break };
            if hole.first > first {
                rest.push(PortRange { first, last: hole.first - 1 });
            }
            next = hole.last.checked_add(1).filter(|next| *next <= range.last);
        }
        if let Some(first) = next {
            rest.push(PortRange { first, last: range.last });
        }
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some_ranges() -> impl Strategy<Value = Vec<PortRange>> {
        let edge = prop_oneof![Just(0u16), Just(1), Just(u16::MAX - 1), Just(u16::MAX), 0..50u16];
        let range = (edge.clone(), edge).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) });
        proptest::collection::vec(range, 0..6)
    }

    fn has(ranges: &[PortRange], port: u16) -> bool {
        ranges.iter().any(|range| range.first <= port && port <= range.last)
    }

    fn is_a_set(ranges: &[PortRange]) -> bool {
        ranges.iter().all(|range| range.first <= range.last)
            && ranges.windows(2).all(|two| u32::from(two[0].last) + 1 < u32::from(two[1].first))
    }

    proptest! {
        #[test]
        fn port_sets_hold_what_their_lists_say(a in some_ranges(), b in some_ranges()) {
            let (one, other) = (merge(a.clone()), merge(b.clone()));
            let (both, less) = (union(&one, &other), subtract(Some(&one), &other).unwrap());
            let all = subtract(None, &other).unwrap_or(vec![EVERY]);
            prop_assert!(is_a_set(&one) && is_a_set(&both) && is_a_set(&less) && is_a_set(&all));
            for port in (0..60).chain(u16::MAX - 5..=u16::MAX) {
                prop_assert_eq!(has(&one, port), has(&a, port));
                prop_assert_eq!(has(&both, port), has(&a, port) || has(&b, port));
                prop_assert_eq!(has(&less, port), has(&a, port) && !has(&b, port));
                prop_assert_eq!(has(&all, port), !has(&b, port));
            }
        }
    }
}
