//! Commands that change other people's packet filters, by whatever names these have: each one changes one rule, and no
//! chain or rule but the one that it is about.

use std::fmt::{self, Write};

use crate::check::inspect::filter::{Chain, Origin, Rule};
use crate::check::shell::{is_nft_identifier, is_plain, json, word};
use crate::model::{Family, Mark};

/// What a packet has to be, for a rule that lets it through.
#[derive(Debug, Clone, Copy)]
pub(super) enum Clause<'a> {
    OfFamily(Family),
    /// Of a protocol, and to one of these ports; none: to any.
    To(u8, &'a [(u16, u16)]),
    NotToThisHost,
    NotFromThisHost,
    Marked(Mark),
    /// A transparent socket sends it.
    FromTransparent,
    /// Some socket of this host sends it.
    FromSocket,
}

/// xt_multiport has room for so many ports, of which a range takes two.
const MULTIPORT: usize = 15;
/// A command with more ports than this is none for people.
const RANGES_MAX: usize = 64;

fn protocol_name(protocol: u8) -> Option<&'static str> {
    match i32::from(protocol) {
        libc::IPPROTO_TCP => Some("tcp"),
        libc::IPPROTO_UDP => Some("udp"),
        _ => None,
    }
}

/// A range of ports, with what is between its ends.
fn range(&(first, last): &(u16, u16), between: &str) -> String {
    if first == last { first.to_string() } else { format!("{first}{between}{last}") }
}

impl Clause<'_> {
    /// In nft's language; `None`: there is no way to say it.
    fn by_nft(self, chain: &Chain) -> Option<String> {
        Some(match self {
            Clause::OfFamily(_) if chain.family.is_some() => String::new(),
            Clause::OfFamily(Family::V4) => "meta nfproto ipv4 ".to_owned(),
            Clause::OfFamily(Family::V6) => "meta nfproto ipv6 ".to_owned(),
            Clause::To(protocol, []) => format!("meta l4proto {} ", protocol_name(protocol)?),
            Clause::To(protocol, [one]) => format!("{} dport {} ", protocol_name(protocol)?, range(one, "-")),
            Clause::To(protocol, ports) if ports.len() <= RANGES_MAX => {
                let ports: Vec<String> = ports.iter().map(|ports| range(ports, "-")).collect();
                format!("{} dport {{ {} }} ", protocol_name(protocol)?, ports.join(", "))
            }
            Clause::To(..) => return None,
            Clause::NotToThisHost => "fib daddr type != local ".to_owned(),
            Clause::NotFromThisHost => "fib saddr type != local ".to_owned(),
            Clause::Marked(Mark { value, mask }) => format!("meta mark and {mask:#x} == {value:#x} "),
            Clause::FromTransparent => "socket transparent 1 ".to_owned(),
            Clause::FromSocket => "meta skuid >= 0 ".to_owned(),
        })
    }

    /// In the JSON of libnftables-json(5), with a comma behind.
    fn by_json(self, chain: &Chain) -> Option<String> {
        let matched = |op: &str, left: &str, right: &str| {
            format!("{{\"match\":{{\"op\":\"{op}\",\"left\":{left},\"right\":{right}}}}},")
        };
        let meta = |key: &str| format!("{{\"meta\":{{\"key\":\"{key}\"}}}}");
        let fib = |flag: &str| format!("{{\"fib\":{{\"result\":\"type\",\"flags\":[\"{flag}\"]}}}}");
        Some(match self {
            Clause::OfFamily(_) if chain.family.is_some() => String::new(),
            Clause::OfFamily(Family::V4) => matched("==", &meta("nfproto"), "\"ipv4\""),
            Clause::OfFamily(Family::V6) => matched("==", &meta("nfproto"), "\"ipv6\""),
            Clause::To(protocol, []) => matched("==", &meta("l4proto"), &format!("\"{}\"", protocol_name(protocol)?)),
            Clause::To(protocol, ports) if ports.len() <= RANGES_MAX => {
                let name = protocol_name(protocol)?;
                let port = format!("{{\"payload\":{{\"protocol\":\"{name}\",\"field\":\"dport\"}}}}");
                let range = |(first, last): &(u16, u16)| match first == last {
                    true => first.to_string(),
                    false => format!("{{\"range\":[{first},{last}]}}"),
                };
                let ports: Vec<String> = ports.iter().map(range).collect();
                matched("==", &port, &format!("{{\"set\":[{}]}}", ports.join(",")))
            }
            Clause::To(..) => return None,
            Clause::NotToThisHost => matched("!=", &fib("daddr"), "\"local\""),
            Clause::NotFromThisHost => matched("!=", &fib("saddr"), "\"local\""),
            Clause::Marked(Mark { value, mask }) => {
                matched("==", &format!("{{\"&\":[{},{mask}]}}", meta("mark")), &value.to_string())
            }
            Clause::FromTransparent => matched("==", "{\"socket\":{\"key\":\"transparent\"}}", "1"),
            Clause::FromSocket => matched(">=", &meta("skuid"), "0"),
        })
    }

    fn by_iptables(self) -> Option<String> {
        Some(match self {
            Clause::OfFamily(_) => String::new(),
            Clause::To(protocol, []) => format!("-p {} ", protocol_name(protocol)?),
            Clause::To(protocol, [one]) => format!("-p {} --dport {} ", protocol_name(protocol)?, range(one, ":")),
            Clause::To(protocol, ports) => {
                let taken: usize = ports.iter().map(|(first, last)| if first == last { 1 } else { 2 }).sum();
                let ports: Vec<String> = ports.iter().map(|ports| range(ports, ":")).collect();
                let name = protocol_name(protocol)?;
                (taken <= MULTIPORT).then(|| format!("-p {name} -m multiport --dports {} ", ports.join(",")))?
            }
            Clause::NotToThisHost => "-m addrtype ! --dst-type LOCAL ".to_owned(),
            // xt_socket cannot be used in OUTPUT: what has another's address is told by that.
            Clause::NotFromThisHost | Clause::FromTransparent => "-m addrtype ! --src-type LOCAL ".to_owned(),
            Clause::Marked(Mark { value, mask }) => format!("-m mark --mark {value:#x}/{mask:#x} "),
            Clause::FromSocket => "-m owner --socket-exists ".to_owned(),
        })
    }
}

fn nft_family(chain: &Chain) -> &'static str {
    match chain.family {
        None => "inet",
        Some(Family::V4) => "ip",
        Some(Family::V6) => "ip6",
    }
}

fn program(origin: Origin, family: Family) -> &'static str {
    match (origin, family) {
        (Origin::IptablesLegacy, Family::V4) => "iptables-legacy",
        (Origin::IptablesLegacy, Family::V6) => "ip6tables-legacy",
        (_, Family::V4) => "iptables-nft",
        (_, Family::V6) => "ip6tables-nft",
    }
}

/// A chain as its program calls it, for people.
pub(super) fn named(chain: &Chain) -> impl fmt::Display {
    std::fmt::from_fn(move |f| {
        let Chain { table, name, .. } = chain;
        match chain.origin {
            Origin::Nft => write!(f, "{} {table} {name}", nft_family(chain)),
            origin => write!(f, "{} -t {table} {name}", program(origin, chain.family.unwrap_or(Family::V4))),
        }
    })
}

/// A change of a rule by `nft`, in words or, for a chain whose names are none in nft's language, in JSON. Empty: there is
/// none (a name that is not UTF-8).
fn by_nft(chain: &Chain, words: impl FnOnce(&str) -> String, object: impl FnOnce(&str) -> String) -> String {
    let Chain { table, name, .. } = chain;
    let family = nft_family(chain);
    if is_nft_identifier(table) && is_nft_identifier(name) {
        return words(&format!("{family} {table} {name}"));
    }
    let (Some(table), Some(name)) = (json(table), json(name)) else { return String::new() };
    let object = object(&format!("\"family\":\"{family}\",\"table\":{table},\"chain\":{name}"));
    format!("nft -j '{{\"nftables\":[{object}]}}'")
}

/// The command that puts a rule first in a base chain, which lets through what is all of this. Empty: there is none.
pub(super) fn insertion(chain: &Chain, family: Family, clauses: &[Clause<'_>]) -> String {
    let joined = |of: &dyn Fn(Clause<'_>) -> Option<String>| {
        clauses.iter().try_fold(String::new(), |all, clause| Some(all + &of(*clause)?))
    };
    match chain.origin {
        Origin::Nft => {
            let clauses = (joined(&|clause| clause.by_nft(chain)), joined(&|clause| clause.by_json(chain)));
            let (Some(words), Some(objects)) = clauses else { return String::new() };
            by_nft(
                chain,
                |chain| format!("nft 'insert rule {chain} {words}accept'"),
                |chain| format!("{{\"insert\":{{\"rule\":{{{chain},\"expr\":[{objects}{{\"accept\":null}}]}}}}}}"),
            )
        }
        // The kernel's own chains have plain names.
        origin if is_plain(&chain.name) && is_plain(&chain.table) => match joined(&|clause| clause.by_iptables()) {
            Some(words) => {
                let (program, Chain { table, name, .. }) = (program(origin, family), chain);
                format!("{program} -t {table} -I {name} {words}-j ACCEPT")
            }
            None => String::new(),
        },
        _ => String::new(),
    }
}

/// The command that removes a rule. Empty: there is none that is sure to remove this one.
pub(super) fn removal(chain: &Chain, rule: &Rule) -> String {
    let handle = rule.handle;
    match chain.origin {
        // A handle means one rule for ever, a number another one after the next change.
        Origin::Nft | Origin::IptablesNft => {
            let by_handle = by_nft(
                chain,
                |chain| format!("nft delete rule {chain} handle {handle}"),
                |chain| format!("{{\"delete\":{{\"rule\":{{{chain},\"handle\":{handle}}}}}}}"),
            );
            if by_handle.is_empty() && chain.origin == Origin::IptablesNft { by_number(chain, rule) } else { by_handle }
        }
        Origin::IptablesLegacy => by_number(chain, rule),
    }
}

/// In a chain of the kernel's own, other commands of ours may insert rules, and change the numbers.
fn by_number(chain: &Chain, rule: &Rule) -> String {
    let Chain { table, name, .. } = chain;
    let program = program(chain.origin, chain.family.unwrap_or(Family::V4));
    let can_be_named = is_plain(table) && is_for_iptables(name.as_bytes());
    match word(name).filter(|_| chain.hook.is_none() && can_be_named) {
        Some(name) => format!("{program} -t {table} -D {name} {}", rule.number),
        None => String::new(),
    }
}

/// A chain's name that iptables takes (`assert_valid_chain_name` in its xshared.c).
fn is_for_iptables(name: &[u8]) -> bool {
    let first = name.first().is_some_and(|byte| !b"-!".contains(byte));
    first && name.len() <= 28 && !name.iter().any(|byte| byte.is_ascii_whitespace() || *byte == b'\x0b')
}

/// The command that removes the jump to one of our chains from a chain of the kernel's own.
pub(super) fn removal_of_jump(chain: &Chain, instance: &str, to: &str) -> String {
    let Chain { table, name, .. } = chain;
    let program = program(chain.origin, chain.family.unwrap_or(Family::V4));
    let comment = crate::backend::iptables::comment(instance);
    let mut command = String::new();
    if is_plain(name) && is_plain(table) {
        // Writing to a String does not fail.
        let _ = write!(command, "{program} -t {table} -D {name} -m comment --comment '{comment}' -j {to}");
    }
    command
}
