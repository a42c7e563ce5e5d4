//! One small sort, for lists that are sorted once in a while.
//!
//! The standard library's is a little faster, and four KB for each type of
//! item and each order; a `BTreeSet` made of a list has one too.

/// Sorts by a key, in place; items of one key in any order.
pub(crate) fn by_key<T, K: Ord>(items: &mut [T], key: impl Fn(&T) -> K) {
    heap_sort(items, &|a, b| key(a) < key(b));
}

/// Sorts, and leaves one of those that are equal.
pub(crate) fn unique<T: Ord>(items: &mut Vec<T>) {
    heap_sort(items, &|a, b| a < b);
    items.dedup();
}

fn heap_sort<T>(items: &mut [T], less: &impl Fn(&T, &T) -> bool) {
    for start in (0..items.len() / 2).rev() {
        sink(items, start, less);
    }
    for end in (1..items.len()).rev() {
        items.swap(0, end);
        sink(&mut items[..end], 0, less);
    }
}

/// Moves an item down a heap, to below all that are greater.
fn sink<T>(heap: &mut [T], mut at: usize, less: &impl Fn(&T, &T) -> bool) {
    loop {
        let mut child = 2 * at + 1;
        if child >= heap.len() {
            return;
        }
        if child + 1 < heap.len() && less(&heap[child], &heap[child + 1]) {
            child += 1;
        }
        if !less(&heap[at], &heap[child]) {
            return;
        }
        heap.swap(at, child);
        at = child;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sorts_as_the_standard_library_does(mut items: Vec<(u8, u16)>) {
            let mut expected = items.clone();
            expected.sort();
            super::by_key(&mut items, |item| *item);
            prop_assert_eq!(&items, &expected);
            expected.dedup();
            items.reverse();
            super::unique(&mut items);
            prop_assert_eq!(items, expected);
        }
    }
}
