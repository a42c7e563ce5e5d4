//! Memory in proportion to what a caller or the kernel gave: where it is not to be had, that is an error, not the end of
//! the program, as it would be with the standard library's collections.

use crate::error::{Error, Result};

/// What an iterator has, which knows how much that is; ENOMEM if there is no memory for it.
pub(crate) fn collect<T>(items: impl ExactSizeIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(items.len()).map_err(|_| Error::no_memory())?;
    for item in items {
        list.push(item?);
    }
    Ok(list)
}

/// What an iterator has that does not know how much that is.
pub(crate) fn gather<T>(items: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    for item in items {
        push(&mut list, item)?;
    }
    Ok(list)
}

/// Appends to a list.
pub(crate) fn push<T>(list: &mut Vec<T>, item: T) -> Result<()> {
    list.try_reserve(1).map_err(|_| Error::no_memory())?;
    list.push(item);
    Ok(())
}

/// Finds out whether there is so much memory, for collections that will take it piece by piece and could not say no.
/// Another thread may take it first; what a limit of the process leaves no room for is found.
pub(crate) fn require(bytes: usize) -> Result<()> {
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| Error::no_memory())
}

/// A copy of some bytes.
pub(crate) fn copy(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len()).ok()?;
    copy.extend_from_slice(bytes);
    Some(copy)
}
