//! The words that the rules and what carries them out have in common.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::prefix::PrefixSet;

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

    /// The number of its control message protocol.
    pub(crate) fn icmp_number(self) -> u8 {
        match self {
            Family::V4 => libc::IPPROTO_ICMP as u8,
            Family::V6 => libc::IPPROTO_ICMPV6 as u8,
        }
    }

    /// What `nft` and `iptables` call that protocol.
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
    /// Both.
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

    /// The family, if there is but one.
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
pub struct Protocols {
    /// TCP.
    pub tcp: bool,
    /// UDP.
    pub udp: bool,
}

impl Protocols {
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

/// What the kernel is told the rules by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backend {
    /// nf_tables if the kernel has what is needed, else iptables.
    #[default]
    Auto,
    /// nf_tables, over netlink.
    Nft,
    /// `iptables-restore`.
    Iptables,
}

/// How packets reach the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// TPROXY: unchanged, to a transparent listener.
    #[default]
    Tproxy,
    /// NAT redirection: translated, to an ordinary listener.
    Redirect,
    /// Nothing is intercepted; only transparent sockets get what is for them.
    DivertOnly,
}

/// A range of ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl From<u16> for PortRange {
    /// One port.
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

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortRange { first, last } if first == last => write!(f, "{first}"),
            PortRange { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

/// The bits of a packet's mark that say that the packet is for a local socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mark {
    /// What our bits are set to.
    pub value: u32,
    /// Which bits are ours; the others are left as they are.
    pub mask: u32,
}

impl Mark {
    /// Bit 13, of a field of two (12 and 13; the other is for the host's own traffic).
    ///
    /// A mark has 32 bits that everything on a host shares. Taken are, by
    /// their projects' documentation and sources: 0x4000 and 0x8000 by
    /// Kubernetes (kube-proxy's masquerade and drop), 0xffff0000 by Calico
    /// (its default mask) and by Cilium (identities), 0x0f00 by Cilium (its
    /// magic mark; 0x1e00 with its WireGuard, 0xf000 with its IPsec),
    /// 0xff0000 by Tailscale, 0x80 by the AWS VPC CNI, 0xca6c (bits 2, 3, 5,
    /// 6, 9, 11, 14, 15) by wg-quick for WireGuard, 0x539 and 0x53a (bits 0,
    /// 1, 3, 4, 5, 8, 10) by Istio. Scripts use small numbers (1, 2, 0x10).
    /// That leaves bit 13, and bit 12 where Cilium does not encrypt.
    pub const DEFAULT: Mark = Mark { value: 0x2000, mask: 0x3000 };
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

impl Mark {
    /// Another value in the same bits: that of the host's own packets on their way round. `None` if the bits have
    /// no other.
    pub(crate) fn second(self) -> Option<Mark> {
        let free = self.mask & !self.value;
        (free != 0).then_some(Mark { value: free & free.wrapping_neg(), mask: self.mask })
    }
}

/// A config that can be carried out, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub name: String,
    pub mode: Mode,
    /// The mark of packets for local sockets.
    pub mark: Mark,
    /// The mark of the host's own packets that are to be intercepted; `None`: none are.
    pub output_mark: Option<Mark>,
    pub families: Families,
    pub protocols: Protocols,
    /// Who gets what is intercepted; none with [`Mode::DivertOnly`].
    pub intercepts: Vec<Intercept>,
    /// Connections made straight to the listeners are dropped.
    pub guard: bool,
    /// Without a listener, traffic passes by.
    pub fail_open: bool,
    /// What is intercepted is kept out of connection tracking.
    pub notrack: bool,
    /// The rules outlive the process.
    pub persist: bool,
    /// Sorted and apart from each other; none: all.
    pub ports: Vec<PortRange>,
    /// `None`: every destination but those that are the host's own, or nobody's.
    pub dst: Option<PrefixSet>,
    /// `None`: every source.
    pub src: Option<PrefixSet>,
    /// `None`: nobody has asked for any.
    pub bypass: Option<PrefixSet>,
    /// Where forwarded traffic comes in; none: everywhere.
    pub interfaces: Interfaces,
    /// `None`: whatever is free.
    pub table: Option<u32>,
    pub priority: Option<u32>,
}

/// Interfaces by which packets come in: those of these names, and those whose names begin so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interfaces {
    pub names: Vec<String>,
    pub prefixes: Vec<String>,
}

impl Interfaces {
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.prefixes.is_empty()
    }
}

/// A listener, for one family or for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intercept {
    pub protocol: Protocol,
    /// `None`: both.
    pub family: Option<Family>,
    /// `None`: it is bound to every address. Else there is a family.
    pub addr: Option<IpAddr>,
    pub port: u16,
}

impl Plan {
    /// The listeners that can be reached without interception, and shall not be.
    pub fn direct_drops(&self) -> impl Iterator<Item = Intercept> {
        let reachable = |listener: &Intercept| listener.addr.is_none_or(|addr| !addr.is_loopback());
        self.intercepts.iter().copied().filter(move |listener| self.guard && reachable(listener))
    }

    /// The answers of destinations that are left alone, packets for other hosts as they are, may be chosen too.
    ///
    /// Not where interfaces are named, those of clients: answers come in by others.
    pub fn needs_reply_exemption(&self) -> bool {
        self.bypass.is_some() && self.interfaces.is_empty() && self.matches_ephemeral_ports()
    }

    /// What this host answers to others may be chosen, along with its own connections.
    ///
    /// What is not tracked cannot be told from these.
    pub fn needs_own_reply_exemption(&self) -> bool {
        self.output_mark.is_some() && !self.notrack && self.matches_ephemeral_ports()
    }

    /// Answers go to a client's port, which is above 1023; where the ports are those of services, none is chosen. Nor is
    /// one with NAT, which looks at the first packets of connections alone.
    fn matches_ephemeral_ports(&self) -> bool {
        const FIRST_OF_CLIENTS: u16 = 1024;
        let ports = self.ports.is_empty() || self.ports.iter().any(|range| range.last >= FIRST_OF_CLIENTS);
        self.mode == Mode::Tproxy && ports
    }

    /// The family over which a protocol is served, if there is but one.
    pub fn family_of(&self, protocol: Protocol) -> Option<Family> {
        let serves = |family: Family| {
            let listeners = self.intercepts.iter().filter(|listener| listener.protocol == protocol);
            listeners.map(|listener| listener.family).any(|served| served.is_none_or(|served| served == family))
        };
        let v4 = self.families.v4 && serves(Family::V4);
        let v6 = self.families.v6 && serves(Family::V6);
        Families { v4, v6 }.only()
    }

    /// The same for IPv4 alone, on a host that has no IPv6.
    pub fn leave_ipv6(&mut self) {
        self.families.v6 = false;
        self.intercepts.retain(|listener| listener.family != Some(Family::V6));
        for listener in &mut self.intercepts {
            listener.family = Some(Family::V4);
        }
    }
}
