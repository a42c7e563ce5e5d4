//! System calls that `std` and `socket2` do not wrap.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU64;

use socket2::SockAddr;

use crate::address::KernelAddr;
pub(crate) use crate::errno::{Errno, Result, SavedErrno, errno, set_errno};

#[cfg(any(feature = "check", feature = "iptables"))]
mod child;
mod host;
#[cfg(any(feature = "check", feature = "iptables"))]
mod network;

#[cfg(any(feature = "check", feature = "iptables"))]
pub(crate) use child::*;
pub(crate) use host::*;
#[cfg(any(feature = "check", feature = "iptables"))]
pub(crate) use network::*;

/// Moves a value to the heap, or returns the value if the allocation fails.
pub(crate) fn try_box<T>(value: T) -> std::result::Result<Box<T>, T> {
    let layout = std::alloc::Layout::new::<T>();
    if layout.size() == 0 {
        return Ok(Box::new(value));
    }
    // SAFETY: the layout is not of size zero. A new allocation with the layout of T, to which a T is written, is valid for a Box.
    unsafe {
        let memory = std::alloc::alloc(layout).cast::<T>();
        if memory.is_null() {
            return Err(value);
        }
        memory.write(value);
        Ok(Box::from_raw(memory))
    }
}

/// Returns milliseconds of a monotonic clock, with a resolution of some milliseconds. Makes no system call (vDSO).
pub(crate) fn coarse_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is valid for writes. The clock exists since Linux 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Returns nanoseconds of a monotonic clock.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is valid for writes.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// Identity of an open socket or file: device and inode. No other open socket (sockfs) or file has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

/// Returns the identity of a descriptor; `None`: it is not open.
pub(crate) fn identity_of(fd: BorrowedFd<'_>) -> Option<Identity> {
    // SAFETY: a struct of integers, valid for writes.
    unsafe {
        let mut found: libc::stat = std::mem::zeroed();
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "their width is the platform's")]
        (libc::fstat(fd.as_raw_fd(), &raw mut found) == 0)
            .then_some(Identity { device: found.st_dev as u64, inode: found.st_ino as u64 })
    }
}

/// Size of a mapping. The kernel rounds it up to the page size.
const PAGE: usize = 4096;

/// Maps a page with a word that is 0 in each forked child (`MADV_WIPEONFORK`, Linux 4.14). It is never unmapped.
pub(crate) fn memory_wiped_on_fork() -> Result<&'static AtomicU64> {
    // SAFETY: a new private mapping, zero-filled and page-aligned, which is unmapped only if the kernel does not support the advice.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        if libc::madvise(page, PAGE, libc::MADV_WIPEONFORK) != 0 {
            let error = Errno::last();
            libc::munmap(page, PAGE);
            return Err(error);
        }
        Ok(AtomicU64::from_ptr(page.cast()))
    }
}

/// Maps a page with a word, initially 0, that forked children share with this process (`MAP_SHARED`).
pub(crate) fn memory_shared_with_children() -> Result<*mut AtomicU64> {
    // SAFETY: a new mapping.
    unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let page = libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if page == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(page.cast()) }
    }
}

/// Unmaps shared memory from this process.
///
/// # Safety
/// The pointer must come from [`memory_shared_with_children`], and this process must not use it again.
pub(crate) unsafe fn unmap_shared(word: *mut AtomicU64) {
    // SAFETY: the caller guarantees it.
    unsafe { libc::munmap(word.cast(), PAGE) };
}

/// Creates a file without a name that this process has locked (`fcntl(F_SETLK)`). A forked child inherits the file, but not the
/// lock. The lock ends when the last thread of this process ends, when the process executes a program, and when it closes the
/// file.
pub(crate) fn file_locked_by_this_process() -> Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated; the call returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"libtproxy".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: a new descriptor that no other owner has.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    lock_command(file.as_fd(), libc::F_SETLK).map(|_| file)
}

/// Whether another process has locked a file of [`file_locked_by_this_process`].
pub(crate) fn is_locked_by_another(file: BorrowedFd<'_>) -> bool {
    lock_command(file, libc::F_GETLK).is_ok_and(|found| i32::from(found.l_type) != libc::F_UNLCK)
}

/// Sets a write lock on a whole file, or queries a conflicting lock.
fn lock_command(file: BorrowedFd<'_>, command: i32) -> Result<libc::flock> {
    // SAFETY: a struct of integers, for which all zero is valid, of the kind that the command takes.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        if libc::fcntl(file.as_raw_fd(), command, &raw mut lock) == 0 { Ok(lock) } else { Err(Errno::last()) }
    }
}

/// Whether a process with this PID exists.
pub(crate) fn process_exists(pid: u32) -> bool {
    // SAFETY: signal 0 is not sent.
    i32::try_from(pid).is_ok_and(|pid| unsafe { libc::kill(pid, 0) } == 0 || errno() != libc::ESRCH)
}

/// `getsockopt` of an `int`.
#[inline(always)]
pub(crate) fn getsockopt_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and len are valid for writes, and len is value's size.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    if rc == 0 { Ok(value) } else { Err(Errno::last()) }
}

/// `getsockopt` of a struct, whose input is in the buffer. Returns the size of the result.
pub(crate) fn getsockopt_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> Result<usize> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: the buffer is valid for reads and writes of len bytes.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut len) };
    if rc == 0 { Ok(len as usize) } else { Err(Errno::last()) }
}

/// `setsockopt` of an `int`.
#[inline(always)]
pub(crate) fn setsockopt_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> Result<()> {
    // SAFETY: value is valid for reads of the length given.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// `socket(2)`.
#[inline(always)]
pub(crate) fn socket(domain: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(domain, kind, protocol) };
    // SAFETY: a new descriptor, ours alone.
    if fd >= 0 { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) } else { Err(Errno::last()) }
}

/// `bind(2)`.
#[inline(always)]
pub(crate) fn bind(fd: BorrowedFd<'_>, addr: &KernelAddr) -> Result<()> {
    let bytes = addr.as_bytes();
    // SAFETY: an address, valid for reads of its length.
    let rc = unsafe { libc::bind(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// `connect(2)`. Returns whether the socket is connected; otherwise the connection is in progress (EINPROGRESS).
#[inline(always)]
pub(crate) fn connect(fd: BorrowedFd<'_>, addr: &KernelAddr) -> Result<bool> {
    let bytes = addr.as_bytes();
    // SAFETY: as above.
    let rc = unsafe { libc::connect(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) };
    match rc {
        0 => Ok(true),
        _ if errno() == libc::EINPROGRESS => Ok(false),
        _ => Err(Errno::last()),
    }
}

/// `accept4(2)`, and the peer's address if it is asked for. The new descriptor is close-on-exec.
#[inline(always)]
pub(crate) fn accept(listener: BorrowedFd<'_>, peer: Option<&mut KernelAddr>, nonblocking: bool) -> Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | if nonblocking { libc::SOCK_NONBLOCK } else { 0 };
    let mut len = size_of::<KernelAddr>() as libc::socklen_t;
    let (place, len) = match peer {
        Some(peer) => (peer.as_mut_bytes().as_mut_ptr().cast(), &raw mut len),
        None => (ptr::null_mut(), ptr::null_mut()),
    };
    // SAFETY: both are NULL, or valid for writes, and len is the size of the place.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), place, len, flags) };
    // SAFETY: a new descriptor, ours alone.
    if fd >= 0 { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) } else { Err(Errno::last()) }
}

/// `getsockname(2)`.
#[inline(always)]
pub(crate) fn local_addr(fd: BorrowedFd<'_>, addr: &mut KernelAddr) -> Result<()> {
    let place = addr.as_mut_bytes();
    let mut len = place.len() as libc::socklen_t;
    // SAFETY: both are valid for writes, and len is the size of the buffer.
    let rc = unsafe { libc::getsockname(fd.as_raw_fd(), place.as_mut_ptr().cast(), &raw mut len) };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// Returns the address of a netlink socket (`struct sockaddr_nl`) with this port and no groups.
pub(crate) fn netlink_address(port: u32) -> Result<SockAddr> {
    // SAFETY: the storage is larger than a sockaddr_nl and aligned for it; both
    // are valid when all zero.
    let ((), addr) = unsafe {
        SockAddr::try_init(|storage, len| {
            let addr = &mut *storage.cast::<libc::sockaddr_nl>();
            addr.nl_family = libc::AF_NETLINK as libc::sa_family_t;
            addr.nl_pid = port;
            *len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(addr)
}

/// Returns the port of a bound netlink socket (`nl_pid`, netlink(7)).
pub(crate) fn netlink_port(fd: BorrowedFd<'_>) -> Result<u32> {
    // SAFETY: a struct of integers; it and its length are valid for writes.
    unsafe {
        let mut addr: libc::sockaddr_nl = std::mem::zeroed();
        let mut len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        match libc::getsockname(fd.as_raw_fd(), (&raw mut addr).cast(), &raw mut len) {
            0 => Ok(addr.nl_pid),
            _ => Err(Errno::last()),
        }
    }
}

/// `recv(2)` into a buffer, whose contents are replaced, up to its capacity.
pub(crate) fn receive(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> Result<()> {
    buffer.clear();
    // SAFETY: the whole capacity is valid for writes.
    let len = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.capacity(), 0) };
    let len = usize::try_from(len).map_err(|_| Errno::last())?;
    // SAFETY: the kernel has written this number of bytes, which does not exceed the capacity.
    unsafe { buffer.set_len(len) };
    Ok(())
}
