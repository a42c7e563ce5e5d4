//! Interprets the expressions of a rule, by tracking the contents of the registers.

use std::net::IpAddr;

use super::family_of;
use crate::backend::nft::expression::{
    Access, Bitwise, BitwiseOperation, Cmp, Ct, Expression, Extension, Fib, Immediate, Lookup, Meta, RangeCmp, Socket,
    Tproxy,
};
use crate::check::inspect::filter::{Condition, Part, Rule, Verdict};
use crate::check::inspect::xtables;
use crate::name::Name;
use crate::netlink::uapi::*;
use crate::netlink::wire;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Read {
    pub rule: Rule,
    /// Conditions on a port set: index of the part, and name of the set.
    pub port_sets: Vec<(usize, Name)>,
}

/// Contents of a register.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Constant(Vec<u8>),
    /// The packet's mark & keep ^ flip.
    Mark {
        keep: u32,
        flip: u32,
    },
    Protocol,
    Family,
    DestinationPort,
    InterfaceName,
    InterfaceIndex,
    DestinationType,
    RpFilterMiss {
        mark: bool,
    },
    TransparentSocket,
    /// The state of the connection, masked by these bits; `u32::MAX`: all bits.
    Connection {
        states: u32,
    },
    /// Another attribute of the connection.
    Tracked,
}

/// Interprets the expressions of one rule in order.
#[derive(Default)]
pub(super) struct Reader {
    pub read: Read,
    /// Registers with known contents.
    registers: Vec<(u32, Value)>,
}

impl Reader {
    /// Interprets an element of NFTA_RULE_EXPRESSIONS.
    pub fn expression(&mut self, element: &[u8]) {
        let Some(expression) = Expression::decode(element) else { return };
        let parts = &mut self.read.rule.parts;
        match expression {
            Expression::Bitwise(bitwise) => self.bitwise(&bitwise),
            Expression::Cmp(cmp) => self.compare(&cmp),
            Expression::Ct(Ct { key, access: Access::Load { dreg } }) => {
                let state = key == NFT_CT_STATE;
                self.load(dreg, Some(if state { Value::Connection { states: u32::MAX } } else { Value::Tracked }));
            }
            Expression::Fib(fib) => self.load(fib.dreg, looked_up(&fib)),
            Expression::Immediate(Immediate::Value { dreg, value }) => {
                self.load(dreg, Some(Value::Constant(value.to_vec())));
            }
            Expression::Immediate(Immediate::Verdict { code, chain }) => {
                parts.push(Part::Verdict(verdict(code, chain)))
            }
            Expression::Lookup(lookup) => self.lookup(&lookup),
            Expression::Match(extension) => parts.extend(xtables::matched(extension.name, extension.info)),
            Expression::Meta(Meta { key, access: Access::Load { dreg } }) => self.load(dreg, property(key)),
            Expression::Meta(Meta { key: NFT_META_MARK, access: Access::Set { sreg } }) => self.set_mark(sreg),
            Expression::Nat(nat) if nat.kind == NFT_NAT_DNAT => {
                let to = nat.reg_addr_min.and_then(|register| address(self.constant(register)?));
                self.read.rule.parts.push(Part::TranslateDestination(to));
            }
            Expression::Nat(_) => parts.push(Part::TranslateSource),
            Expression::Payload(payload) => {
                // TCP and UDP have the destination port in bytes 2 and 3 of the header.
                let port = (payload.base, payload.offset, payload.len) == (NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2);
                self.load(payload.dreg, port.then_some(Value::DestinationPort));
            }
            Expression::RangeCmp(range) => self.range(&range),
            Expression::Redir(redir) => {
                let to = redir.reg_proto_min.and_then(|register| port(self.constant(register)?));
                self.read.rule.parts.push(Part::Redirect(to));
            }
            Expression::Socket(Socket { key, dreg, .. }) => {
                self.load(dreg, (key == NFT_SOCKET_TRANSPARENT).then_some(Value::TransparentSocket));
            }
            Expression::Target(Extension { name, revision, info }) => {
                parts.extend(xtables::target(name, revision, info));
            }
            Expression::Tproxy(tproxy) => self.tproxy(&tproxy),
            Expression::Other("masq") => parts.push(Part::TranslateSource),
            Expression::Reject(_) | Expression::Other("reject") => parts.push(Part::Verdict(Verdict::Drop)),
            Expression::Other("queue") => parts.push(Part::Verdict(Verdict::Other)),
            // These have no effect on the verdict or the mark. A payload that is not loaded is written.
            Expression::Meta(_) | Expression::Ct(_) => {}
            Expression::Other(
                "counter" | "log" | "notrack" | "objref" | "last" | "dup" | "dynset" | "exthdr" | "ct" | "byteorder"
                | "payload",
            ) => {}
            Expression::Other(_) => parts.push(Part::OnlyIf(Condition::Other)),
        }
    }

    fn set_mark(&mut self, sreg: u32) {
        let (keep, set) = match value_in(&self.registers, sreg) {
            Some(Value::Constant(bytes)) => (0, wire::u32_at(bytes, 0)),
            Some(Value::Mark { keep, flip }) => (*keep, Some(*flip)),
            _ => (0, None),
        };
        self.read.rule.parts.push(Part::SetMark { keep, set });
    }

    fn bitwise(&mut self, bitwise: &Bitwise<'_>) {
        let value = match (value_in(&self.registers, bitwise.sreg), bitwise.operation) {
            (Some(Value::Mark { keep, flip }), BitwiseOperation::Bool { mask, xor }) => {
                let masked = |mask: u32, xor: u32| Value::Mark { keep: keep & mask, flip: flip & mask ^ xor };
                wire::u32_at(mask, 0).zip(wire::u32_at(xor, 0)).map(|(mask, xor)| masked(mask, xor))
            }
            (Some(Value::Connection { .. }), BitwiseOperation::Bool { mask, .. }) => {
                wire::u32_at(mask, 0).map(|states| Value::Connection { states })
            }
            (Some(Value::Tracked), _) => Some(Value::Tracked),
            _ => None,
        };
        self.load(bitwise.dreg, value);
    }

    fn compare(&mut self, cmp: &Cmp<'_>) {
        let value = value_in(&self.registers, cmp.sreg);
        let part = match value.and_then(|value| compared(value, cmp)) {
            // `ct state new` is (state & 8) != 0.
            Some(condition @ Condition::Connection { .. }) => Part::OnlyIf(condition),
            Some(condition) if cmp.op == NFT_CMP_NEQ => Part::OnlyIfNot(condition),
            Some(condition) => Part::OnlyIf(condition),
            None => Part::OnlyIf(Condition::Other),
        };
        self.read.rule.parts.push(part);
    }

    fn range(&mut self, range: &RangeCmp<'_>) {
        let value = value_in(&self.registers, range.sreg);
        // All types after RTN_UNICAST are addresses of this host, or of no host.
        let condition = match (value, wire::be32(range.from), wire::be32(range.to)) {
            (Some(Value::DestinationType), Some(first), Some(last))
                if (u32::from(libc::RTN_LOCAL)..=last).contains(&first) =>
            {
                Condition::DestinationIsLocal
            }
            _ => Condition::Other,
        };
        let outside = range.op == NFT_RANGE_NEQ && condition != Condition::Other;
        self.read.rule.parts.push(if outside { Part::OnlyIfNot(condition) } else { Part::OnlyIf(condition) });
    }

    fn lookup(&mut self, lookup: &Lookup<'_>) {
        let value = value_in(&self.registers, lookup.sreg);
        let condition = match value {
            Some(Value::Connection { .. } | Value::Tracked) => Condition::Connection { states: None },
            _ => Condition::Other,
        };
        let parts = &mut self.read.rule.parts;
        if value == Some(&Value::DestinationPort) {
            self.read.port_sets.push((parts.len(), Name::new(lookup.set)));
        }
        let inverted = lookup.flags & NFT_LOOKUP_F_INV != 0;
        parts.push(if inverted { Part::OnlyIfNot(condition) } else { Part::OnlyIf(condition) });
        match lookup.dreg {
            // A verdict map. Its verdicts are not read.
            Some(NFT_REG_VERDICT) => parts.push(Part::Verdict(Verdict::Other)),
            Some(dreg) => self.load(dreg, None),
            None => {}
        }
    }

    fn tproxy(&mut self, tproxy: &Tproxy) {
        let family = u8::try_from(tproxy.family).ok().and_then(family_of).flatten();
        let addr = tproxy.reg_addr.and_then(|register| address(self.constant(register)?));
        let Some(port) = tproxy.reg_port.and_then(|register| port(self.constant(register)?)) else { return };
        self.read.rule.parts.push(Part::Tproxy { family, addr, port });
    }

    fn load(&mut self, to: u32, value: Option<Value>) {
        let to = register(to);
        self.registers.retain(|(register, _)| *register != to);
        self.registers.extend(value.map(|value| (to, value)));
    }

    fn constant(&self, from: u32) -> Option<&[u8]> {
        match value_in(&self.registers, from)? {
            Value::Constant(bytes) => Some(bytes),
            _ => None,
        }
    }
}

/// The part of a packet's properties that a rule can compare.
fn property(key: u32) -> Option<Value> {
    match key {
        NFT_META_MARK => Some(Value::Mark { keep: u32::MAX, flip: 0 }),
        NFT_META_IIF => Some(Value::InterfaceIndex),
        NFT_META_IIFNAME => Some(Value::InterfaceName),
        NFT_META_NFPROTO => Some(Value::Family),
        NFT_META_L4PROTO => Some(Value::Protocol),
        _ => None,
    }
}

fn looked_up(fib: &Fib) -> Option<Value> {
    match fib.result {
        NFT_FIB_RESULT_ADDRTYPE if fib.flags & NFTA_FIB_F_DADDR != 0 => Some(Value::DestinationType),
        NFT_FIB_RESULT_OIF | NFT_FIB_RESULT_OIFNAME if fib.flags & NFTA_FIB_F_SADDR != 0 => {
            Some(Value::RpFilterMiss { mark: fib.flags & NFTA_FIB_F_MARK != 0 })
        }
        _ => None,
    }
}

fn verdict(code: u32, chain: Option<&[u8]>) -> Verdict {
    let chain = || chain.map(Name::new).unwrap_or_default();
    match code {
        NF_ACCEPT => Verdict::Accept,
        NF_DROP => Verdict::Drop,
        NFT_RETURN => Verdict::Return,
        NFT_JUMP => Verdict::Jump(chain()),
        NFT_GOTO => Verdict::Goto(chain()),
        _ => Verdict::Other,
    }
}

/// Registers NFT_REG_1 to NFT_REG_4 of 16 bytes are the same as NFT_REG32_00 to NFT_REG32_15 of 4 bytes.
fn register(number: u32) -> u32 {
    match number {
        NFT_REG_1..=NFT_REG_4 => NFT_REG32_00 + (number - NFT_REG_1) * 4,
        _ => number,
    }
}

/// Returns the known contents of a register.
fn value_in(registers: &[(u32, Value)], from: u32) -> Option<&Value> {
    let from = register(from);
    registers.iter().find(|(register, _)| *register == from).map(|(_, value)| value)
}

fn compared(value: &Value, cmp: &Cmp<'_>) -> Option<Condition> {
    let Cmp { op: operation, value: constant, .. } = *cmp;
    if let (Value::DestinationPort, NFT_CMP_LTE | NFT_CMP_GTE) = (value, operation) {
        let port = port(constant)?;
        return Some(match operation {
            NFT_CMP_LTE => Condition::Ports(0, port),
            _ => Condition::Ports(port, u16::MAX),
        });
    }
    // All types from RTN_LOCAL on are addresses of this host, or addresses that no host has. Values are compared in network byte order.
    if let (Value::DestinationType, NFT_CMP_LTE | NFT_CMP_GTE) = (value, operation) {
        let kind = constant.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))?;
        return (kind >= u32::from(libc::RTN_LOCAL)).then_some(Condition::DestinationIsLocal);
    }
    if operation != NFT_CMP_EQ && operation != NFT_CMP_NEQ {
        return None;
    }
    Some(match value {
        Value::Mark { keep, flip } => Condition::Mark { mask: *keep, value: wire::u32_at(constant, 0)? ^ flip },
        Value::Protocol => Condition::Protocol(*constant.first()?),
        Value::Family => Condition::Family(family_of(*constant.first()?)??),
        Value::DestinationPort => {
            let port = port(constant)?;
            Condition::Ports(port, port)
        }
        Value::InterfaceName if constant.starts_with(b"lo\0") => Condition::Loopback,
        Value::InterfaceIndex if wire::u32_at(constant, 0)? == 1 => Condition::Loopback,
        Value::DestinationType if wire::u32_at(constant, 0)? == u32::from(libc::RTN_LOCAL) => {
            Condition::DestinationIsLocal
        }
        Value::RpFilterMiss { mark } if constant.iter().all(|byte| *byte == 0) => {
            Condition::RpFilterMiss { mark: *mark }
        }
        Value::Connection { states: u32::MAX } => Condition::Connection { states: wire::u32_at(constant, 0) },
        Value::Connection { states } => Condition::Connection { states: Some(*states) },
        Value::Tracked => Condition::Connection { states: None },
        Value::TransparentSocket if constant.first() == Some(&1) => Condition::TransparentSocket,
        _ => return None,
    })
}

fn port(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::Buffer;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nft_expression_of_any_bytes_does_not_panic(payload in wire::odd::answer(0)) {
            for name in ["immediate", "meta", "payload", "fib", "socket", "ct", "bitwise", "cmp", "range", "lookup", "tproxy", "redir", "nat", "match", "target"] {
                let mut buffer = Buffer::default();
                buffer.message(1, 0, 1, &[], |a| {
                    a.string(NFTA_EXPR_NAME, name);
                    a.bytes(NFTA_EXPR_DATA, &payload);
                });
                let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
                Reader::default().expression(message.payload);
            }
        }
    }
}
