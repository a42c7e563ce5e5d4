//! Addresses of interfaces: RTM_NEWADDR. They are only added, never read.

use crate::netlink::uapi::*;
use crate::netlink::wire::Attrs;

/// Size of `struct ifaddrmsg`.
const HEADER: usize = 8;

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address<'a> {
    pub family: u8,
    pub prefix_len: u8,
    /// Of the interface.
    pub index: u32,
    pub local: &'a [u8],
    /// IFA_F_*.
    pub flags: u32,
}

impl Address<'_> {
    /// `struct ifaddrmsg`. The flags are an attribute.
    pub fn header(&self) -> [u8; HEADER] {
        let [i0, i1, i2, i3] = self.index.to_ne_bytes();
        [self.family, self.prefix_len, 0, 0, i0, i1, i2, i3]
    }

    pub fn encode(&self, attrs: &mut Attrs<'_>) {
        attrs.bytes(IFA_LOCAL, self.local);
        attrs.bytes(IFA_ADDRESS, self.local);
        attrs.u32(IFA_FLAGS, self.flags);
    }
}
