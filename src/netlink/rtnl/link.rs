//! Network interfaces: RTM_NEWLINK, RTM_GETLINK.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs, Buffer};

/// LOOPBACK_IFINDEX: `lo` is number 1 in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// A locally administered Ethernet address.
pub(crate) type Mac = [u8; 6];

/// Size of `struct ifinfomsg`.
const HEADER: usize = 16;

/// The header of a dump of all interfaces.
pub(crate) const EVERY: [u8; HEADER] = [0; HEADER];

/// `struct ifinfomsg`: family, type, index, flags, mask of the flags that are changed.
pub(crate) fn header(index: u32, flags: u32, change: u32) -> [u8; HEADER] {
    let ([i0, i1, i2, i3], [f0, f1, f2, f3], [c0, c1, c2, c3]) =
        (index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes());
    [0, 0, 0, 0, i0, i1, i2, i3, f0, f1, f2, f3, c0, c1, c2, c3]
}

/// An interface, as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link<'a> {
    pub index: u32,
    /// IFF_*.
    pub flags: u32,
    /// Without its NUL.
    pub name: &'a [u8],
    /// "bridge", "veth" and others; `None`: hardware.
    pub kind: Option<&'a [u8]>,
    /// Index of the interface that it is a port of.
    pub master: Option<u32>,
    ipv4_conf: Option<&'a [u8]>,
    ipv6_conf: Option<&'a [u8]>,
}

impl<'a> Link<'a> {
    pub fn decode(payload: &'a [u8]) -> Option<Link<'a>> {
        let attrs = payload.get(HEADER..)?;
        let of_family = |family: i32, conf| {
            let families = wire::attribute(attrs, IFLA_AF_SPEC)?;
            wire::attribute(wire::attribute(families, family as u16)?, conf)
        };
        let kind = wire::attribute(attrs, IFLA_LINKINFO).and_then(|info| wire::attribute(info, IFLA_INFO_KIND));
        Some(Link {
            index: wire::u32_at(payload, 4)?,
            flags: wire::u32_at(payload, 8)?,
            name: wire::until_nul(wire::attribute(attrs, IFLA_IFNAME)?),
            kind: kind.map(wire::until_nul),
            master: wire::u32_of(attrs, IFLA_MASTER),
            ipv4_conf: of_family(libc::AF_INET, IFLA_INET_CONF),
            ipv6_conf: of_family(libc::AF_INET6, IFLA_INET6_CONF),
        })
    }

    /// Returns a sysctl of IPv4, by IPV4_DEVCONF_*. `None`: the interface has no IPv4, or the kernel no such sysctl.
    pub fn ipv4_conf(&self, number: usize) -> Option<u32> {
        // The numbers begin at 1.
        wire::u32_at(self.ipv4_conf?, 4 * number.checked_sub(1)?)
    }

    /// Returns a sysctl of IPv6, by DEVCONF_*. `None`: the interface has no IPv6, or the kernel no such sysctl.
    pub fn ipv6_conf(&self, number: usize) -> Option<u32> {
        wire::u32_at(self.ipv6_conf?, 4 * number)
    }
}

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VethEnd<'a> {
    pub name: &'a str,
    pub mac: Mac,
}

impl VethEnd<'_> {
    fn encode(&self, attrs: &mut Attrs<'_>) {
        attrs.string(IFLA_IFNAME, self.name);
        attrs.bytes(IFLA_ADDRESS, &self.mac);
    }

    /// The attributes of a pair whose other end is in the given network namespace.
    pub fn encode_pair(&self, peer: VethEnd<'_>, namespace: BorrowedFd<'_>, attrs: &mut Attrs<'_>) {
        // The peer is described as in a message of its own, without `struct nlmsghdr`.
        let mut message = Buffer::default();
        message.message(0, 0, 0, &header(0, 0, 0), |a| {
            peer.encode(a);
            a.u32(IFLA_NET_NS_FD, namespace.as_raw_fd() as u32);
        });
        let message = message.bytes().ok().and_then(|bytes| wire::messages(bytes).next());
        let payload = message.map(|message| message.payload).unwrap_or_default();
        self.encode(attrs);
        attrs.nest(IFLA_LINKINFO, |a| {
            a.string(IFLA_INFO_KIND, "veth");
            a.nest(IFLA_INFO_DATA, |a| a.bytes(VETH_INFO_PEER, payload));
        });
    }
}
