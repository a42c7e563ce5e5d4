//! Socket addresses as bytes, and as the family of a socket has them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// A `struct sockaddr_in` or `sockaddr_in6`, by the family that it names;
/// `None` if it is another's or too short.
#[inline(always)]
pub(crate) fn decode(bytes: &[u8]) -> Option<SocketAddr> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok();
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match family(bytes)? {
        libc::AF_INET if bytes.len() >= size_of::<libc::sockaddr_in>() => {
            Some(SocketAddrV4::new(Ipv4Addr::from(word(4)?), port).into())
        }
        libc::AF_INET6 if bytes.len() >= size_of::<libc::sockaddr_in6>() => {
            let ip: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let (flow, scope) = (u32::from_ne_bytes(word(4)?), u32::from_ne_bytes(word(24)?));
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into())
        }
        _ => None,
    }
}

/// As many bytes as the longest address has.
pub(crate) type Bytes = [u8; size_of::<libc::sockaddr_in6>()];

/// A `struct sockaddr_in` or `sockaddr_in6`; the rest is zero.
pub(crate) fn encode(addr: SocketAddr) -> Bytes {
    let mut bytes = [0; size_of::<libc::sockaddr_in6>()];
    bytes[2..4].copy_from_slice(&addr.port().to_be_bytes());
    match addr {
        SocketAddr::V4(v4) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            bytes[4..8].copy_from_slice(&v4.ip().octets());
        }
        SocketAddr::V6(v6) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            bytes[4..8].copy_from_slice(&v6.flowinfo().to_ne_bytes());
            bytes[8..24].copy_from_slice(&v6.ip().octets());
            bytes[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

/// How many of its bytes are an address.
pub(crate) fn len(addr: SocketAddr) -> usize {
    match addr {
        SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
        SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
    }
}

/// The address family that a socket address names.
pub(crate) fn family(bytes: &[u8]) -> Option<i32> {
    bytes.first_chunk().map(|family| i32::from(u16::from_ne_bytes(*family)))
}

/// The IPv4 address that a v4-mapped one stands for; any other address as it is.
#[inline(always)]
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}

/// An address as a socket has it that gave `other`: an IPv6 socket has IPv4 addresses v4-mapped.
pub(crate) fn as_family_of(other: SocketAddr, addr: SocketAddr) -> SocketAddr {
    match (other, addr) {
        (SocketAddr::V6(_), SocketAddr::V4(v4)) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into(),
        _ => addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn canonical_unmaps_ipv4_and_keeps_the_scope_of_ipv6() {
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:80".parse().unwrap();
        assert_eq!(canonical(mapped), "192.0.2.1:80".parse().unwrap());
        assert_eq!(as_family_of(mapped, canonical(mapped)), mapped);
        let scoped: SocketAddr = "[fe80::1%3]:80".parse().unwrap();
        assert_eq!(canonical(scoped), scoped);
    }

    proptest! {
        #[test]
        fn decodes_what_the_kernel_is_given(ip: u128, port: u16, flow: u32, scope: u32, v4: bool) {
            let addr = if v4 {
                SocketAddr::from((Ipv4Addr::from(ip as u32), port))
            } else {
                SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into()
            };
            let raw = socket2::SockAddr::from(addr);
            // SAFETY: as many bytes as the address has.
            #[allow(unsafe_code)]
            let bytes = unsafe { std::slice::from_raw_parts(raw.as_ptr().cast::<u8>(), raw.len() as usize) };
            prop_assert_eq!(decode(bytes), Some(addr));
            prop_assert_eq!(&encode(addr)[..len(addr)], bytes);
            for len in 0..bytes.len() {
                prop_assert_eq!(decode(&bytes[..len]), None);
            }
        }
    }
}
