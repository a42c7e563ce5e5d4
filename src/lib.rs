//! Transparent proxying on Linux.
//!
//! * [`socket`]: sockets that bind, listen on and connect from addresses that
//!   the host does not own.
//! * [`orig_dst`]: where an intercepted connection was going.
//!
//! Whatever fails is one [`Error`].

#![cfg(target_os = "linux")]
#![deny(unsafe_code)]

pub mod error;
mod netlink;
pub mod orig_dst;
pub mod socket;
#[allow(unsafe_code)]
mod sys;

pub use error::{Error, Result};
pub use orig_dst::orig_dst;

/// The version of this library, as in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
