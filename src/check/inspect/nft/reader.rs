//! Interprets the expressions of a rule, by tracking the contents of the registers.

use std::net::IpAddr;

use super::family_of;
use crate::check::inspect::filter::{Condition, Part, Rule, Verdict};
use crate::check::inspect::xtables;
use crate::name::Name;
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

// NFT_CMP_*.
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const AT_MOST: u32 = 3;
const AT_LEAST: u32 = 5;

impl Reader {
    pub fn expression(&mut self, expression: &[u8]) {
        let Some(name) = wire::string_of(expression, 1) else { return };
        let data = wire::attribute(expression, 2).unwrap_or_default();
        let number = |kind| wire::be32_of(data, kind);
        let parts = &mut self.read.rule.parts;
        match name {
            "immediate" => self.immediate(data),
            "meta" => self.meta(data),
            "payload" => {
                // The transport header's bytes 2 and 3 are the destination port.
                let port = (number(2), number(3), number(4)) == (Some(2), Some(2), Some(2));
                self.load(number(1), port.then_some(Value::DestinationPort));
            }
            "fib" => {
                let (result, flags) = (number(2), number(3).unwrap_or(0));
                // NFTA_FIB_F_SADDR, _DADDR, _MARK; NFT_FIB_RESULT_OIF 1, _OIFNAME 2, _ADDRTYPE 3.
                let value = match result {
                    Some(3) if flags & 2 != 0 => Some(Value::DestinationType),
                    Some(1 | 2) if flags & 1 != 0 => Some(Value::RpFilterMiss { mark: flags & 4 != 0 }),
                    _ => None,
                };
                self.load(number(1), value);
            }
            "socket" => self.load(number(2), (number(1) == Some(0)).then_some(Value::TransparentSocket)),
            // NFT_CT_STATE is 0.
            "ct" if number(1).is_some() && number(2) != Some(0) => self.load(number(1), Some(Value::Tracked)),
            "ct" if number(1).is_some() => self.load(number(1), Some(Value::Connection { states: u32::MAX })),
            "bitwise" => self.bitwise(data),
            "cmp" => self.compare(data),
            "range" => self.range(data),
            "lookup" => self.lookup(data),
            "tproxy" => self.tproxy(data),
            "redir" => {
                let to = self.constant(number(1)).as_deref().and_then(port);
                self.read.rule.parts.push(Part::Redirect(to));
            }
            "masq" => parts.push(Part::TranslateSource),
            // NFT_NAT_SNAT 0, NFT_NAT_DNAT 1.
            "nat" if number(1) == Some(1) => {
                let to = self.constant(number(3)).as_deref().and_then(address);
                self.read.rule.parts.push(Part::TranslateDestination(to));
            }
            "nat" => parts.push(Part::TranslateSource),
            "reject" => parts.push(Part::Verdict(Verdict::Drop)),
            "queue" => parts.push(Part::Verdict(Verdict::Other)),
            "match" => parts.extend(xtables::matched(xt_name(data), xt_info(data))),
            "target" => parts.extend(xtables::target(xt_name(data), number(2).unwrap_or(0), xt_info(data))),
            // These have no effect on the packet.
            "counter" | "log" | "notrack" | "objref" | "last" | "dup" | "dynset" | "exthdr" | "ct" | "byteorder" => {}
            _ => parts.push(Part::OnlyIf(Condition::Other)),
        }
    }

    fn immediate(&mut self, data: &[u8]) {
        const ACCEPT: i32 = 1;
        const DROP: i32 = 0;
        const JUMP: i32 = -3;
        const GOTO: i32 = -4;
        const RETURN: i32 = -5;
        let register = wire::be32_of(data, 1);
        let Some(value) = wire::attribute(data, 2) else { return };
        if let Some(constant) = wire::attribute(value, 1) {
            return self.load(register, Some(Value::Constant(constant.to_vec())));
        }
        let Some(verdict) = wire::attribute(value, 2) else { return };
        let chain = || wire::name_of(verdict, 2).unwrap_or_default();
        let verdict = match wire::be32_of(verdict, 1).map(|code| code as i32) {
            Some(ACCEPT) => Verdict::Accept,
            Some(DROP) => Verdict::Drop,
            Some(RETURN) => Verdict::Return,
            Some(JUMP) => Verdict::Jump(chain()),
            Some(GOTO) => Verdict::Goto(chain()),
            _ => Verdict::Other,
        };
        self.read.rule.parts.push(Part::Verdict(verdict));
    }

    fn meta(&mut self, data: &[u8]) {
        // NFT_META_MARK, _IIF, _IIFNAME, _NFPROTO, _L4PROTO.
        const MARK: u32 = 3;
        const IIF: u32 = 4;
        const IIFNAME: u32 = 6;
        const NFPROTO: u32 = 15;
        const L4PROTO: u32 = 16;
        let number = |kind| wire::be32_of(data, kind);
        let key = number(2);
        if let Some(source) = number(3) {
            if key == Some(MARK) {
                let (keep, set) = match value_in(&self.registers, source) {
                    Some(Value::Constant(bytes)) => (0, wire::u32_at(bytes, 0)),
                    Some(Value::Mark { keep, flip }) => (*keep, Some(*flip)),
                    _ => (0, None),
                };
                self.read.rule.parts.push(Part::SetMark { keep, set });
            }
            return;
        }
        let value = match key {
            Some(MARK) => Some(Value::Mark { keep: u32::MAX, flip: 0 }),
            Some(IIF) => Some(Value::InterfaceIndex),
            Some(IIFNAME) => Some(Value::InterfaceName),
            Some(NFPROTO) => Some(Value::Family),
            Some(L4PROTO) => Some(Value::Protocol),
            _ => None,
        };
        self.load(number(1), value);
    }

    fn bitwise(&mut self, data: &[u8]) {
        let number = |kind| wire::be32_of(data, kind);
        let operand = |kind| wire::attribute(wire::attribute(data, kind)?, 1).and_then(|v| wire::u32_at(v, 0));
        let value = number(1).and_then(|source| value_in(&self.registers, source).cloned());
        // NFT_BITWISE_MASK_XOR is 0; shifts and operations on two registers are not interpreted.
        let simple = number(6).unwrap_or(0) == 0;
        let value = match (value, operand(4), operand(5)) {
            (Some(Value::Mark { keep, flip }), Some(mask), Some(xor)) if simple => {
                Some(Value::Mark { keep: keep & mask, flip: flip & mask ^ xor })
            }
            (Some(Value::Connection { .. }), Some(mask), _) => Some(Value::Connection { states: mask }),
            (Some(Value::Tracked), ..) => Some(Value::Tracked),
            _ => None,
        };
        self.load(number(2), value);
    }

    fn compare(&mut self, data: &[u8]) {
        let number = |kind| wire::be32_of(data, kind);
        let constant = wire::attribute(data, 3).and_then(|value| wire::attribute(value, 1)).unwrap_or_default();
        let operation = number(2);
        let value = number(1).and_then(|source| value_in(&self.registers, source));
        let condition = value.and_then(|value| compared(value, operation?, constant));
        let part = match (condition, operation) {
            // `ct state new` is (state & 8) != 0.
            (Some(condition @ Condition::Connection { .. }), _) => Part::OnlyIf(condition),
            (Some(condition), Some(NOT_EQUAL)) => Part::OnlyIfNot(condition),
            (Some(condition), _) => Part::OnlyIf(condition),
            (None, _) => Part::OnlyIf(Condition::Other),
        };
        self.read.rule.parts.push(part);
    }

    fn range(&mut self, data: &[u8]) {
        // NFT_RANGE_EQ, _NEQ.
        const OUTSIDE: u32 = 1;
        let number = |kind| wire::be32_of(data, kind);
        let end = |kind| wire::attribute(data, kind).and_then(|value| wire::be32_of(value, 1));
        let value = number(1).and_then(|source| value_in(&self.registers, source));
        // All types after RTN_UNICAST are addresses of this host, or addresses that no host has.
        let condition = match (value, end(3), end(4)) {
            (Some(Value::DestinationType), Some(first), Some(last))
                if (u32::from(libc::RTN_LOCAL)..=last).contains(&first) =>
            {
                Condition::DestinationIsLocal
            }
            _ => Condition::Other,
        };
        let outside = number(2) == Some(OUTSIDE) && condition != Condition::Other;
        self.read.rule.parts.push(if outside { Part::OnlyIfNot(condition) } else { Part::OnlyIf(condition) });
    }

    fn lookup(&mut self, data: &[u8]) {
        const INVERTED: u32 = 1;
        let number = |kind| wire::be32_of(data, kind);
        let value = number(2).and_then(|source| value_in(&self.registers, source));
        let condition = match value {
            Some(Value::Connection { .. } | Value::Tracked) => Condition::Connection { states: None },
            _ => Condition::Other,
        };
        let parts = &mut self.read.rule.parts;
        if let (Some(Value::DestinationPort), Some(set)) = (value, wire::name_of(data, 1)) {
            self.read.port_sets.push((parts.len(), set));
        }
        let inverted = number(5).unwrap_or(0) & INVERTED != 0;
        parts.push(if inverted { Part::OnlyIfNot(condition) } else { Part::OnlyIf(condition) });
        match number(3) {
            // The verdict of a map is unknown.
            Some(0) => parts.push(Part::Verdict(Verdict::Other)),
            to => self.load(to, None),
        }
    }

    fn tproxy(&mut self, data: &[u8]) {
        let number = |kind| wire::be32_of(data, kind);
        let family = number(1).and_then(|n| family_of(u8::try_from(n).ok()?)).flatten();
        let addr = number(2).and_then(|r| address(&self.constant(Some(r))?));
        let Some(port) = self.constant(number(3)).as_deref().and_then(port) else { return };
        self.read.rule.parts.push(Part::Tproxy { family, addr, port });
    }

    fn load(&mut self, to: Option<u32>, value: Option<Value>) {
        let Some(to) = to.map(register) else { return };
        self.registers.retain(|(register, _)| *register != to);
        self.registers.extend(value.map(|value| (to, value)));
    }

    fn constant(&self, from: Option<u32>) -> Option<Vec<u8>> {
        match value_in(&self.registers, from?)? {
            Value::Constant(bytes) => Some(bytes.clone()),
            _ => None,
        }
    }
}

/// Registers 1 to 4 (16 bytes) are the same memory as registers 8 to 23 (4 bytes).
fn register(number: u32) -> u32 {
    if (1..=4).contains(&number) { 8 + (number - 1) * 4 } else { number }
}

/// Returns the known contents of a register.
fn value_in(registers: &[(u32, Value)], from: u32) -> Option<&Value> {
    let from = register(from);
    registers.iter().find(|(register, _)| *register == from).map(|(_, value)| value)
}

fn compared(value: &Value, operation: u32, constant: &[u8]) -> Option<Condition> {
    if let (Value::DestinationPort, AT_MOST | AT_LEAST) = (value, operation) {
        let port = port(constant)?;
        return Some(match operation {
            AT_MOST => Condition::Ports(0, port),
            _ => Condition::Ports(port, u16::MAX),
        });
    }
    // All types from RTN_LOCAL on are addresses of this host, or addresses that no host has. Values are compared in network byte order.
    if let (Value::DestinationType, AT_MOST | AT_LEAST) = (value, operation) {
        let kind = constant.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))?;
        return (kind >= u32::from(libc::RTN_LOCAL)).then_some(Condition::DestinationIsLocal);
    }
    if operation != EQUAL && operation != NOT_EQUAL {
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

fn xt_name(data: &[u8]) -> &str {
    wire::string_of(data, 1).unwrap_or_default()
}

fn xt_info(data: &[u8]) -> &[u8] {
    wire::attribute(data, 3).unwrap_or_default()
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
                    a.string(1, name);
                    a.bytes(2, &payload);
                });
                let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
                Reader::default().expression(message.payload);
            }
        }
    }
}
