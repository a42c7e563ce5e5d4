//! What C gives, decoded: NULL, lengths and families are checked here, once.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use libc::{sockaddr, sockaddr_storage, socklen_t};

use crate::address::{self, AddrRef, KernelAddr};
use crate::error::{Error, Result};

/// A pointer that must not be NULL was.
#[cold]
#[inline(never)]
pub(super) fn null(what: &str) -> Error {
    Error::with(libc::EFAULT, format_args!("{what} is NULL"))
}

/// A caller's descriptor.
///
/// # Safety
/// If it is open, it stays open during the call. (One that is not gives EBADF
/// from the first system call.)
pub(super) unsafe fn fd<'a>(fd: c_int) -> Result<BorrowedFd<'a>> {
    if fd < 0 {
        return Err(bad_descriptor(fd));
    }
    // SAFETY: not -1, and open by the caller's word.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

#[cold]
#[inline(never)]
fn bad_descriptor(fd: c_int) -> Error {
    Error::with(libc::EBADF, format_args!("descriptor {fd}: Bad file descriptor"))
}

/// Flags, none of which may be unknown.
#[inline(always)]
pub(super) fn flags(flags: u32, known: u32) -> Result<u32> {
    match flags & !known {
        0 => Ok(flags),
        unknown => Err(unknown_flags(unknown)),
    }
}

#[cold]
#[inline(never)]
fn unknown_flags(unknown: u32) -> Error {
    Error::invalid_with(format_args!("flags: {unknown:#x} is not known to this call"))
}

/// A socket address.
///
/// # Safety
/// `addr` is NULL or valid for reads of `len` bytes.
pub(super) unsafe fn address(what: &str, addr: *const sockaddr, len: socklen_t) -> Result<SocketAddr> {
    // SAFETY: by the caller's word.
    unsafe { kernel_address(what, addr, len) }.map(SocketAddr::from)
}

/// A socket address that is only passed on.
///
/// # Safety
/// As for [`address()`].
#[inline(always)]
pub(super) unsafe fn kernel_address(what: &str, addr: *const sockaddr, len: socklen_t) -> Result<KernelAddr> {
    // SAFETY: by the caller's word.
    unsafe { parsed_address(addr, len).ok_or_else(|| no_address(what, addr, len)) }
}

/// The same; `None`: [`no_address`] says why. In a hot call that takes less than a Result, which the compiler copies piece
/// by piece.
///
/// # Safety
/// As for [`address()`].
#[inline(always)]
pub(super) unsafe fn parsed_address(addr: *const sockaddr, len: socklen_t) -> Option<KernelAddr> {
    let len = len as usize;
    if addr.is_null() || len > size_of::<sockaddr_storage>() {
        return None;
    }
    // SAFETY: not NULL, valid for len bytes, and these are bytes.
    KernelAddr::parse(unsafe { std::slice::from_raw_parts(addr.cast::<u8>(), len) })
}

/// Why it is none.
///
/// # Safety
/// As for [`address()`].
#[cold]
#[inline(never)]
pub(super) unsafe fn no_address(what: &str, addr: *const sockaddr, len: socklen_t) -> Error {
    let len = len as usize;
    if addr.is_null() {
        return null(what);
    }
    if len > size_of::<sockaddr_storage>() {
        return Error::invalid_with(format_args!("{what}: a length of {len} is more than any socket address has"));
    }
    // SAFETY: not NULL, valid for len bytes, and these are bytes.
    match address::family(unsafe { std::slice::from_raw_parts(addr.cast::<u8>(), len) }) {
        None | Some(libc::AF_INET | libc::AF_INET6) => {
            Error::invalid_with(format_args!("{what}: a length of {len} is too short for its address family"))
        }
        Some(other) => Error::with(
            libc::EAFNOSUPPORT,
            format_args!("{what}: address family {other}, where AF_INET or AF_INET6 is needed"),
        ),
    }
}

/// The length of an IPv4 address's struct.
const V4: usize = size_of::<libc::sockaddr_in>();

/// Where an address goes: the place and its size, which becomes the address's.
pub(super) struct AddressOut {
    addr: *mut sockaddr,
    len: *mut socklen_t,
}

impl AddressOut {
    /// `None`: [`no_place`] says why.
    #[inline(always)]
    pub(super) fn new(addr: *mut sockaddr, len: *mut socklen_t) -> Option<AddressOut> {
        (!addr.is_null() && !len.is_null()).then_some(AddressOut { addr, len })
    }

    /// Writes the address and its length, or nothing: then there is too little room for the length that it gives
    /// ([`AddressOut::too_little`] says so).
    ///
    /// # Safety
    /// The length is valid for reads and writes, the place for writes of that length.
    #[inline(always)]
    pub(super) unsafe fn write(&self, value: AddrRef<'_>) -> std::result::Result<(), usize> {
        // SAFETY: by the caller's word.
        let room = unsafe { self.len.read_unaligned() } as usize;
        match value {
            // SAFETY: by the caller's word, and there is room.
            AddrRef::V4(v4) if room >= V4 => unsafe { self.write_v4(v4) },
            // SAFETY: as above.
            AddrRef::V6(v6) if room >= v6.len() => unsafe { self.write_v6(v6) },
            AddrRef::V4(_) => return Err(V4),
            AddrRef::V6(v6) => return Err(v6.len()),
        }
        Ok(())
    }

    /// Whether there is room for an address.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    #[inline(always)]
    pub(super) unsafe fn check_room(&self, addr: &KernelAddr) -> Result<()> {
        let needed = addr.as_bytes().len();
        // SAFETY: by the caller's word.
        if (unsafe { self.len.read_unaligned() } as usize) < needed {
            // SAFETY: as above.
            return Err(unsafe { self.too_little(needed) });
        }
        Ok(())
    }

    /// Whether there is room for the smallest address.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    #[inline(always)]
    pub(super) unsafe fn check_room_for_any(&self) -> Result<()> {
        // SAFETY: by the caller's word.
        if (unsafe { self.len.read_unaligned() } as usize) < V4 {
            // SAFETY: as above.
            return Err(unsafe { self.too_little(V4) });
        }
        Ok(())
    }

    /// Makes a v4-mapped address that is there the IPv4 address that it stands for.
    ///
    /// # Safety
    /// The length is valid for reads and writes, the place for reads and writes of that length.
    #[inline(always)]
    pub(super) unsafe fn unmap(&self) -> Result<()> {
        // SAFETY: by the caller's word.
        let addr = unsafe { kernel_address("addr", self.addr, self.len.read_unaligned()) };
        let mut addr = addr.map_err(not_an_address)?;
        if addr.is_ipv6() {
            addr.make_canonical();
            if addr.is_ipv4() {
                // SAFETY: there was an IPv6 address, and so there is room for all its bytes.
                unsafe {
                    self.addr.cast::<address::Bytes>().write_unaligned(*addr.as_mut_bytes());
                    self.len.write_unaligned(V4 as socklen_t);
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`write`](Self::write).
    #[cold]
    #[inline(never)]
    pub(super) unsafe fn too_little(&self, needed: usize) -> Error {
        // SAFETY: by the caller's word.
        let room = unsafe { self.len.read_unaligned() };
        Error::invalid_with(format_args!(
            "the address needs {needed} bytes, but there is room for {room}: use a struct sockaddr_storage"
        ))
    }

    /// # Safety
    /// As for [`write`](Self::write), and there is room.
    #[inline(always)]
    unsafe fn write_v4(&self, v4: &[u8; 8]) {
        // SAFETY: by the caller's word.
        unsafe {
            self.addr.cast::<[[u8; 8]; 2]>().write_unaligned([*v4, [0; 8]]);
            self.len.write_unaligned(V4 as socklen_t);
        }
    }

    /// # Safety
    /// As for [`write`](Self::write), and there is room.
    #[inline(always)]
    unsafe fn write_v6(&self, v6: &address::Bytes) {
        // SAFETY: by the caller's word.
        unsafe {
            self.addr.cast::<address::Bytes>().write_unaligned(*v6);
            self.len.write_unaligned(v6.len() as socklen_t);
        }
    }
}

/// The error of another call's argument, as EINVAL.
#[cold]
#[inline(never)]
fn not_an_address(error: Error) -> Error {
    Error::invalid_with(format_args!("{error}"))
}

#[cold]
#[inline(never)]
pub(super) fn no_place(what: &str, addr: *mut sockaddr) -> Error {
    if addr.is_null() { null(what) } else { null(&format!("{what}: the length")) }
}

#[cold]
#[inline(never)]
fn no_room(what: &str, room: usize) -> Error {
    Error::invalid_with(format_args!("{what}: {room} bytes are no room for an address: use a struct sockaddr_storage"))
}

/// Where the address of a datagram goes that has been received: it must not be
/// lost for want of room, so it is cut, as `recvfrom(2)` does.
pub(super) struct DatagramAddressOut(Option<AddressOut>);

impl DatagramAddressOut {
    /// # Safety
    /// The pointers are NULL, or the length is valid for reads and writes, and
    /// the place for writes of that length.
    #[inline(always)]
    pub(super) unsafe fn new(what: &str, addr: *mut sockaddr, len: *mut socklen_t) -> Result<DatagramAddressOut> {
        if addr.is_null() {
            return Ok(DatagramAddressOut(None));
        }
        let Some(out) = AddressOut::new(addr, len) else { return Err(no_place(what, addr)) };
        // SAFETY: by the caller's word.
        let room = unsafe { out.len.read_unaligned() } as usize;
        if room < V4 {
            return Err(no_room(what, room));
        }
        Ok(DatagramAddressOut(Some(out)))
    }

    /// Writes the address and its whole length; for none, AF_UNSPEC and 0.
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    #[inline(always)]
    pub(super) unsafe fn write(&self, value: Option<AddrRef<'_>>) {
        let Some(out) = &self.0 else { return };
        // SAFETY: by the caller's word; no more is written than there is room for, which is enough for an IPv4 address.
        unsafe {
            match value {
                Some(AddrRef::V4(v4)) => out.write_v4(v4),
                Some(AddrRef::V6(v6)) => {
                    let room = out.len.read_unaligned() as usize;
                    if room >= v6.len() {
                        return out.write_v6(v6);
                    }
                    out.addr.cast::<u8>().copy_from_nonoverlapping(v6.as_ptr(), room);
                    out.len.write_unaligned(v6.len() as socklen_t);
                }
                None => {
                    out.addr.cast::<libc::sa_family_t>().write_unaligned(libc::AF_UNSPEC as libc::sa_family_t);
                    out.len.write_unaligned(0);
                }
            }
        }
    }
}

/// The family of an address that may be NULL, or too short to have one.
///
/// # Safety
/// `addr` is NULL or valid for reads of `len` bytes.
#[inline(always)]
pub(super) unsafe fn family(addr: *const c_void, len: socklen_t) -> Option<c_int> {
    let family = addr.cast::<libc::sa_family_t>();
    if family.is_null() || (len as usize) < size_of::<libc::sa_family_t>() {
        return None;
    }
    // SAFETY: not NULL, and long enough.
    Some(unsafe { family.read_unaligned() }.into())
}

/// A string, or `None` for NULL.
///
/// # Safety
/// `text` is NULL or NUL-terminated.
pub(super) unsafe fn text<'a>(what: &str, text: *const c_char) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: NUL-terminated by the caller's word.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Error::invalid_with(format_args!("{what}: not UTF-8")))
}

/// An array, or an empty one if `len` is 0.
///
/// # Safety
/// `items` is NULL or valid for reads of `len` items.
pub(super) unsafe fn array<'a, T>(what: &str, items: *const T, len: usize) -> Result<&'a [T]> {
    // SAFETY: by the caller's word.
    unsafe { slice(items, len) }.ok_or_else(|| no_array(what, items, len))
}

/// An array, which may be empty; `None`: it is NULL, and `len` is 0.
///
/// # Safety
/// As for [`array()`].
pub(super) unsafe fn list<'a, T>(what: &str, items: *const T, len: usize) -> Result<Option<&'a [T]>> {
    if items.is_null() && len == 0 {
        return Ok(None);
    }
    // SAFETY: by the caller's word.
    unsafe { array(what, items, len) }.map(Some)
}

/// The same as [`array()`]; `None`: [`no_array`] says why.
///
/// # Safety
/// As for [`array()`].
#[inline(always)]
pub(super) unsafe fn slice<'a, T>(items: *const T, len: usize) -> Option<&'a [T]> {
    if len == 0 {
        return Some(&[]);
    }
    // SAFETY: not NULL, valid for len items by the caller's word, aligned, and not too large.
    is_array(items, len).then(|| unsafe { std::slice::from_raw_parts(items, len) })
}

/// The same, to be written.
///
/// # Safety
/// As for [`array()`], and for writes; nobody else looks at it meanwhile.
pub(super) unsafe fn array_mut<'a, T>(what: &str, items: *mut T, len: usize) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    if !is_array(items, len) {
        return Err(no_array(what, items, len));
    }
    // SAFETY: as for array().
    Ok(unsafe { std::slice::from_raw_parts_mut(items, len) })
}

fn is_array<T>(items: *const T, len: usize) -> bool {
    !items.is_null() && items.is_aligned() && len <= isize::MAX as usize / size_of::<T>().max(1)
}

/// Why it is none.
#[cold]
#[inline(never)]
pub(super) fn no_array<T>(what: &str, items: *const T, len: usize) -> Error {
    if items.is_null() {
        null(what)
    } else if !items.is_aligned() {
        Error::invalid_with(format_args!("{what}: the array is not aligned"))
    } else {
        Error::invalid_with(format_args!("{what}: {len} items are more than memory holds"))
    }
}

/// Where a struct goes that may grow: an older caller's has room for less.
pub(super) struct SizedOut<T> {
    place: *mut T,
    size: usize,
}

impl<T: Copy> SizedOut<T> {
    pub(super) fn new(what: &str, place: *mut T, size: usize, smallest: usize) -> Result<SizedOut<T>> {
        if place.is_null() {
            return Err(null(what));
        }
        if size < smallest {
            return Err(Error::invalid_with(format_args!(
                "{what}: a size of {size} is less than the first version's {smallest}"
            )));
        }
        if size > size_of::<T>() {
            return Err(Error::with(
                libc::E2BIG,
                format_args!("{what}: it has fields that this version of the library cannot fill"),
            ));
        }
        Ok(SizedOut { place, size })
    }

    /// # Safety
    /// The place is valid for writes of its size.
    pub(super) unsafe fn write(&self, value: T) {
        // SAFETY: size bytes of the caller's, and no more than T has.
        unsafe { self.place.cast::<u8>().copy_from_nonoverlapping((&raw const value).cast(), self.size) };
    }
}

/// A struct that may grow: what an older caller does not have is zero, what a
/// newer one has must be zero.
///
/// # Safety
/// `value` is NULL or valid for reads of `size` bytes. Any bytes are a valid
/// `T`, all zero among them.
pub(super) unsafe fn sized<T: Copy>(what: &str, value: *const T, size: usize, smallest: usize) -> Result<T> {
    if value.is_null() {
        return Err(null(what));
    }
    if size < smallest {
        return Err(Error::invalid_with(format_args!(
            "{what}: a size of {size} is less than the first version's {smallest}"
        )));
    }
    let ours = size_of::<T>();
    let unknown = || {
        Error::with(
            libc::E2BIG,
            format_args!("{what}: it has fields that this version of the library does not know; leave them zero"),
        )
    };
    // As the kernel's copy_struct_from_user: no struct is larger than a page.
    if size > 4096 {
        return Err(unknown());
    }
    if size > ours {
        // SAFETY: valid for size bytes, of which these are the last.
        let tail = unsafe { std::slice::from_raw_parts(value.cast::<u8>().add(ours), size - ours) };
        if tail.iter().any(|byte| *byte != 0) {
            return Err(unknown());
        }
    }
    // SAFETY: T may be all zero, and what is copied over it is no more than either has.
    unsafe {
        let mut copy: T = std::mem::zeroed();
        (&raw mut copy).cast::<u8>().copy_from_nonoverlapping(value.cast(), size.min(ours));
        Ok(copy)
    }
}
