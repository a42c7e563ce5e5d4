//! Tests of features that can be tried without changing anything.

use std::os::fd::AsFd;

use socket2::{Domain, Socket, Type};

use super::findings::{self, Kind};
use crate::backend::nft::object::Object;
use crate::backend::nft::statement::{Statement, Verdict};
use crate::backend::nft::table::RoutingSlot;
use crate::backend::nft::transaction::{Change, dry_run};
use crate::error::Error;
use crate::model::{Family, Protocol};
use crate::netlink::Channel;
use crate::{socket, sys};

/// Result of the test for transparent sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Transparency {
    /// A socket was made transparent.
    Yes,
    /// The process cannot create sockets of this family.
    NoFamily,
    /// The kernel refused to make the socket transparent.
    Refused(Error),
    /// The socket for the test could not be created.
    Unknown(sys::Errno),
}

/// Tests whether a socket of a family can be made transparent.
pub(super) fn transparent(family: Family) -> Transparency {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    match Socket::new(domain, Type::STREAM.cloexec(), None).map_err(sys::Errno::from) {
        Ok(socket) => match socket::set_transparent(socket.as_fd()) {
            Ok(()) => Transparency::Yes,
            Err(e) => Transparency::Refused(e),
        },
        Err(sys::Errno(libc::EAFNOSUPPORT)) => Transparency::NoFamily,
        Err(e) => Transparency::Unknown(e),
    }
}

/// Names of tables in the test transaction, which is never committed.
const TABLE: &str = "libtproxy--check";
const OWNED: &str = "libtproxy--owned";
const PERSISTENT: &str = "libtproxy--persistent";

/// Tests the features of nf_tables. Returns the result of each.
pub(super) fn nf_tables(channel: &mut Channel) -> Vec<(&'static Kind, Result<(), Error>)> {
    let slot = RoutingSlot { priority: 0, table: 0 };
    let chain = Object::Chain { name: "c", hook: None };
    let rule = |statements: &[Statement]| Object::Rule { chain: "c", statements: statements.to_vec(), comment: "" };
    let socket = rule(&[Statement::TransparentSocket, Statement::WildcardSocket(false)]);
    let tproxy = rule(&[Statement::Protocol(Protocol::Tcp), Statement::Tproxy { family: None, addr: None, port: 1 }]);
    let fib = rule(&[Statement::DestinationIsLocal, Statement::Verdict(Verdict::Drop)]);
    let tried = [
        (findings::NF_TABLES, TABLE, Change::AddTable),
        (findings::NF_TABLES, TABLE, Change::Add(&chain)),
        (findings::NFT_SOCKET, TABLE, Change::Add(&socket)),
        (findings::NFT_TPROXY, TABLE, Change::Add(&tproxy)),
        (findings::NFT_FIB, TABLE, Change::Add(&fib)),
        (findings::OWNER, OWNED, Change::Claim { slot: &slot, record: None, persist: false }),
        (findings::PERSIST, PERSISTENT, Change::Claim { slot: &slot, record: None, persist: true }),
    ];
    let (mut kinds, mut changes) = (Vec::new(), Vec::new());
    for (kind, table, change) in tried {
        kinds.push(kind);
        changes.push((table, change));
    }
    let mut answers: Vec<(&'static Kind, Result<(), Error>)> = Vec::new();
    for (kind, answer) in kinds.into_iter().zip(dry_run(channel, &changes)) {
        match answers.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, first)) if first.is_ok() => *first = answer,
            Some(_) => {}
            None => answers.push((kind, answer)),
        }
    }
    // Without tables, the other features cannot be tested.
    if answers.first().is_some_and(|(_, answer)| answer.is_err()) {
        answers.truncate(1);
    }
    answers
}
