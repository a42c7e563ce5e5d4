use super::link::{self, Link};
use super::route::RouteMessage;
use super::rule::{RuleMessage, RuleOption};
use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs, Buffer};
use proptest::prelude::*;

/// The payload of a message.
fn payload(header: &[u8], attrs: impl FnOnce(&mut Attrs<'_>)) -> Vec<u8> {
    let mut buffer = Buffer::default();
    buffer.message(1, 0, 1, header, attrs);
    wire::messages(buffer.bytes().unwrap()).next().unwrap().payload.to_vec()
}

proptest! {
    #[test]
    fn routing_rule_encoded_is_decoded_to_the_same(
        (family, src_len, tos, protocol, flags) in any::<(u8, u8, u8, u8, u32)>(),
        (priority, table, target) in any::<(u32, u32, u32)>(),
        (fwmark, fwmask) in any::<(Option<u32>, Option<u32>)>(),
        (src, iifname) in (any::<Option<[u8; 4]>>(), proptest::option::of("[a-z]{1,15}")),
    ) {
        let rule = RuleMessage {
            family,
            src_len,
            tos,
            action: FR_ACT_TO_TBL,
            flags,
            priority,
            protocol,
            table,
            fwmark,
            fwmask,
            src: src.as_ref().map(<[u8; 4]>::as_slice),
            iifname: iifname.as_deref().map(str::as_bytes),
            ..RuleMessage::default()
        };
        let bytes = payload(&rule.header(), |a| rule.encode(a));
        prop_assert_eq!(RuleMessage::decode(&bytes), Some(rule.clone()));
        let jump = RuleMessage { action: FR_ACT_GOTO, table: 0, goto: Some(target), ..rule };
        let bytes = payload(&jump.header(), |a| jump.encode(a));
        prop_assert_eq!(RuleMessage::decode(&bytes), Some(jump));
    }

    #[test]
    fn route_encoded_is_decoded_to_the_same(
        (family, dst_len, protocol, scope, kind) in any::<(u8, u8, u8, u8, u8)>(),
        (table, flags, oif, priority) in any::<(u32, u32, Option<u32>, Option<u32>)>(),
        (dst, gateway) in any::<(Option<[u8; 16]>, Option<[u8; 4]>)>(),
    ) {
        let route = RouteMessage {
            family,
            dst_len,
            table,
            protocol,
            scope,
            kind,
            flags,
            dst: dst.as_ref().map(<[u8; 16]>::as_slice),
            gateway: gateway.as_ref().map(<[u8; 4]>::as_slice),
            oif,
            priority,
        };
        let bytes = payload(&route.header(), |a| route.encode(a));
        prop_assert_eq!(RouteMessage::decode(&bytes), Some(route));
    }

    #[test]
    fn routing_message_of_any_bytes_does_not_panic(payload in prop_oneof![wire::odd::answer(8), wire::odd::answer(12), wire::odd::answer(16)]) {
        RuleMessage::decode(&payload);
        RouteMessage::decode(&payload);
        if let Some(link) = Link::decode(&payload) {
            link.ipv4_conf(0);
            link.ipv6_conf(DEVCONF_ACCEPT_RA);
        }
    }
}

#[test]
fn routing_rule_of_others_has_its_conditions() {
    let rule = RuleMessage { family: 2, action: FR_ACT_TO_TBL, dst_len: 8, ..RuleMessage::default() };
    let pair = |first: u16, last: u16| [first.to_ne_bytes(), last.to_ne_bytes()].concat();
    let bytes = payload(&rule.header(), |a| {
        a.u32(FRA_SUPPRESS_PREFIXLEN, u32::MAX);
        a.u32(FRA_SUPPRESS_IFGROUP, 7);
        a.string(FRA_OIFNAME, "eth0");
        a.u8(FRA_L3MDEV, 1);
        a.bytes(FRA_UID_RANGE, &[1u32.to_ne_bytes(), 2u32.to_ne_bytes()].concat());
        a.u8(FRA_IP_PROTO, 6);
        a.bytes(FRA_SPORT_RANGE, &pair(3, 4));
        a.bytes(FRA_DPORT_RANGE, &pair(5, 6));
        a.bytes(FRA_DST, &[10, 0, 0, 0]);
        a.u8(FRA_DSCP_MASK, 1);
    });
    let expected = [
        RuleOption::SuppressIfgroup(7),
        RuleOption::Oifname(b"eth0"),
        RuleOption::L3mdev,
        RuleOption::UidRange(1, 2),
        RuleOption::IpProto(6),
        RuleOption::SportRange(3, 4),
        RuleOption::DportRange(5, 6),
        RuleOption::Dst(&[10, 0, 0, 0]),
        RuleOption::Unknown(FRA_DSCP_MASK),
    ];
    assert_eq!(RuleMessage::decode(&bytes).unwrap().others, expected);
}

#[test]
fn route_without_attribute_has_the_table_of_its_header() {
    let mut header = RouteMessage { family: 2, ..RouteMessage::default() }.header();
    header[4] = libc::RT_TABLE_MAIN;
    assert_eq!(RouteMessage::decode(&header).unwrap().table, u32::from(libc::RT_TABLE_MAIN));
}

#[test]
fn link_header_is_read_back() {
    let bytes = payload(&link::header(7, libc::IFF_UP as u32, 0), |a| a.string(IFLA_IFNAME, "eth0"));
    let link = Link::decode(&bytes).unwrap();
    assert_eq!((link.index, link.flags, link.name), (7, libc::IFF_UP as u32, &b"eth0"[..]));
}
