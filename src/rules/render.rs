//! A plan as the script that would do the same: for those who want to see it,
//! keep it, or run it themselves.

use std::fmt::{self, Write};

use super::apply::by_iptables;
use super::config::Config;
use super::{plan, slot};
use crate::backend::nft::set::Variant;
use crate::backend::nft::{ruleset, table};
use crate::backend::route;
use crate::error::{Error, Result, Text};
use crate::model::Family;
use crate::plan::Plan;

/// The shell script, of `ip` and `nft` commands, that does what [`Rules::install`](super::Rules::install) would on a
/// host where nothing is taken.
///
/// The table has no owner then: the rules stay until they are deleted.
///
/// ```
/// use tproxy::rules::{Config, Listener, Protocol, render_nft};
///
/// let listener = Listener::at("[::]:3129".parse()?, Protocol::Tcp)?;
/// let script = render_nft(&Config::new([listener]).ports([80]))?;
/// assert!(script.starts_with("#!/bin/sh\n") && script.contains("tproxy to :3129"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn render_nft(config: &Config) -> Result<String> {
    let plan = plan::make(config)?;
    let slot = slot::first(&plan);
    let name = table::name_of(&plan.name);
    let objects = ruleset::compile(&plan, Variant::default())?;
    written(|script| {
        write_routing(script, &plan)?;
        writeln!(script, "\nnft -f - <<'END'\nadd table inet {name} {{ comment \"{slot}\"; }}")?;
        objects.iter().try_for_each(|object| writeln!(script, "{}", object.command(&name)))?;
        script.write_str("END\n")
    })
}

/// The same, of `ip` and `iptables-restore` commands.
///
/// ```
/// use tproxy::rules::{Config, Listener, Protocol, render_iptables};
///
/// let listener = Listener::at("[::]:3129".parse()?, Protocol::Tcp)?;
/// let script = render_iptables(&Config::new([listener]).ports([80]))?;
/// assert!(script.contains("-j TPROXY --on-port 3129"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn render_iptables(config: &Config) -> Result<String> {
    let plan = plan::make(config)?;
    by_iptables::check(&plan)?;
    written(|script| {
        write_routing(script, &plan)?;
        plan.families.iter().try_for_each(|family| {
            let program = match family {
                Family::V4 => "iptables-restore",
                Family::V6 => "ip6tables-restore",
            };
            let rules = by_iptables::render(&plan, family);
            write!(script, "\n{program} --noflush --wait <<'END'\n{rules}END\n")
        })
    })
}

/// A script; writing one fails for want of memory only.
fn written(write: impl FnOnce(&mut Text) -> fmt::Result) -> Result<String> {
    let mut script = Text::default();
    write(&mut script).map_err(|_| Error::no_memory())?;
    Ok(script.0)
}

fn write_routing(script: &mut Text, plan: &Plan) -> fmt::Result {
    script.write_str("#!/bin/sh\nset -e\n\n")?;
    let routing = super::apply::routing(plan, slot::first(plan), false);
    route::commands(&routing).try_for_each(|command| writeln!(script, "ip {command}"))
}

#[cfg(test)]
mod tests;
