//! Code that the tests share, by subject. Each name is reachable as `common::NAME`, those for datagrams and for programs of
//! iptables as `common::datagrams::NAME` and `common::iptables::NAME`.

#![allow(dead_code, unused_imports, reason = "each test binary uses a part of it")]

#[cfg(not(all(feature = "capi", feature = "check", feature = "self-test", feature = "iptables")))]
compile_error!(
    "these tests need all features of the crate; with fewer, there are the unit tests (`cargo test --lib`) and tests/c/small.c"
);

mod client;
mod config;
mod counters;
pub mod datagrams;
mod findings;
pub mod iptables;
mod lab;
mod namespace;
pub mod process;
mod proxy;
mod random;
mod requirement;
mod rules;
mod server;
mod sockets;
mod time;

pub use client::*;
pub use config::*;
pub use counters::*;
pub use datagrams::{receive_datagram, receiver};
pub use findings::*;
pub use lab::*;
pub use namespace::*;
pub use proxy::*;
pub use random::*;
pub use requirement::*;
pub use rules::*;
pub use server::*;
pub use sockets::*;
pub use time::*;
