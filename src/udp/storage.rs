//! The memory of a [`Datagram`](super::Datagram): its addresses, which C knows as `struct sockaddr_storage`, and its bytes.

use std::ffi::c_void;
use std::mem::zeroed;
use std::ptr;

use libc::sockaddr_storage;

use super::datagram::Datagram;
use crate::address::KernelAddr;

// SAFETY: it has its memory to itself, by an exclusive borrow or by a C caller's word, as if it were that borrow.
unsafe impl Send for Datagram<'_> {}

/// No address: AF_UNSPEC.
// SAFETY: integers, for which all zero is valid.
pub(super) const NO_ADDRESS: sockaddr_storage = unsafe { zeroed() };

/// Writes an address, or that there is none.
#[inline(always)]
pub(super) fn store_address(storage: &mut sockaddr_storage, addr: &KernelAddr) {
    // SAFETY: an address is no longer than the storage, and nothing but bytes.
    unsafe { ptr::from_mut(storage).cast::<KernelAddr>().write(*addr) };
}

/// The address that is there.
#[inline(always)]
pub(super) fn address(storage: &sockaddr_storage) -> &KernelAddr {
    // SAFETY: as above, and at least as aligned.
    unsafe { &*ptr::from_ref(storage).cast::<KernelAddr>() }
}

/// A datagram's bytes. Its fields are private, or by a C caller's word: so many bytes are there while it lives.
#[inline(always)]
pub(super) fn bytes<'a>(data: *mut c_void, len: usize) -> &'a [u8] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(data.cast(), len) }
}

/// The same, to be written.
pub(super) fn bytes_mut<'a>(data: *mut c_void, len: usize) -> &'a mut [u8] {
    if data.is_null() || len == 0 {
        return &mut [];
    }
    // SAFETY: as for bytes(); the borrow of the datagram is exclusive.
    unsafe { std::slice::from_raw_parts_mut(data.cast(), len) }
}
