//! Reads and writes control data (`cmsg(3)`). Control data that is read is not trusted.

use std::net::SocketAddr;

use crate::address::{self, AddrRef, KernelAddr};

/// `UDP_GRO` and `UDP_SEGMENT`, include/uapi/linux/udp.h.
pub(super) const UDP_GRO: i32 = 104;
pub(super) const UDP_SEGMENT: i32 = 103;

/// Size of a header, and alignment of every message (`CMSG_ALIGN`).
const HEADER: usize = align(size_of::<libc::cmsghdr>());

const fn align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}

/// Control data of a received datagram.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Control {
    /// `IP_ORIGDSTADDR`, `IPV6_ORIGDSTADDR`.
    pub(crate) orig_dst: KernelAddr,
    /// Length of each of the datagrams that were received as one batch
    /// (`UDP_GRO`), except the last, which may be shorter. 0: one datagram.
    pub segment_len: u32,
}

impl Control {
    /// Reads control data as `recvmsg(2)` returns it. Any bytes are accepted:
    /// truncated or invalid messages are ignored.
    ///
    /// ```
    /// use tproxy::udp::Control;
    ///
    /// assert_eq!(Control::parse(&[]).orig_dst(), None);
    /// ```
    pub fn parse(data: &[u8]) -> Control {
        let mut control = Control::default();
        control.read(data);
        control
    }

    /// Returns the original destination.
    pub fn orig_dst(&self) -> Option<SocketAddr> {
        self.orig_dst.get()
    }

    #[inline(always)]
    pub(super) fn read(&mut self, data: &[u8]) {
        let _: Option<()> = find(data, |what, body| {
            match what {
                ORIG_DST_V4 | ORIG_DST_V6 if self.orig_dst.is_none() => {
                    self.orig_dst = destination(what, body).map(KernelAddr::from).unwrap_or_default();
                }
                (libc::SOL_UDP, UDP_GRO) => {
                    let len = body.first_chunk().map_or(0, |len| i32::from_ne_bytes(*len));
                    self.segment_len = u32::try_from(len).unwrap_or(0);
                }
                _ => {}
            }
            None
        });
    }
}

const ORIG_DST_V4: (i32, i32) = (libc::SOL_IP, libc::IP_ORIGDSTADDR);
const ORIG_DST_V6: (i32, i32) = (libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR);

/// Finds only the original destination, and returns it without a copy.
#[inline(always)]
pub(crate) fn orig_dst(data: &[u8]) -> Option<AddrRef<'_>> {
    find(data, |what, body| match what {
        ORIG_DST_V4 | ORIG_DST_V6 => destination(what, body),
        _ => None,
    })
}

/// Returns the address in such a message, unless it is not a valid destination of a packet from a network.
///
/// An IPv4 datagram has `IP_ORIGDSTADDR`, on a dual-stack socket too. A v4-mapped address in `IPV6_ORIGDSTADDR` therefore comes
/// from the IPv6 header that the sender wrote. A program that replied or connected to it would use IPv4, and could reach
/// destinations that the sender cannot reach, such as 127.0.0.1. The same applies to `::` and 0.0.0.0, which `connect(2)`
/// interprets as this host.
#[inline(always)]
fn destination(what: (i32, i32), body: &[u8]) -> Option<AddrRef<'_>> {
    match AddrRef::parse(body)? {
        AddrRef::V6(v6) if what != ORIG_DST_V6 || address::is_unspecified_or_v4_mapped(v6) => None,
        AddrRef::V4(v4) if what != ORIG_DST_V4 || v4[4..] == [0; 4] => None,
        addr => Some(addr),
    }
}

/// Returns the first result of a function of level, type and bytes of each message. A truncated message ends the iteration.
#[inline(always)]
fn find<'a, T>(mut data: &'a [u8], mut make: impl FnMut((i32, i32), &'a [u8]) -> Option<T>) -> Option<T> {
    loop {
        let (len, level, kind) = decode_header(data.first_chunk()?);
        if let Some(made) = make((level, kind), data.get(HEADER..len)?) {
            return Some(made);
        }
        data = data.get(align(len)..)?;
    }
}

fn decode_header(header: &[u8; HEADER]) -> (usize, i32, i32) {
    const LEN: usize = size_of::<usize>();
    let (len, rest) = header.split_first_chunk::<LEN>().unwrap_or((&[0; LEN], &[]));
    let int = |at: usize| rest.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    (usize::from_ne_bytes(*len), int(0), int(4))
}

/// Size of the buffer of [`Outgoing`]: `struct in6_pktinfo` and a segment length.
const OUTGOING: usize = 2 * HEADER + align(size_of::<libc::in6_pktinfo>()) + align(size_of::<u16>());

/// Control data for sending: the source address, and the segment length.
#[repr(C, align(8))]
pub(super) struct Outgoing {
    bytes: [u8; OUTGOING],
    len: usize,
}

impl Outgoing {
    /// `IP_PKTINFO` with `ipi_spec_dst`, or `IPV6_PKTINFO`: the source address, and its scope.
    #[inline(always)]
    pub(super) fn new(source: &KernelAddr, scope: [u8; 4]) -> Outgoing {
        let mut outgoing = Outgoing { bytes: [0; OUTGOING], len: 0 };
        if source.is_ipv4() {
            // struct in_pktinfo: the interface, the source, and a destination that the kernel ignores.
            let body = outgoing.push::<{ size_of::<libc::in_pktinfo>() }>(libc::SOL_IP, libc::IP_PKTINFO);
            body[4..8].copy_from_slice(&source.ipv4());
        } else {
            let body = outgoing.push::<{ size_of::<libc::in6_pktinfo>() }>(libc::SOL_IPV6, libc::IPV6_PKTINFO);
            body[..16].copy_from_slice(&source.ipv6());
            body[16..].copy_from_slice(&scope);
        }
        outgoing
    }

    /// Adds `UDP_SEGMENT`. It may be called once.
    #[inline(always)]
    pub(super) fn add_segment_len(&mut self, len: u16) {
        *self.push(libc::SOL_UDP, UDP_SEGMENT) = len.to_ne_bytes();
    }

    /// Appends a header, and returns the buffer for its `N` bytes.
    #[inline(always)]
    fn push<const N: usize>(&mut self, level: i32, kind: i32) -> &mut [u8; N] {
        const LEN: usize = size_of::<usize>();
        let start = align(self.len);
        let message = &mut self.bytes[start..];
        message[..LEN].copy_from_slice(&(HEADER + N).to_ne_bytes());
        message[LEN..LEN + 4].copy_from_slice(&level.to_ne_bytes());
        message[LEN + 4..LEN + 8].copy_from_slice(&kind.to_ne_bytes());
        self.len = start + HEADER + N;
        message[HEADER..].first_chunk_mut().expect("room for both messages")
    }

    /// Returns the bytes up to the end of the last message, without padding. With padding, an `in6_pktinfo` would not fit the
    /// buffer on the kernel's stack, and the kernel would allocate memory for every datagram (____sys_sendmsg, net/socket.c).
    #[inline(always)]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

    use proptest::prelude::*;

    fn message(level: i32, kind: i32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((HEADER + body.len()).to_ne_bytes());
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(body);
        bytes.resize(align(bytes.len()), 0);
        bytes
    }

    fn address(addr: SocketAddr) -> Vec<u8> {
        let mut body = match addr {
            SocketAddr::V4(_) => (libc::AF_INET as u16).to_ne_bytes().to_vec(),
            SocketAddr::V6(_) => (libc::AF_INET6 as u16).to_ne_bytes().to_vec(),
        };
        body.extend(addr.port().to_be_bytes());
        match addr {
            SocketAddr::V4(v4) => {
                body.extend(v4.ip().octets());
                body.extend([0; 8]);
                message(libc::SOL_IP, libc::IP_ORIGDSTADDR, &body)
            }
            SocketAddr::V6(v6) => {
                body.extend(v6.flowinfo().to_ne_bytes());
                body.extend(v6.ip().octets());
                body.extend(v6.scope_id().to_ne_bytes());
                message(libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR, &body)
            }
        }
    }

    #[test]
    fn control_header_equals_cmsg_macros() {
        // SAFETY: the macros only compute sizes.
        #[allow(unsafe_code)]
        let (len, space) = unsafe { (libc::CMSG_LEN(5), libc::CMSG_SPACE(5)) };
        assert_eq!((len as usize, space as usize), (HEADER + 5, HEADER + align(5)));
    }

    #[test]
    fn control_data_with_other_messages_gives_both() {
        let to: SocketAddr = "[2001:db8::1%7]:53".parse().unwrap();
        let data = [
            message(libc::SOL_IP, libc::IP_TTL, &64i32.to_ne_bytes()),
            message(libc::SOL_UDP, UDP_GRO, &1200i32.to_ne_bytes()),
            address(to),
            address("192.0.2.1:5".parse().unwrap()),
        ]
        .concat();
        assert_eq!(Control::parse(&data), Control { orig_dst: to.into(), segment_len: 1200 });
        assert_eq!(Control::parse(&data).orig_dst(), Some(to));
    }

    #[test]
    fn control_data_with_impossible_ipv6_orig_dst_is_refused() {
        let mapped = |addr: &str| address(SocketAddrV6::new(addr.parse().unwrap(), 53, 0, 0).into());
        for refused in ["::ffff:127.0.0.1", "::ffff:192.0.2.1", "::ffff:0.0.0.0", "::"] {
            assert_eq!(Control::parse(&mapped(refused)), Control::default(), "{refused}");
            assert_eq!(orig_dst(&mapped(refused)), None, "{refused}");
        }
        // Packets to ::1 arrive on lo.
        for taken in ["::1", "2001:db8::1", "::fffe:192.0.2.1"] {
            assert!(orig_dst(&mapped(taken)).is_some(), "{taken}");
        }
        // An address of one family in the message of the other.
        let body = &address("192.0.2.1:5".parse().unwrap())[HEADER..HEADER + 16];
        assert_eq!(orig_dst(&message(libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR, body)), None);
    }

    #[test]
    fn control_data_malformed_gives_nothing() {
        let cut = message(libc::SOL_IP, libc::IP_ORIGDSTADDR, &[2, 0, 0, 53, 192, 0, 2, 1]);
        let strange = message(libc::SOL_IP, libc::IP_ORIGDSTADDR, &[9; 28]);
        let negative = message(libc::SOL_UDP, UDP_GRO, &(-1i32).to_ne_bytes());
        let endless = [0u8; 64];
        for data in [&cut[..], &strange, &negative, &endless, &[], &[1; 7]] {
            assert_eq!(Control::parse(data), Control::default(), "{data:?}");
        }
    }

    proptest! {
        #[test]
        fn control_data_of_any_bytes_does_not_panic(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            Control::parse(&data);
        }

        #[test]
        fn control_data_of_any_lengths_does_not_panic(lens in proptest::collection::vec((0usize..80, 0u8..2), 0..6), cut in 0usize..200) {
            let mut data = Vec::new();
            for (len, family) in lens {
                let mut one = address(if family == 0 { "192.0.2.1:5".parse().unwrap() } else { "[::1]:5".parse().unwrap() });
                one[..size_of::<usize>()].copy_from_slice(&len.to_ne_bytes());
                data.extend(one);
            }
            data.truncate(cut);
            let found = orig_dst(&data).map(KernelAddr::from);
            prop_assert_eq!(found.unwrap_or_default(), Control::parse(&data).orig_dst);
        }

        #[test]
        fn control_data_written_is_read_back(ip: u128, port: u16, scope: u32, v4: bool, segment in 1i32..65536) {
            let to = if v4 {
                SocketAddr::from((Ipv4Addr::from(ip as u32), port))
            } else {
                SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into()
            };
            let data = [address(to), message(libc::SOL_UDP, UDP_GRO, &segment.to_ne_bytes())].concat();
            prop_assert_eq!(Control::parse(&data), Control { orig_dst: to.into(), segment_len: segment as u32 });
            prop_assert_eq!(orig_dst(&data).map(KernelAddr::from), Some(to.into()));
            // Every truncation is read or ignored.
            for len in 0..data.len() {
                let cut = Control::parse(&data[..len]);
                prop_assert!(cut.orig_dst().is_none_or(|found| found == to));
            }
        }

        #[test]
        fn control_data_outgoing_is_whole_messages(v4: u32, v6: u128, scope: u32, segment: u16) {
            let new = |ip: IpAddr| Outgoing::new(&SocketAddr::new(ip, 53).into(), scope.to_ne_bytes());
            let mut outgoing = new(Ipv6Addr::from(v6).into());
            outgoing.add_segment_len(segment);
            let info = [&v6.to_be_bytes()[..], &scope.to_ne_bytes()].concat();
            let expected = [
                message(libc::SOL_IPV6, libc::IPV6_PKTINFO, &info),
                message(libc::SOL_UDP, UDP_SEGMENT, &segment.to_ne_bytes()),
            ];
            prop_assert_eq!(outgoing.bytes(), &expected.concat()[..outgoing.bytes().len()]);
            prop_assert_eq!(outgoing.bytes().len(), align(HEADER + 20) + HEADER + 2);
            let outgoing = new(Ipv6Addr::from(v6).into());
            prop_assert_eq!(outgoing.bytes(), &expected[0][..HEADER + 20]);
            let outgoing = new(Ipv4Addr::from(v4).into());
            let info = [&[0; 4][..], &v4.to_be_bytes(), &[0; 4]].concat();
            prop_assert_eq!(outgoing.bytes(), &message(libc::SOL_IP, libc::IP_PKTINFO, &info)[..HEADER + 12]);
        }
    }
}
