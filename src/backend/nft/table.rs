//! Our tables among those of the host, and what each says about its instance.

use std::fmt;

use super::{SUBSYSTEM, header};
use crate::error::{Error, Result};
use crate::netlink::{Channel, wire};

/// Every table of ours is called this and the name of its instance. Some
/// names alone ("tproxy", "ip") are words of the nft language, which could
/// then not show the table.
const PREFIX: &str = "libtproxy-";

/// The name of an instance's table.
pub(crate) fn name_of(instance: &str) -> String {
    format!("{PREFIX}{instance}")
}

/// What a table says of its instance, as the comment that `nft` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tag {
    pub pid: u32,
    /// The first of its three routing policy rules.
    pub priority: u32,
    /// Its routing table.
    pub table: u32,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libtproxy: pid {} priority {} table {}", self.pid, self.priority, self.table)
    }
}

impl Tag {
    fn parse(comment: &str) -> Option<Tag> {
        let words: Vec<&str> = comment.strip_prefix("libtproxy: ")?.split(' ').collect();
        match words[..] {
            ["pid", pid, "priority", priority, "table", table] => {
                Some(Tag { pid: pid.parse().ok()?, priority: priority.parse().ok()?, table: table.parse().ok()? })
            }
            _ => None,
        }
    }
}

/// A table of the inet family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub name: String,
    pub tag: Option<Tag>,
    /// A living socket owns it.
    pub owned: bool,
}

/// The generation of the whole ruleset, and the tables that it has at least had then.
pub(crate) fn list(channel: &mut Channel) -> Result<(u32, Vec<Table>)> {
    const GET_TABLE: u16 = 1;
    const GET_GENERATION: u16 = 16;
    const GENERATION_ID: u16 = 1;
    let failed = |e: std::io::Error| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        match errno {
            libc::EOPNOTSUPP | libc::EINVAL => Error::new(
                libc::EOPNOTSUPP,
                "reading nf_tables: the kernel needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET (`modprobe nf_tables`)",
            ),
            libc::EPERM => Error::new(
                errno,
                "reading nf_tables: rules need CAP_NET_ADMIN in the user namespace that owns this network namespace",
            ),
            _ => Error::new(errno, format!("nft list tables: {e}")),
        }
    };
    let header = header(super::INET, 0);
    let generation = channel
        .get(SUBSYSTEM | GET_GENERATION, &header)
        .map_err(failed)?
        .as_deref()
        .and_then(|payload| wire::attribute(payload.get(header.len()..)?, GENERATION_ID))
        .and_then(wire::be32)
        .ok_or_else(|| Error::new(libc::EPROTO, "nf_tables did not tell its generation"))?;
    let tables = channel.dump(SUBSYSTEM | GET_TABLE, &header).map_err(failed)?;
    Ok((generation, tables.iter().filter_map(|payload| parse(payload.get(header.len()..)?)).collect()))
}

fn parse(attrs: &[u8]) -> Option<Table> {
    const NAME: u16 = 1;
    const USERDATA: u16 = 6;
    const OWNER: u16 = 7;
    let comment = wire::attribute(attrs, USERDATA).and_then(|data| wire::string(data.get(2..)?));
    Some(Table {
        name: wire::attribute(attrs, NAME).and_then(wire::string)?.to_owned(),
        tag: comment.and_then(Tag::parse),
        owned: wire::attribute(attrs, OWNER).is_some(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_tag_is_read_back_as_it_was_written(pid: u32, priority: u32, table: u32) {
            let tag = Tag { pid, priority, table };
            prop_assert_eq!(Tag::parse(&tag.to_string()), Some(tag));
        }

        #[test]
        fn no_comment_panics(comment: String) {
            Tag::parse(&comment);
            Tag::parse(&format!("libtproxy: {comment}"));
        }
    }
}
