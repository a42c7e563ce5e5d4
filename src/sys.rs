//! System calls that `std` and `socket2` do not wrap.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::thread;
use std::time::Duration;

use socket2::SockAddr;

use crate::address::KernelAddr;
pub(crate) use crate::errno::{Errno, Result, SavedErrno, errno, set_errno};

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
pub(crate) fn memory_wiped_on_fork() -> Option<*mut std::sync::atomic::AtomicU64> {
    // SAFETY: a new private mapping, which is unmapped if the kernel does not support the advice.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return None;
        }
        if libc::madvise(page, PAGE, libc::MADV_WIPEONFORK) != 0 {
            libc::munmap(page, PAGE);
            return None;
        }
        Some(page.cast())
    }
}

/// Maps a page with a word, initially 0, that forked children share with this process (`MAP_SHARED`).
pub(crate) fn memory_shared_with_children() -> Result<*mut std::sync::atomic::AtomicU64> {
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
pub(crate) unsafe fn unmap_shared(word: *mut std::sync::atomic::AtomicU64) {
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

/// Returns the soft and the hard descriptor limit of this process (`u64::MAX`: unlimited).
pub(crate) fn descriptor_limits() -> Option<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid for writes of a limit.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    #[allow(clippy::useless_conversion, reason = "its width is the platform's")]
    (rc == 0).then_some((limit.rlim_cur.into(), limit.rlim_max.into()))
}

/// Returns the effective capabilities of this thread as a bit set, by capget(2), which does not need /proc.
pub(crate) fn effective_capabilities() -> Result<u64> {
    /// _LINUX_CAPABILITY_VERSION_3, `struct __user_cap_header_struct` and two of `struct __user_cap_data_struct`.
    const VERSION: u32 = 0x2008_0522;
    let mut header = [VERSION, 0];
    let mut sets = [0u32; 6];
    // SAFETY: the header has 8 bytes, and the buffer holds the two parts of the three sets.
    let rc = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    let [low, _, _, high, _, _] = sets;
    if rc == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Errno::last()) }
}

/// Returns the effective user and group IDs.
pub(crate) fn effective_ids() -> (u32, u32) {
    // SAFETY: plain system calls, which do not fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Whether a capability is in the bounding set, so that executed programs can have it; `None`: unknown.
pub(crate) fn is_in_bounding_set(capability: u32) -> Option<bool> {
    let nothing: libc::c_ulong = 0;
    // SAFETY: a plain system call.
    match unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), nothing, nothing, nothing) } {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// Returns the kernel release of uname(2).
pub(crate) fn kernel_release() -> String {
    // SAFETY: a struct of bytes, for which all zero is valid; valid for writes.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name
    };
    let bytes: Vec<u8> = name.release.iter().map(|letter| *letter as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
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

/// Opens the network namespace of a socket (`ioctl(SIOCGSKNS)`, Linux 4.9). It needs CAP_NET_ADMIN in that namespace, and not /proc.
pub(crate) fn network_of(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    /// include/uapi/linux/sockios.h.
    const SIOCGSKNS: u32 = 0x894c;
    // SAFETY: the call takes no argument, and returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS as _) };
    // SAFETY: a new descriptor that no other owner has.
    if fd >= 0 { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) } else { Err(Errno::last()) }
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

/// Starts the program at a path, with the given standard input, output and error, and the given environment.
///
/// The program starts with no signal blocked or ignored, whatever the signal mask of this process is. Otherwise it might not
/// be able to wait for its children or to receive an alarm. (`std::process::Command` can reset signals only in a hook between
/// `fork` and `exec`, and then panics if the program cannot be started while SIGCHLD is ignored.)
pub(crate) fn spawn(
    path: &CStr,
    arguments: &[&CStr],
    environment: &[&CStr],
    files: [BorrowedFd<'_>; 3],
) -> Result<libc::pid_t> {
    let pointers = |words: &[&CStr]| -> Vec<*mut libc::c_char> {
        words.iter().map(|word| word.as_ptr().cast_mut()).chain([ptr::null_mut()]).collect::<Vec<_>>()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    let done = |errno: i32| if errno == 0 { Ok(()) } else { Err(Errno(errno)) };
    let mut pid = 0;
    // SAFETY: both are initialized before their first use, and destroyed at the end; path, arguments
    // and environment are NUL-terminated, and the last pointer of each list is NULL.
    unsafe {
        let mut actions = std::mem::zeroed();
        let mut attributes = std::mem::zeroed();
        let mut signals = std::mem::zeroed();
        done(libc::posix_spawn_file_actions_init(&raw mut actions))?;
        let started = done(libc::posix_spawnattr_init(&raw mut attributes)).and_then(|()| {
            libc::sigemptyset(&raw mut signals);
            let mut outcome = libc::posix_spawnattr_setsigmask(&raw mut attributes, &raw const signals);
            libc::sigfillset(&raw mut signals);
            outcome |= libc::posix_spawnattr_setsigdefault(&raw mut attributes, &raw const signals);
            let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
            outcome |= libc::posix_spawnattr_setflags(&raw mut attributes, flags as _);
            for (number, file) in (0..).zip(files) {
                outcome |= libc::posix_spawn_file_actions_adddup2(&raw mut actions, file.as_raw_fd(), number);
            }
            if outcome == 0 {
                let (actions, attributes) = (&raw const actions, &raw const attributes);
                outcome =
                    libc::posix_spawn(&raw mut pid, path.as_ptr(), actions, attributes, argv.as_ptr(), envp.as_ptr());
            }
            libc::posix_spawnattr_destroy(&raw mut attributes);
            done(outcome)
        });
        libc::posix_spawn_file_actions_destroy(&raw mut actions);
        started?;
    }
    Ok(pid)
}

/// Opens a descriptor of a child process (Linux 5.4). It is readable after the child has ended.
///
/// `None`: the child has ended and was already waited for, so its PID may belong to another process. This happens if this
/// process ignores SIGCHLD or waits for any child elsewhere.
pub(crate) fn pidfd(child: libc::pid_t) -> Result<Option<OwnedFd>> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child, 0) };
    if fd < 0 {
        let error = Errno::last();
        return if error == Errno(libc::ESRCH) { Ok(None) } else { Err(error) };
    }
    // SAFETY: a new descriptor, ours alone.
    let process = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    match waitid(process.as_fd(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) {
        Err(Errno(libc::ECHILD)) => Ok(None),
        other => other.map(|_| Some(process)),
    }
}

/// Kills a process.
pub(crate) fn kill(process: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: a plain system call; a NULL siginfo means the same as kill(2).
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGKILL,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The process exited with this status.
    Exited(i32),
    /// The process was killed by this signal.
    Killed(i32),
    /// The status is unknown: this process ignores SIGCHLD, or another part of it has waited for the child.
    Unknown,
}

/// Waits for the end of a child process.
pub(crate) fn wait(process: BorrowedFd<'_>) -> Result<End> {
    loop {
        return match waitid(process, libc::WEXITED) {
            Ok((libc::CLD_EXITED, status)) => Ok(End::Exited(status)),
            Ok((_, signal)) => Ok(End::Killed(signal)),
            Err(Errno(libc::ECHILD)) => Ok(End::Unknown),
            Err(Errno(libc::EINTR)) => continue,
            Err(error) => Err(error),
        };
    }
}

/// `waitid(2)`. Returns the event (CLD_*), and the status or the signal.
fn waitid(process: BorrowedFd<'_>, options: i32) -> Result<(i32, i32)> {
    // SAFETY: all zero is valid, and has a status; the call fills it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let rc = libc::waitid(libc::P_PIDFD, process.as_raw_fd() as libc::id_t, &raw mut info, options);
        if rc == 0 { Ok((info.si_code, info.si_status())) } else { Err(Errno::last()) }
    }
}

/// Waits for a child process by its PID, if it has no descriptor.
pub(crate) fn reap(pid: libc::pid_t) {
    // SAFETY: a plain system call; NULL: the status is not needed.
    while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } < 0 && errno() == libc::EINTR {}
}

/// Waits until one of the descriptors is ready or the time has passed. Negative descriptors are ignored. Returns which are ready.
pub(crate) fn poll<const N: usize>(events: [(RawFd, i16); N], time: Duration) -> Result<[bool; N]> {
    let mut polled = events.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    // Rounded up, so that callers do not poll repeatedly in the last millisecond.
    let time = i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: valid for reads and writes of N.
    let rc = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, time) };
    match rc {
        0.. => Ok(polled.map(|polled| polled.revents != 0)),
        _ if errno() == libc::EINTR => Ok([false; N]),
        _ => Err(Errno::last()),
    }
}

/// `write(2)` to a pipe. If the reader has closed it, the error is EPIPE, without SIGPIPE, which would end this process.
pub(crate) fn write_to_pipe(pipe: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize> {
    // SAFETY: the sets are valid for writes and filled before they are read; the bytes are valid for reads.
    unsafe {
        let (mut sigpipe, mut before, mut pending) = (std::mem::zeroed(), std::mem::zeroed(), std::mem::zeroed());
        libc::sigemptyset(&raw mut sigpipe);
        libc::sigaddset(&raw mut sigpipe, libc::SIGPIPE);
        libc::sigemptyset(&raw mut pending);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const sigpipe, &raw mut before);
        libc::sigpending(&raw mut pending);
        let was_pending = libc::sigismember(&raw const pending, libc::SIGPIPE) == 1;
        let written = libc::write(pipe.as_raw_fd(), bytes.as_ptr().cast(), bytes.len());
        let outcome = usize::try_from(written).map_err(|_| Errno::last());
        // Removes the SIGPIPE that the write has sent to this thread. It is pending when the write returns.
        if outcome == Err(Errno(libc::EPIPE)) && !was_pending {
            let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            libc::sigtimedwait(&raw const sigpipe, ptr::null_mut(), &raw const at_once);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        outcome
    }
}
