//! The objects that a plan becomes, in the order in which they are made.

use std::fmt;

use super::statement::{Expressions, Statement, Verdict};
use crate::model::{Family, Intercept, Plan, PortRange};
use crate::netlink::wire::Attrs;

/// The chains that packets of transparent sockets and packets to be intercepted reach.
const DIVERT: &str = "divert";
const INTERCEPT: &str = "intercept";
const PREROUTING: &str = "prerouting";
/// The sets of the ports to intercept, and of the address types that are this host's own or nobody's.
const PORTS: &str = "ports";
const OWN: &str = "own";

/// An object of nf_tables within a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Set(Set),
    Elements { set: &'static str, elements: Elements },
    Chain { name: &'static str, hook: Option<Hook> },
    Rule { chain: &'static str, statements: Vec<Statement>, comment: &'static str },
}

/// A named set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Set {
    name: &'static str,
    key: Key,
    id: u32,
}

/// The type of a set's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Port,
    AddressType,
}

/// What is put in a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Elements {
    /// Sorted and apart from each other.
    Ports(Vec<PortRange>),
    AddressTypes(&'static [AddressType]),
}

/// A destination's type in the local routing table (`RTN_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AddressType {
    number: u8,
    name: &'static str,
}

/// Where a base chain hangs: after connection tracking, before routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    /// NF_INET_PRE_ROUTING.
    number: u32,
    priority: i32,
}

/// Addresses that are this host's, or that nobody can have a connection with.
const OWN_TYPES: [AddressType; 4] = [
    AddressType { number: libc::RTN_LOCAL, name: "local" },
    AddressType { number: libc::RTN_BROADCAST, name: "broadcast" },
    AddressType { number: libc::RTN_ANYCAST, name: "anycast" },
    AddressType { number: libc::RTN_MULTICAST, name: "multicast" },
];

/// `prerouting`, priority mangle (-150).
const MANGLE_PREROUTING: Hook = Hook { number: 0, priority: -150 };

/// The objects that hold a plan, within its table.
pub(crate) fn compile(plan: &Plan) -> Vec<Object> {
    let intercepting = !plan.intercepts.is_empty();
    let mut objects = divert_chain(plan);
    if intercepting {
        objects.extend(sets(plan));
        objects.extend(intercept_chain(plan));
    }
    objects.push(Object::Chain { name: PREROUTING, hook: Some(MANGLE_PREROUTING) });
    objects.extend(plan.guarded().map(|listener| guard(&listener)));
    for protocol in plan.protocols() {
        let to_socket =
            [Statement::Protocol(protocol), Statement::TransparentSocket, Statement::Verdict(Verdict::Jump(DIVERT))];
        objects.push(rule(PREROUTING, "there is a transparent socket", only_family(plan.only_family()), to_socket));
    }
    for protocol in plan.protocols().filter(|_| intercepting) {
        let to_ports = (!plan.ports.is_empty()).then_some(Statement::DestinationPortIn(PORTS));
        let statements = [Statement::Protocol(protocol)].into_iter().chain(to_ports);
        let goto = Statement::Verdict(Verdict::Goto(INTERCEPT));
        let statements = statements.chain([goto]);
        objects.push(rule(PREROUTING, "to be intercepted", only_family(plan.only_family()), statements));
    }
    objects
}

/// Packets for which there is a transparent socket go to it, unless it is one
/// on every address: that would take what was sent to anybody.
///
/// `socket wildcard 0` would not do: it fails for connections that are being
/// opened or were closed (`nft_socket_eval` wants a full socket).
fn divert_chain(plan: &Plan) -> Vec<Object> {
    let mark_and_accept = [Statement::SetMark(plan.mark), Statement::Counter, Statement::Verdict(Verdict::Accept)];
    let not_to_everybodys = [Statement::WildcardSocket, Statement::Verdict(Verdict::Return)];
    vec![
        Object::Chain { name: DIVERT, hook: None },
        rule(DIVERT, "a listener on every address", None, not_to_everybodys),
        rule(DIVERT, "to the socket", None, mark_and_accept),
    ]
}

fn sets(plan: &Plan) -> Vec<Object> {
    let set = |name, key, id, elements| [Object::Set(Set { name, key, id }), Object::Elements { set: name, elements }];
    let ports = (!plan.ports.is_empty()).then(|| set(PORTS, Key::Port, 1, Elements::Ports(plan.ports.clone())));
    let own = set(OWN, Key::AddressType, 2, Elements::AddressTypes(&OWN_TYPES));
    ports.into_iter().chain([own]).flatten().collect()
}

fn intercept_chain(plan: &Plan) -> Vec<Object> {
    let own = [Statement::DestinationTypeIn(OWN), Statement::Verdict(Verdict::Return)];
    let mut objects =
        vec![Object::Chain { name: INTERCEPT, hook: None }, rule(INTERCEPT, "to this host, or to nobody", None, own)];
    objects.extend(plan.intercepts.iter().map(|listener| intercept(listener, plan)));
    let drop = [Statement::Counter, Statement::Verdict(Verdict::Drop)];
    objects.push(rule(INTERCEPT, "no listener, no traffic", None, drop));
    objects
}

/// Connections made straight to the listener would be proxied to itself, again and again.
fn guard(listener: &Intercept) -> Object {
    rule(
        PREROUTING,
        "straight to the listener",
        only_family(listener.family),
        [
            Statement::Protocol(listener.protocol),
            Statement::DestinationPort(listener.port),
            Statement::DestinationIsLocal,
        ]
        .into_iter()
        .chain(listener.addr.map(Statement::Destination))
        .chain([Statement::Counter, Statement::Verdict(Verdict::Drop)]),
    )
}

fn intercept(listener: &Intercept, plan: &Plan) -> Object {
    rule(
        INTERCEPT,
        "to the listener",
        only_family(listener.family),
        [
            Statement::Protocol(listener.protocol),
            Statement::Tproxy { family: listener.family, addr: listener.addr, port: listener.port },
            Statement::SetMark(plan.mark),
            Statement::Counter,
            Statement::Verdict(Verdict::Accept),
        ],
    )
}

fn only_family(family: Option<Family>) -> Option<Statement> {
    family.map(Statement::Family)
}

fn rule(
    chain: &'static str,
    comment: &'static str,
    first: Option<Statement>,
    then: impl IntoIterator<Item = Statement>,
) -> Object {
    Object::Rule { chain, statements: first.into_iter().chain(then).collect(), comment }
}

impl Object {
    /// The message type and its creation flags.
    pub fn message(&self) -> (u16, u16) {
        const CREATE: u16 = libc::NLM_F_CREATE as u16;
        const APPEND: u16 = libc::NLM_F_APPEND as u16;
        match self {
            Object::Chain { .. } => (3, CREATE),
            Object::Rule { .. } => (6, CREATE | APPEND),
            Object::Set(_) => (9, CREATE),
            Object::Elements { .. } => (12, CREATE),
        }
    }

    /// The attributes of the message that makes this object in a table.
    pub fn encode(&self, table: &str, attrs: &mut Attrs<'_>) {
        attrs.string(1, table);
        match self {
            Object::Set(set) => set.encode(attrs),
            Object::Elements { set, elements } => {
                attrs.string(2, set);
                attrs.nest(3, |a| elements.encode(a));
            }
            Object::Chain { name, hook } => {
                attrs.string(3, name);
                if let Some(hook) = hook {
                    attrs.nest(4, |a| {
                        a.be32(1, hook.number);
                        a.be32(2, hook.priority as u32);
                    });
                    // NF_ACCEPT: what no rule decides goes its way.
                    attrs.be32(5, 1);
                    attrs.string(7, "filter");
                }
            }
            Object::Rule { chain, statements, comment } => {
                attrs.string(2, chain);
                attrs.nest(4, |a| {
                    let mut rule = Expressions(a);
                    statements.iter().for_each(|statement| statement.encode(&mut rule));
                });
                attrs.bytes(7, &comment_data(comment));
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
            Object::Set(set) => write!(f, "add set inet {table} {} {{ {set} }}", set.name),
            Object::Elements { set, elements } => write!(f, "add element inet {table} {set} {{ {elements} }}"),
            Object::Chain { name, hook: None } => write!(f, "add chain inet {table} {name}"),
            Object::Chain { name, hook: Some(Hook { priority, .. }) } => write!(
                f,
                "add chain inet {table} {name} {{ type filter hook prerouting priority {priority}; policy accept; }}"
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
pub(crate) fn comment_data(text: &str) -> Vec<u8> {
    let len = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut data = vec![0, len];
    data.extend(text.bytes().take(usize::from(len) - 1));
    data.push(0);
    data
}

impl Set {
    /// NFT_SET_CONSTANT and NFT_SET_INTERVAL.
    const CONSTANT: u32 = 2;
    const INTERVAL: u32 = 4;

    fn encode(&self, attrs: &mut Attrs<'_>) {
        // `nft` knows the key types by these numbers; to the kernel they mean nothing.
        let (flags, key_type, key_len) = match self.key {
            Key::Port => (Self::INTERVAL, 13, 2),
            Key::AddressType => (Self::CONSTANT, 38, 4),
        };
        attrs.string(2, self.name);
        attrs.be32(3, flags);
        attrs.be32(4, key_type);
        attrs.be32(5, key_len);
        attrs.be32(10, self.id);
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.key {
            Key::Port => "type inet_service; flags interval;",
            Key::AddressType => "type fib_addrtype; flags constant;",
        })
    }
}

impl Elements {
    fn encode(&self, list: &mut Attrs<'_>) {
        /// NFT_SET_ELEM_INTERVAL_END.
        const END: u32 = 1;
        let mut element = |key: &[u8], flags: u32| {
            list.nest(1, |a| {
                if flags != 0 {
                    a.be32(3, flags);
                }
                a.nest(1, |a| a.bytes(1, key));
            });
        };
        match self {
            Elements::Ports(ranges) => {
                for range in ranges {
                    element(&range.first.to_be_bytes(), 0);
                    // The end is the first port behind the range; at the top there is none.
                    if let Some(end) = range.last.checked_add(1) {
                        element(&end.to_be_bytes(), END);
                    }
                }
            }
            Elements::AddressTypes(types) => {
                types.iter().for_each(|t| element(&u32::from(t.number).to_ne_bytes(), 0));
            }
        }
    }
}

impl fmt::Display for Elements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Elements::Ports(ranges) => comma_separated(f, ranges),
            Elements::AddressTypes(types) => comma_separated(f, types.iter().map(|t| t.name)),
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
