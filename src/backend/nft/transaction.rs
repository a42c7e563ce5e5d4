//! Changes to nf_tables as one transaction: all of them or none.

use std::fmt;

use super::object::Object;
use super::set::{Elements, SetName};
use super::table::{Record, RoutingSlot, encode_words};
use super::{SUBSYSTEM, header};
use crate::error::{Error, Result};
use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Buffer};
use crate::netlink::{Channel, Failure};

/// More bytes than most messages have.
const MOST_NEED: usize = 240;

/// The table survives its owner, and another socket may adopt it.
const ORPHANABLE: u32 = NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;

/// One change in a table.
pub(crate) enum Change<'a> {
    /// Makes the table if it is not there, for nobody in particular. Only to be rehearsed.
    AddTable,
    /// Makes the table, which must not be there.
    Claim {
        slot: &'a RoutingSlot,
        record: Option<&'a Record>,
        persist: bool,
    },
    /// Takes an orphan.
    Adopt,
    DeleteTable,
    /// Deletes every rule of the table.
    DeleteRules,
    DeleteSet(String),
    DeleteChain(&'a str),
    DeleteElements {
        set: SetName,
        elements: &'a Elements,
    },
    Add(&'a Object),
}

/// Makes changes in a table, if the ruleset is still of the generation given.
///
/// ERESTART: it is not; read it again.
pub(crate) fn commit(
    channel: &mut Channel,
    table: &str,
    generation: Option<u32>,
    changes: &[Change<'_>],
) -> Result<()> {
    let mut batch = Buffer::with_room((changes.len() + 2) * MOST_NEED);
    let begin = channel.next_seq();
    batch.message(NFNL_MSG_BATCH_BEGIN, REQUEST, begin, &header(0, NFNL_SUBSYS_NFTABLES), |a| {
        if let Some(generation) = generation {
            a.be32(NFNL_BATCH_GENID, generation);
        }
    });
    let mut sent = Vec::with_capacity(changes.len());
    for (index, change) in changes.iter().enumerate() {
        let seq = channel.next_seq();
        // One acknowledgement tells the end; thousands would overflow the receive buffer.
        let ack = if index + 1 == changes.len() { ACK } else { 0 };
        sent.push((seq, batch.len(), change));
        change.encode(&mut batch, seq, ack, table);
    }
    let last = sent.last().map_or(begin, |(seq, ..)| *seq);
    batch.message(NFNL_MSG_BATCH_END, REQUEST, channel.next_seq(), &header(0, NFNL_SUBSYS_NFTABLES), |_| {});

    let answers = channel.exchange(&batch, last).map_err(|e| {
        let errno = e.0;
        let fix = if errno == libc::EMSGSIZE {
            "; raise sysctl net.core.wmem_max, or have CAP_NET_ADMIN over the whole host"
        } else {
            ""
        };
        Error::with(
            errno,
            format_args!("nf_tables, table inet {table}: sending {} bytes at once: {e}{fix}", batch.len()),
        )
    })?;
    if let Some(failure) = answers.failures.first() {
        let culprit = sent.iter().find(|(seq, ..)| *seq == failure.seq);
        return Err(explained(failure, &batch, culprit.map(|(_, at, change)| (*at, table, *change))));
    }
    if !answers.acked {
        return Err(Error::with(
            libc::EIO,
            format_args!("nf_tables, table inet {table}: the kernel did not acknowledge"),
        ));
    }
    Ok(())
}

/// Finds out which changes, each in its table, the kernel would make, and makes none: a batch without an end is checked,
/// answered and undone (`nfnetlink_rcv_batch`). All in one batch, since undoing one takes milliseconds.
pub(crate) fn dry_run(channel: &mut Channel, changes: &[(&str, Change<'_>)]) -> Vec<Result<()>> {
    let mut batch = Buffer::default();
    let begin = channel.next_seq();
    batch.message(NFNL_MSG_BATCH_BEGIN, REQUEST, begin, &header(0, NFNL_SUBSYS_NFTABLES), |_| {});
    let mut sent = Vec::with_capacity(changes.len());
    for (table, change) in changes {
        let seq = channel.next_seq();
        sent.push((seq, batch.len(), *table, change));
        change.encode(&mut batch, seq, ACK, table);
    }
    let last = sent.last().map_or(begin, |(seq, ..)| *seq);
    let answers = match channel.exchange(&batch, last) {
        Ok(answers) => answers,
        Err(e) => {
            let error = Error::io(format_args!("nf_tables"), e);
            return changes.iter().map(|_| Err(error.clone())).collect();
        }
    };
    // In order: whoever has an answer to the last has one to each.
    let answered = answers.acked || answers.failures.iter().any(|failure| failure.seq == last);
    let outcome = |(seq, at, table, change): (u32, usize, &str, &Change<'_>)| match answers
        .failures
        .iter()
        .find(|failure| failure.seq == seq || failure.seq == begin)
    {
        Some(failure) if failure.seq == seq => Err(explained(failure, &batch, Some((at, table, change)))),
        Some(failure) => Err(explained(failure, &batch, None)),
        None if answered => Ok(()),
        None => Err(Error::new(libc::EIO, "nf_tables: the kernel did not answer")),
    };
    sent.into_iter().map(outcome).collect::<Vec<_>>()
}

/// The error for what the kernel refused: where it is in the batch, its table, and what it was to change.
fn explained(failure: &Failure, batch: &Buffer, culprit: Option<(usize, &str, &Change<'_>)>) -> Error {
    let (step, expression) = match culprit {
        Some((at, table, change)) => {
            let message = batch.message_at(at).unwrap_or_default();
            (Command { change, table }.to_string(), expression_at(message, failure.offset))
        }
        None => ("nf_tables".to_owned(), None),
    };
    rejected(failure, &step, expression)
}

/// The sentence for what the kernel refused: step, its words, where, fix.
fn rejected(failure: &Failure, step: &str, expression: Option<&str>) -> Error {
    let at = std::fmt::from_fn(|f| match expression {
        Some(expression) => write!(f, ", at `{expression}`"),
        None => Ok(()),
    });
    let (errno, fix) = fix(failure.errno, expression, step == "nf_tables", step.contains(" table inet "));
    let (before, fix) = fix.map_or(("", ""), |fix| ("; ", fix));
    Error::with(errno, format_args!("{step}: {failure}{at}{before}{fix}"))
}

/// The errno for the program and the fix for the operator.
fn fix(errno: i32, expression: Option<&str>, whole: bool, table: bool) -> (i32, Option<&'static str>) {
    match (errno, expression) {
        (libc::EPERM, _) => {
            (libc::EPERM, Some("rules need CAP_NET_ADMIN in the user namespace that owns this network namespace"))
        }
        (libc::ENOENT | libc::EOPNOTSUPP, Some(expression)) => {
            let fix = match expression {
                "socket" => {
                    "the kernel needs CONFIG_NFT_SOCKET (`modprobe nft_socket`), and Linux 5.10 for `socket wildcard`"
                }
                "tproxy" => "the kernel needs CONFIG_NFT_TPROXY (`modprobe nft_tproxy`)",
                "fib" => "the kernel needs CONFIG_NFT_FIB_INET (`modprobe nft_fib_inet`)",
                "ct" => "the kernel needs CONFIG_NFT_CT (`modprobe nft_ct`), to know the answers of what is left alone",
                _ => "the kernel needs CONFIG_NF_TABLES_INET and the modules of nf_tables",
            };
            (libc::EOPNOTSUPP, Some(fix))
        }
        (libc::EOPNOTSUPP, None) if whole => {
            (errno, Some("the kernel needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET (`modprobe nf_tables`)"))
        }
        (libc::EOPNOTSUPP | libc::EINVAL, None) if table => {
            (libc::EOPNOTSUPP, Some("tables that die with their owner need Linux 5.12, TP_RULES_PERSIST needs 6.9"))
        }
        _ => (errno, None),
    }
}

/// The name of the expression of a rule that the kernel points at.
fn expression_at(message: &[u8], offset: Option<usize>) -> Option<&str> {
    let path = wire::path_to(message, header(0, 0).len(), offset?);
    let (_, NFTA_RULE_EXPRESSIONS) = path.first()? else { return None };
    let (index, _) = path.get(1)?;
    let list = wire::attribute(wire::body(message, header(0, 0).len()), NFTA_RULE_EXPRESSIONS)?;
    let (_, expression) = wire::attributes(list).nth(*index)?;
    wire::string_of(expression, NFTA_EXPR_NAME)
}

impl Change<'_> {
    fn encode(&self, batch: &mut Buffer, seq: u32, ack: u16, table: &str) {
        let exclusively = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        let (op, flags) = match self {
            Change::AddTable => (NFT_MSG_NEWTABLE, libc::NLM_F_CREATE as u16),
            Change::Claim { .. } => (NFT_MSG_NEWTABLE, exclusively),
            Change::Adopt => (NFT_MSG_NEWTABLE, 0),
            Change::DeleteTable => (NFT_MSG_DELTABLE, 0),
            Change::DeleteRules => (NFT_MSG_DELRULE, 0),
            Change::DeleteSet(_) => (NFT_MSG_DELSET, 0),
            Change::DeleteChain(_) => (NFT_MSG_DELCHAIN, 0),
            Change::DeleteElements { .. } => (NFT_MSG_DELSETELEM, 0),
            Change::Add(object) => object.message(),
        };
        batch.message(SUBSYSTEM | op, REQUEST | flags | ack, seq, &header(NFPROTO_INET, 0), |a| match self {
            Change::Claim { slot, record, persist } => {
                a.string(NFTA_TABLE_NAME, table);
                a.be32(NFTA_TABLE_FLAGS, if *persist { ORPHANABLE } else { NFT_TABLE_F_OWNER });
                encode_words(a, NFTA_TABLE_USERDATA, slot, *record);
            }
            Change::Adopt => {
                a.string(NFTA_TABLE_NAME, table);
                a.be32(NFTA_TABLE_FLAGS, ORPHANABLE);
            }
            Change::AddTable | Change::DeleteTable => a.string(NFTA_TABLE_NAME, table),
            Change::DeleteRules => a.string(NFTA_RULE_TABLE, table),
            Change::DeleteSet(name) => {
                a.string(NFTA_SET_TABLE, table);
                a.string(NFTA_SET_NAME, name);
            }
            Change::DeleteChain(name) => {
                a.string(NFTA_CHAIN_TABLE, table);
                a.string(NFTA_CHAIN_NAME, name);
            }
            Change::DeleteElements { set, elements } => elements.encode_in(a, table, set),
            Change::Add(object) => object.encode(table, a),
        });
    }
}

/// A change as the `nft` command that makes it.
struct Command<'a> {
    change: &'a Change<'a>,
    table: &'a str,
}

impl fmt::Display for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nft ")?;
        match self.change {
            Change::Claim { slot, persist, .. } => {
                let flags = if *persist { "owner, persist" } else { "owner" };
                write!(f, "create table inet {} {{ comment \"{slot}\"; flags {flags}; }}", self.table)
            }
            Change::AddTable => write!(f, "add table inet {}", self.table),
            Change::Adopt => write!(f, "add table inet {} {{ flags owner, persist; }}", self.table),
            Change::DeleteTable => write!(f, "delete table inet {}", self.table),
            Change::DeleteRules => write!(f, "flush table inet {}", self.table),
            Change::DeleteSet(name) => write!(f, "delete set inet {} {name}", self.table),
            Change::DeleteChain(name) => write!(f, "delete chain inet {} {name}", self.table),
            Change::DeleteElements { set, elements } => {
                write!(f, "delete element inet {} {set} {{ {elements} }}", self.table)
            }
            Change::Add(object) => object.command(self.table).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::nft::ruleset;
    use crate::backend::nft::set::Variant;
    use crate::backend::nft::set::{Elements, SetName};
    use crate::model::{Families, Family, Mark, Mode, Protocols};
    use crate::netlink::Transport;
    use crate::plan::Plan;
    use crate::sys;
    use std::collections::VecDeque;

    /// Gives the answers that it was given, and refuses to send if it was told how.
    struct Canned {
        refused: Option<i32>,
        answers: VecDeque<Vec<u8>>,
    }

    impl Transport for Canned {
        fn send(&mut self, _: &[u8]) -> sys::Result<()> {
            self.refused.map_or(Ok(()), |errno| Err(sys::Errno(errno)))
        }

        fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
            *buffer = self.answers.pop_front().ok_or(sys::Errno(libc::EAGAIN))?;
            Ok(())
        }
    }

    fn refusing(errno: i32) -> Channel {
        Channel::over(Box::new(Canned { refused: Some(errno), answers: VecDeque::new() }))
    }

    /// The answers to messages: sequence number and errno, 0 if the message was good. That which begins a transaction has
    /// number 1.
    fn answering(answers: &[(u32, i32)]) -> Channel {
        let answer = |(seq, errno): &(u32, i32)| {
            let mut buffer = Buffer::default();
            let payload = [&(-errno).to_ne_bytes()[..], &[0; 16]].concat();
            buffer.message(libc::NLMSG_ERROR as u16, 0, *seq, &payload, |_| {});
            buffer.bytes().unwrap().to_vec()
        };
        Channel::over(Box::new(Canned { refused: None, answers: answers.iter().map(answer).collect() }))
    }

    const SET: SetName = SetName { base: "dst4", len: None, variant: Variant::First };
    const CHAINS: [Change<'static>; 3] = [Change::DeleteChain("a"), Change::DeleteChain("b"), Change::DeleteChain("c")];

    #[test]
    fn commit_names_the_change_that_was_refused() {
        commit(&mut answering(&[(4, 0)]), "t", None, &CHAINS).unwrap();
        let error = commit(&mut answering(&[(3, libc::EBUSY), (4, 0)]), "t", None, &CHAINS).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY);
        assert!(error.to_string().starts_with("nft delete chain inet t b: "), "{error}");
        // The whole transaction.
        let error = commit(&mut answering(&[(1, libc::ERESTART)]), "t", None, &CHAINS).unwrap_err();
        assert_eq!(error.errno(), libc::ERESTART);
        assert!(error.to_string().starts_with("nf_tables: "), "{error}");
        let error = commit(&mut answering(&[]), "t", None, &CHAINS).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
    }

    #[test]
    fn commit_that_is_too_long_says_what_would_help() {
        for (errno, helps) in [(libc::EMSGSIZE, true), (libc::ENOBUFS, false)] {
            let error = commit(&mut refusing(errno), "t", None, &CHAINS).unwrap_err();
            assert_eq!((error.errno(), error.to_string().contains("net.core.wmem_max")), (errno, helps), "{error}");
        }
    }

    #[test]
    fn dry_run_tells_of_each_change_what_was_answered() {
        let changes = || CHAINS.map(|change| ("t", change));
        let outcomes = |mut channel: Channel| {
            dry_run(&mut channel, &changes())
                .into_iter()
                .map(|outcome| outcome.map_err(|e| e.errno()))
                .collect::<Vec<_>>()
        };
        assert_eq!(outcomes(answering(&[(2, 0), (3, 0), (4, 0)])), [Ok(()), Ok(()), Ok(())]);
        assert_eq!(outcomes(answering(&[(2, libc::EBUSY), (3, 0), (4, 0)])), [Err(libc::EBUSY), Ok(()), Ok(())]);
        assert_eq!(outcomes(answering(&[(2, 0), (3, 0), (4, libc::EBUSY)])), [Ok(()), Ok(()), Err(libc::EBUSY)]);
        // The whole batch is refused, or nothing is answered.
        assert_eq!(outcomes(answering(&[(1, libc::EPERM)])), [Err(libc::EPERM); 3]);
        assert_eq!(outcomes(answering(&[(2, libc::EBUSY)])), [Err(libc::EBUSY), Err(libc::EIO), Err(libc::EIO)]);
        assert_eq!(outcomes(answering(&[])), [Err(libc::EIO); 3]);
        assert_eq!(outcomes(refusing(libc::ENOBUFS)), [Err(libc::ENOBUFS); 3]);
        let whole = dry_run(&mut answering(&[(1, libc::EOPNOTSUPP)]), &changes()).remove(0).unwrap_err().to_string();
        assert!(whole.starts_with("nf_tables: ") && whole.contains("CONFIG_NF_TABLES "), "{whole}");
        let one = dry_run(&mut answering(&[(3, libc::EBUSY), (4, 0)]), &changes()).remove(1).unwrap_err().to_string();
        assert!(one.starts_with("nft delete chain inet t b: "), "{one}");
    }

    #[test]
    fn refusal_says_what_the_kernel_needs() {
        let rule = "nft add rule inet t c";
        for (errno, step, expression, expected, words) in [
            (libc::EPERM, rule, None, libc::EPERM, "CAP_NET_ADMIN"),
            (libc::EPERM, rule, Some("socket"), libc::EPERM, "CAP_NET_ADMIN"),
            (libc::ENOENT, rule, Some("socket"), libc::EOPNOTSUPP, ", at `socket`; the kernel needs CONFIG_NFT_SOCKET"),
            (libc::EOPNOTSUPP, rule, Some("tproxy"), libc::EOPNOTSUPP, "CONFIG_NFT_TPROXY"),
            (libc::ENOENT, rule, Some("fib"), libc::EOPNOTSUPP, "CONFIG_NFT_FIB_INET"),
            (libc::ENOENT, rule, Some("ct"), libc::EOPNOTSUPP, "CONFIG_NFT_CT"),
            (libc::ENOENT, rule, Some("meta"), libc::EOPNOTSUPP, "CONFIG_NF_TABLES_INET and the modules"),
            (libc::EOPNOTSUPP, "nf_tables", None, libc::EOPNOTSUPP, "CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET"),
            (libc::EOPNOTSUPP, "nft create table inet t {", None, libc::EOPNOTSUPP, "Linux 5.12"),
            (libc::EINVAL, "nft create table inet t {", None, libc::EOPNOTSUPP, "Linux 5.12"),
        ] {
            let failure = Failure { seq: 2, errno, text: None, offset: None };
            let error = rejected(&failure, step, expression);
            assert_eq!(error.errno(), expected, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
        // What needs nothing of the kernel is said as it is.
        for (errno, step) in [
            (libc::EINVAL, "nf_tables"),
            (libc::EINVAL, rule),
            (libc::EOPNOTSUPP, rule),
            (libc::ENOENT, rule),
            (libc::EBUSY, "nft delete table inet t"),
        ] {
            let error = rejected(&Failure { seq: 2, errno, text: None, offset: None }, step, None);
            assert_eq!((error.errno(), error.to_string()), (errno, format!("{step}: {}", sys::Errno(errno))));
        }
    }

    /// Only an object that must not be there is made exclusively.
    #[test]
    fn changes_have_their_operations_and_flags() {
        let slot = RoutingSlot { priority: 200, table: 100 };
        let elements = Elements::Addresses(Family::V4, Vec::new());
        let (request, create, exclusive) = (libc::NLM_F_REQUEST, libc::NLM_F_CREATE, libc::NLM_F_EXCL);
        for (change, operation, flags) in [
            (Change::AddTable, 0, create),
            (Change::Claim { slot: &slot, record: None, persist: true }, 0, create | exclusive),
            (Change::Adopt, 0, 0),
            (Change::DeleteTable, 2, 0),
            (Change::DeleteChain("c"), 5, 0),
            (Change::DeleteRules, 8, 0),
            (Change::DeleteSet("s".to_owned()), 11, 0),
            (Change::DeleteElements { set: SET, elements: &elements }, 14, 0),
            (Change::Add(&Object::Counter { name: "n" }), 18, create),
            (Change::Add(&Object::Chain { name: "c", hook: None }), 3, create),
            (
                Change::Add(&Object::Rule { chain: "c", statements: Vec::new(), comment: "" }),
                6,
                create | libc::NLM_F_APPEND,
            ),
        ] {
            let mut batch = Buffer::default();
            change.encode(&mut batch, 1, ACK, "t");
            let message = wire::messages(batch.bytes().unwrap()).next().unwrap();
            let what = Command { change: &change, table: "t" }.to_string();
            assert_eq!(message.kind, SUBSYSTEM | operation, "{what}");
            assert_eq!(i32::from(message.flags), request | libc::NLM_F_ACK | flags, "{what}");
        }
    }

    /// The kernel points at the name attribute of an expression that it does not have.
    #[test]
    fn refused_expression_is_named_with_its_module() {
        let plan = Plan {
            name: "t".to_owned(),
            mode: Mode::DivertOnly,
            mark: Mark::DEFAULT,
            loop_mark: None,
            local_output: false,
            local_servers: false,
            new_only: false,
            families: Families::ALL,
            families_are_default: true,
            protocols: Protocols { tcp: true, udp: false },
            intercepts: Vec::new(),
            guard: true,
            fail_open: false,
            notrack: false,
            persist: false,
            ports: crate::plan::ByProtocol::default(),
            reject: crate::plan::ByProtocol::default(),
            bypass_src: None,
            bypass_interfaces: crate::plan::Interfaces::default(),
            macs: None,
            bypass_macs: Vec::new(),
            owners: crate::plan::Owners::default(),
            dst: None,
            src: None,
            bypass: None,
            interfaces: None,
            table: None,
            priority: None,
            learned: Default::default(),
        };
        let objects = ruleset::compile(&plan, Variant::default()).unwrap();
        let rule = objects.last().unwrap();
        let mut batch = Buffer::default();
        Change::Add(rule).encode(&mut batch, 1, 0, "t");
        let message = batch.message_at(0).unwrap();
        let name_at = message.windows(7).position(|w| w == b"socket\0").unwrap() - 4;
        assert_eq!(expression_at(message, Some(name_at)), Some("socket"));
        let failure = Failure { seq: 1, errno: libc::ENOENT, text: None, offset: Some(name_at) };
        let step = Command { change: &Change::Add(rule), table: "t" }.to_string();
        let error = rejected(&failure, &step, expression_at(message, Some(name_at)));
        assert_eq!(error.errno(), libc::EOPNOTSUPP);
        let sentence = error.to_string();
        assert!(
            sentence.starts_with("nft add rule inet t prerouting meta l4proto != udp socket transparent 1"),
            "{sentence}"
        );
        assert!(sentence.contains("modprobe nft_socket"), "{sentence}");
    }

    #[test]
    fn refused_offset_outside_expressions_names_none() {
        let mut batch = Buffer::default();
        Change::DeleteTable.encode(&mut batch, 1, 0, "t");
        let message = batch.message_at(0).unwrap();
        for offset in 0..200 {
            assert_eq!(expression_at(message, Some(offset)), None);
        }
    }
}
