//! Netlink, and no more of it than this library speaks: `wire` knows how
//! messages are laid out, `channel` exchanges them with the kernel.

pub(crate) mod channel;
pub(crate) mod wire;

pub(crate) use channel::{Channel, Failure, FirstRead, Transport};
