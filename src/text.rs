//! Texts that are written where they go, without a `String` of their own on the way.

use std::fmt;

/// What a closure writes.
pub(crate) fn by(write: impl Fn(&mut fmt::Formatter<'_>) -> fmt::Result) -> impl fmt::Display {
    struct By<F>(F);

    impl<F: Fn(&mut fmt::Formatter<'_>) -> fmt::Result> fmt::Display for By<F> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0(f)
        }
    }

    By(write)
}

/// Texts that are kept.
pub(crate) trait Owned {
    /// As `to_owned`, whose code would be at every place where it is called.
    fn owned(&self) -> String;
}

impl Owned for str {
    #[inline(never)]
    fn owned(&self) -> String {
        self.to_owned()
    }
}

/// What is before a mark and behind it, where it is there. (The standard library's search brings several KB, for texts
/// that are longer than any here.)
pub(crate) fn split_once<'a>(text: &'a str, mark: &str) -> Option<(&'a str, &'a str)> {
    let at = text.as_bytes().windows(mark.len()).position(|part| part == mark.as_bytes())?;
    Some((text.get(..at)?, text.get(at + mark.len()..)?))
}

pub(crate) fn contains(text: &str, mark: &str) -> bool {
    split_once(text, mark).is_some()
}

/// A name that a caller gave, for people: in quotes, and escaped.
pub(crate) fn quoted(name: &str) -> impl fmt::Display {
    by(move |f| write!(f, "\"{}\"", crate::name::Name::from(name)))
}
