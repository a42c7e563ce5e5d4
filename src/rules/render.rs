//! A plan as the script that would do the same: for those who want to see it,
//! keep it, or run it themselves.

use std::fmt::Write;

use super::config::Config;
use super::{place, plan};
use crate::backend::nft::object::Variant;
use crate::backend::nft::{ruleset, table};
use crate::backend::{iptables, route};
use crate::error::Result;
use crate::model::{Family, Plan};

/// The shell script, of `ip` and `nft` commands, that does what [`Rules::install`](super::Rules::install) would on a
/// host where nothing is taken.
///
/// The table has no owner then: the rules stay until they are deleted.
pub fn render_nft(config: &Config) -> Result<String> {
    let plan = plan::make(config)?;
    let place = place::first(&plan);
    let name = table::name_of(&plan.name);
    let mut script = routing_script(&plan);
    // Writing to a String does not fail.
    let _ = writeln!(script, "\nnft -f - <<'END'\nadd table inet {name} {{ comment \"{place}\"; }}");
    for object in ruleset::compile(&plan, Variant::default()) {
        let _ = writeln!(script, "{}", object.command(&name));
    }
    script.push_str("END\n");
    Ok(script)
}

/// The same, of `ip` and `iptables-restore` commands.
pub fn render_iptables(config: &Config) -> Result<String> {
    let plan = plan::make(config)?;
    iptables::check(&plan)?;
    let mut script = routing_script(&plan);
    for family in plan.families.iter() {
        let program = match family {
            Family::V4 => "iptables-restore",
            Family::V6 => "ip6tables-restore",
        };
        let _ = write!(script, "\n{program} --noflush --wait <<'END'\n{}END\n", iptables::render(&plan, family));
    }
    Ok(script)
}

fn routing_script(plan: &Plan) -> String {
    let mut script = String::from("#!/bin/sh\nset -e\n\n");
    for command in route::commands(&super::apply::routing(plan, place::first(plan))) {
        let _ = writeln!(script, "ip {command}");
    }
    script
}
