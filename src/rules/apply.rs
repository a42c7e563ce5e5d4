//! Makes the kernel hold a plan, and no longer.
//!
//! nf_tables is atomic and dies with its owner; policy routing is neither. So
//! the order is: claim the instance's name and its place among the routing
//! rules by an empty table that belongs to this process; put the routing
//! there; fill the table, in one transaction, which is the moment at which
//! interception begins. Undoing is the same backwards. What a killed process
//! leaves behind is routing that no packet is marked for; whoever gets its
//! place next removes it.

use crate::backend::nft::ruleset;
use crate::backend::nft::table::{self, Table, Tag};
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::route::{self, FoundRule, RULES, Routing};
use crate::error::{Error, Result};
use crate::model::{Families, Family, Plan};
use crate::netlink::Channel;

use super::config::Config;

/// Places for instances that ask for none of their own: routing rules from
/// this preference on, three each, and a routing table each.
///
/// The rules have to come before those of others that could send a marked
/// packet elsewhere: the AWS VPC CNI's begin at 512, Tailscale's at 5210, and
/// wg-quick's are near 32765.
const FIRST_PRIORITY: u32 = 200;
const FIRST_TABLE: u32 = 7470;
const PLACES: u32 = 64;

/// Others may change nf_tables at the same time; one of us always gets through.
const CLAIM_TRIES: u32 = 1000;

/// Rules that are installed. They end with [`Rules::remove`], with this value,
/// or with the process, whichever comes first.
pub struct Rules {
    /// The channel whose socket owns the table.
    nft: Channel,
    route: Channel,
    table: String,
    routing: Routing,
    installed: bool,
}

impl Rules {
    /// Makes the kernel deliver to the listeners what the wish asks for.
    ///
    /// On failure nothing is left.
    pub fn install(config: &Config) -> Result<Rules> {
        let plan = super::plan::make(config)?;
        let nft = Channel::open(libc::NETLINK_NETFILTER).map_err(|e| {
            let errno = match e.raw_os_error() {
                Some(libc::EPROTONOSUPPORT) => libc::EOPNOTSUPP,
                other => other.unwrap_or(libc::EIO),
            };
            Error::new(errno, format!("socket(NETLINK_NETFILTER): {e}; the kernel needs CONFIG_NF_TABLES"))
        })?;
        let route = Channel::open(libc::NETLINK_ROUTE)
            .map_err(|e| Error::new(e.raw_os_error().unwrap_or(libc::EIO), format!("socket(NETLINK_ROUTE): {e}")))?;
        Rules::install_over(&plan, nft, route)
    }

    fn install_over(plan: &Plan, mut nft: Channel, mut route: Channel) -> Result<Rules> {
        let table = table::name_of(&plan.name);
        let (place, leftovers) = claim(plan, &table, &mut nft, &mut route)?;
        let routing =
            Routing { families: plan.families, mark: plan.mark, table: place.table, priority: place.priority };
        if let Err(error) = route::add(&mut route, &routing, &leftovers) {
            // The table is empty, and goes with its socket if this fails.
            let _ = commit(&mut nft, &table, None, &[Change::DeleteTable]);
            return Err(error);
        }
        // From here on dropping the value undoes all.
        let mut rules = Rules { nft, route, table, routing, installed: true };
        let objects = ruleset::compile(plan);
        let changes: Vec<Change<'_>> = objects.iter().map(Change::Add).collect();
        commit(&mut rules.nft, &rules.table, None, &changes)?;
        Ok(rules)
    }

    /// Removes the rules, the routing, the table, and what they did.
    ///
    /// The routing goes first, while the table still holds its place against
    /// others: for that moment the packets that would be intercepted are dropped.
    pub fn remove(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.installed) {
            return Ok(());
        }
        let routing = route::delete(&mut self.route, &self.routing);
        let table = match commit(&mut self.nft, &self.table, None, &[Change::DeleteTable]) {
            Err(error) if error.errno() == libc::ENOENT => Ok(()),
            done => done,
        };
        routing.and(table)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        let _ = self.undo();
    }
}

impl std::fmt::Debug for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rules").field("table", &self.table).field("routing", &self.routing).finish_non_exhaustive()
    }
}

/// Makes the instance's empty table, which holds its name and its place. Gives
/// the place, and what a dead instance left there.
fn claim(plan: &Plan, name: &str, nft: &mut Channel, route: &mut Channel) -> Result<(Tag, Vec<FoundRule>)> {
    for _ in 0..CLAIM_TRIES {
        let (generation, tables) = table::list(nft)?;
        check_free(name, &tables)?;
        // Both families, whichever this instance serves: a place is one for both.
        let rules = all_rules(route, plan.families)?;
        let place = choose_place(plan, &tables, &rules)?;
        let claimed = commit(nft, name, Some(generation), &[Change::Claim(&place)]);
        match claimed {
            Ok(()) => {
                let in_place = place.priority..place.priority + RULES;
                let leftovers = rules.into_iter().filter(|r| r.ours && in_place.contains(&r.priority)).collect();
                return Ok((place, leftovers));
            }
            // Another transaction came between looking and claiming: look again.
            Err(error) if error.errno() == libc::ERESTART => {}
            Err(error) => return Err(error),
        }
    }
    Err(Error::new(
        libc::EAGAIN,
        "nf_tables: other programs change the ruleset without pause, so that no table could be claimed; try again",
    ))
}

/// The rules of both families, as far as the kernel has both; those of `needed` it must have.
fn all_rules(route: &mut Channel, needed: Families) -> Result<Vec<FoundRule>> {
    let mut found = Vec::new();
    for family in Families::ALL.iter() {
        let one = Families { v4: family == Family::V4, v6: family == Family::V6 };
        match route::rules(route, one) {
            Ok(rules) => found.extend(rules),
            Err(error) if needed.contains(family) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(found)
}

fn check_free(name: &str, tables: &[Table]) -> Result<()> {
    let Some(table) = tables.iter().find(|table| table.name == name) else { return Ok(()) };
    Err(match table {
        Table { tag: Some(tag), owned: true, .. } => Error::new(
            libc::EBUSY,
            format!("process {} has rules of this name (table inet {name}); give yours another `name`", tag.pid),
        ),
        _ => Error::new(
            libc::EEXIST,
            format!(
                "there is a table inet {name} that no living program of this library owns; `nft delete table inet \
                 {name}` removes it, or give yours another `name`"
            ),
        ),
    })
}

/// The first place that neither a table of ours nor a rule of someone else occupies.
fn choose_place(plan: &Plan, tables: &[Table], rules: &[FoundRule]) -> Result<Tag> {
    let pid = std::process::id();
    let taken = |place: &Tag| -> Option<Error> {
        let overlaps = |tag: &Tag| tag.priority.abs_diff(place.priority) < RULES || tag.table == place.table;
        let in_place = place.priority..place.priority + RULES;
        if let Some(tag) = tables.iter().filter_map(|t| t.tag.as_ref()).find(|tag| overlaps(tag)) {
            return Some(Error::new(
                libc::EBUSY,
                format!(
                    "process {} uses routing rules {}-{} and table {} already: choose another `priority` and `table`",
                    tag.pid,
                    tag.priority,
                    tag.priority + RULES - 1,
                    tag.table
                ),
            ));
        }
        rules.iter().find(|rule| !rule.ours && in_place.contains(&rule.priority)).map(|rule| {
            Error::new(
                libc::EEXIST,
                format!(
                    "priority: someone else has an {} routing rule at {} (`ip rule`), and {}-{} are needed: choose another",
                    rule.family,
                    rule.priority,
                    in_place.start,
                    in_place.end - 1
                ),
            )
        })
    };
    let mut refusal = None;
    for number in 0..PLACES {
        let place = Tag {
            pid,
            priority: plan.priority.unwrap_or(FIRST_PRIORITY + number * RULES),
            table: plan.table.unwrap_or(FIRST_TABLE + number),
        };
        match taken(&place) {
            None => return Ok(place),
            Some(error) => refusal = Some(error),
        }
        if plan.priority.is_some() && plan.table.is_some() {
            break;
        }
    }
    Err(refusal.unwrap_or_else(|| Error::new(libc::EBUSY, "every place for an instance is taken")))
}
