//! Routes: RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE.

use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs};

/// A route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RouteMessage<'a> {
    pub family: u8,
    /// 0: the default route.
    pub dst_len: u8,
    pub table: u32,
    /// Who made the route.
    pub protocol: u8,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// RTN_*.
    pub kind: u8,
    /// RTNH_F_*.
    pub flags: u32,
    pub dst: Option<&'a [u8]>,
    pub gateway: Option<&'a [u8]>,
    pub oif: Option<u32>,
    /// The metric.
    pub priority: Option<u32>,
}

impl<'a> RouteMessage<'a> {
    /// Size of `struct rtmsg`.
    const HEADER: usize = 12;

    /// `struct rtmsg`. The table is an attribute.
    pub fn header(&self) -> [u8; RouteMessage::HEADER] {
        let [f0, f1, f2, f3] = self.flags.to_ne_bytes();
        [self.family, self.dst_len, 0, 0, 0, self.protocol, self.scope, self.kind, f0, f1, f2, f3]
    }

    pub fn encode(&self, attrs: &mut Attrs<'_>) {
        attrs.u32(RTA_TABLE, self.table);
        if let Some(dst) = self.dst {
            attrs.bytes(RTA_DST, dst);
        }
        if let Some(gateway) = self.gateway {
            attrs.bytes(RTA_GATEWAY, gateway);
        }
        if let Some(index) = self.oif {
            attrs.u32(RTA_OIF, index);
        }
        if let Some(metric) = self.priority {
            attrs.u32(RTA_PRIORITY, metric);
        }
    }

    pub fn decode(payload: &'a [u8]) -> Option<RouteMessage<'a>> {
        let (header, attrs) = payload.split_first_chunk::<{ RouteMessage::HEADER }>()?;
        let [family, dst_len, _, _, table, protocol, scope, kind, flags @ ..] = *header;
        Some(RouteMessage {
            family,
            dst_len,
            table: wire::u32_of(attrs, RTA_TABLE).unwrap_or(table.into()),
            protocol,
            scope,
            kind,
            flags: u32::from_ne_bytes(flags),
            dst: wire::attribute(attrs, RTA_DST),
            gateway: wire::attribute(attrs, RTA_GATEWAY),
            oif: wire::u32_of(attrs, RTA_OIF),
            priority: wire::u32_of(attrs, RTA_PRIORITY),
        })
    }
}
