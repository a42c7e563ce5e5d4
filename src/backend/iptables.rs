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
use crate::plan::{ByProtocol, Intercept, Interfaces, Plan};
use crate::ports;
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
    let sets = plan.dst.iter().chain(&plan.src).chain(&plan.bypass).chain(&plan.bypass_src);
    let others = plan.macs.as_ref().map_or(0, Vec::len) + plan.bypass_macs.len();
    let interfaces = plan.interfaces.iter().chain([&plan.bypass_interfaces]);
    if let Some(name) = interfaces.flat_map(|i| &i.names).find(|name| name.ends_with('+')) {
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
    } else if sets.map(PrefixSet::len).sum::<usize>() + others > PREFIXES_MAX {
        unsupported("looks at prefixes and Ethernet addresses one by one, at most 1000 of them: more need nf_tables")
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

    /// The ports of a protocol that are intercepted, without those that are refused. `None`: every port.
    fn ports(&self, protocol: Protocol) -> Option<Vec<PortRange>> {
        ports::subtract(self.plan.ports.of(protocol).as_deref(), self.plan.reject.of(protocol))
    }

    /// A rule for each range of ports, or for every port, with matches before and behind.
    fn by_ports(chain: &mut Chain, before: &str, protocol: Protocol, ports: Option<&[PortRange]>, behind: &str) {
        let Some(ports) = ports else {
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

    /// Options that match packets of these interfaces.
    fn arrivals(interfaces: &Interfaces) -> impl Iterator<Item = String> {
        let patterns = interfaces.prefixes.iter().map(|prefix| format!("-i {prefix}+"));
        interfaces.names.iter().map(|name| format!("-i {name}")).chain(patterns)
    }

    /// `sources` and `destinations`, ending in a jump. Packets that arrived (`s`) may be selected by how they did.
    fn select(&self, chains: &mut Vec<Chain>, [sources, destinations]: [&str; 2], then: &str) {
        let (mut from, mut to) = (self.chain(sources), self.chain(destinations));
        let (selected, jump) = (self.jump(destinations), self.jump(then));
        let mut by_mac = None;
        if sources == "s" {
            for arrival in Builder::arrivals(&self.plan.bypass_interfaces) {
                from.rule(format_args!("{arrival} -j RETURN"));
            }
            for mac in &self.plan.bypass_macs {
                from.rule(format_args!("-m mac --mac-source {mac} -j RETURN"));
            }
            if let Some(macs) = &self.plan.macs {
                for mac in macs {
                    from.rule(format_args!("-m mac --mac-source {mac} {}", self.jump("m")));
                }
                by_mac = Some(self.chain("m"));
            }
        }
        let from_addresses = by_mac.as_mut().unwrap_or(&mut from);
        if let Some(bypass) = &self.plan.bypass_src {
            self.by_prefixes(from_addresses, "-s", bypass, "-j RETURN");
        }
        match &self.plan.src {
            Some(src) => self.by_prefixes(from_addresses, "-s", src, &selected),
            None => from_addresses.rule(format_args!("{selected}")),
        }
        if let Some(bypass) = &self.plan.bypass {
            self.by_prefixes(&mut to, "-d", bypass, "-j RETURN");
        }
        if sources == "s" {
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
        chains.push(to);
        chains.extend(by_mac);
        chains.push(from);
    }

    /// As in the nf_tables rules: leaves alone replies of connections that others began.
    fn return_replies(&self, chain: &mut Chain) {
        let tracked = self.plan.candidate_protocols().filter(|protocol| self.plan.may_match_replies(*protocol));
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
            Family::V4 => {
                if self.plan.dst.is_some() {
                    chain.rule(format_args!("! -i lo -d 127.0.0.0/8 -j {refuse}"));
                    chain.rule(format_args!("-s 0.0.0.0/8 -j {refuse}"));
                }
                chain.rule(format_args!("-d 0.0.0.0/8 -j {refuse}"));
            }
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

    /// Packets of a protocol to these ports, by the interfaces.
    fn candidates(&self, chain: &mut Chain, protocol: Protocol, ports: Option<&[PortRange]>) {
        let begins = self.plan.new_only && protocol == Protocol::Tcp;
        let jump = format!("{}{}", if begins { "--syn " } else { "" }, self.jump("s"));
        let Some(interfaces) = &self.plan.interfaces else {
            return Builder::by_ports(chain, "", protocol, ports, &jump);
        };
        for arrival in Builder::arrivals(interfaces) {
            Builder::by_ports(chain, &format!("{arrival} "), protocol, ports, &jump);
        }
    }

    /// Whose packets are selected, of those that this host sends; ends in a jump to "ls".
    fn owners(&self, chains: &mut Vec<Chain>) {
        let owners = &self.plan.owners;
        let mut next = "ls";
        if let Some(cgroups) = &owners.cgroups {
            let mut chain = self.chain("oc");
            for cgroup in cgroups {
                chain.rule(format_args!("-m cgroup --path \"{}\" {}", cgroup.path, self.jump(next)));
            }
            chains.push(chain);
            next = "oc";
        }
        if let Some(gids) = &owners.gids {
            let mut chain = self.chain("og");
            for gid in gids {
                chain.rule(format_args!("-m owner --gid-owner {gid} {}", self.jump(next)));
            }
            chains.push(chain);
            next = "og";
        }
        let mut chain = self.chain("ou");
        for uid in &owners.bypass_uids {
            chain.rule(format_args!("-m owner --uid-owner {uid} -j RETURN"));
        }
        for gid in &owners.bypass_gids {
            chain.rule(format_args!("-m owner --gid-owner {gid} -j RETURN"));
        }
        for cgroup in &owners.bypass_cgroups {
            chain.rule(format_args!("-m cgroup --path \"{}\" -j RETURN", cgroup.path));
        }
        if let Some(mark) = owners.bypass_mark {
            chain.rule(format_args!("-m mark --mark {mark} -j RETURN"));
        }
        match &owners.uids {
            Some(uids) => {
                for uid in uids {
                    chain.rule(format_args!("-m owner --uid-owner {uid} {}", self.jump(next)));
                }
            }
            None => chain.rule(format_args!("{}", self.jump(next))),
        }
        chains.push(chain);
    }

    fn set_mark(&self, chain: &mut Chain, mark: Mark) {
        chain.rule(format_args!("-j MARK --set-xmark {mark}"));
        chain.rule(format_args!("-j ACCEPT"));
    }

    /// Packets that this host sends, to ports of each protocol; of those that are selected, "ls" decides.
    fn own_output(&self, chains: &mut Vec<Chain>, ports: impl Fn(Protocol) -> Option<Vec<PortRange>>) {
        let everyone = self.plan.owners.is_everyone();
        if !everyone {
            self.owners(chains);
        }
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
        let own = format!("-m addrtype --src-type LOCAL {}", self.jump(if everyone { "ls" } else { "ou" }));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            Builder::by_ports(&mut chain, "", protocol, ports(protocol).as_deref(), &own);
        }
        chains.push(chain);
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
            if let Some(mark) = self.kept_mark() {
                chain.rule(format_args!(
                    "-m connmark --mark {mark} -m conntrack --ctdir ORIGINAL -m addrtype --src-type LOCAL {}",
                    self.jump("l")
                ));
            }
            chain.rule(format_args!("{}", self.jump("o")));
        }
        (!chain.rules.is_empty()).then_some(chain)
    }

    /// The mark of connections that were selected by their owner, as in the nf_tables rules.
    fn kept_mark(&self) -> Option<Mark> {
        self.plan.loop_mark.filter(|_| self.plan.owners.narrow())
    }

    /// The ports of a protocol that are intercepted over this family; none if it is not served.
    fn served_ports(&self, protocol: Protocol) -> Option<Vec<PortRange>> {
        match self.protocols().any(|served| served == protocol) {
            true => self.ports(protocol),
            false => Some(Vec::new()),
        }
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
                for protocol in self.protocols() {
                    let ports = self.ports(protocol);
                    Builder::by_ports(&mut looped, "", protocol, ports.as_deref(), &self.jump("rs"));
                }
                chains.push(looped);
                pre.rule(format_args!("-i lo -m mark --mark {mark} {}", self.jump("r")));
                self.select(&mut chains, ["ls", "lt"], "l");
                self.own_output(&mut chains, |protocol| self.served_ports(protocol));
            }
            for protocol in self.protocols() {
                self.candidates(&mut pre, protocol, self.ports(protocol).as_deref());
            }
        }
        if let Some(mark) = self.plan.loop_mark.filter(|_| self.plan.mode != Mode::Redirect) {
            let mut marked = self.chain("l");
            if let Some(mark) = self.kept_mark() {
                marked.rule(format_args!("-j CONNMARK --set-xmark {mark}"));
            }
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
        for protocol in self.protocols() {
            self.candidates(&mut pre, protocol, self.ports(protocol).as_deref());
        }
        chains.push(pre);
        let mut jumps = vec![("PREROUTING", self.name("p"))];
        if self.plan.local_output {
            self.select(&mut chains, ["ls", "lt"], "i");
            self.own_output(&mut chains, |protocol| self.served_ports(protocol));
            jumps.push(("OUTPUT", self.name("o")));
        }
        Table { name: "nat", chains, jumps }
    }

    /// Refuses packets to some ports. Only this table has REJECT.
    fn filter(&self) -> Table {
        let (mut refused, mut arrived) = (self.chain("x"), self.chain("p"));
        let unreachable = match self.family {
            Family::V4 => "icmp-port-unreachable",
            Family::V6 => "icmp6-port-unreachable",
        };
        refused.rule(format_args!("-p tcp -j REJECT --reject-with tcp-reset"));
        refused.rule(format_args!("-j REJECT --reject-with {unreachable}"));
        let mut chains = vec![refused];
        self.select(&mut chains, ["s", "t"], "x");
        // What this host sends to itself is left alone.
        arrived.rule(format_args!("-i lo -j RETURN"));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            self.candidates(&mut arrived, protocol, Some(self.plan.reject.of(protocol)));
        }
        chains.push(arrived);
        // To an address of this host, which dst may name, it is not forwarded.
        let mut jumps = vec![("FORWARD", self.name("p")), ("INPUT", self.name("p"))];
        if self.plan.local_output {
            self.select(&mut chains, ["ls", "lt"], "x");
            self.own_output(&mut chains, |protocol| Some(self.plan.reject.of(protocol).clone()));
            jumps.push(("OUTPUT", self.name("o")));
        }
        Table { name: "filter", chains, jumps }
    }

    fn tables(&self) -> Vec<Table> {
        let mut tables = vec![self.mangle()];
        if self.plan.mode == Mode::Redirect {
            tables.push(self.nat());
        }
        if self.plan.reject != ByProtocol::default() {
            tables.push(self.filter());
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
