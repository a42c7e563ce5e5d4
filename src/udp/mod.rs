//! Datagrams: received with their original destinations, answered from any
//! source.
//!
//! * [`receive_from`] and [`receive()`]: one datagram, or a batch.
//! * [`Control`]: the original destination out of control data that a program
//!   received by itself.
//! * [`Replier`]: answers from any address and port.
//!
//! `message` alone knows how the kernel is handed all that, `storage` what is in a datagram's memory; `control` alone
//! knows how control data are laid out.

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
pub(crate) use message::ControlRoom;
pub(crate) use receive::receive_one;
pub use receive::{Received, receive, receive_from};
pub use replier::{Replier, ReplierOptions, ReplierStats};

/// How many datagrams a system call takes at most. With more, the call's own
/// cost is no longer to be seen in a datagram's.
pub const BATCH: usize = 64;
