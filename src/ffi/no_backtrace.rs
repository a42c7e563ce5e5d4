//! What is particular to the shared library as `tools/shared.sh` builds it: it is
//! linked into other people's programs, so it brings no more than it needs.
//!
//! Only there. In an executable, or an archive that becomes part of one, these
//! symbols would be everybody's.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};

/// The end of the stack, at once: `_URC_END_OF_STACK`.
///
/// The standard library's panic hook can print a backtrace, and brings all that
/// reads debug information (some 220 KB). No panic of ours is printed
/// (`guard`), so there is nothing to walk: the compiler sees that here, and
/// leaves all of it out. Unwinding itself is libgcc's.
#[allow(non_snake_case)]
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Backtrace(_each: *const c_void, _argument: *mut c_void) -> c_int {
    5
}

// Nobody else's: not exported.
global_asm!(".hidden _Unwind_Backtrace");

// The dynamic loader has it, whether the library says that it needs the loader or not.
#[cfg(target_arch = "x86_64")]
global_asm!(".weak __tls_get_addr");
