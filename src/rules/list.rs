//! The instances of this network namespace, by whomever installed.

use std::net::SocketAddr;

use super::apply::{self, Stats};
use super::plan;
use crate::backend::holder::{self, Holder};
use crate::backend::nft::table::{self, Table};
use crate::error::Result;
use crate::model::{Backend, Families, Mark, Options, Protocols};

/// An instance of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// Name of the instance.
    pub name: String,
    /// Backend of its rules.
    pub backend: Backend,
    /// What its configuration says of it, other than what it selects.
    pub options: Options,
    /// Families that it serves.
    pub families: Families,
    /// Protocols that it serves.
    pub protocols: Protocols,
    /// Mark of packets for local sockets. Value and mask are 0 if they are unknown.
    pub mark: Mark,
    /// Its routing table; 0 if unknown.
    pub table: u32,
    /// The first of its routing rules; 0 if unknown.
    pub priority: u32,
    /// The process that owns it.
    pub owner: Owner,
    /// Address of its first listener, if it has one that is known.
    pub listen_addr: Option<SocketAddr>,
    /// Counters since the rules were installed.
    pub stats: Stats,
}

/// The process that owns rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// No process: the rules persist, or their owner has ended.
    None,
    /// This process.
    Process(u32),
    /// A process in another PID namespace, or one that cannot be seen from here.
    Elsewhere,
}

/// Lists the instances of this network namespace, by whomever installed, in the order of their names.
///
/// ```no_run
/// for instance in tproxy::rules::list()? {
///     println!("{} {:?}", instance.name, instance.owner);
/// }
/// # Ok::<(), tproxy::Error>(())
/// ```
pub fn list() -> Result<Vec<Listed>> {
    let (mut nft, _) = apply::channels()?;
    let tables = match table::list(&mut nft) {
        // Without nf_tables there may be rules of the legacy iptables.
        Err(error) if error.errno() == libc::EOPNOTSUPP => Vec::new(),
        listed => listed?.1,
    };
    let own = |table: &&Table| table.slot.is_some() && name_of(table).is_some();
    let ports: Vec<u32> = tables.iter().filter(own).filter_map(|table| table.owner_port).collect();
    let holders: Vec<(u32, Holder)> = ports.iter().copied().zip(holder::holders(&ports)).collect();
    let owner = |table: &Table| {
        let (Some(port), Some(opener)) = (table.owner_port, table.owner) else { return Owner::None };
        let holder = holders.iter().find(|(other, _)| *other == port).map(|(_, holder)| holder.processes());
        let pids: Vec<u32> = holder.unwrap_or_default().iter().map(|process| process.pid).collect();
        match pids.first() {
            Some(_) if pids.contains(&opener) => Owner::Process(opener),
            Some(pid) => Owner::Process(*pid),
            None => Owner::Elsewhere,
        }
    };
    let mut instances = Vec::new();
    for table in tables.iter().filter(own) {
        let (Some(name), speaker) = (name_of(table), table::speaker(&tables, table)) else { continue };
        // A table that goes meanwhile is no instance any more.
        match listed(name, speaker, owner(table)) {
            Err(error) if error.errno() == libc::ENOENT => {}
            instance => instances.push(instance?),
        }
    }
    for name in unclaimed(&instances)? {
        let stats = match apply::counted_by_iptables(&name) {
            Err(error) if error.errno() == libc::ENOENT => continue,
            stats => stats?,
        };
        instances.push(Listed {
            name,
            backend: Backend::Iptables,
            options: Options::default(),
            families: Families::default(),
            protocols: Protocols::default(),
            mark: Mark { value: 0, mask: 0 },
            table: 0,
            priority: 0,
            owner: Owner::None,
            listen_addr: None,
            stats,
        });
    }
    instances.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(instances)
}

/// The instance of a table, if it can have this name.
fn name_of(table: &Table) -> Option<&str> {
    table::instance_of(&table.name).filter(|name| plan::name(Some(name)).is_ok())
}

fn listed(name: &str, speaker: &Table, owner: Owner) -> Result<Listed> {
    let (stats, by_iptables) = apply::counted_of(name)?;
    let record = speaker.record;
    let backend = if by_iptables { Backend::Iptables } else { Backend::Nft };
    Ok(Listed {
        name: name.to_owned(),
        backend: record.map_or(backend, |record| record.backend),
        options: record.map(|record| record.options).unwrap_or_default(),
        families: record.map(|record| record.families).unwrap_or_default(),
        protocols: record.map(|record| record.protocols).unwrap_or_default(),
        mark: record.map_or(Mark { value: 0, mask: 0 }, |record| record.mark),
        table: speaker.slot.map_or(0, |slot| slot.table),
        priority: speaker.slot.map_or(0, |slot| slot.priority),
        owner,
        listen_addr: record.and_then(|record| record.listen_addr),
        stats,
    })
}

/// Instances that have chains of iptables and no table: their process was killed, or the kernel has no nf_tables.
fn unclaimed(known: &[Listed]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for family in Families::ALL.iter() {
        names.extend(apply::instances_by_iptables(family)?);
    }
    names.sort_unstable();
    names.dedup();
    names.retain(|name| known.iter().all(|instance| instance.name != *name) && plan::name(Some(name)).is_ok());
    Ok(names)
}
