//! Collects the state of the host before any diagnosis. State that could not be read is unknown, not absent.

use std::collections::{HashMap, HashSet};
use std::fs;

use super::findings::Kind;
use super::instances;
use super::probes::{self, Transparency};
use super::procfs::{self, Sysctls};
use crate::backend::holder::{self, Holder};
use crate::backend::nft::table::{self, Table};
use crate::backend::sockets::{self, Listeners};
use crate::backend::xtables::legacy_tables;
use crate::check::inspect::filter::Ruleset;
use crate::check::inspect::routing::{self, Action, Interface, Route, Rule};
use crate::check::inspect::{nft, xtables};
use crate::error::Error;
use crate::model::{Families, Family};
use crate::netlink::{Channel, FirstRead};
use crate::program;
use crate::sys;

/// RT_TABLE_LOCAL: it has a route for every address of the host, and none that the diagnosis needs.
const LOCAL_TABLE: u32 = 255;
/// Bounds: the number of routing tables that are read, the routes per table, and the routes of all tables together. If the
/// last is reached, `FEW_ROUTES` are read of each remaining table.
const TABLES_MAX: usize = 64;
const ROUTES_MAX: usize = 1000;
const FEW_ROUTES: usize = 64;
const ALL_ROUTES_MAX: usize = 8000;

// CAP_*, of `linux/capability.h`.
pub(super) const NET_BIND_SERVICE: u32 = 10;
pub(super) const NET_ADMIN: u32 = 12;
pub(super) const NET_RAW: u32 = 13;

/// State of this process, its network namespace and the kernel.
#[derive(Debug, Default)]
pub(super) struct HostState {
    /// Effective capabilities as a bit set; `None`: unknown.
    pub capabilities: Option<u64>,
    /// Capabilities that no program executed by this process can have (bounding set).
    pub out_of_bounds: Vec<u32>,
    /// `None`: unknown.
    pub initial_user_namespace: Option<bool>,
    /// Effective user and group IDs of the process.
    pub ids: Option<(u32, u32)>,
    /// The capabilities have no effect here: another user namespace owns this network namespace.
    pub powerless: bool,
    /// Descriptor limits of this process and of the owners of this library's tables.
    pub descriptors: Vec<Descriptors>,
    pub kernel: String,
    /// Per family, whether a socket could be made transparent.
    pub transparent: Vec<(Family, Transparency)>,
    /// Features of nf_tables that were tested. A failure includes what the kernel's build says of the feature.
    pub features: Vec<(&'static Kind, Result<(), Error>)>,
    /// Names of the installed iptables variants.
    pub iptables: Vec<&'static str>,
    /// Tables of legacy iptables.
    pub legacy_tables: Vec<String>,
    /// `legacy_tables` is complete.
    pub legacy_known: bool,
    pub rules: Vec<Rule>,
    /// Families whose routing policy rules were read completely.
    pub routed: Families,
    /// Families without policy routing.
    pub unrouted: Families,
    /// Routing tables that rules select, and those of instances, if they could be read. The tables local and main are not
    /// read.
    pub routes: HashMap<(Family, u32), Routes>,
    pub interfaces: Vec<Interface>,
    /// `None`: the rules could not be read.
    pub ruleset: Option<Ruleset>,
    /// Tables of nf_tables; `None`: they could not be read.
    pub tables: Option<Vec<Table>>,
    /// Processes that have the netlink sockets open which own this library's tables, by netlink port.
    pub holders: HashMap<u32, Holder>,
    pub listeners: Option<Listeners>,
    pub sysctls: Sysctls,
    /// Number of packets that the reverse-path filter has dropped.
    pub filtered_by_rp: Option<u64>,
    /// Stopped processes that own tables of this library.
    pub stopped: Vec<u32>,
    /// Descriptions of state that could not be read, with the reasons.
    pub unseen: Vec<String>,
    /// Number of objects that were read: chains, rules, elements, routes, sockets.
    pub objects: usize,
}

/// Routes of a routing table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Routes {
    /// The first routes of the table.
    pub first: Vec<Route>,
    /// `first` is complete.
    pub all: bool,
    /// Whether the table has a local default route; `None`: unknown.
    pub local_default: Option<bool>,
}

impl Routes {
    pub fn of(first: Vec<Route>, all: bool) -> Routes {
        let local_default = first.iter().any(|route| route.is_local() && route.destination.is_none());
        Routes { first, all, local_default: (local_default || all).then_some(local_default) }
    }
}

/// Descriptor limits of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptors {
    pub pid: u32,
    pub soft: u64,
    pub hard: u64,
    /// Number of open descriptors; `None`: unknown (Linux before 6.2, or no permission).
    pub used: Option<u64>,
}

impl Descriptors {
    fn of(pid: u32, directory: &str, soft: u64, hard: u64) -> Descriptors {
        let used = fs::metadata(format!("/proc/{directory}/fd")).ok().map(|found| found.len()).filter(|used| *used > 0);
        Descriptors { pid, soft, hard, used }
    }
}

impl HostState {
    pub fn collect() -> HostState {
        let mut state = HostState::default();
        state.look_at_process();
        for family in Families::ALL.iter() {
            state.transparent.push((family, probes::transparent(family)));
        }
        if state.can_open(libc::NETLINK_ROUTE, "routing") {
            state.look_at_routing();
        }
        if state.can_open(libc::NETLINK_NETFILTER, "nf_tables") {
            state.look_at_nf_tables();
        }
        state.look_at_iptables();
        if state.can_open(libc::NETLINK_SOCK_DIAG, "listening sockets") {
            let listeners = sockets::listeners();
            state.listeners = state.seen("listening sockets", listeners);
            state.note_listeners();
        }
        state.sysctls = Sysctls::read();
        if state.sysctls.text("ipv4/ip_forward").is_none() {
            state.miss(format_args!("sysctls: /proc/sys/net cannot be read"));
        }
        state.filtered_by_rp = fs::read_to_string("/proc/thread-self/net/netstat")
            .ok()
            .and_then(|counted| procfs::netstat(&counted, "TcpExt", "IPReversePathFilter"));
        state
    }

    /// Whether a capability is in effect; `None`: unknown.
    pub fn has(&self, capability: u32) -> Option<bool> {
        self.capabilities.map(|effective| effective & 1 << capability != 0)
    }

    /// Whether a table has a local default route; `None`: unknown.
    pub fn local_default(&self, family: Family, table: u32) -> Option<bool> {
        self.routes.get(&(family, table))?.local_default
    }

    #[inline(never)]
    fn miss(&mut self, what: std::fmt::Arguments<'_>) {
        let what = what.to_string();
        if !self.unseen.contains(&what) {
            self.unseen.push(what);
        }
    }

    fn can_open(&mut self, family: i32, what: &str) -> bool {
        let channel = Channel::open(family);
        self.seen(what, channel).is_some()
    }

    /// Returns the value, or notes that it could not be read.
    fn seen<T>(&mut self, what: &str, seen: sys::Result<T>) -> Option<T> {
        seen.map_err(|e| self.miss(format_args!("{what}: {e}"))).ok()
    }

    /// Returns the objects that were read, and notes if the list is longer.
    fn read<T>(&mut self, what: &str, read: FirstRead<T>) -> Vec<T> {
        self.objects += read.objects;
        if !read.all {
            self.miss(format_args!("{what}: only the first {} were read", read.objects));
        }
        read.found
    }

    fn look_at_process(&mut self) {
        let capabilities = sys::effective_capabilities();
        self.capabilities = self.seen("capabilities", capabilities);
        let out_of_bounds = |capability: &u32| sys::is_in_bounding_set(*capability) == Some(false);
        self.out_of_bounds = [NET_ADMIN, NET_RAW].into_iter().filter(out_of_bounds).collect();
        let ids = fs::read_to_string("/proc/thread-self/uid_map").ok();
        self.initial_user_namespace = ids.map(|ids| procfs::is_initial_user_namespace(&ids));
        self.ids = Some(sys::effective_ids());
        let own = sys::descriptor_limits().map(|(soft, hard)| Descriptors::of(std::process::id(), "self", soft, hard));
        self.descriptors.extend(own);
        self.kernel = sys::kernel_release();
    }

    fn look_at_routing(&mut self) {
        for family in Families::ALL.iter() {
            let families = match routing::rules(family) {
                Ok(read) => {
                    let all = read.all;
                    let rules = self.read(&format!("{family} routing rules"), read);
                    self.rules.extend(rules);
                    // A truncated list does not show which rules are missing.
                    if !all {
                        continue;
                    }
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
            {
                tables.push((rule.family, table));
            }
        }
        self.read_routes(tables);
        let interfaces =
            Channel::open_wide(libc::NETLINK_ROUTE).and_then(|mut channel| routing::interfaces(&mut channel));
        if let Some(read) = self.seen("interfaces", interfaces) {
            self.interfaces = self.read("interfaces", read);
        }
    }

    fn read_routes(&mut self, mut tables: Vec<(Family, u32)>) {
        // In the order in which rules select them: the first tables decide for more packets.
        let mut known = HashSet::new();
        tables.retain(|table| !self.routes.contains_key(table) && known.insert(*table));
        if tables.len() > TABLES_MAX {
            self.miss(format_args!("routes: only {TABLES_MAX} of {} tables were read", tables.len()));
            tables.truncate(TABLES_MAX);
        }
        let mut left = ALL_ROUTES_MAX;
        for (family, table) in tables {
            let what = format!("{family} routes of table {table}");
            let most = left.clamp(FEW_ROUTES, ROUTES_MAX);
            let read = routing::routes(family, table, false, most);
            let Some(read) = self.seen(&what, read) else { continue };
            left = left.saturating_sub(read.objects);
            let all = read.all;
            let mut routes = Routes::of(self.read(&what, read), all);
            if routes.local_default.is_none()
                && let Some(local) = self.seen(&what, routing::routes(family, table, true, most))
            {
                self.objects += local.objects;
                routes.local_default = Routes::of(local.found, local.all).local_default;
            }
            self.routes.insert((family, table), routes);
        }
    }

    fn look_at_nf_tables(&mut self) {
        if self.has(NET_ADMIN) == Some(false) {
            self.miss(format_args!("nf_tables rules and features: reading them needs CAP_NET_ADMIN"));
            return;
        }
        let Some(mut channel) = self.seen("nf_tables", Channel::open(libc::NETLINK_NETFILTER)) else { return };
        self.features = probes::nf_tables(&mut channel);
        if self.features.iter().any(|(_, outcome)| outcome.as_ref().is_err_and(|e| e.errno() == libc::EPERM)) {
            self.powerless = self.has(NET_ADMIN) == Some(true);
            self.features.clear();
            self.miss(format_args!("nf_tables rules and features: reading them needs CAP_NET_ADMIN in the user namespace that owns this network namespace"));
            return;
        }
        self.features.iter_mut().for_each(|(kind, outcome)| explain(kind, outcome, &self.kernel));
        match table::list(&mut channel) {
            Ok((_, tables)) => {
                self.look_at_instances(&tables);
                self.tables = Some(tables);
            }
            Err(e) => return self.miss(format_args!("{e}")),
        }
        let Some(mut read) = self.seen("nf_tables rules", nft::read()) else { return };
        // One port per interception suffices to evaluate the rules of other programs.
        let ports = instances::sample_ports(&read.ruleset);
        let asked = read.ask(&ports);
        let _ = self.seen("nf_tables sets", asked);
        self.objects += read.objects;
        read.cut.iter().for_each(|cut| self.miss(format_args!("{cut}")));
        self.ruleset = Some(read.ruleset);
    }

    /// Reads the routes of the instances' tables, and the state of their owners.
    fn look_at_instances(&mut self, tables: &[Table]) {
        // If other programs have deleted all rules that select these tables, their routes have not been read yet.
        let places = tables.iter().filter_map(|table| Some(table.slot?.table));
        self.read_routes(places.flat_map(|table| Families::ALL.iter().map(move |family| (family, table))).collect());
        let ours = tables.iter().filter(|table| table.slot.is_some());
        let ports: Vec<u32> = ours.filter_map(|table| table.owner_port).collect();
        self.holders = ports.iter().copied().zip(holder::holders(&ports)).collect();
        let mut owners: Vec<u32> =
            self.holders.values().flat_map(Holder::processes).map(|process| process.pid).collect();
        owners.sort_unstable();
        owners.dedup();
        for owner in owners {
            let read = |what: &str| fs::read_to_string(format!("/proc/{owner}/{what}")).unwrap_or_default();
            if procfs::state_of(&read("stat")) == Some('T') {
                self.stopped.push(owner);
            }
            if self.descriptors.iter().all(|known| known.pid != owner)
                && let Some((soft, hard)) = procfs::descriptors(&read("limits"))
            {
                self.descriptors.push(Descriptors::of(owner, &owner.to_string(), soft, hard));
            }
        }
    }

    fn look_at_iptables(&mut self) {
        let installed =
            |name: &&str| program::DIRECTORIES.iter().any(|d| fs::exists(format!("{d}/{name}")).unwrap_or(false));
        self.iptables = ["iptables-nft", "iptables-legacy"].into_iter().filter(installed).collect();
        self.legacy_known = true;
        for family in Families::ALL.iter() {
            let tables = match legacy_tables(family) {
                Ok(tables) => tables,
                Err(e) => {
                    let only_root = matches!(e, sys::Errno(libc::EACCES | libc::EPERM));
                    let why = if only_root { "only root may read the tables" } else { "/proc/net cannot be read" };
                    self.miss(format_args!("legacy {family} iptables: {why}"));
                    self.legacy_known = false;
                    continue;
                }
            };
            for table in tables {
                let chains = xtables::legacy_chains(family, &table);
                if let Some(chains) = self.seen(&format!("legacy {family} iptables, table {table}"), chains) {
                    self.objects += chains.iter().map(|chain| chain.rules.len()).sum::<usize>();
                    self.ruleset.get_or_insert_default().chains.extend(chains);
                }
                self.legacy_tables.push(format!("{family} {table}"));
            }
        }
    }

    fn note_listeners(&mut self) {
        let Some(listeners) = &self.listeners else { return };
        self.objects += listeners.objects;
        for (protocol, why) in listeners.cut.clone() {
            self.miss(format_args!("{protocol} listening sockets: {why}"));
        }
    }
}

/// Adds what the files of the kernel's build say of a missing feature. /proc/config.gz is compressed and not read.
fn explain(kind: &Kind, outcome: &mut Result<(), Error>, kernel: &str) {
    let Err(error) = outcome else { return };
    let Some(module) = kind.fix.strip_prefix("modprobe ") else { return };
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let config = read(format!("/boot/config-{kernel}"));
    let [dep, builtin] = ["dep", "builtin"].map(|list| read(format!("/lib/modules/{kernel}/modules.{list}")));
    let option = format!("CONFIG_{}", module.to_ascii_uppercase());
    if let Some(words) = procfs::availability(&config, &dep, &builtin, &option, module) {
        *error = Error::with(error.errno(), format_args!("{error} ({words})"));
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::inspect::filter::{Condition, Part};

    fn sh(script: &str) {
        let output = std::process::Command::new("sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// In a network namespace of its own.
    fn in_a_network<T: Send>(body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                sys::unshare_network().unwrap();
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Adds so many elements to a set, in pieces that a user namespace's socket takes.
    fn add_elements(set: &str, elements: impl Iterator<Item = String>) {
        let elements: Vec<String> = elements.collect();
        for some in elements.chunks(2000) {
            sh(&format!("nft 'add element {set} {{ {} }}'", some.join(", ")));
        }
    }

    /// What the kernel is asked for of sets does not grow with their elements, and the ports that matter are known.
    #[test]
    fn host_state_does_not_read_large_sets_whole() {
        in_a_network(|| {
            sh("nft 'add table inet fw; add set inet fw pairs { type inet_service . ipv4_addr; }
                add set inet fw ports { type inet_service; }; add set inet fw ranges { type inet_service; flags interval; }
                add chain inet fw c { type filter hook input priority 0; }
                add rule inet fw c tcp dport . ip saddr @pairs accept
                add rule inet fw c tcp dport @ports accept
                add rule inet fw c tcp dport @ranges accept
                add rule inet fw c tcp dport { 443, 8000-8100 } accept
                add chain inet fw p { type filter hook prerouting priority -150; }'
                for port in 80 443 4001 8050 9999; do
                    nft add rule inet fw p tcp dport $port tproxy to :3129 meta mark set 1 accept; done");
            add_elements("inet fw pairs", (0..20_000u32).map(|n| format!("{} . 10.0.{}.1", 1 + n % 60_000, n % 250)));
            add_elements("inet fw ports", (4000..14_000).map(|port: u32| port.to_string()));
            add_elements("inet fw ranges", (0..8000).map(|n: u32| format!("{}-{}", 5 * n + 1, 5 * n + 3)));
            let state = HostState::collect();
            assert!(state.objects < 1500, "{}", state.objects);
            let ruleset = state.ruleset.unwrap();
            let chain = ruleset.chains.iter().find(|chain| chain.name == "c").unwrap();
            let known = |rule: usize, port: u16| match chain.rules[rule].parts.iter().find_map(|part| match part {
                Part::OnlyIf(Condition::PortSet(set)) => Some(*set),
                _ => None,
            }) {
                Some(set) => ruleset.port_sets[set].contains(port),
                None => None,
            };
            assert_eq!([80, 443, 4001, 8050, 9999].map(|port| known(0, port)), [None; 5]);
            assert_eq!(
                [80, 443, 4001, 8050, 9999].map(|port| known(1, port)),
                [false, false, true, true, true].map(Some)
            );
            let in_ranges = [80, 443, 4001, 8050, 9999].map(|port: u16| Some((1..=3).contains(&(port % 5))));
            assert_eq!([80, 443, 4001, 8050, 9999].map(|port| known(2, port)), in_ranges);
            assert_eq!(
                [80, 443, 4001, 8050, 9999].map(|port| known(3, port)),
                [false, true, false, true, false].map(Some)
            );
        });
    }

    #[test]
    fn host_state_beyond_a_bound_is_noted_as_unseen() {
        in_a_network(|| {
            sh("ip link set lo up; ip -6 rule add pref 500 lookup 77; ip rule add pref 500 lookup 77
                ip route add local default dev lo table 77; ip -6 route add local default dev lo table 77
                for a in $(seq 1 1500); do echo route add 10.0.$((a / 250)).$((a % 250)) dev lo table 77; done | ip -batch -
                for a in $(seq 1 1500); do echo route add 2001:db8::$a dev lo table 77; done | ip -6 -batch -");
            let state = HostState::collect();
            for family in Families::ALL.iter() {
                assert_eq!(state.local_default(family, 77), Some(true), "{family}");
                let beginning = format!("{family} routes of table 77: only the first 1");
                assert!(state.unseen.iter().any(|note| note.starts_with(&beginning)), "{:?}", state.unseen);
            }
        });
    }
}
