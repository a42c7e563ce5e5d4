//! Netlink, as much of it as this library uses: `wire` lays out messages, `uapi` has the kernel's numbers, `rtnl` has
//! the messages of rtnetlink, `channel` exchanges messages with the kernel.

pub(crate) mod channel;
pub(crate) mod rtnl;
pub(crate) mod uapi;
pub(crate) mod wire;

pub(crate) use channel::{Channel, Failure, FirstRead, Transport};
