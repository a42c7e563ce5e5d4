//! Who has which slot: an instance's name, its routing rules' preferences and
//! its routing table, claimed by a table of nf_tables that is still empty.
//!
//! A claim is a compare-and-swap: the kernel makes the table only if the
//! ruleset is still the one that was read. So nobody gets a name or a slot
//! that a living instance has, and what no table speaks for is a dead one's.

use crate::backend::holder;
use crate::backend::nft::table::{self, Record, RoutingSlot, Table};
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::route::{self, FoundRule, RULES};
use crate::error::{Error, Result};
use crate::model::{Families, Mode};
use crate::netlink::Channel;
use crate::plan::Plan;

/// Places for instances that ask for none of their own: routing rules from
/// this preference on, four each, and a routing table each.
///
/// The rules have to come before those of others that could send a marked
/// packet elsewhere: the AWS VPC CNI's begin at 512, Tailscale's at 5210, and
/// wg-quick's are near 32765.
const FIRST_PRIORITY: u32 = 200;
const FIRST_TABLE: u32 = 7470;
const PLACES: u32 = 64;

/// Others may change nf_tables at the same time; one of us always gets through.
const TRIES: u32 = 1000;

/// Each round of a remove_stale cleans one slot.
const ROUNDS: u32 = 1000;

/// The table of whoever removes what dead instances left. No instance can have this name.
const SWEEPER: &str = "libtproxy--sweep";

/// What was claimed.
pub(super) struct Claim {
    pub slot: RoutingSlot,
    /// The instance was there, without an owner: its rules are in force.
    pub adopted: bool,
    /// Which of the successors of its table speaks for it.
    pub successor: Option<usize>,
}

/// Which of the successors of an instance's table this is.
pub(super) fn successor(instance: &str, table: &str) -> Option<usize> {
    table::successors_of(instance).iter().position(|name| name == table)
}

/// Claims the instance's name and a slot. `excluded_tables` are routing tables that have turned out not to be free.
pub(super) fn claim(
    plan: &Plan,
    record: &Record,
    nft: &mut Channel,
    route: &mut Channel,
    excluded_tables: &[u32],
) -> Result<Claim> {
    let name = table::name_of(&plan.name);
    let mut removed_stale = false;
    retried(|| {
        let (mut generation, mut tables) = listed(nft)?;
        let mut rules = route::rules(route, plan.families)?;
        // What dead instances left goes first. Mostly there is nothing, and looking once is enough.
        if !removed_stale && rules.iter().any(|rule| rule.ours && !is_in_use(&tables, rule)) {
            // If another process is at it, the slots that it has not cleaned yet are not chosen.
            remove_stale(nft, route)?;
            removed_stale = true;
            (generation, tables) = listed(nft)?;
            rules = route::rules(route, plan.families)?;
        }
        if let Some((slot, speaker)) = orphaned_slot(&name, plan, &tables)? {
            commit(nft, &name, Some(generation), &[Change::Adopt])?;
            if speaker != name {
                commit(nft, &speaker, None, &[Change::Adopt])?;
            }
            return Ok(Claim { slot, adopted: true, successor: successor(&plan.name, &speaker) });
        }
        let slot = choose(plan, &tables, &rules, excluded_tables)?;
        let claim = Change::Claim { slot: &slot, record: Some(record), persist: plan.persist };
        commit(nft, &name, Some(generation), &[claim])?;
        // What a dead instance left there, and no remove_stale has removed.
        let in_use: Vec<u32> = slots(&tables).map(|slot| slot.table).collect();
        match route::delete_found(route, &left_at(&slot, &rules), &in_use) {
            Ok(()) => Ok(Claim { slot, adopted: false, successor: None }),
            Err(error) => Err(error.after(commit(nft, &name, None, &[Change::DeleteTable]))),
        }
    })
}

/// A slot on a host without nf_tables, where nothing can be claimed: the first that nobody is seen to have.
pub(super) fn pick_unclaimed(plan: &Plan, route: &mut Channel) -> Result<Claim> {
    let rules = route::rules(route, plan.families)?;
    let slot = choose(plan, &[], &rules, &[])?;
    // Whose routes these rules lead to cannot be known.
    route::delete_rules(route, &left_at(&slot, &rules))?;
    Ok(Claim { slot, adopted: false, successor: None })
}

/// Claims what an instance of this process is to have from now on, by a successor of its table. Its present slot stays claimed.
pub(super) fn claim_successor(
    plan: &Plan,
    record: &Record,
    present: RoutingSlot,
    number: usize,
    nft: &mut Channel,
    route: &mut Channel,
) -> Result<RoutingSlot> {
    let names = table::successors_of(&plan.name);
    let (own, Some(name)) = (table::name_of(&plan.name), names.get(number)) else { return Ok(present) };
    retried(|| {
        let (generation, mut tables) = listed(nft)?;
        if tables.iter().any(|table| table.name == *name) {
            commit(nft, name, Some(generation), &[Change::DeleteTable])?;
            return Err(Error::new(libc::ERESTART, "what was left there is removed"));
        }
        tables.retain(|table| table.name != own && !names.contains(&table.name));
        let rules = route::rules(route, Families::ALL)?;
        let slot = relocated(plan, present, &tables, &rules)?;
        commit(
            nft,
            name,
            Some(generation),
            &[Change::Claim { slot: &slot, record: Some(record), persist: plan.persist }],
        )?;
        if slot.priority == present.priority {
            return Ok(slot);
        }
        // What a dead instance left there, and no remove_stale has removed.
        let in_use: Vec<u32> = slots(&tables).map(|slot| slot.table).chain([present.table]).collect();
        match route::delete_found(route, &left_at(&slot, &rules), &in_use) {
            Ok(()) => Ok(slot),
            Err(error) => Err(error.after(commit(nft, name, None, &[Change::DeleteTable]))),
        }
    })
}

/// The slot that an instance should have: what it asks for, or else what it has, unless a rule of another program takes its
/// packets there. `tables`: those of other instances.
pub(super) fn relocated(
    plan: &Plan,
    present: RoutingSlot,
    tables: &[Table],
    rules: &[FoundRule],
) -> Result<RoutingSlot> {
    let table = plan.table.unwrap_or(present.table);
    let keeps = plan.priority.is_none() && overtaking(plan, present, rules).is_none();
    let priorities = match plan.priority {
        Some(priority) => vec![priority],
        None if keeps => vec![present.priority],
        None => {
            let limit = limit(plan, rules);
            let mut ahead = priorities(plan, limit);
            ahead.retain(|priority| u64::from(*priority) + u64::from(RULES) <= u64::from(limit));
            // Where there is no room ahead it stays.
            ahead.push(present.priority);
            ahead
        }
    };
    let mut refused = None;
    for priority in priorities {
        let slot = RoutingSlot { priority, table };
        if slot == present {
            return Ok(slot);
        }
        let overlaps = priority != present.priority && priority.abs_diff(present.priority) < RULES;
        match occupant(&slot, tables, rules) {
            Some(Occupant::Rule(_)) if priority == present.priority => return Ok(slot),
            None if !overlaps => return Ok(slot),
            None => {
                refused = refused.or(Some(Error::with(
                    libc::EBUSY,
                    format_args!(
                        "priority {priority}: these rules have {}-{} until the new ones are in force: choose another that                          does not overlap",
                        present.priority,
                        present.last()
                    ),
                )));
            }
            Some(occupant) => refused = refused.or_else(|| Some(refusal(&slot, &occupant))),
        }
    }
    Err(refused.unwrap_or_else(|| Error::new(libc::EBUSY, "every place for routing rules is taken")))
}

/// The first rule of another program that decides where the packets go of an instance that has this slot.
pub(super) fn overtaking<'a>(plan: &Plan, slot: RoutingSlot, rules: &'a [FoundRule]) -> Option<&'a FoundRule> {
    takers(plan, rules).filter(|rule| rule.priority <= slot.last()).min_by_key(|rule| rule.priority)
}

/// The rules of other programs that could decide where the packets of an instance go.
fn takers<'a>(plan: &Plan, rules: &'a [FoundRule]) -> impl Iterator<Item = &'a FoundRule> {
    let (mark, looped, families) = (plan.mark, plan.loop_mark, plan.families);
    // NAT needs no routing.
    let needs_routing = plan.mode != Mode::Redirect;
    rules.iter().filter(move |rule| needs_routing && families.contains(rule.family) && rule.may_take(mark, looped))
}

/// The preference before which the rules of an instance have to be.
fn limit(plan: &Plan, rules: &[FoundRule]) -> u32 {
    takers(plan, rules).map(|rule| rule.priority).min().unwrap_or(u32::MAX)
}

/// The preferences at which an instance may begin, the best first: the usual ones ahead of the limit, those right before it,
/// and last, where there is no room ahead, the usual ones behind it.
fn priorities(plan: &Plan, limit: u32) -> Vec<u32> {
    if let Some(priority) = plan.priority {
        return vec![priority; PLACES as usize];
    }
    let usual = || (0..PLACES).map(|number| FIRST_PRIORITY + number * RULES);
    let is_ahead = |first: &u32| first.saturating_add(RULES) <= limit;
    let before = (1..=PLACES).filter_map(|number| limit.checked_sub(number * RULES)).filter(|first| *first > 0);
    // If the usual ones are ahead, they are enough.
    let before = before.filter(|first| *first < FIRST_PRIORITY);
    usual().filter(is_ahead).chain(before).chain(usual().filter(|first| !is_ahead(first))).collect()
}

/// The rules of ours that are in a slot.
fn left_at(slot: &RoutingSlot, rules: &[FoundRule]) -> Vec<FoundRule> {
    rules.iter().filter(|rule| rule.ours && rule.is_behind(slot.priority)).copied().collect::<Vec<_>>()
}

/// Removes the routing that dead instances left behind, whatever slot it was. Another process that does the same is
/// waited for.
pub(super) fn remove_all_stale(nft: &mut Channel, route: &mut Channel) -> Result<()> {
    let mut at_it = 0;
    for _ in 0..TRIES {
        match remove_stale(nft, route)? {
            None => return Ok(()),
            Some(pid) => at_it = pid,
        }
        pause();
    }
    Err(Error::with(
        libc::EAGAIN,
        format_args!(
            "process {at_it} is removing the routing of dead instances, and does not come to an end; try again"
        ),
    ))
}

/// Removes the routing that dead instances left behind; gives the process that is at it already.
///
/// Each slot is claimed while it is cleaned, so that no instance comes to it meanwhile.
fn remove_stale(nft: &mut Channel, route: &mut Channel) -> Result<Option<u32>> {
    // A rule that only looks like ours may withstand; nothing is tried twice. So each round tries one more at least.
    let mut tried: Vec<FoundRule> = Vec::new();
    for _ in 0..ROUNDS {
        let claimed = retried(|| {
            let (generation, tables) = listed(nft)?;
            if let Some(sweeper) = tables.iter().find(|table| table.name == SWEEPER) {
                return match sweeper.owner {
                    Some(pid) => Ok(Next::Busy(pid)),
                    // It came out of a file.
                    None => commit(nft, SWEEPER, Some(generation), &[Change::DeleteTable]).map(|()| Next::Again),
                };
            }
            let mut rules = route::rules(route, Families::ALL)?;
            rules.retain(|rule| rule.ours && !tried.contains(rule) && !is_in_use(&tables, rule));
            let Some(slot) = place_of_first(&mut rules) else { return Ok(Next::Nothing) };
            commit(nft, SWEEPER, Some(generation), &[Change::Claim { slot: &slot, record: None, persist: false }])?;
            // A table that a living instance has is not a dead one's, whoever speaks of it.
            let in_use: Vec<u32> = slots(&tables).map(|slot| slot.table).collect();
            Ok(Next::Clean(rules, in_use))
        })?;
        match claimed {
            Next::Nothing => return Ok(None),
            Next::Busy(pid) => return Ok(Some(pid)),
            Next::Again => {}
            Next::Clean(rules, in_use) => {
                let removed = route::delete_found(route, &rules, &in_use);
                commit(nft, SWEEPER, None, &[Change::DeleteTable])?;
                removed?;
                tried.extend(rules);
            }
        }
    }
    Err(Error::new(
        libc::EAGAIN,
        "routing rules of protocol 116 without a living instance come as fast as they are removed (`ip rule`); find the \
         program that adds them",
    ))
}

/// What a round of sweeping is to do.
enum Next {
    Nothing,
    /// This process sweeps.
    Busy(u32),
    Again,
    /// Delete these rules, and the routes that they lead to, but for these tables.
    Clean(Vec<FoundRule>, Vec<u32>),
}

/// The slot that the first of these rules is in, and of the rules those that are in it, which are one at least.
///
/// No instance shall come to the routing table that is cleaned, either: it is one table at a time.
fn place_of_first(rules: &mut Vec<FoundRule>) -> Option<RoutingSlot> {
    let priority = rules.iter().map(|rule| rule.priority).min()?;
    rules.retain(|rule| rule.is_behind(priority));
    // Rules that lead nowhere need no routing table, but a slot has one.
    let table = rules.iter().find_map(FoundRule::table).unwrap_or(FIRST_TABLE);
    rules.retain(|rule| rule.table().is_none_or(|other| other == table));
    Some(RoutingSlot { priority, table })
}

/// Does something that ends in a claim, until nobody else's change comes between.
fn retried<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..TRIES {
        match attempt() {
            Err(error) if error.errno() == libc::ERESTART => pause(),
            done => return done,
        }
    }
    Err(Error::new(
        libc::EAGAIN,
        "nf_tables: other programs change the ruleset without pause, so that no table could be claimed; try again",
    ))
}

/// Who was first needs the processor too.
fn pause() {
    std::thread::sleep(std::time::Duration::from_micros(100));
}

/// The tables, and the generation of the ruleset.
fn listed(nft: &mut Channel) -> Result<(u32, Vec<Table>)> {
    let (generation, mut tables) = table::list(nft)?;
    // A sweeper's table dies with its owner. One without came out of a file in which somebody had saved the ruleset: it
    // speaks for nothing.
    for table in tables.iter_mut().filter(|table| table.name == SWEEPER && table.owner.is_none()) {
        table.slot = None;
    }
    Ok((generation, tables))
}

/// The slots that tables speak for.
pub(super) fn slots(tables: &[Table]) -> impl Iterator<Item = RoutingSlot> {
    tables.iter().filter_map(|table| table.slot)
}

/// A table speaks for the slot that a rule is in.
fn is_in_use(tables: &[Table], rule: &FoundRule) -> bool {
    slots(tables).any(|slot| rule.is_behind(slot.priority))
}

/// The slot of the instance's orphaned table, and the table that says it; `None`: the name is free.
fn orphaned_slot(name: &str, plan: &Plan, tables: &[Table]) -> Result<Option<(RoutingSlot, String)>> {
    let Some(table) = tables.iter().find(|table| table.name == name) else { return Ok(None) };
    if let Some(owner) = owner_of(table) {
        return Err(Error::with(
            libc::EBUSY,
            format_args!("{owner} has rules of this name (table inet {name}): end it, or give yours another `name`"),
        ));
    }
    let speaker = table::speaker(tables, table);
    match table.slot.and(speaker.slot) {
        Some(slot) if table.persistent && plan.persist => {
            let other = |wanted: Option<u32>, found| wanted.is_some_and(|wanted| wanted != found);
            if other(plan.priority, slot.priority) || other(plan.table, slot.table) {
                return Err(Error::invalid_with(format_args!(
                    "the rules of this name that persist have priority {} and table {}, which cannot be changed: leave \
                     `priority` and `table` zero, or call tp_purge_rules first",
                    slot.priority, slot.table
                )));
            }
            Ok(Some((slot, speaker.name.clone())))
        }
        Some(_) if table.persistent => Err(Error::new(
            libc::EEXIST,
            "rules of this name persist without an owner: take them over with TP_RULES_PERSIST, or remove them with \
             tp_purge_rules",
        )),
        _ => Err(Error::with(
            libc::EEXIST,
            format_args!(
                "there is a table inet {name} that no living program of this library owns; `nft delete table inet \
                 {name}` removes it, or give yours another `name`"
            ),
        )),
    }
}

/// Who owns a table, in words; `None`: no living process.
pub(super) fn owner_of(table: &Table) -> Option<String> {
    Some(holder::described(table.owner_port?, table.owner?))
}

/// The slot of an instance on a host where nothing is taken.
pub(super) fn first(plan: &Plan) -> RoutingSlot {
    numbered(plan, 0)
}

/// The slot that is asked for, or one of those that nobody asked for.
fn numbered(plan: &Plan, number: u32) -> RoutingSlot {
    RoutingSlot {
        priority: plan.priority.unwrap_or(FIRST_PRIORITY + number * RULES),
        table: plan.table.unwrap_or(FIRST_TABLE + number),
    }
}

/// The first slot that neither a table of ours nor a rule of someone else occupies.
fn choose(plan: &Plan, tables: &[Table], rules: &[FoundRule], excluded_tables: &[u32]) -> Result<RoutingSlot> {
    let mut occupied = None;
    for (number, priority) in (0..).zip(priorities(plan, limit(plan, rules))) {
        let slot = RoutingSlot { priority, ..numbered(plan, number) };
        match occupant(&slot, tables, rules) {
            None if !excluded_tables.contains(&slot.table) => return Ok(slot),
            None => {}
            Some(occupant) => occupied = Some((slot, occupant)),
        }
        if plan.priority.is_some() && plan.table.is_some() {
            break;
        }
    }
    Err(match occupied {
        Some((slot, occupant)) => refusal(&slot, &occupant),
        None => Error::new(libc::EBUSY, "every routing table for an instance is taken"),
    })
}

/// What is in the way of an instance.
enum Occupant<'a> {
    Instance(&'a Table, RoutingSlot),
    Rule(&'a FoundRule),
}

fn occupant<'a>(slot: &RoutingSlot, tables: &'a [Table], rules: &'a [FoundRule]) -> Option<Occupant<'a>> {
    let overlaps = |other: &RoutingSlot| other.priority.abs_diff(slot.priority) < RULES || other.table == slot.table;
    let table = tables.iter().find_map(|table| Some((table, table.slot.filter(overlaps)?)));
    let foreign = || rules.iter().find(|rule| !rule.ours && rule.is_behind(slot.priority));
    table.map(|(table, other)| Occupant::Instance(table, other)).or_else(|| foreign().map(Occupant::Rule))
}

/// The error for a slot that is occupied.
fn refusal(slot: &RoutingSlot, occupant: &Occupant<'_>) -> Error {
    match occupant {
        Occupant::Instance(table, _) if table.name == SWEEPER => {
            // It will be gone in a moment: look again.
            Error::new(libc::ERESTART, "what a dead instance left there is being removed")
        }
        Occupant::Instance(table, other) => {
            let owner = owner_of(table).unwrap_or_else(|| "what persists".to_owned());
            Error::with(
                libc::EBUSY,
                format_args!(
                    "{owner} (table inet {}) has routing rules {}-{} and routing table {}: choose another `priority` and \
                     `table`",
                    table.name,
                    other.priority,
                    other.last(),
                    other.table
                ),
            )
        }
        Occupant::Rule(foreign) => Error::with(
            libc::EEXIST,
            format_args!(
                "priority: someone else has an {} routing rule at {} (`ip rule`), and {}-{} are needed: choose another",
                foreign.family,
                foreign.priority,
                slot.priority,
                slot.last()
            ),
        ),
    }
}

#[cfg(test)]
mod tests;
