//! The same by iptables: the slot and the routing as ever, the rules by
//! `iptables-restore`, one transaction for each family.

use super::*;
use crate::backend::iptables;
pub(in crate::rules) use crate::backend::iptables::{check, render};
use crate::sys;
use std::os::fd::AsFd;

impl Instance {
    /// The routing and the claim as ever, the rules by `iptables-restore`.
    pub(super) fn install_by_iptables(mut plan: Plan, mut nft: Channel, mut route: Channel) -> Result<Instance> {
        let ownership = Ownership::new()?;
        let blocked = is_ipv6_blocked(&mut plan, &mut route)?;
        let record = plan.record(Backend::Iptables);
        let (claim, claimed) = match slot::claim(&plan, &record, &mut nft, &mut route, &[]) {
            Err(error) if error.errno() == libc::EOPNOTSUPP => (slot::pick_unclaimed(&plan, &mut route)?, false),
            claim => (claim?, true),
        };
        let (table, routing) = (table::name_of(&plan.name), routing(&plan, claim.slot, blocked));
        if let Err(error) = route::add(&mut route, &routing) {
            return Err(error.after(unclaim(&mut nft, &table)));
        }
        let variant = Variant::default();
        let installed = Installed::Iptables;
        let successor = None;
        let mut rules =
            Instance { nft, route, table, plan, variant, routing, record, successor, installed, claimed, ownership };
        match enforce(&rules.plan) {
            Ok(()) => Ok(rules),
            Err(error) => Err(error.after(rules.undo())),
        }
    }

    pub(super) fn remove_chains(&self) -> Result<()> {
        let name = &self.plan.name;
        self.in_its_network(|| remove_chains(name))
    }

    pub(super) fn counted(&self) -> Result<Stats> {
        let (name, families) = (&self.plan.name, self.plan.families);
        self.in_its_network(|| counted_by_iptables(name, families))
    }

    /// Runs programs in the network namespace that the rules are in. They work in that of the thread that starts them,
    /// which may have moved to another since the rules were installed.
    pub(super) fn in_its_network<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let failed = |what: &str, needed: &str, e: sys::Errno| {
            let needed = if e.0 == libc::EPERM { needed } else { "" };
            Error::with(
                e.0,
                format_args!("{what} the network namespace in which the rules were installed: {e}{needed}"),
            )
        };
        let finding = |e| failed("finding", "; that needs CAP_NET_ADMIN in the user namespace that owns it", e);
        let entering = |e| {
            let needed = "; that needs CAP_SYS_ADMIN here and in the user namespace that owns it: or call from a thread \
                          that is in that network namespace";
            failed("entering", needed, e)
        };
        let gone = sys::Errno(libc::EBADF);
        let network = self.route.descriptor().ok_or(gone).and_then(sys::network_of).map_err(finding)?;
        let here = Channel::socket(libc::NETLINK_ROUTE);
        let here = here.and_then(|socket| sys::network_of(socket.as_fd())).map_err(finding)?;
        if sys::identity_of(here.as_fd()) == sys::identity_of(network.as_fd()) {
            return body();
        }
        // A namespace is a thread's. This thread is the caller's, and stays where it is.
        let elsewhere = || {
            sys::enter_network(network.as_fd()).map_err(entering)?;
            body()
        };
        let outcome = sys::without_signals(|| sys::in_a_thread("tp_rules", elsewhere));
        let panicked = || Error::new(libc::ENOTRECOVERABLE, "an error in libtproxy itself (a panic); please report it");
        outcome.map_err(|e| Error::io(format_args!("starting a thread"), e))?.ok_or_else(panicked)?
    }

    /// One transaction for each family; if one fails, the old rules come back.
    pub(super) fn replace_in_iptables(&mut self, plan: Plan, routing: Routing) -> Result<()> {
        iptables::check(&plan)?;
        let before = route::rules(&mut self.route, Families::ALL)?;
        let added = route::add_missing(&mut self.route, &routing, &before)?;
        let before_plan = &self.plan;
        let enforced = self.in_its_network(|| enforce(&plan).map_err(|error| error.after(enforce(before_plan))));
        if let Err(error) = enforced {
            return Err(error.after(route::delete_entries(&mut self.route, &added)));
        }
        (self.plan, self.routing) = (plan, routing);
        self.delete_surplus(&before);
        Ok(())
    }
}

/// Gives a claim back. A host without nf_tables has none.
pub(super) fn unclaim(nft: &mut Channel, table: &str) -> Result<()> {
    match delete_table(nft, table) {
        Err(error) if error.errno() == libc::EOPNOTSUPP => Ok(()),
        done => done,
    }
}

/// Makes iptables hold the plan, in the families that it serves, and nothing of it in the other.
fn enforce(plan: &Plan) -> Result<()> {
    for family in Families::ALL.iter() {
        match plan.families.contains(family) {
            true => iptables::apply(plan, family)?,
            false => iptables::remove(&plan.name, family)?,
        }
    }
    Ok(())
}

/// Removes the chains of an instance in this thread's network namespace.
fn remove_chains(instance: &str) -> Result<()> {
    Families::ALL.iter().map(|family| iptables::remove(instance, family)).fold(Ok(()), Result::and)
}

/// Removes the chains of the instance of this name, or of all, but for living ones.
pub(super) fn purge(name: Option<&str>, living: impl Fn(&str) -> bool) -> Result<()> {
    let of_family = |family| {
        let instances = iptables::instances(family, name)?;
        let dead = instances.iter().filter(|instance| !living(instance));
        dead.map(|instance| iptables::remove(instance, family)).fold(Ok(()), Result::and)
    };
    Families::ALL.iter().map(of_family).fold(Ok(()), Result::and)
}

/// The names of instances that have chains.
pub(super) fn instances(family: Family) -> Result<Vec<String>> {
    iptables::instances(family, None)
}

/// What the chains counted. TPROXY drops what finds no listener, and counts it as intercepted.
pub(super) fn counted_by_iptables(instance: &str, families: Families) -> Result<Stats> {
    let mut stats = Stats::default();
    let mut found = false;
    for family in families.iter() {
        for counter in iptables::counters(instance, family)? {
            found = true;
            let count = match counter.part.as_str() {
                "i" => &mut stats.intercepted,
                "d" if counter.rule.contains("-j MARK") => &mut stats.diverted,
                "p" if counter.rule.ends_with("-j DROP") => &mut stats.direct,
                _ => continue,
            };
            count.packets = count.packets.saturating_add(counter.packets);
            count.bytes = count.bytes.saturating_add(counter.bytes);
        }
    }
    if found {
        return Ok(stats);
    }
    Err(Error::with(
        libc::ENOENT,
        format_args!(
            "the rules are gone: iptables has no chains {}; install the rules again",
            iptables::chains_of(instance)
        ),
    ))
}
