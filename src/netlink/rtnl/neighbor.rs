//! Neighbor entries: RTM_NEWNEIGH. They are only added, never read.

use super::link::Mac;
use crate::netlink::uapi::*;
use crate::netlink::wire::Attrs;

/// The link address of a neighbor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Neighbor<'a> {
    pub family: u8,
    /// Of the interface.
    pub index: u32,
    /// NUD_*.
    pub state: u16,
    pub dst: &'a [u8],
    pub lladdr: Mac,
}

impl Neighbor<'_> {
    /// `struct ndmsg`.
    pub fn header(&self) -> [u8; 12] {
        let ([i0, i1, i2, i3], [s0, s1]) = (self.index.to_ne_bytes(), self.state.to_ne_bytes());
        [self.family, 0, 0, 0, i0, i1, i2, i3, s0, s1, 0, 0]
    }

    pub fn encode(&self, attrs: &mut Attrs<'_>) {
        attrs.bytes(NDA_DST, self.dst);
        attrs.bytes(NDA_LLADDR, &self.lladdr);
    }
}
