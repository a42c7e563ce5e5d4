//! Traces packets: a table that enables tracing and has a chain at every hook, and the kernel's trace messages.

use std::os::fd::AsFd;

use socket2::Socket;

use crate::backend::nft::object::{Hook, Object};
use crate::backend::nft::statement::Statement;
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::nft::{SUBSYSTEM, header};
use crate::error::{Error, Result};
use crate::netlink::uapi::*;
use crate::netlink::{Channel, Transport, wire};
use crate::sys;

/// Name of the table. No instance can have this name.
const TABLE: &str = "libtproxy--trace";

/// Hooks and priorities of its chains, before and after all other chains.
const WATCHED: [(&str, Hook); 7] = [
    ("prerouting, first", Hook::watching(NF_INET_PRE_ROUTING, "prerouting", -400)),
    ("prerouting, last", Hook::watching(NF_INET_PRE_ROUTING, "prerouting", 400)),
    ("input, first", Hook::watching(NF_INET_LOCAL_IN, "input", -400)),
    ("input, last", Hook::watching(NF_INET_LOCAL_IN, "input", 400)),
    ("forward, first", Hook::watching(NF_INET_FORWARD, "forward", -400)),
    ("forward, last", Hook::watching(NF_INET_FORWARD, "forward", 400)),
    ("postrouting, last", Hook::watching(NF_INET_POST_ROUTING, "postrouting", 400)),
];

/// A trace message: a packet in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    /// Identifier of the packet.
    pub packet: u32,
    /// NFPROTO_IPV4 or NFPROTO_IPV6, and the number of the transport protocol, if the message has the packet's header.
    pub family: u32,
    pub protocol: Option<u8>,
    pub table: String,
    pub chain: String,
    /// Handle of the rule; `None`: the policy of the chain.
    pub rule: Option<u64>,
    pub dropped: bool,
}

impl Step {
    /// Returns the hook, if the chain belongs to the tracing table.
    pub fn hook(&self) -> Option<&str> {
        (self.table == TABLE).then_some(self.chain.as_str())
    }
}

/// Traces every packet that arrives in this network namespace.
pub(crate) struct Tracer {
    reports: Socket,
    buffer: Vec<u8>,
}

impl Tracer {
    pub fn start(nft: &mut Channel) -> Result<Tracer> {
        let failed = |e: sys::Errno| Error::io(format_args!("nft monitor trace"), e);
        let reports = Channel::socket(libc::NETLINK_NETFILTER).map_err(failed)?;
        sys::setsockopt_int(reports.as_fd(), libc::SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE)
            .map_err(failed)?;
        let mut objects: Vec<Object> =
            WATCHED.into_iter().map(|(name, hook)| Object::Chain { name, hook: Some(hook) }).collect::<Vec<_>>();
        objects.push(Object::Rule { chain: WATCHED[0].0, statements: vec![Statement::Trace], comment: "follow" });
        let changes: Vec<Change<'_>> =
            std::iter::once(Change::AddTable).chain(objects.iter().map(Change::Add)).collect();
        commit(nft, TABLE, None, &changes)?;
        Ok(Tracer { reports, buffer: Vec::with_capacity(32 << 10) })
    }

    /// Returns the trace messages since the last call.
    pub fn steps(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        // Messages that did not fit the buffer are lost. The other messages are still useful.
        while self.reports.receive(&mut self.buffer).is_ok() {
            let messages = wire::messages(&self.buffer);
            steps.extend(messages.filter(|m| m.kind == SUBSYSTEM | NFT_MSG_TRACE).filter_map(|m| parse(m.payload)));
        }
        steps
    }
}

fn parse(payload: &[u8]) -> Option<Step> {
    let attrs = payload.get(header(0, 0).len()..)?;
    let number = |kind| wire::be32_of(attrs, kind);
    let text = |kind| Some(wire::string_of(attrs, kind)?.to_owned());
    let verdict =
        wire::attribute(attrs, NFTA_TRACE_VERDICT).and_then(|verdict| wire::be32_of(verdict, NFTA_VERDICT_CODE));
    let family = number(NFTA_TRACE_NFPROTO)?;
    // RFC 791: the protocol is the 10th byte; RFC 8200: the next header is the 7th.
    let at = if family == NFPROTO_IPV4.into() { 9 } else { 6 };
    Some(Step {
        packet: number(NFTA_TRACE_ID)?,
        family,
        protocol: wire::attribute(attrs, NFTA_TRACE_NETWORK_HEADER).and_then(|bytes| bytes.get(at).copied()),
        table: text(NFTA_TRACE_TABLE)?,
        chain: text(NFTA_TRACE_CHAIN)?,
        rule: wire::attribute(attrs, NFTA_TRACE_RULE_HANDLE)
            .and_then(wire::be64)
            .filter(|_| number(NFTA_TRACE_TYPE) == Some(NFT_TRACETYPE_RULE)),
        dropped: verdict == Some(NF_DROP) || number(NFTA_TRACE_POLICY) == Some(NF_DROP),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn trace_of_any_report_does_not_panic(payload in wire::odd::answer(4)) {
            parse(&payload);
        }
    }
}
