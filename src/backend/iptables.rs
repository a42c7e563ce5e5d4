//! iptables: a plan as the text that `iptables-restore --noflush` takes, one
//! transaction for each family, in chains of our own.
//!
//! It is the recipe of the kernel's documentation (Documentation/networking/
//! tproxy.rst): `-m socket`, MARK and ACCEPT for what has a socket, TPROXY for
//! what is to be intercepted. TPROXY without a listener drops, always.
//!
//! `present` reads from the kernel which of these chains there are, `tool` runs
//! the programs that change them, `saved` reads and writes the programs' text.

use std::fmt::{self, Write};
use std::net::IpAddr;

use crate::backend::xtables::instance_of;
use crate::error::{Error, Result};
use crate::model::{Family, Mark, Mode, PortRange, Protocol};
use crate::name;
use crate::plan::{Intercept, Plan};
use crate::prefix::PrefixSet;
use saved::Saved;
pub(crate) use tool::{counters, instances, remove};

mod present;
mod saved;
mod tool;

/// Rules are looked at one by one: more prefixes than this would cost every packet too much.
const PREFIXES_MAX: usize = 1000;

/// Refuses what iptables cannot do.
pub(crate) fn check(plan: &Plan) -> Result<()> {
    let unsupported = |what: &str| Err(Error::with(libc::EOPNOTSUPP, format_args!("the iptables backend {what}")));
    let sets = plan.dst.iter().chain(&plan.src).chain(&plan.bypass);
    if let Some(name) = plan.interfaces.iter().flat_map(|i| &i.names).find(|name| name.ends_with('+')) {
        return Err(Error::with(
            libc::EOPNOTSUPP,
            format_args!(
                "the iptables backend would take interface {} for a pattern (iptables -i): use the nf_tables backend, or \
                 rename the interface",
                name::quoted(name)
            ),
        ));
    }
    if plan.fail_open {
        unsupported("always drops what finds no listener (xt_TPROXY): TP_RULES_FAIL_OPEN needs nf_tables")
    } else if plan.notrack {
        unsupported("does not do TP_RULES_NOTRACK: it needs nf_tables")
    } else if plan.persist {
        unsupported("has rules that no process owns, and none to take over: TP_RULES_PERSIST needs nf_tables")
    } else if sets.map(PrefixSet::len).sum::<usize>() > PREFIXES_MAX {
        unsupported("looks at prefixes one by one, at most 1000 of them: more need nf_tables")
    } else {
        Ok(())
    }
}

/// A chain of ours and its rules, as they are appended.
struct Chain {
    name: String,
    rules: String,
}

impl Chain {
    fn rule(&mut self, rule: fmt::Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = writeln!(self.rules, "-A {} {rule}", self.name);
    }
}

/// A table, our chains in it, and the kernel's chains that lead to them.
struct Table {
    name: &'static str,
    chains: Vec<Chain>,
    jumps: Vec<(&'static str, String)>,
}

/// The name of a chain: at most 28 letters (XT_FUNCTION_MAXNAMELEN), of which an instance's name has 20.
fn chain_name(instance: &str, part: &str) -> String {
    format!("tp-{instance}-{part}")
}

/// The names of an instance's chains, for people.
pub(crate) fn chains_of(instance: &str) -> String {
    chain_name(instance, "*")
}

/// The parts: `p`rerouting, `d`ivert, `s`ources, `t`o destinations, `v`et, `i`ntercept; for the host's own packets
/// `out`put, `o`wn output, `ls`, `lt`, and `l`, which marks them; `r`eturned by `lo`, `rs`, `rt`.
struct Builder<'a> {
    plan: &'a Plan,
    family: Family,
}

impl Builder<'_> {
    fn chain(&self, part: &str) -> Chain {
        Chain { name: self.name(part), rules: String::new() }
    }

    fn name(&self, part: &str) -> String {
        chain_name(&self.plan.name, part)
    }

    fn jump(&self, part: &str) -> String {
        format!("-j {}", self.name(part))
    }

    fn listeners(&self) -> impl Iterator<Item = &Intercept> {
        self.plan.intercepts.iter().filter(|listener| listener.family.is_none_or(|family| family == self.family))
    }

    /// The protocols that are served over this family.
    fn protocols(&self) -> impl Iterator<Item = Protocol> {
        let served = |protocol: &Protocol| self.listeners().any(|listener| listener.protocol == *protocol);
        self.plan.protocols.iter().filter(served)
    }

    /// A rule for each range of ports: what matches it, and what is to be matched before and behind.
    fn by_ports(&self, chain: &mut Chain, before: &str, protocol: Protocol, behind: &str) {
        let Some(ports) = &self.plan.ports else {
            return chain.rule(format_args!("{before}-p {protocol} {behind}"));
        };
        for PortRange { first, last } in ports {
            chain.rule(format_args!("{before}-p {protocol} --dport {first}:{last} {behind}"));
        }
    }

    fn by_prefixes(&self, chain: &mut Chain, option: &str, prefixes: &PrefixSet, then: &str) {
        for prefix in prefixes.of(self.family) {
            chain.rule(format_args!("{option} {prefix} {then}"));
        }
    }

    /// `sources` and `destinations`, ending in a jump.
    fn select(&self, chains: &mut Vec<Chain>, [sources, destinations]: [&str; 2], then: &str) {
        let (mut from, mut to) = (self.chain(sources), self.chain(destinations));
        let (selected, jump) = (self.jump(destinations), self.jump(then));
        match &self.plan.src {
            Some(src) => self.by_prefixes(&mut from, "-s", src, &selected),
            None => from.rule(format_args!("{selected}")),
        }
        if let Some(bypass) = &self.plan.bypass {
            self.by_prefixes(&mut to, "-d", bypass, "-j RETURN");
        }
        if then == "v" {
            self.return_replies(&mut to);
        }
        match &self.plan.dst {
            Some(dst) => self.by_prefixes(&mut to, "-d", dst, &jump),
            None => {
                // xt_addrtype knows no broadcast for IPv6, which has none.
                let types = ["LOCAL", "BROADCAST", "ANYCAST", "MULTICAST"];
                for own in types.iter().filter(|t| self.family == Family::V4 || **t != "BROADCAST") {
                    to.rule(format_args!("-m addrtype --dst-type {own} -j RETURN"));
                }
                to.rule(format_args!("{jump}"));
            }
        }
        chains.extend([to, from]);
    }

    /// As in the nf_tables rules: leaves alone replies of connections that others began.
    fn return_replies(&self, chain: &mut Chain) {
        let tracked = self.protocols().filter(|protocol| self.plan.may_match_replies(*protocol));
        for protocol in tracked {
            let reply = match protocol {
                Protocol::Tcp => "-p tcp ! --syn".to_owned(),
                Protocol::Udp => format!("-p udp -m connmark ! --mark {}", self.plan.mark),
            };
            chain.rule(format_args!("{reply} -m conntrack --ctdir REPLY -j RETURN"));
        }
    }

    /// As in the nf_tables rules: leaves alone what another instance loops and what this host sends to itself, refuses
    /// what no other host can have sent, and has the rest intercepted. It is reached from PREROUTING only, where `-i` and
    /// `--limit-iface-in` may be used. The nat table does not allow DROP: there RETURN leaves such packets alone.
    fn vet(&self, refuse: &str) -> Chain {
        let mut chain = self.chain("v");
        if let Some(looped) = self.plan.mark.second() {
            chain.rule(format_args!("-i lo -m mark --mark {looped} -j RETURN"));
        }
        for types in self.own_types() {
            chain.rule(format_args!("-i lo -m addrtype --dst-type {types} -j RETURN"));
        }
        if self.family == Family::V6 {
            chain.rule(format_args!("-i lo -d fe80::/10 -j RETURN"));
        }
        for types in self.own_types() {
            chain.rule(format_args!("! -i lo -m addrtype --src-type {types} -j {refuse}"));
        }
        match self.family {
            // xt_addrtype finds a link-local address only on an interface that it is given.
            Family::V6 => {
                chain.rule(format_args!(
                    "! -i lo -s fe80::/10 -m addrtype --src-type LOCAL --limit-iface-in -j {refuse}"
                ));
                Builder::refuse_reserved(&mut chain, refuse);
            }
            Family::V4 if self.plan.dst.is_some() => {
                chain.rule(format_args!("! -i lo -d 127.0.0.0/8 -j {refuse}"));
                chain.rule(format_args!("-s 0.0.0.0/8 -j {refuse}"));
                chain.rule(format_args!("-d 0.0.0.0/8 -j {refuse}"));
            }
            Family::V4 => {}
        }
        chain.rule(format_args!("{}", self.jump("i")));
        chain
    }

    /// As in the nf_tables rules: IPv6 addresses of ::/80, except ::1 by `lo`.
    fn refuse_reserved(chain: &mut Chain, refuse: &str) {
        for option in ["-s", "-d"] {
            chain.rule(format_args!("! -i lo {option} ::/80 -j {refuse}"));
            chain.rule(format_args!("{option} ::/128 -j {refuse}"));
            chain.rule(format_args!("{option} ::ffff:0:0/96 -j {refuse}"));
        }
    }

    /// The types of addresses that are this host's, or no host's, as `-m addrtype` takes them. For IPv6 it knows no
    /// broadcast, which there is none of, and no packet is of type MULTICAST and another (`match_type6`, xt_addrtype.c).
    fn own_types(&self) -> &'static [&'static str] {
        match self.family {
            Family::V4 => &["LOCAL,BROADCAST,ANYCAST,MULTICAST"],
            Family::V6 => &["LOCAL,ANYCAST", "MULTICAST"],
        }
    }

    fn guards(&self, pre: &mut Chain) {
        // The host's own, redirected on its way out, comes in by lo as if it had been sent here.
        let redirected = self.plan.mode == Mode::Redirect && self.plan.local_output;
        let not = if redirected { " -m conntrack ! --ctstate DNAT" } else { "" };
        let guarded: Vec<Intercept> = self.plan.direct_drops().collect();
        for listener in self.listeners().filter(|listener| guarded.contains(listener)) {
            let Intercept { protocol, port, .. } = listener;
            let to = option("-d", listener);
            let straight = format!("-p {protocol} --dport {port}{to}");
            for types in self.own_types() {
                pre.rule(format_args!("{straight} -m addrtype --dst-type {types}{not} -j DROP"));
            }
            if self.family == Family::V6 && listener.addr.is_none() {
                // Nor does it find a link-local address of this host without an interface; no router forwards to one.
                pre.rule(format_args!("{straight} -d fe80::/10{not} -j DROP"));
            }
        }
    }

    fn candidates(&self, chain: &mut Chain, protocol: Protocol, then: &str) {
        let begins = self.plan.new_only && protocol == Protocol::Tcp;
        let jump = format!("{}{}", if begins { "--syn " } else { "" }, self.jump(then));
        let Some(interfaces) = &self.plan.interfaces else {
            return self.by_ports(chain, "", protocol, &jump);
        };
        let patterns = interfaces.prefixes.iter().map(|prefix| format!("{prefix}+"));
        for name in interfaces.names.iter().cloned().chain(patterns) {
            self.by_ports(chain, &format!("-i {name} "), protocol, &jump);
        }
    }

    fn set_mark(&self, chain: &mut Chain, mark: Mark) {
        chain.rule(format_args!("-j MARK --set-xmark {mark}"));
        chain.rule(format_args!("-j ACCEPT"));
    }

    fn own_output(&self, then: &str) -> Chain {
        let mut chain = self.chain("o");
        // Sockets of the proxy that bear our mark (SO_MARK) are exempt; so is what has a foreign source.
        chain.rule(format_args!("-m mark --mark {} -j RETURN", self.plan.mark));
        if self.plan.may_match_replies(Protocol::Tcp) {
            // As in the nf_tables rules: data has to be of a connection that was accepted.
            chain.rule(format_args!("-p tcp -m conntrack --ctdir REPLY --ctstatus ASSURED -j RETURN"));
            chain.rule(format_args!("-p tcp --tcp-flags SYN,ACK SYN,ACK -m conntrack --ctdir REPLY -j RETURN"));
        }
        if self.plan.may_match_replies(Protocol::Udp) {
            chain.rule(format_args!("-p udp -m conntrack --ctdir REPLY -j RETURN"));
        }
        let own = format!("-m addrtype --src-type LOCAL {}", self.jump(then));
        for protocol in self.protocols() {
            self.by_ports(&mut chain, "", protocol, &own);
        }
        chain
    }

    /// As in the nf_tables rules: packets that this host sends, unless they are redirected.
    fn output(&self) -> Option<Chain> {
        let mut chain = self.chain("out");
        if let Some(mark) = self.plan.loop_mark.filter(|_| self.plan.local_servers) {
            for protocol in self.plan.protocols.iter() {
                chain.rule(format_args!(
                    "-p {protocol} -m conntrack --ctstate NEW -m addrtype ! --src-type LOCAL -m addrtype --dst-type LOCAL -j \
                     CONNMARK --set-xmark {mark}"
                ));
            }
            let reply = format!("-m connmark --mark {mark} -m conntrack --ctdir REPLY {}", self.jump("l"));
            chain.rule(format_args!("{reply}"));
        }
        if self.plan.may_match_replies(Protocol::Udp) {
            chain.rule(format_args!(
                "-p udp -m conntrack --ctstate NEW -m addrtype ! --src-type LOCAL -j CONNMARK --set-xmark {}",
                self.plan.mark
            ));
        }
        if self.plan.local_output && self.plan.mode == Mode::Tproxy {
            chain.rule(format_args!("{}", self.jump("o")));
        }
        (!chain.rules.is_empty()).then_some(chain)
    }

    fn mangle(&self) -> Table {
        let mut pre = self.chain("p");
        let mut chains = Vec::new();
        let mut jumps = vec![("PREROUTING", self.name("p"))];
        self.guards(&mut pre);
        let divert = format!("-m socket --transparent {}", self.jump("d"));
        if self.plan.mode != Mode::Redirect {
            let mut diverted = self.chain("d");
            if self.family == Family::V6 {
                Builder::refuse_reserved(&mut diverted, "DROP");
            }
            self.set_mark(&mut diverted, self.plan.mark);
            chains.push(diverted);
            for protocol in self.plan.protocols.iter() {
                // A new connection that meets an old one in TIME_WAIT is for TPROXY to decide.
                let whole = protocol == Protocol::Tcp && self.plan.mode == Mode::Tproxy;
                let not_new = if whole { " ! --syn" } else { "" };
                pre.rule(format_args!("-p {protocol}{not_new} {divert}"));
            }
        }
        if self.plan.mode == Mode::Tproxy {
            let mut intercept = self.chain("i");
            for listener in self.listeners() {
                let Intercept { protocol, port, .. } = listener;
                let (on, mark) = (option("--on-ip", listener), self.plan.mark);
                intercept.rule(format_args!("-p {protocol} -j TPROXY --on-port {port}{on} --tproxy-mark {mark}"));
            }
            chains.extend([intercept, self.vet("DROP")]);
            self.select(&mut chains, ["s", "t"], "v");
            if let Some(mark) = self.plan.loop_mark.filter(|_| self.plan.local_output) {
                // Several instances may use one mark: each takes only what it selects.
                self.select(&mut chains, ["rs", "rt"], "i");
                let mut looped = self.chain("r");
                self.protocols().for_each(|protocol| self.by_ports(&mut looped, "", protocol, &self.jump("rs")));
                chains.push(looped);
                pre.rule(format_args!("-i lo -m mark --mark {mark} {}", self.jump("r")));
                self.select(&mut chains, ["ls", "lt"], "l");
                chains.push(self.own_output("ls"));
            }
            self.protocols().for_each(|protocol| self.candidates(&mut pre, protocol, "s"));
        }
        if let Some(mark) = self.plan.loop_mark.filter(|_| self.plan.mode != Mode::Redirect) {
            let mut marked = self.chain("l");
            self.set_mark(&mut marked, mark);
            chains.push(marked);
        }
        if let Some(output) = self.output() {
            chains.push(output);
            jumps.push(("OUTPUT", self.name("out")));
        }
        if self.plan.mode != Mode::Redirect {
            // What is said of a transparent socket's packets: `socket` looks for the one that an error quotes.
            pre.rule(format_args!("-p {} {divert}", self.family.icmp_name()));
        }
        chains.push(pre);
        Table { name: "mangle", chains, jumps }
    }

    fn nat(&self) -> Table {
        let (mut pre, mut intercept) = (self.chain("p"), self.chain("i"));
        for Intercept { protocol, port, addr, .. } in self.listeners() {
            match addr {
                Some(IpAddr::V6(addr)) => {
                    intercept.rule(format_args!("-p {protocol} -j DNAT --to-destination [{addr}]:{port}"));
                }
                Some(addr) => intercept.rule(format_args!("-p {protocol} -j DNAT --to-destination {addr}:{port}")),
                None => intercept.rule(format_args!("-p {protocol} -j REDIRECT --to-ports {port}")),
            }
        }
        let mut chains = vec![intercept, self.vet("RETURN")];
        self.select(&mut chains, ["s", "t"], "v");
        self.protocols().for_each(|protocol| self.candidates(&mut pre, protocol, "s"));
        chains.push(pre);
        let mut jumps = vec![("PREROUTING", self.name("p"))];
        if self.plan.local_output {
            self.select(&mut chains, ["ls", "lt"], "i");
            chains.push(self.own_output("ls"));
            jumps.push(("OUTPUT", self.name("o")));
        }
        Table { name: "nat", chains, jumps }
    }

    fn tables(&self) -> Vec<Table> {
        let mut tables = vec![self.mangle()];
        if self.plan.mode == Mode::Redirect {
            tables.push(self.nat());
        }
        tables
    }
}

/// An option with a listener's address, if it has one.
fn option(name: &str, listener: &Intercept) -> impl fmt::Display {
    std::fmt::from_fn(move |f| match listener.addr {
        Some(addr) => write!(f, " {name} {addr}"),
        None => Ok(()),
    })
}

/// The text for a host where nothing is there yet.
pub(crate) fn render(plan: &Plan, family: Family) -> String {
    saved::restore(&plan.name, &Builder { plan, family }.tables(), &Saved::default())
}

/// Makes a family's tables hold the plan.
pub(crate) fn apply(plan: &Plan, family: Family) -> Result<()> {
    tool::apply(&plan.name, family, &Builder { plan, family }.tables())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Config, Listener, Prefix, plan};

    #[test]
    fn iptables_take_a_thousand_prefixes_in_all_lists() {
        let listener = Listener::at("[::]:3129".parse().unwrap(), Protocol::Tcp).unwrap();
        let list = |net: u32, count: u32| {
            (0..count).map(|n| Prefix::from(IpAddr::from((net << 24 | n).to_be_bytes()))).collect::<Vec<_>>()
        };
        let checked = |dst, src, bypass| {
            let config = Config::new([listener]).dst(list(10, dst)).src(list(11, src)).bypass(list(12, bypass));
            check(&plan::make(&config).unwrap()).map_err(|error| error.errno())
        };
        assert_eq!(checked(1000, 0, 0), Ok(()));
        assert_eq!(checked(500, 300, 200), Ok(()));
        for (dst, src, bypass) in [(1001, 0, 0), (0, 1001, 0), (0, 0, 1001), (500, 300, 201)] {
            assert_eq!(checked(dst, src, bypass), Err(libc::EOPNOTSUPP));
        }
    }

    #[test]
    fn chains_of_an_instance_are_named_for_people() {
        assert_eq!(chains_of("web"), "tp-web-*");
        assert_eq!(instance_of("tp-web-p"), Some("web"));
    }
}
