//! Our tables among those of the host, and what each says about its instance.

use std::fmt;
use std::net::SocketAddr;

use super::{SUBSYSTEM, header};
use crate::backend::route;
use crate::error::{Error, Result};
use crate::model::{Backend, Families, Mark, Options, Protocols};
use crate::netlink::uapi::*;
use crate::netlink::{Channel, channel, wire};
use crate::sys;

/// Every table of ours is called this and the name of its instance. Some
/// names alone ("tproxy", "ip") are words of the nft language, which could
/// then not show the table.
const PREFIX: &str = "libtproxy-";

/// The name of an instance's table.
pub(crate) fn name_of(instance: &str) -> String {
    [PREFIX, instance].concat()
}

/// The instance that a table of this name would be of.
pub(crate) fn instance_of(table: &str) -> Option<&str> {
    table.strip_prefix(PREFIX).filter(|name| !name.starts_with('-'))
}

/// The names of the tables that speak for an instance once its slot or its record has changed: the kernel keeps the comment
/// of a table as it was made. There are two, so that one is there before the other goes. No instance can have such a name.
pub(crate) fn successors_of(instance: &str) -> [String; 2] {
    ["-1-", "-2-"].map(|number| [PREFIX, number, instance].concat())
}

/// The table that says which slot and record an instance has: its own, or a successor with the same owner.
pub(crate) fn speaker<'a>(tables: &'a [Table], own: &'a Table) -> &'a Table {
    let Some(name) = instance_of(&own.name) else { return own };
    let names = successors_of(name);
    let same_owner = |other: &&Table| other.owner_port == own.owner_port && other.persistent == own.persistent;
    let successor = tables.iter().filter(|other| names.contains(&other.name) && other.slot.is_some()).find(same_owner);
    successor.unwrap_or(own)
}

/// What an instance was asked for, as far as its rules do not say it. The table has it beside its comment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub backend: Backend,
    pub options: Options,
    pub families: Families,
    pub protocols: Protocols,
    pub mark: Mark,
    /// `None`: there is no listener.
    pub listen_addr: Option<SocketAddr>,
}

impl Record {
    /// The kind of the record in the user data of a table. nft has 0 for the comment, and ignores kinds that it does not know.
    const KIND: u8 = 116;

    fn text(&self) -> String {
        let Record { backend, options, families, protocols, mark, listen_addr } = self;
        let pair = |first: bool, second: bool| u32::from(first) | u32::from(second) << 1;
        let backend = u32::from(*backend == Backend::Iptables);
        let (families, protocols) = (pair(families.v4, families.v6), pair(protocols.tcp, protocols.udp));
        let numbers = format!("{backend} {} {families} {protocols} {} {}", options.bits(), mark.value, mark.mask);
        match listen_addr {
            Some(addr) => format!("{numbers} {addr}"),
            None => numbers,
        }
    }

    /// Anyone may have written it.
    fn parse(text: &str) -> Option<Record> {
        let mut words = text.split(' ');
        let mut number = || words.next()?.parse::<u32>().ok();
        let [backend, options, families, protocols, value, mask] =
            [number()?, number()?, number()?, number()?, number()?, number()?];
        let listen_addr = words.next().map(|word| word.parse().ok());
        if words.next().is_some() || listen_addr == Some(None) || backend > 1 || families > 3 || protocols > 3 {
            return None;
        }
        Some(Record {
            backend: if backend == 1 { Backend::Iptables } else { Backend::Nft },
            options: Options::from_bits(options)?,
            families: Families { v4: families & 1 != 0, v6: families & 2 != 0 },
            protocols: Protocols { tcp: protocols & 1 != 0, udp: protocols & 2 != 0 },
            mark: Mark { value, mask },
            listen_addr: listen_addr.flatten(),
        })
    }
}

/// Appends the comment and the record of a table as its user data: kind, length and NUL-terminated text of each.
pub(super) fn encode_words(attrs: &mut wire::Attrs<'_>, kind: u16, slot: &RoutingSlot, record: Option<&Record>) {
    let (comment, record) = (slot.comment(), record.map(Record::text).unwrap_or_default());
    let of = |kind: u8, text: &str| {
        let len = u8::try_from(text.len() + 1).ok().filter(|len| *len > 1)?;
        Some([&[kind, len], text.as_bytes(), &[0]].concat())
    };
    let all = [of(0, &comment), of(Record::KIND, &record)];
    attrs.bytes(kind, &all.into_iter().flatten().flatten().collect::<Vec<u8>>());
}

/// The text of a kind in the user data of a table.
fn words(data: &[u8], wanted: u8) -> Option<&str> {
    let mut rest = data;
    while let [kind, len, behind @ ..] = rest {
        let (text, others) = behind.split_at_checked(usize::from(*len))?;
        if *kind == wanted {
            return wire::string(text);
        }
        rest = others;
    }
    None
}

/// An instance's slot among the routing rules, and its routing table. The
/// table says it, as the comment that `nft` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoutingSlot {
    /// The first of its routing policy rules.
    pub priority: u32,
    pub table: u32,
}

impl fmt::Display for RoutingSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.comment())
    }
}

impl RoutingSlot {
    /// The comment, as it is shown.
    pub fn comment(&self) -> String {
        ["libtproxy: priority ", &self.priority.to_string(), " table ", &self.table.to_string()].concat()
    }

    fn parse(comment: &str) -> Option<RoutingSlot> {
        let words: Vec<&str> = comment.strip_prefix("libtproxy: ")?.split(' ').collect();
        let ["priority", priority, "table", table] = words[..] else { return None };
        let slot = RoutingSlot { priority: priority.parse().ok()?, table: table.parse().ok()? };
        slot.is_possible().then_some(slot)
    }

    /// An instance can have it. A table that speaks for another slot is not one of ours, whatever its name.
    fn is_possible(self) -> bool {
        (1..=route::PRIORITY_MAX).contains(&self.priority) && !route::is_system_table(self.table)
    }

    /// The last preference that its rules may have.
    pub fn last(self) -> u32 {
        self.priority.saturating_add(route::RULES - 1)
    }
}

/// A table of the inet family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub name: String,
    /// `None`: it is not one of ours.
    pub slot: Option<RoutingSlot>,
    /// `None`: it is not one of ours, or of another version.
    pub record: Option<Record>,
    /// The process that opened the socket which owns it.
    pub owner: Option<u32>,
    /// The port of that socket.
    pub owner_port: Option<u32>,
    /// It outlives its owner.
    pub persistent: bool,
}

/// The generation of the whole ruleset, and the tables that it has at least had then.
pub(crate) fn list(channel: &mut Channel) -> Result<(u32, Vec<Table>)> {
    let failed = |e: sys::Errno| {
        let errno = e.0;
        match errno {
            libc::EOPNOTSUPP | libc::EINVAL => Error::new(
                libc::EOPNOTSUPP,
                "reading nf_tables: the kernel needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET (`modprobe nf_tables`)",
            ),
            libc::EPERM => Error::new(
                errno,
                "reading nf_tables: rules need CAP_NET_ADMIN in the user namespace that owns this network namespace",
            ),
            _ => Error::with(errno, format_args!("nft list tables: {e}")),
        }
    };
    let header = header(NFPROTO_INET, 0);
    let (generation, tables) =
        channel.get_then_dump(SUBSYSTEM | NFT_MSG_GETGEN, SUBSYSTEM | NFT_MSG_GETTABLE, &header).map_err(failed)?;
    let generation = generation
        .as_deref()
        .and_then(|payload| wire::attribute(payload.get(header.len()..)?, NFTA_GEN_ID))
        .and_then(wire::be32)
        .ok_or_else(|| Error::new(libc::EPROTO, "nf_tables did not tell its generation"))?;
    Ok((generation, tables.iter().filter_map(|payload| parse(payload.get(header.len()..)?)).collect::<Vec<_>>()))
}

/// The table of this name, if there is one.
pub(crate) fn find(channel: &mut Channel, name: &str) -> Result<Option<Table>> {
    Ok(list(channel)?.1.into_iter().find(|table| table.name == name))
}

fn parse(attrs: &[u8]) -> Option<Table> {
    let data = wire::attribute(attrs, NFTA_TABLE_USERDATA).unwrap_or_default();
    let flags = wire::be32_of(attrs, NFTA_TABLE_FLAGS).unwrap_or(0);
    Some(Table {
        name: wire::string_of(attrs, NFTA_TABLE_NAME)?.to_owned(),
        slot: words(data, 0).and_then(RoutingSlot::parse),
        record: words(data, Record::KIND).and_then(Record::parse),
        owner: wire::be32_of(attrs, NFTA_TABLE_OWNER).map(channel::process_of_port),
        owner_port: wire::be32_of(attrs, NFTA_TABLE_OWNER),
        persistent: flags & NFT_TABLE_F_PERSIST != 0,
    })
}

/// The names of what a table contains, as far as a takeover has to know.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    pub chains: Vec<String>,
    pub sets: Vec<String>,
}

pub(crate) fn contents(channel: &mut Channel, table: &str) -> Result<Contents> {
    let mut names = |get: u16, name: u16| -> Result<Vec<String>> {
        let dumped = dump_of(channel, table, get)?;
        Ok(dumped.iter().filter_map(|attrs| Some(wire::string_of(attrs, name)?.to_owned())).collect::<Vec<_>>())
    };
    Ok(Contents { chains: names(NFT_MSG_GETCHAIN, NFTA_CHAIN_NAME)?, sets: names(NFT_MSG_GETSET, NFTA_SET_NAME)? })
}

/// A counter's name, packets and bytes.
pub(crate) type Count = (String, u64, u64);

/// The counters of a table.
pub(crate) fn counters(channel: &mut Channel, table: &str) -> Result<Vec<Count>> {
    let parse = |attrs: &Vec<u8>| {
        let name = wire::string_of(attrs, NFTA_OBJ_NAME)?;
        let data = wire::attribute(attrs, NFTA_OBJ_DATA)?;
        let number = |kind| wire::attribute(data, kind).and_then(wire::be64);
        Some((name.to_owned(), number(NFTA_COUNTER_PACKETS)?, number(NFTA_COUNTER_BYTES)?))
    };
    Ok(dump_of(channel, table, NFT_MSG_GETOBJ)?.iter().filter_map(parse).collect::<Vec<_>>())
}

/// The attributes of each object of a kind in a table. The kernel filters some kinds by table and some not.
fn dump_of(channel: &mut Channel, table: &str, get: u16) -> Result<Vec<Vec<u8>>> {
    /// The name of the table has the same number in every kind of object.
    const TABLE: u16 = NFTA_OBJ_TABLE;
    const _: () = assert!(TABLE == NFTA_CHAIN_TABLE && TABLE == NFTA_SET_TABLE);
    let header = header(NFPROTO_INET, 0);
    let dumped = channel
        .dump(SUBSYSTEM | get, &header, &|a| a.string(TABLE, table))
        .map_err(|e| Error::io(format_args!("nft list table inet {table}"), e))?;
    let attrs = dumped.iter().filter_map(|payload| Some(payload.get(header.len()..)?.to_vec()));
    Ok(attrs.filter(|attrs| wire::string_of(attrs, TABLE) == Some(table)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slot_has_four_priorities() {
        assert_eq!(RoutingSlot { priority: 200, table: 100 }.last(), 203);
    }

    #[test]
    fn table_is_persistent_by_its_flag_and_has_the_owner_of_its_port() {
        /// A port of process 1234.
        const PORT: u32 = 1234 << 10 | 5;
        let parsed = |flags: Option<u32>, port: Option<u32>| {
            let mut buffer = wire::Buffer::default();
            buffer.message(0, 0, 1, &[], |a| {
                a.string(NFTA_TABLE_NAME, "libtproxy-t");
                flags.iter().for_each(|flags| a.be32(NFTA_TABLE_FLAGS, *flags));
                port.iter().for_each(|port| a.be32(NFTA_TABLE_OWNER, *port));
            });
            let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
            parse(message.payload).unwrap()
        };
        const OWNER: u32 = NFT_TABLE_F_OWNER;
        const PERSIST: u32 = NFT_TABLE_F_PERSIST;
        for (flags, persistent) in [(0, false), (1, false), (OWNER, false), (PERSIST, true), (OWNER | PERSIST, true)] {
            assert_eq!(parsed(Some(flags), None).persistent, persistent, "{flags}");
        }
        let owned = parsed(None, Some(PORT));
        assert_eq!((owned.persistent, owned.owner, owned.owner_port), (false, Some(1234), Some(PORT)));
        assert_eq!((owned.name.as_str(), owned.slot), ("libtproxy-t", None));
    }

    proptest! {
        #[test]
        fn record_is_read_back(
            numbers in (0..2u32, 0..512u32, 0..4u32, 0..4u32, any::<u32>(), any::<u32>()),
            addr: Option<SocketAddr>,
        ) {
            let (backend, options, families, protocols, value, mask) = numbers;
            let text = format!("{backend} {options} {families} {protocols} {value} {mask}");
            let text = addr.map_or(text.clone(), |addr| format!("{text} {addr}"));
            if let Some(record) = Record::parse(&text) {
                prop_assert_eq!(Record::parse(&record.text()), Some(record));
                let slot = RoutingSlot { priority: 200, table: 7470 };
                let mut buffer = wire::Buffer::default();
                buffer.message(0, 0, 1, &[], |a| {
                    a.string(NFTA_TABLE_NAME, "libtproxy-t");
                    encode_words(a, NFTA_TABLE_USERDATA, &slot, Some(&record));
                });
                let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
                let parsed = parse(message.payload).unwrap();
                prop_assert_eq!((parsed.slot, parsed.record), (Some(slot), Some(record)));
            }
        }

        #[test]
        fn record_of_any_text_does_not_panic(text: String, data: Vec<u8>, kind: u8) {
            Record::parse(&text);
            words(&data, kind);
        }

        #[test]
        fn slot_possible_is_read_back_from_comment(priority in 1..=route::PRIORITY_MAX, table in 1..u32::MAX) {
            let slot = RoutingSlot { priority, table };
            prop_assert_eq!(RoutingSlot::parse(&slot.to_string()), (!(253..=255).contains(&table)).then_some(slot));
        }

        #[test]
        fn slot_impossible_is_none(priority in route::PRIORITY_MAX + 1.., table: u32) {
            prop_assert_eq!(RoutingSlot::parse(&RoutingSlot { priority, table }.to_string()), None);
            prop_assert_eq!(RoutingSlot::parse(&RoutingSlot { priority: 0, table }.to_string()), None);
            prop_assert_eq!(RoutingSlot::parse(&RoutingSlot { priority: 200, table: 0 }.to_string()), None);
        }

        #[test]
        fn table_of_any_reply_does_not_panic(attrs in wire::odd::answer(0)) {
            parse(&attrs);
        }

        #[test]
        fn table_of_any_comment_does_not_panic(comment: String) {
            RoutingSlot::parse(&comment);
            RoutingSlot::parse(&format!("libtproxy: {comment}"));
        }
    }
}
