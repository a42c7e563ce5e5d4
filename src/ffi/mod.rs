//! The C library: every `extern "C"` function, and nothing else.
//!
//! Each function decodes its arguments (`arg`), makes one call into the rest
//! of the crate, and hands the result to `guard`, which turns it into a return
//! value, `errno` and [`tp_last_error`]. The comments of this folder are the
//! manual: cbindgen copies them into `include/tproxy.h`. What they say of
//! their pointers is also what makes the `unsafe` functions safe to call.

#![allow(clippy::missing_safety_doc)]

mod arg;
mod check;
mod config;
mod datagrams;
mod diagnosis;
mod guard;
#[cfg(tproxy_shared)]
mod no_backtrace;
#[cfg_attr(not(feature = "check"), path = "without_check.rs")]
mod report;
mod rules;
#[cfg_attr(not(feature = "self-test"), path = "without_self_test.rs")]
mod self_test;
mod sockets;

pub use check::*;
pub use config::*;
pub use datagrams::*;
pub use diagnosis::*;
pub use rules::*;
pub use sockets::*;
