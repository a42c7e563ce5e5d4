//! The expressions that the kernel runs for a rule. Each is encoded and decoded side by side.
//!
//! A decoder reads what other programs have made: it gives `None` for a variant that it does not know, and the expression
//! is then [`Expression::Other`].

mod action;
mod load;
#[cfg(test)]
mod tests;
mod value;

use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Attrs};

pub(crate) use action::{Extension, Nat, Redir, Reject, Tproxy};
pub(super) use action::{Notrack, Objref};
pub(crate) use load::{Access, Ct, Fib, Meta, Payload, Socket};
pub(super) use value::Byteorder;
pub(crate) use value::{Bitwise, BitwiseOperation, Cmp, Immediate, Lookup, RangeCmp};

/// An expression of a rule, as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expression<'a> {
    Bitwise(Bitwise<'a>),
    Cmp(Cmp<'a>),
    Ct(Ct),
    Fib(Fib),
    Immediate(Immediate<'a>),
    Lookup(Lookup<'a>),
    /// A match of iptables.
    Match(Extension<'a>),
    Meta(Meta),
    Nat(Nat),
    Payload(Payload),
    RangeCmp(RangeCmp<'a>),
    Redir(Redir),
    Reject(Reject),
    Socket(Socket),
    /// A target of iptables.
    Target(Extension<'a>),
    Tproxy(Tproxy),
    /// Any other, by its name.
    Other(&'a str),
}

impl<'a> Expression<'a> {
    /// Reads an element of NFTA_RULE_EXPRESSIONS. `None`: it has no name.
    pub fn decode(element: &'a [u8]) -> Option<Expression<'a>> {
        let name = wire::string_of(element, NFTA_EXPR_NAME)?;
        let data = wire::attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
        let known = match name {
            Bitwise::NAME => Bitwise::decode(data).map(Expression::Bitwise),
            Cmp::NAME => Cmp::decode(data).map(Expression::Cmp),
            Ct::NAME => Ct::decode(data).map(Expression::Ct),
            Fib::NAME => Fib::decode(data).map(Expression::Fib),
            Immediate::NAME => Immediate::decode(data).map(Expression::Immediate),
            Lookup::NAME => Lookup::decode(data).map(Expression::Lookup),
            "match" => Some(Expression::Match(Extension::decode_match(data))),
            Meta::NAME => Meta::decode(data).map(Expression::Meta),
            Nat::NAME => Nat::decode(data).map(Expression::Nat),
            Payload::NAME => Payload::decode(data).map(Expression::Payload),
            RangeCmp::NAME => RangeCmp::decode(data).map(Expression::RangeCmp),
            Redir::NAME => Some(Expression::Redir(Redir::decode(data))),
            Reject::NAME => Reject::decode(data).map(Expression::Reject),
            Socket::NAME => Socket::decode(data).map(Expression::Socket),
            "target" => Some(Expression::Target(Extension::decode_target(data))),
            Tproxy::NAME => Some(Expression::Tproxy(Tproxy::decode(data))),
            _ => None,
        };
        Some(known.unwrap_or(Expression::Other(name)))
    }
}

/// An expression that this library's rules have.
pub(super) trait Encode {
    const NAME: &'static str;

    /// Writes the attributes of NFTA_EXPR_DATA.
    fn encode(&self, data: &mut Attrs<'_>);
}

/// Appends an expression to NFTA_RULE_EXPRESSIONS.
pub(super) fn append<E: Encode>(list: &mut Attrs<'_>, expression: &E) {
    list.nest(NFTA_LIST_ELEM, |a| {
        a.string(NFTA_EXPR_NAME, E::NAME);
        a.nest(NFTA_EXPR_DATA, |a| expression.encode(a));
    });
}

/// A value in a nested attribute.
fn encode_value(data: &mut Attrs<'_>, kind: u16, value: &[u8]) {
    data.nest(kind, |a| a.bytes(NFTA_DATA_VALUE, value));
}

fn decode_value(data: &[u8], kind: u16) -> Option<&[u8]> {
    wire::attribute(wire::attribute(data, kind)?, NFTA_DATA_VALUE)
}

/// A string with its terminating NUL, if the kernel sent it, without that.
fn decode_string(data: &[u8], kind: u16) -> Option<&[u8]> {
    wire::attribute(data, kind).map(wire::until_nul)
}
