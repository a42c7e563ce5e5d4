//! Types that rules and backends share.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::name;

/// How rules treat what they select, as their configuration says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// How packets reach the listeners.
    pub mode: Mode,
    /// Traffic that this host sends is intercepted too.
    pub local_output: bool,
    /// Traffic is forwarded while no listener exists.
    pub fail_open: bool,
    /// Packets addressed directly to a listener are accepted.
    pub allow_direct: bool,
    /// Intercepted packets are exempt from connection tracking.
    pub notrack: bool,
    /// The rules stay when their process ends.
    pub persist: bool,
    /// Only TCP packets that begin a connection are intercepted.
    pub new_only: bool,
    /// Replies of this host's servers are delivered to transparent sockets.
    pub local_servers: bool,
}

impl Options {
    /// As bits: TP_RULES_*.
    pub(crate) fn bits(self) -> u32 {
        let mode = match self.mode {
            Mode::Tproxy => 0,
            Mode::DivertOnly => 1,
            Mode::Redirect => 2,
        };
        let flags = [
            self.local_output,
            self.fail_open,
            self.allow_direct,
            self.notrack,
            self.persist,
            self.new_only,
            self.local_servers,
        ];
        flags.into_iter().zip(2..).fold(mode, |bits, (flag, number)| bits | u32::from(flag) << number)
    }

    /// `None`: there are bits that mean nothing here.
    pub(crate) fn from_bits(bits: u32) -> Option<Options> {
        let flag = |number: u32| bits & 1 << number != 0;
        let options = Options {
            mode: match bits & 3 {
                0 => Mode::Tproxy,
                1 => Mode::DivertOnly,
                2 => Mode::Redirect,
                _ => return None,
            },
            local_output: flag(2),
            fail_open: flag(3),
            allow_direct: flag(4),
            notrack: flag(5),
            persist: flag(6),
            new_only: flag(7),
            local_servers: flag(8),
        };
        (options.bits() == bits).then_some(options)
    }
}

/// A set of address families.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// AF_INET and AF_INET6, which are also NFPROTO_IPV4 and NFPROTO_IPV6.
    pub(crate) fn nfproto(self) -> u8 {
        match self {
            Family::V4 => libc::AF_INET as u8,
            Family::V6 => libc::AF_INET6 as u8,
        }
    }

    /// Returns the protocol number of its ICMP.
    pub(crate) fn icmp_number(self) -> u8 {
        match self {
            Family::V4 => libc::IPPROTO_ICMP as u8,
            Family::V6 => libc::IPPROTO_ICMPV6 as u8,
        }
    }

    /// Returns the name of its ICMP in `nft` and `iptables`.
    pub(crate) fn icmp_name(self) -> &'static str {
        match self {
            Family::V4 => "icmp",
            Family::V6 => "ipv6-icmp",
        }
    }
}

impl Family {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Families {
    /// Only IPv4.
    pub const V4: Families = Families { v4: true, v6: false };
    /// Only IPv6.
    pub const V6: Families = Families { v4: false, v6: true };
    /// IPv4 and IPv6.
    pub const ALL: Families = Families { v4: true, v6: true };

    pub(crate) fn is_empty(self) -> bool {
        !self.v4 && !self.v6
    }

    pub(crate) fn contains(self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = Family> {
        self.list().iter().copied()
    }

    #[inline(never)]
    fn list(self) -> &'static [Family] {
        match (self.v4, self.v6) {
            (true, true) => &[Family::V4, Family::V6],
            (true, false) => &[Family::V4],
            (false, true) => &[Family::V6],
            (false, false) => &[],
        }
    }

    /// Returns the family, if the set has exactly one.
    pub(crate) fn only(self) -> Option<Family> {
        match self {
            Families { v4: true, v6: false } => Some(Family::V4),
            Families { v4: false, v6: true } => Some(Family::V6),
            _ => None,
        }
    }
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => libc::IPPROTO_TCP as u8,
            Protocol::Udp => libc::IPPROTO_UDP as u8,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// A set of transport protocols.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Protocols {
    /// TCP.
    pub tcp: bool,
    /// UDP.
    pub udp: bool,
}

impl Protocols {
    /// Only TCP.
    pub const TCP: Protocols = Protocols { tcp: true, udp: false };
    /// Only UDP.
    pub const UDP: Protocols = Protocols { tcp: false, udp: true };
    /// TCP and UDP.
    pub const ALL: Protocols = Protocols { tcp: true, udp: true };

    pub(crate) fn is_empty(self) -> bool {
        !self.tcp && !self.udp
    }

    pub(crate) fn contains(self, protocol: Protocol) -> bool {
        match protocol {
            Protocol::Tcp => self.tcp,
            Protocol::Udp => self.udp,
        }
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = Protocol> {
        self.list().iter().copied()
    }

    #[inline(never)]
    fn list(self) -> &'static [Protocol] {
        match (self.tcp, self.udp) {
            (true, true) => &[Protocol::Tcp, Protocol::Udp],
            (true, false) => &[Protocol::Tcp],
            (false, true) => &[Protocol::Udp],
            (false, false) => &[],
        }
    }
}

/// Kernel interface by which rules are installed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// nf_tables if the kernel has the required features, otherwise iptables.
    #[default]
    Auto,
    /// nf_tables, over netlink.
    Nft,
    /// `iptables-restore`.
    Iptables,
}

/// The way in which packets are delivered to the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// TPROXY: the packets are delivered unchanged to a transparent listener.
    #[default]
    Tproxy,
    /// NAT redirection: the packets are translated and delivered to an ordinary listener.
    Redirect,
    /// Only packets of existing transparent sockets are delivered. Nothing is intercepted.
    DivertOnly,
}

/// Range of ports, including both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port.
    pub last: u16,
}

impl From<u16> for PortRange {
    /// Creates a range of one port.
    fn from(port: u16) -> PortRange {
        PortRange { first: port, last: port }
    }
}

impl From<RangeInclusive<u16>> for PortRange {
    /// ```
    /// use tproxy::rules::PortRange;
    ///
    /// assert_eq!(PortRange::from(8000..=8100).to_string(), "8000-8100");
    /// assert_eq!(PortRange::from(80).to_string(), "80");
    /// ```
    fn from(ports: RangeInclusive<u16>) -> PortRange {
        PortRange { first: *ports.start(), last: *ports.end() }
    }
}

impl FromStr for PortRange {
    type Err = Error;

    /// Parses `PORT` or `FIRST-LAST`.
    ///
    /// ```
    /// use tproxy::rules::PortRange;
    ///
    /// assert_eq!("80".parse::<PortRange>()?, PortRange::from(80));
    /// assert_eq!("8000-8100".parse::<PortRange>()?, PortRange::from(8000..=8100));
    /// assert!("8100-8000".parse::<PortRange>().is_err());
    /// # Ok::<(), tproxy::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<PortRange> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
        match (port(first), port(last)) {
            (Some(first), Some(last)) if 1 <= first && first <= last => Ok(PortRange { first, last }),
            _ => {
                Err(Error::invalid_with(format_args!("{} is neither a port nor a range of ports", name::quoted(text))))
            }
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortRange { first, last } if first == last => write!(f, "{first}"),
            PortRange { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

/// Ports of one protocol or of every protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProtocolPorts {
    pub range: PortRange,
    /// `None`: every protocol.
    pub protocols: Option<Protocols>,
}

impl From<PortRange> for ProtocolPorts {
    fn from(range: PortRange) -> ProtocolPorts {
        ProtocolPorts { range, protocols: None }
    }
}

/// Range of user or group numbers, including both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct IdRange {
    /// Lowest number.
    pub first: u32,
    /// Highest number.
    pub last: u32,
}

impl From<u32> for IdRange {
    /// Creates a range of one number.
    fn from(id: u32) -> IdRange {
        IdRange { first: id, last: id }
    }
}

impl From<RangeInclusive<u32>> for IdRange {
    /// ```
    /// use tproxy::rules::IdRange;
    ///
    /// assert_eq!(IdRange::from(1000..=1999).to_string(), "1000-1999");
    /// ```
    fn from(ids: RangeInclusive<u32>) -> IdRange {
        IdRange { first: *ids.start(), last: *ids.end() }
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IdRange { first, last } if first == last => write!(f, "{first}"),
            IdRange { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

/// Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    /// As `02:00:00:00:00:01`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = Error;

    /// Parses six bytes in hexadecimal, separated by colons.
    ///
    /// ```
    /// use tproxy::rules::MacAddr;
    ///
    /// assert_eq!("02:00:00:00:00:0a".parse::<MacAddr>()?, MacAddr([2, 0, 0, 0, 0, 10]));
    /// assert!("02:00:00:00:00".parse::<MacAddr>().is_err());
    /// # Ok::<(), tproxy::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<MacAddr> {
        let byte = |text: &str| {
            let digits = matches!(text.len(), 1..=2) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(text, 16).ok().filter(|_| digits)
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        bytes.map(MacAddr).ok_or_else(|| {
            Error::invalid_with(format_args!(
                "{} is not an Ethernet address such as 02:00:00:00:00:01",
                name::quoted(text)
            ))
        })
    }
}

/// Packet mark that routes a packet to a local socket.
///
/// ```
/// use tproxy::rules::Mark;
///
/// assert_eq!(Mark::from(0x10), Mark { value: 0x10, mask: 0xffff_ffff });
/// assert_eq!(Mark::DEFAULT.to_string(), "0x2000/0x3000");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Value of the bits in `mask`.
    pub value: u32,
    /// Bits of the mark that the rules use. Other bits are preserved.
    pub mask: u32,
}

impl Mark {
    /// Bit 13, in a field of two bits (12 and 13). Bit 12 marks this host's own packets.
    ///
    /// All programs of a host share the 32 bits of the mark. According to the
    /// documentation and sources of the projects, these are in use: 0x4000 and 0x8000 by
    /// Kubernetes (kube-proxy's masquerade and drop), 0xffff0000 by Calico
    /// (its default mask) and by Cilium (identities), 0x0f00 by Cilium (its
    /// magic mark; 0x1e00 with its WireGuard, 0xf000 with its IPsec),
    /// 0xff0000 by Tailscale, 0x80 by the AWS VPC CNI, 0xca6c (bits 2, 3, 5,
    /// 6, 9, 11, 14, 15) by wg-quick for WireGuard, 0x539 and 0x53a (bits 0,
    /// 1, 3, 4, 5, 8, 10) by Istio. Scripts use small numbers (1, 2, 0x10).
    /// Bit 13 is free, and bit 12 if Cilium does not encrypt.
    pub const DEFAULT: Mark = Mark { value: 0x2000, mask: 0x3000 };
}

impl From<u32> for Mark {
    /// Creates a mark with all 32 bits.
    fn from(value: u32) -> Mark {
        Mark { value, mask: u32::MAX }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

impl Mark {
    /// Returns another value in the same bits, which marks this host's own packets while they are looped back. `None`: the mask has
    /// no other bit.
    pub(crate) fn second(self) -> Option<Mark> {
        let free = self.mask & !self.value;
        (free != 0).then_some(Mark { value: free & free.wrapping_neg(), mask: self.mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_range_is_shown_as_one_port_or_two() {
        assert_eq!(PortRange { first: 80, last: 80 }.to_string(), "80");
        assert_eq!(PortRange { first: 80, last: 81 }.to_string(), "80-81");
    }
}
