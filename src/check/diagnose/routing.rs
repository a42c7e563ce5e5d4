//! Routing of marked packets.

use std::collections::HashMap;
use std::fmt;

use super::{Context, flag};
use crate::check::eval::{self, Way};
use crate::check::findings::{self, Finding, Findings, Kind, Severity};
use crate::check::inspect::filter::{Condition, Part};
use crate::check::inspect::routing::{Action, Rule};
use crate::check::instances::Instance;
use crate::check::shell::word;
use crate::model::{Family, Mark};
use crate::name::Name;

/// Protocol number of this library's rules and routes (`route::PROTOCOL`).
pub(super) const PROTOCOL: u8 = crate::backend::route::PROTOCOL;
const LAST: u32 = crate::backend::route::RULES - 1;
const LOCAL: Action = Action::Lookup(255);
const MAIN: Action = Action::Lookup(254);

pub(super) fn check_routing(context: &Context<'_>, found: &mut Findings) {
    let missing_lo = context.host.interfaces.iter().any(|i| i.name == "lo" && !i.up);
    let mut rules: HashMap<(Family, u32), Vec<&Rule>> = HashMap::new();
    for rule in &context.host.rules {
        rules.entry((rule.family, rule.priority)).or_default().push(rule);
    }
    let marks = Marks::of(context);
    for instance in context.instances.iter().filter(|instance| instance.owner.is_some()) {
        for family in instance.families.iter().filter(|family| context.host.routed.contains(*family)) {
            // Evaluating the rules for a packet takes one step per rule.
            if let Some(mark) = instance.mark.filter(|_| context.chains.step(context.host.rules.len())) {
                let place = InstanceRouting { context, rules: &rules, marks, instance, family, mark };
                place.rules(found);
                place.routes(missing_lo, found);
            }
        }
    }
    shared(context, found);
    if missing_lo {
        loopback_down(context, found);
    }
    recipes(context, marks, found);
    left_behind(context, found);
    system_rules(context, found);
}

/// Lookups of the reverse route, or of the route of a reply, that use the packet's mark.
#[derive(Debug, Clone, Copy)]
struct Marks {
    /// Some interface drops packets whose reverse route, looked up with the mark, is local.
    martians: bool,
    /// tcp_fwmark_accept.
    answers: bool,
    /// A packet filter rule looks up the reverse route with the mark.
    filters: bool,
}

impl Marks {
    fn of(context: &Context<'_>) -> Marks {
        let sysctls = &context.host.sysctls;
        let mut outside = context.host.interfaces.iter().filter(|interface| interface.name != "lo");
        let asks = |part: &Part| matches!(part, Part::OnlyIf(Condition::RpFilterMiss { mark: true }));
        Marks {
            martians: outside.any(|interface| {
                let on = |name| sysctls.is_on_any(interface, name);
                on("src_valid_mark") == Some(true) && on("accept_local") == Some(false)
            }),
            answers: sysctls.is_on("ipv4/tcp_fwmark_accept") == Some(true),
            filters: context.rules().any(|(_, rule)| rule.parts.iter().any(asks)),
        }
    }
}

/// One family of one instance.
struct InstanceRouting<'a> {
    context: &'a Context<'a>,
    /// All routing policy rules, by priority.
    rules: &'a HashMap<(Family, u32), Vec<&'a Rule>>,
    marks: Marks,
    instance: &'a Instance,
    family: Family,
    mark: Mark,
}

impl InstanceRouting<'_> {
    fn priority(&self) -> u32 {
        self.instance.slot.priority
    }

    fn has(&self, priority: u32, action: Action, mark: Option<Mark>) -> bool {
        let rules = self.rules.get(&(self.family, priority)).map(Vec::as_slice).unwrap_or_default();
        rules.iter().any(|rule| rule.action == action && rule.mark == mark)
    }

    fn report<'f>(
        &self,
        found: &'f mut Findings,
        severity: Severity,
        kind: &'static Kind,
        words: fmt::Arguments<'_>,
    ) -> &'f mut Finding {
        report!(found, severity, kind, "instance {}, {}: {words}", self.instance.name, self.family)
            .with("flag", &flag(self.family))
            .with("mark", &self.mark)
            .with("table", &self.instance.slot.table)
    }

    fn rules(&self, found: &mut Findings) {
        let (table, first) = (self.instance.slot.table, self.priority());
        let (flag, own, last) = (flag(self.family), self.mark, first + LAST);
        let mut complete = true;
        let marks = [Some((1, own)), self.instance.output_mark.map(|mark| (2, mark))];
        for (number, mark) in marks.into_iter().flatten() {
            let priority = first + number;
            if !self.has(priority, Action::Lookup(table), Some(mark)) {
                self.report(
                    found,
                    Severity::Failure,
                    findings::RULE_MISSING,
                    format_args!("routing rule {priority} (fwmark {mark} lookup {table}) does not exist"),
                )
                .fix_with(format_args!(
                    "ip {flag} rule add pref {priority} fwmark {mark} lookup {table} protocol {PROTOCOL}"
                ));
                complete = false;
            }
        }
        let nop = self.has(last, Action::Nop, None);
        let goto = self.has(first, Action::Goto(last), Some(own));
        if !nop || !goto {
            let Marks { martians, answers, filters } = self.marks;
            let severity = if martians || answers || filters { Severity::Failure } else { Severity::Warning };
            let finding = self
                .report(
                    found,
                    severity,
                    findings::GUARD_MISSING,
                    format_args!(
                        "routing rules {first} (iif lo fwmark {own} goto {last}) and {last} (nop) do not both exist"
                    ),
                )
                .without_fix();
            if !nop {
                finding.and(format_args!("ip {flag} rule add pref {last} nop protocol {PROTOCOL}"));
            }
            if !goto {
                finding.and(format_args!(
                    "ip {flag} rule add pref {first} iif lo fwmark {own} goto {last} protocol {PROTOCOL}"
                ));
            }
            complete = false;
        }
        if complete {
            self.shadowed(found);
        }
    }

    /// Reports a rule that precedes this library's rules and matches marked packets.
    fn shadowed(&self, found: &mut Findings) {
        let host = self.context.host;
        let way = eval::routed(&host.rules, &host.routes, self.family, self.mark, Some(""));
        let Way::Elsewhere(rule, sure) = way else { return };
        if rule.priority > self.priority() + 1 {
            return;
        }
        let kind = if rule.mark.is_some() { findings::RULE_MARK } else { findings::RULE_SHADOWED };
        let severity = if sure { Severity::Failure } else { Severity::Warning };
        let finding = self.report(
            found,
            severity,
            kind,
            format_args!(
                "routing rule {} ({}) precedes rule {} of this library",
                rule.priority,
                shown(rule),
                self.priority()
            ),
        );
        // A rule that refuses every packet does not only affect interception: its deletion is the fix.
        let everything = rule.action.refuses() && rule.incoming.is_none() && rule.mark.is_none() && sure;
        match rule.priority.checked_sub(1).filter(|_| !everything) {
            None => finding.fix_with(format_args!("{}", deletion(host.rules.as_slice(), rule))),
            // Two rules of this library are added again before it. Rules with the same priority are evaluated in the order
            // in which they were added.
            Some(before) => {
                let (flag, mark, table) = (flag(self.family), self.mark, self.instance.slot.table);
                let after = self.priority() + LAST;
                finding
                    .fix_with(format_args!("ip {flag} rule add pref {before} iif lo fwmark {mark} goto {after}"))
                    .and(format_args!("ip {flag} rule add pref {before} fwmark {mark} lookup {table}"))
            }
        };
    }

    fn routes(&self, lo_down: bool, found: &mut Findings) {
        let (flag, table) = (flag(self.family), self.instance.slot.table);
        let context = self.context;
        let disabled =
            self.family == Family::V6 && context.host.sysctls.is_on("ipv6/conf/lo/disable_ipv6") == Some(true);
        if context.host.local_default(self.family, table) == Some(false) && !lo_down {
            let add = local_route(self.family, table);
            if disabled {
                self.report(found, Severity::Failure, findings::DISABLE_IPV6, format_args!("IPv6 is disabled on lo"))
                    .with("routes", &format_args!(" && {add}"));
            } else {
                self.report(
                    found,
                    Severity::Failure,
                    findings::ROUTE_MISSING,
                    format_args!("routing table {table} has no local default route"),
                )
                .fix_with(format_args!("{add}"));
            }
        }
        let Some(routes) = context.host.routes.get(&(self.family, table)) else { return };
        let foreign: Vec<_> = routes.first.iter().filter(|route| !route.is_local()).collect();
        if foreign.is_empty() {
            return;
        }
        let to = |destination: &Option<String>| destination.clone().unwrap_or_else(|| "default".to_owned());
        let mut names: Vec<String> = foreign.iter().take(SHOWN).map(|route| to(&route.destination)).collect();
        if foreign.len() > SHOWN {
            names.push(format!("and {} more", foreign.len() - SHOWN));
        }
        let finding = self
            .report(
                found,
                Severity::Failure,
                findings::ROUTE_FOREIGN,
                format_args!("routing table {table} has routes of other programs: {}", names.join(", ")),
            )
            .without_fix();
        for route in foreign.into_iter().take(SHOWN) {
            // The type is needed: this library's local route may have the same destination.
            if let Some(kind) = route.kind_name() {
                finding.and(format_args!("ip {flag} route del {kind} {} table {table}", to(&route.destination)));
            }
        }
    }
}

/// Maximum number of rules or routes that a message lists and a command removes.
const SHOWN: usize = 50;

/// Reports rules of other programs that select the routing tables of instances.
fn shared(context: &Context<'_>, found: &mut Findings) {
    let mut tables: HashMap<u32, &Instance> = HashMap::new();
    for instance in context.instances.iter().filter(|i| i.owner.is_some() && i.mark.is_some()) {
        tables.entry(instance.slot.table).or_insert(instance);
    }
    for rule in &context.host.rules {
        let Action::Lookup(table) = rule.action else { continue };
        let Some(instance) = tables.get(&table) else { continue };
        let from_loopback = match rule.family {
            Family::V4 => "127.0.0.0/8",
            Family::V6 => "::1/128",
        };
        let of_servers = rule.protocol == PROTOCOL
            && rule.priority == instance.slot.priority.saturating_add(2)
            && matches!(&rule.others[..], [("from", source)] if *source == from_loopback);
        let own =
            of_servers || rule.mark.is_some() && (rule.mark == instance.mark || rule.mark == instance.output_mark);
        if own || !instance.families.contains(rule.family) || !context.host.routed.contains(rule.family) {
            continue;
        }
        let (name, family, priority) = (&instance.name, rule.family, rule.priority);
        found
            .push(
                Severity::Warning,
                findings::TABLE_SHARED,
                format_args!(
                    "instance {name}, {family}: routing rule {priority} ({}) selects routing table {table} of this library",
                    shown(rule)
                ),
            )
            .fix_with(format_args!("{}", deletion(&context.host.rules, rule)));
    }
}

fn local_route(family: Family, table: u32) -> impl fmt::Display {
    let flag = flag(family);
    std::fmt::from_fn(move |f| write!(f, "ip {flag} route add local default dev lo table {table} protocol {PROTOCOL}"))
}

fn loopback_down(context: &Context<'_>, found: &mut Findings) {
    let lost = std::fmt::from_fn(|f| {
        for instance in context.instances.iter().filter(|instance| instance.mark.is_some()) {
            let table = instance.slot.table;
            for family in instance.families.iter() {
                if context.host.local_default(family, table) == Some(false) {
                    write!(f, " && {}", local_route(family, table))?;
                }
            }
        }
        Ok(())
    });
    let severity = if context.intercepts() { Severity::Failure } else { Severity::Warning };
    report!(found, severity, findings::LO_DOWN, "lo is down").with("routes", &lost);
}

/// Checks TPROXY rules that other programs or scripts installed. They need a routing rule, a local route, and an exemption
/// from the reverse-path check.
fn recipes(context: &Context<'_>, marks: Marks, found: &mut Findings) {
    // The result depends only on the family and the mark.
    let mut ports: HashMap<(Family, Mark), Vec<u16>> = HashMap::new();
    let mut order = Vec::new();
    for recipe in context.interceptions.iter().filter(|interception| interception.instance.is_none()) {
        let Some(mark) = recipe.mark else { continue };
        let ports = ports.entry((recipe.family, mark)).or_default();
        if ports.is_empty() {
            order.push((recipe.family, mark));
        }
        ports.push(recipe.port);
    }
    for (family, mark) in order.into_iter().filter(|(family, _)| context.host.routed.contains(*family)) {
        if !context.chains.step(3 * context.host.rules.len()) {
            return;
        }
        let mut ports = ports.remove(&(family, mark)).unwrap_or_default();
        ports.sort_unstable();
        ports.dedup();
        Recipe { context, family, mark, ports: &ports }.check(marks, found);
    }
}

/// TPROXY rules of other programs with one mark.
struct Recipe<'a> {
    context: &'a Context<'a>,
    family: Family,
    mark: Mark,
    /// Ports of the listeners.
    ports: &'a [u16],
}

impl Recipe<'_> {
    fn report(
        &self,
        found: &mut Findings,
        kind: &'static Kind,
        words: fmt::Arguments<'_>,
        fix: Option<fmt::Arguments<'_>>,
        [pref, table]: [u32; 2],
    ) {
        let (mark, family) = (self.mark, self.family);
        let first = self.ports.first().copied().unwrap_or(0);
        let more = std::fmt::from_fn(|f| match self.ports.len() {
            0 | 1 => Ok(()),
            several => write!(f, " and {} other ports", several - 1),
        });
        let finding =
            report!(found, Severity::Failure, kind, "TPROXY to port {first}{more} with mark {mark}, {family}: {words}");
        match fix {
            Some(fix) => finding.fix_with(fix),
            None => finding
                .with("flag", &flag(family))
                .with("mark", &mark)
                .with("pref", &pref.saturating_sub(1))
                .with("table", &table),
        };
    }

    fn check(&self, marks: Marks, found: &mut Findings) {
        let host = self.context.host;
        let (mark, family) = (self.mark, self.family);
        let flag = flag(family);
        let covers = |rule: &&Rule| {
            rule.family == family && rule.mark.is_some_and(|wanted| mark.value & wanted.mask == wanted.value)
        };
        let rule = host.rules.iter().filter(covers).find_map(|rule| match rule.action {
            Action::Lookup(table) => Some((rule, table)),
            _ => None,
        });
        let Some((rule, table)) = rule else {
            let mut tables = host.routes.iter().filter(|((other, _), _)| *other == family);
            let there = tables.find(|(_, routes)| routes.local_default == Some(true)).map(|((_, table), _)| *table);
            let table = there.unwrap_or(100);
            let route = std::fmt::from_fn(|f| match there {
                Some(_) => Ok(()),
                None => write!(f, " && ip {flag} route replace local default dev lo table {table}"),
            });
            let fix = format_args!("ip {flag} rule add fwmark {mark} lookup {table}{route}");
            let words = format_args!("no routing rule matches this mark");
            return self.report(found, findings::RULE_MISSING, words, Some(fix), [0, table]);
        };
        if host.local_default(family, table) == Some(false) {
            let words = format_args!("routing table {table} has no local default route");
            let fix = format_args!("ip {flag} route replace local default dev lo table {table}");
            return self.report(found, findings::ROUTE_MISSING, words, Some(fix), [0, table]);
        }
        let way = |incoming| eval::routed(&host.rules, &host.routes, family, mark, incoming);
        if let Way::Elsewhere(other, _) = way(Some(""))
            && other.priority < rule.priority
        {
            let words =
                format_args!("routing rule {} ({}) precedes rule {}", other.priority, shown(other), rule.priority);
            self.report(found, findings::RULE_SHADOWED, words, None, [other.priority, table]);
        }
        // The kernel's own lookups, of the reverse route and of the route of replies, find the local route. Some sysctls and
        // rules make them use the mark.
        let Way::Local(by) = way(Some("lo")) else { return };
        let by_mark = [
            (findings::SRC_VALID_MARK, family == Family::V4 && marks.martians, "src_valid_mark is set"),
            (findings::FWMARK_ACCEPT, marks.answers, "tcp_fwmark_accept is set"),
            (findings::RPFILTER, marks.filters, "a reverse-path rule uses the mark"),
        ];
        for (kind, _, words) in by_mark.into_iter().filter(|(_, applies, _)| *applies) {
            let words = format_args!(
                "{words}, and routing rule {} makes the reverse route of marked packets local",
                by.priority
            );
            self.report(found, kind, words, None, [by.priority, table]);
        }
    }
}

/// Reports rules of this library without an instance, and duplicate rules.
fn left_behind(context: &Context<'_>, found: &mut Findings) {
    let host = context.host;
    let in_place = |rule: &Rule| {
        let covers = |instance: &Instance| {
            let place = instance.slot;
            (place.priority..=place.priority + LAST).contains(&rule.priority)
        };
        context.instances.iter().any(covers)
    };
    let orphans: Vec<&Rule> = host.rules.iter().filter(|rule| rule.protocol == PROTOCOL && !in_place(rule)).collect();
    // Only the tables show which instances exist.
    if host.tables.is_some() && !orphans.is_empty() {
        let shown = orphans.iter().take(SHOWN);
        let mut numbers: Vec<String> = shown.map(|rule| format!("{} {}", rule.family, rule.priority)).collect();
        if orphans.len() > SHOWN {
            numbers.push(format!("and {} more", orphans.len() - SHOWN));
        }
        let finding = found
            .push(
                Severity::Note,
                findings::RULE_ORPHAN,
                format_args!("routing rules without an instance: {}", numbers.join(", ")),
            )
            .without_fix();
        for rule in orphans.iter().take(SHOWN) {
            let (flag, priority) = (flag(rule.family), rule.priority);
            finding.and(format_args!("ip {flag} rule del pref {priority} protocol {PROTOCOL}"));
        }
    }
    let mut known: HashMap<_, u32> = HashMap::new();
    for rule in host.rules.iter().filter(|rule| rule.protocol != PROTOCOL && rule.mark.is_some() && !rule.unknown) {
        let Rule { family, priority: later, action, mark, incoming, others, inverted, .. } = rule;
        let Some(earlier) = known.get(&(family, action, mark, incoming, others, inverted)).copied() else {
            known.insert((family, action, mark, incoming, others, inverted), *later);
            continue;
        };
        found
            .push(
                Severity::Note,
                findings::RULE_DUPLICATE,
                format_args!("{family} routing rules {earlier} and {later} are the same: {}", shown(rule)),
            )
            .fix_with(format_args!("{}", deletion(&host.rules, rule)));
    }
}

/// Checks the routing policy rules that every host has.
fn system_rules(context: &Context<'_>, found: &mut Findings) {
    for family in context.host.routed.iter() {
        let has = |action| context.host.rules.iter().any(|rule| rule.family == family && rule.action == action);
        let any = context.host.rules.iter().any(|rule| rule.family == family);
        for (action, kind, name) in [(LOCAL, findings::LOCAL_MISSING, "local"), (MAIN, findings::MAIN_MISSING, "main")]
        {
            if any && !has(action) {
                report!(found, Severity::Failure, kind, "{family}: no routing rule selects the table {name}")
                    .with("flag", &flag(family));
            }
        }
    }
}

/// Returns the command that deletes a rule. Empty: the command would delete another rule.
pub(super) fn deletion(rules: &[Rule], rule: &Rule) -> String {
    // The kernel deletes the first rule that matches all given attributes (`rule_find`), whatever other attributes it has.
    let asked = conditions(rule);
    let same = |other: &&Rule| {
        (other.family, other.priority, other.action) == (rule.family, rule.priority, rule.action) && {
            let all = conditions(other);
            asked.iter().all(|one| one.0 == NOT || all.contains(one))
        }
    };
    if rule.unknown || rules.iter().find(same) != Some(rule) {
        return String::new();
    }
    match selector(rule, &|name| word(name)) {
        Some(words) => {
            format!("ip {} rule del pref {} {words}", flag(rule.family), rule.priority).trim_end().to_owned()
        }
        None => String::new(),
    }
}

/// The option of `ip rule` that inverts the others, and has no value.
const NOT: &str = "not";

/// A rule's conditions, each as an option of `ip rule` and its value.
fn conditions(rule: &Rule) -> Vec<(&'static str, Name)> {
    let mut conditions = Vec::new();
    if rule.inverted {
        conditions.push((NOT, Name::default()));
    }
    conditions.extend(rule.incoming.clone().map(|name| ("iif", name)));
    conditions.extend(rule.mark.map(|mark| ("fwmark", Name::from(mark.to_string().as_str()))));
    conditions.extend(rule.others.iter().cloned());
    if rule.protocol != 0 {
        conditions.push(("protocol", Name::from(rule.protocol.to_string().as_str())));
    }
    conditions
}

/// A rule in few words, for people.
fn shown(rule: &Rule) -> String {
    let mut words = selector(rule, &|name| Some(name.to_string())).unwrap_or_default();
    if rule.unknown {
        words.push_str(" and more conditions");
    }
    words
}

/// What tells a rule from others of its preference, with the names in it put into words.
fn selector(rule: &Rule, name: &dyn Fn(&Name) -> Option<String>) -> Option<String> {
    let mut words = Vec::new();
    for (option, value) in conditions(rule) {
        words.push(option.to_owned());
        if !value.as_bytes().is_empty() {
            words.push(name(&value)?);
        }
    }
    words.push(match rule.action {
        Action::Lookup(table) => format!("lookup {table}"),
        Action::Goto(to) => format!("goto {to}"),
        Action::Nop => "nop".to_owned(),
        Action::Blackhole => "blackhole".to_owned(),
        Action::Unreachable => "unreachable".to_owned(),
        Action::Prohibit => "prohibit".to_owned(),
    });
    Some(words.join(" "))
}
