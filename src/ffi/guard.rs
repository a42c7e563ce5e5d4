//! The way out of every call: return value, errno, last error, and no panic.

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int};
use std::fmt::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::name::Escaping;
use crate::sys;

/// Long enough for a step, its command, the kernel's words and the cure.
const CAPACITY: usize = 2048;

thread_local! {
    static LAST_ERROR: RefCell<Text> = const { RefCell::new(Text { bytes: [0; CAPACITY], len: 0 }) };
    static IN_CALL: Cell<bool> = const { Cell::new(false) };
}

/// The sentence of this thread's last failing call, NUL-terminated in place,
/// so that setting it allocates nothing.
#[repr(C)]
struct Text {
    bytes: [u8; CAPACITY],
    len: usize,
}

impl Write for Text {
    /// What does not fit is cut, between characters.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = CAPACITY - 1 - self.len;
        let end = (0..=room.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let text = text.get(..end).unwrap_or_default();
        for (place, byte) in self.bytes[self.len..].iter_mut().zip(text.bytes()) {
            *place = byte;
        }
        self.len += text.len();
        Ok(())
    }
}

/// The sentence of this thread's last failing call; it stays until the next.
pub(super) fn last_error() -> *const c_char {
    // The text is the struct's first field.
    LAST_ERROR.with(RefCell::as_ptr).cast()
}

/// No NUL ends the sentence early, and nothing in it misleads a terminal.
fn remember(error: &dyn fmt::Display) {
    LAST_ERROR.with(|text| {
        if let Ok(mut text) = text.try_borrow_mut() {
            text.len = 0;
            let _ = write!(Escaping(&mut *text), "{error}");
            let end = text.len;
            text.bytes[end] = 0;
        }
    });
}

/// Keeps `pthread_cancel(3)` from ending this thread in the middle of a call: unwinding through it would abort the
/// program. A cancellation that comes meanwhile is acted on at the program's next cancellation point. No system call.
struct Uncancelled {
    before: c_int,
}

impl Uncancelled {
    #[inline(always)]
    fn new() -> Uncancelled {
        let mut before = 0;
        // SAFETY: before is valid for writes; the state is one of the two that there are.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut before) };
        Uncancelled { before }
    }
}

impl Drop for Uncancelled {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the state that there was.
        unsafe { pthread_setcancelstate(self.before, std::ptr::null_mut()) };
    }
}

/// pthread.h, of glibc and musl.
const PTHREAD_CANCEL_DISABLE: c_int = 1;
unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// Runs the body of a call: its value and the caller's errno on success, else
/// -1, errno (last of all) and the sentence.
pub(super) fn guard(mut body: impl FnMut() -> Result<c_int>) -> c_int {
    guarded(&mut body)
}

/// One for all bodies: what is around them is not made for each.
fn guarded(body: &mut dyn FnMut() -> Result<c_int>) -> c_int {
    let _uncancelled = Uncancelled::new();
    let errno = sys::SavedErrno::errno();
    unless_panicked(quietly(|| {
        answer(|| {
            let value = body()?;
            errno.restore();
            Ok(value)
        })
    }))
}

/// The same for a call whose instructions are counted. Its body leaves errno
/// alone when it succeeds.
#[inline(always)]
pub(super) fn guard_hot<T: From<i8>>(body: impl FnOnce() -> Result<T>) -> T {
    let _uncancelled = Uncancelled::new();
    guard_uncancellable(body)
}

/// The same for a call that has no cancellation point in it (pthreads(7)), not even where it fails.
#[inline(always)]
pub(super) fn guard_uncancellable<T: From<i8>>(body: impl FnOnce() -> Result<T>) -> T {
    unless_panicked(caught(|| answer(body)))
}

#[inline(always)]
fn answer<T: From<i8>>(body: impl FnOnce() -> Result<T>) -> T {
    // For the test of what becomes of a panic (tests/c/panics.c).
    #[cfg(tproxy_panics)]
    assert_ne!(sys::errno(), 0x7470);
    body().unwrap_or_else(|error| {
        fail(error);
        T::from(-1)
    })
}

#[inline(always)]
fn unless_panicked<T: From<i8>>(answer: std::result::Result<T, ()>) -> T {
    answer.unwrap_or_else(|()| {
        fail(Error::new(libc::ENOTRECOVERABLE, "an error in libtproxy itself (a panic); please report it"));
        T::from(-1)
    })
}

/// errno is written last.
#[cold]
#[inline(never)]
fn fail(error: Error) {
    let errno = error.errno();
    remember(&error);
    drop(error);
    sys::set_errno(errno);
}

/// What reported panics before us. Setting it allocates nothing: a program's
/// first call costs no more system calls than the others.
type Hook = Box<dyn Fn(&panic::PanicHookInfo<'_>) + Sync + Send>;
static PREVIOUS_HOOK: OnceLock<Hook> = OnceLock::new();
static HOOK_IS_SET: AtomicBool = AtomicBool::new(false);

/// Where this library's source is, as panics name it: hot calls do not say that they are one.
const OWN_SOURCE: &str = match file!().split_at_checked(file!().len() - "ffi/guard.rs".len()) {
    Some((directory, _)) => directory,
    None => file!(),
};

fn is_own(info: &panic::PanicHookInfo<'_>) -> bool {
    // Tests in this library's files report their own panics.
    let by_place = || !cfg!(test) && info.location().is_some_and(|at| at.file().starts_with(OWN_SOURCE));
    IN_CALL.get() || by_place()
}

fn silence_own_panics() -> Hook {
    let previous = panic::take_hook();
    panic::set_hook(Box::new(|info| match PREVIOUS_HOOK.get() {
        Some(previous) if !is_own(info) => previous(info),
        _ => {}
    }));
    previous
}

/// From the first call on. The hook cannot be changed by a thread that is panicking. No thread waits for another that
/// changes it: in a forked child that one would not be there.
#[cold]
#[inline(never)]
fn set_hook() {
    if !std::thread::panicking() && !HOOK_IS_SET.swap(true, Ordering::AcqRel) {
        let _ = PREVIOUS_HOOK.set(silence_own_panics());
    }
}

/// Catches a panic, and keeps it off the host program's standard error.
fn quietly<T>(body: impl FnOnce() -> T) -> std::result::Result<T, ()> {
    let outer = IN_CALL.replace(true);
    let outcome = caught(body);
    IN_CALL.set(outer);
    outcome
}

#[inline(always)]
fn caught<T>(body: impl FnOnce() -> T) -> std::result::Result<T, ()> {
    if !HOOK_IS_SET.load(Ordering::Relaxed) {
        set_hook();
    }
    // Dropping what was thrown could panic again.
    panic::catch_unwind(AssertUnwindSafe(body)).map_err(std::mem::forget)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn sentence() -> String {
        // SAFETY: last_error gives a NUL-terminated text that lives as long as this thread.
        unsafe { CStr::from_ptr(last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn guard_on_success_keeps_errno_and_message() {
        assert_eq!(guard(|| Err(Error::invalid("first"))), -1);
        sys::set_errno(libc::ENOTTY);
        let value = guard(|| {
            sys::set_errno(libc::EINPROGRESS);
            Ok(7)
        });
        assert_eq!((value, sys::errno(), sentence().as_str()), (7, libc::ENOTTY, "first"));
    }

    #[test]
    fn guard_on_panic_is_enotrecoverable() {
        assert_eq!(guard(|| panic!("not to be seen")), -1);
        assert_eq!(sys::errno(), libc::ENOTRECOVERABLE);
        assert!(sentence().contains("panic"));
    }

    #[test]
    fn last_error_too_long_is_truncated_between_characters() {
        guard(|| Err(Error::invalid_with(format_args!("{}", "é\0".repeat(CAPACITY)))));
        let sentence = sentence();
        assert!(sentence.len() < CAPACITY && sentence.len() > CAPACITY - 5);
        assert!(sentence.starts_with("é\\u{0}é\\u{0}"));
    }

    #[test]
    fn last_error_before_any_failure_is_empty() {
        std::thread::spawn(|| assert_eq!(sentence(), "")).join().unwrap();
    }
}
