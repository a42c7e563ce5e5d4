//! The objects that a plan becomes, in the order in which they are made.
//!
//! A packet's way, from the base chains at the bottom of [`compile`]:
//!
//! ```text
//! prerouting ─┬─ port of a listener ── direct ──────────── to this host: drop
//!             ├─ has a transparent socket ── divert ────── mark, accept
//!             ├─ returned by lo, of this instance ─────── intercept
//!             └─ port, interface ── select ── vet ── intercept ─ tproxy, mark, accept, or drop
//! output ─────┬─ reply of a server here to a proxy here ── reroute-reply
//!             ├─ from a transparent socket ───────────── accept
//!             └─ port ── owner ── select-local ── reroute ──────── second mark, priority: returns to prerouting by lo
//! ```
//!
//! `vet` drops packets whose addresses cannot be those of a connection between two hosts, which a proxy would take for
//! its own or for those of loopback; so does `reserved`, for IPv6, in `vet` and in `divert`.
//!
//! Where several instances select a packet, the first that was installed has it: of two chains of one hook and
//! priority, the kernel runs the one that was registered first last (`nf_hook_entries_grow`), and the last `tproxy` counts.
//!
//! `select` has the addresses, and returns replies of connections that others began; where neither is needed, it is a
//! statement of the rules that would lead there. With NAT redirection `intercept` translates,
//! and hangs from the nat hooks; without connection tracking the raw hooks
//! have the same selection once more, and `untrack` at its end.

use super::object::{Hook, Object};
use super::set::{Elements, Key, Set, SetName, Variant};
use super::statement::{InterfacePrefix, Looped, Side, Statement, Verdict};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::{Families, Family, Mode, PortRange, Protocol};
use crate::plan::{Intercept, Interfaces, Learned, Plan};
use crate::prefix::{Contents, LENGTHS, PrefixSet};

pub(crate) const DIVERT: &str = "divert";
const INTERCEPT: &str = "intercept";
const DIRECT_CHAIN: &str = "direct";
const VET: &str = "vet";
const VET_BY_LO: &str = "vet-by-lo";
const RESERVED: &str = "reserved";
const RESERVED_BY_LO: &str = "reserved-by-lo";
pub(crate) const REROUTE: &str = "reroute";
pub(crate) const REROUTE_REPLY: &str = "reroute-reply";
pub(crate) const UNTRACK: &str = "untrack";
pub(crate) const DEFRAGMENT: &str = "defragment";
const OWNER: &str = "owner";
const OWNER_GROUP: &str = "owner-group";
const OWNER_CGROUP: &str = "owner-cgroup";
const SELECT: &str = "select";
const SELECT_LOCAL: &str = "select-local";
const SELECT_RAW: &str = "select-raw";

pub(crate) const INTERCEPTED: &str = "intercepted";
pub(crate) const DIVERTED: &str = "diverted";
pub(crate) const DROPPED: &str = "dropped";
pub(crate) const DIRECT: &str = "direct";

const PORTS: &str = "ports";
const PORTS_TCP: &str = "ports-tcp";
const PORTS_UDP: &str = "ports-udp";
const REJECT_TCP: &str = "reject-tcp";
const REJECT_UDP: &str = "reject-udp";
const INTERFACES: &str = "interfaces";
const BYPASS_INTERFACES: &str = "bypass-interfaces";
const MACS: &str = "macs";
const BYPASS_MACS: &str = "bypass-macs";
const UIDS: &str = "uids";
const BYPASS_UIDS: &str = "bypass-uids";
const GIDS: &str = "gids";
const BYPASS_GIDS: &str = "bypass-gids";

/// Chains that refuse packets, and do not lead any to a listener.
pub(crate) fn only_refuses(chain: &str) -> bool {
    [DIRECT_CHAIN, RESERVED, RESERVED_BY_LO].contains(&chain)
}

/// PrefixList set of prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrefixList {
    Dst,
    Src,
    Bypass,
    BypassSrc,
}

impl PrefixList {
    /// The name of the set of one family: that of prefixes of one length, or that of ranges.
    fn set(self, family: Family, len: Option<u8>, variant: Variant) -> SetName {
        let base = match (self, family) {
            (PrefixList::Dst, Family::V4) => "dst4",
            (PrefixList::Dst, Family::V6) => "dst6",
            (PrefixList::Src, Family::V4) => "src4",
            (PrefixList::Src, Family::V6) => "src6",
            (PrefixList::Bypass, Family::V4) => "bypass4",
            (PrefixList::Bypass, Family::V6) => "bypass6",
            (PrefixList::BypassSrc, Family::V4) => "bypass-src4",
            (PrefixList::BypassSrc, Family::V6) => "bypass-src6",
        };
        SetName { base, len, variant }
    }

    /// The sets of one family in which these prefixes are: those of lengths first, where most are found.
    fn sets(self, prefixes: &PrefixSet, family: Family, variant: Variant) -> impl Iterator<Item = SetName> {
        prefixes.lengths(family).map(Some).chain([None]).map(move |len| self.set(family, len, variant))
    }
}

/// A set of addresses that leave it at their timeout. It has no variants: it stays when the rules are replaced.
pub(crate) fn learned_set(which: PrefixList, family: Family) -> Option<SetName> {
    let base = match (which, family) {
        (PrefixList::Dst, Family::V4) => "learned-dst4",
        (PrefixList::Dst, Family::V6) => "learned-dst6",
        (PrefixList::Bypass, Family::V4) => "learned-bypass4",
        (PrefixList::Bypass, Family::V6) => "learned-bypass6",
        (PrefixList::Src | PrefixList::BypassSrc, _) => return None,
    };
    Some(SetName { base, len: None, variant: Variant::First })
}

/// Takes the names of sets of learned addresses from a list of names, and says which there were.
pub(crate) fn split_off_learned(names: &mut Vec<String>) -> Learned {
    let mut take = |which, family| {
        let Some(set) = learned_set(which, family) else { return false };
        let before = names.len();
        names.retain(|name| *name != set.base);
        names.len() < before
    };
    let mut families = |which| Families { v4: take(which, Family::V4), v6: take(which, Family::V6) };
    Learned { dst: families(PrefixList::Dst), bypass: families(PrefixList::Bypass) }
}

/// The objects that hold a plan, within its table; the sets are named in one variant.
pub(crate) fn compile(plan: &Plan, variant: Variant) -> Result<Vec<Object>> {
    let mut ruleset = Ruleset { plan, variant, objects: Vec::with_capacity(USUAL) };
    for name in [INTERCEPTED, DIVERTED, DROPPED, DIRECT] {
        ruleset.objects.push(Object::Counter { name });
    }
    if plan.mode != Mode::DivertOnly {
        ruleset.sets()?;
    }
    if plan.families.v6 {
        ruleset.reserved_chains();
    }
    match plan.mode {
        Mode::DivertOnly => {
            ruleset.divert_chain();
            if plan.protocols.udp {
                ruleset.defragment_chain();
            }
        }
        Mode::Tproxy => {
            ruleset.divert_chain();
            ruleset.intercept_chain();
            ruleset.vet_chain();
            ruleset.select_chain(&TO_INTERCEPT);
        }
        Mode::Redirect => {
            ruleset.intercept_chain();
            ruleset.vet_chain();
            ruleset.select_chain(&TO_INTERCEPT);
            if plan.local_output {
                ruleset.select_chain(&TO_REDIRECT);
                ruleset.owner_chains();
            }
        }
    }
    ruleset.direct_chain();
    if plan.notrack {
        ruleset.untracked();
    }
    ruleset.chain(PREROUTING);
    plan.direct_drops().for_each(|listener| ruleset.direct_drop(&listener));
    match plan.mode {
        Mode::Redirect => ruleset.redirecting(),
        Mode::DivertOnly => {
            ruleset.diverting();
            ruleset.output();
        }
        Mode::Tproxy => ruleset.proxying(),
    }
    Ok(ruleset.objects)
}

/// So many objects have plans with few sets.
const USUAL: usize = 36;

const RETURN: Statement = Statement::Verdict(Verdict::Return);
const ACCEPT: Statement = Statement::Verdict(Verdict::Accept);

/// The base chains, by the names of `nft`'s hooks and priorities.
const PREROUTING: (&str, Option<Hook>) = ("prerouting", Some(Hook::MANGLE_PREROUTING));
const OUTPUT: (&str, Option<Hook>) = ("output", Some(Hook::MANGLE_OUTPUT));
const RAW_PREROUTING: (&str, Option<Hook>) = ("raw-prerouting", Some(Hook::RAW_PREROUTING));
const RAW_OUTPUT: (&str, Option<Hook>) = ("raw-output", Some(Hook::RAW_OUTPUT));
const NAT_PREROUTING: (&str, Option<Hook>) = ("nat-prerouting", Some(Hook::NAT_PREROUTING));
const NAT_OUTPUT: (&str, Option<Hook>) = ("nat-output", Some(Hook::NAT_OUTPUT));

/// What the addresses choose, and where it goes.
struct Selection {
    /// The chain's name.
    name: &'static str,
    then: &'static str,
    /// Only what has an address of this host as its source.
    first: Option<Statement>,
}

const TO_INTERCEPT: Selection = Selection { name: SELECT, then: VET, first: None };
const TO_REDIRECT: Selection = Selection { name: SELECT_LOCAL, then: INTERCEPT, first: None };
const TO_UNTRACK: Selection = Selection { name: SELECT_RAW, then: UNTRACK, first: None };
const TO_REROUTE: Selection =
    Selection { name: SELECT_LOCAL, then: REROUTE, first: Some(Statement::SourceIsLocal(true)) };

/// A plan, and the objects that have been made of it.
struct Ruleset<'a> {
    plan: &'a Plan,
    variant: Variant,
    objects: Vec<Object>,
}

impl Ruleset<'_> {
    fn chain(&mut self, (name, hook): (&'static str, Option<Hook>)) {
        self.objects.push(Object::Chain { name, hook });
    }

    /// A rule of these statements, one list of them behind the other.
    fn rule(&mut self, chain: &'static str, comment: &'static str, statements: &[&[Statement]]) {
        self.objects.push(Object::Rule { chain, statements: statements.concat(), comment });
    }

    fn set(&self, base: &'static str) -> SetName {
        SetName { base, len: None, variant: self.variant }
    }

    /// What comes in for a transparent socket, and the errors about what it has sent: what routers and hosts say of its
    /// packets, that they are too big, or refused. They come for the address that the socket has, which is another host's,
    /// and would go on to that host; the socket would go on sending.
    ///
    /// The kernel looks for no socket of other protocols than TCP, UDP and those of control messages, so one rule is
    /// enough; what is not served does not pay for it.
    fn diverting(&mut self) {
        let unserved = [Protocol::Tcp, Protocol::Udp].into_iter().find(|p| !self.plan.protocols.contains(*p));
        self.rule(
            PREROUTING.0,
            "there is a transparent socket",
            &[
                only(self.plan.families.only()).as_slice(),
                unserved.map(Statement::ProtocolIsNot).as_slice(),
                &[Statement::TransparentSocket, Statement::Verdict(Verdict::Jump(DIVERT))],
            ],
        );
    }

    /// Incoming packets, and those that this host sends, for the listeners.
    fn proxying(&mut self) {
        self.diverting();
        if self.plan.local_output {
            let looped = [
                Statement::FromLoopback(true),
                Statement::LoopedBy(Some(Looped::by(&self.plan.name))),
                Statement::Verdict(Verdict::Goto(INTERCEPT)),
            ];
            self.rule(PREROUTING.0, "looped back via lo", &[&looped]);
        }
        for protocol in self.plan.candidate_protocols() {
            self.candidates(PREROUTING.0, "by port and interface", protocol, true, &TO_INTERCEPT);
        }
        self.output();
    }

    /// Packets that this host sends, unless they are redirected: those that return by `lo`, and the proxy's own.
    fn output(&mut self) {
        let plan = self.plan;
        if let Some(mark) = plan.loop_mark.filter(|_| plan.local_output) {
            // Another mark makes the kernel route the packet anew (a chain of type route): to lo.
            self.chain((REROUTE, None));
            let reroute = [Statement::SetMark(mark), Statement::SetLooped(Looped::by(&plan.name)), ACCEPT];
            // The kernel's own packets of a connection, when its program has ended, have no owner any more.
            let kept = plan.owners.narrow().then_some(Statement::SetCtMark(mark));
            self.rule(REROUTE, "looped back via lo", &[kept.as_slice(), &reroute]);
            self.select_chain(&TO_REROUTE);
            self.owner_chains();
        }
        if !plan.local_output && !plan.local_servers && !plan.may_match_replies(Protocol::Udp) {
            return;
        }
        self.chain(OUTPUT);
        if plan.local_servers {
            self.local_servers(OUTPUT.0);
        }
        if plan.may_match_replies(Protocol::Udp) {
            // A late datagram of a proxy may be the first that connection tracking sees of its flow. What the client
            // sends then would be a reply, and pass by the proxy.
            let begun = [
                Statement::Protocol(Protocol::Udp),
                Statement::CtNew,
                Statement::SourceIsLocal(false),
                Statement::SetCtMark(plan.mark),
            ];
            self.rule(OUTPUT.0, "begun by a proxy", &[&begun]);
        }
        if plan.local_output {
            self.own_output(OUTPUT.0, &TO_REROUTE);
        }
    }

    /// A connection from a transparent socket to a server on this host: the server's replies, to an address that is not this
    /// host's, would leave by the network. Connection tracking keeps a mark for the connection, by which they are known.
    fn local_servers(&mut self, hook: &'static str) {
        let Some(mark) = self.plan.loop_mark else { return };
        self.chain((REROUTE_REPLY, None));
        self.rule(REROUTE_REPLY, "to the proxy", &[&[Statement::SetMark(mark), ACCEPT]]);
        for protocol in self.plan.protocols.iter() {
            let asked = [
                Statement::Protocol(protocol),
                Statement::CtNew,
                Statement::DestinationIsThisHost,
                Statement::TransparentSocket,
                Statement::SetCtMark(mark),
            ];
            self.rule(hook, "to a server of this host", &[only(self.plan.families.only()).as_slice(), &asked]);
        }
        let reply = [
            Statement::CtMark { mark, is: true },
            Statement::CtReply,
            Statement::Verdict(Verdict::Goto(REROUTE_REPLY)),
        ];
        self.rule(hook, "of a server of this host", &[&reply]);
    }

    /// NAT, of what comes in and of what the host itself sends.
    fn redirecting(&mut self) {
        self.chain(NAT_PREROUTING);
        for protocol in self.plan.candidate_protocols() {
            self.candidates(NAT_PREROUTING.0, "by port and interface", protocol, true, &TO_INTERCEPT);
        }
        if self.plan.local_output {
            self.chain(NAT_OUTPUT);
            self.own_output(NAT_OUTPUT.0, &TO_REDIRECT);
        }
    }

    /// Whose packets are selected, of those that this host sends. Exemptions come first. A list is a chain whose rules lead on:
    /// a packet that matches none, as the kernel's own do, is not selected.
    fn owner_chains(&mut self) {
        let owners = &self.plan.owners;
        if owners.is_everyone() {
            return;
        }
        let goto = |chain| Statement::Verdict(Verdict::Goto(chain));
        let mut next = SELECT_LOCAL;
        if let Some(cgroups) = &owners.cgroups {
            self.chain((OWNER_CGROUP, None));
            for cgroup in cgroups {
                self.rule(OWNER_CGROUP, "by control group", &[&[Statement::Cgroup(cgroup.clone()), goto(next)]]);
            }
            next = OWNER_CGROUP;
        }
        if owners.gids.is_some() {
            self.chain((OWNER_GROUP, None));
            self.rule(OWNER_GROUP, "by group", &[&[Statement::GidIn(self.set(GIDS)), goto(next)]]);
            next = OWNER_GROUP;
        }
        self.chain((OWNER, None));
        let uids = (!owners.bypass_uids.is_empty()).then_some(Statement::UidIn(self.set(BYPASS_UIDS)));
        let gids = (!owners.bypass_gids.is_empty()).then_some(Statement::GidIn(self.set(BYPASS_GIDS)));
        let cgroups = owners.bypass_cgroups.iter().cloned().map(Statement::Cgroup);
        let mark = owners.bypass_mark.map(Statement::MarkIs);
        for exempt in uids.into_iter().chain(gids).chain(cgroups).chain(mark) {
            self.rule(OWNER, "to be left alone", &[&[exempt, RETURN]]);
        }
        match owners.uids {
            Some(_) => self.rule(OWNER, "by user", &[&[Statement::UidIn(self.set(UIDS)), goto(next)]]),
            None => self.rule(OWNER, "by owner", &[&[goto(next)]]),
        }
    }

    /// The host's own packets, but for those of transparent sockets: the proxy's connections onward do not come back.
    fn own_output(&mut self, hook: &'static str, selection: &Selection) {
        for protocol in self.plan.protocols.iter() {
            self.of_socket(hook, "from a transparent socket", protocol, Verdict::Accept);
        }
        let kept = self.plan.loop_mark.filter(|_| self.plan.owners.narrow() && selection.then == REROUTE);
        if let Some(mark) = kept {
            let goto = Statement::Verdict(Verdict::Goto(REROUTE));
            let chosen = [Statement::CtMark { mark, is: true }, Statement::CtOriginal, goto];
            self.rule(hook, "of a connection that was selected by its owner", &[&chosen]);
        }
        for protocol in self.plan.candidate_protocols() {
            self.candidates(hook, "by port", protocol, false, selection);
        }
    }

    /// Neither half of a proxied connection is tracked, in either direction.
    fn untracked(&mut self) {
        self.chain((UNTRACK, None));
        self.rule(UNTRACK, "not tracked", &[&[Statement::Notrack]]);
        if self.plan.mode == Mode::Tproxy {
            self.select_chain(&TO_UNTRACK);
        }
        for (hook, incoming) in [(RAW_PREROUTING, true), (RAW_OUTPUT, false)] {
            self.chain(hook);
            if self.plan.local_servers && !incoming {
                // Connection tracking has to see both directions of what a proxy asks of a server here.
                self.rule(hook.0, "to a server of this host", &[&[Statement::DestinationIsThisHost, RETURN]]);
            }
            for protocol in self.plan.protocols.iter() {
                self.of_socket(hook.0, "of a transparent socket", protocol, Verdict::Goto(UNTRACK));
                let may_reply = protocol == Protocol::Udp && self.plan.may_match_replies(protocol);
                if self.plan.mode == Mode::Tproxy && (incoming || self.plan.local_output) && !may_reply {
                    self.candidates(hook.0, TO_BE_INTERCEPTED, protocol, incoming, &TO_UNTRACK);
                }
            }
            if incoming {
                // Connection tracking would call an error about what it has not tracked invalid.
                for family in self.plan.families.iter() {
                    let goto = Statement::Verdict(Verdict::Goto(UNTRACK));
                    let about = [Statement::Icmp(family), Statement::TransparentSocket, goto];
                    self.rule(hook.0, "an error about what a transparent socket sent", &[&about]);
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
    fn divert_chain(&mut self) {
        let mark_and_accept =
            [Statement::SetMark(self.plan.mark), Statement::Count(DIVERTED), Statement::Verdict(Verdict::Accept)];
        self.chain((DIVERT, None));
        self.refuse_reserved(DIVERT);
        let may_meet_time_wait = self.plan.mode == Mode::Tproxy && self.plan.protocols.tcp;
        if may_meet_time_wait {
            // What most packets are for comes first: each `socket` is a look-up.
            self.rule(DIVERT, "to the socket", &[&[Statement::WildcardSocket(false)], &mark_and_accept]);
        }
        self.rule(DIVERT, "a listener on every address", &[&[Statement::WildcardSocket(true), RETURN]]);
        if may_meet_time_wait {
            self.rule(DIVERT, "a new connection after an old one", &[&[Statement::TcpSyn, RETURN]]);
        }
        self.rule(DIVERT, "to the socket", &[&mark_and_accept]);
    }

    /// Drops IPv6 packets from or to addresses of `::/80`, except those between `::1` and this host that came in by `lo`.
    ///
    /// To the socket interface such addresses mean other things than in a packet: `::` every address, and v4-mapped ones
    /// IPv4. A packet to ::ffff:127.0.0.1 would have a proxy connect to this host's own 127.0.0.1; `fib` calls them
    /// unicast addresses, and the kernel forwards them.
    fn reserved_chains(&mut self) {
        let drop = [Statement::Count(DROPPED), Statement::Verdict(Verdict::Drop)];
        self.chain((RESERVED_BY_LO, None));
        self.rule(RESERVED_BY_LO, "from the network", &[&[Statement::FromLoopback(false)], &drop]);
        for side in [Side::Source, Side::Destination] {
            self.rule(RESERVED_BY_LO, "unspecified or v4-mapped", &[&[Statement::ReservedNotLoopback(side)], &drop]);
        }
        self.chain((RESERVED, None));
        for side in [Side::Source, Side::Destination] {
            let reserved = [Statement::Reserved(side), Statement::Verdict(Verdict::Goto(RESERVED_BY_LO))];
            self.rule(RESERVED, "not an address of another host", &[&reserved]);
        }
    }

    fn refuse_reserved(&mut self, chain: &'static str) {
        if self.plan.families.v6 {
            let vet = [Statement::Family(Family::V6), Statement::Verdict(Verdict::Jump(RESERVED))];
            self.rule(chain, "reserved addresses", &[&vet]);
        }
    }

    /// Leaves alone what this host sends to itself: intercepted, it would reach the proxy in place of the host's own
    /// service, and a proxy's own datagram to a link-local address would come back to it for ever. Packets of this host to
    /// others may come by `lo` too, where a route says so, or where another instance loops them.
    ///
    /// Drops what no other host can have sent: packets from an address of this host, to which a proxy's answers would
    /// come back as if they were new, from a broadcast or multicast address, and packets to loopback. IPv4's routing does
    /// much the same (`fib_validate_source`, unless accept_local is set), IPv6's does not.
    fn vet_chain(&mut self) {
        let drop = [Statement::Count(DROPPED), Statement::Verdict(Verdict::Drop)];
        self.chain((VET_BY_LO, None));
        self.rule(VET_BY_LO, "looped by another instance", &[&[Statement::LoopedBy(None), ACCEPT]]);
        self.rule(VET_BY_LO, "of this host to itself", &[&[Statement::DestinationIsLocal, ACCEPT]]);
        if self.plan.families.v6 {
            self.rule(VET_BY_LO, "of this host to itself", &[&[Statement::DestinationIsLinkLocal, ACCEPT]]);
        }
        self.chain((VET, None));
        let by_lo = [Statement::FromLoopback(true), Statement::Verdict(Verdict::Jump(VET_BY_LO))];
        self.rule(VET, "of this host", &[&by_lo]);
        let spoofed = [Statement::FromLoopback(false), Statement::SourceIsNoOther];
        self.rule(VET, "not from another host", &[&spoofed, &drop]);
        self.refuse_reserved(VET);
        if self.plan.families.v4 {
            if self.plan.dst.is_some() {
                // Without `dst` no local destination comes here. The kernel lets both pass on their way to a local socket:
                // 127.0.0.0/8 with net.ipv4.conf.*.route_localnet, 0.0.0.0 to 0.0.0.0 always (`ip_route_input_slow`).
                let loopback = [Statement::FromLoopback(false), Statement::Network8(Side::Destination, 127)];
                self.rule(VET, "to loopback", &[&loopback, &drop]);
                self.rule(VET, "unspecified", &[&[Statement::Network8(Side::Source, 0)], &drop]);
            }
            // Only 0.0.0.0 itself is no address of another host to the kernel (since Linux 5.3).
            self.rule(VET, "unspecified", &[&[Statement::Network8(Side::Destination, 0)], &drop]);
        }
        self.rule(VET, TO_BE_INTERCEPTED, &[&[Statement::Verdict(Verdict::Goto(INTERCEPT))]]);
    }

    /// Drops packets to a listener's port that are for this host: the listener would take them for intercepted ones.
    fn direct_chain(&mut self) {
        if self.plan.direct_drops().next().is_none() {
            return;
        }
        let drop = [Statement::Count(DIRECT), Statement::Verdict(Verdict::Drop)];
        self.chain((DIRECT_CHAIN, None));
        self.rule(DIRECT_CHAIN, "straight to the listener", &[&[Statement::DestinationIsLocal], &drop]);
        if self.plan.direct_drops().any(|listener| listener.family != Some(Family::V4)) {
            self.rule(DIRECT_CHAIN, "straight to the listener", &[&[Statement::DestinationIsLinkLocal], &drop]);
        }
    }

    /// A chain that nothing leads to: a `tproxy` anywhere makes the kernel put fragments together before it looks at them
    /// (`nft_tproxy_init`), where `socket` alone would know the first fragment's socket and not the others'.
    fn defragment_chain(&mut self) {
        self.chain((DEFRAGMENT, None));
        for family in self.plan.families.iter() {
            let statements = [
                Statement::Family(family),
                Statement::Protocol(Protocol::Udp),
                Statement::Tproxy { family: Some(family), addr: None, port: 1 },
            ];
            self.rule(DEFRAGMENT, "never run", &[&statements]);
        }
    }

    fn intercept_chain(&mut self) {
        self.chain((INTERCEPT, None));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            self.reject(protocol);
        }
        self.plan.intercepts.iter().for_each(|listener| self.deliver(listener));
        // `tproxy` without a listener lets the packet pass (nft_tproxy_eval: NFT_BREAK).
        if !self.plan.fail_open && self.plan.mode == Mode::Tproxy {
            let drop = [Statement::Count(DROPPED), Statement::Verdict(Verdict::Drop)];
            self.rule(INTERCEPT, "no listener, no traffic", &[&drop]);
        }
    }

    /// Refuses packets to some ports of a protocol; of one without a listener no other packets come here.
    fn reject(&mut self, protocol: Protocol) {
        let plan = self.plan;
        let rejected = plan.reject.of(protocol);
        if rejected.is_empty() {
            return;
        }
        let base = match protocol {
            Protocol::Tcp => REJECT_TCP,
            Protocol::Udp => REJECT_UDP,
        };
        let ports = plan.protocols.contains(protocol).then(|| self.ports(base, rejected));
        let reject = [Statement::Count(DROPPED), Statement::Reject(protocol)];
        self.rule(INTERCEPT, "refused", &[&[Statement::Protocol(protocol)], ports.as_slice(), &reject]);
    }

    fn deliver(&mut self, listener: &Intercept) {
        let Intercept { protocol, family, addr, port } = *listener;
        let count = Statement::Count(INTERCEPTED);
        let deliver: &[Statement] = match (self.plan.mode, addr) {
            (Mode::Redirect, Some(addr)) => &[count, Statement::Dnat { addr, port }],
            (Mode::Redirect, None) => &[count, Statement::Redirect { port }],
            _ => &[
                Statement::Tproxy { family, addr, port },
                Statement::SetMark(self.plan.mark),
                count,
                Statement::Verdict(Verdict::Accept),
            ],
        };
        let of_protocol = [Statement::Protocol(protocol)];
        self.rule(INTERCEPT, "to the listener", &[only(family).as_slice(), &of_protocol, deliver]);
    }

    /// The addresses, if there are any: sources, destinations never to intercept, destinations to intercept; in that order.
    fn select_chain(&mut self, selection: &Selection) {
        if self.has_no_addresses(selection) {
            return;
        }
        let (plan, variant, name) = (self.plan, self.variant, selection.name);
        self.chain((name, None));
        if name != SELECT_LOCAL {
            self.return_by_arrival(name);
        }
        for (bypass, family) in each(&plan.bypass_src, plan.families) {
            for set in PrefixList::BypassSrc.sets(bypass, family, variant) {
                let bypass = Statement::SourceIn { family, set };
                self.rule(name, "to be left alone", &[&[bypass, RETURN]]);
            }
        }
        for (src, family) in each(&plan.src, plan.families) {
            let mut lengths = [None; LENGTHS];
            lengths.iter_mut().zip(src.lengths(family)).for_each(|(slot, len)| *slot = Some(len));
            let ranges = PrefixList::Src.set(family, None, variant);
            let elsewhere = Statement::SourceInNone { family, lengths, ranges };
            self.rule(name, "from elsewhere", &[&[elsewhere, RETURN]]);
        }
        for (bypass, family) in each(&plan.bypass, plan.families) {
            for set in PrefixList::Bypass.sets(bypass, family, variant) {
                let bypass = Statement::DestinationIn { family, set };
                self.rule(name, "to be left alone", &[&[bypass, RETURN]]);
            }
        }
        for family in self.learned(PrefixList::Bypass) {
            if let Some(set) = learned_set(PrefixList::Bypass, family) {
                let bypass = Statement::DestinationIn { family, set };
                self.rule(name, "learned, to be left alone", &[&[bypass, RETURN]]);
            }
        }
        self.return_replies(selection);
        if plan.dst.is_none() {
            self.rule(name, TO_BE_INTERCEPTED, &[selection.first.as_slice(), &goto_unless_local(selection)]);
        }
        for (dst, family) in each(&plan.dst, plan.families) {
            for set in PrefixList::Dst.sets(dst, family, variant) {
                let named =
                    [Statement::DestinationIn { family, set }, Statement::Verdict(Verdict::Goto(selection.then))];
                self.rule(name, TO_BE_INTERCEPTED, &[selection.first.as_slice(), &named]);
            }
        }
        for family in self.learned(PrefixList::Dst) {
            if let Some(set) = learned_set(PrefixList::Dst, family) {
                let learned =
                    [Statement::DestinationIn { family, set }, Statement::Verdict(Verdict::Goto(selection.then))];
                self.rule(name, "learned, to be intercepted", &[selection.first.as_slice(), &learned]);
            }
        }
    }

    /// The families whose set of learned addresses the rules ask. Without `dst` every destination is meant already.
    fn learned(&self, which: PrefixList) -> impl Iterator<Item = Family> + use<> {
        let Learned { dst, bypass } = self.plan.learned;
        let learned = match which {
            PrefixList::Dst if self.plan.dst.is_some() => dst,
            PrefixList::Bypass => bypass,
            _ => Families::default(),
        };
        self.plan.families.iter().filter(move |family| learned.contains(*family))
    }

    /// Leaves alone what arrived by an interface or from an Ethernet address that is not selected. What this host sends has
    /// not arrived, and matches none of these.
    fn return_by_arrival(&mut self, chain: &'static str) {
        let plan = self.plan;
        let exempt = &plan.bypass_interfaces;
        let names = (!exempt.names.is_empty()).then_some(Statement::InterfaceIn(self.set(BYPASS_INTERFACES)));
        let like = |prefix: &String| Statement::InterfaceLike(InterfacePrefix::new(prefix));
        for interface in names.into_iter().chain(exempt.prefixes.iter().map(like)) {
            self.rule(chain, "to be left alone", &[&[interface, RETURN]]);
        }
        if plan.macs.is_some() {
            self.rule(chain, "from elsewhere", &[&[Statement::NotByEthernet, RETURN]]);
            let others = Statement::EtherSource { set: self.set(MACS), inside: false };
            self.rule(chain, "from elsewhere", &[&[others, RETURN]]);
        }
        if !plan.bypass_macs.is_empty() {
            let exempt = Statement::EtherSource { set: self.set(BYPASS_MACS), inside: true };
            self.rule(chain, "to be left alone", &[&[exempt, RETURN]]);
        }
    }

    /// What would be the selection's chain is one rule.
    fn has_no_addresses(&self, selection: &Selection) -> bool {
        let plan = self.plan;
        let learned = self.learned(PrefixList::Bypass).next().is_some();
        let given =
            plan.src.is_some() || plan.bypass.is_some() || plan.dst.is_some() || plan.bypass_src.is_some() || learned;
        let by_arrival =
            plan.bypass_interfaces != Interfaces::default() || plan.macs.is_some() || !plan.bypass_macs.is_empty();
        let own = selection.name == SELECT_LOCAL;
        let tracked = self.returns_replies(selection)
            && plan.candidate_protocols().any(|protocol| plan.may_match_replies(protocol));
        !given && !tracked && (own || !by_arrival) && (!own || plan.owners.is_everyone())
    }

    /// Before connection tracking no reply can be told.
    fn returns_replies(&self, selection: &Selection) -> bool {
        [SELECT, SELECT_LOCAL].contains(&selection.name)
    }

    /// Leaves alone replies of connections that others began, where the selection may match them.
    ///
    /// A TCP segment that begins a connection is no reply, whatever connection tracking has seen before: the other side may
    /// have sent a segment to this port first, so that the client's connection would pass by the proxy. Later
    /// segments of an intercepted connection have a socket, and do not come here. A datagram may be both: whoever
    /// sends one to a client receives what the client sends from that port, except where a proxy sent the first.
    ///
    /// Of this host, a reply with data has to be of a connection that a service here has accepted, since later
    /// segments of its own connections do come here.
    fn return_replies(&mut self, selection: &Selection) {
        if !self.returns_replies(selection) {
            return;
        }
        let (plan, chain) = (self.plan, selection.name);
        let own = chain == SELECT_LOCAL;
        for protocol in plan.candidate_protocols().filter(|protocol| plan.may_match_replies(*protocol)) {
            let mut reply = |statements: &[Statement]| {
                self.rule(chain, "of a connection that others began", &[statements, &[Statement::CtReply, RETURN]]);
            };
            match protocol {
                Protocol::Tcp if own => {
                    reply(&[Statement::Protocol(protocol), Statement::Assured]);
                    reply(&[Statement::TcpSynAck]);
                }
                Protocol::Tcp => reply(&[Statement::TcpNotSyn]),
                Protocol::Udp if own => reply(&[Statement::Protocol(protocol)]),
                Protocol::Udp => {
                    reply(&[Statement::Protocol(protocol), Statement::CtMark { mark: plan.mark, is: false }]);
                }
            }
        }
    }

    /// Connections made straight to the listener would be proxied to itself, again and again.
    fn direct_drop(&mut self, listener: &Intercept) {
        // The host's own, redirected on its way out, comes in by lo as if it had been sent here.
        let redirected = self.plan.mode == Mode::Redirect && self.plan.local_output;
        let port = [Statement::Protocol(listener.protocol), Statement::DestinationPort(listener.port)];
        self.rule(
            PREROUTING.0,
            "to the listener's port",
            &[
                only(listener.family).as_slice(),
                &port,
                listener.addr.map(Statement::Destination).as_slice(),
                redirected.then_some(Statement::NotTranslated).as_slice(),
                &[Statement::Verdict(Verdict::Jump(DIRECT_CHAIN))],
            ],
        );
    }

    /// Packets of a protocol for which there is a transparent socket.
    fn of_socket(&mut self, chain: &'static str, comment: &'static str, protocol: Protocol, verdict: Verdict) {
        let of_socket = [Statement::Protocol(protocol), Statement::TransparentSocket, Statement::Verdict(verdict)];
        self.rule(chain, comment, &[only(self.plan.families.only()).as_slice(), &of_socket]);
    }

    /// Packets of a protocol to the ports, by the interfaces if they are incoming, of which the addresses choose.
    fn candidates(
        &mut self,
        chain: &'static str,
        comment: &'static str,
        protocol: Protocol,
        incoming: bool,
        selection: &Selection,
    ) {
        let plan = self.plan;
        let ports = match plan.candidate_ports(protocol).as_deref() {
            None => None,
            Some([]) => return,
            Some(ports) => Some(self.ports(self.port_set(protocol), ports)),
        };
        // Connection tracking has to see replies to know them: of TCP, only packets that begin a connection are chosen before it.
        let begins = match selection.name {
            SELECT_RAW => plan.new_only || plan.may_match_replies(protocol),
            _ => plan.new_only,
        };
        let of_protocol = match protocol {
            Protocol::Tcp if begins => Statement::TcpSyn,
            _ => Statement::Protocol(protocol),
        };
        let own = selection.name == SELECT_LOCAL && !plan.owners.is_everyone();
        let choose = [Statement::Verdict(Verdict::Goto(if own { OWNER } else { selection.name }))];
        let (first, choose): (_, &[Statement]) = match self.has_no_addresses(selection) {
            true => (selection.first.clone(), &goto_unless_local(selection)),
            false => (None, &choose),
        };
        for interface in self.interfaces(incoming) {
            self.rule(
                chain,
                comment,
                &[
                    // A protocol that is served over one family only is not intercepted over the other.
                    only(plan.family_of(protocol)).as_slice(),
                    std::slice::from_ref(&of_protocol),
                    ports.as_slice(),
                    interface.as_slice(),
                    first.as_slice(),
                    choose,
                ],
            );
        }
    }

    /// One statement for all names, and one for each pattern; `None`: packets of every interface. No packet is chosen if
    /// there is neither.
    fn interfaces(&self, incoming: bool) -> Vec<Option<Statement>> {
        let interfaces = self.plan.interfaces.as_ref().filter(|_| incoming);
        let Some(interfaces) = interfaces else { return vec![None] };
        let names = (!interfaces.names.is_empty()).then_some(Statement::InterfaceIn(self.set(INTERFACES)));
        let like = |prefix: &String| Statement::InterfaceLike(InterfacePrefix::new(prefix));
        names.into_iter().chain(interfaces.prefixes.iter().map(like)).map(Some).collect::<Vec<_>>()
    }

    /// The sets, each with its elements. Those of prefixes exist even if they are empty: they may be filled later.
    fn sets(&mut self) -> Result<()> {
        let plan = self.plan;
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let ports = plan.candidate_ports(protocol).unwrap_or_default();
            // A set that both protocols have is made once.
            let shared = protocol == Protocol::Udp && plan.candidate_ports(Protocol::Tcp).as_ref() == Some(&ports);
            if !shared {
                self.port_elements(self.port_set(protocol), &ports);
            }
            if plan.protocols.contains(protocol) {
                self.port_elements(
                    if protocol == Protocol::Tcp { REJECT_TCP } else { REJECT_UDP },
                    plan.reject.of(protocol),
                );
            }
        }
        let names = plan.interfaces.as_ref().map_or(&[][..], |interfaces| &interfaces.names);
        for (base, names) in [(INTERFACES, names), (BYPASS_INTERFACES, &plan.bypass_interfaces.names)] {
            if !names.is_empty() {
                self.filled_set(base, Key::Interface, names, Elements::Interfaces);
            }
        }
        if let Some(macs) = &plan.macs {
            self.filled_set(MACS, Key::Mac, macs, Elements::Macs);
        }
        if !plan.bypass_macs.is_empty() {
            self.filled_set(BYPASS_MACS, Key::Mac, &plan.bypass_macs, Elements::Macs);
        }
        let owners = &plan.owners;
        for (base, key, ids) in [(UIDS, Key::Uid, &owners.uids), (GIDS, Key::Gid, &owners.gids)] {
            if let Some(ids) = ids {
                self.filled_set(base, key, ids, Elements::Ids);
            }
        }
        for (base, key, ids) in
            [(BYPASS_UIDS, Key::Uid, &owners.bypass_uids), (BYPASS_GIDS, Key::Gid, &owners.bypass_gids)]
        {
            if !ids.is_empty() {
                self.filled_set(base, key, ids, Elements::Ids);
            }
        }
        for (which, prefixes) in [
            (PrefixList::Src, &plan.src),
            (PrefixList::Bypass, &plan.bypass),
            (PrefixList::BypassSrc, &plan.bypass_src),
            (PrefixList::Dst, &plan.dst),
        ] {
            for (prefixes, family) in each(prefixes, plan.families) {
                for set in which.sets(prefixes, family, self.variant) {
                    self.empty_set(set, if set.len.is_some() { Key::Network(family) } else { Key::Address(family) });
                }
                let elements = elements(which, family, self.variant, &prefixes.contents(family)?)?;
                self.objects.try_reserve(elements.len()).map_err(|_| Error::no_memory())?;
                self.objects.extend(elements);
            }
        }
        Ok(())
    }

    /// The name of the set of a protocol's candidate ports: both protocols share it if they have the same.
    fn port_set(&self, protocol: Protocol) -> &'static str {
        let of = |protocol| self.plan.candidate_ports(protocol);
        let other = if protocol == Protocol::Tcp { Protocol::Udp } else { Protocol::Tcp };
        let alone = of(other).is_some_and(|ports| ports.is_empty());
        match protocol {
            _ if alone || of(Protocol::Tcp) == of(Protocol::Udp) => PORTS,
            Protocol::Tcp => PORTS_TCP,
            Protocol::Udp => PORTS_UDP,
        }
    }

    /// Matches destination ports, of which there is one at least.
    fn ports(&self, base: &'static str, ports: &[PortRange]) -> Statement {
        match one_port(ports) {
            Some(port) => Statement::DestinationPort(port),
            None => Statement::DestinationPortIn(self.set(base)),
        }
    }

    /// The set for these ports, unless they need none.
    fn port_elements(&mut self, base: &'static str, ports: &[PortRange]) {
        if !ports.is_empty() && one_port(ports).is_none() {
            self.filled_set(base, Key::Port, ports, Elements::Ports);
        }
    }

    /// A set and its elements, in pieces that fit into a message.
    fn filled_set<T: Clone>(&mut self, base: &'static str, key: Key, items: &[T], elements: fn(Vec<T>) -> Elements) {
        let set = self.empty_set(self.set(base), key);
        for piece in items.chunks(IN_A_MESSAGE) {
            self.objects.push(Object::Elements { set, elements: elements(piece.to_vec()) });
        }
    }

    fn empty_set(&mut self, name: SetName, key: Key) -> SetName {
        // Any number will do that is unique in the transaction.
        let id = self.objects.len() as u32 + 1;
        self.objects.push(Object::Set(Set { name, key, id }));
        name
    }
}

const TO_BE_INTERCEPTED: &str = "to be intercepted";

/// Not what is for this host, or for nobody.
fn goto_unless_local(selection: &Selection) -> [Statement; 2] {
    [Statement::DestinationNotLocal, Statement::Verdict(Verdict::Goto(selection.then))]
}

/// A set of prefixes with each of the families, if there is one.
fn each(prefixes: &Option<PrefixSet>, families: Families) -> impl Iterator<Item = (&PrefixSet, Family)> {
    families.iter().filter_map(move |family| Some((prefixes.as_ref()?, family)))
}

/// The port, if there is but one: it needs no set.
fn one_port(ports: &[PortRange]) -> Option<u16> {
    match ports {
        [PortRange { first, last }] if first == last => Some(*first),
        _ => None,
    }
}

fn only(family: Option<Family>) -> Option<Statement> {
    family.map(Statement::Family)
}

/// Elements in one message, which may have 64 KiB of them: of a range two, with 28 + 36 bytes at most.
const IN_A_MESSAGE: usize = 900;

/// Elements of the sets of one family, in pieces that fit into a message.
pub(crate) fn elements(
    which: PrefixList,
    family: Family,
    variant: Variant,
    contents: &Contents,
) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    let mut add = |len, elements| {
        let set = which.set(family, len, variant);
        memory::push(&mut objects, Object::Elements { set, elements })
    };
    for (len, networks) in &contents.networks {
        for piece in networks.chunks(IN_A_MESSAGE) {
            add(Some(*len), Elements::Networks(memory::collect(piece.iter().map(|addr| Ok(*addr)))?))?;
        }
    }
    for piece in contents.ranges.chunks(IN_A_MESSAGE) {
        add(None, Elements::Addresses(family, memory::collect(piece.iter().map(|range| Ok(*range)))?))?;
    }
    Ok(objects)
}
