//! Datagrams: receives them with their original destinations, and sends
//! replies from any source.
//!
//! * [`receive_from`] and [`receive()`]: one datagram, or a batch.
//! * [`Control`]: the original destination from control data that a program
//!   has received with `recvmsg(2)`.
//! * [`Replier`]: sends replies from any address and port.
//!
//! Only `message` contains the structs of the system calls, only `storage` the layout of a datagram's memory, and only
//! `control` the layout of control data.

mod control;
mod datagram;
#[allow(unsafe_code)]
mod message;
mod pool;
mod raw;
mod receive;
mod replier;
#[allow(unsafe_code)]
mod storage;

pub use control::Control;
pub(crate) use control::orig_dst;
pub use datagram::Datagram;
pub(crate) use message::ControlBuffer;
pub(crate) use receive::receive_one;
pub use receive::{Received, receive, receive_from};
pub use replier::{Replier, ReplierOptions, ReplierStats};

/// Maximum number of datagrams per system call. With larger batches, the cost of
/// the call itself is negligible.
pub const BATCH: usize = 64;
