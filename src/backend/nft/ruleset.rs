//! The objects that a plan becomes, in the order in which they are made.
//!
//! A packet's way, from the base chains at the bottom of [`compile`]:
//!
//! ```text
//! prerouting ─┬─ straight to a listener ──────────────── guarded, drop
//!             ├─ has a transparent socket ── divert ──── mark, accept
//!             └─ port, interface ── select ── intercept ─ tproxy, mark, accept, or drop
//! output ─────┬─ from a transparent socket ───────────── accept
//!             └─ port ── select-local ── loop ─────────── second mark: comes round to prerouting
//! ```
//!
//! `select` has the addresses; where none are given, it is but a statement of
//! the rules that would lead there. With NAT redirection `intercept` translates,
//! and hangs from the nat hooks; without connection tracking the raw hooks
//! have the same selection once more, and `untrack` at its end.

use super::object::{Elements, Hook, Key, Object, Set, SetName, Variant};
use super::statement::{Statement, Verdict};
use crate::model::{Families, Family, Intercept, Mode, Plan, PortRange, Protocol};
use crate::prefix::{Contents, PrefixSet};

const DIVERT: &str = "divert";
const INTERCEPT: &str = "intercept";
const LOOP: &str = "loop";
const UNTRACK: &str = "untrack";
const DEFRAGMENT: &str = "defragment";
const SELECT: &str = "select";
const SELECT_LOCAL: &str = "select-local";
const SELECT_RAW: &str = "select-raw";

pub(crate) const INTERCEPTED: &str = "intercepted";
pub(crate) const DIVERTED: &str = "diverted";
pub(crate) const DROPPED: &str = "dropped";
pub(crate) const GUARDED: &str = "guarded";

const PORTS: &str = "ports";
const INTERFACES: &str = "interfaces";

/// Which set of prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Dst,
    Src,
    Bypass,
}

impl Which {
    /// The name of the set of one family: that of prefixes of one length, or that of ranges.
    fn set(self, family: Family, len: Option<u8>, variant: Variant) -> SetName {
        let base = match (self, family) {
            (Which::Dst, Family::V4) => "dst4",
            (Which::Dst, Family::V6) => "dst6",
            (Which::Src, Family::V4) => "src4",
            (Which::Src, Family::V6) => "src6",
            (Which::Bypass, Family::V4) => "bypass4",
            (Which::Bypass, Family::V6) => "bypass6",
        };
        SetName { base, len, variant }
    }

    /// The sets of one family in which these prefixes are: those of lengths first, where most are found.
    fn sets(self, prefixes: &PrefixSet, family: Family, variant: Variant) -> impl Iterator<Item = SetName> {
        prefixes.lengths(family).map(Some).chain([None]).map(move |len| self.set(family, len, variant))
    }
}

/// The objects that hold a plan, within its table; the sets are named in one variant.
pub(crate) fn compile(plan: &Plan, variant: Variant) -> Vec<Object> {
    let plan = &Compiled { plan, variant };
    let mut objects: Vec<Object> =
        [INTERCEPTED, DIVERTED, DROPPED, GUARDED].map(|name| Object::Counter { name }).to_vec();
    if plan.mode != Mode::DivertOnly {
        objects.extend(sets(plan));
    }
    match plan.mode {
        Mode::DivertOnly => {
            objects.extend(divert_chain(plan));
            if plan.protocols.udp {
                objects.extend(defragment_chain(plan));
            }
        }
        Mode::Tproxy => {
            objects.extend(divert_chain(plan));
            objects.extend(intercept_chain(plan, tproxy));
            objects.extend(TO_INTERCEPT.chain(plan));
        }
        Mode::Redirect => {
            objects.extend(intercept_chain(plan, redirect));
            objects.extend(TO_INTERCEPT.chain(plan));
        }
    }
    if plan.notrack {
        objects.extend(untracked(plan));
    }
    objects.push(chain(PREROUTING));
    objects.extend(plan.guarded().map(|listener| guard(&listener, plan)));
    match plan.mode {
        Mode::Redirect => objects.extend(redirecting(plan)),
        Mode::DivertOnly => objects.push(diverting(plan)),
        Mode::Tproxy => objects.extend(proxying(plan)),
    }
    objects
}

/// A plan on its way to objects.
struct Compiled<'a> {
    plan: &'a Plan,
    variant: Variant,
}

impl Compiled<'_> {
    fn set(&self, base: &'static str) -> SetName {
        SetName { base, len: None, variant: self.variant }
    }
}

impl std::ops::Deref for Compiled<'_> {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        self.plan
    }
}

/// The base chains, by the names of `nft`'s hooks and priorities.
const PREROUTING: (&str, Option<Hook>) = ("prerouting", Some(Hook::MANGLE_PREROUTING));
const OUTPUT: (&str, Option<Hook>) = ("output", Some(Hook::MANGLE_OUTPUT));
const RAW_PREROUTING: (&str, Option<Hook>) = ("raw-prerouting", Some(Hook::RAW_PREROUTING));
const RAW_OUTPUT: (&str, Option<Hook>) = ("raw-output", Some(Hook::RAW_OUTPUT));
const NAT_PREROUTING: (&str, Option<Hook>) = ("nat-prerouting", Some(Hook::NAT_PREROUTING));
const NAT_OUTPUT: (&str, Option<Hook>) = ("nat-output", Some(Hook::NAT_OUTPUT));

fn chain((name, hook): (&'static str, Option<Hook>)) -> Object {
    Object::Chain { name, hook }
}

/// What comes in for a transparent socket, and the errors about what it has sent: what routers and hosts say of its
/// packets, that they are too big, or refused. They come for the address that the socket has, which is another host's,
/// and would go on to that host; the socket would go on sending.
///
/// The kernel looks for no socket of other protocols than TCP, UDP and those of control messages, so one rule is enough;
/// what is not served does not pay for it.
fn diverting(plan: &Compiled<'_>) -> Object {
    let unserved = [Protocol::Tcp, Protocol::Udp].into_iter().find(|protocol| !plan.protocols.contains(*protocol));
    let statements = only(plan.families.only())
        .chain(unserved.map(Statement::ProtocolIsNot))
        .chain([Statement::TransparentSocket, Statement::Verdict(Verdict::Jump(DIVERT))]);
    rule(PREROUTING.0, "there is a transparent socket", statements)
}

/// What comes in, and what the host itself sends, for the listeners.
fn proxying(plan: &Compiled<'_>) -> Vec<Object> {
    let mut objects = vec![diverting(plan)];
    if let Some(mark) = plan.output_mark {
        let round = [Statement::MarkIs(mark), Statement::Verdict(Verdict::Goto(INTERCEPT))];
        objects.push(rule(PREROUTING.0, "the host's own, come round", round));
    }
    let chosen =
        |protocol| rule(PREROUTING.0, "by port and interface", candidates(plan, protocol, true, &TO_INTERCEPT));
    objects.extend(plan.protocols.iter().map(chosen));
    let Some(mark) = plan.output_mark else { return objects };
    // Another mark makes the kernel route the packet anew (a chain of type route): to lo.
    let round = [Statement::SetMark(mark), Statement::Verdict(Verdict::Accept)];
    objects.extend([chain((LOOP, None)), rule(LOOP, "round by lo", round)]);
    objects.extend(TO_LOOP.chain(plan));
    objects.push(chain(OUTPUT));
    objects.extend(own_output(plan, OUTPUT.0, &TO_LOOP));
    objects
}

/// NAT, of what comes in and of what the host itself sends.
fn redirecting(plan: &Compiled<'_>) -> Vec<Object> {
    let mut objects = vec![chain(NAT_PREROUTING)];
    objects.extend(plan.protocols.iter().map(|protocol| {
        rule(NAT_PREROUTING.0, "by port and interface", candidates(plan, protocol, true, &TO_INTERCEPT))
    }));
    if plan.output_mark.is_some() {
        objects.push(chain(NAT_OUTPUT));
        objects.extend(own_output(plan, NAT_OUTPUT.0, &TO_INTERCEPT));
    }
    objects
}

/// The host's own packets, but for those of transparent sockets: the proxy's connections onward do not come back.
fn own_output(plan: &Compiled<'_>, hook: &'static str, selection: &Selection) -> Vec<Object> {
    let exempt = |protocol| rule(hook, "from a transparent socket", socket_of(plan, protocol, Verdict::Accept));
    let selected = |protocol| rule(hook, "by port", candidates(plan, protocol, false, selection));
    plan.protocols.iter().map(exempt).chain(plan.protocols.iter().map(selected)).collect()
}

/// Neither half of a proxied connection is tracked, in either direction.
fn untracked(plan: &Compiled<'_>) -> Vec<Object> {
    let mut objects = vec![chain((UNTRACK, None)), rule(UNTRACK, "not tracked", [Statement::Notrack])];
    if plan.mode == Mode::Tproxy {
        objects.extend(TO_UNTRACK.chain(plan));
    }
    for (hook, incoming) in [(RAW_PREROUTING, true), (RAW_OUTPUT, false)] {
        objects.push(chain(hook));
        for protocol in plan.protocols.iter() {
            let of_socket = socket_of(plan, protocol, Verdict::Goto(UNTRACK));
            objects.push(rule(hook.0, "of a transparent socket", of_socket));
            if incoming {
                // Connection tracking has to see answers to know them.
                objects.extend(answers(plan).map(|from| {
                    rule(hook.0, ANSWER, [Statement::Protocol(protocol), from, Statement::Verdict(Verdict::Return)])
                }));
            }
            if plan.mode == Mode::Tproxy && (incoming || plan.output_mark.is_some()) {
                let selected = candidates(plan, protocol, incoming, &TO_UNTRACK);
                objects.push(rule(hook.0, "to be intercepted", selected));
            }
        }
        if incoming {
            // Connection tracking would call an error about what it has not tracked invalid.
            objects.extend(plan.families.iter().map(|family| {
                let about = [Statement::Icmp(family), Statement::TransparentSocket];
                let statements = about.into_iter().chain([Statement::Verdict(Verdict::Goto(UNTRACK))]);
                rule(hook.0, "an error about what a transparent socket sent", statements)
            }));
        }
    }
    objects
}

/// Packets for which there is a transparent socket go to it, unless it is one
/// on every address: that would take what was sent to anybody.
///
/// Half-open and closed connections (request and TIME_WAIT sockets) match
/// neither kind of `socket wildcard`, and are for the socket too, but for one
/// case: a new connection that meets an old one in TIME_WAIT is the
/// interception's to decide (`nf_tproxy_handle_time_wait4`).
fn divert_chain(plan: &Compiled<'_>) -> Vec<Object> {
    let mark_and_accept =
        [Statement::SetMark(plan.mark), Statement::Count(DIVERTED), Statement::Verdict(Verdict::Accept)];
    let leave = Statement::Verdict(Verdict::Return);
    let everybodys = [Statement::WildcardSocket(true), leave.clone()];
    let mut objects = vec![chain((DIVERT, None))];
    let may_meet_time_wait = plan.mode == Mode::Tproxy && plan.protocols.tcp;
    if may_meet_time_wait {
        // What most packets are for comes first: each `socket` is a look-up.
        let whole = [Statement::WildcardSocket(false)].into_iter().chain(mark_and_accept.clone());
        objects.push(rule(DIVERT, "to the socket", whole));
    }
    objects.push(rule(DIVERT, "a listener on every address", everybodys));
    if may_meet_time_wait {
        objects.push(rule(DIVERT, "a new connection after an old one", [Statement::TcpSyn, leave]));
    }
    objects.push(rule(DIVERT, "to the socket", mark_and_accept));
    objects
}

/// A chain that nothing leads to: a `tproxy` anywhere makes the kernel put fragments together before it looks at them
/// (`nft_tproxy_init`), where `socket` alone would know the first fragment's socket and not the others'.
fn defragment_chain(plan: &Compiled<'_>) -> Vec<Object> {
    let tproxy = |family| {
        let statements = [
            Statement::Family(family),
            Statement::Protocol(Protocol::Udp),
            Statement::Tproxy { family: Some(family), addr: None, port: 1 },
        ];
        rule(DEFRAGMENT, "never run", statements)
    };
    [chain((DEFRAGMENT, None))].into_iter().chain(plan.families.iter().map(tproxy)).collect()
}

fn intercept_chain(plan: &Compiled<'_>, deliver: fn(&Intercept, &Compiled<'_>) -> Object) -> Vec<Object> {
    let mut objects = vec![chain((INTERCEPT, None))];
    objects.extend(plan.intercepts.iter().map(|listener| deliver(listener, plan)));
    // `tproxy` without a listener lets the packet pass (nft_tproxy_eval: NFT_BREAK).
    if !plan.fail_open && plan.mode == Mode::Tproxy {
        let drop = [Statement::Count(DROPPED), Statement::Verdict(Verdict::Drop)];
        objects.push(rule(INTERCEPT, "no listener, no traffic", drop));
    }
    objects
}

fn tproxy(listener: &Intercept, plan: &Compiled<'_>) -> Object {
    let deliver = [
        Statement::Protocol(listener.protocol),
        Statement::Tproxy { family: listener.family, addr: listener.addr, port: listener.port },
        Statement::SetMark(plan.mark),
        Statement::Count(INTERCEPTED),
        Statement::Verdict(Verdict::Accept),
    ];
    rule(INTERCEPT, "to the listener", only(listener.family).chain(deliver))
}

fn redirect(listener: &Intercept, _: &Compiled<'_>) -> Object {
    let translate = match listener.addr {
        Some(addr) => Statement::Dnat { addr, port: listener.port },
        None => Statement::Redirect { port: listener.port },
    };
    let deliver = [Statement::Protocol(listener.protocol), Statement::Count(INTERCEPTED), translate];
    rule(INTERCEPT, "to the listener", only(listener.family).chain(deliver))
}

/// The addresses, and where what they choose goes.
struct Selection {
    /// The chain's name.
    name: &'static str,
    then: &'static str,
    /// Only what has an address of this host as its source.
    of_this_host: bool,
}

const TO_INTERCEPT: Selection = Selection { name: SELECT, then: INTERCEPT, of_this_host: false };
const TO_UNTRACK: Selection = Selection { name: SELECT_RAW, then: UNTRACK, of_this_host: false };
const TO_LOOP: Selection = Selection { name: SELECT_LOCAL, then: LOOP, of_this_host: true };

impl Selection {
    /// What is said at the end of a rule to have the addresses choose.
    fn statements(&self, plan: &Compiled<'_>) -> Vec<Statement> {
        if self.is_one_rule(plan) { self.otherwise() } else { vec![Statement::Verdict(Verdict::Goto(self.name))] }
    }

    /// The chain, if it has more than one rule: sources, destinations never to intercept, destinations to intercept; in
    /// that order.
    fn chain(&self, plan: &Compiled<'_>) -> Vec<Object> {
        if self.is_one_rule(plan) {
            return Vec::new();
        }
        let name = self.name;
        let mut objects = vec![chain((name, None))];
        let leave = Statement::Verdict(Verdict::Return);
        let sets = |which: Which, prefixes, family| which.sets(prefixes, family, plan.variant);
        for (src, family) in each(&plan.src, plan.families) {
            let elsewhere = Statement::SourceInNone { family, sets: sets(Which::Src, src, family).collect() };
            objects.push(rule(name, "from elsewhere", [elsewhere, leave.clone()]));
        }
        for (bypass, family) in each(&plan.bypass, plan.families) {
            objects.extend(sets(Which::Bypass, bypass, family).map(|set| {
                let bypass = Statement::DestinationIn { family, set };
                rule(name, "to be left alone", [bypass, leave.clone()])
            }));
        }
        if name == SELECT {
            objects.extend(answers(plan).map(|from| rule(name, ANSWER, [Statement::Answer, from, leave.clone()])));
        }
        if self.leaves_own_answers(plan) {
            objects.extend(own_answers(name));
        }
        if plan.dst.is_none() {
            objects.push(rule(name, "to be intercepted", self.otherwise()));
        }
        for (dst, family) in each(&plan.dst, plan.families) {
            objects.extend(sets(Which::Dst, dst, family).map(|set| {
                let named = [Statement::DestinationIn { family, set }, Statement::Verdict(Verdict::Goto(self.then))];
                rule(name, "to be intercepted", self.source().chain(named))
            }));
        }
        objects
    }

    /// No addresses are given.
    fn is_one_rule(&self, plan: &Compiled<'_>) -> bool {
        let given = plan.src.is_some() || plan.bypass.is_some() || plan.dst.is_some();
        !given && !self.leaves_own_answers(plan)
    }

    fn leaves_own_answers(&self, plan: &Compiled<'_>) -> bool {
        self.of_this_host && plan.may_choose_own_answers() && plan.protocols.tcp
    }

    /// Not what is for this host, or for nobody.
    fn otherwise(&self) -> Vec<Statement> {
        let goto = Statement::Verdict(Verdict::Goto(self.then));
        self.source().chain([Statement::DestinationIsAnothers, goto]).collect()
    }

    fn source(&self) -> impl Iterator<Item = Statement> {
        self.of_this_host.then_some(Statement::SourceIsLocal).into_iter()
    }
}

const ANSWER: &str = "an answer of what is left alone";

/// Whose answers are to be left alone: one statement for each set.
///
/// That they come from there does not make them answers: clients may be among what is left alone, as private networks
/// are, and packets of theirs that have lost their socket (the proxy was started anew) must not go on to the server. Nor
/// do a TCP segment's flags. Connection tracking knows: what it has not seen begin, or has forgotten, is no answer to it,
/// and is intercepted. Nor is what answers others than these: who sends a client something first would choose what the
/// client sends past the proxy.
fn answers(plan: &Compiled<'_>) -> impl Iterator<Item = Statement> {
    let bypass = each(&plan.bypass, plan.families).filter(|_| plan.may_choose_answers());
    bypass.flat_map(|(bypass, family)| {
        let sets = Which::Bypass.sets(bypass, family, plan.variant);
        sets.map(move |set| Statement::SourceIn { family, set })
    })
}

/// What this host's own services answer, by TCP, is no connection of its own.
///
/// That others began is not enough to go by: so do those who send a packet to each port of this host, and the connection
/// that it makes from one of them later, to the sender, would pass by the proxy. So data has to be of a connection that a
/// service here has accepted. UDP has no such thing, and is intercepted.
fn own_answers(name: &'static str) -> [Object; 2] {
    let leave = Statement::Verdict(Verdict::Return);
    let accepted = [Statement::Protocol(Protocol::Tcp), Statement::Answer, Statement::Assured, leave.clone()];
    let accepting = [Statement::TcpSynAck, Statement::Answer, leave];
    [rule(name, "of a service of this host", accepted), rule(name, "of a service of this host", accepting)]
}

/// A set of prefixes with each of the families, if there is one.
fn each(prefixes: &Option<PrefixSet>, families: Families) -> impl Iterator<Item = (&PrefixSet, Family)> {
    prefixes.iter().flat_map(move |prefixes| families.iter().map(move |family| (prefixes, family)))
}

/// Connections made straight to the listener would be proxied to itself, again and again.
fn guard(listener: &Intercept, plan: &Compiled<'_>) -> Object {
    // The host's own, redirected on its way out, comes in by lo as if it had been sent here.
    let not_redirected =
        (plan.mode == Mode::Redirect && plan.output_mark.is_some()).then_some(Statement::NotTranslated);
    let straight = [
        Statement::Protocol(listener.protocol),
        Statement::DestinationPort(listener.port),
        Statement::DestinationIsLocal,
    ];
    let drop = [Statement::Count(GUARDED), Statement::Verdict(Verdict::Drop)];
    let statements = only(listener.family)
        .chain(straight)
        .chain(listener.addr.map(Statement::Destination))
        .chain(not_redirected)
        .chain(drop);
    rule(PREROUTING.0, "straight to the listener", statements)
}

/// Packets of a protocol for which there is a transparent socket.
fn socket_of(plan: &Compiled<'_>, protocol: Protocol, verdict: Verdict) -> impl Iterator<Item = Statement> {
    let of_socket = [Statement::Protocol(protocol), Statement::TransparentSocket, Statement::Verdict(verdict)];
    only(plan.families.only()).chain(of_socket)
}

/// Packets of a protocol to the ports, by the interfaces if they are incoming, of which the addresses choose.
fn candidates(
    plan: &Compiled<'_>,
    protocol: Protocol,
    incoming: bool,
    selection: &Selection,
) -> impl Iterator<Item = Statement> {
    let ports = match (plan.ports.as_slice(), one_port(plan)) {
        ([], _) => None,
        (_, Some(port)) => Some(Statement::DestinationPort(port)),
        _ => Some(Statement::DestinationPortIn(plan.set(PORTS))),
    };
    let interfaces = (incoming && !plan.interfaces.is_empty()).then_some(Statement::InterfaceIn(plan.set(INTERFACES)));
    // A protocol that is served over one family alone is left alone over the other.
    let family = plan.family_of(protocol);
    let protocol = [Statement::Protocol(protocol)];
    only(family).chain(protocol).chain(ports).chain(interfaces).chain(selection.statements(plan))
}

/// The port, if there is but one: it needs no set.
fn one_port(plan: &Plan) -> Option<u16> {
    match plan.ports[..] {
        [PortRange { first, last }] if first == last => Some(first),
        _ => None,
    }
}

fn only(family: Option<Family>) -> impl Iterator<Item = Statement> {
    family.map(Statement::Family).into_iter()
}

fn rule(chain: &'static str, comment: &'static str, statements: impl IntoIterator<Item = Statement>) -> Object {
    Object::Rule { chain, statements: statements.into_iter().collect(), comment }
}

/// The sets, each with its elements. Those of prefixes exist even if they are empty: they may be filled later.
fn sets(plan: &Compiled<'_>) -> Vec<Object> {
    let mut made = Sets { variant: plan.variant, objects: Vec::new() };
    if !plan.ports.is_empty() && one_port(plan).is_none() {
        let pieces = plan.ports.chunks(IN_A_MESSAGE).map(|piece| Elements::Ports(piece.to_vec()));
        made.add(PORTS, Key::Port, pieces);
    }
    if !plan.interfaces.is_empty() {
        let pieces = plan.interfaces.chunks(IN_A_MESSAGE).map(|piece| Elements::Interfaces(piece.to_vec()));
        made.add(INTERFACES, Key::Interface, pieces);
    }
    let sets =
        [(Which::Src, plan.src.as_ref()), (Which::Bypass, plan.bypass.as_ref()), (Which::Dst, plan.dst.as_ref())];
    for (which, prefixes) in sets {
        if let Some(prefixes) = prefixes {
            made.add_prefixes(which, prefixes, plan.families);
        }
    }
    made.objects
}

struct Sets {
    variant: Variant,
    objects: Vec<Object>,
}

impl Sets {
    fn add(&mut self, base: &'static str, key: Key, elements: impl IntoIterator<Item = Elements>) {
        let name = SetName { base, len: None, variant: self.variant };
        self.add_empty(name, key);
        self.objects.extend(elements.into_iter().map(|elements| Object::Elements { set: name, elements }));
    }

    fn add_prefixes(&mut self, which: Which, prefixes: &PrefixSet, families: Families) {
        for family in families.iter() {
            for set in which.sets(prefixes, family, self.variant) {
                self.add_empty(set, if set.len.is_some() { Key::Network(family) } else { Key::Address(family) });
            }
            self.objects.extend(elements(which, family, self.variant, &prefixes.contents(family)));
        }
    }

    fn add_empty(&mut self, name: SetName, key: Key) {
        // Any number will do that is unique in the transaction.
        let id = self.objects.len() as u32 + 1;
        self.objects.push(Object::Set(Set { name, key, id }));
    }
}

/// Elements in one message, which may have 64 KiB of them: of a range two, with 28 + 36 bytes at most.
const IN_A_MESSAGE: usize = 900;

/// Elements of the sets of one family, in pieces that fit into a message.
pub(crate) fn elements(which: Which, family: Family, variant: Variant, contents: &Contents) -> Vec<Object> {
    let of = |len, elements| Object::Elements { set: which.set(family, len, variant), elements };
    let networks = contents.networks.iter().flat_map(|(len, networks)| {
        networks.chunks(IN_A_MESSAGE).map(move |piece| of(Some(*len), Elements::Networks(piece.to_vec())))
    });
    let ranges = contents.ranges.chunks(IN_A_MESSAGE);
    networks.chain(ranges.map(|piece| of(None, Elements::Addresses(family, piece.to_vec())))).collect()
}
