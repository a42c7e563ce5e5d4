//! Packets as bytes. Each bears a number, its tag, by which all that follows from it is recognized: in the sequence
//! number of a segment, in the data of a datagram.

use std::net::IpAddr;

use crate::case::{DIVERT_PORT, Kind, Packet};

pub fn port_of(tag: u32) -> u16 {
    20000 + (tag % 40000) as u16
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn ip(protocol: u8, src: IpAddr, dst: IpAddr, mut body: Vec<u8>, checksum_at: usize) -> Vec<u8> {
    let len = body.len() as u16;
    let addresses = [octets(src), octets(dst)].concat();
    let pseudo = [&addresses[..], &u32::from(len).to_be_bytes(), &u32::from(protocol).to_be_bytes()].concat();
    let pseudo = if protocol == 1 { Vec::new() } else { pseudo };
    let sum = checksum(&[pseudo, body.clone()].concat());
    body[checksum_at..checksum_at + 2].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    let mut header = match src {
        IpAddr::V4(_) => [&[0x45, 0][..], &(20 + len).to_be_bytes(), &[0, 0, 0x40, 0, 60, protocol, 0, 0]].concat(),
        IpAddr::V6(_) => [&[0x60, 0, 0, 0][..], &len.to_be_bytes(), &[protocol, 60]].concat(),
    };
    header.extend(addresses);
    if src.is_ipv4() {
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    [header, body].concat()
}

fn udp(src: IpAddr, sport: u16, dst: IpAddr, dport: u16, tag: u32) -> Vec<u8> {
    let words = [&tag.to_be_bytes()[..], b"oracle"].concat();
    let len = 8 + words.len() as u16;
    let head = [sport.to_be_bytes(), dport.to_be_bytes(), len.to_be_bytes(), [0; 2]].concat();
    ip(17, src, dst, [head, words].concat(), 6)
}

/// Hop limits of the packets as they are sent, and as they are forwarded. Sockets of the host use others.
const HOPS: [u8; 2] = [60, 59];

/// A packet between two ports. A segment acknowledges the first one of the connection that it answers, or else its own
/// sequence number, so that a reset bears the tag.
pub fn bytes(p: &Packet, sport: u16, dport: u16, tag: u32, answered: Option<u32>) -> Vec<u8> {
    let flags = match p.kind {
        Kind::Syn => 0x02,
        Kind::Ack => 0x10,
        Kind::SynAck => 0x12,
        Kind::Udp => return udp(p.src, sport, p.dst, dport, tag),
        Kind::Error => {
            let quoted = udp(p.dst, DIVERT_PORT, p.src, sport, tag);
            // Host unreachable, or no route.
            let (protocol, kind, code) = if p.dst.is_ipv4() { (1, 3, 1) } else { (58, 1, 0) };
            return ip(protocol, p.src, p.dst, [&[kind, code, 0, 0, 0, 0, 0, 0], &quoted[..]].concat(), 2);
        }
    };
    let sequence = (tag << 12).to_be_bytes();
    let acknowledged = match answered {
        _ if p.kind == Kind::Syn => [0; 4],
        Some(first) => ((first << 12) + 1).to_be_bytes(),
        None => sequence,
    };
    let head = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    ip(6, p.src, p.dst, [&head[..], &sequence, &acknowledged, &[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]].concat(), 16)
}

/// What a packet on the wire says of the packet with a tag.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sign {
    Itself,
    Reset,
    /// What answers the packet is reset.
    AnswerReset,
    /// A connection was accepted, by the socket whose packets have this hop limit.
    Accepted(u8),
    Unreachable,
}

/// The tag and the sign of a packet on the wire.
pub fn read(packet: &[u8]) -> Option<(u32, Sign)> {
    let (protocol, hops, at) = match packet.first()? >> 4 {
        4 => (packet[9], packet[8], 20),
        _ => (*packet.get(6)?, packet[7], 40),
    };
    let body = packet.get(at..)?;
    let word = |at: usize| Some(u32::from_be_bytes(body.get(at..at + 4)?.try_into().ok()?));
    match protocol {
        17 => (body.get(12..18)? == b"oracle".as_slice()).then_some((word(8)?, Sign::Itself)),
        6 => {
            let (seq, ack, flags) = (word(4)?, word(8)?, body.get(13)? & 0x3f);
            if HOPS.contains(&hops) {
                return Some((seq >> 12, Sign::Itself));
            }
            match flags {
                0x04 => Some((seq >> 12, if seq & 0xfff == 1 { Sign::AnswerReset } else { Sign::Reset })),
                0x14 => Some((ack >> 12, Sign::Reset)),
                0x12 => Some((ack >> 12, Sign::Accepted(hops))),
                _ => None,
            }
        }
        1 | 58 => {
            let quoted = body.get(8..)?;
            let (tag, sign) = read_quoted(quoted)?;
            let (&kind, &error) = (body.first()?, body.get(1)?);
            // The errors that the oracle sends: what else is one of the proxy's host.
            let own = kind == 3 && error == 1 && protocol == 1 || kind == 1 && error == 0 && protocol == 58;
            (sign == Sign::Itself).then_some((tag, if own { Sign::Itself } else { Sign::Unreachable }))
        }
        _ => None,
    }
}

fn read_quoted(packet: &[u8]) -> Option<(u32, Sign)> {
    match packet.first()? >> 4 {
        4 | 6 => read(packet),
        _ => None,
    }
}
