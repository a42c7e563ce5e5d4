//! What iptables has in the kernel, in either of its variants, for all modules that read it: the names of this library's
//! chains, and the tables of the legacy variant.

use std::os::fd::AsFd;

use socket2::{Domain, Socket, Type};

use crate::model::Family;
use crate::name::Name;
use crate::netlink::uapi::*;
use crate::netlink::wire::{u16_at, u32_at};
use crate::sys;

/// Names of the tables of `iptables-nft`, in the families that it uses.
pub(crate) const NFT_TABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// The instance that a chain of this name would be of.
pub(crate) fn instance_of(chain: &str) -> Option<&str> {
    chain.strip_prefix("tp-")?.rsplit_once('-').map(|(instance, _)| instance)
}

/// What begins the comment of a jump to one of our chains.
pub(crate) fn comment(instance: &str) -> String {
    format!("libtproxy {instance}")
}

/// Returns the names of the existing tables of legacy iptables. (A query for another table would create it.)
///
/// EACCES: only root may read the names. ENOENT: /proc does not exist.
pub(crate) fn legacy_tables(family: Family) -> sys::Result<Vec<String>> {
    const DIRECTORY: &str = "/proc/thread-self/net";
    let file = match family {
        Family::V4 => "ip_tables_names",
        Family::V6 => "ip6_tables_names",
    };
    match std::fs::read_to_string(format!("{DIRECTORY}/{file}")).map_err(sys::Errno::from) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        // The kernel has no legacy iptables.
        Err(sys::Errno(libc::ENOENT)) if std::fs::exists(DIRECTORY).unwrap_or(false) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Returns the names of all user-defined chains in a table of legacy iptables. Names that are not UTF-8 are omitted.
pub(crate) fn legacy_chain_names(family: Family, table: &str) -> sys::Result<Vec<String>> {
    /// A table of this size has about 200,000 rules.
    const MOST: usize = 64 << 20;
    let (_, entries) = legacy_entries(family, table, MOST)?;
    let names = entries_of(family, &entries).filter_map(|entry| Some(entry.begins()?.as_str()?.to_owned()));
    Ok(names.collect())
}

/// Whether a table of legacy iptables has more than its built-in chains and policies.
pub(crate) fn legacy_has_rules(family: Family, table: &str) -> sys::Result<bool> {
    let socket = legacy_socket(family)?;
    let info = legacy_info(&socket, family, table)?;
    // struct ipt_getinfo: valid_hooks, number of entries. Each hook has a policy, and an entry ends the table.
    let hooks = u32_at(&info, 32).unwrap_or(0).count_ones();
    Ok(u32_at(&info, INFO - 8).unwrap_or(0) > hooks + 1)
}

/// Sizes of `struct ipt_getinfo`, which is the same for IPv6, and of the name in it.
const INFO: usize = 84;
const NAME: usize = 32;

/// The options can be read from any socket of the family.
fn legacy_socket(family: Family) -> sys::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    Ok(Socket::new(domain, Type::DGRAM.cloexec(), None)?)
}

/// Reads an option whose buffer begins with the name of the table.
fn ask_legacy(socket: &Socket, family: Family, option: i32, table: &str, buffer: &mut [u8]) -> sys::Result<()> {
    let level = match family {
        Family::V4 => libc::SOL_IP,
        Family::V6 => libc::SOL_IPV6,
    };
    buffer.iter_mut().zip(table.bytes().take(NAME - 1)).for_each(|(point, byte)| *point = byte);
    sys::getsockopt_bytes(socket.as_fd(), level, option, buffer).map(drop)
}

fn legacy_info(socket: &Socket, family: Family, table: &str) -> sys::Result<[u8; INFO]> {
    let mut info = [0; INFO];
    ask_legacy(socket, family, IPT_SO_GET_INFO, table, &mut info)?;
    Ok(info)
}

/// Reads a table: `struct ipt_getinfo` and the entries. EFBIG: the entries exceed the maximum size.
pub(crate) fn legacy_entries(family: Family, table: &str, most: usize) -> sys::Result<([u8; INFO], Vec<u8>)> {
    /// Size of the head of `struct ipt_get_entries`.
    const HEAD: usize = 40;
    /// EAGAIN: the table was replaced between the two queries, and its size has changed.
    const TRIES: usize = 16;
    let socket = legacy_socket(family)?;
    for _ in 0..TRIES {
        let info = legacy_info(&socket, family, table)?;
        let size = u32_at(&info, INFO - 4).unwrap_or(0) as usize;
        if size > most {
            return Err(sys::Errno(libc::EFBIG));
        }
        let mut entries = Vec::new();
        entries.try_reserve_exact(HEAD + size).map_err(|_| sys::Errno(libc::ENOMEM))?;
        entries.resize(HEAD + size, 0);
        if let Some(point) = entries.get_mut(NAME..NAME + 4) {
            point.copy_from_slice(&(size as u32).to_ne_bytes());
        }
        match ask_legacy(&socket, family, IPT_SO_GET_ENTRIES, table, &mut entries) {
            Ok(()) => {
                entries.drain(..HEAD);
                return Ok((info, entries));
            }
            Err(sys::Errno(libc::EAGAIN)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(sys::Errno(libc::EAGAIN))
}

/// Offsets of the parts of `struct ipt_entry` or `ip6t_entry`.
pub(crate) struct Layout {
    pub in_interface: usize,
    pub out_interface: usize,
    pub protocol: usize,
    pub flags: usize,
    pub goto: u8,
    pub target_offset: usize,
    pub next_offset: usize,
    pub len: usize,
}

const V4: Layout = Layout {
    in_interface: 16,
    out_interface: 32,
    protocol: 80,
    flags: 82,
    goto: IPT_F_GOTO,
    target_offset: 88,
    next_offset: 90,
    len: 112,
};

const V6: Layout = Layout {
    in_interface: 64,
    out_interface: 80,
    protocol: 128,
    flags: 131,
    goto: IP6T_F_GOTO,
    target_offset: 140,
    next_offset: 142,
    len: 168,
};

/// `struct xt_entry_match` and `xt_entry_target`: size, name, revision.
const XT_HEADER: usize = 32;

pub(crate) struct LegacyEntry<'a> {
    pub at: usize,
    pub next: usize,
    pub bytes: &'a [u8],
    pub target_offset: usize,
    pub target: (&'a str, u32, &'a [u8]),
}

impl LegacyEntry<'_> {
    /// Returns the name of the chain that begins after this entry: the entry has the target ERROR with the name.
    pub fn begins(&self) -> Option<Name> {
        let ("ERROR", _, name) = self.target else { return None };
        // The last entry of a table has the same target.
        Some(Name::new(name))
    }
}

/// Reads a match or a target: its size, name, revision and data. A name that is not UTF-8 is unknown.
pub(crate) fn extension(bytes: &[u8]) -> Option<(usize, &str, u32, &[u8])> {
    let size = usize::from(u16_at(bytes, 0)?);
    let name = bytes.get(2..31)?.split(|byte| *byte == 0).next()?;
    let data = bytes.get(XT_HEADER..size)?;
    Some((size, std::str::from_utf8(name).unwrap_or("?"), u32::from(*bytes.get(31)?), data))
}

pub(crate) fn layout(family: Family) -> &'static Layout {
    if family == Family::V4 { &V4 } else { &V6 }
}

/// Reads the entries of a table up to the first invalid one.
pub(crate) fn entries_of(family: Family, blob: &[u8]) -> impl Iterator<Item = LegacyEntry<'_>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let entry = entry(layout(family), blob, at)?;
        at = entry.next;
        Some(entry)
    })
}

fn entry<'a>(layout: &Layout, blob: &'a [u8], at: usize) -> Option<LegacyEntry<'a>> {
    let rest = blob.get(at..)?;
    let target_offset = usize::from(u16_at(rest, layout.target_offset)?);
    let len = usize::from(u16_at(rest, layout.next_offset)?);
    if target_offset < layout.len || len < target_offset + XT_HEADER {
        return None;
    }
    let bytes = rest.get(..len)?;
    let (_, name, revision, data) = extension(bytes.get(target_offset..)?)?;
    Some(LegacyEntry { at, next: at + len, bytes, target_offset, target: (name, revision, data) })
}
