//! Stands in for `by_iptables` in a build without feature `iptables`: no rules are installed by iptables, and none of
//! theirs are looked for.

use super::*;
use crate::model::Family;

const FEATURE: &str = "iptables";

/// Refuses every plan.
pub(in crate::rules) fn check(_: &Plan) -> Result<()> {
    Err(Error::lacks(FEATURE))
}

pub(in crate::rules) fn render(_: &Plan, _: Family) -> String {
    String::new()
}

impl Instance {
    pub(super) fn install_by_iptables(_: Plan, _: Channel, _: Channel) -> Result<Instance> {
        Err(Error::lacks(FEATURE))
    }

    /// No program is run: it is the network namespace of the calling thread.
    pub(super) fn in_its_network<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        body()
    }

    pub(super) fn remove_chains(&self) -> Result<()> {
        Err(Error::lacks(FEATURE))
    }

    pub(super) fn counted(&self) -> Result<Stats> {
        Err(Error::lacks(FEATURE))
    }

    pub(super) fn replace_in_iptables(&mut self, _: Plan, _: Routing) -> Result<()> {
        Err(Error::lacks(FEATURE))
    }
}

pub(super) fn unclaim(nft: &mut Channel, table: &str) -> Result<()> {
    delete_table(nft, table)
}

/// Chains of another build of the library stay: purging the rest must work without iptables.
pub(super) fn purge(_: Option<&str>, _: impl Fn(&str) -> bool) -> Result<()> {
    Ok(())
}

pub(super) fn instances(_: Family) -> Result<Vec<String>> {
    Ok(Vec::new())
}

pub(super) fn counted_by_iptables(_: &str, _: Families) -> Result<Stats> {
    Err(Error::lacks(FEATURE))
}
