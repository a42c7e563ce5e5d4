//! Policy routing: what brings a marked packet to a local socket.
//!
//! For each family four preferences in a row and one route:
//!
//! ```text
//! ip rule add pref P   iif lo fwmark M/MASK goto P+3
//! ip rule add pref P+1 fwmark M/MASK lookup T
//! ip rule add pref P+2 fwmark O/MASK lookup T
//! ip rule add pref P+2 from 127.0.0.0/8 iif lo lookup T      (::1 for IPv6; only for servers of this host)
//! ip rule add pref P+3 nop
//! ip route add local default dev lo table T
//! ```
//!
//! The second rule and the route are the textbook. The first spares the
//! kernel's reverse-path check: with `src_valid_mark` set it asks, as
//! `iif lo` and with the packet's mark, for a route back to the client, would
//! find the local table, and drop the packet as a martian
//! (`net/ipv4/fib_frontend.c`, `__fib_validate_source`). The third is for the
//! host's own packets, which do come in by `lo`, and so need a mark of their own. The fourth is for a server on a loopback
//! address that replies to another host's address: the kernel looks for a route before any rule of netfilter can set a
//! mark, and refuses to send from such an address by another interface (`__mkroute_output`).
//!
//! While IPv6 is disabled on `lo`, the kernel refuses the route, and the table has another one:
//!
//! ```text
//! ip -6 route add blackhole default table T metric 2147483647
//! ```
//!
//! A packet that another host sent and `tproxy` assigned is never forwarded (`ip6_forward` drops what has a socket). The
//! blackhole drops those that this host sends.
//!
//! Unlike nf_tables, rtnetlink has no transactions: each message stands for
//! itself.

mod entry;

use std::fmt;

use crate::error::{Error, Result};
use crate::model::{Families, Family, Mark};
use crate::netlink::rtnl::link::{self, LOOPBACK, Link};
use crate::netlink::rtnl::route::RouteMessage;
use crate::netlink::rtnl::rule::RuleMessage;
use crate::netlink::uapi::DEVCONF_DISABLE_IPV6;
use crate::netlink::wire::Buffer;
use crate::netlink::{Channel, Failure};
use crate::sys;
pub(crate) use entry::{Entry, FoundRule};
use entry::{Operation, RuleKind, flag};

/// Who made a rule or route (`FRA_PROTOCOL`, `rtm_protocol`): 't'. Not among
/// those of `linux/rtnetlink.h` or iproute2's `rt_protos`.
pub(crate) const PROTOCOL: u8 = 116;

/// How many preferences one instance has.
pub(crate) const RULES: u32 = 4;
/// The greatest preference that an instance may begin at: all of its rules come before 32766, the main table's.
pub(crate) const PRIORITY_MAX: u32 = 32_766 - RULES;

/// Whether a routing table is the system's own: RT_TABLE_UNSPEC, or RT_TABLE_DEFAULT, _MAIN and _LOCAL.
///
/// No rule of ours leads there. What says so is another program's, whatever else it says.
pub(crate) fn is_system_table(table: u32) -> bool {
    matches!(table, 0 | 253..=255)
}

/// What the kernel shall have for one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Routing {
    /// Families with a local route.
    pub families: Families,
    /// Families whose local route cannot be made yet: their marked packets are dropped.
    pub blocked: Families,
    pub mark: Mark,
    /// The mark of packets that this host sends and that return by `lo`, if there are such.
    pub output_mark: Option<Mark>,
    /// Servers on loopback addresses reply to transparent sockets of this host.
    pub from_loopback: bool,
    pub table: u32,
    pub priority: u32,
}

impl Routing {
    /// The families that it has rules for.
    pub fn ruled(&self) -> Families {
        Families { v4: self.families.v4 || self.blocked.v4, v6: self.families.v6 || self.blocked.v6 }
    }

    /// The rule is one that this routing wants.
    pub fn has(&self, rule: &FoundRule) -> bool {
        entries(self).iter().any(|entry| entry.is(rule))
    }
}

/// The rules of both families, as far as the kernel has both; those of `needed` it must have.
pub(crate) fn rules(channel: &mut Channel, needed: Families) -> Result<Vec<FoundRule>> {
    let failed = |family: &str, e: sys::Errno| {
        let fix = "; the kernel needs CONFIG_IP_MULTIPLE_TABLES, and for IPv6 CONFIG_IPV6_MULTIPLE_TABLES";
        let fix = if is_absent(e) { fix } else { "" };
        Error::with(e.0, format_args!("ip {family}rule show: {e}{fix}"))
    };
    // The kernel gives the rules of every family that it has.
    let dumped = match channel.dump(libc::RTM_GETRULE, &RuleMessage::query(libc::AF_UNSPEC as u8), &|_| {}) {
        Err(e) if !is_absent(e) => return Err(failed("", e)),
        dumped => dumped.unwrap_or_default(),
    };
    let mut found: Vec<FoundRule> = dumped.iter().filter_map(|payload| FoundRule::decode(payload)).collect();
    for family in Families::ALL.iter() {
        // There is a rule of each, unless somebody has deleted them all, or the kernel lacks it, and says so.
        if found.iter().any(|rule| rule.family == family) {
            continue;
        }
        let spared = !needed.contains(family) || needed == Families::ALL && family == Family::V6;
        match channel.dump(libc::RTM_GETRULE, &RuleMessage::query(family.nfproto()), &|_| {}) {
            Ok(dumped) => found.extend(dumped.iter().filter_map(|payload| FoundRule::decode(payload))),
            Err(e) if spared && is_absent(e) => {}
            Err(e) => return Err(failed(if family == Family::V4 { "-4 " } else { "-6 " }, e)),
        }
    }
    Ok(found)
}

/// The kernel has no such family, or no routing rules.
fn is_absent(error: sys::Errno) -> bool {
    matches!(error.0, libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
}

/// Whether the kernel has IPv6, used or not.
pub(crate) fn kernel_has_ipv6(channel: &mut Channel) -> Result<bool> {
    match channel.dump(libc::RTM_GETRULE, &RuleMessage::query(Family::V6.nfproto()), &|_| {}) {
        Ok(_) => Ok(true),
        Err(sys::Errno(libc::EAFNOSUPPORT)) => Ok(false),
        Err(e) => Err(Error::io(format_args!("ip -6 rule show"), e)),
    }
}

/// Whether `lo` serves IPv6. The local route needs it: what is routed to `lo` is dropped while it is down.
pub(crate) fn loopback_has_ipv6(channel: &mut Channel) -> Result<bool> {
    let failed = |e: sys::Errno| Error::io(format_args!("ip link show lo"), e);
    let link = channel.get(libc::RTM_GETLINK, &link::header(LOOPBACK, 0, 0)).map_err(failed)?;
    let link = link.as_deref().and_then(Link::decode);
    let flags = link.map_or(0, |link| link.flags);
    if flags & libc::IFF_UP as u32 == 0 {
        return Err(Error::new(libc::ENETDOWN, "the loopback device must be up: `ip link set lo up`"));
    }
    Ok(link.and_then(|link| link.ipv6_conf(DEVCONF_DISABLE_IPV6)) == Some(0))
}

/// Adds the routes and rules. On failure, what was added is deleted again.
pub(crate) fn add(channel: &mut Channel, routing: &Routing) -> Result<()> {
    let entries = entries(routing);
    match add_entries(channel, &entries) {
        // A route of ours may be there without its rules: somebody deleted those.
        Err(error) if error.errno() == libc::EEXIST => {
            let is_route = |entry: &&Entry| matches!(entry, Entry::Route { .. });
            let routes: Vec<Entry> = entries.iter().filter(is_route).copied().collect();
            delete_entries(channel, &routes)?;
            add_entries(channel, &entries).map(drop)
        }
        done => done.map(drop),
    }
}

/// Adds what of a routing is not there yet, neither among the rules found nor as a route of ours. Gives what was added.
pub(crate) fn add_missing(channel: &mut Channel, routing: &Routing, found: &[FoundRule]) -> Result<Vec<Entry>> {
    let missing = missing(channel, routing, found)?;
    add_entries(channel, &missing)
}

/// What of a routing is not there, neither among the rules found nor as a route of ours.
pub(crate) fn missing(channel: &mut Channel, routing: &Routing, found: &[FoundRule]) -> Result<Vec<Entry>> {
    let mut missing = Vec::new();
    for entry in entries(routing) {
        let there = match entry {
            Entry::Rule { .. } => found.iter().any(|rule| entry.is(rule)),
            Entry::Route { family, table } => has_route(channel, family, table, libc::RTN_LOCAL)?,
            Entry::Blackhole { family, table } => has_route(channel, family, table, libc::RTN_BLACKHOLE)?,
        };
        if !there {
            missing.push(entry);
        }
    }
    Ok(missing)
}

/// Whether a table has a default route of this type, and it is ours.
fn has_route(channel: &mut Channel, family: Family, table: u32, wanted: u8) -> Result<bool> {
    let query = RouteMessage { family: family.nfproto(), table, ..RouteMessage::default() };
    let ours = |route: &Vec<u8>| entry::is_default_route(route, table, wanted);
    match channel.dump(libc::RTM_GETROUTE, &query.header(), &|a| query.encode(a)) {
        Ok(routes) => Ok(routes.iter().any(ours)),
        // No such table (fib_info's "FIB table does not exist", with strict checking).
        Err(sys::Errno(libc::ENOENT | libc::ESRCH)) => Ok(false),
        Err(e) => Err(Error::io(format_args!("ip {} route show table {table}", flag(family)), e)),
    }
}

/// Adds all or nothing.
fn add_entries(channel: &mut Channel, entries: &[Entry]) -> Result<Vec<Entry>> {
    let outcome = match send(channel, entries, Operation::Add, |_, _| false) {
        Ok(outcome) => outcome,
        // How far it came is not known.
        Err(error) => return Err(error.after(delete_entries(channel, entries))),
    };
    match outcome.first_failure {
        Some((failed, failure)) => {
            let error = rejected(&failed, &failure);
            Err(error.after(delete_entries(channel, &outcome.done)))
        }
        None => Ok(outcome.done),
    }
}

/// Deletes the routes and rules; those that are gone already are no error.
pub(crate) fn delete(channel: &mut Channel, routing: &Routing) -> Result<()> {
    delete_entries(channel, &entries(routing))
}

/// Deletes rules of ours that were found, and the local routes of the tables that they lead to, but for tables in use.
pub(crate) fn delete_found(channel: &mut Channel, rules: &[FoundRule], in_use: &[u32]) -> Result<()> {
    let tables = rules.iter().filter_map(FoundRule::table).filter(|table| !in_use.contains(table));
    let tables = tables.filter(|table| !is_system_table(*table));
    let routes = tables.flat_map(routes_of);
    delete_entries(channel, &routes.chain(rules.iter().map(FoundRule::entry)).collect::<Vec<_>>())
}

/// Deletes rules of ours that were found, and no routes.
pub(crate) fn delete_rules(channel: &mut Channel, rules: &[FoundRule]) -> Result<()> {
    delete_entries(channel, &rules.iter().map(FoundRule::entry).collect::<Vec<_>>())
}

/// The routes that an instance may have in its table.
fn routes_of(table: u32) -> [Entry; 3] {
    [
        Entry::Blackhole { family: Family::V6, table },
        Entry::Route { family: Family::V4, table },
        Entry::Route { family: Family::V6, table },
    ]
}

/// Deletes the routes of the table that the routing does not want.
pub(crate) fn delete_routes_without(channel: &mut Channel, routing: &Routing) -> Result<()> {
    let wanted = entries(routing);
    let mut surplus = routes_of(routing.table).to_vec();
    surplus.retain(|route| !wanted.contains(route));
    delete_entries(channel, &surplus)
}

/// Deletes the routes of a table that an instance has left.
pub(crate) fn delete_routes(channel: &mut Channel, table: u32) -> Result<()> {
    delete_entries(channel, &routes_of(table))
}

/// Adds a rule that selects nothing in each family, to be deleted once other rules of netfilter are in force: that changes
/// the generation of the routes, and so ends the flows that flow tables have offloaded (`nf_flow_dst_check`).
pub(crate) fn add_idle(channel: &mut Channel, families: Families, priority: u32) -> Result<Vec<Entry>> {
    let mark = Mark { value: 0, mask: 0 };
    let rule = |family| Entry::Rule { family, priority: priority.saturating_add(RULES - 2), kind: RuleKind::Nop, mark };
    let rules: Vec<Entry> = families.iter().map(rule).collect();
    // One that was left there does as well.
    let fine = |_: &Entry, failure: &Failure| failure.errno == libc::EEXIST || is_absent(sys::Errno(failure.errno));
    match send(channel, &rules, Operation::Add, fine).map(|outcome| outcome.first_failure) {
        Ok(None) => Ok(rules),
        Ok(Some((entry, failure))) => Err(rejected(&entry, &failure).after(delete_entries(channel, &rules))),
        Err(error) => Err(error.after(delete_entries(channel, &rules))),
    }
}

/// Deletes entries, the last first; those that are gone already are no error.
pub(crate) fn delete_entries(channel: &mut Channel, entries: &[Entry]) -> Result<()> {
    let backwards: Vec<Entry> = entries.iter().rev().copied().collect();
    // ENOENT: no such rule. ESRCH: no such route or table. EAFNOSUPPORT, EOPNOTSUPP: no such family here.
    let gone = [libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
    let outcome = send(channel, &backwards, Operation::Delete, |_, failure| gone.contains(&failure.errno))?;
    match outcome.first_failure {
        Some((entry, failure)) => Err(Error::with(
            failure.errno,
            format_args!("ip {}: {}", entry.command(Operation::Delete), sys::Errno(failure.errno)),
        )),
        None => Ok(()),
    }
}

/// What follows `ip` in the commands that would add all of it.
pub(crate) fn commands(routing: &Routing) -> impl Iterator<Item = String> {
    entries(routing).into_iter().map(|entry| entry.command(Operation::Add).to_string())
}

/// In the order in which they are added: a look-up without its route, or a jump without its target, would lead
/// marked packets past.
fn entries(routing: &Routing) -> Vec<Entry> {
    let Routing { families, blocked, mark, output_mark, from_loopback, table, priority } = *routing;
    let [first, second, third, after] = [0, 1, 2, RULES - 1].map(|number| priority.saturating_add(number));
    let none = Mark { value: 0, mask: 0 };
    // Of both families, a route and five rules each.
    let mut entries = Vec::with_capacity(12);
    for family in families.iter() {
        entries.push(Entry::Route { family, table });
    }
    for family in blocked.iter() {
        entries.push(Entry::Blackhole { family, table });
    }
    for family in routing.ruled().iter() {
        let mut rule = |priority, kind, mark| entries.push(Entry::Rule { family, priority, kind, mark });
        rule(after, RuleKind::Nop, none);
        rule(first, RuleKind::Goto(after), mark);
        rule(second, RuleKind::Lookup(table), mark);
        if let Some(mark) = output_mark {
            rule(third, RuleKind::Lookup(table), mark);
        }
        if from_loopback {
            rule(third, RuleKind::LookupFromLoopback(table), none);
        }
    }
    entries
}

#[derive(Default)]
struct Outcome {
    done: Vec<Entry>,
    first_failure: Option<(Entry, Failure)>,
}

/// Sends one message for each entry, all at once; each succeeds or fails by itself.
fn send(
    channel: &mut Channel,
    entries: &[Entry],
    operation: Operation,
    fine: impl Fn(&Entry, &Failure) -> bool,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    if entries.is_empty() {
        return Ok(outcome);
    }
    let mut messages = Buffer::default();
    let mut sent = Vec::with_capacity(entries.len());
    let mut last = 0;
    for (index, entry) in entries.iter().enumerate() {
        last = channel.next_seq();
        // Errors come unasked, and the acknowledgement of the last tells the end.
        let ack = if index + 1 == entries.len() { libc::NLM_F_ACK } else { 0 };
        entry.encode(&mut messages, last, operation, ack);
        sent.push((last, *entry));
    }
    let failed =
        |errno: i32, e: &dyn fmt::Display| Error::with(errno, format_args!("rtnetlink: sending routes and rules: {e}"));
    let answers = channel.exchange(&messages, last).map_err(|e| failed(e.0, &e))?;
    if !answers.acked && answers.failures.iter().all(|failure| failure.seq != last) {
        return Err(failed(libc::EIO, &"the kernel did not acknowledge"));
    }
    for (seq, entry) in sent {
        match answers.failures.iter().find(|failure| failure.seq == seq) {
            Some(failure) if fine(&entry, failure) => {}
            Some(failure) => _ = outcome.first_failure.get_or_insert((entry, failure.clone())),
            None => outcome.done.push(entry),
        }
    }
    Ok(outcome)
}

fn rejected(entry: &Entry, failure: &Failure) -> Error {
    let fix = match (entry, failure.errno) {
        (_, libc::EPERM) => "routing needs CAP_NET_ADMIN in the user namespace that owns this network namespace",
        (Entry::Route { .. }, libc::ENETDOWN | libc::ENETUNREACH | libc::EINVAL) => {
            "the loopback device must be up: `ip link set lo up`"
        }
        (Entry::Route { family: Family::V6, .. }, libc::EACCES | libc::ENODEV) => {
            "IPv6 is disabled on lo: `sysctl net.ipv6.conf.lo.disable_ipv6=0`, or ask for IPv4 only"
        }
        (Entry::Route { .. }, libc::EEXIST) => "that table has a default route of someone else: choose another `table`",
        (Entry::Rule { .. }, libc::EEXIST) => "someone else has the same rule: choose another `priority`",
        _ => "",
    };
    let before = if fix.is_empty() { "" } else { "; " };
    let command = entry.command(Operation::Add);
    Error::with(failure.errno, format_args!("ip {command}: {failure}{before}{fix}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire;
    use proptest::prelude::*;

    /// Gives the answers that it was given.
    struct Canned(std::collections::VecDeque<Vec<u8>>);

    impl crate::netlink::Transport for Canned {
        fn send(&mut self, _: &[u8]) -> sys::Result<()> {
            Ok(())
        }

        fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
            *buffer = self.0.pop_front().ok_or(sys::Errno(libc::EAGAIN))?;
            Ok(())
        }
    }

    /// The answer to a dump: the rules that it lists, or an errno. They are numbered from 1.
    fn dumped(seq: u32, answer: std::result::Result<&[Entry], i32>) -> Vec<u8> {
        let mut buffer = Buffer::default();
        match answer {
            Ok(entries) => {
                entries.iter().for_each(|entry| entry.encode(&mut buffer, seq, Operation::Add, 0));
                buffer.message(libc::NLMSG_DONE as u16, 0, seq, &[0; 4], |_| {});
            }
            Err(errno) => {
                let payload = [&(-errno).to_ne_bytes()[..], &[0; 16]].concat();
                buffer.message(libc::NLMSG_ERROR as u16, 0, seq, &payload, |_| {});
            }
        }
        buffer.bytes().unwrap().to_vec()
    }

    /// A kernel may have IPv4 alone, or no routing rules.
    #[test]
    fn routing_rules_of_a_family_that_the_kernel_lacks_are_none() {
        let nop = |family| Entry::Rule { family, priority: 7, kind: RuleKind::Nop, mark: Mark { value: 0, mask: 0 } };
        let (v4, v6) = ([nop(Family::V4)], [nop(Family::V6)]);
        let both = [v4[0], v6[0]];
        let absent = Err(libc::EAFNOSUPPORT);
        type Answer<'a> = std::result::Result<&'a [Entry], i32>;
        let found = |needed: Families, answers: &[Answer<'_>]| {
            let answers = answers.iter().zip(1..).map(|(answer, seq)| dumped(seq, *answer)).collect();
            let found = rules(&mut Channel::over(Box::new(Canned(answers))), needed);
            found.map(|rules| rules.iter().map(|rule| rule.family).collect::<Vec<_>>()).map_err(|error| error.errno())
        };
        let (only_v4, only_v6) = (Families { v4: true, v6: false }, Families { v4: false, v6: true });
        // The second question, and the third, are asked for the families of which the first gave none.
        assert_eq!(found(Families::ALL, &[Ok(&both)]), Ok(vec![Family::V4, Family::V6]));
        assert_eq!(found(Families::ALL, &[Ok(&v4), Ok(&v6)]), Ok(vec![Family::V4, Family::V6]));
        assert_eq!(found(Families::ALL, &[Ok(&v4), Ok(&[])]), Ok(vec![Family::V4]));
        assert_eq!(found(Families::ALL, &[Ok(&v4), absent]), Ok(vec![Family::V4]));
        assert_eq!(found(Families::ALL, &[Ok(&v4), Err(libc::EOPNOTSUPP)]), Ok(vec![Family::V4]));
        assert_eq!(found(Families::ALL, &[Ok(&v4), Err(libc::EPERM)]), Err(libc::EPERM));
        assert_eq!(found(Families::ALL, &[Ok(&v6), absent]), Err(libc::EAFNOSUPPORT));
        assert_eq!(found(only_v4, &[Ok(&v4), absent]), Ok(vec![Family::V4]));
        assert_eq!(found(only_v6, &[Ok(&v6), absent]), Ok(vec![Family::V6]));
        assert_eq!(found(only_v6, &[Ok(&v4), absent]), Err(libc::EAFNOSUPPORT));
        assert_eq!(found(only_v4, &[absent, Ok(&v4), absent]), Ok(vec![Family::V4]));
        assert_eq!(found(Families::ALL, &[absent, absent]), Err(libc::EAFNOSUPPORT));
        assert_eq!(found(Families::ALL, &[Err(libc::EPERM)]), Err(libc::EPERM));
    }

    #[test]
    fn refused_routing_says_what_would_help() {
        let route = |family| Entry::Route { family, table: 7470 };
        let rule = Entry::Rule { family: Family::V4, priority: 200, kind: RuleKind::Nop, mark: Mark::DEFAULT };
        for (entry, errno, words) in [
            (route(Family::V4), libc::EPERM, "CAP_NET_ADMIN"),
            (rule, libc::EPERM, "CAP_NET_ADMIN"),
            (route(Family::V4), libc::ENETDOWN, "ip link set lo up"),
            (route(Family::V6), libc::ENETUNREACH, "ip link set lo up"),
            (route(Family::V4), libc::EINVAL, "ip link set lo up"),
            (route(Family::V6), libc::EACCES, "disable_ipv6=0"),
            (route(Family::V6), libc::ENODEV, "disable_ipv6=0"),
            (route(Family::V4), libc::EEXIST, "choose another `table`"),
            (rule, libc::EEXIST, "choose another `priority`"),
        ] {
            let error = rejected(&entry, &Failure { seq: 1, errno, text: None, offset: None });
            let sentence = error.to_string();
            assert_eq!(error.errno(), errno);
            assert!(sentence.starts_with("ip ") && sentence.contains("; ") && sentence.contains(words), "{sentence}");
        }
        for (entry, errno) in [(rule, libc::ENETDOWN), (rule, libc::EINVAL), (route(Family::V4), libc::EACCES)] {
            let error = rejected(&entry, &Failure { seq: 1, errno, text: None, offset: None });
            assert!(error.to_string().ends_with(&sys::Errno(errno).to_string()), "{error}");
        }
    }

    #[test]
    fn routing_rule_added_is_recognized_in_dump() {
        let routing = Routing {
            families: Families::ALL,
            blocked: Families::default(),
            mark: Mark::DEFAULT,
            output_mark: Mark::DEFAULT.second(),
            from_loopback: true,
            table: 7470,
            priority: 200,
        };
        for entry in entries(&routing) {
            let Entry::Rule { family, priority, kind, mark } = entry else { continue };
            let mut buffer = Buffer::default();
            entry.encode(&mut buffer, 1, Operation::Add, 0);
            let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
            let found = FoundRule::decode(message.payload).unwrap();
            assert_eq!((found.family, found.priority, found.kind, found.ours), (family, priority, kind, true));
            assert_eq!(found.mark, mark);
        }
    }

    #[test]
    fn routing_commands_equal_documentation() {
        let families = Families { v4: true, v6: false };
        let routing = Routing {
            families,
            blocked: Families::default(),
            mark: Mark::DEFAULT,
            output_mark: Mark::DEFAULT.second(),
            from_loopback: true,
            table: 7470,
            priority: 200,
        };
        let commands: Vec<String> = entries(&routing).iter().map(|e| e.command(Operation::Add).to_string()).collect();
        assert_eq!(
            commands,
            [
                "-4 route add local default dev lo table 7470 protocol 116",
                "-4 rule add pref 203 nop protocol 116",
                "-4 rule add pref 200 iif lo fwmark 0x2000/0x3000 goto 203 protocol 116",
                "-4 rule add pref 201 fwmark 0x2000/0x3000 lookup 7470 protocol 116",
                "-4 rule add pref 202 fwmark 0x1000/0x3000 lookup 7470 protocol 116",
                "-4 rule add pref 202 from 127.0.0.0/8 iif lo lookup 7470 protocol 116",
            ]
        );
    }

    proptest! {
        #[test]
        fn routing_dump_of_any_bytes_does_not_panic(payload in wire::odd::answer(12)) {
            FoundRule::decode(&payload);
        }
    }
}
