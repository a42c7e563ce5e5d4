//! What turns a plan into something that the kernel takes, and (`seen`) reads what it has from whomever.

pub(crate) mod holder;
#[cfg(feature = "iptables")]
pub(crate) mod iptables;
pub(crate) mod nft;
pub(crate) mod route;
pub(crate) mod sockets;
#[cfg(any(feature = "check", feature = "iptables"))]
pub(crate) mod xtables;
