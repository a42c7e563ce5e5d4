//! Listening sockets, by sock_diag(7). Reading them needs no privilege.

use std::net::IpAddr;

use crate::model::{Family, Protocol};
use crate::netlink::uapi::*;
use crate::netlink::{Channel, wire};
use crate::sys;

/// A socket that receives connections or datagrams for a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    pub family: Family,
    pub protocol: Protocol,
    /// `None`: the wildcard address.
    pub addr: Option<IpAddr>,
    pub port: u16,
    /// IPV6_V6ONLY: the socket receives no IPv4.
    pub v6_only: bool,
    /// `None`: unknown (Linux before 5.10).
    pub transparent: Option<bool>,
    /// Index of the interface that the socket is bound to, or 0.
    pub interface: u32,
    /// Connections that wait to be accepted, and the limit of their number.
    pub waiting: u32,
    pub backlog: u32,
}

impl Listener {
    /// Whether the socket receives packets of a family.
    pub fn serves(&self, family: Family) -> bool {
        let mapped = |addr: IpAddr| matches!(addr, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        match (self.family, family) {
            (Family::V6, Family::V4) => !self.v6_only && self.addr.is_none_or(mapped),
            (Family::V6, Family::V6) => !self.addr.is_some_and(mapped),
            (own, other) => own == other,
        }
    }
}

/// Sockets that receive connections or datagrams for a port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Listeners {
    pub found: Vec<Listener>,
    /// Protocols whose sockets were not all read, with the reason.
    pub cut: Vec<(Protocol, String)>,
    /// Number of sockets that the kernel reported.
    pub objects: usize,
}

impl Listeners {
    /// Whether every listener of a protocol is known.
    pub fn knows(&self, protocol: Protocol) -> bool {
        self.cut.iter().all(|(cut, _)| *cut != protocol)
    }
}

/// Maximum number of sockets that are read per family and protocol. A user may have thousands of unrelated sockets.
const SOCKETS_MAX: usize = 10_000;

/// Reads every listening TCP socket and every bound, unconnected UDP socket.
pub(crate) fn listeners() -> sys::Result<Listeners> {
    /// Bits of socket states. An unconnected UDP socket has TCP_CLOSE.
    const LISTEN: u32 = 1 << TCP_LISTEN;
    const CLOSE: u32 = 1 << TCP_CLOSE;
    let mut listeners = Listeners::default();
    for family in [Family::V4, Family::V6] {
        for (protocol, states) in [(Protocol::Tcp, LISTEN), (Protocol::Udp, CLOSE)] {
            // struct inet_diag_req_v2: family, protocol, extensions, states, and no particular socket.
            let mut request = [0; 56];
            request[0] = family.nfproto();
            request[1] = protocol.number();
            request[4..8].copy_from_slice(&states.to_ne_bytes());
            let mut channel = Channel::open_wide(libc::NETLINK_SOCK_DIAG)?;
            match channel
                .read_first(SOCK_DIAG_BY_FAMILY, &request, &|_| {}, SOCKETS_MAX, &|payload| parse(protocol, payload))
            {
                Ok(read) => {
                    listeners.found.extend(read.found);
                    listeners.objects += read.objects;
                    if !read.all {
                        listeners.cut.push((protocol, format!("only the first {} were read", read.objects)));
                    }
                }
                // ENOENT: the kernel has no module for them (tcp_diag, udp_diag).
                Err(e) => listeners.cut.push((protocol, e.to_string())),
            }
        }
    }
    Ok(listeners)
}

/// `struct inet_diag_msg` and its attributes.
fn parse(protocol: Protocol, payload: &[u8]) -> Option<Listener> {
    /// IP_TRANSPARENT in the first byte of `struct inet_diag_sockopt`.
    const TRANSPARENT: u8 = 1 << 5;
    const LEN: usize = 72;
    let family = match i32::from(*payload.first()?) {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        _ => return None,
    };
    let port = u16::from_be_bytes(payload.get(4..6)?.try_into().ok()?);
    let source = payload.get(8..24)?;
    let addr = match family {
        Family::V4 => IpAddr::from(<[u8; 4]>::try_from(source.get(..4)?).ok()?),
        Family::V6 => IpAddr::from(<[u8; 16]>::try_from(source).ok()?),
    };
    let attrs = payload.get(LEN..)?;
    let flag = |kind| wire::u8_of(attrs, kind);
    Some(Listener {
        family,
        protocol,
        addr: (!addr.is_unspecified()).then_some(addr),
        port,
        v6_only: flag(INET_DIAG_SKV6ONLY) == Some(1),
        transparent: flag(INET_DIAG_SOCKOPT).map(|options| options & TRANSPARENT != 0),
        interface: wire::u32_at(payload, 40)?,
        waiting: wire::u32_at(payload, 56)?,
        backlog: wire::u32_at(payload, 60)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn socket_dump_of_any_bytes_does_not_panic(payload in wire::odd::answer(72)) {
            if let Some(listener) = parse(Protocol::Tcp, &payload) {
                listener.serves(Family::V4);
            }
        }
    }
}
