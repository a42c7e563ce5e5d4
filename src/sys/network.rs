//! Network namespaces, and threads that enter them.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;

use super::{Errno, Result};

/// Opens the network namespace of a socket (`ioctl(SIOCGSKNS)`, Linux 4.9). It needs CAP_NET_ADMIN in that namespace, and not /proc.
pub(crate) fn network_of(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    /// include/uapi/linux/sockios.h.
    const SIOCGSKNS: u32 = 0x894c;
    // SAFETY: the call takes no argument, and returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS as _) };
    // SAFETY: a new descriptor that no other owner has.
    if fd >= 0 { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) } else { Err(Errno::last()) }
}

/// Moves this thread to a new network namespace.
pub(crate) fn unshare_network() -> Result<()> {
    // SAFETY: a plain system call; it changes only this thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// Moves this thread to a network namespace.
pub(crate) fn enter_network(namespace: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: a plain system call; it changes only this thread.
    let rc = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// Runs a function with all signals blocked in this thread. Threads that it starts keep them blocked.
pub(crate) fn without_signals<T>(body: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are valid for writes, and the first is filled before it is read.
    let before = unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    };
    let outcome = body();
    // SAFETY: restores the set that was saved above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    outcome
}

/// Runs a function in a new thread with a name, and waits for its end; `None`: the function panicked.
pub(crate) fn in_a_thread<T: Send>(name: &str, body: impl FnOnce() -> T + Send) -> Result<Option<T>> {
    /// The default size. Without an explicit size, `std` would read RUST_MIN_STACK from the environment.
    const STACK: usize = 2 << 20;
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(STACK);
    thread::scope(|scope| {
        let worker = builder.spawn_scoped(scope, body)?;
        // Dropping the payload of a panic could panic again.
        Ok(worker.join().map_err(std::mem::forget).ok())
    })
}
