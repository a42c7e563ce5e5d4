//! Runs a program of the system, and returns its exit status and its output.
//!
//! The process may have more privileges than its user (set-user-ID, file capabilities). Therefore the user must not be able to
//! choose or influence the program: it is searched for only in directories that only root can write, and this module sets its
//! environment.
//!
//! `std::process` is not suitable: it panics if a program cannot be started while SIGCHLD is ignored.
//!
//! If the process ignores SIGCHLD, or has a handler or a thread that waits for every child, the exit status is unknown
//! ([`End::Unknown`]). The caller must then check the effect of the program.

use std::ffi::{CStr, CString};
use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::sys::{self, End, Errno, Result};

/// Directories in which programs are searched, in this order.
pub(crate) const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
/// Environment of every program. In the C locale, error messages are not translated.
const ENVIRONMENT: [&CStr; 2] = [c"PATH=/usr/sbin:/sbin:/usr/bin:/bin", c"LC_ALL=C"];

/// Maximum size of a program's output. A program that writes more is killed (EFBIG).
const OUTPUT_MAX: usize = 64 << 20;
/// Maximum size of the standard error that is kept.
const ERRORS_MAX: usize = 4 << 10;
/// Number of bytes that a writable pipe accepts without blocking (PIPE_BUF).
const WRITE_MAX: usize = 4096;
/// Time limit for the end of a killed process.
const LAST_MOMENT: Duration = Duration::from_secs(1);

/// Result of a program.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub end: End,
    pub output: Vec<u8>,
    pub errors: Vec<u8>,
}

/// Runs a program by its name, and waits for its end. After the time limit the program is killed (ETIMEDOUT).
///
/// ENOENT: none of the directories has the program.
pub(crate) fn run(name: &str, arguments: &[&str], input: &str, time: Duration) -> Result<Outcome> {
    let deadline = Instant::now() + time;
    let mut running = Running::start(name, arguments)?;
    let outcome = running.serve(input.as_bytes(), deadline);
    if outcome.is_err() {
        running.kill();
    }
    outcome
}

/// A started program, and this process's ends of the pipes. `None`: the pipe is closed, or the program has ended.
struct Running {
    process: Option<OwnedFd>,
    input: Option<PipeWriter>,
    output: Option<PipeReader>,
    errors: Option<PipeReader>,
}

impl Running {
    fn start(name: &str, arguments: &[&str]) -> Result<Running> {
        let text = |text: &str| CString::new(text).map_err(|_| Errno(libc::EINVAL));
        let mut words = vec![text(name)?];
        for argument in arguments {
            words.push(text(argument)?);
        }
        let words: Vec<&CStr> = words.iter().map(CString::as_c_str).collect();
        let (its_input, input) = std::io::pipe()?;
        let (output, its_output) = std::io::pipe()?;
        let (errors, its_errors) = std::io::pipe()?;
        // If the process has closed its standard descriptors, the pipes get their numbers. Copies get higher numbers, so that
        // none is overwritten in the program before it is duplicated.
        let files = [OwnedFd::from(its_input), its_output.into(), its_errors.into()];
        let [its_input, its_output, its_errors] = &files;
        let files = [its_input.try_clone()?, its_output.try_clone()?, its_errors.try_clone()?];
        let [its_input, its_output, its_errors] = &files;
        let mut pid = Err(Errno(libc::ENOENT));
        for directory in DIRECTORIES {
            let path = text(&format!("{directory}/{name}"))?;
            pid = sys::spawn(&path, &words, &ENVIRONMENT, [its_input.as_fd(), its_output.as_fd(), its_errors.as_fd()]);
            if pid != Err(Errno(libc::ENOENT)) {
                break;
            }
        }
        let pid = pid?;
        match sys::pidfd(pid) {
            Ok(process) => Ok(Running { process, input: Some(input), output: Some(output), errors: Some(errors) }),
            Err(error) => {
                // The program has no input yet. It ends when it reads or writes.
                drop((input, output, errors));
                drop(files);
                sys::reap(pid);
                Err(error)
            }
        }
    }

    /// Writes the input and reads the output until the program has ended.
    fn serve(&mut self, input: &[u8], deadline: Instant) -> Result<Outcome> {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let mut left = input;
        loop {
            if left.is_empty() {
                self.input = None;
            }
            let time = deadline.saturating_duration_since(Instant::now());
            if time.is_zero() {
                return Err(Errno(libc::ETIMEDOUT));
            }
            let [writable, written, complained, ended] = self.ready(time)?;
            if writable && let Some(pipe) = &self.input {
                match sys::write_to_pipe(pipe.as_fd(), left.get(..WRITE_MAX).unwrap_or(left)) {
                    Ok(len) => left = left.get(len..).unwrap_or_default(),
                    Err(Errno(libc::EINTR)) => {}
                    // The program has closed its input.
                    Err(Errno(libc::EPIPE)) => left = &[],
                    Err(error) => return Err(error),
                }
            }
            if written {
                receive(&mut self.output, &mut output)?;
            }
            if complained {
                receive(&mut self.errors, &mut errors)?;
                errors.truncate(ERRORS_MAX);
            }
            if output.len() > OUTPUT_MAX {
                return Err(Errno(libc::EFBIG));
            }
            // At the end of the program, all its output is in the pipes. A child of the program that still has the pipes is
            // not waited for.
            if ended && !written && !complained {
                let end = self.process.as_ref().map_or(Ok(End::Unknown), |process| sys::wait(process.as_fd()))?;
                return Ok(Outcome { end, output, errors });
            }
        }
    }

    /// Waits until the input is writable, output or errors are readable, or the program has ended.
    fn ready(&self, time: Duration) -> Result<[bool; 4]> {
        let time = if self.process.is_some() { time } else { Duration::ZERO };
        let number = |fd: Option<&dyn AsRawFd>| fd.map_or(-1, AsRawFd::as_raw_fd);
        let events = [
            (number(self.input.as_ref().map(|pipe| pipe as _)), libc::POLLOUT),
            (number(self.output.as_ref().map(|pipe| pipe as _)), libc::POLLIN),
            (number(self.errors.as_ref().map(|pipe| pipe as _)), libc::POLLIN),
            (number(self.process.as_ref().map(|process| process as _)), libc::POLLIN),
        ];
        let [writable, written, complained, ended] = sys::poll(events, time)?;
        Ok([writable, written, complained, ended || self.process.is_none()])
    }

    /// Kills a program after a failure. The program may already have ended, which is not an error.
    fn kill(self) {
        let Some(process) = &self.process else { return };
        let process = process.as_fd();
        let _ = sys::kill(process);
        if let Ok([true]) = sys::poll([(process.as_raw_fd(), libc::POLLIN)], LAST_MOMENT) {
            let _ = sys::wait(process);
        }
    }
}

/// Appends the contents of a readable pipe. Closes the pipe at its end.
fn receive(pipe: &mut Option<PipeReader>, received: &mut Vec<u8>) -> Result<()> {
    const ROOM: usize = 16 << 10;
    let Some(reader) = pipe else { return Ok(()) };
    let len = received.len();
    received.try_reserve(ROOM).map_err(|_| Errno(libc::ENOMEM))?;
    received.resize(len + ROOM, 0);
    let outcome = reader.read(received.get_mut(len..).unwrap_or_default());
    received.truncate(len + outcome.as_ref().map_or(0, |read| *read));
    match outcome {
        Ok(0) => *pipe = None,
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_time::limit;

    fn patience() -> Duration {
        limit(60_000)
    }

    fn shell(script: &str, input: &str) -> Outcome {
        run("sh", &["-c", script], input, patience()).unwrap()
    }

    #[test]
    fn program_reads_its_input_and_both_outputs_are_kept() {
        let outcome = shell("cat; echo complaint >&2; exit 3", "some words\n");
        assert_eq!(
            (outcome.end, outcome.output, outcome.errors),
            (End::Exited(3), b"some words\n".into(), b"complaint\n".into())
        );
        assert_eq!(shell("exit 0", "").end, End::Exited(0));
        assert_eq!(shell("kill -KILL $$", "").end, End::Killed(libc::SIGKILL));
    }

    #[test]
    fn program_with_more_data_than_a_pipe_holds_ends() {
        let long = "x".repeat(1 << 20);
        assert_eq!(shell("cat", &long).output, long.as_bytes());
        // The program ends before it reads.
        assert_eq!(shell("exit 0", &long).end, End::Exited(0));
        // The program closes its input and continues.
        assert_eq!(shell("exec <&-; sleep 0.3; echo end", &long).output, b"end\n");
    }

    #[test]
    fn program_with_too_much_output_is_killed() {
        assert_eq!(run("sh", &["-c", "exec cat /dev/zero"], "", patience()).err(), Some(Errno(libc::EFBIG)));
        assert_eq!(shell("head -c 1000000 /dev/zero >&2", "").errors.len(), ERRORS_MAX);
    }

    #[test]
    fn program_that_does_not_end_is_killed_in_time() {
        let begin = Instant::now();
        let name = format!("{}/libtproxy-program-test-{}", std::env::temp_dir().display(), std::process::id());
        let script = format!("echo $$ > {name}; exec sleep 1000");
        assert_eq!(run("sh", &["-c", &script], "", Duration::from_secs(1)).err(), Some(Errno(libc::ETIMEDOUT)));
        let elapsed = begin.elapsed();
        assert!(elapsed >= Duration::from_secs(1) && elapsed < limit(30_000), "{elapsed:?}");
        let pid = std::fs::read_to_string(&name).unwrap();
        std::fs::remove_file(&name).unwrap();
        assert!(!std::path::Path::new(&format!("/proc/{}", pid.trim())).exists(), "it is there still");
    }

    #[test]
    fn program_whose_child_keeps_the_pipes_is_not_waited_for() {
        let begin = Instant::now();
        let outcome = shell(&format!("sleep {} & echo words; exit 1", limit(20_000).as_secs()), "");
        assert_eq!((outcome.end, outcome.output), (End::Exited(1), b"words\n".into()));
        assert!(begin.elapsed() < limit(15_000));
    }

    #[test]
    fn program_missing_is_not_found() {
        for name in ["no-such-program-anywhere", "../sbin/no-such-program"] {
            assert_eq!(run(name, &[], "", patience()).err(), Some(Errno(libc::ENOENT)));
        }
    }

    #[test]
    fn program_environment_is_the_librarys_own() {
        let outcome = shell("exec env", "");
        let mut lines: Vec<String> = String::from_utf8(outcome.output).unwrap().lines().map(str::to_owned).collect();
        // Variables that shells set themselves.
        lines.retain(|line| !line.starts_with("PWD=") && !line.starts_with("_=") && !line.starts_with("SHLVL="));
        lines.sort_unstable();
        assert_eq!(lines, ["LC_ALL=C", "PATH=/usr/sbin:/sbin:/usr/bin:/bin"]);
    }

    #[test]
    fn program_starts_with_no_signal_blocked_or_ignored() {
        let signals = "sed -n 's/^Sig\\(Blk\\|Ign\\):\\s*0*//p' /proc/self/status";
        // The Rust runtime ignores SIGPIPE.
        let outcome = sys::without_signals(|| shell(signals, ""));
        let lines = String::from_utf8(outcome.output).unwrap();
        let masks: Vec<u64> = lines.lines().map(|mask| u64::from_str_radix(mask, 16).unwrap_or(0)).collect();
        // The C library reserves signals 32 and 33.
        assert_eq!(masks.iter().map(|mask| mask & !(3 << 31)).collect::<Vec<_>>(), [0, 0]);
    }
}
