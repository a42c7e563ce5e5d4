//! Statements as the expressions that the kernel runs.

use std::net::{IpAddr, Ipv6Addr};

use super::{LOCAL_ADDR_TYPES, Looped, Side, Statement, Verdict};
use crate::backend::nft::expression::*;
use crate::backend::nft::set::SetName;
use crate::model::{Family, Protocol};
use crate::netlink::rtnl::link::LOOPBACK;
use crate::netlink::uapi::*;
use crate::netlink::wire::Attrs;
use crate::prefix;

impl Statement {
    /// Appends this statement's expressions to NFTA_RULE_EXPRESSIONS.
    pub fn encode(&self, list: &mut Attrs<'_>) {
        let rule = &mut Expressions(list);
        match self {
            Statement::Family(family) => rule.only(*family),
            Statement::Protocol(protocol) => rule.only_protocol(protocol.number()),
            Statement::ProtocolIsNot(protocol) => {
                rule.meta_load(NFT_META_L4PROTO, NFT_REG_1);
                rule.compare_as(NFT_CMP_NEQ, NFT_REG_1, &[protocol.number()]);
            }
            Statement::Icmp(family) => rule.only_protocol(family.icmp_number()),
            Statement::Destination(addr) => rule.compare_destination(*addr),
            Statement::DestinationPort(port) => {
                rule.load_destination_port(NFT_REG_1);
                rule.compare(NFT_REG_1, &port.to_be_bytes());
            }
            Statement::DestinationPortIn(set) => {
                rule.load_destination_port(NFT_REG_1);
                rule.lookup(*set, NFT_REG_1);
            }
            Statement::SourceIn { family, set } => {
                rule.only(*family);
                rule.load_source(*family, NFT_REG_1);
                rule.mask_address(*family, set.len, NFT_REG_1);
                rule.lookup(*set, NFT_REG_1);
            }
            Statement::SourceInNone { family, lengths, ranges } => {
                rule.only(*family);
                for len in lengths.iter().copied().filter(Option::is_some).chain([None]) {
                    rule.load_source(*family, NFT_REG_1);
                    rule.mask_address(*family, len, NFT_REG_1);
                    rule.lookup_if(SetName { len, ..*ranges }, NFT_REG_1, false);
                }
            }
            Statement::DestinationIn { family, set } => {
                rule.only(*family);
                rule.load_destination(*family, NFT_REG_1);
                rule.mask_address(*family, set.len, NFT_REG_1);
                rule.lookup(*set, NFT_REG_1);
            }
            Statement::InterfaceIn(set) => {
                rule.meta_load(NFT_META_IIFNAME, NFT_REG_1);
                rule.lookup(*set, NFT_REG_1);
            }
            Statement::InterfaceLike(prefix) => {
                rule.meta_load(NFT_META_IIFNAME, NFT_REG_1);
                rule.compare(NFT_REG_1, prefix.as_bytes());
            }
            Statement::MarkIs(mark) => {
                rule.meta_load(NFT_META_MARK, NFT_REG_1);
                if mark.mask != u32::MAX {
                    rule.and_xor(NFT_REG_1, &mark.mask.to_ne_bytes(), &0u32.to_ne_bytes());
                }
                rule.compare(NFT_REG_1, &mark.value.to_ne_bytes());
            }
            Statement::NotByEthernet => {
                rule.meta_load(NFT_META_IIFTYPE, NFT_REG_1);
                rule.compare_as(NFT_CMP_NEQ, NFT_REG_1, &libc::ARPHRD_ETHER.to_ne_bytes());
            }
            Statement::EtherSource { set, inside } => {
                rule.meta_load(NFT_META_IIFTYPE, NFT_REG_1);
                rule.compare(NFT_REG_1, &libc::ARPHRD_ETHER.to_ne_bytes());
                // The destination is before it, of 6 bytes too.
                rule.payload_load(NFT_PAYLOAD_LL_HEADER, 6, 6, NFT_REG_1);
                rule.lookup_if(*set, NFT_REG_1, *inside);
            }
            Statement::UidIn(set) => rule.owner_lookup(NFT_META_SKUID, *set),
            Statement::GidIn(set) => rule.owner_lookup(NFT_META_SKGID, *set),
            Statement::Cgroup(cgroup) => {
                rule.append(Socket { key: NFT_SOCKET_CGROUPV2, dreg: NFT_REG_1, level: Some(cgroup.level()) });
                rule.compare(NFT_REG_1, &cgroup.id.to_ne_bytes());
            }
            Statement::CtOriginal => {
                rule.connection_load(NFT_CT_DIRECTION, NFT_REG_1);
                rule.compare(NFT_REG_1, &[IP_CT_DIR_ORIGINAL]);
            }
            Statement::Reject(protocol) => rule.append(match protocol {
                Protocol::Tcp => Reject { kind: NFT_REJECT_TCP_RST, icmp_code: 0 },
                Protocol::Udp => Reject { kind: NFT_REJECT_ICMPX_UNREACH, icmp_code: NFT_REJECT_ICMPX_PORT_UNREACH },
            }),
            Statement::NotTranslated => {
                rule.connection_load(NFT_CT_STATUS, NFT_REG_1);
                rule.and_xor(NFT_REG_1, &IPS_DST_NAT.to_ne_bytes(), &0u32.to_ne_bytes());
                rule.compare(NFT_REG_1, &0u32.to_ne_bytes());
            }
            Statement::CtReply => {
                rule.connection_load(NFT_CT_DIRECTION, NFT_REG_1);
                rule.compare(NFT_REG_1, &[IP_CT_DIR_REPLY]);
            }
            Statement::Assured => {
                rule.connection_load(NFT_CT_STATUS, NFT_REG_1);
                rule.and_xor(NFT_REG_1, &IPS_ASSURED.to_ne_bytes(), &0u32.to_ne_bytes());
                rule.compare(NFT_REG_1, &IPS_ASSURED.to_ne_bytes());
            }
            Statement::CtNew => {
                rule.connection_load(NFT_CT_STATE, NFT_REG_1);
                rule.and_xor(NFT_REG_1, &NF_CT_STATE_BIT(IP_CT_NEW).to_ne_bytes(), &0u32.to_ne_bytes());
                rule.compare_as(NFT_CMP_NEQ, NFT_REG_1, &0u32.to_ne_bytes());
            }
            Statement::CtMark { mark, is } => {
                rule.connection_load(NFT_CT_MARK, NFT_REG_1);
                if mark.mask != u32::MAX {
                    rule.and_xor(NFT_REG_1, &mark.mask.to_ne_bytes(), &0u32.to_ne_bytes());
                }
                rule.compare_as(if *is { NFT_CMP_EQ } else { NFT_CMP_NEQ }, NFT_REG_1, &mark.value.to_ne_bytes());
            }
            Statement::SetCtMark(mark) => {
                if mark.mask == u32::MAX {
                    rule.immediate(NFT_REG_1, &mark.value.to_ne_bytes());
                } else {
                    rule.connection_load(NFT_CT_MARK, NFT_REG_1);
                    rule.and_xor(NFT_REG_1, &(!mark.mask).to_ne_bytes(), &mark.value.to_ne_bytes());
                }
                rule.connection_set(NFT_CT_MARK, NFT_REG_1);
            }
            Statement::LoopedBy(Some(looped)) => {
                rule.meta_load(NFT_META_PRIORITY, NFT_REG_1);
                rule.compare(NFT_REG_1, &looped.0.to_ne_bytes());
            }
            Statement::LoopedBy(None) => {
                rule.meta_load(NFT_META_PRIORITY, NFT_REG_1);
                rule.in_network_order(NFT_REG_1);
                rule.compare_as(NFT_CMP_GTE, NFT_REG_1, &Looped::FIRST.to_be_bytes());
                rule.compare_as(NFT_CMP_LTE, NFT_REG_1, &Looped::LAST.to_be_bytes());
            }
            Statement::SetLooped(looped) => {
                rule.immediate(NFT_REG_1, &looped.0.to_ne_bytes());
                rule.meta_set(NFT_META_PRIORITY, NFT_REG_1);
            }
            Statement::SourceIsLocal(yes) => {
                rule.load_address_type(NFTA_FIB_F_SADDR, NFT_REG_1);
                rule.compare_as(
                    if *yes { NFT_CMP_EQ } else { NFT_CMP_NEQ },
                    NFT_REG_1,
                    &u32::from(libc::RTN_LOCAL).to_ne_bytes(),
                );
            }
            Statement::DestinationIsThisHost => {
                rule.load_address_type(NFTA_FIB_F_DADDR, NFT_REG_1);
                rule.compare(NFT_REG_1, &u32::from(libc::RTN_LOCAL).to_ne_bytes());
            }
            Statement::SourceIsNoOther => rule.only_own_type(NFTA_FIB_F_SADDR),
            Statement::DestinationIsLocal => rule.only_own_type(NFTA_FIB_F_DADDR),
            Statement::DestinationIsLinkLocal => {
                rule.only(Family::V6);
                rule.load_destination(Family::V6, NFT_REG_1);
                rule.mask_address(Family::V6, Some(10), NFT_REG_1);
                rule.compare(NFT_REG_1, &Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).octets());
            }
            Statement::Reserved(side) => rule.only_reserved(*side),
            Statement::ReservedNotLoopback(side) => {
                rule.only_reserved(*side);
                rule.load_address(Family::V6, *side, None, NFT_REG_1);
                rule.compare_as(NFT_CMP_NEQ, NFT_REG_1, &Ipv6Addr::LOCALHOST.octets());
            }
            Statement::Network8(side, first) => {
                rule.only(Family::V4);
                rule.load_address(Family::V4, *side, Some(1), NFT_REG_1);
                rule.compare(NFT_REG_1, &[*first]);
            }
            Statement::FromLoopback(yes) => {
                rule.meta_load(NFT_META_IIF, NFT_REG_1);
                rule.compare_as(if *yes { NFT_CMP_EQ } else { NFT_CMP_NEQ }, NFT_REG_1, &LOOPBACK.to_ne_bytes());
            }
            Statement::DestinationNotLocal => {
                rule.load_address_type(NFTA_FIB_F_DADDR, NFT_REG_1);
                rule.in_network_order(NFT_REG_1);
                rule.outside(NFT_REG_1, *LOCAL_ADDR_TYPES.start(), *LOCAL_ADDR_TYPES.end());
            }
            Statement::TransparentSocket => {
                rule.socket_load(NFT_SOCKET_TRANSPARENT, NFT_REG_1);
                rule.compare(NFT_REG_1, &[1]);
            }
            Statement::WildcardSocket(wildcard) => {
                rule.socket_load(NFT_SOCKET_WILDCARD, NFT_REG_1);
                rule.compare(NFT_REG_1, &[u8::from(*wildcard)]);
            }
            Statement::TcpSyn => rule.only_flags(SYN | ACK | RST | FIN, NFT_CMP_EQ, SYN),
            Statement::TcpNotSyn => rule.only_flags(SYN | ACK | RST | FIN, NFT_CMP_NEQ, SYN),
            Statement::TcpSynAck => rule.only_flags(SYN | ACK, NFT_CMP_EQ, SYN | ACK),
            Statement::SetMark(mark) => {
                if mark.mask == u32::MAX {
                    rule.immediate(NFT_REG_1, &mark.value.to_ne_bytes());
                } else {
                    rule.meta_load(NFT_META_MARK, NFT_REG_1);
                    rule.and_xor(NFT_REG_1, &(!mark.mask).to_ne_bytes(), &mark.value.to_ne_bytes());
                }
                rule.meta_set(NFT_META_MARK, NFT_REG_1);
            }
            Statement::Tproxy { family, addr, port } => {
                let port_register = match addr {
                    Some(addr) => {
                        rule.immediate_address(NFT_REG_1, *addr);
                        NFT_REG_2
                    }
                    None => NFT_REG_1,
                };
                rule.immediate(port_register, &port.to_be_bytes());
                rule.tproxy(family.map_or(0, Family::nfproto), addr.map(|_| NFT_REG_1), port_register);
            }
            Statement::Redirect { port } => {
                rule.immediate(NFT_REG_1, &port.to_be_bytes());
                rule.redirect(NFT_REG_1);
            }
            Statement::Dnat { addr, port } => {
                rule.immediate_address(NFT_REG_1, *addr);
                rule.immediate(NFT_REG_2, &port.to_be_bytes());
                rule.dnat(*addr, NFT_REG_1, NFT_REG_2);
            }
            Statement::Notrack => rule.append(Notrack),
            Statement::Count(name) => rule.append(Objref { kind: NFT_OBJECT_COUNTER, name }),
            Statement::Trace => {
                rule.immediate(NFT_REG_1, &[1]);
                rule.meta_set(NFT_META_NFTRACE, NFT_REG_1);
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

/// The list of a rule's expressions (NFTA_RULE_EXPRESSIONS), being written.
struct Expressions<'a, 'b>(&'a mut Attrs<'b>);

impl Expressions<'_, '_> {
    fn append(&mut self, expression: impl Encode) {
        append(self.0, &expression);
    }

    fn meta_load(&mut self, key: u32, dreg: u32) {
        self.append(Meta { key, access: Access::Load { dreg } });
    }

    fn meta_set(&mut self, key: u32, sreg: u32) {
        self.append(Meta { key, access: Access::Set { sreg } });
    }

    fn connection_load(&mut self, key: u32, dreg: u32) {
        self.append(Ct { key, access: Access::Load { dreg } });
    }

    fn connection_set(&mut self, key: u32, sreg: u32) {
        self.append(Ct { key, access: Access::Set { sreg } });
    }

    fn compare(&mut self, register: u32, value: &[u8]) {
        self.compare_as(NFT_CMP_EQ, register, value);
    }

    fn compare_as(&mut self, op: u32, sreg: u32, value: &[u8]) {
        self.append(Cmp { sreg, op, value });
    }

    /// A number of 4 bytes, of which only then the first byte counts most.
    fn in_network_order(&mut self, register: u32) {
        self.append(Byteorder { sreg: register, dreg: register, op: NFT_BYTEORDER_HTON });
    }

    /// Only what is not in this range, of numbers in network order.
    fn outside(&mut self, sreg: u32, first: u8, last: u8) {
        let (from, to) = (u32::from(first).to_be_bytes(), u32::from(last).to_be_bytes());
        self.append(RangeCmp { sreg, op: NFT_RANGE_NEQ, from: &from, to: &to });
    }

    /// register = (register & mask) ^ xor.
    fn and_xor(&mut self, register: u32, mask: &[u8], xor: &[u8]) {
        self.append(Bitwise { sreg: register, dreg: register, operation: BitwiseOperation::Bool { mask, xor } });
    }

    fn immediate(&mut self, dreg: u32, value: &[u8]) {
        self.append(Immediate::Value { dreg, value });
    }

    /// A part of the packet: from a header (NFT_PAYLOAD_*), at an offset, of a length.
    fn payload_load(&mut self, base: u32, offset: u32, len: u32, dreg: u32) {
        self.append(Payload { dreg, base, offset, len });
    }

    /// TCP packets of which these flags, of those in the mask, are set. They are in the 14th byte.
    fn only_flags(&mut self, mask: u8, relation: u32, flags: u8) {
        self.only_protocol(Protocol::Tcp.number());
        self.payload_load(NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1, NFT_REG_1);
        self.and_xor(NFT_REG_1, &[mask], &[0]);
        self.compare_as(relation, NFT_REG_1, &[flags]);
    }

    /// TCP and UDP have the port at the same place.
    fn load_destination_port(&mut self, register: u32) {
        self.payload_load(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, register);
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
        self.payload_load(NFT_PAYLOAD_NETWORK_HEADER, offset, bytes.unwrap_or(len), register);
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
                self.load_destination(Family::V4, NFT_REG_1);
                self.compare(NFT_REG_1, &addr.octets());
            }
            IpAddr::V6(addr) => {
                self.load_destination(Family::V6, NFT_REG_1);
                self.compare(NFT_REG_1, &addr.octets());
            }
        }
    }

    /// Only IPv6 addresses in `::/80`: the first 10 bytes are zero.
    fn only_reserved(&mut self, side: Side) {
        self.only(Family::V6);
        self.load_address(Family::V6, side, Some(10), NFT_REG_1);
        self.compare(NFT_REG_1, &[0; 10]);
    }

    fn only(&mut self, family: Family) {
        self.meta_load(NFT_META_NFPROTO, NFT_REG_1);
        self.compare(NFT_REG_1, &[family.nfproto()]);
    }

    fn only_protocol(&mut self, number: u8) {
        self.meta_load(NFT_META_L4PROTO, NFT_REG_1);
        self.compare(NFT_REG_1, &[number]);
    }

    fn immediate_address(&mut self, register: u32, addr: IpAddr) {
        match addr {
            IpAddr::V4(addr) => self.immediate(register, &addr.octets()),
            IpAddr::V6(addr) => self.immediate(register, &addr.octets()),
        }
    }

    fn redirect(&mut self, port_register: u32) {
        self.append(Redir { reg_proto_min: Some(port_register), flags: NF_NAT_RANGE_PROTO_SPECIFIED });
    }

    fn dnat(&mut self, addr: IpAddr, addr_register: u32, port_register: u32) {
        let family = if addr.is_ipv4() { Family::V4 } else { Family::V6 };
        self.append(Nat {
            kind: NFT_NAT_DNAT,
            family: family.nfproto().into(),
            reg_addr_min: Some(addr_register),
            reg_proto_min: Some(port_register),
            flags: NF_NAT_RANGE_PROTO_SPECIFIED,
        });
    }

    /// The type of the source or of the destination (NFTA_FIB_F_*).
    fn load_address_type(&mut self, flags: u32, dreg: u32) {
        self.append(Fib { flags, result: NFT_FIB_RESULT_ADDRTYPE, dreg });
    }

    fn only_own_type(&mut self, of: u32) {
        self.load_address_type(of, NFT_REG_1);
        self.in_network_order(NFT_REG_1);
        self.compare_as(NFT_CMP_GTE, NFT_REG_1, &u32::from(*LOCAL_ADDR_TYPES.start()).to_be_bytes());
        self.compare_as(NFT_CMP_LTE, NFT_REG_1, &u32::from(*LOCAL_ADDR_TYPES.end()).to_be_bytes());
    }

    fn lookup(&mut self, set: SetName, register: u32) {
        self.lookup_if(set, register, true);
    }

    fn lookup_if(&mut self, set: SetName, sreg: u32, inside: bool) {
        let flags = if inside { 0 } else { NFT_LOOKUP_F_INV };
        self.append(Lookup { sreg, set: set.to_string().as_bytes(), flags, dreg: None });
    }

    /// The number of a socket's user or group, in a set of ranges.
    fn owner_lookup(&mut self, key: u32, set: SetName) {
        self.meta_load(key, NFT_REG_1);
        self.in_network_order(NFT_REG_1);
        self.lookup(set, NFT_REG_1);
    }

    fn socket_load(&mut self, key: u32, dreg: u32) {
        self.append(Socket { key, dreg, level: None });
    }

    fn tproxy(&mut self, nfproto: u8, reg_addr: Option<u32>, port_register: u32) {
        self.append(Tproxy { family: nfproto.into(), reg_addr, reg_port: Some(port_register) });
    }

    fn verdict(&mut self, verdict: Verdict) {
        let (code, chain) = match verdict {
            Verdict::Drop => (NF_DROP, None),
            Verdict::Accept => (NF_ACCEPT, None),
            Verdict::Return => (NFT_RETURN, None),
            Verdict::Jump(chain) => (NFT_JUMP, Some(chain)),
            Verdict::Goto(chain) => (NFT_GOTO, Some(chain)),
        };
        self.append(Immediate::Verdict { code, chain: chain.map(str::as_bytes) });
    }
}
