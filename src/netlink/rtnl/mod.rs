//! The messages of rtnetlink(7): a file for each kind, which encodes and decodes it.
//!
//! A message is a header of the kind and attributes. Addresses are bytes in network order, numbers are native-endian.

pub(crate) mod address;
pub(crate) mod link;
pub(crate) mod neighbor;
pub(crate) mod route;
pub(crate) mod rule;

#[cfg(test)]
mod tests;
