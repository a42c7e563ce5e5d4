//! The variable `errno` of this thread, and errno values as errors of system calls.

use std::fmt;
use std::io;

/// Returns this thread's `errno`.
pub(crate) fn errno() -> i32 {
    // SAFETY: __errno_location gives a valid pointer to this thread's errno.
    unsafe { *libc::__errno_location() }
}

/// Sets this thread's `errno`.
pub(crate) fn set_errno(value: i32) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value }
}

/// The error of a system call. `Display` uses the text of the C library, and allocates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub i32);

/// Result of a system call.
pub(crate) type Result<T> = std::result::Result<T, Errno>;

impl Errno {
    /// Returns the error of the last call.
    pub(crate) fn last() -> Errno {
        Errno(errno())
    }
}

impl fmt::Display for Errno {
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

/// An [`std::io::Error`] may own a box, so every function that drops one would need drop code.
impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// A saved `errno` and its address. The address is looked up once, at the start of a call, and used again at its end.
pub(crate) struct SavedErrno {
    place: *mut i32,
    value: i32,
}

impl SavedErrno {
    #[inline(always)]
    pub(crate) fn errno() -> SavedErrno {
        // SAFETY: a valid pointer to this thread's errno.
        let place = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        SavedErrno { place, value: unsafe { *place } }
    }

    #[inline(always)]
    pub(crate) fn restore(&self) {
        // SAFETY: as above; a raw pointer keeps the struct in its thread.
        unsafe { *self.place = self.value }
    }
}
