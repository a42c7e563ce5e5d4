//! Creates interfaces, addresses, routes and neighbor entries, to connect two network namespaces.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{Error, Result};
use crate::netlink::Channel;
use crate::netlink::wire::{Attrs, Buffer};

/// A locally administered Ethernet address.
pub(crate) type Mac = [u8; 6];

// IFLA_*, IFA_*, RTA_*, NDA_* of `linux/if_link.h`, `if_addr.h`, `rtnetlink.h`, `neighbour.h`.
const LINK_ADDRESS: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_INFO: u16 = 18;
const LINK_NAMESPACE_FD: u16 = 28;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const VETH_PEER: u16 = 1;
const ADDRESS_ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ADDRESS_FLAGS: u16 = 8;
const ROUTE_DESTINATION: u16 = 1;
const ROUTE_OIF: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const NEIGHBOUR_DESTINATION: u16 = 1;
const NEIGHBOUR_LINK_ADDRESS: u16 = 2;

/// One end of a pair. `struct ifinfomsg` is all zero.
fn end(attrs: &mut Attrs<'_>, name: &str, mac: Mac) {
    attrs.string(LINK_NAME, name);
    attrs.bytes(LINK_ADDRESS, &mac);
}

/// Creates a veth pair: one end in this namespace, the other in another.
pub(crate) fn add_pair(channel: &mut Channel, here: (&str, Mac), there: (&str, Mac, BorrowedFd<'_>)) -> Result<()> {
    /// Size of `struct nlmsghdr`, which the attribute of the peer does not have.
    const MESSAGE_HEADER: usize = 16;
    let mut peer = Buffer::default();
    peer.message(0, 0, 0, &[0; 16], |a| {
        end(a, there.0, there.1);
        a.u32(LINK_NAMESPACE_FD, there.2.as_raw_fd() as u32);
    });
    let peer = peer.bytes().ok().and_then(|bytes| bytes.get(MESSAGE_HEADER..)).unwrap_or_default();
    act(channel, "link add type veth", libc::RTM_NEWLINK, &[0; 16], &|a| {
        end(a, here.0, here.1);
        a.nest(LINK_INFO, |a| {
            a.string(INFO_KIND, "veth");
            a.nest(INFO_DATA, |a| a.bytes(VETH_PEER, peer));
        });
    })
}

/// Sets an interface up.
pub(crate) fn set_up(channel: &mut Channel, index: u32) -> Result<()> {
    let up = (libc::IFF_UP as u32).to_ne_bytes();
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&up);
    header[12..16].copy_from_slice(&up);
    // Changes the interface with this index, and creates none.
    act(channel, "link set up", libc::RTM_NEWLINK, &header, &|_| {})
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn family_of(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

fn bits_of(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

/// Adds a full-length address to an interface. It is usable immediately, without duplicate address detection.
pub(crate) fn add_address(channel: &mut Channel, index: u32, addr: IpAddr) -> Result<()> {
    /// IFA_F_NODAD.
    const AT_ONCE: u32 = 2;
    let [a, b, c, d] = index.to_ne_bytes();
    let header = [family_of(addr), bits_of(addr), 0, 0, a, b, c, d];
    act(channel, "address add", libc::RTM_NEWADDR, &header, &|attrs| {
        attrs.bytes(ADDRESS_LOCAL, &octets(addr));
        attrs.bytes(ADDRESS_ADDRESS, &octets(addr));
        attrs.u32(ADDRESS_FLAGS, AT_ONCE);
    })
}

/// Adds a route for one address to an interface, or a default route to a gateway on it.
pub(crate) fn add_route(channel: &mut Channel, index: u32, to: IpAddr, everything: bool) -> Result<()> {
    /// RTPROT_STATIC, and RTNH_F_ONLINK: the gateway is a neighbor, regardless of routes.
    const STATIC: u8 = 4;
    const ON_LINK: u32 = 4;
    let [f0, f1, f2, f3] = if everything { ON_LINK } else { 0 }.to_ne_bytes();
    let (len, scope) = if everything { (0, libc::RT_SCOPE_UNIVERSE) } else { (bits_of(to), libc::RT_SCOPE_LINK) };
    let header = [family_of(to), len, 0, 0, libc::RT_TABLE_MAIN, STATIC, scope, libc::RTN_UNICAST, f0, f1, f2, f3];
    act(channel, "route add", libc::RTM_NEWROUTE, &header, &|attrs| {
        attrs.u32(ROUTE_OIF, index);
        attrs.bytes(if everything { ROUTE_GATEWAY } else { ROUTE_DESTINATION }, &octets(to));
    })
}

/// Adds a permanent neighbor entry, so that no neighbor discovery is needed.
pub(crate) fn add_neighbour(channel: &mut Channel, index: u32, addr: IpAddr, mac: Mac) -> Result<()> {
    /// NUD_PERMANENT.
    const PERMANENT: u16 = 0x80;
    let [a, b, c, d] = index.to_ne_bytes();
    let [s0, s1] = PERMANENT.to_ne_bytes();
    let header = [family_of(addr), 0, 0, 0, a, b, c, d, s0, s1, 0, 0];
    act(channel, "neighbour add", libc::RTM_NEWNEIGH, &header, &|attrs| {
        attrs.bytes(NEIGHBOUR_DESTINATION, &octets(addr));
        attrs.bytes(NEIGHBOUR_LINK_ADDRESS, &mac);
    })
}

/// Sends one request, which the kernel must acknowledge.
fn act(channel: &mut Channel, what: &str, kind: u16, header: &[u8], attrs: &dyn Fn(&mut Attrs<'_>)) -> Result<()> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE) as u16;
    let seq = channel.next_seq();
    let mut message = Buffer::default();
    message.message(kind, flags, seq, header, attrs);
    let answers = channel.exchange(&message, seq).map_err(|e| Error::io(format_args!("ip {what}"), e))?;
    match answers.failures.first() {
        Some(failure) => Err(Error::with(failure.errno, format_args!("ip {what}: {failure}"))),
        None if answers.acked => Ok(()),
        None => Err(Error::with(libc::EIO, format_args!("ip {what}: the kernel did not acknowledge"))),
    }
}
