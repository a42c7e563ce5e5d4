//! Reads the state of the kernel that affects intercepted packets, whichever program created it. Changes nothing.
//!
//! `filter` has the types of packet filter rules, which `nft` and `xtables` read. `routing` and `sockets` read the rest. Nothing here
//! diagnoses. Invalid data is ignored and never causes a panic: the rules belong to other programs, and their format may be of
//! another version. Other programs may have any number of rules: the amount that is read is bounded, and a reached bound is reported.

pub(crate) mod filter;
pub(crate) mod nft;
pub(crate) mod routing;
pub(crate) mod xtables;
