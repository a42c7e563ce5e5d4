//! An object of nf_tables within a table: as the kernel takes it, and as the
//! command that makes it, side by side.

use std::fmt;
use std::net::IpAddr;

use super::statement::{Expressions, OBJECT_COUNTER, Statement};
use crate::model::{Family, PortRange};
use crate::netlink::wire::Attrs;
use crate::prefix::{self, Range};

/// An object within a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Counter { name: &'static str },
    Set(Set),
    Elements { set: SetName, elements: Elements },
    Chain { name: &'static str, hook: Option<Hook> },
    Rule { chain: &'static str, statements: Vec<Statement>, comment: &'static str },
}

/// A set's name, in one of two variants: so that a new set can be there, and
/// be full, before the rules turn from the old one to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SetName {
    pub base: &'static str,
    /// The prefixes in it are all of this length, and it is asked for the address without the other bits.
    pub len: Option<u8>,
    pub variant: Variant,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Variant {
    #[default]
    First,
    Second,
}

impl Variant {
    pub fn other(self) -> Variant {
        match self {
            Variant::First => Variant::Second,
            Variant::Second => Variant::First,
        }
    }

    /// The variant that a name is of. No set has prefixes of length 2: there are but four.
    pub fn of(name: &str) -> Variant {
        if name.ends_with(SECOND) { Variant::Second } else { Variant::First }
    }
}

const SECOND: &str = "-2";

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base)?;
        if let Some(len) = self.len {
            write!(f, "-{len}")?;
        }
        f.write_str(if self.variant == Variant::Second { SECOND } else { "" })
    }
}

/// A named set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Set {
    pub name: SetName,
    pub key: Key,
    pub id: u32,
}

/// The type of a set's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Port,
    Interface,
    /// Ranges of addresses.
    Address(Family),
    /// Networks of one length, each by its first address.
    ///
    /// The kernel makes a hash table that grows and shrinks of a set without a size (`nft_rhash_type`); with one it
    /// would make a table that cannot grow, and refuse what is more.
    Network(Family),
}

/// What is put in a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Elements {
    /// Sorted and apart from each other.
    Ports(Vec<PortRange>),
    Interfaces(Vec<String>),
    /// Sorted and apart from each other.
    Addresses(Family, Vec<Range>),
    Networks(Vec<IpAddr>),
}

/// Where a base chain hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    kind: &'static str,
    /// NF_INET_PRE_ROUTING or NF_INET_LOCAL_OUT, and its name.
    number: u32,
    name: &'static str,
    /// `linux/netfilter_ipv4.h`, NF_IP_PRI_*.
    priority: i32,
}

impl Hook {
    /// Before connection tracking.
    pub const RAW_PREROUTING: Hook = Hook { kind: "filter", number: 0, name: "prerouting", priority: -300 };
    pub const RAW_OUTPUT: Hook = Hook { kind: "filter", number: 3, name: "output", priority: -300 };
    /// After connection tracking, before routing; on the way out, before routing anew.
    pub const MANGLE_PREROUTING: Hook = Hook { kind: "filter", number: 0, name: "prerouting", priority: -150 };
    pub const MANGLE_OUTPUT: Hook = Hook { kind: "route", number: 3, name: "output", priority: -150 };
    /// Where destinations are translated.
    pub const NAT_PREROUTING: Hook = Hook { kind: "nat", number: 0, name: "prerouting", priority: -100 };
    /// Where packets are only watched.
    pub const fn watching(number: u32, name: &'static str, priority: i32) -> Hook {
        Hook { kind: "filter", number, name, priority }
    }
    pub const NAT_OUTPUT: Hook = Hook { kind: "nat", number: 3, name: "output", priority: -100 };
}

// Message types, NFT_MSG_*.
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const NEW_OBJECT: u16 = 18;

impl Object {
    /// The message type and its creation flags.
    pub fn message(&self) -> (u16, u16) {
        const CREATE: u16 = libc::NLM_F_CREATE as u16;
        const APPEND: u16 = libc::NLM_F_APPEND as u16;
        match self {
            Object::Chain { .. } => (NEW_CHAIN, CREATE),
            Object::Rule { .. } => (NEW_RULE, CREATE | APPEND),
            Object::Set(_) => (NEW_SET, CREATE),
            Object::Elements { .. } => (NEW_ELEMENTS, CREATE),
            Object::Counter { .. } => (NEW_OBJECT, CREATE),
        }
    }

    /// The attributes of the message that makes this object in a table.
    pub fn encode(&self, table: &str, attrs: &mut Attrs<'_>) {
        attrs.string(1, table);
        match self {
            Object::Counter { name } => {
                attrs.string(2, name);
                attrs.be32(3, OBJECT_COUNTER);
                // It begins at zero.
                attrs.nest(4, |_| {});
            }
            Object::Set(set) => set.encode(attrs),
            Object::Elements { set, elements } => {
                attrs.string(2, &set.to_string());
                attrs.nest(3, |a| elements.encode(a));
            }
            Object::Chain { name, hook } => {
                attrs.string(3, name);
                if let Some(hook) = hook {
                    attrs.nest(4, |a| {
                        a.be32(1, hook.number);
                        a.be32(2, hook.priority as u32);
                    });
                    // Without a policy, what no rule decides goes its way.
                    attrs.string(7, hook.kind);
                }
            }
            Object::Rule { chain, statements, comment } => {
                attrs.string(2, chain);
                attrs.nest(4, |a| {
                    let mut rule = Expressions(a);
                    statements.iter().for_each(|statement| statement.encode(&mut rule));
                });
                self::comment(attrs, 7, comment);
            }
        }
    }

    /// The command that would do the same in this table.
    pub fn command<'a>(&'a self, table: &'a str) -> Command<'a> {
        Command { object: self, table }
    }
}

/// An object as the `nft` command that makes it.
pub(crate) struct Command<'a> {
    object: &'a Object,
    table: &'a str,
}

impl fmt::Display for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table;
        match self.object {
            Object::Counter { name } => write!(f, "add counter inet {table} {name}"),
            Object::Set(set) => write!(f, "add set inet {table} {} {{ {set} }}", set.name),
            Object::Elements { set, elements } => write!(f, "add element inet {table} {set} {{ {elements} }}"),
            Object::Chain { name, hook: None } => write!(f, "add chain inet {table} {name}"),
            Object::Chain { name, hook: Some(hook) } => write!(
                f,
                "add chain inet {table} {name} {{ type {} hook {} priority {}; policy accept; }}",
                hook.kind, hook.name, hook.priority
            ),
            Object::Rule { chain, statements, comment } => {
                write!(f, "add rule inet {table} {chain}")?;
                for statement in statements {
                    write!(f, " {statement}")?;
                }
                write!(f, " comment \"{comment}\"")
            }
        }
    }
}

/// What `nft` shows as a comment: type 0, length, text, NUL (libnftnl's `udata.h`).
pub(crate) fn comment(attrs: &mut Attrs<'_>, kind: u16, text: &str) {
    let text = text.as_bytes();
    let text = text.get(..usize::from(u8::MAX) - 1).unwrap_or(text);
    attrs.pieces(kind, [&[0, text.len() as u8 + 1], text, &[0]]);
}

impl Set {
    /// NFT_SET_INTERVAL.
    const INTERVAL: u32 = 4;

    fn encode(&self, attrs: &mut Attrs<'_>) {
        // `nft` knows the key types by these numbers; to the kernel they mean nothing.
        let (flags, key_type, key_len) = match self.key {
            Key::Port => (Self::INTERVAL, 13, 2),
            Key::Interface => (0, 41, 16),
            Key::Address(Family::V4) => (Self::INTERVAL, 7, 4),
            Key::Address(Family::V6) => (Self::INTERVAL, 8, 16),
            Key::Network(Family::V4) => (0, 7, 4),
            Key::Network(Family::V6) => (0, 8, 16),
        };
        attrs.string(2, &self.name.to_string());
        attrs.be32(3, flags);
        attrs.be32(4, key_type);
        attrs.be32(5, key_len);
        attrs.be32(10, self.id);
        if self.key == Key::Interface {
            attrs.bytes(13, &HOST_ORDER);
        }
    }
}

/// What tells `nft` that a set's keys are in host order, without which it shows
/// none: NFTNL_UDATA_SET_KEYBYTEORDER, 4 bytes, BYTEORDER_HOST_ENDIAN.
const HOST_ORDER: [u8; 6] = {
    let [a, b, c, d] = 1u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.key {
            Key::Port => "type inet_service; flags interval;",
            Key::Interface => "type ifname;",
            Key::Address(Family::V4) => "type ipv4_addr; flags interval;",
            Key::Address(Family::V6) => "type ipv6_addr; flags interval;",
            Key::Network(Family::V4) => "type ipv4_addr;",
            Key::Network(Family::V6) => "type ipv6_addr;",
        })
    }
}

impl Elements {
    /// Each element by itself; of a range, its first key and the first key behind it. At the top there is none behind.
    pub fn encode(&self, list: &mut Attrs<'_>) {
        match self {
            Elements::Ports(ranges) => {
                for range in ranges {
                    element(list, &range.first.to_be_bytes(), false);
                    if let Some(end) = range.last.checked_add(1) {
                        element(list, &end.to_be_bytes(), true);
                    }
                }
            }
            Elements::Interfaces(names) => {
                for name in names {
                    let mut key = [0; libc::IFNAMSIZ];
                    key.iter_mut().zip(name.bytes()).for_each(|(slot, byte)| *slot = byte);
                    element(list, &key, false);
                }
            }
            Elements::Addresses(family, ranges) => {
                let highest = prefix::highest(*family);
                let mut address = |number: u128, end: bool| match family {
                    Family::V4 => element(list, &(number as u32).to_be_bytes(), end),
                    Family::V6 => element(list, &number.to_be_bytes(), end),
                };
                for range in ranges {
                    address(range.first, false);
                    if range.last < highest {
                        address(range.last + 1, true);
                    }
                }
            }
            Elements::Networks(networks) => {
                for network in networks {
                    match network {
                        IpAddr::V4(addr) => element(list, &addr.octets(), false),
                        IpAddr::V6(addr) => element(list, &addr.octets(), false),
                    }
                }
            }
        }
    }
}

fn element(list: &mut Attrs<'_>, key: &[u8], end: bool) {
    /// NFT_SET_ELEM_INTERVAL_END.
    const END: u32 = 1;
    list.nest(1, |a| {
        if end {
            a.be32(3, END);
        }
        a.nest(1, |a| a.bytes(1, key));
    });
}

impl fmt::Display for Elements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Elements::Ports(ranges) => comma_separated(f, ranges),
            Elements::Interfaces(names) => comma_separated(f, names.iter().map(|name| format!("\"{name}\""))),
            Elements::Addresses(family, ranges) => comma_separated(
                f,
                ranges.iter().map(|range| {
                    let first = prefix::address(*family, range.first);
                    match prefix::address(*family, range.last) {
                        last if last == first => first.to_string(),
                        last => format!("{first}-{last}"),
                    }
                }),
            ),
            Elements::Networks(networks) => comma_separated(f, networks),
        }
    }
}

fn comma_separated(f: &mut fmt::Formatter<'_>, items: impl IntoIterator<Item = impl fmt::Display>) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        write!(f, "{item}")?;
    }
    Ok(())
}
