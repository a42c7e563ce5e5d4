//! Who has which slot: an instance's name, its routing rules' preferences and
//! its routing table, claimed by a table of nf_tables that is still empty.
//!
//! A claim is a compare-and-swap: the kernel makes the table only if the
//! ruleset is still the one that was read. So nobody gets a name or a slot
//! that a living instance has, and what no table speaks for is a dead one's.

use crate::backend::holder;
use crate::backend::nft::table::{self, RoutingSlot, Table};
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::route::{self, FoundRule, RULES};
use crate::error::{Error, Result};
use crate::model::Families;
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
}

/// Claims the instance's name and a slot. `excluded_tables` are routing tables that have turned out not to be free.
pub(super) fn claim(plan: &Plan, nft: &mut Channel, route: &mut Channel, excluded_tables: &[u32]) -> Result<Claim> {
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
        if let Some(slot) = orphaned_slot(&name, plan, &tables)? {
            commit(nft, &name, Some(generation), &[Change::Adopt])?;
            return Ok(Claim { slot, adopted: true });
        }
        let slot = choose(plan, &tables, &rules, excluded_tables)?;
        commit(nft, &name, Some(generation), &[Change::Claim { slot: &slot, persist: plan.persist }])?;
        // What a dead instance left there, and no remove_stale has removed.
        let in_use: Vec<u32> = slots(&tables).map(|slot| slot.table).collect();
        match route::delete_found(route, &left_at(&slot, &rules), &in_use) {
            Ok(()) => Ok(Claim { slot, adopted: false }),
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
    Ok(Claim { slot, adopted: false })
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
            commit(nft, SWEEPER, Some(generation), &[Change::Claim { slot: &slot, persist: false }])?;
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

/// The slot of the instance's orphaned table; `None`: the name is free.
fn orphaned_slot(name: &str, plan: &Plan, tables: &[Table]) -> Result<Option<RoutingSlot>> {
    let Some(table) = tables.iter().find(|table| table.name == name) else { return Ok(None) };
    if let Some(owner) = owner_of(table) {
        return Err(Error::with(
            libc::EBUSY,
            format_args!("{owner} has rules of this name (table inet {name}): end it, or give yours another `name`"),
        ));
    }
    match table.slot {
        Some(slot) if table.persistent && plan.persist => {
            let other = |wanted: Option<u32>, found| wanted.is_some_and(|wanted| wanted != found);
            if other(plan.priority, slot.priority) || other(plan.table, slot.table) {
                return Err(Error::invalid_with(format_args!(
                    "the rules of this name that persist have priority {} and table {}, which cannot be changed: leave \
                     `priority` and `table` zero, or call tp_purge_rules first",
                    slot.priority, slot.table
                )));
            }
            Ok(Some(slot))
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
    for number in 0..PLACES {
        let slot = numbered(plan, number);
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
