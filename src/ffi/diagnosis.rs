//! What went wrong, and which library this is.

use std::ffi::{CStr, c_char};

use super::guard;

/// Returns a message that describes the last failed call of this thread.
///
/// The message names the failed operation, the reason and, if known, a suggested fix. It is UTF-8 and
/// human-readable; programs should use errno and not parse it.
///
/// @return message, never NULL; empty before the first failure.
///
/// The pointer is valid until the next failing call of this thread, or until the thread ends. A call that
/// succeeds does not change the message.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub extern "C" fn tp_last_error() -> *const c_char {
    guard::last_error()
}

/// Returns the version of the library.
///
/// @return "MAJOR.MINOR.PATCH", a static string, never NULL.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub extern "C" fn tp_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}
