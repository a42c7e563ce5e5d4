//! Derives findings from the state of the host, without access to the kernel. Each file checks one part.

/// Adds a finding with a severity, a kind and a formatted message.
macro_rules! report {
    ($found:expr, $severity:expr, $kind:expr, $($words:tt)+) => {
        $found.push($severity, $kind, format_args!($($words)+))
    };
}

mod commands;
mod filters;
mod host;
mod listeners;
mod routing;
mod sysctls;

use std::collections::{HashMap, HashSet};

use super::eval::Chains;
use super::findings::{self, Finding, Findings, Severity};
use super::host_state::HostState;
use super::instances::{self, Instance, Interception};
use crate::check::inspect::filter::{Chain, Rule, Ruleset};

/// Maximum number of findings of one kind that are reported.
const OF_A_KIND_MAX: usize = 100;

/// State of the host, and the instances and interceptions derived from it.
struct Context<'a> {
    host: &'a HostState,
    ruleset: &'a Ruleset,
    chains: Chains<'a>,
    instances: Vec<Instance>,
    /// Index of each instance, by name.
    numbers: HashMap<String, usize>,
    interceptions: Vec<Interception<'a>>,
}

/// Returns all findings, those of the host first, each once.
pub(super) fn diagnose(host: &HostState) -> Vec<Finding> {
    let nothing = Ruleset::default();
    let context = Context::new(host, host.ruleset.as_ref().unwrap_or(&nothing));
    let mut found = Findings::default();
    for diagnose in [
        host::check_host,
        listeners::check_listeners,
        routing::check_routing,
        sysctls::check_sysctls,
        filters::check_filters,
    ] {
        diagnose(&context, &mut found);
    }
    once(found.0)
}

/// Removes duplicate findings, and limits the number per kind.
fn once(found: Vec<Finding>) -> Vec<Finding> {
    let (mut fixed, mut reported) = (HashSet::new(), HashSet::new());
    let mut counts: Vec<(&str, usize)> = Vec::new();
    let mut findings: Vec<Finding> = Vec::new();
    for finding in found {
        // One command often fixes both families.
        let known = match finding.fix.is_empty() {
            true => !reported.insert((finding.kind.id, finding.severity, finding.message.clone())),
            false => !fixed.insert((finding.kind.id, finding.fix.clone())),
        };
        if known {
            continue;
        }
        let at = counts.iter().position(|(id, _)| *id == finding.kind.id).unwrap_or_else(|| {
            counts.push((finding.kind.id, 0));
            counts.len() - 1
        });
        let Some((_, count)) = counts.get_mut(at) else { continue };
        *count += 1;
        if *count <= OF_A_KIND_MAX {
            findings.push(finding);
        }
    }
    let mut more = Findings(findings);
    for (id, count) in counts.into_iter().filter(|(_, count)| *count > OF_A_KIND_MAX) {
        let left = count - OF_A_KIND_MAX;
        report!(more, Severity::Note, findings::UNSEEN, "{left} more findings of this kind: {id}");
    }
    more.0
}

impl<'a> Context<'a> {
    fn new(host: &'a HostState, ruleset: &'a Ruleset) -> Context<'a> {
        let tables = host.tables.as_deref().unwrap_or_default();
        let instances = instances::instances(tables, &ruleset.chains, &host.holders);
        let numbers = instances.iter().map(|instance| instance.name.clone()).zip(0..).collect();
        let interceptions = instances::interceptions(ruleset);
        Context { host, ruleset, chains: Chains::new(ruleset), instances, numbers, interceptions }
    }

    fn ruleset(&self) -> &'a Ruleset {
        self.ruleset
    }

    fn instance_named(&self, name: &str) -> Option<&Instance> {
        self.instances.get(*self.numbers.get(name)?)
    }

    fn instance(&self, interception: &Interception<'_>) -> Option<&Instance> {
        self.instance_named(interception.instance?)
    }

    /// Whether any rule intercepts packets.
    fn intercepts(&self) -> bool {
        !self.interceptions.is_empty()
    }

    /// Returns every rule with its chain.
    fn rules(&self) -> impl Iterator<Item = (&'a Chain, &'a Rule)> {
        self.ruleset.chains.iter().flat_map(|chain| chain.rules.iter().map(move |rule| (chain, rule)))
    }

    /// Returns the chains that this library did not create.
    fn others(&self) -> impl Iterator<Item = &'a Chain> {
        self.ruleset.chains.iter().filter(|chain| !instances::is_ours(chain))
    }
}

/// Returns the option of `ip` for a family.
fn flag(family: crate::model::Family) -> &'static str {
    match family {
        crate::model::Family::V4 => "-4",
        crate::model::Family::V6 => "-6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::holder::{Holder, Process};
    use crate::backend::nft::table::{RoutingSlot, Table};
    use crate::backend::sockets::{Listener, Listeners};
    use crate::check::host_state::{Descriptors, Routes};
    use crate::check::inspect::filter::{Condition, Hook, HookPoint, Origin, Part, PortSet, Verdict};
    use crate::check::inspect::routing::{self, Action, Interface, Route};
    use crate::check::procfs::Sysctls;
    use crate::model::{Families, Family, Mark, Protocol};
    use crate::name::Name;
    use proptest::prelude::*;

    fn family() -> impl Strategy<Value = Family> {
        prop_oneof![Just(Family::V4), Just(Family::V6)]
    }

    fn mark() -> impl Strategy<Value = Mark> {
        (prop_oneof![Just(0x2000), Just(1), any::<u32>()], prop_oneof![Just(0x3000), Just(u32::MAX), any::<u32>()])
            .prop_map(|(value, mask)| Mark { value: value & mask, mask })
    }

    fn name() -> impl Strategy<Value = Name> {
        prop_oneof![
            Just(Name::from("divert")),
            Just(Name::from("tp-tproxy-p")),
            Just(Name::from("tp-é-")),
            Just(Name::from("PREROUTING")),
            "[a-z]{0,2}".prop_map(|name| Name::from(name.as_str())),
            proptest::collection::vec(any::<u8>(), 0..8).prop_map(|bytes| Name::new(&bytes)),
        ]
    }

    fn processes(of: Vec<(u32, Name)>) -> Holder {
        Holder::Processes(of.into_iter().map(|(pid, name)| Process { pid, name }).collect())
    }

    fn condition() -> impl Strategy<Value = Condition> {
        prop_oneof![
            family().prop_map(Condition::Family),
            any::<u8>().prop_map(Condition::Protocol),
            any::<(u16, u16)>().prop_map(|(first, last)| Condition::Ports(first, last)),
            (0..3usize).prop_map(Condition::PortSet),
            mark().prop_map(|Mark { value, mask }| Condition::Mark { mask, value }),
            Just(Condition::Loopback),
            Just(Condition::TransparentSocket),
            any::<bool>().prop_map(|mark| Condition::RpFilterMiss { mark }),
            any::<Option<u32>>().prop_map(|states| Condition::Connection { states }),
            Just(Condition::Other),
        ]
    }

    fn part() -> impl Strategy<Value = Part> {
        prop_oneof![
            condition().prop_map(Part::OnlyIf),
            condition().prop_map(Part::OnlyIfNot),
            any::<(u32, Option<u32>)>().prop_map(|(keep, set)| Part::SetMark { keep, set }),
            (any::<Option<std::net::IpAddr>>(), any::<u16>()).prop_map(|(addr, port)| Part::Tproxy {
                family: None,
                addr,
                port
            }),
            any::<Option<std::net::IpAddr>>().prop_map(Part::TranslateDestination),
            any::<Option<u16>>().prop_map(Part::Redirect),
            Just(Part::TranslateSource),
            prop_oneof![
                Just(Verdict::Accept),
                Just(Verdict::Drop),
                Just(Verdict::Return),
                Just(Verdict::Other),
                name().prop_map(Verdict::Jump),
                name().prop_map(Verdict::Goto),
            ]
            .prop_map(Part::Verdict),
        ]
    }

    fn chain() -> impl Strategy<Value = Chain> {
        let hook = (0..5u32, -400..400i32)
            .prop_map(|(number, priority)| HookPoint::of_number(number).map(|point| Hook { point, priority }));
        let origin = prop_oneof![Just(Origin::Nft), Just(Origin::IptablesNft), Just(Origin::IptablesLegacy)];
        let rules = proptest::collection::vec(proptest::collection::vec(part(), 0..5), 0..5);
        let table = prop_oneof![Just(Name::from("libtproxy-tproxy")), Just(Name::from("mangle")), name()];
        (origin, proptest::option::of(family()), table, name(), prop_oneof![hook, Just(None)], any::<bool>(), rules)
            .prop_map(|(origin, family, table, name, hook, drops, rules)| Chain {
                origin,
                family,
                table,
                name,
                hook,
                drops,
                rules: rules
                    .into_iter()
                    .zip(1..)
                    .map(|(parts, number)| Rule { handle: number as u64, number, parts })
                    .collect(),
                cut: false,
            })
    }

    fn rule() -> impl Strategy<Value = routing::Rule> {
        let number = || prop_oneof![Just(0), Just(200), Just(201), Just(7470), Just(254), Just(255), any::<u32>()];
        let action = prop_oneof![
            number().prop_map(Action::Lookup),
            number().prop_map(Action::Goto),
            Just(Action::Nop),
            Just(Action::Blackhole)
        ];
        let flags = any::<(bool, bool, bool)>();
        let protocol = prop_oneof![Just(116u8), any::<u8>()];
        let incoming = proptest::option::of(prop_oneof![Just(Name::from("lo")), Just(Name::from("eth0")), name()]);
        let others = prop_oneof![Just(Vec::new()), name().prop_map(|name| vec![("oif", name)])];
        (family(), number(), protocol, action, proptest::option::of(mark()), (incoming, others), flags).prop_map(
            |(family, priority, protocol, action, mark, named, (conditional, inverted, by_interface))| {
                let (incoming, others) = named;
                routing::Rule {
                    family,
                    priority,
                    protocol,
                    action,
                    mark,
                    incoming,
                    conditional,
                    inverted,
                    by_interface,
                    others,
                    unknown: false,
                }
            },
        )
    }

    fn host() -> impl Strategy<Value = HostState> {
        let slot = prop_oneof![Just((200, 7470)), any::<(u32, u32)>()];
        let slot = slot.prop_map(|(priority, table)| RoutingSlot { priority, table });
        let holder = prop_oneof![
            proptest::collection::vec((any::<u32>(), name()), 1..3).prop_map(processes),
            Just(Holder::Elsewhere),
            Just(Holder::Unknown)
        ];
        let table = (slot, any::<Option<u32>>()).prop_map(|(slot, owner)| Table {
            name: "libtproxy-tproxy".to_owned(),
            slot: Some(slot),
            record: None,
            owner,
            owner_port: owner.map(|_| 1),
            persistent: true,
        });
        // A destination is our own text for the kernel's numbers.
        let destination = proptest::option::of("[0-9a-f:.]{1,39}/[0-9]{1,3}");
        let route = (family(), prop_oneof![Just(7470), any::<u32>()], destination, 0..12u8)
            .prop_map(|(family, table, destination, kind)| Route { family, table, destination, kind });
        let set = (proptest::collection::vec(any::<(u16, u16)>(), 0..3), any::<bool>())
            .prop_map(|(ranges, complete)| PortSet { ranges, complete, asked: [(80, true)].into() });
        let listener = (family(), any::<Option<std::net::IpAddr>>(), any::<(u16, bool, Option<bool>, u32, u32)>())
            .prop_map(|(family, addr, (port, v6_only, transparent, waiting, backlog))| Listener {
                family,
                protocol: Protocol::Tcp,
                addr,
                port,
                v6_only,
                transparent,
                interface: 0,
                waiting,
                backlog,
            });
        let sysctl = (
            "ipv4/ip_forward|ipv4/conf/(all|eth0)/(forwarding|rp_filter|src_valid_mark)|netfilter/nf_conntrack_(max|count)",
            "[0-9]{1,3}| |x",
        );
        let several = 0..5usize;
        (
            proptest::collection::vec(chain(), several.clone()),
            proptest::collection::vec(rule(), several.clone()),
            proptest::collection::vec(route, several.clone()),
            proptest::collection::vec(table, 0..2),
            proptest::collection::vec(listener, several.clone()),
            proptest::collection::btree_map(sysctl.0, sysctl.1, several),
            (any::<(Option<u64>, bool)>(), proptest::collection::vec(set, 3), holder, name()),
        )
            .prop_map(
                |(chains, rules, routes, tables, found, sysctls, ((filtered_by_rp, up), port_sets, holder, name))| {
                    let mut tables_of: HashMap<(Family, u32), Vec<Route>> = HashMap::new();
                    for route in routes {
                        tables_of.entry((route.family, route.table)).or_default().push(route);
                    }
                    let routes = |(of, routes): ((Family, u32), Vec<Route>)| (of, Routes::of(routes, of.1 != 201));
                    HostState {
                        ruleset: Some(Ruleset { chains, port_sets }),
                        rules,
                        routes: tables_of.into_iter().map(routes).collect(),
                        tables: Some(tables),
                        holders: [(1, holder)].into(),
                        listeners: Some(Listeners { found, ..Listeners::default() }),
                        sysctls: Sysctls::of(sysctls),
                        filtered_by_rp,
                        routed: Families::ALL,
                        features: vec![(crate::check::findings::NF_TABLES, Ok(()))],
                        interfaces: [Name::from("lo"), Name::from("eth0"), name]
                            .map(|name| Interface {
                                index: 1,
                                name,
                                up,
                                kind: "bridge".into(),
                                master: 0,
                                switches: vec![("forwarding", 0), ("rp_filter", 1)],
                                accept_ra: Some(1),
                            })
                            .to_vec(),
                        ..HostState::default()
                    }
                },
            )
    }

    /// What of a command is not in quotes of any kind.
    fn bare(command: &str) -> String {
        let mut bare = String::new();
        let mut rest = command;
        while let Some((before, from)) = rest.split_once(['\'', '"']) {
            bare.push_str(before.strip_suffix('\\').unwrap_or(before));
            // `'\''` is a quote outside of quotes.
            if before.ends_with('\\') {
                rest = from;
                continue;
            }
            let double = rest.as_bytes().get(before.len()) == Some(&b'"');
            let inside = if double { from.split_once("')\"") } else { from.split_once('\'') };
            rest = inside.map_or("", |(_, after)| after);
        }
        bare + rest
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever a host has, there is no panic, no end that does not come, and no fix with a gap in it.
        #[test]
        fn diagnose_of_any_host_does_not_panic(host in host()) {
            for finding in diagnose(&host) {
                prop_assert!(!finding.message.is_empty());
                prop_assert!(!finding.fix.contains("{table}") && !finding.fix.contains("{flag}"), "{:?}", finding);
                prop_assert!(!finding.fix.contains("{pid}") && !finding.fix.contains("{chain}"), "{:?}", finding);
                // Outside quotes nothing that a shell takes for its own, but for what joins commands and leads to a sysctl.
                let bare = bare(&finding.fix).replace(" && ", "").replace(" >/proc/sys/", "");
                prop_assert!(!bare.contains(['<', '>', '|', ';', '&', '$', '`', '*', '(', '#']), "{} {}", bare, finding.fix);
                prop_assert!(finding.fix.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{}", finding.fix);
                prop_assert!(!finding.fix.split_whitespace().any(|word| word == "{interface}"), "{}", finding.fix);
                prop_assert!(finding.severity > Severity::Ok || finding.fix.is_empty());
            }
        }
    }

    fn chain_called(origin: Origin, table: &str, name: &Name) -> Chain {
        Chain {
            origin,
            family: Some(Family::V4),
            table: table.into(),
            name: name.clone(),
            hook: None,
            drops: false,
            rules: Vec::new(),
            cut: false,
        }
    }

    #[test]
    fn fix_has_interface_name_as_one_word() {
        let fix = |name: &[u8]| {
            let interface = Interface {
                index: 2,
                name: Name::new(name),
                up: true,
                kind: Name::default(),
                master: 0,
                switches: vec![("forwarding", 0)],
                accept_ra: None,
            };
            let tproxy = Part::Tproxy { family: None, addr: None, port: 1 };
            let mut chain = chain_called(Origin::Nft, "t", &"c".into());
            chain.rules = vec![Rule { handle: 1, number: 1, parts: vec![tproxy] }];
            let host = HostState {
                ruleset: Some(Ruleset { chains: vec![chain], port_sets: Vec::new() }),
                interfaces: vec![interface],
                ..HostState::default()
            };
            let found = diagnose(&host);
            found.into_iter().find(|finding| finding.kind.id == "sysctl.forwarding_interface").unwrap().fix
        };
        assert_eq!(fix(b"eth0.7"), "sysctl -w net/ipv4/conf/eth0.7/forwarding=1");
        assert_eq!(fix(b"a;reboot"), "echo 1 >/proc/sys/net/ipv4/conf/'a;reboot'/forwarding");
        assert_eq!(fix(b"a=1"), "echo 1 >/proc/sys/net/ipv4/conf/a=1/forwarding");
        assert_eq!(fix(b"a\xff"), "echo 1 >/proc/sys/net/ipv4/conf/\"$(printf 'a\\377')\"/forwarding");
    }

    #[test]
    fn fix_has_chain_name_as_one_word() {
        let rule = Rule { handle: 7, number: 3, parts: Vec::new() };
        let removal = |origin, name: &[u8]| commands::removal(&chain_called(origin, "filter", &Name::new(name)), &rule);
        assert_eq!(removal(Origin::Nft, b"c"), "nft delete rule ip filter c handle 7");
        assert_eq!(removal(Origin::IptablesNft, b"c"), "nft delete rule ip filter c handle 7");
        assert_eq!(removal(Origin::IptablesLegacy, b"c"), "iptables-legacy -t filter -D c 3");
        let json = |name| {
            let rule = format!("\"family\":\"ip\",\"table\":\"filter\",\"chain\":\"{name}\",\"handle\":7");
            format!("nft -j '{{\"nftables\":[{{\"delete\":{{\"rule\":{{{rule}}}}}}}]}}'")
        };
        assert_eq!(removal(Origin::Nft, b"c;reboot"), json("c\\u003breboot"));
        assert_eq!(removal(Origin::IptablesNft, "a\u{202e}'".as_bytes()), json("a\\u202e\\u0027"));
        assert_eq!(removal(Origin::Nft, b"a\xff"), "");
        assert_eq!(removal(Origin::IptablesNft, b"a\xff"), "iptables-nft -t filter -D \"$(printf 'a\\377')\" 3");
        assert_eq!(removal(Origin::IptablesLegacy, b"a'b"), "iptables-legacy -t filter -D 'a'\\''b' 3");
        // iptables would not take these.
        assert_eq!(removal(Origin::IptablesLegacy, b"-x"), "");
        assert_eq!(removal(Origin::IptablesLegacy, b"a b"), "");
    }

    /// The kernel deletes the first rule that has what a command asks for.
    #[test]
    fn fix_deletes_exactly_one_routing_rule() {
        let rule = |others: &[(&'static str, &str)]| routing::Rule {
            family: Family::V4,
            priority: 150,
            protocol: 0,
            action: Action::Lookup(7470),
            mark: None,
            incoming: None,
            conditional: !others.is_empty(),
            inverted: false,
            by_interface: false,
            others: others.iter().map(|(option, value)| (*option, Name::from(*value))).collect(),
            unknown: false,
        };
        let first = rule(&[("from", "192.0.2.0/24")]);
        let rules = [first.clone(), rule(&[("from", "198.51.100.0/24")]), rule(&[])];
        let deletion = |number: usize| routing_command(&rules, &rules[number]);
        assert_eq!(deletion(0), "ip -4 rule del pref 150 from 192.0.2.0/24 lookup 7470");
        assert_eq!(deletion(1), "ip -4 rule del pref 150 from 198.51.100.0/24 lookup 7470");
        assert_eq!(deletion(2), "");
        let odd = routing::Rule { incoming: Some(Name::new(b"a\xff")), ..first.clone() };
        assert_eq!(
            routing_command(std::slice::from_ref(&odd), &odd),
            "ip -4 rule del pref 150 iif \"$(printf 'a\\377')\" from 192.0.2.0/24 lookup 7470"
        );
        let unknown = routing::Rule { unknown: true, ..first };
        assert_eq!(routing_command(std::slice::from_ref(&unknown), &unknown), "");
    }

    fn routing_command(rules: &[routing::Rule], rule: &routing::Rule) -> String {
        super::routing::deletion(rules, rule)
    }

    /// What cannot be made in a network of our own, or not soon.
    #[test]
    fn diagnose_names_resources_nearly_used_up() {
        let tracked = |count: &str| {
            let sysctls = [("netfilter/nf_conntrack_count", count), ("netfilter/nf_conntrack_max", "1000")];
            HostState {
                sysctls: Sysctls::of(sysctls.map(|(path, value)| (path.to_owned(), value.to_owned()))),
                ..HostState::default()
            }
        };
        let named = |host: &HostState, id: &str| {
            let found = diagnose(host);
            found.into_iter().find(|finding| finding.kind.id == id).map(|finding| (finding.severity, finding.fix))
        };
        let fix = "sysctl -w net.netfilter.nf_conntrack_max=2000".to_owned();
        assert_eq!(named(&tracked("900"), "conntrack.full"), None);
        assert_eq!(named(&tracked("950"), "conntrack.full"), Some((Severity::Warning, fix.clone())));
        assert_eq!(named(&tracked("1000"), "conntrack.full"), Some((Severity::Failure, fix)));
        let having = |soft, hard, used| {
            let descriptors = vec![Descriptors { pid: 7, soft, hard, used }];
            named(&HostState { descriptors, ..HostState::default() }, "limit.descriptors").unwrap()
        };
        let warned = |limit: &str| (Severity::Warning, format!("prlimit --pid 7 --nofile={limit}"));
        assert_eq!(having(1024, 4096, Some(500)), (Severity::Ok, String::new()));
        assert_eq!(having(1024, 4096, Some(1000)), warned("4096:4096"));
        assert_eq!(having(1000, u64::MAX, None), warned("65536:unlimited"));
        assert_eq!(having(100_000, 100_000, Some(99_000)), warned("200000:200000"));
        assert_eq!(having(12, 1 << 20, None), warned("65536:1048576"));
    }

    fn jumping(name: &str, to: &[&str], hook: Option<Hook>) -> Chain {
        let jump = |to: &&str| Part::Verdict(Verdict::Jump((*to).into()));
        let rule = |(to, number): (&&str, usize)| Rule { handle: number as u64, number, parts: vec![jump(to)] };
        let rules = to.iter().zip(1..).map(rule).collect();
        Chain { family: None, hook, rules, ..chain_called(Origin::Nft, "t", &name.into()) }
    }

    /// A TPROXY rule by hand for each port.
    fn recipes(ports: std::ops::Range<u16>) -> Chain {
        let hook = Hook { point: HookPoint::Prerouting, priority: -150 };
        let mut chain = jumping("r", &[], Some(hook));
        for (port, number) in ports.zip(1..) {
            let parts = vec![
                Part::OnlyIf(Condition::Protocol(6)),
                Part::OnlyIf(Condition::Ports(port, port)),
                Part::Tproxy { family: None, addr: None, port: port % 1000 + 10_000 },
                Part::SetMark { keep: 0, set: Some(1) },
                Part::Verdict(Verdict::Accept),
            ];
            chain.rules.push(Rule { handle: number as u64, number, parts });
        }
        chain
    }

    const INPUT: Hook = Hook { point: HookPoint::Input, priority: 0 };

    /// How many rules and effects are looked at, to follow everything that is intercepted through all chains; and what is
    /// found.
    fn work(chains: Vec<Chain>) -> (usize, Vec<Finding>) {
        let ruleset = Ruleset { chains, port_sets: Vec::new() };
        let host = HostState::default();
        let context = Context::new(&host, &ruleset);
        let mut found = Findings::default();
        filters::check_filters(&context, &mut found);
        (context.chains.steps(), found.0)
    }

    #[test]
    fn eval_of_circular_chains_ends() {
        let chains = vec![jumping("a", &["b"; 100], Some(INPUT)), jumping("b", &["a"; 100], None), recipes(1..2)];
        assert!(work(chains).0 < 10_000);
    }

    #[test]
    fn eval_of_nested_jumps_does_linear_work() {
        let names: Vec<String> = (0..=16).map(|level| format!("c{level}")).collect();
        let level = |level: usize| {
            let to: &[&str] = if level < 16 { &[names[level + 1].as_str(); 2] } else { &[] };
            jumping(&names[level], to, (level == 0).then_some(INPUT))
        };
        let mut chains: Vec<Chain> = (0..=16).map(level).collect();
        let last = chains.last_mut().unwrap();
        last.rules = vec![Rule { handle: 1, number: 1, parts: vec![Part::Verdict(Verdict::Drop)] }];
        chains.push(recipes(1..2));
        let (steps, found) = work(chains);
        assert!(steps < 1000, "{steps}");
        assert!(found.iter().any(|finding| finding.kind.id == "filter.input_drop"), "{found:?}");
    }

    #[test]
    fn eval_of_many_rules_does_linear_work() {
        let of = |count: u16| {
            let mut fw = jumping("fw", &[], Some(INPUT));
            for (port, number) in (0..count).zip(1..) {
                let parts = vec![
                    Part::OnlyIf(Condition::Ports(port, port)),
                    Part::OnlyIf(Condition::Other),
                    Part::Verdict(Verdict::Accept),
                ];
                fw.rules.push(Rule { handle: number as u64, number, parts });
            }
            fw.drops = true;
            let (steps, found) = work(vec![recipes(1..count + 1), fw]);
            assert!(found.iter().any(|finding| finding.kind.id == "filter.input_drop"), "{found:?}");
            steps
        };
        let (some, many) = (of(1000), of(8000));
        assert!(many < 10 * some && many < 200_000, "{some} {many}");
    }

    #[test]
    fn eval_beyond_its_bound_is_noted_as_unseen() {
        let mut chains = vec![recipes(1..2000)];
        for number in 0..1000 {
            let mut chain = jumping(&format!("i{number}"), &[], Some(INPUT));
            let rule = Rule { handle: 1, number: 1, parts: vec![Part::OnlyIf(Condition::Other)] };
            chain.rules = vec![rule; 1000];
            chains.push(chain);
        }
        let (_, found) = work(chains);
        assert!(found.iter().any(|finding| finding.kind.id == "check.unseen"), "{found:?}");
    }

    #[test]
    fn findings_of_one_kind_are_bounded() {
        let chain = recipes(1..1001);
        let host = HostState {
            ruleset: Some(Ruleset { chains: vec![chain], port_sets: Vec::new() }),
            listeners: Some(Listeners::default()),
            ..HostState::default()
        };
        let found = diagnose(&host);
        let gone = found.iter().filter(|finding| finding.kind.id == "listener.gone").count();
        assert_eq!(gone, OF_A_KIND_MAX);
        let more = found.iter().find(|finding| finding.kind.id == "check.unseen").unwrap();
        assert_eq!(more.message, "900 more findings of this kind: listener.gone");
    }

    #[test]
    fn diagnose_of_unknown_state_reports_nothing_as_missing() {
        let found = diagnose(&HostState::default());
        let said: Vec<&Finding> = found.iter().filter(|finding| finding.severity > Severity::Note).collect();
        assert!(said.is_empty(), "{said:?}");
        assert!(!found.iter().any(|finding| finding.kind.id.starts_with("privilege.")), "{found:?}");
    }

    #[test]
    fn diagnose_names_owner_only_if_known() {
        let told = |holder| {
            let table = Table {
                name: "libtproxy-tproxy".to_owned(),
                slot: Some(RoutingSlot { priority: 200, table: 7470 }),
                record: None,
                owner: Some(1),
                owner_port: Some(1024),
                persistent: false,
            };
            let mut chain = recipes(80..81);
            chain.table = "libtproxy-tproxy".into();
            let host = HostState {
                tables: Some(vec![table]),
                holders: [(1024, holder)].into(),
                ruleset: Some(Ruleset { chains: vec![chain], port_sets: Vec::new() }),
                listeners: Some(Listeners::default()),
                ..HostState::default()
            };
            let found = diagnose(&host);
            let of = |id: &str| found.iter().find(|finding| finding.kind.id == id).unwrap().clone();
            (of("instance").message, of("listener.gone").fix)
        };
        let (said, fix) = told(processes(vec![(12, "a".into()), (15, "b".into())]));
        assert!(said.contains("of processes 12, 15, "), "{said}");
        assert_eq!(fix, "kill 12 15");
        let (said, fix) = told(Holder::Elsewhere);
        assert!(said.contains("of a process in another PID namespace"), "{said}");
        assert_eq!(fix, "");
        let (said, fix) = told(Holder::Unknown);
        assert!(said.contains("of a process that cannot be seen from here"), "{said}");
        assert_eq!(fix, "");
        // The first process of a PID namespace takes all others with it.
        assert_eq!(told(processes(vec![(1, "init".into())])).1, "");
    }
}
