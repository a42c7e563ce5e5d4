//! The statements that our rules are made of, shown as `nft` writes them. `encode` makes the expressions that the kernel
//! runs of each.

mod encode;

use std::fmt;
use std::net::IpAddr;

use super::set::SetName;
use crate::model::{Family, Mark, Protocol};
use crate::plan::Cgroup;
use crate::prefix::{self, LENGTHS};

/// The types of addresses that are this host's, or that nobody can have a connection with: local, broadcast, anycast and
/// multicast, which are neighbours (`linux/rtnetlink.h`).
const LOCAL_ADDR_TYPES: std::ops::RangeInclusive<u8> = libc::RTN_LOCAL..=libc::RTN_MULTICAST;

/// One statement of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Statement {
    /// Only this family's packets.
    Family(Family),
    /// Only this transport protocol's packets.
    Protocol(Protocol),
    /// Only packets of other protocols than this.
    ProtocolIsNot(Protocol),
    /// Only this family's control messages: ICMP, or ICMPv6.
    Icmp(Family),
    /// Only packets to this address; the family is matched before.
    Destination(IpAddr),
    /// Only packets to this port.
    DestinationPort(u16),
    /// Only packets to a port of this set.
    DestinationPortIn(SetName),
    /// Only packets of this family from an address of this set.
    SourceIn { family: Family, set: SetName },
    /// Only packets of this family whose source is in none of the sets of a name: those of these lengths, and that of
    /// ranges, whose name it is.
    SourceInNone { family: Family, lengths: [Option<u8>; LENGTHS], ranges: SetName },
    /// Only packets to an address of this set.
    DestinationIn { family: Family, set: SetName },
    /// Only packets that came in by an interface of this set.
    InterfaceIn(SetName),
    /// Only packets that came in by an interface whose name begins so.
    InterfaceLike(InterfacePrefix),
    /// Only packets that did not come in by Ethernet. A packet that is sent did not come in.
    NotByEthernet,
    /// Only packets that came in by Ethernet from an address of this set, or from none of it.
    EtherSource { set: SetName, inside: bool },
    /// Only packets of sockets whose user is in this set. The kernel's own packets have none.
    UidIn(SetName),
    /// The same for the group.
    GidIn(SetName),
    /// Only packets of sockets in this control group or below.
    Cgroup(Cgroup),
    /// Only packets whose mark has this value in our bits.
    MarkIs(Mark),
    /// Only packets whose destination was not translated.
    NotTranslated,
    /// Only packets in the reply direction of a connection, as connection tracking knows it.
    CtReply,
    /// Only packets in the direction in which the connection was begun.
    CtOriginal,
    /// Only packets that begin a connection, as connection tracking knows it.
    CtNew,
    /// Only packets of connections whose mark has this value in our bits, or has another.
    CtMark { mark: Mark, is: bool },
    /// Sets our bits of the connection's mark, and leaves the rest.
    SetCtMark(Mark),
    /// Only packets that an instance has sent back by `lo`: this one, or (`None`) any.
    LoopedBy(Option<Looped>),
    /// Says which instance sends the packet back by `lo`.
    SetLooped(Looped),
    /// Only packets of connections that both sides have agreed to.
    Assured,
    /// Only packets from an address of this host, or from any other.
    SourceIsLocal(bool),
    /// Only packets to an address of this host.
    DestinationIsThisHost,
    /// Only packets whose source is no address of another host: it is one of this host's, broadcast, anycast, multicast.
    SourceIsNoOther,
    /// Only packets whose destination reaches a socket of this host: its own addresses, broadcast, anycast, multicast.
    DestinationIsLocal,
    /// Only packets whose destination is a link-local IPv6 address. No router forwards these (RFC 4291, 2.5.6), so it
    /// is an address of this host; `fib` does not find it when the packet comes by `lo` (`nft_fib6_flowi_init`).
    DestinationIsLinkLocal,
    /// Only IPv6 packets with this address in `::/80`: unspecified, loopback, v4-mapped, or v4-compatible (RFC 4291,
    /// 2.5.2 to 2.5.5). None of them is the address of another host.
    Reserved(Side),
    /// The same, except `::1`.
    ReservedNotLoopback(Side),
    /// Only IPv4 packets whose address has this first byte: a network of length 8.
    Network8(Side, u8),
    /// Only packets that came in by `lo`, or by any other interface.
    FromLoopback(bool),
    /// Only packets whose destination is neither this host's own nor nobody's.
    DestinationNotLocal,
    /// Only packets for which there is a transparent socket, and errors about what one has sent: in control messages the
    /// kernel looks for the socket of the packet that they quote, and in others than errors for none
    /// (`nf_sk_lookup_slow_v4`, `_v6`).
    TransparentSocket,
    /// Only packets for which there is a socket that is bound to every
    /// address, or to one. Neither matches a connection that is being opened,
    /// or was closed: the kernel does not say (`nft_socket_eval`).
    WildcardSocket(bool),
    /// Only the first packet of a TCP connection.
    TcpSyn,
    /// Only TCP packets that do not begin a connection.
    TcpNotSyn,
    /// Only the first answer of a TCP connection.
    TcpSynAck,
    /// Sets our bits of the packet's mark, and leaves the rest.
    SetMark(Mark),
    /// Gives the packet to the listener at this address and port; the rule ends here without one.
    Tproxy { family: Option<Family>, addr: Option<IpAddr>, port: u16 },
    /// Translates the destination to this host, at this port.
    Redirect { port: u16 },
    /// Translates the destination to this address and port.
    Dnat { addr: IpAddr, port: u16 },
    /// Refuses the packet: by a reset for TCP, else by an ICMP error (port unreachable).
    Reject(Protocol),
    /// Keeps the packet out of connection tracking.
    Notrack,
    /// Counts packets and bytes, in a counter of the table.
    Count(&'static str),
    /// Has the kernel report the packet's way.
    Trace,
    /// What becomes of the packet.
    Verdict(Verdict),
}

/// The beginning of interface names: at most 15 bytes (IFNAMSIZ less the NUL).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InterfacePrefix {
    bytes: [u8; libc::IFNAMSIZ],
    len: usize,
}

impl InterfacePrefix {
    pub fn new(prefix: &str) -> InterfacePrefix {
        let mut bytes = [0; libc::IFNAMSIZ];
        bytes.iter_mut().zip(prefix.bytes()).for_each(|(place, byte)| *place = byte);
        InterfacePrefix { bytes, len: prefix.len().min(libc::IFNAMSIZ) }
    }

    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The priority of packets that an instance sends back by `lo` (`skb->priority`, which nothing but our rules reads there).
///
/// Two instances may use the same mark. The number says which of them sent a packet, so that only that one takes it
/// when it comes in. The first byte is the same for all: in the numbers of traffic control classes, 0x74 stands for none that
/// is usual, and a program without CAP_NET_ADMIN can only set 0 to 6 (`sk_set_prio_allowed`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Looped(u32);

impl Looped {
    const FIRST: u32 = 0x7400_0000;
    const LAST: u32 = 0x74ff_ffff;

    /// Of the instance of this name: a hash, of 24 bits (FNV-1a).
    pub fn by(instance: &str) -> Looped {
        let hash =
            instance.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        Looped(Looped::FIRST | ((hash >> 24) ^ hash) & 0x00ff_ffff)
    }
}

/// As the number of a traffic control class, which `nft` takes priorities for.
impl fmt::Display for Looped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// One of a packet's two addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "saddr",
            Side::Destination => "daddr",
        })
    }
}

/// The end of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(&'static str),
    Goto(&'static str),
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Statement::Family(family) => write!(f, "meta nfproto {}", nfproto(*family)),
            Statement::Protocol(protocol) => write!(f, "meta l4proto {protocol}"),
            Statement::ProtocolIsNot(protocol) => write!(f, "meta l4proto != {protocol}"),
            Statement::Icmp(family) => write!(f, "meta l4proto {}", family.icmp_name()),
            Statement::Destination(IpAddr::V4(addr)) => write!(f, "ip daddr {addr}"),
            Statement::Destination(IpAddr::V6(addr)) => write!(f, "ip6 daddr {addr}"),
            Statement::DestinationPort(port) => write!(f, "th dport {port}"),
            Statement::DestinationPortIn(set) => write!(f, "th dport @{set}"),
            Statement::SourceIn { family, set } => {
                write!(f, "{} saddr{} @{set}", header(*family), Masked(*family, set.len))
            }
            Statement::SourceInNone { family, lengths, ranges } => {
                for len in lengths.iter().flatten() {
                    let set = SetName { len: Some(*len), ..*ranges };
                    write!(f, "{} saddr{} != @{set} ", header(*family), Masked(*family, set.len))?;
                }
                write!(f, "{} saddr != @{ranges}", header(*family))
            }
            Statement::DestinationIn { family, set } => {
                write!(f, "{} daddr{} @{set}", header(*family), Masked(*family, set.len))
            }
            Statement::InterfaceIn(set) => write!(f, "iifname @{set}"),
            Statement::InterfaceLike(prefix) => {
                write!(f, "iifname \"{}*\"", String::from_utf8_lossy(prefix.as_bytes()))
            }
            Statement::MarkIs(mark) if mark.mask == u32::MAX => write!(f, "meta mark {:#010x}", mark.value),
            Statement::MarkIs(mark) => write!(f, "meta mark & {:#010x} == {:#010x}", mark.mask, mark.value),
            Statement::NotTranslated => f.write_str("ct status ! dnat"),
            Statement::CtReply => f.write_str("ct direction reply"),
            Statement::Assured => f.write_str("ct status & assured == assured"),
            Statement::NotByEthernet => f.write_str("meta iiftype != ether"),
            Statement::EtherSource { set, inside } => {
                write!(f, "ether saddr {}@{set}", if *inside { "" } else { "!= " })
            }
            Statement::UidIn(set) => write!(f, "meta skuid @{set}"),
            Statement::GidIn(set) => write!(f, "meta skgid @{set}"),
            Statement::Cgroup(cgroup) => write!(f, "socket cgroupv2 level {} \"{}\"", cgroup.level(), cgroup.path),
            Statement::CtOriginal => f.write_str("ct direction original"),
            Statement::Reject(Protocol::Tcp) => f.write_str("reject with tcp reset"),
            Statement::Reject(Protocol::Udp) => f.write_str("reject with icmpx port-unreachable"),
            Statement::CtNew => f.write_str("ct state new"),
            Statement::CtMark { mark, is } => {
                f.write_str("ct mark ")?;
                if mark.mask != u32::MAX {
                    write!(f, "& {:#010x} ", mark.mask)?;
                }
                write!(f, "{} {:#010x}", if *is { "==" } else { "!=" }, mark.value)
            }
            Statement::SetCtMark(mark) if mark.mask == u32::MAX => write!(f, "ct mark set {:#010x}", mark.value),
            Statement::SetCtMark(mark) => {
                write!(f, "ct mark set ct mark & {:#010x} | {:#010x}", !mark.mask, mark.value)
            }
            Statement::LoopedBy(Some(looped)) => write!(f, "meta priority {looped}"),
            Statement::LoopedBy(None) => {
                write!(f, "meta priority {}-{}", Looped(Looped::FIRST), Looped(Looped::LAST))
            }
            Statement::SetLooped(looped) => write!(f, "meta priority set {looped}"),
            Statement::SourceIsLocal(true) => f.write_str("fib saddr type local"),
            Statement::SourceIsLocal(false) => f.write_str("fib saddr type != local"),
            Statement::DestinationIsThisHost => f.write_str("fib daddr type local"),
            Statement::SourceIsNoOther => {
                write!(f, "fib saddr type {}-{}", LOCAL_ADDR_TYPES.start(), LOCAL_ADDR_TYPES.end())
            }
            Statement::DestinationIsLocal => {
                write!(f, "fib daddr type {}-{}", LOCAL_ADDR_TYPES.start(), LOCAL_ADDR_TYPES.end())
            }
            Statement::DestinationIsLinkLocal => f.write_str("ip6 daddr fe80::/10"),
            Statement::Reserved(side) => write!(f, "ip6 {side} ::/80"),
            Statement::ReservedNotLoopback(side) => write!(f, "ip6 {side} ::/80 ip6 {side} != ::1"),
            Statement::Network8(side, first) => write!(f, "ip {side} {first}.0.0.0/8"),
            Statement::FromLoopback(true) => f.write_str("iif \"lo\""),
            Statement::FromLoopback(false) => f.write_str("iif != \"lo\""),
            Statement::DestinationNotLocal => {
                write!(f, "fib daddr type != {}-{}", LOCAL_ADDR_TYPES.start(), LOCAL_ADDR_TYPES.end())
            }
            Statement::TransparentSocket => f.write_str("socket transparent 1"),
            Statement::WildcardSocket(wildcard) => write!(f, "socket wildcard {}", u8::from(*wildcard)),
            Statement::TcpSyn => f.write_str("tcp flags & (fin | syn | rst | ack) == syn"),
            Statement::TcpNotSyn => f.write_str("tcp flags & (fin | syn | rst | ack) != syn"),
            Statement::TcpSynAck => f.write_str("tcp flags & (syn | ack) == syn | ack"),
            Statement::SetMark(mark) if mark.mask == u32::MAX => write!(f, "meta mark set {:#010x}", mark.value),
            Statement::SetMark(mark) => {
                write!(f, "meta mark set meta mark & {:#010x} | {:#010x}", !mark.mask, mark.value)
            }
            Statement::Tproxy { family, addr, port } => {
                f.write_str("tproxy ")?;
                match family {
                    Some(Family::V4) => f.write_str("ip ")?,
                    Some(Family::V6) => f.write_str("ip6 ")?,
                    None => {}
                }
                f.write_str("to ")?;
                match addr {
                    Some(IpAddr::V4(addr)) => write!(f, "{addr}")?,
                    Some(IpAddr::V6(addr)) => write!(f, "[{addr}]")?,
                    None => {}
                }
                write!(f, ":{port}")
            }
            Statement::Redirect { port } => write!(f, "redirect to :{port}"),
            Statement::Dnat { addr: IpAddr::V4(addr), port } => write!(f, "dnat ip to {addr}:{port}"),
            Statement::Dnat { addr: IpAddr::V6(addr), port } => write!(f, "dnat ip6 to [{addr}]:{port}"),
            Statement::Notrack => f.write_str("notrack"),
            Statement::Count(name) => write!(f, "counter name \"{name}\""),
            Statement::Trace => f.write_str("meta nftrace set 1"),
            Statement::Verdict(verdict) => match verdict {
                Verdict::Accept => f.write_str("accept"),
                Verdict::Drop => f.write_str("drop"),
                Verdict::Return => f.write_str("return"),
                Verdict::Jump(chain) => write!(f, "jump {chain}"),
                Verdict::Goto(chain) => write!(f, "goto {chain}"),
            },
        }
    }
}

fn nfproto(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

/// How `nft` calls the header of a family.
fn header(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// What `nft` writes behind an address of which only the bits of a length count.
struct Masked(Family, Option<u8>);

impl fmt::Display for Masked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match prefix::mask(self.0, self.1) {
            Some(mask) => write!(f, " & {mask}"),
            None => Ok(()),
        }
    }
}
