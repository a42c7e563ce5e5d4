//! The same by iptables: the place and the routing as ever, the rules by
//! `iptables-restore`, one transaction for each family.

use super::*;
use crate::backend::iptables::{self, Tool};
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
        if let Err(error) = route::add(&mut route, &routing, &claim.leftovers) {
            let _ = delete_table(&mut nft, &table);
            return Err(error);
        }
        let variant = Variant::default();
        // From here on dropping the value undoes all.
        let rules = Rules { nft, route, table, plan, variant, routing, by_iptables: true, installed: true };
        enforce(&rules.plan)?;
        Ok(rules)
    }

    /// One transaction for each family; if one fails, the old rules come back.
    pub(super) fn replace_in_iptables(&mut self, plan: Plan) -> Result<()> {
        iptables::check(&plan)?;
        let routing = routing(&plan, table::Place { priority: self.routing.priority, table: self.routing.table });
        let before = route::rules(&mut self.route, Families::ALL)?;
        let added = route::add_missing(&mut self.route, &routing, &before)?;
        if let Err(error) = enforce(&plan) {
            let _ = enforce(&self.plan);
            let _ = route::delete_entries(&mut self.route, &added);
            return Err(error);
        }
        (self.plan, self.routing) = (plan, routing);
        self.delete_surplus(&before);
        Ok(())
    }
}

/// Makes iptables hold the plan, in the families that it serves, and nothing of it in the other.
pub(super) fn enforce(plan: &Plan) -> Result<()> {
    for family in Families::ALL.iter() {
        let tool = Tool::choose(family);
        match plan.families.contains(family) {
            true => tool.apply(plan)?,
            false => _ = tool.remove(&plan.name),
        }
    }
    Ok(())
}

pub(super) fn forget(instance: &str) -> Result<()> {
    Families::ALL.iter().map(|family| Tool::choose(family).remove(instance)).fold(Ok(()), Result::and)
}

/// What the chains counted. TPROXY drops what finds no listener, and counts it as intercepted.
pub(super) fn counted_by_iptables(instance: &str, families: Families) -> Result<Stats> {
    let mut stats = Stats::default();
    for family in families.iter() {
        for (part, rule, packets, bytes) in Tool::choose(family).counters(instance)? {
            let count = match part.as_str() {
                "i" => &mut stats.intercepted,
                "d" if text::contains(&rule, "-j MARK") => &mut stats.diverted,
                "p" if rule.ends_with("-j DROP") => &mut stats.guarded,
                _ => continue,
            };
            count.packets += packets;
            count.bytes += bytes;
        }
    }
    Ok(stats)
}
