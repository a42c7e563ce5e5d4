//! Socket addresses as bytes, and their conversion to the family of a socket.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// Size of the longest address in bytes.
pub(crate) type Bytes = [u8; size_of::<libc::sockaddr_in6>()];

/// An address in the format of system calls: a `struct sockaddr_in`, a
/// `sockaddr_in6`, or none (AF_UNSPEC). The bytes after an IPv4 address are 0.
///
/// The hot paths pass addresses on in this format, without conversion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub(crate) struct KernelAddr(Bytes);

impl KernelAddr {
    pub(crate) const NONE: KernelAddr = KernelAddr([0; size_of::<Bytes>()]);

    /// Reads an address. `None`: its family is neither IPv4 nor IPv6, or it is too short.
    #[inline(always)]
    pub(crate) fn parse(bytes: &[u8]) -> Option<KernelAddr> {
        AddrRef::parse(bytes).map(KernelAddr::from)
    }

    /// Calls a function with a reference to the address, if it is not empty.
    #[inline(always)]
    pub(crate) fn with_ref<T>(&self, body: impl FnOnce(AddrRef<'_>) -> T) -> Option<T> {
        match (self.family(), self.0.first_chunk()) {
            (Some(libc::AF_INET), Some(v4)) => Some(body(AddrRef::V4(v4))),
            (Some(libc::AF_INET6), _) => Some(body(AddrRef::V6(&self.0))),
            _ => None,
        }
    }

    /// Returns the buffer, for a system call to fill. An address of another family is truncated.
    #[inline(always)]
    pub(crate) fn as_mut_bytes(&mut self) -> &mut Bytes {
        &mut self.0
    }

    #[inline(always)]
    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    #[inline(always)]
    pub(crate) fn is_none(&self) -> bool {
        self.family() == Some(libc::AF_UNSPEC)
    }

    #[inline(always)]
    pub(crate) fn family(&self) -> Option<i32> {
        family(&self.0)
    }

    #[inline(always)]
    pub(crate) fn is_ipv4(&self) -> bool {
        self.family() == Some(libc::AF_INET)
    }

    #[inline(always)]
    pub(crate) fn is_ipv6(&self) -> bool {
        self.family() == Some(libc::AF_INET6)
    }

    #[inline(always)]
    pub(crate) fn port(&self) -> u16 {
        u16::from_be_bytes(self.field(2))
    }

    #[inline(always)]
    pub(crate) fn set_port(&mut self, port: u16) {
        self.0[2..4].copy_from_slice(&port.to_be_bytes());
    }

    /// Returns the IPv4 address, if it is one.
    #[inline(always)]
    pub(crate) fn ipv4(&self) -> [u8; 4] {
        self.field(4)
    }

    /// Returns the IPv6 address, if it is one.
    #[inline(always)]
    pub(crate) fn ipv6(&self) -> [u8; 16] {
        self.field(8)
    }

    /// Returns the scope id of an IPv6 address (the interface of a link-local address), in host byte order.
    #[inline(always)]
    pub(crate) fn scope(&self) -> [u8; 4] {
        self.field(24)
    }

    /// Whether it is in 224.0.0.0/4 or ff00::/8. A v4-mapped address is in neither.
    #[inline(always)]
    pub(crate) fn is_multicast(&self) -> bool {
        if self.is_ipv4() { self.0[4] & 0xf0 == 0xe0 } else { self.0[8] == 0xff }
    }

    /// Whether it is 255.255.255.255. The broadcast address of a subnet cannot be recognized.
    pub(crate) fn is_broadcast(&self) -> bool {
        self.is_ipv4() && self.field::<4>(4) == [255; 4]
    }

    /// Whether two addresses are equal. Ignores the bytes after an IPv4 address.
    #[inline(always)]
    pub(crate) fn same_as(&self, other: &KernelAddr) -> bool {
        self.field::<8>(0) == other.field::<8>(0) && (self.is_ipv4() || self == other)
    }

    /// Whether it is an IPv6 address in ::ffff:0:0/96.
    #[inline(always)]
    fn is_v4_mapped(&self) -> bool {
        self.field(8) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]
    }

    /// Whether it is 0.0.0.0, :: or ::ffff:0.0.0.0.
    #[inline(always)]
    pub(crate) fn is_unspecified(&self) -> bool {
        if self.is_ipv4() {
            self.field::<4>(4) == [0; 4]
        } else {
            self.field::<4>(20) == [0; 4] && (self.is_v4_mapped() || self.field::<12>(8) == [0; 12])
        }
    }

    /// Converts a v4-mapped address to IPv4.
    #[inline(always)]
    pub(crate) fn make_canonical(&mut self) {
        if !self.is_ipv4() && self.is_v4_mapped() {
            let (port, ip) = (self.field::<2>(2), self.field::<4>(20));
            *self = KernelAddr::NONE;
            self.0[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            self.0[2..4].copy_from_slice(&port);
            self.0[4..8].copy_from_slice(&ip);
        }
    }

    /// Converts it to the format of a socket of a family: an IPv6 socket uses v4-mapped addresses.
    #[inline(always)]
    pub(crate) fn map_to_family(&mut self, family: Option<i32>) {
        if family == Some(libc::AF_INET6) && self.is_ipv4() {
            *self = KernelAddr(v4_mapped(&self.field(0)));
        }
    }

    /// Returns the address, if it is not empty.
    #[inline(always)]
    pub(crate) fn get(self) -> Option<SocketAddr> {
        (self.is_ipv4() || self.is_ipv6()).then(|| self.into())
    }

    /// Returns the struct, with the size of its family.
    #[inline(always)]
    pub(crate) fn as_bytes(&self) -> &[u8] {
        if self.is_ipv4() { &self.0[..size_of::<libc::sockaddr_in>()] } else { &self.0 }
    }
}

/// A reference to the bytes of an address, whose length is that of its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddrRef<'a> {
    /// Without the unused rest of the struct, `sin_zero`.
    V4(&'a [u8; 8]),
    V6(&'a Bytes),
}

impl<'a> AddrRef<'a> {
    /// Reads the family of the bytes. `None`: it is neither IPv4 nor IPv6, or there are too few bytes.
    #[inline(always)]
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<AddrRef<'a>> {
        match family(bytes)? {
            libc::AF_INET if bytes.len() >= size_of::<libc::sockaddr_in>() => bytes.first_chunk().map(AddrRef::V4),
            libc::AF_INET6 => bytes.first_chunk().map(AddrRef::V6),
            _ => None,
        }
    }

    /// Calls a function with the address in the format of a socket of a family: an IPv6 socket uses v4-mapped addresses.
    #[inline(always)]
    pub(crate) fn of_family<T>(self, family: Option<i32>, body: impl FnOnce(AddrRef<'_>) -> T) -> T {
        match self {
            AddrRef::V4(v4) if family == Some(libc::AF_INET6) => body(AddrRef::V6(&v4_mapped(v4))),
            // Repeated so that `body` is specialized per variant.
            AddrRef::V4(v4) => body(AddrRef::V4(v4)),
            AddrRef::V6(v6) => body(AddrRef::V6(v6)),
        }
    }
}

impl From<AddrRef<'_>> for KernelAddr {
    #[inline(always)]
    fn from(addr: AddrRef<'_>) -> KernelAddr {
        match addr {
            AddrRef::V4(v4) => {
                let mut addr = KernelAddr::NONE;
                addr.0[..v4.len()].copy_from_slice(v4);
                addr
            }
            AddrRef::V6(v6) => KernelAddr(*v6),
        }
    }
}

/// Returns the v4-mapped address of an IPv4 address.
#[inline(always)]
fn v4_mapped(v4: &[u8; 8]) -> Bytes {
    let mut bytes = [0; size_of::<Bytes>()];
    bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
    bytes[2..4].copy_from_slice(&v4[2..4]);
    bytes[18..20].copy_from_slice(&[0xff; 2]);
    bytes[20..24].copy_from_slice(&v4[4..]);
    bytes
}

impl From<KernelAddr> for SocketAddr {
    #[inline(always)]
    fn from(addr: KernelAddr) -> SocketAddr {
        if addr.is_ipv4() {
            return SocketAddrV4::new(Ipv4Addr::from(addr.field::<4>(4)), addr.port()).into();
        }
        let (flow, scope) = (u32::from_ne_bytes(addr.field(4)), u32::from_ne_bytes(addr.field(24)));
        SocketAddrV6::new(Ipv6Addr::from(addr.field::<16>(8)), addr.port(), flow, scope).into()
    }
}

impl From<SocketAddr> for KernelAddr {
    fn from(addr: SocketAddr) -> KernelAddr {
        let KernelAddr(mut bytes) = KernelAddr::NONE;
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
        bytes[2..4].copy_from_slice(&addr.port().to_be_bytes());
        KernelAddr(bytes)
    }
}

/// Whether it is `::` or in ::ffff:0:0/96. Socket calls interpret these as the wildcard address and as IPv4. In a packet they mean
/// neither.
#[inline(always)]
pub(crate) fn is_unspecified_or_v4_mapped(v6: &Bytes) -> bool {
    let addr = KernelAddr(*v6);
    addr.is_v4_mapped() || addr.field::<16>(8) == [0; 16]
}

/// Returns the address family of a socket address.
pub(crate) fn family(bytes: &[u8]) -> Option<i32> {
    bytes.first_chunk().map(|family| i32::from(u16::from_ne_bytes(*family)))
}

/// Converts a v4-mapped address to IPv4. Other addresses are unchanged.
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

/// The IPv4 address that a v4-mapped address (::ffff:a.b.c.d) stands for; any other address unchanged.
///
/// An IPv6 socket that also serves IPv4 reports IPv4 addresses v4-mapped.
///
/// ```
/// let addr = "[::ffff:192.0.2.1]:80".parse()?;
/// assert_eq!(tproxy::unmap_addr(addr), "192.0.2.1:80".parse()?);
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
pub fn unmap_addr(addr: SocketAddr) -> SocketAddr {
    canonical(addr)
}

/// Converts an address to the format of the socket that returned `other`: an IPv6 socket uses v4-mapped addresses.
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
    fn canonical_unmaps_ipv4_and_keeps_ipv6_scope() {
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:80".parse().unwrap();
        assert_eq!(canonical(mapped), "192.0.2.1:80".parse().unwrap());
        assert_eq!(as_family_of(mapped, canonical(mapped)), mapped);
        let scoped: SocketAddr = "[fe80::1%3]:80".parse().unwrap();
        assert_eq!(canonical(scoped), scoped);
    }

    #[test]
    fn unspecified_address_of_either_family_is_any() {
        let unspecified = |text: &str| KernelAddr::from(text.parse::<SocketAddr>().unwrap()).is_unspecified();
        for text in ["0.0.0.0:80", "[::]:80", "[::ffff:0.0.0.0]:80"] {
            assert!(unspecified(text), "{text}");
        }
        for text in ["0.0.0.1:0", "[::1]:0", "[::ffff:0.0.0.1]:0", "[1::]:0", "[0:0:0:0:0:1::]:0"] {
            assert!(!unspecified(text), "{text}");
        }
    }

    #[test]
    fn same_as_ignores_padding_of_ipv4() {
        let one = |text: &str| KernelAddr::from(text.parse::<SocketAddr>().unwrap());
        let (v4, v6) = (one("192.0.2.1:80"), one("[2001:db8::1%3]:80"));
        for (addr, others) in [
            (v4, ["192.0.2.2:80", "192.0.2.1:81", "[::ffff:192.0.2.1]:80"]),
            (v6, ["[2001:db8::2%3]:80", "[2001:db8::1%3]:81", "[2001:db8::1%4]:80"]),
        ] {
            assert!(addr.same_as(&addr));
            for other in others {
                assert!(!addr.same_as(&one(other)), "{addr:?} {other}");
            }
        }
        let mut followed = v4;
        followed.0[8..].fill(0xaa);
        assert!(v4.same_as(&followed) && followed.same_as(&v4));
    }

    proptest! {
        #[test]
        fn canonical_of_raw_address_equals_decoded(ip: u128, port: u16, high in 0usize..5, v4: bool) {
            let ip = [ip, ip & 0xffff_ffff, 0xffff << 32 | ip & 0xffff_ffff, 0, ip | 0xff << 120][high];
            let addr: SocketAddr = if v4 { (Ipv4Addr::from(ip as u32), port).into() } else { (Ipv6Addr::from(ip), port).into() };
            let mut changed = KernelAddr::from(addr);
            changed.make_canonical();
            prop_assert_eq!(SocketAddr::from(changed), canonical(addr));
            prop_assert_eq!(changed.is_unspecified(), addr.ip().to_canonical().is_unspecified());
            prop_assert_eq!(changed.is_multicast(), addr.ip().to_canonical().is_multicast());
            for other in ["192.0.2.1:1".parse().unwrap(), "[::1]:1".parse().unwrap()] {
                let mut taken = KernelAddr::from(addr);
                taken.map_to_family(KernelAddr::from(other).family());
                prop_assert_eq!(taken.get(), Some(as_family_of(other, addr)));
            }
            changed.set_port(7);
            prop_assert_eq!(SocketAddr::from(changed), SocketAddr::new(addr.ip().to_canonical(), 7));
        }

        #[test]
        fn address_encoded_is_decoded_unchanged(ip: u128, port: u16, flow: u32, scope: u32, v4: bool) {
            let addr = if v4 {
                SocketAddr::from((Ipv4Addr::from(ip as u32), port))
            } else {
                SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into()
            };
            let (raw, kernels) = (socket2::SockAddr::from(addr), KernelAddr::from(addr));
            // SAFETY: the slice has the length of the address.
            #[allow(unsafe_code)]
            let bytes = unsafe { std::slice::from_raw_parts(raw.as_ptr().cast::<u8>(), raw.len() as usize) };
            prop_assert_eq!(KernelAddr::parse(bytes).and_then(KernelAddr::get), Some(addr));
            prop_assert_eq!((kernels.as_bytes(), kernels.port()), (bytes, port));
            for len in 0..bytes.len() {
                prop_assert_eq!(KernelAddr::parse(&bytes[..len]), None);
            }
        }
    }
}
