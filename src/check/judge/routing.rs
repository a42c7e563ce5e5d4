//! Where marked packets are led.

use std::fmt;

use super::{Scene, flag, quoted};
use crate::backend::seen::filter::{Condition, Part};
use crate::backend::seen::routing::{Action, Route, Rule};
use crate::check::findings::{self, Finding, Findings, Kind, Severity};
use crate::check::instances::Instance;
use crate::check::walk::{self, Way};
use crate::list::List;
use crate::model::{Family, Mark};
use crate::text;
use crate::text::Owned;

/// What marks rules and routes as ours (`route::PROTOCOL`).
pub(super) const PROTOCOL: u8 = crate::backend::route::PROTOCOL;
const LAST: u32 = crate::backend::route::RULES - 1;
const LOCAL: Action = Action::Lookup(255);
const MAIN: Action = Action::Lookup(254);

pub(super) fn judge(scene: &Scene<'_>, found: &mut Findings) {
    let missing_lo = scene.facts.interfaces.iter().any(|i| i.name == "lo" && !i.up);
    for instance in scene.instances.iter().filter(|instance| instance.owner.is_some()) {
        for family in instance.families.iter().filter(|family| scene.facts.routed.contains(*family)) {
            if let Some(mark) = instance.mark {
                let place = Placed { scene, instance, family, mark };
                place.rules(found);
                place.routes(missing_lo, found);
            }
        }
    }
    if missing_lo {
        loopback_down(scene, found);
    }
    recipes(scene, found);
    left_behind(scene, found);
    system_rules(scene, found);
}

/// One family of one instance, in its place.
struct Placed<'a> {
    scene: &'a Scene<'a>,
    instance: &'a Instance,
    family: Family,
    mark: Mark,
}

impl Placed<'_> {
    fn priority(&self) -> u32 {
        self.instance.place.priority
    }

    fn has(&self, priority: u32, action: Action, mark: Option<Mark>) -> bool {
        let is =
            |rule: &Rule| (rule.family, rule.priority, rule.action, rule.mark) == (self.family, priority, action, mark);
        self.scene.facts.rules.iter().any(is)
    }

    fn say<'f>(
        &self,
        found: &'f mut Findings,
        severity: Severity,
        kind: &'static Kind,
        words: fmt::Arguments<'_>,
    ) -> &'f mut Finding {
        say!(found, severity, kind, "instance {}, {}: {words}", self.instance.name, self.family)
            .with("flag", &flag(self.family))
            .with("mark", &self.mark)
            .with("table", &self.instance.place.table)
    }

    fn rules(&self, found: &mut Findings) {
        let (table, first) = (self.instance.place.table, self.priority());
        let (flag, own, last) = (flag(self.family), self.mark, first + LAST);
        let mut complete = true;
        let marks = [Some((1, own)), self.instance.output_mark.map(|mark| (2, mark))];
        for (number, mark) in marks.into_iter().flatten() {
            let priority = first + number;
            if !self.has(priority, Action::Lookup(table), Some(mark)) {
                self.say(
                    found,
                    Severity::Failure,
                    findings::RULE_MISSING,
                    format_args!("there is no routing rule {priority}: fwmark {mark} lookup {table}"),
                )
                .cured_by(format_args!(
                    "ip {flag} rule add pref {priority} fwmark {mark} lookup {table} protocol {PROTOCOL}"
                ));
                complete = false;
            }
        }
        let nop = self.has(last, Action::Nop, None);
        let goto = self.has(first, Action::Goto(last), Some(own));
        if !nop || !goto {
            let severity = match looks_at_marks(self.scene) {
                true => Severity::Failure,
                false => Severity::Warning,
            };
            let finding = self
                .say(
                    found,
                    severity,
                    findings::GUARD_MISSING,
                    format_args!("the routing rules {first} (iif lo ... goto {last}) and {last} are not both there"),
                )
                .not_cured();
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
        self.shared(found);
    }

    /// A rule before ours that takes our packets.
    fn shadowed(&self, found: &mut Findings) {
        let facts = self.scene.facts;
        let way = walk::routed(&facts.rules, &facts.routes, self.family, self.mark, Some(""));
        let Way::Elsewhere(rule, sure) = way else { return };
        if rule.priority > self.priority() + 1 {
            return;
        }
        let kind = if rule.mark.is_some() { findings::RULE_MARK } else { findings::RULE_SHADOWED };
        let severity = if sure { Severity::Failure } else { Severity::Warning };
        let finding = self.say(
            found,
            severity,
            kind,
            format_args!("routing rule {} ({}) comes before ours, {}", rule.priority, shown(rule), self.priority()),
        );
        // What refuses everything does more harm than that.
        let everything = rule.action == Action::Refuse && rule.incoming.is_none() && rule.mark.is_none() && sure;
        match rule.priority.checked_sub(1).filter(|_| !everything) {
            None => finding.cured_by(format_args!("{}", deletion(rule))),
            // The same two of ours, once more, before it: rules of one preference are asked in the order of their making.
            Some(before) => {
                let (flag, mark, table) = (flag(self.family), self.mark, self.instance.place.table);
                let after = self.priority() + LAST;
                finding
                    .cured_by(format_args!("ip {flag} rule add pref {before} iif lo fwmark {mark} goto {after}"))
                    .and(format_args!("ip {flag} rule add pref {before} fwmark {mark} lookup {table}"))
            }
        };
    }

    /// Rules that lead others' packets into our table.
    fn shared(&self, found: &mut Findings) {
        let table = self.instance.place.table;
        let own = |mark| mark == self.mark || Some(mark) == self.instance.output_mark;
        for rule in &self.scene.facts.rules {
            if rule.family == self.family && rule.action == Action::Lookup(table) && !rule.mark.is_some_and(own) {
                self.say(
                    found,
                    Severity::Warning,
                    findings::TABLE_SHARED,
                    format_args!("routing rule {} ({}) leads to our table {table}", rule.priority, shown(rule)),
                )
                .cured_by(format_args!("{}", deletion(rule)));
            }
        }
    }

    fn routes(&self, lo_down: bool, found: &mut Findings) {
        let (flag, table) = (flag(self.family), self.instance.place.table);
        let own = |route: &&Route| route.family == self.family && route.table == table;
        let routes = || self.scene.facts.routes.iter().filter(own);
        let disabled = self.family == Family::V6 && self.scene.facts.sysctls.on("ipv6/conf/lo/disable_ipv6");
        if !routes().any(|route| route.local && route.destination.is_none()) && !lo_down {
            let add = local_route(self.family, table);
            if disabled {
                self.say(found, Severity::Failure, findings::DISABLE_IPV6, format_args!("IPv6 is disabled on lo"))
                    .with("routes", &format_args!(" && {add}"));
            } else {
                self.say(
                    found,
                    Severity::Failure,
                    findings::ROUTE_MISSING,
                    format_args!("routing table {table} has no local default route"),
                )
                .cured_by(format_args!("{add}"));
            }
        }
        let foreign: Vec<&str> =
            routes().filter(|r| !r.local).map(|r| r.destination.as_deref().unwrap_or("default")).list();
        if !foreign.is_empty() {
            let finding = self
                .say(
                    found,
                    Severity::Failure,
                    findings::ROUTE_FOREIGN,
                    format_args!("routing table {table} has routes of somebody else: {}", foreign.join(", ")),
                )
                .not_cured();
            for to in foreign {
                finding.and(format_args!("ip {flag} route del {to} table {table}"));
            }
        }
    }
}

fn local_route(family: Family, table: u32) -> impl fmt::Display {
    let flag = flag(family);
    text::by(move |f| write!(f, "ip {flag} route add local default dev lo table {table} protocol {PROTOCOL}"))
}

fn loopback_down(scene: &Scene<'_>, found: &mut Findings) {
    let lost = text::by(|f| {
        for instance in scene.instances.iter().filter(|instance| instance.mark.is_some()) {
            let table = instance.place.table;
            for family in instance.families.iter() {
                if !scene.facts.routes.iter().any(|r| r.family == family && r.table == table && r.local) {
                    write!(f, " && {}", local_route(family, table))?;
                }
            }
        }
        Ok(())
    });
    let severity = if scene.intercepts() { Severity::Failure } else { Severity::Warning };
    say!(found, severity, findings::LO_DOWN, "lo is down").with("routes", &lost);
}

/// Something makes the look-up of the way back, or of the answer, bear the packet's mark.
fn looks_at_marks(scene: &Scene<'_>) -> bool {
    martians(scene) || scene.facts.sysctls.on("ipv4/tcp_fwmark_accept") || filters_by_mark(scene)
}

/// On some interface a packet whose way back, by its mark, is local, is dropped.
fn martians(scene: &Scene<'_>) -> bool {
    let sysctls = &scene.facts.sysctls;
    let outside = scene.facts.interfaces.iter().filter(|interface| interface.name != "lo");
    outside.map(|i| &i.name).any(|name| sysctls.on_any(name, "src_valid_mark") && !sysctls.on_any(name, "accept_local"))
}

/// A rule asks for the way back, with the mark.
fn filters_by_mark(scene: &Scene<'_>) -> bool {
    let mut parts = scene.facts.chains.iter().flatten().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.parts);
    parts.any(|part| matches!(part, Part::OnlyIf(Condition::NoWayBack { mark: true })))
}

/// TPROXY rules of others, made by hand or by scripts: they need a rule, a route, and luck with the way back.
fn recipes(scene: &Scene<'_>, found: &mut Findings) {
    let facts = scene.facts;
    for recipe in scene.interceptions.iter().filter(|interception| interception.instance.is_none()) {
        let (Some(mark), family) = (recipe.mark, recipe.family) else { continue };
        if !facts.routed.contains(family) {
            continue;
        }
        let flag = flag(family);
        let mut say = |kind, words: fmt::Arguments<'_>, cure: Option<fmt::Arguments<'_>>, pref: u32, table: u32| {
            let finding = say!(
                found,
                Severity::Failure,
                kind,
                "TPROXY to port {} with mark {mark}, {family}: {words}",
                recipe.port
            );
            match cure {
                Some(cure) => finding.cured_by(cure),
                None => finding
                    .with("flag", &flag)
                    .with("mark", &mark)
                    .with("pref", &pref.saturating_sub(1))
                    .with("table", &table),
            };
        };
        let covers = |rule: &&Rule| {
            rule.family == family && rule.mark.is_some_and(|wanted| mark.value & wanted.mask == wanted.value)
        };
        let rule = facts.rules.iter().filter(covers).find_map(|rule| match rule.action {
            Action::Lookup(table) => Some((rule, table)),
            _ => None,
        });
        let default = |route: &&Route| route.family == family && route.local && route.destination.is_none();
        let Some((rule, table)) = rule else {
            let there = facts.routes.iter().find(default).map(|route| route.table);
            let table = there.unwrap_or(100);
            let route = text::by(|f| match there {
                Some(_) => Ok(()),
                None => write!(f, " && ip {flag} route replace local default dev lo table {table}"),
            });
            say(
                findings::RULE_MISSING,
                format_args!("no routing rule is for that mark"),
                Some(format_args!("ip {flag} rule add fwmark {mark} lookup {table}{route}")),
                0,
                table,
            );
            continue;
        };
        if !facts.routes.iter().any(|route| route.table == table && default(&route)) {
            say(
                findings::ROUTE_MISSING,
                format_args!("routing table {table} has no local default route"),
                Some(format_args!("ip {flag} route replace local default dev lo table {table}")),
                0,
                table,
            );
            continue;
        }
        let way = |incoming| walk::routed(&facts.rules, &facts.routes, family, mark, incoming);
        if let Way::Elsewhere(other, _) = way(Some(""))
            && other.priority < rule.priority
        {
            say(
                findings::RULE_SHADOWED,
                format_args!("routing rule {} ({}) comes before {}", other.priority, shown(other), rule.priority),
                None,
                other.priority,
                table,
            );
        }
        // The host's own look-ups, of the way back and of answers, find the local route: only a sysctl away from harm.
        let Way::Local(by) = way(Some("lo")) else { continue };
        let by_mark = [
            (findings::SRC_VALID_MARK, family == Family::V4 && martians(scene), "src_valid_mark is set"),
            (findings::FWMARK_ACCEPT, facts.sysctls.on("ipv4/tcp_fwmark_accept"), "tcp_fwmark_accept is set"),
            (findings::RPFILTER, filters_by_mark(scene), "a rule looks for the way back with the mark"),
        ];
        for (kind, _, words) in by_mark.into_iter().filter(|(_, applies, _)| *applies) {
            say(
                kind,
                format_args!("{words}, and the way back of marked packets is local, by routing rule {}", by.priority),
                None,
                by.priority,
                table,
            );
        }
    }
}

/// Rules of ours that no instance speaks for, and rules that are there twice.
fn left_behind(scene: &Scene<'_>, found: &mut Findings) {
    let facts = scene.facts;
    let in_place = |rule: &Rule| {
        let covers = |instance: &Instance| {
            let place = instance.place;
            (place.priority..=place.priority + LAST).contains(&rule.priority)
        };
        scene.instances.iter().any(covers)
    };
    let orphan = |rule: &&Rule| rule.protocol == PROTOCOL && !in_place(rule);
    let orphans = || facts.rules.iter().filter(orphan);
    // Without a look at the tables nobody can tell who lives.
    if facts.chains.is_some() && !facts.features.is_empty() && orphans().next().is_some() {
        let numbers: Vec<String> = orphans().map(|rule| format!("{} {}", rule.family, rule.priority)).list();
        let finding = found
            .say(
                Severity::Note,
                findings::RULE_ORPHAN,
                format_args!("routing rules that nobody owns: {}", numbers.join(", ")),
            )
            .not_cured();
        for rule in orphans() {
            let (flag, priority) = (flag(rule.family), rule.priority);
            finding.and(format_args!("ip {flag} rule del pref {priority} protocol {PROTOCOL}"));
        }
    }
    let others: Vec<&Rule> = facts.rules.iter().filter(|rule| rule.protocol != PROTOCOL && rule.mark.is_some()).list();
    for (index, rule) in others.iter().enumerate() {
        let same = |other: &&&Rule| {
            (other.family, other.action, other.mark, &other.incoming, other.conditional)
                == (rule.family, rule.action, rule.mark, &rule.incoming, rule.conditional)
        };
        if let Some(first) = others.get(..index).unwrap_or_default().iter().find(same) {
            let (family, earlier, later) = (rule.family, first.priority, rule.priority);
            found
                .say(
                    Severity::Note,
                    findings::RULE_DUPLICATE,
                    format_args!("{family} routing rules {earlier} and {later} are the same: {}", shown(rule)),
                )
                .cured_by(format_args!("{}", deletion(rule)));
        }
    }
}

/// The rules that every host has.
fn system_rules(scene: &Scene<'_>, found: &mut Findings) {
    for family in scene.facts.routed.iter() {
        let has = |action| scene.facts.rules.iter().any(|rule| rule.family == family && rule.action == action);
        let any = scene.facts.rules.iter().any(|rule| rule.family == family);
        for (action, kind, name) in [(LOCAL, findings::LOCAL_MISSING, "local"), (MAIN, findings::MAIN_MISSING, "main")]
        {
            if any && !has(action) {
                say!(found, Severity::Failure, kind, "{family}: no routing rule leads to the table {name}")
                    .with("flag", &flag(family));
            }
        }
    }
}

/// The command that deletes a rule.
fn deletion(rule: &Rule) -> String {
    format!("ip {} rule del pref {} {}", flag(rule.family), rule.priority, selector(rule)).trim_end().owned()
}

/// A rule in few words.
fn shown(rule: &Rule) -> String {
    let mut words = selector(rule);
    if rule.action == Action::Refuse {
        words.push_str(if words.is_empty() { "refuses" } else { ", refuses" });
    }
    if rule.conditional {
        words.push_str(" and more conditions");
    }
    words
}

/// What tells a rule from others of its preference.
fn selector(rule: &Rule) -> String {
    let words = text::by(|f| {
        if let Some(name) = &rule.incoming {
            write!(f, "iif {} ", quoted(name))?;
        }
        if let Some(mark) = rule.mark {
            write!(f, "fwmark {mark} ")?;
        }
        match rule.action {
            Action::Lookup(table) => write!(f, "lookup {table} "),
            Action::Goto(to) => write!(f, "goto {to} "),
            Action::Nop => f.write_str("nop "),
            Action::Refuse => Ok(()),
        }
    });
    words.to_string().trim_end().owned()
}
