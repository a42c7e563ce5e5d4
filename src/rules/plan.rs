//! What the kernel shall hold, worked out from a config with no look at the
//! kernel.

use std::net::IpAddr;

use super::config::{Config, Listener};
use crate::backend::route::{PRIORITY_MAX, is_system_table};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::{Families, Family, IdRange, MacAddr, Mark, Mode, PortRange, Protocol, ProtocolPorts, Protocols};
use crate::name;
use crate::plan::{ByProtocol, Cgroup, Intercept, Interfaces, Learned, Owners, Plan};
use crate::ports;
use crate::prefix::{BYTES_EACH, Prefix, PrefixSet};

/// An instance's name is part of names in the kernel, which are bounded.
const NAME_MAX: usize = 20;
/// The longest path of a control group, less than PATH_MAX with the mount point.
const CGROUP_MAX: usize = 4000;

/// The name of an instance that is given none.
pub(crate) const DEFAULT_NAME: &str = "tproxy";

/// Checks a config and fills in its defaults.
pub(crate) fn make(config: &Config) -> Result<Plan> {
    refuse_contradictions(config)?;
    let protocols = protocols(config)?;
    let intercepts = if config.mode == Mode::DivertOnly { Vec::new() } else { intercepts(config, protocols)? };
    let served = if config.mode == Mode::DivertOnly && config.listeners.is_empty() {
        Families::ALL
    } else {
        config.listeners.iter().fold(Families::default(), |all, listener| Families {
            v4: all.v4 || listener.families.v4,
            v6: all.v6 || listener.families.v6,
        })
    };
    let mark = mark(config.mark)?;
    let loop_mark = if config.local_output || config.local_servers { Some(loop_mark(mark)?) } else { None };
    let prefixes = [&config.dst, &config.src, &config.bypass, &config.bypass_src]
        .into_iter()
        .flatten()
        .map(Vec::len)
        .sum::<usize>();
    memory::require(prefixes.saturating_mul(BYTES_EACH))?;
    let set = |prefixes: &Option<Vec<Prefix>>| prefixes.as_ref().map(|prefixes| PrefixSet::new(prefixes));
    let (ports, reject) = chosen_ports(config)?;
    Ok(Plan {
        name: name(config.name.as_deref())?,
        mode: config.mode,
        mark,
        loop_mark,
        local_output: config.local_output,
        local_servers: config.local_servers,
        new_only: config.new_only,
        families: families(config.families, served)?,
        families_are_default: config.families.is_none(),
        protocols,
        intercepts,
        guard: !config.allow_direct,
        fail_open: config.fail_open,
        notrack: config.notrack,
        persist: config.persist,
        ports,
        reject,
        dst: set(&config.dst),
        src: set(&config.src),
        // No exemption and an empty one are the same. Without one, packets need no look-up and no connection tracking.
        bypass: set(&config.bypass).filter(|bypass| bypass.len() > 0),
        bypass_src: set(&config.bypass_src).filter(|bypass| bypass.len() > 0),
        interfaces: config.interfaces.as_deref().map(|names| interfaces("interfaces", names)).transpose()?,
        bypass_interfaces: interfaces("bypass_interfaces", &config.bypass_interfaces)?,
        macs: config.macs.as_deref().map(macs),
        bypass_macs: macs(&config.bypass_macs),
        owners: owners(config)?,
        table: table(config.table)?,
        priority: priority(config.priority)?,
        learned: Learned::default(),
    })
}

/// What cannot go together, or cannot be done.
fn refuse_contradictions(config: &Config) -> Result<()> {
    let selective = config.ports.is_some()
        || !config.bypass_ports.is_empty()
        || !config.reject_ports.is_empty()
        || config.dst.is_some()
        || config.src.is_some()
        || config.bypass.as_ref().is_some_and(|bypass| !bypass.is_empty())
        || config.bypass_src.as_ref().is_some_and(|bypass| !bypass.is_empty())
        || config.interfaces.is_some()
        || !config.bypass_interfaces.is_empty()
        || config.macs.is_some()
        || !config.bypass_macs.is_empty();
    if config.mode == Mode::DivertOnly && (selective || config.local_output || config.fail_open || config.new_only) {
        return Err(Error::invalid(
            "TP_RULES_DIVERT_ONLY with ports, addresses, interfaces, macs, TP_RULES_LOCAL_OUTPUT, TP_RULES_NEW_ONLY or \
             TP_RULES_FAIL_OPEN: nothing is intercepted, so there is nothing to choose",
        ));
    }
    if !owners(config)?.is_everyone() {
        if !config.local_output {
            return Err(Error::invalid(
                "uids, gids, cgroups, bypass_uids, bypass_gids, bypass_cgroups or bypass_mark without TP_RULES_LOCAL_OUTPUT: only \
                 traffic that this host sends has an owner",
            ));
        }
        if config.notrack {
            return Err(Error::new(
                libc::EOPNOTSUPP,
                "TP_RULES_NOTRACK with uids, gids, cgroups, their exemptions or bypass_mark: connection tracking keeps for \
                 a connection whose it is; leave out TP_RULES_NOTRACK",
            ));
        }
    }
    if config.local_output && config.new_only {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "TP_RULES_LOCAL_OUTPUT with TP_RULES_NEW_ONLY: this host's own packets are routed one by one, and those that do \
             not begin a connection would not reach the proxy; install two instances",
        ));
    }
    if config.notrack && config.local_servers && config.local_output {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "TP_RULES_NOTRACK with TP_RULES_LOCAL_SERVERS and TP_RULES_LOCAL_OUTPUT: connection tracking tells the replies \
             of local servers, and without it for local clients they look the same; leave out one of the three",
        ));
    }
    if config.local_output && config.fail_open {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "TP_RULES_LOCAL_OUTPUT with TP_RULES_FAIL_OPEN: the host's own packets are on their way to the listener \
             before it is known whether there is one",
        ));
    }
    if config.mode != Mode::Redirect {
        return Ok(());
    }
    if config.local_servers {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "TP_RULES_REDIRECT with TP_RULES_LOCAL_SERVERS: replies reach a transparent socket by policy routing, which \
             redirection does not have; use TPROXY or TP_RULES_DIVERT_ONLY",
        ));
    }
    if config.fail_open {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "TP_RULES_REDIRECT with TP_RULES_FAIL_OPEN: a translated packet cannot go back to where it was going",
        ));
    }
    if config.notrack {
        return Err(Error::invalid(
            "TP_RULES_REDIRECT with TP_RULES_NOTRACK: redirection is connection tracking's work",
        ));
    }
    if config.protocols.is_some_and(|protocols| protocols.udp)
        || config.listeners.iter().any(|listener| listener.protocol == Protocol::Udp)
    {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "TP_RULES_REDIRECT for UDP: the original destination of a datagram would be lost; use TPROXY",
        ));
    }
    let loopback = |listener: &Listener| listener.addr.is_some_and(|addr| addr.is_loopback());
    if !config.local_output && config.listeners.iter().any(loopback) {
        return Err(Error::invalid(
            "TP_RULES_REDIRECT to a listener on loopback: the kernel drops what comes from the network for 127.0.0.1 or \
             ::1; listen on another address",
        ));
    }
    Ok(())
}

fn protocols(config: &Config) -> Result<Protocols> {
    let served = |protocol| config.listeners.iter().any(|listener| listener.protocol == protocol);
    let of_listeners = Protocols { tcp: served(Protocol::Tcp), udp: served(Protocol::Udp) };
    let Some(wanted) = config.protocols else {
        return Ok(if of_listeners.is_empty() { Protocols::TCP } else { of_listeners });
    };
    if wanted.is_empty() {
        return Err(Error::invalid("protocols: neither TCP nor UDP is given"));
    }
    let unserved = wanted.iter().find(|protocol| !of_listeners.contains(*protocol));
    match unserved {
        Some(protocol) if config.mode != Mode::DivertOnly => {
            Err(Error::invalid_with(format_args!("protocols asks for {protocol}, but no listener serves it")))
        }
        _ => Ok(wanted),
    }
}

fn loop_mark(mark: Mark) -> Result<Mark> {
    mark.second().ok_or_else(|| {
        Error::invalid_with(format_args!(
            "TP_RULES_LOCAL_OUTPUT and TP_RULES_LOCAL_SERVERS need a second mark for packets that this host sends, and \
             {mark} has no other bit in its mask: add a bit to mark_mask"
        ))
    })
}

/// Names, and patterns: a trailing `*` stands for any letters, and for none. A `*` elsewhere would be one of the name's
/// own letters to the kernel, and a pattern to those who read it, so it is refused.
fn interfaces(what: &str, names: &[String]) -> Result<Interfaces> {
    // IFNAMSIZ less the NUL; `dev_valid_name` in net/core/dev.c.
    let valid = |name: &&str| {
        (1..libc::IFNAMSIZ).contains(&name.len())
            && *name != "."
            && *name != ".."
            && !name.contains(|c: char| "/:\"*".contains(c) || c.is_whitespace() || c.is_control())
    };
    let mut found = Interfaces::default();
    for name in names {
        let (word, list) = match name.strip_suffix('*') {
            Some(prefix) => (prefix, &mut found.prefixes),
            None => (name.as_str(), &mut found.names),
        };
        if !valid(&word) {
            return Err(Error::invalid_with(format_args!(
                "{what}: {} is neither the name of an interface (1 to 15 bytes, without '/', ':', '*', quotes and \
                 spaces) nor the beginning of one with a '*' behind it",
                name::quoted(name)
            )));
        }
        list.push(word.to_owned());
    }
    found.names.sort_unstable();
    found.names.dedup();
    found.prefixes.sort_unstable();
    found.prefixes.dedup();
    Ok(found)
}

pub(super) fn name(name: Option<&str>) -> Result<String> {
    let name = name.unwrap_or(DEFAULT_NAME);
    let fits = (1..=NAME_MAX).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
    if fits {
        Ok(name.to_owned())
    } else {
        Err(Error::invalid_with(format_args!(
            "name {}: 1 to {NAME_MAX} letters, digits, '_', '.' and, not first, '-' (it becomes part of a table's name)",
            name::quoted(name)
        )))
    }
}

fn mark(wanted: Option<Mark>) -> Result<Mark> {
    let mark = wanted.unwrap_or(Mark::DEFAULT);
    if mark.value == 0 {
        return Err(Error::invalid("mark 0: packets without a mark have it too"));
    }
    if mark.value & !mark.mask != 0 {
        return Err(Error::invalid_with(format_args!("mark {mark} has bits that its mask has not")));
    }
    Ok(mark)
}

fn families(wanted: Option<Families>, served: Families) -> Result<Families> {
    let Some(wanted) = wanted else { return Ok(served) };
    if wanted.is_empty() {
        return Err(Error::invalid("families: neither IPv4 nor IPv6 is given"));
    }
    match wanted.iter().find(|family| !served.contains(*family)) {
        Some(family) => Err(Error::invalid_with(format_args!(
            "families asks for {family}, but no listener serves it (one on [::] serves both, unless it is IPV6_V6ONLY)"
        ))),
        None => Ok(wanted),
    }
}

fn table(table: Option<u32>) -> Result<Option<u32>> {
    match table {
        Some(0) => Err(Error::invalid("table 0 is no routing table: choose another")),
        Some(table) if is_system_table(table) => Err(Error::invalid_with(format_args!(
            "table {table} is the system's own (local, main or default): choose another"
        ))),
        table => Ok(table),
    }
}

fn priority(priority: Option<u32>) -> Result<Option<u32>> {
    match priority {
        Some(0) => Err(Error::invalid("priority 0 is that of the local table's rule: choose another")),
        Some(priority) if priority > PRIORITY_MAX => Err(Error::invalid_with(format_args!(
            "priority {priority}: at most {PRIORITY_MAX}, so that all four rules come before the main table's"
        ))),
        priority => Ok(priority),
    }
}

/// One listener for each family and protocol; the same one twice (SO_REUSEPORT) is one.
fn intercepts(config: &Config, protocols: Protocols) -> Result<Vec<Intercept>> {
    if config.listeners.is_empty() {
        return Err(Error::invalid(
            "no listeners: give the descriptors that the connections shall go to, or TP_RULES_DIVERT_ONLY",
        ));
    }
    let mut found: Vec<(Family, &Listener)> = Vec::new();
    for listener in &config.listeners {
        for family in listener.families.iter() {
            let wanted = config.families.is_none_or(|families| families.contains(family))
                && protocols.contains(listener.protocol);
            match found.iter().find(|(f, other)| *f == family && other.protocol == listener.protocol) {
                Some((_, other)) if (other.addr, other.port) != (listener.addr, listener.port) => {
                    return Err(Error::invalid_with(format_args!(
                        "two listeners for {} over {family}, at {} and {}: a connection can go to one only (several \
                         sockets of one address and port, by SO_REUSEPORT, are fine)",
                        listener.protocol,
                        shown(other),
                        shown(listener),
                    )));
                }
                None if wanted => found.push((family, listener)),
                _ => {}
            }
        }
    }
    Ok(one_for_both(&found))
}

/// A listener that serves both families needs one rule, not two.
fn one_for_both(found: &[(Family, &Listener)]) -> Vec<Intercept> {
    let make =
        |family: Option<Family>, l: &Listener| Intercept { protocol: l.protocol, family, addr: l.addr, port: l.port };
    let alike = |a: &Listener, b: &Listener| (a.protocol, a.addr, a.port) == (b.protocol, b.addr, b.port);
    let mut made = Vec::new();
    for (family, listener) in found {
        let twin = found.iter().any(|(other, l)| other != family && alike(l, listener));
        match (twin, family) {
            (true, Family::V4) => made.push(make(None, listener)),
            (true, Family::V6) => {}
            (false, _) => made.push(make(Some(*family), listener)),
        }
    }
    made
}

fn shown(listener: &Listener) -> String {
    match listener.addr {
        Some(IpAddr::V6(addr)) => format!("[{addr}]:{}", listener.port),
        Some(IpAddr::V4(addr)) => format!("{addr}:{}", listener.port),
        None => format!("*:{}", listener.port),
    }
}

/// The ranges of one protocol in a list, as a set.
fn ports_of(what: &str, ports: &[ProtocolPorts], protocol: Protocol) -> Result<Vec<PortRange>> {
    if let Some(ProtocolPorts { range: bad, .. }) =
        ports.iter().find(|ports| ports.range.first == 0 || ports.range.first > ports.range.last)
    {
        return Err(Error::invalid_with(format_args!(
            "{what} {}-{}: the first must be at least 1 and not above the last",
            bad.first, bad.last
        )));
    }
    let chosen = ports.iter().filter(|ports| ports.protocols.is_none_or(|protocols| protocols.contains(protocol)));
    Ok(ports::merge(chosen.map(|ports| ports.range)))
}

/// Sorted ranges that do not touch.
type Ports = Vec<PortRange>;

/// The ports to intercept and those to refuse, of each protocol: an exemption wins over both, and a refusal over
/// interception.
fn chosen_ports(config: &Config) -> Result<(ByProtocol<Option<Ports>>, ByProtocol<Ports>)> {
    let of = |protocol| -> Result<(Option<Ports>, Ports)> {
        let bypass = ports_of("bypass_ports", &config.bypass_ports, protocol)?;
        let reject = ports_of("reject_ports", &config.reject_ports, protocol)?;
        let ports = config.ports.as_deref().map(|ports| ports_of("ports", ports, protocol)).transpose()?;
        let reject = ports::subtract(Some(&reject), &bypass).unwrap_or_default();
        Ok((ports::subtract(ports.as_deref(), &bypass), reject))
    };
    let ((tcp, reject_tcp), (udp, reject_udp)) = (of(Protocol::Tcp)?, of(Protocol::Udp)?);
    Ok((ByProtocol { tcp, udp }, ByProtocol { tcp: reject_tcp, udp: reject_udp }))
}

/// Numbers of users or groups, as a set.
fn ids(what: &str, ranges: &[IdRange]) -> Result<Vec<IdRange>> {
    // (uid_t) -1 is no user (chown(2)).
    if let Some(bad) = ranges.iter().find(|range| range.first > range.last || range.last == u32::MAX) {
        return Err(Error::invalid_with(format_args!(
            "{what} {}-{}: the first must not be above the last, and 4294967295 is not a valid number",
            bad.first, bad.last
        )));
    }
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|range| range.first);
    let mut merged: Vec<IdRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => last.last = last.last.max(range.last),
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

fn macs(macs: &[MacAddr]) -> Vec<MacAddr> {
    let mut sorted = macs.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted
}

fn cgroups(what: &str, paths: &[String]) -> Result<Vec<Cgroup>> {
    let cgroup = |path: &String| {
        let trimmed = path.trim_matches('/');
        let part_is_bad = |part: &str| matches!(part, "" | "." | "..");
        if trimmed.split('/').any(part_is_bad)
            || trimmed.len() > CGROUP_MAX
            || trimmed.contains(|c: char| c.is_control() || c == '"')
        {
            return Err(Error::invalid_with(format_args!(
                "{what}: {} is not the path of a control group below the root of cgroup v2, such as \
                 \"system.slice/squid.service\"",
                name::quoted(path)
            )));
        }
        Ok(Cgroup { path: trimmed.to_owned(), id: 0 })
    };
    let mut found = memory::collect(paths.iter().map(cgroup))?;
    found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    found.dedup();
    Ok(found)
}

/// Whose traffic is selected, of that which this host sends.
fn owners(config: &Config) -> Result<Owners> {
    Ok(Owners {
        uids: config.uids.as_deref().map(|uids| ids("uids", uids)).transpose()?,
        bypass_uids: ids("bypass_uids", &config.bypass_uids)?,
        gids: config.gids.as_deref().map(|gids| ids("gids", gids)).transpose()?,
        bypass_gids: ids("bypass_gids", &config.bypass_gids)?,
        cgroups: config.cgroups.as_deref().map(|paths| cgroups("cgroups", paths)).transpose()?,
        bypass_cgroups: cgroups("bypass_cgroups", &config.bypass_cgroups)?,
        bypass_mark: match config.bypass_mark {
            Some(mark) if mark.value & !mark.mask != 0 => {
                return Err(Error::invalid_with(format_args!(
                    "bypass_mark {mark} has bits that its mask does not have"
                )));
            }
            mark => mark,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(v4: bool, v6: bool, addr: Option<&str>, port: u16) -> Listener {
        Listener {
            protocol: Protocol::Tcp,
            families: Families { v4, v6 },
            addr: addr.map(|a| a.parse().unwrap()),
            port,
        }
    }

    fn config(listeners: &[Listener]) -> Config {
        Config::new(listeners.to_vec())
    }

    fn refusal(config: &Config) -> String {
        let error = make(config).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        error.to_string()
    }

    #[test]
    fn plan_for_dual_stack_listener_has_one_rule() {
        let plan = make(&config(&[listener(true, true, None, 3129)])).unwrap();
        assert_eq!(plan.families, Families::ALL);
        assert_eq!(plan.intercepts, [Intercept { protocol: Protocol::Tcp, family: None, addr: None, port: 3129 }]);
    }

    #[test]
    fn plan_for_listener_of_each_family_has_two_rules() {
        let listeners = [listener(true, false, Some("127.0.0.1"), 1), listener(false, true, Some("::1"), 2)];
        let plan = make(&config(&listeners)).unwrap();
        assert_eq!(plan.families, Families::ALL);
        assert_eq!(
            plan.intercepts.iter().map(|i| (i.family, i.port)).collect::<Vec<_>>(),
            [(Some(Family::V4), 1), (Some(Family::V6), 2)]
        );
        assert_eq!(plan.direct_drops().count(), 0, "nobody outside reaches a loopback listener");
    }

    #[test]
    fn plan_families_narrow_dual_stack_listener() {
        let mut config = config(&[listener(true, true, None, 3129)]);
        config.families = Some(Families::V6);
        let plan = make(&config).unwrap();
        assert_eq!(plan.families.only(), Some(Family::V6));
        assert_eq!(plan.intercepts[0].family, Some(Family::V6));
    }

    #[test]
    fn plan_with_shared_port_has_one_listener_and_others_conflict() {
        let one = listener(true, false, None, 3129);
        assert_eq!(make(&config(&[one, one])).unwrap().intercepts.len(), 1);
        let sentence = refusal(&config(&[one, listener(true, false, None, 3130)]));
        assert!(sentence.contains("*:3129 and *:3130"), "{sentence}");
    }

    #[test]
    fn plan_with_bad_values_is_refused() {
        let good = config(&[listener(true, false, None, 3129)]);
        let check = |change: &dyn Fn(&mut Config), words: &str| {
            let mut bad = good.clone();
            change(&mut bad);
            let sentence = refusal(&bad);
            assert!(sentence.contains(words), "{sentence}");
        };
        check(&|c| c.listeners.clear(), "no listeners");
        check(
            &|c| (c.mode, c.ports) = (Mode::DivertOnly, Some(vec![PortRange::from(1).into()])),
            "nothing is intercepted",
        );
        check(&|c| c.name = Some("a b".into()), "letters, digits");
        check(&|c| c.name = Some("x".repeat(21)), "1 to 20");
        check(&|c| c.name = Some(String::new()), "1 to 20");
        check(&|c| c.mark = Some(Mark { value: 0, mask: 1 }), "mark 0");
        check(&|c| c.mark = Some(Mark { value: 3, mask: 1 }), "0x3/0x1");
        check(&|c| c.table = Some(254), "the system's own");
        check(&|c| c.priority = Some(32_763), "at most 32762");
        check(&|c| c.table = Some(0), "table 0");
        check(&|c| c.priority = Some(0), "priority 0");
        check(&|c| c.families = Some(Families::default()), "neither IPv4 nor IPv6");
        check(&|c| c.protocols = Some(Protocols::default()), "neither TCP nor UDP");
        check(&|c| c.families = Some(Families::V6), "asks for IPv6");
        check(&|c| c.ports = Some(vec![PortRange { first: 2, last: 1 }.into()]), "ports 2-1");
        check(&|c| c.protocols = Some(Protocols::ALL), "asks for udp");
        check(&|c| (c.local_output, c.mark) = (true, Some(Mark { value: 4, mask: 4 })), "no other bit");
        for bad in
            ["", "a-name-of-16-chr", "*", "a-name-of-16-chr*", "e*h0", "eth**", "a b", "eth0,eth1 ", ".", "a\u{1b}"]
        {
            check(&|c| c.interfaces = Some(vec![bad.into()]), "is neither the name of an interface");
        }
        check(&|c| (c.mode, c.notrack) = (Mode::Redirect, true), "connection tracking's work");
        check(&|c| c.ports = Some(vec![PortRange { first: 0, last: 1 }.into()]), "at least 1");
    }

    #[test]
    fn plan_of_what_no_kernel_can_do_is_eopnotsupp() {
        let good = config(&[listener(true, false, None, 3129)]);
        let udp = Listener { protocol: Protocol::Udp, ..listener(true, false, None, 3129) };
        let redirect = |listeners: &[Listener]| config(listeners).mode(Mode::Redirect);
        for config in [
            good.local_output(true).fail_open(true),
            redirect(&[listener(true, false, None, 3129)]).fail_open(true),
            redirect(&[udp]),
            redirect(&[listener(true, false, None, 3129)]).protocols(Protocols::ALL),
            redirect(&[listener(true, false, None, 3129), udp]).protocols(Protocols { tcp: true, udp: false }),
        ] {
            assert_eq!(make(&config).unwrap_err().errno(), libc::EOPNOTSUPP, "{config:?}");
        }
    }

    #[test]
    fn plan_redirects_only_own_traffic_to_loopback() {
        for addr in ["127.0.0.1", "::1"] {
            let redirect =
                config(&[listener(addr == "127.0.0.1", addr == "::1", Some(addr), 3129)]).mode(Mode::Redirect);
            assert!(refusal(&redirect).contains("loopback"));
            make(&redirect.local_output(true)).unwrap();
        }
        make(&config(&[listener(true, false, Some("192.0.2.1"), 3129)]).mode(Mode::Redirect)).unwrap();
    }

    #[test]
    fn plan_takes_the_last_priority_before_the_main_table() {
        let good = config(&[listener(true, false, None, 3129)]);
        assert_eq!(make(&good.priority(32_762)).unwrap().priority, Some(32_762));
    }

    #[test]
    fn plan_divert_only_needs_no_listener() {
        let plan = make(&Config::divert_only()).unwrap();
        assert_eq!(plan.families, Families::ALL);
        assert!(plan.intercepts.is_empty());
        let one_family = Config::new([listener(true, false, None, 3129)]).mode(Mode::DivertOnly);
        assert_eq!(make(&one_family).unwrap().families.only(), Some(Family::V4));
    }
}
