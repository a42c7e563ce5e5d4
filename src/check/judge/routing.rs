//! Where marked packets are led.

use super::{Scene, all_of, flag, quoted};
use crate::backend::seen::filter::{Condition, Part};
use crate::backend::seen::routing::{Action, Rule};
use crate::check::findings::{self, Finding, Kind, Severity};
use crate::check::instances::Instance;
use crate::check::walk::{self, Way};
use crate::model::{Family, Mark};

/// What marks rules and routes as ours (`route::PROTOCOL`).
pub(super) const PROTOCOL: u8 = crate::backend::route::PROTOCOL;
const LAST: u32 = crate::backend::route::RULES - 1;
const LOCAL: Action = Action::Lookup(255);
const MAIN: Action = Action::Lookup(254);

pub(super) fn judge(scene: &Scene<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let missing_lo = scene.facts.interfaces.iter().any(|i| i.name == "lo" && !i.up);
    for instance in scene.instances.iter().filter(|instance| instance.owner.is_some()) {
        for family in instance.families.iter().filter(|family| scene.facts.routed.contains(*family)) {
            if let Some(mark) = instance.mark {
                let place = Placed { scene, instance, family, mark };
                found.extend(place.rules());
                found.extend(place.routes(missing_lo));
            }
        }
    }
    if missing_lo {
        found.push(loopback_down(scene));
    }
    found.extend(recipes(scene));
    found.extend(left_behind(scene));
    found.extend(system_rules(scene));
    found
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

    fn finding(&self, severity: Severity, kind: &'static Kind, words: String) -> Finding {
        Finding::new(severity, kind, format!("instance {}, {}: {words}", self.instance.name, self.family))
            .with("flag", flag(self.family))
            .with("mark", self.mark)
            .with("table", self.instance.place.table)
    }

    fn rules(&self) -> Vec<Finding> {
        let (table, first) = (self.instance.place.table, self.priority());
        let mut found = Vec::new();
        let marks = [Some((1, self.mark)), self.instance.output_mark.map(|mark| (2, mark))];
        for (number, mark) in marks.into_iter().flatten() {
            if !self.has(first + number, Action::Lookup(table), Some(mark)) {
                let words = format!("there is no routing rule {}: fwmark {mark} lookup {table}", first + number);
                let cure = format!(
                    "ip {} rule add pref {} fwmark {mark} lookup {table} protocol {PROTOCOL}",
                    flag(self.family),
                    first + number
                );
                found.push(self.finding(Severity::Failure, findings::RULE_MISSING, words).cured_by(cure));
            }
        }
        let mut guard = Vec::new();
        if !self.has(first + LAST, Action::Nop, None) {
            guard.push(format!("ip {} rule add pref {} nop protocol {PROTOCOL}", flag(self.family), first + LAST));
        }
        if !self.has(first, Action::Goto(first + LAST), Some(self.mark)) {
            guard.push(format!(
                "ip {} rule add pref {first} iif lo fwmark {} goto {} protocol {PROTOCOL}",
                flag(self.family),
                self.mark,
                first + LAST
            ));
        }
        if !guard.is_empty() {
            let words =
                format!("the routing rules {first} (iif lo ... goto {0}) and {0} are not both there", first + LAST);
            let severity = match looks_at_marks(self.scene) {
                true => Severity::Failure,
                false => Severity::Warning,
            };
            found.push(self.finding(severity, findings::GUARD_MISSING, words).cured_by(all_of(guard)));
        }
        if found.is_empty() {
            found.extend(self.shadowed());
        }
        found.extend(self.shared());
        found
    }

    /// A rule before ours that takes our packets.
    fn shadowed(&self) -> Option<Finding> {
        let facts = self.scene.facts;
        let way = walk::routed(&facts.rules, &facts.routes, self.family, self.mark, Some(""));
        let Way::Elsewhere(rule, sure) = way else { return None };
        if rule.priority > self.priority() + 1 {
            return None;
        }
        let kind = if rule.mark.is_some() { findings::RULE_MARK } else { findings::RULE_SHADOWED };
        let severity = if sure { Severity::Failure } else { Severity::Warning };
        let words = format!("routing rule {} ({}) comes before ours, {}", rule.priority, shown(rule), self.priority());
        // What refuses everything does more harm than that.
        let everything = rule.action == Action::Refuse && rule.incoming.is_none() && rule.mark.is_none() && sure;
        let Some(before) = rule.priority.checked_sub(1).filter(|_| !everything) else {
            let cure = format!("ip {} rule del pref {} {}", flag(self.family), rule.priority, selector(rule));
            return Some(self.finding(severity, kind, words).cured_by(cure.trim_end()));
        };
        // The same two of ours, once more, before it: rules of one preference are asked in the order of their making.
        let (flag, mark, table) = (flag(self.family), self.mark, self.instance.place.table);
        let cure = all_of([
            format!("ip {flag} rule add pref {before} iif lo fwmark {mark} goto {}", self.priority() + LAST),
            format!("ip {flag} rule add pref {before} fwmark {mark} lookup {table}"),
        ]);
        Some(self.finding(severity, kind, words).cured_by(cure))
    }

    /// Rules that lead others' packets into our table.
    fn shared(&self) -> Vec<Finding> {
        let table = self.instance.place.table;
        let own = |mark| mark == self.mark || Some(mark) == self.instance.output_mark;
        let foreign = |rule: &&Rule| {
            rule.family == self.family && rule.action == Action::Lookup(table) && !rule.mark.is_some_and(own)
        };
        let finding = |rule: &Rule| {
            let words = format!("routing rule {} ({}) leads to our table {table}", rule.priority, shown(rule));
            let cure = format!("ip {} rule del pref {} {}", flag(self.family), rule.priority, selector(rule));
            self.finding(Severity::Warning, findings::TABLE_SHARED, words).cured_by(cure)
        };
        self.scene.facts.rules.iter().filter(foreign).map(finding).collect()
    }

    fn routes(&self, lo_down: bool) -> Vec<Finding> {
        let table = self.instance.place.table;
        let own = |route: &&crate::backend::seen::routing::Route| route.family == self.family && route.table == table;
        let routes: Vec<_> = self.scene.facts.routes.iter().filter(own).collect();
        let mut found = Vec::new();
        let disabled = self.family == Family::V6 && self.scene.facts.sysctls.on("ipv6/conf/lo/disable_ipv6");
        if !routes.iter().any(|route| route.local && route.destination.is_none()) && !lo_down {
            let add = local_route(self.family, table);
            found.push(if disabled {
                self.finding(Severity::Failure, findings::DISABLE_IPV6, "IPv6 is disabled on lo".to_owned())
                    .with("routes", format!(" && {add}"))
            } else {
                let words = format!("routing table {table} has no local default route");
                self.finding(Severity::Failure, findings::ROUTE_MISSING, words).cured_by(add)
            });
        }
        let foreign: Vec<String> =
            routes.iter().filter(|r| !r.local).map(|r| r.destination.clone().unwrap_or("default".to_owned())).collect();
        if !foreign.is_empty() {
            let words = format!("routing table {table} has routes of somebody else: {}", foreign.join(", "));
            let delete = |to: &String| format!("ip {} route del {to} table {table}", flag(self.family));
            let cure = all_of(foreign.iter().map(delete));
            found.push(self.finding(Severity::Failure, findings::ROUTE_FOREIGN, words).cured_by(cure));
        }
        found
    }
}

fn local_route(family: Family, table: u32) -> String {
    format!("ip {} route add local default dev lo table {table} protocol {PROTOCOL}", flag(family))
}

fn loopback_down(scene: &Scene<'_>) -> Finding {
    let lost = |instance: &Instance| {
        let table = instance.place.table;
        let has = |family| scene.facts.routes.iter().any(|r| r.family == family && r.table == table && r.local);
        let lost = instance.families.iter().filter(|_| instance.mark.is_some()).filter(|family| !has(*family));
        lost.map(|family| format!(" && {}", local_route(family, table))).collect::<String>()
    };
    let severity = if scene.intercepts() { Severity::Failure } else { Severity::Warning };
    Finding::new(severity, findings::LO_DOWN, "lo is down")
        .with("routes", scene.instances.iter().map(lost).collect::<String>())
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
fn recipes(scene: &Scene<'_>) -> Vec<Finding> {
    let facts = scene.facts;
    let mut found = Vec::new();
    for recipe in scene.interceptions.iter().filter(|interception| interception.instance.is_none()) {
        let (Some(mark), family) = (recipe.mark, recipe.family) else { continue };
        if !facts.routed.contains(family) {
            continue;
        }
        let covers = |rule: &&Rule| {
            rule.family == family && rule.mark.is_some_and(|wanted| mark.value & wanted.mask == wanted.value)
        };
        let finding = |kind, words: String| {
            Finding::new(
                Severity::Failure,
                kind,
                format!("TPROXY to port {} with mark {mark}, {family}: {words}", recipe.port),
            )
            .with("flag", flag(family))
            .with("mark", mark)
        };
        let rule = facts.rules.iter().filter(covers).find_map(|rule| match rule.action {
            Action::Lookup(table) => Some((rule, table)),
            _ => None,
        });
        let Some((rule, table)) = rule else {
            let routes = facts.routes.iter().filter(|r| r.family == family && r.local && r.destination.is_none());
            let there = routes.map(|route| route.table).next();
            let table = there.unwrap_or(100);
            let add = format!("ip {} rule add fwmark {mark} lookup {table}", flag(family));
            let route = there
                .is_none()
                .then(|| format!("ip {} route replace local default dev lo table {table}", flag(family)));
            let words = "no routing rule is for that mark".to_owned();
            found.push(finding(findings::RULE_MISSING, words).cured_by(all_of(std::iter::once(add).chain(route))));
            continue;
        };
        let way = |incoming| walk::routed(&facts.rules, &facts.routes, family, mark, incoming);
        let is_local = facts
            .routes
            .iter()
            .any(|r| (r.family, r.table, r.local) == (family, table, true) && r.destination.is_none());
        if !is_local {
            let words = format!("routing table {table} has no local default route");
            let cure = format!("ip {} route replace local default dev lo table {table}", flag(family));
            found.push(finding(findings::ROUTE_MISSING, words).cured_by(cure));
            continue;
        }
        if let Way::Elsewhere(other, _) = way(Some(""))
            && other.priority < rule.priority
        {
            let words = format!("routing rule {} ({}) comes before {}", other.priority, shown(other), rule.priority);
            found.push(
                finding(findings::RULE_SHADOWED, words)
                    .with("pref", other.priority.saturating_sub(1))
                    .with("table", table),
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
            let words =
                format!("{words}, and the way back of marked packets is local, by routing rule {}", by.priority);
            found.push(finding(kind, words).with("pref", by.priority.saturating_sub(1)));
        }
    }
    found
}

/// Rules of ours that no instance speaks for, and rules that are there twice.
fn left_behind(scene: &Scene<'_>) -> Vec<Finding> {
    let facts = scene.facts;
    let mut found = Vec::new();
    let in_place = |rule: &Rule| {
        let covers = |instance: &Instance| {
            let place = instance.place;
            (place.priority..=place.priority + LAST).contains(&rule.priority)
        };
        scene.instances.iter().any(covers)
    };
    // Without a look at the tables nobody can tell who lives.
    if facts.chains.is_some() && !facts.features.is_empty() {
        let orphans: Vec<&Rule> = facts.rules.iter().filter(|r| r.protocol == PROTOCOL && !in_place(r)).collect();
        if !orphans.is_empty() {
            let numbers: Vec<String> =
                orphans.iter().map(|rule| format!("{} {}", rule.family, rule.priority)).collect();
            let words = format!("routing rules that nobody owns: {}", numbers.join(", "));
            let delete =
                |rule: &&Rule| format!("ip {} rule del pref {} protocol {PROTOCOL}", flag(rule.family), rule.priority);
            let cure = all_of(orphans.iter().map(delete));
            found.push(Finding::new(Severity::Note, findings::RULE_ORPHAN, words).cured_by(cure));
        }
    }
    let others: Vec<&Rule> =
        facts.rules.iter().filter(|rule| rule.protocol != PROTOCOL && rule.mark.is_some()).collect();
    for (index, rule) in others.iter().enumerate() {
        let same = |other: &&&Rule| {
            (other.family, other.action, other.mark, &other.incoming, other.conditional)
                == (rule.family, rule.action, rule.mark, &rule.incoming, rule.conditional)
        };
        if let Some(first) = others.get(..index).unwrap_or_default().iter().find(same) {
            let words = format!(
                "{} routing rules {} and {} are the same: {}",
                rule.family,
                first.priority,
                rule.priority,
                shown(rule)
            );
            let cure = format!("ip {} rule del pref {} {}", flag(rule.family), rule.priority, selector(rule));
            found.push(Finding::new(Severity::Note, findings::RULE_DUPLICATE, words).cured_by(cure));
        }
    }
    found
}

/// The rules that every host has.
fn system_rules(scene: &Scene<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for family in scene.facts.routed.iter() {
        let has = |action| scene.facts.rules.iter().any(|rule| rule.family == family && rule.action == action);
        let any = scene.facts.rules.iter().any(|rule| rule.family == family);
        for (action, kind, name) in [(LOCAL, findings::LOCAL_MISSING, "local"), (MAIN, findings::MAIN_MISSING, "main")]
        {
            if any && !has(action) {
                let words = format!("{family}: no routing rule leads to the table {name}");
                found.push(Finding::new(Severity::Failure, kind, words).with("flag", flag(family)));
            }
        }
    }
    found
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
    let mut words = Vec::new();
    if let Some(name) = &rule.incoming {
        words.push(format!("iif {}", quoted(name)));
    }
    if let Some(mark) = rule.mark {
        words.push(format!("fwmark {mark}"));
    }
    match rule.action {
        Action::Lookup(table) => words.push(format!("lookup {table}")),
        Action::Goto(to) => words.push(format!("goto {to}")),
        Action::Nop => words.push("nop".to_owned()),
        Action::Refuse => {}
    }
    words.join(" ")
}
