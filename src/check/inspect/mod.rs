//! What the kernel holds, whoever made it, as far as it decides over the packets that are intercepted: read only.
//!
//! `filter` has the words; `nft` and `xtables` read rules into them, `routing` and `sockets` the rest. Nothing here
//! judges. What makes no sense is left out, never a panic: these are other programs' rules, in other versions' words.
//! Other programs may have any number of them: what is read is bounded, and a bound that was reached is told.

pub(crate) mod filter;
pub(crate) mod nft;
pub(crate) mod routing;
pub(crate) mod sockets;
pub(crate) mod xtables;
