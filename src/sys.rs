//! The few system calls that `std` and `socket2` do not wrap.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::thread;
use std::time::Duration;

use socket2::SockAddr;

use crate::address::KernelAddr;
pub(crate) use crate::errno::{Errno, Result, SavedErrno, errno, set_errno};

/// Memory for one value, or the value back.
pub(crate) fn try_box<T>(value: T) -> std::result::Result<Box<T>, T> {
    let layout = std::alloc::Layout::new::<T>();
    if layout.size() == 0 {
        return Ok(Box::new(value));
    }
    // SAFETY: the layout is not of size zero. A new allocation of that layout, to which a value is written, is a Box's.
    unsafe {
        let memory = std::alloc::alloc(layout).cast::<T>();
        if memory.is_null() {
            return Err(value);
        }
        memory.write(value);
        Ok(Box::from_raw(memory))
    }
}

/// Milliseconds since some moment, exact to a few of them; no system call (vDSO).
pub(crate) fn coarse_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is valid for writes. The clock exists since Linux 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Nanoseconds since some moment.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is valid for writes.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// What a descriptor refers to: device and inode, which no other open socket has (sockfs), nor another open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

/// `None`: the descriptor is not open.
pub(crate) fn identity_of(fd: BorrowedFd<'_>) -> Option<Identity> {
    // SAFETY: a struct of integers, valid for writes.
    unsafe {
        let mut found: libc::stat = std::mem::zeroed();
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "their width is the platform's")]
        (libc::fstat(fd.as_raw_fd(), &raw mut found) == 0)
            .then_some(Identity { device: found.st_dev as u64, inode: found.st_ino as u64 })
    }
}

/// The kernel rounds it up to what the machine has.
const PAGE: usize = 4096;

/// A word in a page of its own that is 0 in each forked child (`MADV_WIPEONFORK`, Linux 4.14). It is never unmapped.
pub(crate) fn memory_wiped_on_fork() -> Option<*mut std::sync::atomic::AtomicU64> {
    // SAFETY: a new private mapping, which is given back if the kernel does not do what it is for.
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

/// A word, 0 at first, in a page of its own that forked children share with this process (`MAP_SHARED`).
pub(crate) fn memory_shared_with_children() -> Result<*mut std::sync::atomic::AtomicU64> {
    // SAFETY: a new mapping.
    unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let page = libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if page == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(page.cast()) }
    }
}

/// Ends this process's part in such memory.
///
/// # Safety
/// It came from [`memory_shared_with_children`], and this process does not use it again.
pub(crate) unsafe fn unmap_shared(word: *mut std::sync::atomic::AtomicU64) {
    // SAFETY: by the caller's word.
    unsafe { libc::munmap(word.cast(), PAGE) };
}

/// A file without a name that this process has locked (`fcntl(F_SETLK)`). A forked child has the file and not the lock. The
/// lock ends with the last thread of this process, when it executes a program, and when it closes the file.
pub(crate) fn file_locked_by_this_process() -> Result<OwnedFd> {
    // SAFETY: a NUL-terminated name; the call gives a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"libtproxy".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: it is ours alone.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    lock_command(file.as_fd(), libc::F_SETLK).map(|_| file)
}

/// Whether another process has locked such a file.
pub(crate) fn is_locked_by_another(file: BorrowedFd<'_>) -> bool {
    lock_command(file, libc::F_GETLK).is_ok_and(|found| i32::from(found.l_type) != libc::F_UNLCK)
}

/// Sets a write lock on all of a file, or asks what is in its way.
fn lock_command(file: BorrowedFd<'_>, command: i32) -> Result<libc::flock> {
    // SAFETY: a struct of integers, for which all zero is valid, of the kind that the command takes.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        if libc::fcntl(file.as_raw_fd(), command, &raw mut lock) == 0 { Ok(lock) } else { Err(Errno::last()) }
    }
}

/// Whether there is a process of this number, whether or not it may be signalled.
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

/// `getsockopt` of a struct: the buffer is given and filled. Returns how much of it.
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

/// `connect(2)`: whether it is done, or under way (EINPROGRESS).
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
    // SAFETY: both are valid for writes, and len is the size of the place.
    let rc = unsafe { libc::getsockname(fd.as_raw_fd(), place.as_mut_ptr().cast(), &raw mut len) };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// How many descriptors this process may have: the soft and the hard limit (`u64::MAX`: any number).
pub(crate) fn descriptor_limits() -> Option<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid for writes of a limit.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    #[allow(clippy::useless_conversion, reason = "its width is the platform's")]
    (rc == 0).then_some((limit.rlim_cur.into(), limit.rlim_max.into()))
}

/// The capabilities that this thread has in effect, a bit for each, by capget(2): /proc need not be there.
pub(crate) fn effective_capabilities() -> Result<u64> {
    /// _LINUX_CAPABILITY_VERSION_3, `struct __user_cap_header_struct` and two of `struct __user_cap_data_struct`.
    const VERSION: u32 = 0x2008_0522;
    let mut header = [VERSION, 0];
    let mut sets = [0u32; 6];
    // SAFETY: a header of 8 bytes, of this thread, and room for the two parts of the three sets.
    let rc = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    let [low, _, _, high, _, _] = sets;
    if rc == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Errno::last()) }
}

/// The user and the group that this process runs as.
pub(crate) fn effective_ids() -> (u32, u32) {
    // SAFETY: plain system calls, which do not fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Whether a program that this thread executes may be given a capability; `None`: the kernel does not say.
pub(crate) fn is_in_bounding_set(capability: u32) -> Option<bool> {
    let nothing: libc::c_ulong = 0;
    // SAFETY: a plain system call.
    match unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), nothing, nothing, nothing) } {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// The kernel's release, as uname(2) has it.
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

/// The address of a netlink socket (`struct sockaddr_nl`) with this port and no groups.
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

/// The port of a netlink socket that is bound (`nl_pid`, netlink(7)).
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

/// The network namespace that a socket is in (`ioctl(SIOCGSKNS)`, Linux 4.9; it needs CAP_NET_ADMIN there, not /proc).
pub(crate) fn network_of(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    /// include/uapi/linux/sockios.h.
    const SIOCGSKNS: u32 = 0x894c;
    // SAFETY: it takes no argument, and gives a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS as _) };
    // SAFETY: it is ours alone.
    if fd >= 0 { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) } else { Err(Errno::last()) }
}

/// `recv(2)` in place of what is in the buffer, as much as it has room for.
pub(crate) fn receive(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> Result<()> {
    buffer.clear();
    // SAFETY: the whole capacity is valid for writes.
    let len = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.capacity(), 0) };
    let len = usize::try_from(len).map_err(|_| Errno::last())?;
    // SAFETY: so many bytes were written, and no more than there is room for.
    unsafe { buffer.set_len(len) };
    Ok(())
}

/// Gives this thread a network namespace of its own.
pub(crate) fn unshare_network() -> Result<()> {
    // SAFETY: a plain system call; it changes this thread alone.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// Puts this thread into a network namespace.
pub(crate) fn enter_network(namespace: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: a plain system call; it changes this thread alone.
    let rc = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if rc == 0 { Ok(()) } else { Err(Errno::last()) }
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

/// Does something in a thread of its own, of this name, and waits for its end; `None`: it panicked.
pub(crate) fn in_a_thread<T: Send>(name: &str, body: impl FnOnce() -> T + Send) -> Result<Option<T>> {
    /// The default of `std`, which would otherwise look for RUST_MIN_STACK in the environment.
    const STACK: usize = 2 << 20;
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(STACK);
    thread::scope(|scope| {
        let worker = builder.spawn_scoped(scope, body)?;
        // Dropping what was thrown could panic again.
        Ok(worker.join().map_err(std::mem::forget).ok())
    })
}

/// Starts the program at a path, with these descriptors for its standard input, output and error, and this environment.
///
/// No signal is blocked or ignored in it, whatever this process does with its own: a program that waits for its
/// children, or stops waiting at an alarm, could not. (`std::process::Command` does that only between `fork` and
/// `exec`, where it panics if the program cannot be started while SIGCHLD is ignored.)
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
    // SAFETY: both are initialised before anything else is done with them, and destroyed at the end; path, arguments
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

/// A descriptor of a child process, which is readable once that has ended. Linux 5.4.
///
/// `None`: it has ended, and its number may be another process's: this process ignores SIGCHLD, or waits for any child
/// elsewhere.
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

/// Endpoints a process.
pub(crate) fn kill(process: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: a plain system call; without a siginfo the signal is as by kill(2).
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

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// The kernel does not say: this process ignores SIGCHLD, or waits for any child elsewhere and was told there.
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

/// `waitid(2)`: what has happened (CLD_*), and the status or the signal.
fn waitid(process: BorrowedFd<'_>, options: i32) -> Result<(i32, i32)> {
    // SAFETY: all zero is valid, and has a status; the call fills it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let rc = libc::waitid(libc::P_PIDFD, process.as_raw_fd() as libc::id_t, &raw mut info, options);
        if rc == 0 { Ok((info.si_code, info.si_status())) } else { Err(Errno::last()) }
    }
}

/// Waits for a child process by its number, when there is no descriptor of it.
pub(crate) fn reap(pid: libc::pid_t) {
    // SAFETY: a plain system call; NULL: the status is not asked for.
    while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } < 0 && errno() == libc::EINTR {}
}

/// Waits until one of these descriptors is ready, or this time has passed; one less than 0 is none. Says which are.
pub(crate) fn poll<const N: usize>(events: [(RawFd, i16); N], time: Duration) -> Result<[bool; N]> {
    let mut polled = events.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    // Rounded up: not to ask again and again in the last millisecond.
    let time = i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: valid for reads and writes of N.
    let rc = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, time) };
    match rc {
        0.. => Ok(polled.map(|polled| polled.revents != 0)),
        _ if errno() == libc::EINTR => Ok([false; N]),
        _ => Err(Errno::last()),
    }
}

/// `write(2)` to a pipe, whose reader may have gone: that is EPIPE, and not SIGPIPE, which would end this process.
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
        // The one that the write has sent to this thread; it is there when the write returns.
        if outcome == Err(Errno(libc::EPIPE)) && !was_pending {
            let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            libc::sigtimedwait(&raw const sigpipe, ptr::null_mut(), &raw const at_once);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        outcome
    }
}
