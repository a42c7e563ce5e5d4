//! Makes the kernel hold a plan, and no longer.
//!
//! nf_tables is atomic and dies with its owner; policy routing is neither. So
//! the order is: claim the instance's slot by an empty table that belongs to
//! this process (`slot`); put the routing there; fill the table, in one
//! transaction, which is the moment at which interception begins. Undoing is
//! the same backwards. What a killed process leaves behind is routing that no
//! packet is marked for; whoever comes next sweeps it.

use std::os::fd::BorrowedFd;

use crate::backend::nft::object::Object;
use crate::backend::nft::ruleset::{self, PrefixList};
use crate::backend::nft::set::Variant;
use crate::backend::nft::table::{self, Record};
use crate::backend::nft::transaction::{Change, commit};
use crate::backend::route::{self, FoundRule, Routing};
use crate::cgroup;
use crate::error::{Error, Result};
use crate::model::{Backend, Families, Family, Mode};
use crate::netlink::Channel;
use crate::plan::Plan;
use crate::process::{Revision, generation};

use super::config::Config;
use super::plan;
use super::slot;

/// Rules that are installed, and what they are changed by. [`super::Rules`] decides who may change them.
pub struct Instance {
    /// The channel whose socket owns the table.
    nft: Channel,
    route: Channel,
    table: String,
    plan: Plan,
    /// How the sets in force are named.
    variant: Variant,
    routing: Routing,
    /// What the table that speaks for the instance says, and which of the successors of its own table that is.
    record: Record,
    successor: Option<usize>,
    installed: Installed,
    /// The table belongs to the channel's socket. It does not on a host without nf_tables, where there is none.
    claimed: bool,
    ownership: Ownership,
}

/// Where the rules are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Installed {
    /// In the table.
    Nft,
    /// In chains of iptables; the table holds only the name and the slot.
    Iptables,
}

/// Which of the processes that have a copy of an instance knows what the kernel holds.
struct Ownership {
    /// The generation of the process that used the channels last.
    user: u64,
    /// The revision in the kernel, and the one that this copy knows. They differ if another process has changed the rules
    /// since the fork.
    revision: Revision,
    known: u64,
}

impl Ownership {
    fn new() -> Result<Ownership> {
        let revision = Revision::first().map_err(|e| Error::io(format_args!("mmap"), e))?;
        Ok(Ownership { user: generation(), known: revision.get(), revision })
    }
}

/// Packets and bytes since the rules were installed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Given to a listener.
    pub intercepted: Count,
    /// Given to a transparent socket that had them already.
    pub diverted: Count,
    /// Dropped for want of a listener.
    pub dropped: Count,
    /// Dropped because they were sent straight to a listener.
    pub direct: Count,
}

/// Packets, and their bytes from the IP header on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A set of prefixes that can be changed while the rules are installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Set {
    /// Destinations to intercept.
    Dst,
    /// Sources to intercept.
    Src,
    /// Destinations never to intercept.
    Bypass,
}

impl Instance {
    /// Makes the kernel deliver to the listeners what the config asks for.
    ///
    /// On failure nothing is left.
    pub fn install(config: &Config) -> Result<Instance> {
        Instance::install_over(config, &channels)
    }

    /// The same, over channels that `open` opens: to nf_tables and to routing.
    fn install_over(config: &Config, open: &dyn Fn() -> Result<(Channel, Channel)>) -> Result<Instance> {
        let plan = plan_here(config)?;
        let by_nft = |plan| open().and_then(|(nft, route)| Instance::install_by_nft(plan, nft, route));
        let by_iptables = |plan| {
            by_iptables::check(&plan)?;
            open().and_then(|(nft, route)| Instance::install_by_iptables(plan, nft, route))
        };
        match config.backend {
            Backend::Nft => by_nft(plan),
            Backend::Iptables => by_iptables(plan),
            Backend::Auto => by_nft(plan).or_else(|error| {
                let plan = plan_here(config)?;
                if error.errno() != libc::EOPNOTSUPP || by_iptables::check(&plan).is_err() {
                    return Err(error);
                }
                by_iptables(plan).map_err(|other| {
                    Error::with(other.errno(), format_args!("{error}; and by iptables instead: {other}"))
                })
            }),
        }
    }

    fn install_by_nft(mut plan: Plan, mut nft: Channel, mut route: Channel) -> Result<Instance> {
        let ownership = Ownership::new()?;
        // That IPv6 cannot be served yet shows when its route is refused; where there is no such route, look.
        let shows_later = plan.mode != Mode::Redirect && plan.families.v6;
        let mut blocked = !shows_later && is_ipv6_blocked(&mut plan, &mut route)?;
        let mut excluded_tables = Vec::new();
        let (table, variant) = (table::name_of(&plan.name), Variant::default());
        let (routing, adopted, successor) = loop {
            let record = plan.record(Backend::Nft);
            let claim = slot::claim(&plan, &record, &mut nft, &mut route, &excluded_tables)?;
            if claim.adopted {
                blocked = is_ipv6_blocked(&mut plan, &mut route)?;
                break (routing(&plan, claim.slot, blocked), true, claim.successor);
            }
            let routing = routing(&plan, claim.slot, blocked);
            match install_at(&plan, &table, &routing, &mut nft, &mut route) {
                Ok(()) => break (routing, false, None),
                // Somebody's route is in a table that nobody asked for by number: take another.
                Err(Refused { error, route_taken: true }) if plan.table.is_none() && error.errno() == libc::EEXIST => {
                    excluded_tables.push(routing.table);
                }
                Err(Refused { error, .. }) => {
                    let before = (plan.families, blocked);
                    blocked = is_ipv6_blocked(&mut plan, &mut route)?;
                    if (plan.families, blocked) == before {
                        return Err(error);
                    }
                }
            }
        };
        let installed = Installed::Nft;
        let record = plan.record(Backend::Nft);
        let mut rules = Instance {
            nft,
            route,
            table,
            plan,
            variant,
            routing,
            record,
            successor,
            installed,
            claimed: true,
            ownership,
        };
        if adopted {
            rules.read_speaker()?;
            rules.move_for(rules.plan.clone(), blocked, Instance::take_over)?;
        }
        Ok(rules)
    }

    /// What the rules have done so far.
    pub fn stats(&mut self) -> Result<Stats> {
        self.require_table()?;
        match self.installed {
            Installed::Iptables => self.counted(),
            Installed::Nft => counted(&mut self.nft, &self.table),
        }
    }

    /// Refuses to speak for a table that is gone, or that another socket has made since.
    fn require_table(&mut self) -> Result<()> {
        if !self.claimed {
            return Ok(());
        }
        let port = self.nft.port();
        match table::find(&mut self.nft, &self.table)? {
            Some(found) if port == 0 || found.owner_port == Some(port) => Ok(()),
            _ => Err(Error::with(
                libc::ENOENT,
                format_args!(
                    "the rules are gone: table inet {} was removed, or is that of another instance by now; remove this \
                     handle and install the rules again",
                    self.table
                ),
            )),
        }
    }

    /// Makes the channels those of this process: a parent that used them may have been killed while it waited for answers.
    pub fn take_channels(&mut self) {
        if std::mem::replace(&mut self.ownership.user, generation()) != generation() {
            self.nft.discard();
            self.route.discard();
        }
    }

    /// No other process has changed the rules since this one was forked.
    fn is_current(&self) -> bool {
        self.ownership.revision.get() == self.ownership.known
    }

    /// Does something that changes the rules, so that other processes know that they do not know them.
    fn changing(&mut self, change: impl FnOnce(&mut Instance) -> Result<()>) -> Result<()> {
        self.ownership.revision.begin();
        let done = change(self);
        self.ownership.known = self.ownership.revision.finish();
        done
    }

    /// The sockets that it works by are still those that it opened.
    pub fn has_its_sockets(&self) -> bool {
        self.sockets().count() == 2
    }

    /// Those of its sockets that the program has not closed.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.nft, &self.route].into_iter().filter_map(Channel::descriptor)
    }

    pub fn persists(&self) -> bool {
        self.plan.persist
    }

    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// Removes the rules, the routing, the table, and what they did.
    ///
    /// The routing goes first, while the table still holds its slot against
    /// others: for that moment the packets that would be intercepted are dropped.
    ///
    /// If they were removed already, by another process that has a copy, nothing is: the name and the slot may be
    /// those of another instance by now.
    pub fn remove(mut self) -> Result<()> {
        match self.require_table() {
            Err(error) if error.errno() == libc::ENOENT => return Ok(()),
            found => found?,
        }
        let current = self.is_current();
        let removed = self.undo();
        // Another process has added routing that this one does not know of.
        if current { removed } else { removed.and(slot::remove_all_stale(&mut self.nft, &mut self.route)) }
    }

    fn undo(&mut self) -> Result<()> {
        let rules = match self.installed {
            Installed::Iptables => self.remove_chains(),
            Installed::Nft => Ok(()),
        };
        let routing = route::delete(&mut self.route, &self.routing);
        let successors = match self.is_current() {
            true => self.delete_successor(self.successor),
            false => self.delete_successor(Some(0)).and(self.delete_successor(Some(1))),
        };
        let table = match self.installed {
            Installed::Iptables => by_iptables::unclaim(&mut self.nft, &self.table),
            Installed::Nft => delete_table(&mut self.nft, &self.table),
        };
        rules.and(routing).and(successors).and(table)
    }
}

/// What the rules of an instance have done so far, whatever process they belong to.
///
/// ```no_run
/// println!("{} packets intercepted", tproxy::rules::stats_of("tproxy")?.intercepted.packets);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn stats_of(name: &str) -> Result<Stats> {
    let name = plan::name(Some(name))?;
    let (mut nft, _) = channels()?;
    let table = table::name_of(&name);
    let (_, tables) = table::list(&mut nft)?;
    if !tables.iter().any(|other| other.name == table && other.slot.is_some()) {
        return Err(Error::with(libc::ENOENT, format_args!("there are no rules of this name (table inet {table})")));
    }
    Ok(counted_of(&name)?.0)
}

/// What the rules of an instance have done, and whether they are those of iptables.
pub(super) fn counted_of(instance: &str) -> Result<(Stats, bool)> {
    let (mut nft, _) = channels()?;
    let table = table::name_of(instance);
    // With iptables the table holds but the name and the slot.
    match table::contents(&mut nft, &table)?.chains.is_empty() {
        true => Ok((counted_by_iptables(instance)?, true)),
        false => Ok((counted(&mut nft, &table)?, false)),
    }
}

/// The names of instances that have chains of iptables.
pub(super) fn instances_by_iptables(family: Family) -> Result<Vec<String>> {
    by_iptables::instances(family)
}

/// What the chains of an instance have done.
pub(super) fn counted_by_iptables(instance: &str) -> Result<Stats> {
    by_iptables::counted_by_iptables(instance, Families::ALL)
}

/// The counters of a table.
fn counted(nft: &mut Channel, table: &str) -> Result<Stats> {
    let mut stats = Stats::default();
    for (name, packets, bytes) in table::counters(nft, table)? {
        let count = match name.as_str() {
            ruleset::INTERCEPTED => &mut stats.intercepted,
            ruleset::DIVERTED => &mut stats.diverted,
            ruleset::DROPPED => &mut stats.dropped,
            ruleset::DIRECT => &mut stats.direct,
            _ => continue,
        };
        *count = Count { packets, bytes };
    }
    Ok(stats)
}

/// Removes what a dead or persistent instance left; without a name, what all
/// of them left. A living process's rules are never touched: by name, they are EBUSY.
///
/// ```no_run
/// tproxy::rules::purge(Some("tproxy"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn purge(name: Option<&str>) -> Result<()> {
    let (mut nft, mut route) = channels()?;
    let name = name.map(|name| plan::name(Some(name))).transpose()?;
    let wanted = name.as_deref().map(table::name_of);
    let (_, tables) = table::list(&mut nft)?;
    for table in &tables {
        let successors = name.as_deref().map(table::successors_of).unwrap_or_default();
        let named = wanted.as_ref().is_some_and(|wanted| *wanted == table.name) || successors.contains(&table.name);
        match (table.slot, table.owner) {
            (_, Some(_)) if named => {
                let owner = slot::owner_of(table).unwrap_or_default();
                return Err(Error::with(
                    libc::EBUSY,
                    format_args!("{owner} has these rules (table inet {}), and lives: end it first", table.name),
                ));
            }
            // The routing is nobody's when the table is gone, and is swept below.
            (Some(_), None) if named || wanted.is_none() => delete_table(&mut nft, &table.name)?,
            (None, None) if named => {
                return Err(Error::with(
                    libc::EEXIST,
                    format_args!(
                        "table inet {} is not one that this library made: its comment names no priority and table; `nft delete table \
                         inet {0}` removes it",
                        table.name
                    ),
                ));
            }
            _ => {}
        }
    }
    // Chains have no owner either: those of no living instance are a dead one's.
    let living = |instance: &str| {
        let name = table::name_of(instance);
        tables.iter().any(|table| table.name == name && table.owner.is_some())
    };
    let chains = by_iptables::purge(name.as_deref(), living);
    chains.and(slot::remove_all_stale(&mut nft, &mut route))
}

/// The plan for a config, with the control groups of this host.
fn plan_here(config: &Config) -> Result<Plan> {
    let mut plan = plan::make(config)?;
    cgroup::look_up(&mut plan.owners)?;
    Ok(plan)
}

/// Whether the route of IPv6 cannot be made yet, since IPv6 is disabled on `lo`: until it can, what is selected is dropped.
/// A plan that asks for no family becomes one for IPv4 if the kernel has no IPv6 at all.
///
/// It needs `lo`. The route of IPv6 cannot be made without; that of IPv4 can, and would lead nowhere.
fn is_ipv6_blocked(plan: &mut Plan, route: &mut Channel) -> Result<bool> {
    let either = plan.families_are_default && plan.families == Families::ALL;
    if either && !route::kernel_has_ipv6(route)? {
        plan.leave_ipv6();
    }
    if plan.mode == Mode::Redirect {
        return Ok(false);
    }
    let has_ipv6 = route::loopback_has_ipv6(route)?;
    Ok(plan.families_are_default && plan.families == Families::ALL && !has_ipv6)
}

/// What did not work, and whether it was a route that was there already.
struct Refused {
    error: Error,
    route_taken: bool,
}

fn install_at(
    plan: &Plan,
    table: &str,
    routing: &Routing,
    nft: &mut Channel,
    route: &mut Channel,
) -> std::result::Result<(), Refused> {
    if let Err(error) = route::add(route, routing) {
        let route_taken = error.errno() == libc::EEXIST;
        return Err(Refused { error: error.after(delete_table(nft, table)), route_taken });
    }
    let filled = ruleset::compile(plan, Variant::default()).and_then(|objects| fill(nft, table, &objects));
    if let Err(error) = filled {
        let undone = route::delete(route, routing).and(delete_table(nft, table));
        return Err(Refused { error: error.after(undone), route_taken: false });
    }
    Ok(())
}

/// Fills a claimed table: in one transaction, or, where the socket does not take so much at once, the sets first
/// (nothing asks them yet) and all the rest in the last.
fn fill(nft: &mut Channel, table: &str, objects: &[Object]) -> Result<()> {
    let all: Vec<Change<'_>> = objects.iter().map(Change::Add).collect();
    match commit(nft, table, None, &all) {
        Err(error) if error.errno() == libc::EMSGSIZE => {}
        done => return done,
    }
    let (sets, others): (Vec<&Object>, Vec<&Object>) = objects.iter().partition(|object| is_set(object));
    add_sets(nft, table, &sets)?;
    let others: Vec<Change<'_>> = others.into_iter().map(Change::Add).collect();
    commit(nft, table, None, &others)
}

/// Adds sets and elements: in one transaction, or in as few as the socket lets, since each walks the whole set in the
/// kernel (`nft_rbtree_commit`).
fn add_sets(nft: &mut Channel, table: &str, sets: &[&Object]) -> Result<()> {
    if sets.is_empty() {
        return Ok(());
    }
    let changes: Vec<Change<'_>> = sets.iter().map(|object| Change::Add(object)).collect();
    match commit(nft, table, None, &changes) {
        Err(error) if error.errno() == libc::EMSGSIZE && sets.len() > 1 => {
            let (first, second) = sets.split_at(sets.len() / 2);
            add_sets(nft, table, first)?;
            add_sets(nft, table, second)
        }
        done => done,
    }
}

fn is_set(object: &Object) -> bool {
    matches!(object, Object::Set(_) | Object::Elements { .. })
}

pub(super) fn channels() -> Result<(Channel, Channel)> {
    let nft = Channel::open(libc::NETLINK_NETFILTER).map_err(|e| {
        let errno = match e.0 {
            libc::EPROTONOSUPPORT => libc::EOPNOTSUPP,
            other => other,
        };
        Error::with(errno, format_args!("socket(NETLINK_NETFILTER): {e}; the kernel needs CONFIG_NF_TABLES"))
    })?;
    let route = Channel::open(libc::NETLINK_ROUTE).map_err(|e| Error::io(format_args!("socket(NETLINK_ROUTE)"), e))?;
    Ok((nft, route))
}

fn delete_table(nft: &mut Channel, table: &str) -> Result<()> {
    match commit(nft, table, None, &[Change::DeleteTable]) {
        Err(error) if error.errno() == libc::ENOENT => Ok(()),
        done => done,
    }
}

/// The routing of a plan at its slot. NAT redirection needs none. `blocked`: the route of IPv6 cannot be made yet.
pub(super) fn routing(plan: &Plan, slot: table::RoutingSlot, blocked: bool) -> Routing {
    let families = if plan.mode == Mode::Redirect { Families::default() } else { plan.families };
    let v6 = families.v6 && blocked;
    Routing {
        families: Families { v6: families.v6 && !blocked, ..families },
        blocked: Families { v4: false, v6 },
        mark: plan.mark,
        output_mark: plan.loop_mark,
        from_loopback: plan.local_servers,
        table: slot.table,
        priority: slot.priority,
    }
}

#[cfg_attr(not(feature = "iptables"), path = "apply/without_iptables.rs")]
pub(super) mod by_iptables;
mod change;
#[cfg(test)]
mod fault_tests;
mod learn;
mod verify;
