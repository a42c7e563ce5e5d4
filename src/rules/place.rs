//! Who has which place: an instance's name, its routing rules' preferences and
//! its routing table, claimed by a table of nf_tables that is still empty.
//!
//! A claim is a compare-and-swap: the kernel makes the table only if the
//! ruleset is still the one that was read. So nobody gets a name or a place
//! that a living instance has, and what no table speaks for is a dead one's.

use crate::backend::holder;
use crate::backend::nft::table::{self, Place, Table};
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::route::{self, FoundRule, RULES};
use crate::error::{Error, Result};
use crate::list::List;
use crate::model::{Families, Plan};
use crate::netlink::Channel;
use crate::text::Owned;

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

/// The table of whoever removes what dead instances left. No instance can have this name.
const SWEEPER: &str = "libtproxy--sweep";

/// What was claimed.
pub(super) struct Claim {
    pub place: Place,
    /// What a dead instance left there.
    pub leftovers: Vec<FoundRule>,
    /// The instance was there, without an owner: its rules are in force.
    pub adopted: bool,
}

/// Claims the instance's name and a place. `avoid` are routing tables that have turned out not to be free.
pub(super) fn claim(plan: &Plan, nft: &mut Channel, route: &mut Channel, avoid: &[u32]) -> Result<Claim> {
    let name = table::name_of(&plan.name);
    let mut swept = false;
    retried(|| {
        let (mut generation, mut tables) = table::list(nft)?;
        let mut rules = route::rules(route, plan.families)?;
        // What dead instances left goes first. Mostly there is nothing, and looking once is enough.
        if !swept && rules.iter().any(|rule| rule.ours && !is_lived_in(&tables, rule)) {
            sweep(nft, route)?;
            swept = true;
            (generation, tables) = table::list(nft)?;
            rules = route::rules(route, plan.families)?;
        }
        if let Some(place) = orphan_or_free(&name, plan, &tables)? {
            commit(nft, &name, Some(generation), &[Change::Adopt])?;
            return Ok(Claim { place, leftovers: Vec::new(), adopted: true });
        }
        let place = choose(plan, &tables, &rules, avoid)?;
        commit(nft, &name, Some(generation), &[Change::Claim { place: &place, persist: plan.persist }])?;
        let leftovers = rules.into_iter().filter(|rule| rule.ours && covers(&place, rule.priority)).list();
        Ok(Claim { place, leftovers, adopted: false })
    })
}

/// A place on a host without nf_tables, where nothing can be claimed: the first that nobody is seen to have.
pub(super) fn unclaimed(plan: &Plan, route: &mut Channel) -> Result<Claim> {
    let rules = route::rules(route, plan.families)?;
    let place = choose(plan, &[], &rules, &[])?;
    let leftovers = rules.into_iter().filter(|rule| rule.ours && covers(&place, rule.priority)).list();
    Ok(Claim { place, leftovers, adopted: false })
}

/// Removes the routing that dead instances left behind, whatever place it was.
///
/// Each place is claimed while it is cleaned, so that nobody comes to live there meanwhile.
pub(super) fn sweep(nft: &mut Channel, route: &mut Channel) -> Result<()> {
    // A rule that only looks like ours may withstand; nothing is tried twice.
    let mut tried: Vec<FoundRule> = Vec::new();
    loop {
        let claimed = retried(|| {
            let (generation, tables) = table::list(nft)?;
            let mut rules = route::rules(route, Families::ALL)?;
            rules.retain(|rule| rule.ours && !tried.contains(rule) && !is_lived_in(&tables, rule));
            let Some(priority) = rules.iter().map(|rule| rule.priority).min() else { return Ok(None) };
            // Another is at it already.
            if tables.iter().any(|table| table.name == SWEEPER) {
                return Ok(None);
            }
            // Nobody shall come to live in the routing table that is cleaned, either: one table at a time.
            rules.retain(|rule| (priority..priority + RULES).contains(&rule.priority));
            let table = rules.iter().find_map(FoundRule::table).unwrap_or(0);
            rules.retain(|rule| rule.table().is_none_or(|other| other == table));
            let place = Place { priority, table };
            commit(nft, SWEEPER, Some(generation), &[Change::Claim { place: &place, persist: false }])?;
            // A table that a living instance has is not a dead one's, whoever speaks of it.
            let in_use: Vec<u32> = places(&tables).map(|place| place.table).list();
            Ok(Some((rules, in_use)))
        })?;
        let Some((rules, in_use)) = claimed else { return Ok(()) };
        let removed = route::delete_found(route, &rules, &in_use);
        commit(nft, SWEEPER, None, &[Change::DeleteTable])?;
        removed?;
        tried.extend(rules);
    }
}

/// Does something that ends in a claim, until nobody else's change comes between.
fn retried<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..TRIES {
        match attempt() {
            // Whoever was first needs the processor too.
            Err(error) if error.errno() == libc::ERESTART => std::thread::sleep(std::time::Duration::from_micros(100)),
            done => return done,
        }
    }
    Err(Error::new(
        libc::EAGAIN,
        "nf_tables: other programs change the ruleset without pause, so that no table could be claimed; try again",
    ))
}

/// The places that tables speak for.
pub(super) fn places(tables: &[Table]) -> impl Iterator<Item = Place> {
    tables.iter().filter_map(|table| table.place)
}

/// A table speaks for the place that a rule is in.
fn is_lived_in(tables: &[Table], rule: &FoundRule) -> bool {
    places(tables).any(|place| covers(&place, rule.priority))
}

fn covers(place: &Place, priority: u32) -> bool {
    (place.priority..=last_of(place)).contains(&priority)
}

/// The place of the instance's orphaned table; `None`: the name is free.
fn orphan_or_free(name: &str, plan: &Plan, tables: &[Table]) -> Result<Option<Place>> {
    let Some(table) = tables.iter().find(|table| table.name == name) else { return Ok(None) };
    if let Some(owner) = owner_of(table) {
        return Err(Error::with(
            libc::EBUSY,
            format_args!("{owner} has rules of this name (table inet {name}): end it, or give yours another `name`"),
        ));
    }
    match table.place {
        Some(place) if table.persistent && plan.persist => {
            let other = |wanted: Option<u32>, found| wanted.is_some_and(|wanted| wanted != found);
            if other(plan.priority, place.priority) || other(plan.table, place.table) {
                return Err(Error::invalid_with(format_args!(
                    "the rules of this name that persist have priority {} and table {}, which cannot be changed: leave \
                     `priority` and `table` zero, or call tp_purge_rules first",
                    place.priority, place.table
                )));
            }
            Ok(Some(place))
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

/// The place of an instance on a host where nothing is taken.
pub(super) fn first(plan: &Plan) -> Place {
    numbered(plan, 0)
}

/// The place that is asked for, or one of those that nobody asked for.
fn numbered(plan: &Plan, number: u32) -> Place {
    Place {
        priority: plan.priority.unwrap_or(FIRST_PRIORITY + number * RULES),
        table: plan.table.unwrap_or(FIRST_TABLE + number),
    }
}

/// The first place that neither a table of ours nor a rule of someone else occupies.
fn choose(plan: &Plan, tables: &[Table], rules: &[FoundRule], avoid: &[u32]) -> Result<Place> {
    let mut occupied = None;
    for number in 0..PLACES {
        let place = numbered(plan, number);
        match occupant(&place, tables, rules) {
            None if !avoid.contains(&place.table) => return Ok(place),
            None => {}
            Some(occupant) => occupied = Some((place, occupant)),
        }
        if plan.priority.is_some() && plan.table.is_some() {
            break;
        }
    }
    Err(match occupied {
        Some((place, occupant)) => refusal(&place, &occupant),
        None => Error::new(libc::EBUSY, "every routing table for an instance is taken"),
    })
}

/// What is in the way of an instance.
enum Occupant<'a> {
    Instance(&'a Table, Place),
    Rule(&'a FoundRule),
}

fn occupant<'a>(place: &Place, tables: &'a [Table], rules: &'a [FoundRule]) -> Option<Occupant<'a>> {
    let overlaps = |other: &Place| other.priority.abs_diff(place.priority) < RULES || other.table == place.table;
    let table = tables.iter().find_map(|table| Some((table, table.place.filter(overlaps)?)));
    let foreign = || rules.iter().find(|rule| !rule.ours && covers(place, rule.priority));
    table.map(|(table, other)| Occupant::Instance(table, other)).or_else(|| foreign().map(Occupant::Rule))
}

/// The error for a place that is occupied.
fn refusal(place: &Place, occupant: &Occupant<'_>) -> Error {
    match occupant {
        Occupant::Instance(table, _) if table.name == SWEEPER => {
            // It will be gone in a moment: look again.
            Error::new(libc::ERESTART, "what a dead instance left there is being removed")
        }
        Occupant::Instance(table, other) => {
            let owner = owner_of(table).unwrap_or_else(|| "what persists".owned());
            Error::with(
                libc::EBUSY,
                format_args!(
                    "{owner} (table inet {}) has routing rules {}-{} and routing table {}: choose another `priority` and \
                     `table`",
                    table.name,
                    other.priority,
                    last_of(other),
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
                place.priority,
                last_of(place)
            ),
        ),
    }
}

/// The last preference of a place. What a comment of others says may be as large as can be.
fn last_of(place: &Place) -> u32 {
    place.priority.saturating_add(RULES - 1)
}
