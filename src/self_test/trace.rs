//! Traces packets: a table that enables tracing and has a chain at every hook, and the kernel's trace messages.

use std::os::fd::AsFd;

use socket2::Socket;

use crate::backend::nft::object::{Hook, Object};
use crate::backend::nft::statement::Statement;
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::nft::{SUBSYSTEM, header};
use crate::error::{Error, Result};
use crate::netlink::{Channel, Transport, wire};
use crate::sys;

/// Name of the table. No instance can have this name.
const TABLE: &str = "libtproxy--trace";

/// Hooks and priorities of its chains, before and after all other chains.
const WATCHED: [(&str, Hook); 7] = [
    ("prerouting, first", Hook::watching(0, "prerouting", -400)),
    ("prerouting, last", Hook::watching(0, "prerouting", 400)),
    ("input, first", Hook::watching(1, "input", -400)),
    ("input, last", Hook::watching(1, "input", 400)),
    ("forward, first", Hook::watching(2, "forward", -400)),
    ("forward, last", Hook::watching(2, "forward", 400)),
    ("postrouting, last", Hook::watching(4, "postrouting", 400)),
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
        /// NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE.
        const ADD_MEMBERSHIP: i32 = 1;
        const TRACES: i32 = 9;
        let failed = |e: sys::Errno| Error::io(format_args!("nft monitor trace"), e);
        let reports = Channel::socket(libc::NETLINK_NETFILTER).map_err(failed)?;
        sys::setsockopt_int(reports.as_fd(), libc::SOL_NETLINK, ADD_MEMBERSHIP, TRACES).map_err(failed)?;
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
        const TRACE: u16 = 17;
        let mut steps = Vec::new();
        // Messages that did not fit the buffer are lost. The other messages are still useful.
        while self.reports.receive(&mut self.buffer).is_ok() {
            let messages = wire::messages(&self.buffer);
            steps.extend(messages.filter(|m| m.kind == SUBSYSTEM | TRACE).filter_map(|m| parse(m.payload)));
        }
        steps
    }
}

fn parse(payload: &[u8]) -> Option<Step> {
    // NFTA_TRACE_*; NFT_TRACETYPE_RULE; NFTA_VERDICT_CODE.
    const TABLE: u16 = 1;
    const CHAIN: u16 = 2;
    const RULE_HANDLE: u16 = 3;
    const TYPE: u16 = 4;
    const VERDICT: u16 = 5;
    const ID: u16 = 6;
    const NETWORK_HEADER: u16 = 8;
    const NFPROTO: u16 = 15;
    const POLICY: u16 = 16;
    const OF_RULE: u32 = 3;
    const DROP: u32 = 0;
    let attrs = payload.get(header(0, 0).len()..)?;
    let number = |kind| wire::be32_of(attrs, kind);
    let text = |kind| Some(wire::string_of(attrs, kind)?.to_owned());
    let verdict = wire::attribute(attrs, VERDICT).and_then(|v| wire::attribute(v, 1)).and_then(wire::be32);
    let family = number(NFPROTO)?;
    // RFC 791: the protocol is the 10th byte; RFC 8200: the next header is the 7th.
    let at = if family == libc::AF_INET as u32 { 9 } else { 6 };
    Some(Step {
        packet: number(ID)?,
        family,
        protocol: wire::attribute(attrs, NETWORK_HEADER).and_then(|bytes| bytes.get(at).copied()),
        table: text(TABLE)?,
        chain: text(CHAIN)?,
        rule: wire::attribute(attrs, RULE_HANDLE).and_then(wire::be64).filter(|_| number(TYPE) == Some(OF_RULE)),
        dropped: verdict == Some(DROP) || number(POLICY) == Some(DROP),
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
