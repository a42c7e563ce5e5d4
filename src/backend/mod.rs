//! What turns a plan into something that the kernel takes.

pub(crate) mod iptables;
pub(crate) mod nft;
pub(crate) mod route;
