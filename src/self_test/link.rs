//! Creates interfaces, addresses, routes and neighbor entries, to connect two network namespaces.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use crate::error::{Error, Result};
use crate::netlink::Channel;
use crate::netlink::rtnl::address::Address;
use crate::netlink::rtnl::link::{self, Mac, VethEnd};
use crate::netlink::rtnl::neighbor::Neighbor;
use crate::netlink::rtnl::route::RouteMessage;
use crate::netlink::uapi::*;
use crate::netlink::wire::{Attrs, Buffer};

/// Creates a veth pair: one end in this namespace, the other in the given one.
pub(super) fn add_pair(
    channel: &mut Channel,
    here: VethEnd<'_>,
    there: VethEnd<'_>,
    namespace: BorrowedFd<'_>,
) -> Result<()> {
    let attrs = |a: &mut Attrs<'_>| here.encode_pair(there, namespace, a);
    act(channel, "link add type veth", libc::RTM_NEWLINK, &link::header(0, 0, 0), &attrs)
}

/// Sets an interface up.
pub(super) fn set_up(channel: &mut Channel, index: u32) -> Result<()> {
    let up = libc::IFF_UP as u32;
    // Changes the interface with this index, and creates none.
    act(channel, "link set up", libc::RTM_NEWLINK, &link::header(index, up, up), &|_| {})
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
pub(super) fn add_address(channel: &mut Channel, index: u32, addr: IpAddr) -> Result<()> {
    let octets = octets(addr);
    let address =
        Address { family: family_of(addr), prefix_len: bits_of(addr), index, local: &octets, flags: IFA_F_NODAD };
    act(channel, "address add", libc::RTM_NEWADDR, &address.header(), &|a| address.encode(a))
}

/// Adds a route for one address to an interface, or a default route to a gateway on it.
pub(super) fn add_route(channel: &mut Channel, index: u32, to: IpAddr, everything: bool) -> Result<()> {
    let octets = octets(to);
    let route = RouteMessage {
        family: family_of(to),
        table: libc::RT_TABLE_MAIN.into(),
        protocol: RTPROT_STATIC,
        kind: libc::RTN_UNICAST,
        oif: Some(index),
        ..RouteMessage::default()
    };
    let route = match everything {
        true => RouteMessage { scope: libc::RT_SCOPE_UNIVERSE, flags: RTNH_F_ONLINK, gateway: Some(&octets), ..route },
        false => RouteMessage { scope: libc::RT_SCOPE_LINK, dst_len: bits_of(to), dst: Some(&octets), ..route },
    };
    act(channel, "route add", libc::RTM_NEWROUTE, &route.header(), &|a| route.encode(a))
}

/// Adds a permanent neighbor entry, so that no neighbor discovery is needed.
pub(super) fn add_neighbor(channel: &mut Channel, index: u32, addr: IpAddr, mac: Mac) -> Result<()> {
    let octets = octets(addr);
    let neighbor = Neighbor { family: family_of(addr), index, state: NUD_PERMANENT, dst: &octets, lladdr: mac };
    act(channel, "neighbour add", libc::RTM_NEWNEIGH, &neighbor.header(), &|a| neighbor.encode(a))
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
