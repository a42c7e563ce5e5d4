//! What can only be known by trying it, and can be tried without changing anything.

use socket2::{Domain, Type};

use super::findings::{self, Kind};
use crate::backend::nft::object::{Object, Set, SetName, Variant};
use crate::backend::nft::statement::{Statement, Verdict};
use crate::backend::nft::table::Place;
use crate::backend::nft::transaction::{Change, rehearse};
use crate::error::Error;
use crate::model::{Family, Protocol};
use crate::netlink::Channel;
use crate::socket;

/// Whether sockets of a family can be made transparent: one is, and closed again.
pub(super) fn transparent(family: Family) -> Result<(), Error> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    socket::socket(domain, Type::STREAM, None).map(drop)
}

/// A table that nobody sees, for no transaction that has it is ever committed.
const TABLE: &str = "libtproxy--check";

/// What nf_tables can do: what was asked for, and the error if it cannot.
pub(super) fn nf_tables(channel: &mut Channel) -> Vec<(&'static Kind, Result<(), Error>)> {
    let place = Place { priority: 0, table: 0 };
    let chain = Object::Chain { name: "c", hook: None };
    let owned = Change::Claim { place: &place, persist: false };
    let mut ask = |kind, changes: &[Change<'_>]| (kind, rehearse(channel, TABLE, changes));
    let rules: [(&Kind, Vec<Statement>); 3] = [
        (findings::NFT_SOCKET, vec![Statement::TransparentSocket, Statement::WildcardSocket(false)]),
        (
            findings::NFT_TPROXY,
            vec![Statement::Protocol(Protocol::Tcp), Statement::Tproxy { family: None, addr: None, port: 1 }],
        ),
        (findings::NFT_FIB, vec![Statement::DestinationIsLocal, Statement::Verdict(Verdict::Drop)]),
    ];
    // A table without an owner first: whether there is an inet family at all.
    let set = Object::Set(Set {
        name: SetName { base: "s", variant: Variant::First },
        key: crate::backend::nft::object::Key::Port,
        id: 1,
    });
    let mut answers = vec![ask(findings::NF_TABLES, &[Change::Make, Change::Add(&chain), Change::Add(&set)])];
    if answers.iter().any(|(_, answer)| answer.is_err()) {
        return answers;
    }
    for (kind, statements) in rules {
        let rule = Object::Rule { chain: "c", statements, comment: "" };
        answers.push(ask(kind, &[Change::Make, Change::Add(&chain), Change::Add(&rule)]));
    }
    answers.push(ask(findings::OWNER, &[owned]));
    answers.push(ask(findings::PERSIST, &[Change::Claim { place: &place, persist: true }]));
    answers
}
