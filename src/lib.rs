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
//!     let listener: TcpListener = tproxy::socket::listen("[::]:3129".parse()?, ListenOptions::new())?.into();
//!     let rules = Rules::install(&Config::new([Listener::from_fd(&listener, Mode::Tproxy)?]).ports([80]))?;
//!     for client in listener.incoming() {
//!         let client = client?;
//!         let server = tproxy::orig_dst(&client)?;
//!         let server = tproxy::socket::connect_from(client.peer_addr()?, server, ConnectOptions::new())?;
//!         relay(client, server.into());
//!     }
//!     Ok(rules.remove()?)
//! }
//! # fn relay(client: TcpStream, server: TcpStream) {}
//! ```
//!
//! It needs CAP_NET_ADMIN in the user namespace that owns the network namespace; `unshare -rn` gives it to any user.
//! `examples/proxy.rs` is such a proxy with tokio.
//!
//! Datagrams, each with its original destination, and replies that come from there:
//!
//! ```no_run
//! use tproxy::rules::{Config, Listener, Mode, Rules};
//! use tproxy::socket2::{Domain, Type};
//! use tproxy::udp::{Datagram, Replier, ReplierOptions};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let socket = tproxy::socket::socket(Domain::IPV6, Type::DGRAM, None)?;
//!     socket.bind(&"[::]:3053".parse::<std::net::SocketAddr>()?.into())?;
//!     let _rules = Rules::install(&Config::new([Listener::from_fd(&socket, Mode::Tproxy)?]).ports([53]))?;
//!     let mut memory = vec![[0; 2048]; 64];
//!     let mut datagrams: Vec<Datagram<'_>> = memory.iter_mut().map(|bytes| Datagram::new(bytes)).collect();
//!     let mut replier = Replier::new(ReplierOptions::new())?;
//!     loop {
//!         let received = tproxy::udp::receive(&socket, &mut datagrams, 0)?;
//!         for datagram in &mut datagrams[..received] {
//!             println!("{:?} asks {:?}", datagram.client(), datagram.orig_dst());
//!         }
//!         replier.reply(&mut datagrams[..received]); // an echo
//!     }
//! }
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`socket`] | sockets that bind, listen on and connect from addresses that this host does not own |
//! | [`orig_dst()`], [`accept()`] | the original destination of a connection, for an accepted socket or together with accept |
//! | [`rules`] | the nf_tables rules and the policy routing that deliver packets to such sockets |
//! | [`udp`] | datagrams with their original destinations, and replies from any source |
//! | [`check`] | causes that break transparent proxying on this host, and the commands that fix them (feature `check`) |
//! | [`self_test()`] | tests rules on this kernel, by probes through a temporary network namespace (feature `self-test`) |
//! | [`ffi`] | the functions of the C library, `include/tproxy.h` (feature `capi`) |
//!
//! A call that fails returns an [`Error`] with an errno and a message, and leaves nothing behind: no descriptor, rule or
//! route. Functions take any descriptor ([`AsFd`](std::os::fd::AsFd)) and return [`socket2::Socket`], which converts into
//! the types of [`std::net`]. Values of [`Rules`](rules::Rules) may be used by several threads at a time.
//!
//! Modules depend on each other in one direction: `ffi` decodes C values into the types of the modules above; `rules` turns
//! a config into a plan, `backend` turns the plan into messages, `netlink` sends them.

#![cfg(target_os = "linux")]
#![deny(unsafe_code)]
// Without a feature, what only that feature calls is dead code, which the compiler leaves out. The build with every feature
// is the one that has no dead code.
#![cfg_attr(
    not(all(feature = "capi", feature = "check", feature = "self-test", feature = "iptables")),
    allow(dead_code, unused_imports)
)]

mod accept;
mod address;
mod backend;
mod cgroup;
#[cfg(feature = "check")]
pub mod check;
#[allow(unsafe_code)]
mod errno;
pub mod error;
#[cfg(feature = "capi")]
#[allow(unsafe_code)]
pub mod ffi;
mod memory;
mod model;
mod name;
mod netlink;
mod orig_dst;
mod plan;
mod ports;
mod prefix;
mod process;
#[cfg(any(feature = "check", feature = "iptables"))]
mod program;
pub mod rules;
#[cfg(feature = "self-test")]
mod self_test;
pub mod socket;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
#[allow(dead_code)]
#[path = "../tests/common/time.rs"]
mod test_time;
pub mod udp;

pub use accept::{AcceptOptions, Accepted, accept};
pub use address::unmap_addr;
pub use error::{Error, Result};
pub use orig_dst::orig_dst;
#[cfg(feature = "self-test")]
pub use self_test::self_test;
pub use socket2;

/// The version of this library, as in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
