//! The same by iptables: the place and the routing as ever, the rules by
//! `iptables-restore`, one transaction for each family.

use super::*;
use crate::backend::iptables;
use crate::text;

impl Rules {
    /// The routing and the claim as ever, the rules by `iptables-restore`.
    pub(super) fn install_by_iptables(config: &Config, mut plan: Plan) -> Result<Rules> {
        iptables::check(&plan)?;
        let (mut nft, mut route) = channels()?;
        serve(config, &mut plan, &mut route)?;
        let claim = match place::claim(&plan, &mut nft, &mut route, &[]) {
            Err(error) if error.errno() == libc::EOPNOTSUPP => place::unclaimed(&plan, &mut route)?,
            claimed => claimed?,
        };
        let (table, routing) = (table::name_of(&plan.name), routing(&plan, claim.place));
        if let Err(error) = route::add(&mut route, &routing) {
            return Err(error.after(unclaim(&mut nft, &table)));
        }
        let variant = Variant::default();
        let rules = Rules { nft, route, table, plan, variant, routing, by_iptables: true, installed: true };
        match enforce(&rules.plan) {
            Ok(()) => Ok(rules),
            Err(error) => Err(error.after(rules.remove())),
        }
    }

    /// One transaction for each family; if one fails, the old rules come back.
    pub(super) fn replace_in_iptables(&mut self, plan: Plan) -> Result<()> {
        iptables::check(&plan)?;
        let routing = routing(&plan, table::Place { priority: self.routing.priority, table: self.routing.table });
        let before = route::rules(&mut self.route, Families::ALL)?;
        let added = route::add_missing(&mut self.route, &routing, &before)?;
        if let Err(error) = enforce(&plan) {
            let undone = enforce(&self.plan).and(route::delete_entries(&mut self.route, &added));
            return Err(error.after(undone));
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

pub(super) fn forget(instance: &str) -> Result<()> {
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

/// What the chains counted. TPROXY drops what finds no listener, and counts it as intercepted.
pub(super) fn counted_by_iptables(instance: &str, families: Families) -> Result<Stats> {
    let mut stats = Stats::default();
    let mut found = false;
    for family in families.iter() {
        for counter in iptables::counters(instance, family)? {
            found = true;
            let count = match counter.part.as_str() {
                "i" => &mut stats.intercepted,
                "d" if text::contains(&counter.rule, "-j MARK") => &mut stats.diverted,
                "p" if counter.rule.ends_with("-j DROP") => &mut stats.guarded,
                _ => continue,
            };
            count.packets = count.packets.saturating_add(counter.packets);
            count.bytes = count.bytes.saturating_add(counter.bytes);
        }
    }
    if found {
        return Ok(stats);
    }
    Err(Error::with(libc::ENOENT, format_args!("iptables has no chains of the rules \"{instance}\" any more")))
}
