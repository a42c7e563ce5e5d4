//! What a check looks at, all of it gathered before anything is judged.

use super::findings::Kind;
use super::probes;
use super::procfs::{self, Capabilities, Sysctls};
use crate::backend::nft::table::{self, Table};
use crate::backend::seen::filter::Chain;
use crate::backend::seen::routing::{Action, Interface, Route, Rule};
use crate::backend::seen::sockets::Listener;
use crate::backend::seen::{nft, routing, sockets, xtables};
use crate::error::Error;
use crate::list::List;
use crate::model::{Families, Family};
use crate::netlink::Channel;
use crate::program;
use crate::sys;
use crate::text::Owned;

/// RT_TABLE_LOCAL: it has an entry for every address of the host, and none that matters here.
const LOCAL_TABLE: u32 = 255;
/// More routing tables than this are not read, for want of time.
const TABLES_MAX: usize = 64;

/// Everything that was seen.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub capabilities: Capabilities,
    pub initial_user_namespace: bool,
    pub program: String,
    /// The capabilities are no good here: they are of another user namespace than this network's.
    pub powerless: bool,
    /// Of this process, and of the owners of our tables.
    pub descriptors: Vec<Descriptors>,
    pub kernel: String,
    /// By family, whether a socket was made transparent.
    pub transparent: Vec<(Family, Result<(), Error>)>,
    /// What nf_tables was tried for, and what the kernel's build says of that which failed.
    pub features: Vec<(&'static Kind, Result<(), Error>)>,
    /// Names of the iptables variants that are installed.
    pub iptables: Vec<&'static str>,
    /// Tables of the legacy variant.
    pub legacy_tables: Vec<String>,
    pub rules: Vec<Rule>,
    /// Families whose rules were read.
    pub routed: Families,
    /// Families that have no policy routing.
    pub unrouted: Families,
    /// The routes of the tables that rules lead to, but for the host's own addresses.
    pub routes: Vec<Route>,
    pub interfaces: Vec<Interface>,
    /// `None`: they could not be read.
    pub chains: Option<Vec<Chain>>,
    pub tables: Vec<Table>,
    pub listeners: Option<Vec<Listener>>,
    pub sysctls: Sysctls,
    /// Packets that the reverse-path filter has dropped.
    pub filtered_by_rp: u64,
    /// The owners of our tables that are stopped.
    pub stopped: Vec<u32>,
    /// What could not be seen, and why.
    pub unseen: Vec<String>,
}

/// The descriptors that a process may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptors {
    pub pid: u32,
    pub soft: u64,
    pub hard: u64,
    /// How many it has; `None`: the kernel does not say (before 6.2), or not to us.
    pub used: Option<u64>,
}

impl Descriptors {
    fn of(pid: u32, soft: u64, hard: u64) -> Descriptors {
        let used = sys::file_size(&format!("/proc/{pid}/fd")).filter(|used| *used > 0);
        Descriptors { pid, soft, hard, used }
    }
}

impl Facts {
    pub fn gather() -> Facts {
        let mut facts = Facts::default();
        facts.look_at_process();
        for family in Families::ALL.iter() {
            facts.transparent.push((family, probes::transparent(family)));
        }
        if let Some(mut channel) = facts.open(libc::NETLINK_ROUTE, "routing") {
            facts.look_at_routing(&mut channel);
        }
        if let Some(mut channel) = facts.open(libc::NETLINK_NETFILTER, "nf_tables") {
            facts.look_at_nf_tables(&mut channel);
        }
        facts.look_at_iptables();
        if let Some(mut channel) = facts.open(libc::NETLINK_SOCK_DIAG, "listening sockets") {
            let listeners = sockets::listeners(&mut channel);
            facts.listeners = facts.seen("listening sockets", listeners);
        }
        facts.sysctls = Sysctls::read(&facts.interfaces);
        if facts.sysctls.text("ipv4/ip_forward").is_none() {
            facts.miss(format_args!("sysctls: /proc/sys/net cannot be read"));
        }
        let counted = sys::read("/proc/thread-self/net/netstat").unwrap_or_default();
        facts.filtered_by_rp = procfs::netstat(&counted, "TcpExt", "IPReversePathFilter").unwrap_or(0);
        facts
    }

    #[inline(never)]
    fn miss(&mut self, what: std::fmt::Arguments<'_>) {
        self.unseen.push(what.to_string());
    }

    fn open(&mut self, family: i32, what: &str) -> Option<Channel> {
        let channel = Channel::open(family);
        self.seen(what, channel)
    }

    /// What was seen, or a note that it was not.
    fn seen<T>(&mut self, what: &str, seen: sys::Result<T>) -> Option<T> {
        seen.map_err(|e| self.miss(format_args!("{what}: {e}"))).ok()
    }

    fn look_at_process(&mut self) {
        let status = sys::read("/proc/thread-self/status");
        let status = self.seen("capabilities: /proc/thread-self/status", status).unwrap_or_default();
        self.capabilities = Capabilities::parse(&status).unwrap_or_default();
        let ids = sys::read("/proc/thread-self/uid_map").unwrap_or_default();
        self.initial_user_namespace = procfs::is_initial_user_namespace(&ids);
        self.program = sys::link_of("/proc/self/exe").unwrap_or_else(|| "PROGRAM".owned());
        let own = sys::descriptor_limits().map(|(soft, hard)| Descriptors::of(std::process::id(), soft, hard));
        self.descriptors.extend(own);
        let kernel = sys::read("/proc/sys/kernel/osrelease").unwrap_or_default();
        self.kernel = kernel.trim().owned();
    }

    fn look_at_routing(&mut self, channel: &mut Channel) {
        for family in Families::ALL.iter() {
            let families = match routing::rules(channel, family) {
                Ok(rules) => {
                    self.rules.extend(rules);
                    &mut self.routed
                }
                Err(sys::Errno(libc::EOPNOTSUPP)) => &mut self.unrouted,
                Err(e) => {
                    self.miss(format_args!("{family} routing rules: {e}"));
                    continue;
                }
            };
            match family {
                Family::V4 => families.v4 = true,
                Family::V6 => families.v6 = true,
            }
        }
        let mut tables: Vec<(Family, u32)> = Vec::new();
        for rule in &self.rules {
            if let Action::Lookup(table) = rule.action
                && table != LOCAL_TABLE
                && table != u32::from(libc::RT_TABLE_MAIN)
                && !tables.contains(&(rule.family, table))
            {
                tables.push((rule.family, table));
            }
        }
        self.read_routes(tables);
        let interfaces = routing::interfaces(channel);
        self.interfaces = self.seen("interfaces", interfaces).unwrap_or_default();
    }

    fn read_routes(&mut self, mut tables: Vec<(Family, u32)>) {
        if tables.len() > TABLES_MAX {
            self.miss(format_args!("routes: there are {} tables; {TABLES_MAX} were read", tables.len()));
            tables.truncate(TABLES_MAX);
        }
        for (family, table) in tables {
            let what = format!("{family} routes of table {table}");
            let routes = routing::routes(family, table);
            let Some((routes, all)) = self.seen(&what, routes) else { continue };
            if !all {
                self.miss(format_args!("{what}: all but the first {}", routes.len()));
            }
            self.routes.extend(routes);
        }
    }

    fn look_at_nf_tables(&mut self, channel: &mut Channel) {
        if !self.capabilities.has(Capabilities::NET_ADMIN) {
            self.miss(format_args!("nf_tables rules, and what nf_tables can do: that takes CAP_NET_ADMIN"));
            return;
        }
        self.features = probes::nf_tables(channel);
        if self.features.iter().any(|(_, outcome)| outcome.as_ref().is_err_and(|e| e.errno() == libc::EPERM)) {
            self.powerless = true;
            self.features.clear();
            self.miss(format_args!("nf_tables rules, and what nf_tables can do: that takes CAP_NET_ADMIN here"));
            return;
        }
        self.features.iter_mut().for_each(|(kind, outcome)| explain(kind, outcome, &self.kernel));
        match table::list(channel) {
            Ok((_, tables)) => self.tables = tables,
            Err(e) => return self.miss(format_args!("{e}")),
        }
        let chains = nft::chains(channel);
        self.chains = self.seen("nf_tables rules", chains);
        self.look_at_instances();
    }

    /// The places of our tables, and their owners.
    fn look_at_instances(&mut self) {
        // Where others have deleted all rules that lead there, the routes have not been read.
        let places = self.tables.iter().filter_map(|table| Some(table.place?.table));
        let unread = places.filter(|table| self.routes.iter().all(|route| route.table != *table));
        let tables = unread.flat_map(|table| Families::ALL.iter().map(move |family| (family, table))).list();
        self.read_routes(tables);
        for owner in self.tables.iter().filter_map(|table| table.owner) {
            let read = |what: &str| sys::read(&format!("/proc/{owner}/{what}")).unwrap_or_default();
            if procfs::state_of(&read("stat")) == Some('T') {
                self.stopped.push(owner);
            }
            if self.descriptors.iter().all(|known| known.pid != owner)
                && let Some((soft, hard)) = procfs::descriptors(&read("limits"))
            {
                self.descriptors.push(Descriptors::of(owner, soft, hard));
            }
        }
    }

    fn look_at_iptables(&mut self) {
        let installed =
            |name: &&str| program::DIRECTORIES.iter().any(|d| sys::file_size(&format!("{d}/{name}")).is_some());
        self.iptables = ["iptables-nft", "iptables-legacy"].into_iter().filter(installed).list();
        for family in Families::ALL.iter() {
            let Some(tables) = xtables::legacy_tables(family) else {
                self.miss(format_args!("legacy {family} iptables: only root may look"));
                continue;
            };
            for table in tables {
                let chains = xtables::legacy_chains(family, &table);
                if let Some(chains) = self.seen(&format!("legacy {family} iptables, table {table}"), chains) {
                    self.chains.get_or_insert_default().extend(chains);
                }
                self.legacy_tables.push(format!("{family} {table}"));
            }
        }
    }
}

/// Adds what the kernel's build says of what it lacks, as far as there is something to read (not /proc/config.gz,
/// which is compressed).
fn explain(kind: &Kind, outcome: &mut Result<(), Error>, kernel: &str) {
    let Err(error) = outcome else { return };
    let Some(module) = kind.cure.strip_prefix("modprobe ") else { return };
    let read = |path: String| sys::read(&path).unwrap_or_default();
    let config = read(format!("/boot/config-{kernel}"));
    let [dep, builtin] = ["dep", "builtin"].map(|list| read(format!("/lib/modules/{kernel}/modules.{list}")));
    let option = format!("CONFIG_{}", module.to_ascii_uppercase());
    if let Some(words) = procfs::availability(&config, &dep, &builtin, &option, module) {
        *error = Error::with(error.errno(), format_args!("{error} ({words})"));
    }
}
