//! Child processes: started, waited for and ended, whatever the program does with its signals.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use super::{Errno, Result, errno};

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
