//! Commands that change other programs' packet filters, whatever their names are. Each command changes exactly the one rule that its
//! finding reports.

use std::fmt::{self, Write};

use crate::check::inspect::filter::{Chain, Origin, Rule};
use crate::check::shell::{is_nft_identifier, is_plain, json, word};
use crate::model::{Family, Mark};

/// Condition of a rule that accepts packets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Clause<'a> {
    OfFamily(Family),
    /// Protocol, and destination ports; empty: all ports.
    To(u8, &'a [(u16, u16)]),
    NotToThisHost,
    NotFromThisHost,
    Marked(Mark),
    /// The packet is sent by a transparent socket.
    FromTransparent,
    /// The packet is sent by a socket of this host.
    FromSocket,
}

/// Maximum number of ports in xt_multiport. A range counts as two.
const MULTIPORT: usize = 15;
/// Maximum number of port ranges in a command, so that it stays readable.
const RANGES_MAX: usize = 64;

fn protocol_name(protocol: u8) -> Option<&'static str> {
    match i32::from(protocol) {
        libc::IPPROTO_TCP => Some("tcp"),
        libc::IPPROTO_UDP => Some("udp"),
        _ => None,
    }
}

/// Formats a range of ports with a separator.
fn range(&(first, last): &(u16, u16), between: &str) -> String {
    if first == last { first.to_string() } else { format!("{first}{between}{last}") }
}

impl Clause<'_> {
    /// Returns the condition in the language of nft; `None`: it cannot be expressed.
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

    /// Returns the condition in JSON (libnftables-json(5)), followed by a comma.
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
            // xt_socket cannot be used in OUTPUT: packets of transparent sockets are recognized by their foreign source address.
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

/// Displays a chain by the name that its program uses.
pub(super) fn named(chain: &Chain) -> impl fmt::Display {
    std::fmt::from_fn(move |f| {
        let Chain { table, name, .. } = chain;
        match chain.origin {
            Origin::Nft => write!(f, "{} {table} {name}", nft_family(chain)),
            origin => write!(f, "{} -t {table} {name}", program(origin, chain.family.unwrap_or(Family::V4))),
        }
    })
}

/// Returns an `nft` command that changes a rule: in the language of nft, or in JSON if a name is not an identifier. Empty: a name is
/// not UTF-8.
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

/// Returns the command that inserts a rule at the beginning of a base chain, which accepts packets that match all conditions. Empty:
/// the rule cannot be expressed.
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
        // Built-in chains have plain names.
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

/// Returns the command that deletes a rule. Empty: no command certainly deletes this rule.
pub(super) fn removal(chain: &Chain, rule: &Rule) -> String {
    let handle = rule.handle;
    match chain.origin {
        // A handle always refers to the same rule. A number refers to another rule after a change.
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

/// Deletes a rule by number. Not in built-in chains, where other suggested commands may insert rules and change the numbers.
fn by_number(chain: &Chain, rule: &Rule) -> String {
    let Chain { table, name, .. } = chain;
    let program = program(chain.origin, chain.family.unwrap_or(Family::V4));
    let can_be_named = is_plain(table) && is_for_iptables(name.as_bytes());
    match word(name).filter(|_| chain.hook.is_none() && can_be_named) {
        Some(name) => format!("{program} -t {table} -D {name} {}", rule.number),
        None => String::new(),
    }
}

/// Whether iptables accepts the name of a chain (`assert_valid_chain_name` in its xshared.c).
fn is_for_iptables(name: &[u8]) -> bool {
    let first = name.first().is_some_and(|byte| !b"-!".contains(byte));
    first && name.len() <= 28 && !name.iter().any(|byte| byte.is_ascii_whitespace() || *byte == b'\x0b')
}

/// Returns the command that deletes the jump from a built-in chain to a chain of this library.
pub(super) fn removal_of_jump(chain: &Chain, instance: &str, to: &str) -> String {
    let Chain { table, name, .. } = chain;
    let program = program(chain.origin, chain.family.unwrap_or(Family::V4));
    let comment = crate::backend::xtables::comment(instance);
    let mut command = String::new();
    if is_plain(name) && is_plain(table) {
        // Writing to a String does not fail.
        let _ = write!(command, "{program} -t {table} -D {name} -m comment --comment '{comment}' -j {to}");
    }
    command
}
