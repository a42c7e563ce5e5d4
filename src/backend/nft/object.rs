//! An object of nf_tables within a table: as the kernel takes it, and as the
//! command that makes it, side by side.

use std::fmt;

use super::set::{Elements, Set, SetName};
use super::statement::Statement;
use crate::netlink::uapi::*;
use crate::netlink::wire::Attrs;

/// An object within a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Counter { name: &'static str },
    Set(Set),
    Elements { set: SetName, elements: Elements },
    Chain { name: &'static str, hook: Option<Hook> },
    Rule { chain: &'static str, statements: Vec<Statement>, comment: &'static str },
}

/// Where a base chain hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    kind: &'static str,
    /// NF_INET_* and its name.
    number: u32,
    name: &'static str,
    /// NF_IP_PRI_*.
    priority: i32,
}

impl Hook {
    /// Before connection tracking.
    pub const RAW_PREROUTING: Hook =
        Hook { kind: "filter", number: NF_INET_PRE_ROUTING, name: "prerouting", priority: NF_IP_PRI_RAW };
    pub const RAW_OUTPUT: Hook =
        Hook { kind: "filter", number: NF_INET_LOCAL_OUT, name: "output", priority: NF_IP_PRI_RAW };
    /// After connection tracking, before routing; on the way out, before routing anew.
    pub const MANGLE_PREROUTING: Hook =
        Hook { kind: "filter", number: NF_INET_PRE_ROUTING, name: "prerouting", priority: NF_IP_PRI_MANGLE };
    pub const MANGLE_OUTPUT: Hook =
        Hook { kind: "route", number: NF_INET_LOCAL_OUT, name: "output", priority: NF_IP_PRI_MANGLE };
    /// Where destinations are translated.
    pub const NAT_PREROUTING: Hook =
        Hook { kind: "nat", number: NF_INET_PRE_ROUTING, name: "prerouting", priority: NF_IP_PRI_NAT_DST };
    /// Where packets are only watched.
    pub const fn watching(number: u32, name: &'static str, priority: i32) -> Hook {
        Hook { kind: "filter", number, name, priority }
    }
    pub const NAT_OUTPUT: Hook =
        Hook { kind: "nat", number: NF_INET_LOCAL_OUT, name: "output", priority: NF_IP_PRI_NAT_DST };
}

impl Object {
    /// The message type and its creation flags.
    pub fn message(&self) -> (u16, u16) {
        const CREATE: u16 = libc::NLM_F_CREATE as u16;
        const APPEND: u16 = libc::NLM_F_APPEND as u16;
        match self {
            Object::Chain { .. } => (NFT_MSG_NEWCHAIN, CREATE),
            Object::Rule { .. } => (NFT_MSG_NEWRULE, CREATE | APPEND),
            Object::Set(_) => (NFT_MSG_NEWSET, CREATE),
            Object::Elements { .. } => (NFT_MSG_NEWSETELEM, CREATE),
            Object::Counter { .. } => (NFT_MSG_NEWOBJ, CREATE),
        }
    }

    /// The attributes of the message that makes this object in a table.
    pub fn encode(&self, table: &str, attrs: &mut Attrs<'_>) {
        match self {
            Object::Counter { name } => {
                attrs.string(NFTA_OBJ_TABLE, table);
                attrs.string(NFTA_OBJ_NAME, name);
                attrs.be32(NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER);
                // It begins at zero.
                attrs.nest(NFTA_OBJ_DATA, |_| {});
            }
            Object::Set(set) => {
                attrs.string(NFTA_SET_TABLE, table);
                set.encode(attrs);
            }
            Object::Elements { set, elements } => elements.encode_in(attrs, table, set),
            Object::Chain { name, hook } => {
                attrs.string(NFTA_CHAIN_TABLE, table);
                attrs.string(NFTA_CHAIN_NAME, name);
                if let Some(hook) = hook {
                    attrs.nest(NFTA_CHAIN_HOOK, |a| {
                        a.be32(NFTA_HOOK_HOOKNUM, hook.number);
                        a.be32(NFTA_HOOK_PRIORITY, hook.priority as u32);
                    });
                    // Without a policy, what no rule decides goes its way.
                    attrs.string(NFTA_CHAIN_TYPE, hook.kind);
                }
            }
            Object::Rule { chain, statements, comment } => {
                attrs.string(NFTA_RULE_TABLE, table);
                attrs.string(NFTA_RULE_CHAIN, chain);
                attrs.nest(NFTA_RULE_EXPRESSIONS, |a| {
                    statements.iter().for_each(|statement| statement.encode(a));
                });
                self::comment(attrs, NFTA_RULE_USERDATA, comment);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::{self, Buffer};

    #[test]
    fn comment_is_cut_to_what_its_length_can_say() {
        for (len, kept) in [(0, 0), (1, 1), (253, 253), (254, 254), (255, 254), (300, 254)] {
            let mut buffer = Buffer::default();
            buffer.message(NFT_MSG_NEWRULE, 0, 1, &[], |attrs| comment(attrs, NFTA_RULE_USERDATA, &"x".repeat(len)));
            let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
            let data = wire::attribute(message.payload, NFTA_RULE_USERDATA).unwrap();
            let expected = [&[0, kept as u8 + 1], "x".repeat(kept).as_bytes(), &[0]].concat();
            assert_eq!(data, expected, "{len}");
        }
    }
}
