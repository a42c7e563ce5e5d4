//! Allocations whose size depends on input of a caller or the kernel. A failure is an error; with the standard library's
//! collections it would abort the program.

use crate::error::{Error, Result};

/// Collects an iterator of known length. Fails with ENOMEM.
pub(crate) fn collect<T>(items: impl ExactSizeIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(items.len()).map_err(|_| Error::no_memory())?;
    for item in items {
        list.push(item?);
    }
    Ok(list)
}

/// Collects an iterator of unknown length. Fails with ENOMEM.
pub(crate) fn gather<T>(items: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    for item in items {
        push(&mut list, item)?;
    }
    Ok(list)
}

/// Appends an item to a list. Fails with ENOMEM.
pub(crate) fn push<T>(list: &mut Vec<T>, item: T) -> Result<()> {
    list.try_reserve(1).map_err(|_| Error::no_memory())?;
    list.push(item);
    Ok(())
}

/// Checks that an allocation of this size succeeds, before a collection that cannot report failures grows to it. Another thread
/// may use the memory in between. The check finds sizes that exceed a limit of the process.
pub(crate) fn require(bytes: usize) -> Result<()> {
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| Error::no_memory())
}

/// Copies bytes. Fails with ENOMEM.
pub(crate) fn copy(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len()).ok()?;
    copy.extend_from_slice(bytes);
    Some(copy)
}
