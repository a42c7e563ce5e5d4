//! What a check looks at, all of it gathered before anything is judged. What could not be seen is not taken for absent.

use std::collections::{HashMap, HashSet};
use std::fs;

use super::findings::Kind;
use super::instances;
use super::probes::{self, Transparency};
use super::procfs::{self, Sysctls};
use crate::backend::holder::{self, Holder};
use crate::backend::nft::table::{self, Table};
use crate::check::inspect::filter::Ruleset;
use crate::check::inspect::routing::{self, Action, Interface, Route, Rule};
use crate::check::inspect::sockets::{self, Listeners};
use crate::check::inspect::{nft, xtables};
use crate::error::Error;
use crate::model::{Families, Family};
use crate::netlink::{Channel, FirstRead};
use crate::program;
use crate::sys;

/// RT_TABLE_LOCAL: it has an entry for every address of the host, and none that matters here.
const LOCAL_TABLE: u32 = 255;
/// More routing tables than this are not read, and of each no more routes; where there are many tables, few of each.
const TABLES_MAX: usize = 64;
const ROUTES_MAX: usize = 1000;
const FEW_ROUTES: usize = 64;
const ALL_ROUTES_MAX: usize = 8000;

// CAP_*, of `linux/capability.h`.
pub(super) const NET_BIND_SERVICE: u32 = 10;
pub(super) const NET_ADMIN: u32 = 12;
pub(super) const NET_RAW: u32 = 13;

/// Everything that was seen.
#[derive(Debug, Default)]
pub(super) struct HostState {
    /// The capabilities in effect, a bit for each; `None`: not known.
    pub capabilities: Option<u64>,
    /// These cannot be had by any program that this one executes.
    pub out_of_bounds: Vec<u32>,
    /// `None`: not known.
    pub initial_user_namespace: Option<bool>,
    /// The user and the group that it runs as.
    pub ids: Option<(u32, u32)>,
    /// The capabilities are no good here: they are of another user namespace than this network's.
    pub powerless: bool,
    /// Of this process, and of the owners of our tables.
    pub descriptors: Vec<Descriptors>,
    pub kernel: String,
    /// By family, whether a socket was made transparent.
    pub transparent: Vec<(Family, Transparency)>,
    /// What nf_tables was tried for, and what the kernel's build says of that which failed.
    pub features: Vec<(&'static Kind, Result<(), Error>)>,
    /// Names of the iptables variants that are installed.
    pub iptables: Vec<&'static str>,
    /// Tables of the legacy variant.
    pub legacy_tables: Vec<String>,
    /// These are all.
    pub legacy_known: bool,
    pub rules: Vec<Rule>,
    /// Families whose rules were read, all of them.
    pub routed: Families,
    /// Families that have no policy routing.
    pub unrouted: Families,
    /// The tables that rules lead to, and those of instances, as far as they could be read; the host's own are not.
    pub routes: HashMap<(Family, u32), Routes>,
    pub interfaces: Vec<Interface>,
    /// `None`: they could not be read.
    pub ruleset: Option<Ruleset>,
    /// The tables of nf_tables; `None`: they could not be read.
    pub tables: Option<Vec<Table>>,
    /// Who has the sockets open that own tables of ours, by their ports.
    pub holders: HashMap<u32, Holder>,
    pub listeners: Option<Listeners>,
    pub sysctls: Sysctls,
    /// Packets that the reverse-path filter has dropped.
    pub filtered_by_rp: Option<u64>,
    /// The owners of our tables that are stopped.
    pub stopped: Vec<u32>,
    /// What could not be seen, and why.
    pub unseen: Vec<String>,
    /// How many objects the kernel was asked for: chains, rules, elements, routes, sockets ...
    pub objects: usize,
}

/// The routes of a table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Routes {
    /// The first of them.
    pub first: Vec<Route>,
    /// These are all.
    pub all: bool,
    /// Whether there is a default route to this host; `None`: not known.
    pub local_default: Option<bool>,
}

impl Routes {
    pub fn of(first: Vec<Route>, all: bool) -> Routes {
        let local_default = first.iter().any(|route| route.is_local() && route.destination.is_none());
        Routes { first, all, local_default: (local_default || all).then_some(local_default) }
    }
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
    fn of(pid: u32, directory: &str, soft: u64, hard: u64) -> Descriptors {
        let used = fs::metadata(format!("/proc/{directory}/fd")).ok().map(|found| found.len()).filter(|used| *used > 0);
        Descriptors { pid, soft, hard, used }
    }
}

impl HostState {
    pub fn collect() -> HostState {
        let mut facts = HostState::default();
        facts.look_at_process();
        for family in Families::ALL.iter() {
            facts.transparent.push((family, probes::transparent(family)));
        }
        if facts.can_open(libc::NETLINK_ROUTE, "routing") {
            facts.look_at_routing();
        }
        if facts.can_open(libc::NETLINK_NETFILTER, "nf_tables") {
            facts.look_at_nf_tables();
        }
        facts.look_at_iptables();
        if facts.can_open(libc::NETLINK_SOCK_DIAG, "listening sockets") {
            let listeners = sockets::listeners();
            facts.listeners = facts.seen("listening sockets", listeners);
            facts.note_listeners();
        }
        facts.sysctls = Sysctls::read();
        if facts.sysctls.text("ipv4/ip_forward").is_none() {
            facts.miss(format_args!("sysctls: /proc/sys/net cannot be read"));
        }
        facts.filtered_by_rp = fs::read_to_string("/proc/thread-self/net/netstat")
            .ok()
            .and_then(|counted| procfs::netstat(&counted, "TcpExt", "IPReversePathFilter"));
        facts
    }

    /// Whether a capability is in effect; `None`: not known.
    pub fn has(&self, capability: u32) -> Option<bool> {
        self.capabilities.map(|effective| effective & 1 << capability != 0)
    }

    /// Whether a table has a default route to this host; `None`: not known.
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

    /// What was seen, or a note that it was not.
    fn seen<T>(&mut self, what: &str, seen: sys::Result<T>) -> Option<T> {
        seen.map_err(|e| self.miss(format_args!("{what}: {e}"))).ok()
    }

    /// What was read of a list, and a note if that was not all.
    fn read<T>(&mut self, what: &str, read: FirstRead<T>) -> Vec<T> {
        self.objects += read.objects;
        if !read.all {
            self.miss(format_args!("{what}: all but the first {}", read.objects));
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
                    // Of a list that was cut nobody can say what is not in it.
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
        // In the order in which rules name them: the first decide for more packets.
        let mut known = HashSet::new();
        tables.retain(|table| !self.routes.contains_key(table) && known.insert(*table));
        if tables.len() > TABLES_MAX {
            self.miss(format_args!("routes: there are {} tables; {TABLES_MAX} were read", tables.len()));
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
            self.miss(format_args!("nf_tables rules, and what nf_tables can do: that takes CAP_NET_ADMIN"));
            return;
        }
        let Some(mut channel) = self.seen("nf_tables", Channel::open(libc::NETLINK_NETFILTER)) else { return };
        self.features = probes::nf_tables(&mut channel);
        if self.features.iter().any(|(_, outcome)| outcome.as_ref().is_err_and(|e| e.errno() == libc::EPERM)) {
            self.powerless = self.has(NET_ADMIN) == Some(true);
            self.features.clear();
            self.miss(format_args!("nf_tables rules, and what nf_tables can do: that takes CAP_NET_ADMIN here"));
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
        // A port of each interception is enough to follow it through the rules of others.
        let ports = instances::sample_ports(&read.ruleset);
        let asked = read.ask(&ports);
        let _ = self.seen("nf_tables sets", asked);
        self.objects += read.objects;
        read.cut.iter().for_each(|cut| self.miss(format_args!("{cut}")));
        self.ruleset = Some(read.ruleset);
    }

    /// The places of our tables, and their owners.
    fn look_at_instances(&mut self, tables: &[Table]) {
        // Where others have deleted all rules that lead there, the routes have not been read.
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
            let tables = match xtables::legacy_tables(family) {
                Ok(tables) => tables,
                Err(e) => {
                    let only_root = matches!(e, sys::Errno(libc::EACCES | libc::EPERM));
                    let why = if only_root { "only root may look" } else { "/proc/net cannot be read" };
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

/// Adds what the kernel's build says of what it lacks, as far as there is something to read (not /proc/config.gz,
/// which is compressed).
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
            let facts = HostState::collect();
            assert!(facts.objects < 1500, "{}", facts.objects);
            let ruleset = facts.ruleset.unwrap();
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
            let facts = HostState::collect();
            for family in Families::ALL.iter() {
                assert_eq!(facts.local_default(family, 77), Some(true), "{family}");
                let beginning = format!("{family} routes of table 77: all but the first 1");
                assert!(facts.unseen.iter().any(|note| note.starts_with(&beginning)), "{:?}", facts.unseen);
            }
        });
    }
}
