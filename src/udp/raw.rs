//! UDP headers (RFC 768) for a raw socket, which is used if the source port is
//! in use.

use std::net::{IpAddr, SocketAddr};

/// Length of a UDP header.
pub(super) const HEADER: usize = 8;

/// Maximum payload, from the length field of the UDP header.
pub(super) const LONGEST: usize = u16::MAX as usize - HEADER;

/// Returns the header of a datagram. The payload must not exceed [`LONGEST`],
/// and both addresses must be of one family.
pub(super) fn header(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> [u8; HEADER] {
    let len = (HEADER + payload.len()) as u16;
    let mut header = [0; HEADER];
    header[0..2].copy_from_slice(&source.port().to_be_bytes());
    header[2..4].copy_from_slice(&destination.port().to_be_bytes());
    header[4..6].copy_from_slice(&len.to_be_bytes());
    let mut sum = Sum(u64::from(libc::IPPROTO_UDP as u16) + u64::from(len));
    for ip in [source.ip(), destination.ip()] {
        match ip {
            IpAddr::V4(ip) => sum.add(&ip.octets()),
            IpAddr::V6(ip) => sum.add(&ip.octets()),
        }
    }
    sum.add(&header);
    sum.add(payload);
    header[6..8].copy_from_slice(&sum.checksum().to_be_bytes());
    header
}

/// Sum of an Internet checksum (RFC 1071).
struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        // The sum of 65,535 bytes in words of four bytes does not overflow. The halves are folded at the end.
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            self.0 += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        }
        let mut last = [0; 4];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        self.0 += u64::from(u32::from_be_bytes(last));
    }

    fn checksum(&self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        match !(sum as u16) {
            // RFC 768: 0 means that there is no checksum.
            0 => 0xffff,
            sum => sum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns the sum of 16-bit words (RFC 1071). Correct data with its checksum has the sum 0xffff.
    fn verify(source: SocketAddr, destination: SocketAddr, header: &[u8], payload: &[u8]) -> u16 {
        let mut bytes = Vec::new();
        for ip in [source.ip(), destination.ip()] {
            match ip {
                IpAddr::V4(ip) => bytes.extend(ip.octets()),
                IpAddr::V6(ip) => bytes.extend(ip.octets()),
            }
        }
        bytes.extend(((HEADER + payload.len()) as u32).to_be_bytes());
        bytes.extend([0, 0, 0, 17]);
        bytes.extend(header);
        bytes.extend(payload);
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        let mut sum: u32 = bytes.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn udp_checksum_is_correct(
            ips: (u128, u128), ports: (u16, u16), v4: bool, payload in proptest::collection::vec(any::<u8>(), 0..300)
        ) {
            let ip = |bits: u128| if v4 { IpAddr::from((bits as u32).to_be_bytes()) } else { IpAddr::from(bits.to_be_bytes()) };
            let (source, destination) = (SocketAddr::new(ip(ips.0), ports.0), SocketAddr::new(ip(ips.1), ports.1));
            let header = header(source, destination, &payload);
            prop_assert_eq!(verify(source, destination, &header, &payload), 0xffff);
            prop_assert_ne!(&header[6..8], &[0, 0]);
        }
    }

    #[test]
    fn udp_checksum_of_longest_datagram_is_correct() {
        let ends: (SocketAddr, SocketAddr) = ("255.255.255.255:65535".parse().unwrap(), "192.0.2.1:1".parse().unwrap());
        let payload = vec![0xff; LONGEST];
        assert_eq!(verify(ends.0, ends.1, &header(ends.0, ends.1, &payload), &payload), 0xffff);
    }
}
