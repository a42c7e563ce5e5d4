//! The memory of a [`Datagram`]: its addresses (`struct sockaddr_storage` in C) and its bytes.

use std::ffi::c_void;
use std::mem::zeroed;
use std::ptr;

use libc::sockaddr_storage;

use super::datagram::Datagram;
use crate::address::KernelAddr;

// SAFETY: it has its memory to itself, by an exclusive borrow or by a C caller's word, as if it were that borrow.
unsafe impl Send for Datagram<'_> {}

/// An empty address: AF_UNSPEC.
// SAFETY: integers, for which all zero is valid.
pub(super) const NO_ADDRESS: sockaddr_storage = unsafe { zeroed() };

/// Stores an address, which may be empty.
#[inline(always)]
pub(super) fn store_address(storage: &mut sockaddr_storage, addr: &KernelAddr) {
    // SAFETY: an address is not longer than the storage, and consists of bytes.
    unsafe { ptr::from_mut(storage).cast::<KernelAddr>().write(*addr) };
}

/// Returns the stored address.
#[inline(always)]
pub(super) fn address(storage: &sockaddr_storage) -> &KernelAddr {
    // SAFETY: as above, and the alignment of the storage is not smaller.
    unsafe { &*ptr::from_ref(storage).cast::<KernelAddr>() }
}

/// Returns the bytes of a datagram. The fields are private in Rust, and a C caller guarantees that the memory is valid during the
/// call.
#[inline(always)]
pub(super) fn bytes<'a>(data: *mut c_void, len: usize) -> &'a [u8] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(data.cast(), len) }
}

/// Returns the bytes of a datagram for writing.
pub(super) fn bytes_mut<'a>(data: *mut c_void, len: usize) -> &'a mut [u8] {
    if data.is_null() || len == 0 {
        return &mut [];
    }
    // SAFETY: as for bytes(), and the borrow of the datagram is exclusive.
    unsafe { std::slice::from_raw_parts_mut(data.cast(), len) }
}
