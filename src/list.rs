//! Lists that are made of what is not much.

/// What an iterator has, as a list.
pub(crate) trait List: Iterator {
    /// As `collect`, whose code for each kind of iterator is several times as long: it asks how many there will be.
    fn list(self) -> Vec<Self::Item>;

    /// Behind what is in a list already, as `extend`.
    fn onto(self, list: &mut Vec<Self::Item>);
}

impl<I: Iterator> List for I {
    fn list(self) -> Vec<I::Item> {
        let mut list = Vec::new();
        self.onto(&mut list);
        list
    }

    fn onto(self, list: &mut Vec<I::Item>) {
        self.for_each(|item| list.push(item));
    }
}
