//! Changes to rules that are installed: other rules in their slot, prefixes
//! that come and go, and an orphan's rules taken over.

use super::*;
use crate::backend::nft::table::Contents;
use crate::model::Family;
use crate::prefix::{self, Prefix, PrefixSet};

impl Instance {
    /// Replaces what is asked for: every packet is treated by the old rules or by the new.
    ///
    /// The name stays. Where another routing table or priority is asked for, or a rule of another program takes the packets
    /// before ours, routing moves: it is added at its new place before it is deleted at the old. On failure the old rules are
    /// as they were.
    pub fn replace(&mut self, config: &Config) -> Result<()> {
        let mut plan = plan_here(config)?;
        if plan.name != self.plan.name || plan.persist != self.plan.persist {
            return Err(Error::invalid(
                "name and TP_RULES_PERSIST cannot be replaced: remove the rules and install anew",
            ));
        }
        self.require_table()?;
        let blocked = is_ipv6_blocked(&mut plan, &mut self.route)?;
        plan.learned = self.plan.learned;
        let current = self.is_current();
        if !current {
            self.read_speaker()?;
        }
        self.changing(|rules| {
            rules.move_for(plan, blocked, |rules, plan, routing| rules.replace_plan(plan, routing, current))
        })
    }

    /// `current`: this process knows what is in the table.
    fn replace_plan(&mut self, plan: Plan, routing: Routing, current: bool) -> Result<()> {
        self.ending_offloaded_flows(plan.families, |rules| match rules.installed {
            Installed::Iptables => rules.replace_in_iptables(plan, routing),
            Installed::Nft if current => rules.swap_for(plan, routing),
            Installed::Nft => rules.take_over(plan, routing),
        })
    }

    /// Does something that may intercept packets of flows that a flow table has offloaded: the kernel forwards those
    /// before any rule sees them, until routing changes.
    fn ending_offloaded_flows(
        &mut self,
        families: Families,
        change: impl FnOnce(&mut Instance) -> Result<()>,
    ) -> Result<()> {
        let idle = route::add_idle(&mut self.route, families, self.routing.priority)?;
        let done = change(self);
        // An idle rule that stays affects no packet, and goes with the next change or sweep.
        let deleted = route::delete_entries(&mut self.route, &idle);
        match done {
            Ok(()) => Ok(()),
            Err(error) => Err(error.after(deleted)),
        }
    }

    /// Makes a change with routing at the slot that the plan should have, which is claimed before and is the only one
    /// afterwards.
    pub(super) fn move_for(
        &mut self,
        plan: Plan,
        blocked: bool,
        change: impl FnOnce(&mut Instance, Plan, Routing) -> Result<()>,
    ) -> Result<()> {
        let (present, former) = (self.slot(), self.successor);
        let record = plan.record(self.backend());
        let before = route::rules(&mut self.route, Families::ALL)?;
        let moves = plan.priority.is_some_and(|wanted| wanted != present.priority)
            || plan.table.is_some_and(|wanted| wanted != present.table)
            || plan.priority.is_none() && slot::overtaking(&plan, present, &before).is_some();
        let (slot, successor) = if !moves && record == self.record {
            (present, None)
        } else if self.claimed {
            let number = usize::from(former == Some(0));
            let (nft, route) = (&mut self.nft, &mut self.route);
            (slot::claim_successor(&plan, &record, present, number, nft, route)?, Some(number))
        } else {
            (slot::relocated(&plan, present, &[], &before)?, None)
        };
        let routing = routing(&plan, slot, blocked);
        if let Err(error) = change(self, plan, routing) {
            return Err(error.after(self.delete_successor(successor)));
        }
        self.record = record;
        if successor.is_some() {
            self.successor = successor;
        }
        // What resists affects no packet, and goes with the next change or sweep.
        let left = before.iter().filter(|rule| rule.ours && rule.is_behind(present.priority) && !routing.has(rule));
        let _ = route::delete_rules(&mut self.route, &left.copied().collect::<Vec<FoundRule>>());
        if slot.table != present.table {
            let _ = route::delete_routes(&mut self.route, present.table);
        }
        if successor.is_some() {
            let _ = self.delete_successor(former);
        }
        Ok(())
    }

    /// Deletes a successor of the instance's table, if there is one.
    pub(super) fn delete_successor(&mut self, number: Option<usize>) -> Result<()> {
        let names = table::successors_of(&self.plan.name);
        match number.and_then(|number| names.get(number)) {
            Some(name) => delete_table(&mut self.nft, name),
            None => Ok(()),
        }
    }

    /// Learns from the kernel which slot and record the instance has.
    pub(super) fn read_speaker(&mut self) -> Result<()> {
        let (_, tables) = table::list(&mut self.nft)?;
        let own = tables.iter().find(|table| table.name == self.table);
        let Some(speaker) = own.map(|own| table::speaker(&tables, own)) else { return Ok(()) };
        self.successor = slot::successor(&self.plan.name, &speaker.name);
        if let Some(slot) = speaker.slot {
            (self.routing.priority, self.routing.table) = (slot.priority, slot.table);
        }
        if let Some(record) = speaker.record {
            self.record = record;
        }
        Ok(())
    }

    fn backend(&self) -> Backend {
        match self.installed {
            Installed::Nft => Backend::Nft,
            Installed::Iptables => Backend::Iptables,
        }
    }

    /// Its place among the routing rules, and its routing table.
    pub(super) fn slot(&self) -> table::RoutingSlot {
        table::RoutingSlot { priority: self.routing.priority, table: self.routing.table }
    }

    /// Adds and removes prefixes of a set, in one transaction, while the rules work.
    ///
    /// The set must be there: `dst` and `src` are if the config has them, empty or not, `bypass` always is (but not with
    /// [`Mode::DivertOnly`]).
    ///
    /// What it costs does not grow with the set. Once in a while it takes as long as [`Instance::replace`]: when so many
    /// prefixes of a length have come that they get a set of their own.
    pub fn update(&mut self, set: Set, add: &[Prefix], remove: &[Prefix]) -> Result<()> {
        self.require_current()?;
        let missing = |name: &str| {
            Error::invalid_with(format_args!(
                "there is no {name} set to update: the rules were installed with {name} NULL, which restricts nothing; tp_replace_rules can give one"
            ))
        };
        if self.plan.mode == Mode::DivertOnly {
            return Err(Error::invalid("TP_RULES_DIVERT_ONLY intercepts nothing, and has no set to update"));
        }
        let which = match set {
            Set::Dst if self.plan.dst.is_none() => return Err(missing("dst")),
            Set::Src if self.plan.src.is_none() => return Err(missing("src")),
            Set::Dst => PrefixList::Dst,
            Set::Src => PrefixList::Src,
            Set::Bypass => PrefixList::Bypass,
        };
        self.require_families(add.iter().chain(remove).copied())?;
        self.changing(|rules| rules.update_known(which, add, remove))
    }

    /// The table exists, and this process knows what it holds.
    pub(super) fn require_current(&mut self) -> Result<()> {
        self.require_table()?;
        if self.is_current() {
            return Ok(());
        }
        Err(Error::new(
            libc::ESTALE,
            "the process that installed the rules has changed them since this process was forked, so that the sets are \
             not known here: call tp_replace_rules first",
        ))
    }

    pub(super) fn require_families(&self, mut prefixes: impl Iterator<Item = Prefix>) -> Result<()> {
        match prefixes.find(|prefix| !self.plan.families.contains(prefix.family())) {
            Some(prefix) => {
                Err(Error::invalid_with(format_args!("prefix {prefix}: these rules do not serve its family")))
            }
            None => Ok(()),
        }
    }

    fn update_known(&mut self, which: PrefixList, add: &[Prefix], remove: &[Prefix]) -> Result<()> {
        // The rules do not ask for a set of bypasses before there is one.
        let first = prefixes_of(&mut self.plan, which).is_none();
        if self.installed == Installed::Iptables || first {
            let mut plan = self.plan.clone();
            prefixes_of(&mut plan, which).get_or_insert_default().update(add, remove)?;
            return self.replace_plan(plan, self.routing, true);
        }
        // In slot: to copy a large set takes longer than to change it.
        let prefixes = prefixes_of(&mut self.plan, which).get_or_insert_default();
        let change = prefixes.update(add, remove)?;
        let done = match prefixes.regrouped() {
            Err(error) => Err(error),
            Ok(Some(regrouped)) => {
                let mut plan = self.plan.clone();
                *prefixes_of(&mut plan, which) = Some(regrouped);
                self.replace_plan(plan, self.routing, true)
            }
            Ok(None) => {
                let families = self.plan.families;
                self.ending_offloaded_flows(families, |rules| rules.commit_elements(which, &change))
            }
        };
        if done.is_err() {
            prefixes_of(&mut self.plan, which).get_or_insert_default().undo(&change);
        }
        done
    }

    /// Changes the elements of the sets in force. What goes, goes first: a range that grows is deleted and added.
    fn commit_elements(&mut self, which: PrefixList, change: &prefix::Change) -> Result<()> {
        let objects = |[v4, v6]: &[prefix::Contents; 2]| -> Result<Vec<Object>> {
            let mut objects = ruleset::elements(which, Family::V4, self.variant, v4)?;
            objects.extend(ruleset::elements(which, Family::V6, self.variant, v6)?);
            Ok(objects)
        };
        let (gone, new) = (objects(&change.gone)?, objects(&change.new)?);
        let gone = gone.iter().filter_map(|object| match object {
            Object::Elements { set, elements } => Some(Change::DeleteElements { set: *set, elements }),
            _ => None,
        });
        let changes: Vec<Change<'_>> = gone.chain(new.iter().map(Change::Add)).collect();
        if changes.is_empty() { Ok(()) } else { commit(&mut self.nft, &self.table, None, &changes) }
    }

    /// Deletes what of the routing there was before is not wanted now. The new rules are in force: what resists is
    /// inert, and goes with the next change or sweep.
    pub(super) fn delete_surplus(&mut self, before: &[FoundRule]) {
        let routing = self.routing;
        let ours = before.iter().filter(|rule| rule.ours && rule.is_behind(routing.priority));
        let surplus: Vec<FoundRule> = ours.filter(|rule| !routing.has(rule)).copied().collect();
        let _ = route::delete_rules(&mut self.route, &surplus);
        let _ = route::delete_routes_without(&mut self.route, &routing);
    }

    /// Makes a table hold a plan, whatever another process has put there.
    pub(super) fn take_over(&mut self, mut plan: Plan, routing: Routing) -> Result<()> {
        let mut contents = table::contents(&mut self.nft, &self.table)?;
        plan.learned = ruleset::split_off_learned(&mut contents.sets);
        let old = self.without_idle_sets(contents)?;
        self.variant = old.sets.first().map_or(Variant::default(), |name| Variant::of(name));
        self.swap(plan, routing, &old)
    }

    /// The process before may have died between filling new sets and turning to them: only one variant is in use.
    fn without_idle_sets(&mut self, mut contents: Contents) -> Result<Contents> {
        for variant in [Variant::Second, Variant::First] {
            let (these, others): (Vec<String>, Vec<String>) =
                contents.sets.iter().cloned().partition(|name| Variant::of(name) == variant);
            if these.is_empty() || others.is_empty() {
                break;
            }
            let changes: Vec<Change<'_>> = these.into_iter().map(Change::DeleteSet).collect();
            match commit(&mut self.nft, &self.table, None, &changes) {
                Ok(()) => contents.sets = others,
                // The rules ask these: the others are idle.
                Err(error) if error.errno() == libc::EBUSY => {}
                Err(error) => return Err(error),
            }
        }
        Ok(contents)
    }

    /// From the plan in force to another.
    pub(super) fn swap_for(&mut self, plan: Plan, routing: Routing) -> Result<()> {
        let old = names_of(&ruleset::compile(&self.plan, self.variant)?);
        self.swap(plan, routing, &old)
    }

    /// From what the table holds to a plan. First the new sets, beside the old; then, in one transaction, the rules:
    /// a packet sees either all of the old ones or all of the new.
    ///
    /// The sets need a transaction of their own, since the kernel publishes what is in a new set of ranges only after
    /// the rules of its transaction are in force (`nf_tables_commit`: the generation, then each set's `commit`).
    /// Chains that both have stay, so that no base chain is away for a moment.
    fn swap(&mut self, plan: Plan, routing: Routing, old: &Contents) -> Result<()> {
        let variant = self.variant.other();
        let new = ruleset::compile(&plan, variant)?;
        let (sets, others): (Vec<&Object>, Vec<&Object>) = new.iter().partition(|object| is_set(object));
        let new_sets = names_of(&new).sets;

        let before = route::rules(&mut self.route, Families::ALL)?;
        let added = route::add_missing(&mut self.route, &routing, &before)?;
        let filled = add_sets(&mut self.nft, &self.table, &sets);
        let done = filled.and_then(|()| {
            let kept = |name: &str| {
                others.iter().any(|object| matches!(object, Object::Chain { name: new, .. } if *new == name))
            };
            let mut changes = vec![Change::DeleteRules];
            let gone = old.chains.iter().filter(|name| !kept(name));
            changes.extend(gone.map(|name| Change::DeleteChain(name)));
            changes.extend(old.sets.iter().cloned().map(Change::DeleteSet));
            changes.extend(others.iter().filter(|object| !has_already(old, object)).map(|object| Change::Add(object)));
            commit(&mut self.nft, &self.table, None, &changes)
        });
        if let Err(error) = done {
            // Sets that were not added yet are refused; others, that no rule asks, affect nothing, and go with the table.
            for name in new_sets {
                let _ = commit(&mut self.nft, &self.table, None, &[Change::DeleteSet(name)]);
            }
            return Err(error.after(route::delete_entries(&mut self.route, &added)));
        }
        (self.plan, self.variant, self.routing) = (plan, variant, routing);
        self.delete_surplus(&before);
        Ok(())
    }
}

fn prefixes_of(plan: &mut Plan, which: PrefixList) -> &mut Option<PrefixSet> {
    match which {
        PrefixList::Dst => &mut plan.dst,
        PrefixList::Src => &mut plan.src,
        PrefixList::Bypass => &mut plan.bypass,
        PrefixList::BypassSrc => &mut plan.bypass_src,
    }
}

/// Chains that stay. (A counter that is added again goes on counting: `nf_tables_newobj`.)
fn has_already(old: &Contents, object: &Object) -> bool {
    match object {
        Object::Chain { name, .. } => old.chains.iter().any(|chain| chain == name),
        _ => false,
    }
}

fn names_of(objects: &[Object]) -> Contents {
    let mut names = Contents::default();
    for object in objects {
        match object {
            Object::Chain { name, .. } => names.chains.push((*name).to_owned()),
            Object::Set(set) => names.sets.push(set.name.to_string()),
            _ => {}
        }
    }
    names
}
