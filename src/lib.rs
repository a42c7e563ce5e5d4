//! Transparent proxying on Linux.
//!
//! A proxy that intercepts HTTP between two other hosts, and connects to the server from the client's own address:
//!
//! ```no_run
//! use std::net::{TcpListener, TcpStream};
//! use tproxy::rules::{Config, Listener, Mode, Rules};
//! use tproxy::socket::{ConnectOptions, ListenOptions};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let listener: TcpListener = tproxy::socket::listen("[::]:3129".parse()?, -1, ListenOptions::default())?.into();
//!     let rules = Rules::install(&Config {
//!         listeners: vec![Listener::from_fd(&listener, Mode::Tproxy)?],
//!         ports: vec![80.into(), (8000..=8100).into()],
//!         ..Config::default()
//!     })?;
//!     for client in listener.incoming() {
//!         let client = client?;
//!         let server = tproxy::orig_dst(&client)?;
//!         let server = tproxy::socket::connect_from(client.peer_addr()?, server, ConnectOptions::default())?;
//!         relay(client, server.into());
//!     }
//!     Ok(rules.remove()?)
//! }
//! # fn relay(client: TcpStream, server: TcpStream) {}
//! ```
//!
//! It needs CAP_NET_ADMIN in the user namespace that owns the network namespace; `unshare -rn` gives that to anybody.
//! `examples/proxy.rs` is such a proxy with tokio.
//!
//! * [`socket`]: sockets that bind, listen on and connect from addresses that
//!   the host does not own.
//! * [`orig_dst()`]: where an intercepted connection was going; [`accept`] tells it along with the connection.
//! * [`rules`]: the nf_tables rules and the policy routing that bring the
//!   packets to such sockets.
//! * [`udp`]: datagrams with their original destinations, and replies from
//!   any source.
//! * [`check`]: what on this host breaks all that, and what fixes it.
//! * [`self_test()`]: whether rules work here, by probes through a network of their own.
//! * [`ffi`]: the same as a C library, `include/tproxy.h`.
//!
//! Arrows run one way: `ffi` decodes what C gave into the types of the modules
//! above; `rules` turns a validated config into a plan, `backend` turns the plan
//! into messages, `netlink` sends them. Whatever fails is one [`Error`].

#![cfg(target_os = "linux")]
#![deny(unsafe_code)]

mod accept;
mod address;
mod backend;
pub mod check;
#[allow(unsafe_code)]
mod errno;
pub mod error;
#[allow(unsafe_code)]
pub mod ffi;
mod memory;
mod model;
mod name;
mod netlink;
mod orig_dst;
mod plan;
mod prefix;
mod process;
mod program;
pub mod rules;
mod self_test;
pub mod socket;
#[allow(unsafe_code)]
mod sys;
pub mod udp;

pub use accept::{AcceptOptions, Accepted, accept};
pub use address::unmap_addr;
pub use error::{Error, Result};
pub use orig_dst::orig_dst;
pub use self_test::self_test;
pub use socket2;

/// The version of this library, as in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
