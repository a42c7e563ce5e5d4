//! The statements that our rules are made of. Each is shown as `nft` writes it
//! and encoded as the expressions that the kernel runs, side by side.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::set::SetName;
use crate::backend::route::LOOPBACK;
use crate::model::{Family, Mark, Protocol};
use crate::netlink::wire::Attrs;
use crate::plan::Cgroup;
use crate::prefix::{self, LENGTHS};

/// NFT_REG_VERDICT and the first two 16-byte data registers.
const VERDICT: u32 = 0;
const REG_1: u32 = 1;
const REG_2: u32 = 2;

/// NFT_CMP_EQ and NFT_CMP_NEQ.
const EQ: u32 = 0;
const NOT_EQ: u32 = 1;
/// NFT_CMP_LTE and NFT_CMP_GTE.
const AT_MOST: u32 = 3;
const AT_LEAST: u32 = 5;

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

impl Statement {
    /// Appends this statement's expressions to a rule.
    pub fn encode(&self, rule: &mut Expressions<'_, '_>) {
        match self {
            Statement::Family(family) => rule.only(*family),
            Statement::Protocol(protocol) => rule.only_protocol(protocol.number()),
            Statement::ProtocolIsNot(protocol) => {
                rule.meta_load(META_L4PROTO, REG_1);
                rule.compare_as(NOT_EQ, REG_1, &[protocol.number()]);
            }
            Statement::Icmp(family) => rule.only_protocol(family.icmp_number()),
            Statement::Destination(addr) => rule.compare_destination(*addr),
            Statement::DestinationPort(port) => {
                rule.load_destination_port(REG_1);
                rule.compare(REG_1, &port.to_be_bytes());
            }
            Statement::DestinationPortIn(set) => {
                rule.load_destination_port(REG_1);
                rule.lookup(*set, REG_1);
            }
            Statement::SourceIn { family, set } => {
                rule.only(*family);
                rule.load_source(*family, REG_1);
                rule.mask_address(*family, set.len, REG_1);
                rule.lookup(*set, REG_1);
            }
            Statement::SourceInNone { family, lengths, ranges } => {
                rule.only(*family);
                for len in lengths.iter().copied().filter(Option::is_some).chain([None]) {
                    rule.load_source(*family, REG_1);
                    rule.mask_address(*family, len, REG_1);
                    rule.lookup_if(SetName { len, ..*ranges }, REG_1, false);
                }
            }
            Statement::DestinationIn { family, set } => {
                rule.only(*family);
                rule.load_destination(*family, REG_1);
                rule.mask_address(*family, set.len, REG_1);
                rule.lookup(*set, REG_1);
            }
            Statement::InterfaceIn(set) => {
                rule.meta_load(META_IIFNAME, REG_1);
                rule.lookup(*set, REG_1);
            }
            Statement::InterfaceLike(prefix) => {
                rule.meta_load(META_IIFNAME, REG_1);
                rule.compare(REG_1, prefix.as_bytes());
            }
            Statement::MarkIs(mark) => {
                rule.meta_load(META_MARK, REG_1);
                if mark.mask != u32::MAX {
                    rule.and_xor(REG_1, &mark.mask.to_ne_bytes(), &0u32.to_ne_bytes());
                }
                rule.compare(REG_1, &mark.value.to_ne_bytes());
            }
            Statement::NotTranslated => {
                rule.connection_load(CT_STATUS, REG_1);
                rule.and_xor(REG_1, &DESTINATION_TRANSLATED.to_ne_bytes(), &0u32.to_ne_bytes());
                rule.compare(REG_1, &0u32.to_ne_bytes());
            }
            Statement::NotByEthernet => {
                rule.meta_load(META_IIFTYPE, REG_1);
                rule.compare_as(NOT_EQ, REG_1, &libc::ARPHRD_ETHER.to_ne_bytes());
            }
            Statement::EtherSource { set, inside } => {
                rule.meta_load(META_IIFTYPE, REG_1);
                rule.compare(REG_1, &libc::ARPHRD_ETHER.to_ne_bytes());
                // The destination is before it, of 6 bytes too.
                rule.payload_load(LINK_HEADER, 6, 6, REG_1);
                rule.lookup_if(*set, REG_1, *inside);
            }
            Statement::UidIn(set) => rule.owner_lookup(META_SKUID, *set),
            Statement::GidIn(set) => rule.owner_lookup(META_SKGID, *set),
            Statement::Cgroup(cgroup) => {
                rule.expression("socket", |a| {
                    a.be32(1, SOCKET_CGROUPV2);
                    a.be32(2, REG_1);
                    a.be32(3, cgroup.level());
                });
                rule.compare(REG_1, &cgroup.id.to_ne_bytes());
            }
            Statement::CtOriginal => {
                rule.connection_load(CT_DIRECTION, REG_1);
                rule.compare(REG_1, &[ORIGINAL]);
            }
            Statement::Reject(protocol) => {
                let (kind, code) = match protocol {
                    Protocol::Tcp => (TCP_RESET, 0),
                    Protocol::Udp => (ICMPX_UNREACHABLE, ICMPX_PORT_UNREACHABLE),
                };
                rule.expression("reject", |a| {
                    a.be32(1, kind);
                    a.u8(2, code);
                });
            }
            Statement::CtReply => {
                rule.connection_load(CT_DIRECTION, REG_1);
                rule.compare(REG_1, &[REPLY]);
            }
            Statement::Assured => {
                rule.connection_load(CT_STATUS, REG_1);
                rule.and_xor(REG_1, &ASSURED.to_ne_bytes(), &0u32.to_ne_bytes());
                rule.compare(REG_1, &ASSURED.to_ne_bytes());
            }
            Statement::CtNew => {
                rule.connection_load(CT_STATE, REG_1);
                rule.and_xor(REG_1, &NEW.to_ne_bytes(), &0u32.to_ne_bytes());
                rule.compare_as(NOT_EQ, REG_1, &0u32.to_ne_bytes());
            }
            Statement::CtMark { mark, is } => {
                rule.connection_load(CT_MARK, REG_1);
                if mark.mask != u32::MAX {
                    rule.and_xor(REG_1, &mark.mask.to_ne_bytes(), &0u32.to_ne_bytes());
                }
                rule.compare_as(if *is { EQ } else { NOT_EQ }, REG_1, &mark.value.to_ne_bytes());
            }
            Statement::SetCtMark(mark) => {
                if mark.mask == u32::MAX {
                    rule.immediate(REG_1, &mark.value.to_ne_bytes());
                } else {
                    rule.connection_load(CT_MARK, REG_1);
                    rule.and_xor(REG_1, &(!mark.mask).to_ne_bytes(), &mark.value.to_ne_bytes());
                }
                rule.connection_set(CT_MARK, REG_1);
            }
            Statement::LoopedBy(Some(looped)) => {
                rule.meta_load(META_PRIORITY, REG_1);
                rule.compare(REG_1, &looped.0.to_ne_bytes());
            }
            Statement::LoopedBy(None) => {
                rule.meta_load(META_PRIORITY, REG_1);
                rule.in_network_order(REG_1);
                rule.compare_as(AT_LEAST, REG_1, &Looped::FIRST.to_be_bytes());
                rule.compare_as(AT_MOST, REG_1, &Looped::LAST.to_be_bytes());
            }
            Statement::SetLooped(looped) => {
                rule.immediate(REG_1, &looped.0.to_ne_bytes());
                rule.meta_set(META_PRIORITY, REG_1);
            }
            Statement::SourceIsLocal(yes) => {
                rule.load_address_type(FIB_SOURCE, REG_1);
                rule.compare_as(if *yes { EQ } else { NOT_EQ }, REG_1, &u32::from(libc::RTN_LOCAL).to_ne_bytes());
            }
            Statement::DestinationIsThisHost => {
                rule.load_address_type(FIB_DESTINATION, REG_1);
                rule.compare(REG_1, &u32::from(libc::RTN_LOCAL).to_ne_bytes());
            }
            Statement::SourceIsNoOther => rule.only_own_type(FIB_SOURCE),
            Statement::DestinationIsLocal => rule.only_own_type(FIB_DESTINATION),
            Statement::DestinationIsLinkLocal => {
                rule.only(Family::V6);
                rule.load_destination(Family::V6, REG_1);
                rule.mask_address(Family::V6, Some(10), REG_1);
                rule.compare(REG_1, &Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).octets());
            }
            Statement::Reserved(side) => rule.only_reserved(*side),
            Statement::ReservedNotLoopback(side) => {
                rule.only_reserved(*side);
                rule.load_address(Family::V6, *side, None, REG_1);
                rule.compare_as(NOT_EQ, REG_1, &Ipv6Addr::LOCALHOST.octets());
            }
            Statement::Network8(side, first) => {
                rule.only(Family::V4);
                rule.load_address(Family::V4, *side, Some(1), REG_1);
                rule.compare(REG_1, &[*first]);
            }
            Statement::FromLoopback(yes) => {
                rule.meta_load(META_IIF, REG_1);
                rule.compare_as(if *yes { EQ } else { NOT_EQ }, REG_1, &LOOPBACK.to_ne_bytes());
            }
            Statement::DestinationNotLocal => {
                rule.load_address_type(FIB_DESTINATION, REG_1);
                rule.in_network_order(REG_1);
                rule.outside(REG_1, *LOCAL_ADDR_TYPES.start(), *LOCAL_ADDR_TYPES.end());
            }
            Statement::TransparentSocket => {
                rule.socket_load(SOCKET_TRANSPARENT, REG_1);
                rule.compare(REG_1, &[1]);
            }
            Statement::WildcardSocket(wildcard) => {
                rule.socket_load(SOCKET_WILDCARD, REG_1);
                rule.compare(REG_1, &[u8::from(*wildcard)]);
            }
            Statement::TcpSyn => rule.only_flags(SYN | ACK | RST | FIN, EQ, SYN),
            Statement::TcpNotSyn => rule.only_flags(SYN | ACK | RST | FIN, NOT_EQ, SYN),
            Statement::TcpSynAck => rule.only_flags(SYN | ACK, EQ, SYN | ACK),
            Statement::SetMark(mark) => {
                if mark.mask == u32::MAX {
                    rule.immediate(REG_1, &mark.value.to_ne_bytes());
                } else {
                    rule.meta_load(META_MARK, REG_1);
                    rule.and_xor(REG_1, &(!mark.mask).to_ne_bytes(), &mark.value.to_ne_bytes());
                }
                rule.meta_set(META_MARK, REG_1);
            }
            Statement::Tproxy { family, addr, port } => {
                let port_register = match addr {
                    Some(addr) => {
                        rule.immediate_address(REG_1, *addr);
                        REG_2
                    }
                    None => REG_1,
                };
                rule.immediate(port_register, &port.to_be_bytes());
                rule.tproxy(family.map_or(0, Family::nfproto), addr.map(|_| REG_1), port_register);
            }
            Statement::Redirect { port } => {
                rule.immediate(REG_1, &port.to_be_bytes());
                rule.redirect(REG_1);
            }
            Statement::Dnat { addr, port } => {
                rule.immediate_address(REG_1, *addr);
                rule.immediate(REG_2, &port.to_be_bytes());
                rule.dnat(*addr, REG_1, REG_2);
            }
            Statement::Notrack => rule.expression("notrack", |_| {}),
            Statement::Count(name) => rule.expression("objref", |a| {
                a.be32(1, OBJECT_COUNTER);
                a.string(2, name);
            }),
            Statement::Trace => {
                rule.immediate(REG_1, &[1]);
                rule.meta_set(META_NFTRACE, REG_1);
            }
            Statement::Verdict(verdict) => rule.verdict(*verdict),
        }
    }
}

/// RFC 9293, 3.1.
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const META_PRIORITY: u32 = 2;
const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_IIFNAME: u32 = 6;
const META_IIFTYPE: u32 = 8;
const META_SKUID: u32 = 10;
const META_SKGID: u32 = 11;
const META_NFTRACE: u32 = 12;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// NFT_CT_STATE, and NF_CT_STATE_BIT(IP_CT_NEW).
const CT_STATE: u32 = 0;
const NEW: u32 = 8;
/// NFT_CT_MARK.
const CT_MARK: u32 = 3;
/// NFT_CT_DIRECTION, and IP_CT_DIR_REPLY.
const CT_DIRECTION: u32 = 1;
const ORIGINAL: u8 = 0;
const REPLY: u8 = 1;
/// NFT_CT_STATUS, IPS_ASSURED and IPS_DST_NAT.
const CT_STATUS: u32 = 2;
const ASSURED: u32 = 0x4;
const DESTINATION_TRANSLATED: u32 = 0x20;
const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// NFTA_FIB_F_SADDR and NFTA_FIB_F_DADDR.
const FIB_SOURCE: u32 = 1;
const FIB_DESTINATION: u32 = 2;
/// NF_NAT_RANGE_PROTO_SPECIFIED.
const NAT_PORT_SPECIFIED: u32 = 2;
/// NFT_OBJECT_COUNTER.
pub(super) const OBJECT_COUNTER: u32 = 1;
const SOCKET_TRANSPARENT: u32 = 0;
const SOCKET_WILDCARD: u32 = 2;
const SOCKET_CGROUPV2: u32 = 3;
/// NFT_REJECT_TCP_RST, NFT_REJECT_ICMPX_UNREACH and NFT_REJECT_ICMPX_PORT_UNREACH.
const TCP_RESET: u32 = 1;
const ICMPX_UNREACHABLE: u32 = 2;
const ICMPX_PORT_UNREACHABLE: u8 = 1;

/// The list of a rule's expressions (NFTA_RULE_EXPRESSIONS), being written.
/// Attribute numbers are those of `linux/netfilter/nf_tables.h`.
pub(crate) struct Expressions<'a, 'b>(pub &'a mut Attrs<'b>);

impl Expressions<'_, '_> {
    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Attrs<'_>)) {
        self.0.nest(1, |a| {
            a.string(1, name);
            a.nest(2, data);
        });
    }

    fn meta_load(&mut self, key: u32, register: u32) {
        self.expression("meta", |a| {
            a.be32(2, key);
            a.be32(1, register);
        });
    }

    fn connection_load(&mut self, key: u32, register: u32) {
        self.expression("ct", |a| {
            a.be32(2, key);
            a.be32(1, register);
        });
    }

    fn connection_set(&mut self, key: u32, register: u32) {
        self.expression("ct", |a| {
            a.be32(2, key);
            a.be32(4, register);
        });
    }

    fn meta_set(&mut self, key: u32, register: u32) {
        self.expression("meta", |a| {
            a.be32(2, key);
            a.be32(3, register);
        });
    }

    fn compare(&mut self, register: u32, value: &[u8]) {
        self.compare_as(EQ, register, value);
    }

    fn compare_as(&mut self, relation: u32, register: u32, value: &[u8]) {
        self.expression("cmp", |a| {
            a.be32(1, register);
            a.be32(2, relation);
            a.nest(3, |a| a.bytes(1, value));
        });
    }

    /// A number of 4 bytes, of which only then the first byte counts most.
    fn in_network_order(&mut self, register: u32) {
        /// NFT_BYTEORDER_HTON.
        const TO_NETWORK: u32 = 1;
        self.expression("byteorder", |a| {
            a.be32(1, register);
            a.be32(2, register);
            a.be32(3, TO_NETWORK);
            a.be32(4, 4);
            a.be32(5, 4);
        });
    }

    /// Only what is not in this range, of numbers in network order.
    fn outside(&mut self, register: u32, first: u8, last: u8) {
        /// NFT_RANGE_NEQ.
        const OUTSIDE: u32 = 1;
        self.expression("range", |a| {
            a.be32(1, register);
            a.be32(2, OUTSIDE);
            a.nest(3, |a| a.be32(1, first.into()));
            a.nest(4, |a| a.be32(1, last.into()));
        });
    }

    /// register = (register & mask) ^ xor.
    fn and_xor(&mut self, register: u32, mask: &[u8], xor: &[u8]) {
        self.expression("bitwise", |a| {
            a.be32(1, register);
            a.be32(2, register);
            a.be32(3, mask.len() as u32);
            a.nest(4, |a| a.bytes(1, mask));
            a.nest(5, |a| a.bytes(1, xor));
        });
    }

    fn immediate(&mut self, register: u32, value: &[u8]) {
        self.expression("immediate", |a| {
            a.be32(1, register);
            a.nest(2, |a| a.bytes(1, value));
        });
    }

    /// A part of the packet: from a header (NFT_PAYLOAD_*), at an offset, of a length.
    fn payload_load(&mut self, header: u32, offset: u32, len: u32, register: u32) {
        self.expression("payload", |a| {
            a.be32(1, register);
            a.be32(2, header);
            a.be32(3, offset);
            a.be32(4, len);
        });
    }

    /// TCP packets of which these flags, of those in the mask, are set. They are in the 14th byte.
    fn only_flags(&mut self, mask: u8, relation: u32, flags: u8) {
        self.only_protocol(Protocol::Tcp.number());
        self.payload_load(TRANSPORT_HEADER, 13, 1, REG_1);
        self.and_xor(REG_1, &[mask], &[0]);
        self.compare_as(relation, REG_1, &[flags]);
    }

    /// TCP and UDP have the port at the same place.
    fn load_destination_port(&mut self, register: u32) {
        self.payload_load(TRANSPORT_HEADER, 2, 2, register);
    }

    /// RFC 791: source and destination are 4 bytes each, from 12; RFC 8200: 16 bytes each, from 8.
    /// An address, or only its first bytes.
    fn load_address(&mut self, family: Family, side: Side, bytes: Option<u32>, register: u32) {
        let (source, len) = match family {
            Family::V4 => (12, 4),
            Family::V6 => (8, 16),
        };
        let offset = match side {
            Side::Source => source,
            Side::Destination => source + len,
        };
        self.payload_load(NETWORK_HEADER, offset, bytes.unwrap_or(len), register);
    }

    fn load_source(&mut self, family: Family, register: u32) {
        self.load_address(family, Side::Source, None, register);
    }

    fn load_destination(&mut self, family: Family, register: u32) {
        self.load_address(family, Side::Destination, None, register);
    }

    fn mask_address(&mut self, family: Family, len: Option<u8>, register: u32) {
        match prefix::mask(family, len) {
            Some(IpAddr::V4(mask)) => self.and_xor(register, &mask.octets(), &[0; 4]),
            Some(IpAddr::V6(mask)) => self.and_xor(register, &mask.octets(), &[0; 16]),
            None => {}
        }
    }

    fn compare_destination(&mut self, addr: IpAddr) {
        match addr {
            IpAddr::V4(addr) => {
                self.load_destination(Family::V4, REG_1);
                self.compare(REG_1, &addr.octets());
            }
            IpAddr::V6(addr) => {
                self.load_destination(Family::V6, REG_1);
                self.compare(REG_1, &addr.octets());
            }
        }
    }

    /// Only IPv6 addresses in `::/80`: the first 10 bytes are zero.
    fn only_reserved(&mut self, side: Side) {
        self.only(Family::V6);
        self.load_address(Family::V6, side, Some(10), REG_1);
        self.compare(REG_1, &[0; 10]);
    }

    fn only(&mut self, family: Family) {
        self.meta_load(META_NFPROTO, REG_1);
        self.compare(REG_1, &[family.nfproto()]);
    }

    fn only_protocol(&mut self, number: u8) {
        self.meta_load(META_L4PROTO, REG_1);
        self.compare(REG_1, &[number]);
    }

    fn immediate_address(&mut self, register: u32, addr: IpAddr) {
        match addr {
            IpAddr::V4(addr) => self.immediate(register, &addr.octets()),
            IpAddr::V6(addr) => self.immediate(register, &addr.octets()),
        }
    }

    fn redirect(&mut self, port_register: u32) {
        self.expression("redir", |a| {
            a.be32(1, port_register);
            a.be32(3, NAT_PORT_SPECIFIED);
        });
    }

    fn dnat(&mut self, addr: IpAddr, addr_register: u32, port_register: u32) {
        /// NFT_NAT_DNAT.
        const DNAT: u32 = 1;
        let family = if addr.is_ipv4() { Family::V4 } else { Family::V6 };
        self.expression("nat", |a| {
            a.be32(1, DNAT);
            a.be32(2, family.nfproto().into());
            a.be32(3, addr_register);
            a.be32(5, port_register);
            a.be32(7, NAT_PORT_SPECIFIED);
        });
    }

    fn load_address_type(&mut self, of: u32, register: u32) {
        /// NFT_FIB_RESULT_ADDRTYPE.
        const ADDRESS_TYPE: u32 = 3;
        self.expression("fib", |a| {
            a.be32(3, of);
            a.be32(2, ADDRESS_TYPE);
            a.be32(1, register);
        });
    }

    fn only_own_type(&mut self, of: u32) {
        self.load_address_type(of, REG_1);
        self.in_network_order(REG_1);
        self.compare_as(AT_LEAST, REG_1, &u32::from(*LOCAL_ADDR_TYPES.start()).to_be_bytes());
        self.compare_as(AT_MOST, REG_1, &u32::from(*LOCAL_ADDR_TYPES.end()).to_be_bytes());
    }

    fn lookup(&mut self, set: SetName, register: u32) {
        self.lookup_if(set, register, true);
    }

    fn lookup_if(&mut self, set: SetName, register: u32, inside: bool) {
        /// NFT_LOOKUP_F_INV.
        const INVERTED: u32 = 1;
        self.expression("lookup", |a| {
            a.be32(2, register);
            a.string(1, &set.to_string());
            if !inside {
                a.be32(5, INVERTED);
            }
        });
    }

    /// The number of a socket's user or group, in a set of ranges.
    fn owner_lookup(&mut self, key: u32, set: SetName) {
        self.meta_load(key, REG_1);
        self.in_network_order(REG_1);
        self.lookup(set, REG_1);
    }

    fn socket_load(&mut self, key: u32, register: u32) {
        self.expression("socket", |a| {
            a.be32(1, key);
            a.be32(2, register);
        });
    }

    fn tproxy(&mut self, nfproto: u8, addr_register: Option<u32>, port_register: u32) {
        self.expression("tproxy", |a| {
            a.be32(1, nfproto.into());
            if let Some(register) = addr_register {
                a.be32(2, register);
            }
            a.be32(3, port_register);
        });
    }

    fn verdict(&mut self, verdict: Verdict) {
        /// NF_DROP, NF_ACCEPT, and nf_tables' own negative codes.
        const DROP: i32 = 0;
        const ACCEPT: i32 = 1;
        const JUMP: i32 = -3;
        const GOTO: i32 = -4;
        const RETURN: i32 = -5;
        let (code, chain) = match verdict {
            Verdict::Drop => (DROP, None),
            Verdict::Accept => (ACCEPT, None),
            Verdict::Return => (RETURN, None),
            Verdict::Jump(chain) => (JUMP, Some(chain)),
            Verdict::Goto(chain) => (GOTO, Some(chain)),
        };
        self.expression("immediate", |a| {
            a.be32(1, VERDICT);
            a.nest(2, |a| {
                a.nest(2, |a| {
                    a.be32(1, code as u32);
                    if let Some(chain) = chain {
                        a.string(2, chain);
                    }
                });
            });
        });
    }
}
