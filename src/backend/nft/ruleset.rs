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
    let mut draft = Draft(Vec::with_capacity(USUAL));
    for name in [INTERCEPTED, DIVERTED, DROPPED, GUARDED] {
        draft.0.push(Object::Counter { name });
    }
    if plan.mode != Mode::DivertOnly {
        sets(plan, &mut draft);
    }
    match plan.mode {
        Mode::DivertOnly => {
            divert_chain(plan, &mut draft);
            if plan.protocols.udp {
                defragment_chain(plan, &mut draft);
            }
        }
        Mode::Tproxy => {
            divert_chain(plan, &mut draft);
            intercept_chain(plan, &mut draft);
            TO_INTERCEPT.chain(plan, &mut draft);
        }
        Mode::Redirect => {
            intercept_chain(plan, &mut draft);
            TO_INTERCEPT.chain(plan, &mut draft);
        }
    }
    if plan.notrack {
        untracked(plan, &mut draft);
    }
    draft.chain(PREROUTING);
    for listener in plan.guarded() {
        guard(&listener, plan, &mut draft);
    }
    match plan.mode {
        Mode::Redirect => redirecting(plan, &mut draft),
        Mode::DivertOnly => diverting(plan, &mut draft),
        Mode::Tproxy => proxying(plan, &mut draft),
    }
    draft.0
}

/// So many objects have plans with few sets.
const USUAL: usize = 24;

/// Objects in the making. Most of what is below runs once for an install, and seldom in a process: what counts is that
/// it is little code.
struct Draft(Vec<Object>);

impl Draft {
    fn chain(&mut self, (name, hook): (&'static str, Option<Hook>)) {
        self.0.push(Object::Chain { name, hook });
    }

    fn rule(&mut self, chain: &'static str, comment: &'static str, statements: Vec<Statement>) {
        self.0.push(Object::Rule { chain, statements, comment });
    }

    /// A rule for the packets of one family, if there is one.
    fn rule_of(
        &mut self,
        family: Option<Family>,
        chain: &'static str,
        comment: &'static str,
        mut statements: Vec<Statement>,
    ) {
        if let Some(family) = family {
            statements.insert(0, Statement::Family(family));
        }
        self.rule(chain, comment, statements);
    }
}

const LEAVE: Statement = Statement::Verdict(Verdict::Return);

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

/// What comes in for a transparent socket, and the errors about what it has sent: what routers and hosts say of its
/// packets, that they are too big, or refused. They come for the address that the socket has, which is another host's,
/// and would go on to that host; the socket would go on sending.
///
/// The kernel looks for no socket of other protocols than TCP, UDP and those of control messages, so one rule is enough;
/// what is not served does not pay for it.
fn diverting(plan: &Compiled<'_>, draft: &mut Draft) {
    let mut statements = vec![Statement::TransparentSocket, Statement::Verdict(Verdict::Jump(DIVERT))];
    if let Some(unserved) = [Protocol::Tcp, Protocol::Udp].into_iter().find(|p| !plan.protocols.contains(*p)) {
        statements.insert(0, Statement::ProtocolIsNot(unserved));
    }
    draft.rule_of(plan.families.only(), PREROUTING.0, "there is a transparent socket", statements);
}

/// What comes in, and what the host itself sends, for the listeners.
fn proxying(plan: &Compiled<'_>, draft: &mut Draft) {
    diverting(plan, draft);
    if let Some(mark) = plan.output_mark {
        let round = vec![Statement::MarkIs(mark), Statement::Verdict(Verdict::Goto(INTERCEPT))];
        draft.rule(PREROUTING.0, "the host's own, come round", round);
    }
    for protocol in plan.protocols.iter() {
        candidates(plan, protocol, true, &TO_INTERCEPT, PREROUTING.0, "by port and interface", draft);
    }
    if let Some(mark) = plan.output_mark {
        // Another mark makes the kernel route the packet anew (a chain of type route): to lo.
        let round = vec![Statement::SetMark(mark), Statement::Verdict(Verdict::Accept)];
        draft.chain((LOOP, None));
        draft.rule(LOOP, "round by lo", round);
        TO_LOOP.chain(plan, draft);
        draft.chain(OUTPUT);
        own_output(plan, OUTPUT.0, &TO_LOOP, draft);
    }
}

/// NAT, of what comes in and of what the host itself sends.
fn redirecting(plan: &Compiled<'_>, draft: &mut Draft) {
    draft.chain(NAT_PREROUTING);
    for protocol in plan.protocols.iter() {
        candidates(plan, protocol, true, &TO_INTERCEPT, NAT_PREROUTING.0, "by port and interface", draft);
    }
    if plan.output_mark.is_some() {
        draft.chain(NAT_OUTPUT);
        own_output(plan, NAT_OUTPUT.0, &TO_INTERCEPT, draft);
    }
}

/// The host's own packets, but for those of transparent sockets: the proxy's connections onward do not come back.
fn own_output(plan: &Compiled<'_>, hook: &'static str, selection: &Selection, draft: &mut Draft) {
    for protocol in plan.protocols.iter() {
        of_socket(plan, protocol, Verdict::Accept, hook, "from a transparent socket", draft);
    }
    for protocol in plan.protocols.iter() {
        candidates(plan, protocol, false, selection, hook, "by port", draft);
    }
}

/// Neither half of a proxied connection is tracked, in either direction.
fn untracked(plan: &Compiled<'_>, draft: &mut Draft) {
    draft.chain((UNTRACK, None));
    draft.rule(UNTRACK, "not tracked", vec![Statement::Notrack]);
    if plan.mode == Mode::Tproxy {
        TO_UNTRACK.chain(plan, draft);
    }
    for (hook, incoming) in [(RAW_PREROUTING, true), (RAW_OUTPUT, false)] {
        draft.chain(hook);
        for protocol in plan.protocols.iter() {
            of_socket(plan, protocol, Verdict::Goto(UNTRACK), hook.0, "of a transparent socket", draft);
            if incoming {
                // Connection tracking has to see answers to know them.
                for from in answers(plan) {
                    draft.rule(hook.0, ANSWER, vec![Statement::Protocol(protocol), from, LEAVE]);
                }
            }
            if plan.mode == Mode::Tproxy && (incoming || plan.output_mark.is_some()) {
                candidates(plan, protocol, incoming, &TO_UNTRACK, hook.0, "to be intercepted", draft);
            }
        }
        if incoming {
            // Connection tracking would call an error about what it has not tracked invalid.
            for family in plan.families.iter() {
                let goto = Statement::Verdict(Verdict::Goto(UNTRACK));
                let about = vec![Statement::Icmp(family), Statement::TransparentSocket, goto];
                draft.rule(hook.0, "an error about what a transparent socket sent", about);
            }
        }
    }
}

/// Packets for which there is a transparent socket go to it, unless it is one
/// on every address: that would take what was sent to anybody.
///
/// Half-open and closed connections (request and TIME_WAIT sockets) match
/// neither kind of `socket wildcard`, and are for the socket too, but for one
/// case: a new connection that meets an old one in TIME_WAIT is the
/// interception's to decide (`nf_tproxy_handle_time_wait4`).
fn divert_chain(plan: &Compiled<'_>, draft: &mut Draft) {
    let mark_and_accept =
        || vec![Statement::SetMark(plan.mark), Statement::Count(DIVERTED), Statement::Verdict(Verdict::Accept)];
    draft.chain((DIVERT, None));
    let may_meet_time_wait = plan.mode == Mode::Tproxy && plan.protocols.tcp;
    if may_meet_time_wait {
        // What most packets are for comes first: each `socket` is a look-up.
        let mut whole = mark_and_accept();
        whole.insert(0, Statement::WildcardSocket(false));
        draft.rule(DIVERT, TO_SOCKET, whole);
    }
    draft.rule(DIVERT, "a listener on every address", vec![Statement::WildcardSocket(true), LEAVE]);
    if may_meet_time_wait {
        draft.rule(DIVERT, "a new connection after an old one", vec![Statement::TcpSyn, LEAVE]);
    }
    draft.rule(DIVERT, TO_SOCKET, mark_and_accept());
}

const TO_SOCKET: &str = "to the socket";

/// A chain that nothing leads to: a `tproxy` anywhere makes the kernel put fragments together before it looks at them
/// (`nft_tproxy_init`), where `socket` alone would know the first fragment's socket and not the others'.
fn defragment_chain(plan: &Compiled<'_>, draft: &mut Draft) {
    draft.chain((DEFRAGMENT, None));
    for family in plan.families.iter() {
        let tproxy = Statement::Tproxy { family: Some(family), addr: None, port: 1 };
        let statements = vec![Statement::Family(family), Statement::Protocol(Protocol::Udp), tproxy];
        draft.rule(DEFRAGMENT, "never run", statements);
    }
}

fn intercept_chain(plan: &Compiled<'_>, draft: &mut Draft) {
    draft.chain((INTERCEPT, None));
    for listener in &plan.intercepts {
        let statements = if plan.mode == Mode::Redirect { redirect(listener) } else { tproxy(listener, plan) };
        draft.rule_of(listener.family, INTERCEPT, "to the listener", statements);
    }
    // `tproxy` without a listener lets the packet pass (nft_tproxy_eval: NFT_BREAK).
    if !plan.fail_open && plan.mode == Mode::Tproxy {
        let drop = vec![Statement::Count(DROPPED), Statement::Verdict(Verdict::Drop)];
        draft.rule(INTERCEPT, "no listener, no traffic", drop);
    }
}

fn tproxy(listener: &Intercept, plan: &Compiled<'_>) -> Vec<Statement> {
    vec![
        Statement::Protocol(listener.protocol),
        Statement::Tproxy { family: listener.family, addr: listener.addr, port: listener.port },
        Statement::SetMark(plan.mark),
        Statement::Count(INTERCEPTED),
        Statement::Verdict(Verdict::Accept),
    ]
}

fn redirect(listener: &Intercept) -> Vec<Statement> {
    let translate = match listener.addr {
        Some(addr) => Statement::Dnat { addr, port: listener.port },
        None => Statement::Redirect { port: listener.port },
    };
    vec![Statement::Protocol(listener.protocol), Statement::Count(INTERCEPTED), translate]
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
    fn end(&self, plan: &Compiled<'_>, statements: &mut Vec<Statement>) {
        if self.is_one_rule(plan) {
            self.otherwise(statements);
        } else {
            statements.push(Statement::Verdict(Verdict::Goto(self.name)));
        }
    }

    /// The chain, if it has more than one rule: sources, destinations never to intercept, destinations to intercept; in
    /// that order.
    fn chain(&self, plan: &Compiled<'_>, draft: &mut Draft) {
        if self.is_one_rule(plan) {
            return;
        }
        let name = self.name;
        draft.chain((name, None));
        let sets = |which: Which, prefixes, family| which.sets(prefixes, family, plan.variant);
        for (src, family) in each(&plan.src, plan.families) {
            let elsewhere = Statement::SourceInNone { family, sets: sets(Which::Src, src, family).collect() };
            draft.rule(name, "from elsewhere", vec![elsewhere, LEAVE]);
        }
        for (bypass, family) in each(&plan.bypass, plan.families) {
            for set in sets(Which::Bypass, bypass, family) {
                draft.rule(name, "to be left alone", vec![Statement::DestinationIn { family, set }, LEAVE]);
            }
        }
        if name == SELECT {
            for from in answers(plan) {
                draft.rule(name, ANSWER, vec![Statement::Answer, from, LEAVE]);
            }
        }
        if self.leaves_own_answers(plan) {
            own_answers(name, draft);
        }
        if plan.dst.is_none() {
            let mut statements = Vec::new();
            self.otherwise(&mut statements);
            draft.rule(name, "to be intercepted", statements);
        }
        for (dst, family) in each(&plan.dst, plan.families) {
            for set in sets(Which::Dst, dst, family) {
                let mut statements = Vec::new();
                self.source(&mut statements);
                statements.push(Statement::DestinationIn { family, set });
                statements.push(Statement::Verdict(Verdict::Goto(self.then)));
                draft.rule(name, "to be intercepted", statements);
            }
        }
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
    fn otherwise(&self, statements: &mut Vec<Statement>) {
        self.source(statements);
        statements.push(Statement::DestinationIsAnothers);
        statements.push(Statement::Verdict(Verdict::Goto(self.then)));
    }

    fn source(&self, statements: &mut Vec<Statement>) {
        if self.of_this_host {
            statements.push(Statement::SourceIsLocal);
        }
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
fn own_answers(name: &'static str, draft: &mut Draft) {
    let accepted = vec![Statement::Protocol(Protocol::Tcp), Statement::Answer, Statement::Assured, LEAVE];
    draft.rule(name, "of a service of this host", accepted);
    draft.rule(name, "of a service of this host", vec![Statement::TcpSynAck, Statement::Answer, LEAVE]);
}

/// A set of prefixes with each of the families, if there is one.
fn each(prefixes: &Option<PrefixSet>, families: Families) -> impl Iterator<Item = (&PrefixSet, Family)> {
    prefixes.iter().flat_map(move |prefixes| families.iter().map(move |family| (prefixes, family)))
}

/// Connections made straight to the listener would be proxied to itself, again and again.
fn guard(listener: &Intercept, plan: &Compiled<'_>, draft: &mut Draft) {
    let mut statements = vec![
        Statement::Protocol(listener.protocol),
        Statement::DestinationPort(listener.port),
        Statement::DestinationIsLocal,
    ];
    if let Some(addr) = listener.addr {
        statements.push(Statement::Destination(addr));
    }
    // The host's own, redirected on its way out, comes in by lo as if it had been sent here.
    if plan.mode == Mode::Redirect && plan.output_mark.is_some() {
        statements.push(Statement::NotTranslated);
    }
    statements.push(Statement::Count(GUARDED));
    statements.push(Statement::Verdict(Verdict::Drop));
    draft.rule_of(listener.family, PREROUTING.0, "straight to the listener", statements);
}

/// Packets of a protocol for which there is a transparent socket.
fn of_socket(
    plan: &Compiled<'_>,
    protocol: Protocol,
    verdict: Verdict,
    hook: &'static str,
    comment: &'static str,
    draft: &mut Draft,
) {
    let statements = vec![Statement::Protocol(protocol), Statement::TransparentSocket, Statement::Verdict(verdict)];
    draft.rule_of(plan.families.only(), hook, comment, statements);
}

/// Packets of a protocol to the ports, by the interfaces if they are incoming, of which the addresses choose.
fn candidates(
    plan: &Compiled<'_>,
    protocol: Protocol,
    incoming: bool,
    selection: &Selection,
    hook: &'static str,
    comment: &'static str,
    draft: &mut Draft,
) {
    let mut statements = vec![Statement::Protocol(protocol)];
    match one_port(plan) {
        Some(port) => statements.push(Statement::DestinationPort(port)),
        None if plan.ports.is_empty() => {}
        None => statements.push(Statement::DestinationPortIn(plan.set(PORTS))),
    }
    if incoming && !plan.interfaces.is_empty() {
        statements.push(Statement::InterfaceIn(plan.set(INTERFACES)));
    }
    selection.end(plan, &mut statements);
    // A protocol that is served over one family alone is left alone over the other.
    draft.rule_of(plan.family_of(protocol), hook, comment, statements);
}

/// The port, if there is but one: it needs no set.
fn one_port(plan: &Plan) -> Option<u16> {
    match plan.ports[..] {
        [PortRange { first, last }] if first == last => Some(first),
        _ => None,
    }
}

/// The sets, each with its elements. Those of prefixes exist even if they are empty: they may be filled later.
fn sets(plan: &Compiled<'_>, draft: &mut Draft) {
    let mut made = Sets { variant: plan.variant, objects: &mut draft.0 };
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
}

struct Sets<'a> {
    variant: Variant,
    objects: &'a mut Vec<Object>,
}

impl Sets<'_> {
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
