//! The few system calls that `std` and `socket2` do not wrap.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use socket2::SockAddr;

/// This thread's `errno`.
pub(crate) fn errno() -> i32 {
    // SAFETY: __errno_location gives a valid pointer to this thread's errno.
    unsafe { *libc::__errno_location() }
}

/// Sets this thread's `errno`.
pub(crate) fn set_errno(value: i32) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value }
}

/// Milliseconds since some moment, exact to a few of them; no system call (vDSO).
pub(crate) fn coarse_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is valid for writes. The clock exists since Linux 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// `getsockopt` of an `int`.
#[inline(always)]
pub(crate) fn getsockopt_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and len are valid for writes, and len is value's size.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    if rc == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// `getsockopt` of a struct: the buffer is given and filled. Returns how much of it.
pub(crate) fn getsockopt_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: the buffer is valid for reads and writes of len bytes.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut len) };
    if rc == 0 { Ok(len as usize) } else { Err(io::Error::last_os_error()) }
}

/// `setsockopt` of an `int`.
#[inline(always)]
pub(crate) fn setsockopt_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
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
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many descriptors this process may have: the soft and the hard limit (`u64::MAX`: any number).
pub(crate) fn descriptor_limits() -> Option<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid for writes of a limit.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    #[allow(clippy::useless_conversion, reason = "its width is the platform's")]
    (rc == 0).then_some((limit.rlim_cur.into(), limit.rlim_max.into()))
}

/// The address of a netlink socket (`struct sockaddr_nl`) with this port and no groups.
pub(crate) fn netlink_address(port: u32) -> io::Result<SockAddr> {
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

/// Gives this thread a network namespace of its own.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: a plain system call; it changes this thread alone.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts this thread into a network namespace.
pub(crate) fn enter_network(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a plain system call; it changes this thread alone.
    let rc = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Does something while this thread gets no signals; threads that it starts get none at all.
pub(crate) fn without_signals<T>(body: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are valid for writes, and the first is filled before it is read.
    let before = unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    };
    let outcome = body();
    // SAFETY: the set that was there before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    outcome
}

/// A file in memory that holds a text, to be read from its beginning.
pub(crate) fn file_of(text: &str) -> io::Result<File> {
    // SAFETY: a NUL-terminated name; the call gives a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"libtproxy".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is ours alone.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// An errno value that displays as the C library describes it, without allocating.
pub(crate) struct Describe(pub i32);

impl fmt::Display for Describe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut buffer = [0 as libc::c_char; 128];
        // SAFETY: the buffer is valid for writes of its length. This is the
        // POSIX strerror_r, which always ends its text with a NUL.
        let text = unsafe {
            libc::strerror_r(self.0, buffer.as_mut_ptr(), buffer.len());
            std::ffi::CStr::from_ptr(buffer.as_ptr())
        };
        match text.to_str() {
            Ok(text) if !text.is_empty() => f.write_str(text),
            _ => write!(f, "errno {}", self.0),
        }
    }
}
