//! Which chains of ours the kernel has, in either variant of iptables.
//!
//! It is read from the kernel itself: no program has to be run where there are none, and after one was run the kernel
//! says whether it did what it was to do.

use crate::backend::nft::{SUBSYSTEM, header};
use crate::backend::xtables;
use crate::error::{Error, Result};
use crate::model::Family;
use crate::netlink::uapi::*;
use crate::netlink::{Channel, wire};
use crate::sys;

/// The two implementations of iptables. Each has tables of its own in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// `iptables-legacy`, over socket options.
    Legacy,
    /// `iptables-nft`, which makes nf_tables of them.
    Nft,
}

impl Variant {
    pub const ALL: [Variant; 2] = [Variant::Legacy, Variant::Nft];
}

/// The tables that have chains of ours.
const TABLES: [&str; 3] = ["mangle", "nat", "filter"];

/// The chains of a family whose names are ours: table and chain, in order.
pub(super) fn chains(family: Family, variant: Variant) -> Result<Vec<(String, String)>> {
    let mut chains = match variant {
        Variant::Legacy => legacy(family, |table| {
            let names = xtables::legacy_chain_names(family, table)?;
            Ok(names.into_iter().map(|name| (table.to_owned(), name)).collect::<Vec<_>>())
        })?,
        Variant::Nft => nftables(|| chain_names(&mut Channel::open(libc::NETLINK_NETFILTER)?, family))?,
    };
    chains.retain(|(table, chain)| TABLES.contains(&table.as_str()) && super::instance_of(chain).is_some());
    chains.sort_unstable();
    chains.dedup();
    Ok(chains)
}

/// The variant in which a family has rules, whoever made them: the legacy one if both have.
pub(super) fn variant_in_use(family: Family) -> Result<Option<Variant>> {
    if legacy(family, |table| Ok(vec![xtables::legacy_has_rules(family, table)?]))?.contains(&true) {
        Ok(Some(Variant::Legacy))
    } else if nftables(|| nft_has_rules(family))? {
        Ok(Some(Variant::Nft))
    } else {
        Ok(None)
    }
}

/// Asks something of each table that the legacy variant has.
fn legacy<T>(family: Family, ask: impl Fn(&str) -> sys::Result<Vec<T>>) -> Result<Vec<T>> {
    // Without /proc, or without the right to read there, the kernel is asked for the tables that matter. That makes
    // them where the kernel can: they are empty then.
    let tables = xtables::legacy_tables(family).unwrap_or_else(|_| TABLES.map(str::to_owned).into());
    let mut found = Vec::new();
    for table in tables {
        match ask(&table) {
            Ok(answer) => found.extend(answer),
            // No such table; no legacy iptables; no such family.
            Err(sys::Errno(libc::ENOENT | libc::ENOPROTOOPT | libc::EAFNOSUPPORT)) => {}
            Err(e) => {
                return Err(Error::io(format_args!("reading table {table} of legacy {family} iptables"), e));
            }
        }
    }
    Ok(found)
}

/// Asks something of nf_tables.
fn nftables<T: Default>(ask: impl FnOnce() -> sys::Result<T>) -> Result<T> {
    match ask() {
        // The kernel has no nf_tables (EINVAL: nor its subsystem of netlink).
        Err(sys::Errno(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)) => Ok(T::default()),
        Err(e) => Err(Error::io(format_args!("reading the chains of iptables-nft in nf_tables"), e)),
        Ok(answer) => Ok(answer),
    }
}

/// Returns the table and the name of every chain of a family. Names that are not UTF-8 are omitted.
fn chain_names(channel: &mut Channel, family: Family) -> sys::Result<Vec<(String, String)>> {
    let dumped = channel.dump(SUBSYSTEM | NFT_MSG_GETCHAIN, &header(family.nfproto(), 0), &|_| {})?;
    let names = |payload: &[u8]| {
        let attrs = payload.get(header(0, 0).len()..)?;
        let text = |kind| Some(wire::name_of(attrs, kind)?.as_str()?.to_owned());
        Some((text(NFTA_CHAIN_TABLE)?, text(NFTA_CHAIN_NAME)?))
    };
    Ok(dumped.iter().filter_map(|payload| names(payload)).collect())
}

/// Whether the tables of `iptables-nft` in a family have rules. Reads no more than needed.
fn nft_has_rules(family: Family) -> sys::Result<bool> {
    for table in xtables::NFT_TABLES {
        let mut channel = Channel::open(libc::NETLINK_NETFILTER)?;
        let header = header(family.nfproto(), 0);
        let rules = channel.read_first(
            SUBSYSTEM | NFT_MSG_GETRULE,
            &header,
            &|a| a.string(NFTA_RULE_TABLE, table),
            1,
            &|_| Some(()),
        )?;
        if rules.objects > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
