//! What went wrong, and which library this is.

use std::ffi::{CStr, c_char};

use super::guard;

/// The sentence of this thread's last failing call: the step, why it failed,
/// and what cures it where that is known.
///
/// Never NULL; empty before the first failure. UTF-8, for people, and not to
/// be parsed: errno is for programs. Valid until this thread's next failing
/// call, and until the thread ends. A call that succeeds does not change it.
#[unsafe(no_mangle)]
pub extern "C" fn tp_last_error() -> *const c_char {
    guard::last_error()
}

/// The version of the library, "MAJOR.MINOR.PATCH". Static, never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn tp_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}
