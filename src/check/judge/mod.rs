//! From facts to findings, with no look at the kernel: each file judges one part.

/// Says that something was found: where, how bad it is, what it is, and the particulars.
macro_rules! say {
    ($found:expr, $severity:expr, $kind:expr, $($words:tt)+) => {
        $found.say($severity, $kind, format_args!($($words)+))
    };
}

mod filters;
mod host;
mod listeners;
mod routing;
mod sysctls;

use std::fmt::{self, Write};

use super::facts::Facts;
use super::findings::{Finding, Findings};
use super::instances::{self, Instance, Interception};
use super::walk::Chains;
use crate::text;

/// Who intercepts what, on the host that the facts are of.
struct Scene<'a> {
    facts: &'a Facts,
    chains: Chains<'a>,
    instances: Vec<Instance>,
    interceptions: Vec<Interception>,
}

/// Everything that is to be said, the host itself first; each thing once.
pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let chains = facts.chains.as_deref().unwrap_or_default();
    let scene = Scene {
        facts,
        chains: Chains::new(chains),
        instances: instances::instances(&facts.tables, chains),
        interceptions: instances::interceptions(chains),
    };
    let mut found = Findings::default();
    for judge in [host::judge, listeners::judge, routing::judge, sysctls::judge, filters::judge] {
        judge(&scene, &mut found);
    }
    let mut findings: Vec<Finding> = Vec::new();
    for finding in found.0 {
        // One command cures both families, often.
        let known = |other: &Finding| {
            *other == finding || other.kind == finding.kind && other.cure == finding.cure && !other.cure.is_empty()
        };
        if !findings.iter().any(known) {
            findings.push(finding);
        }
    }
    findings
}

impl Scene<'_> {
    fn instance(&self, interception: &Interception) -> Option<&Instance> {
        let name = interception.instance.as_ref()?;
        self.instances.iter().find(|instance| instance.name == *name)
    }

    /// Something is intercepted here.
    fn intercepts(&self) -> bool {
        !self.interceptions.is_empty()
    }
}

/// The option of `ip` that means a family.
fn flag(family: crate::model::Family) -> &'static str {
    match family {
        crate::model::Family::V4 => "-4",
        crate::model::Family::V6 => "-6",
    }
}

/// A name that means itself, to a shell and to `nft`. Whoever named it may have had something else in mind.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./@+".contains(&b))
}

/// A name as a word for a shell.
fn quoted(name: &str) -> impl fmt::Display {
    text::by(move |f| {
        if is_plain(name) {
            return f.write_str(name);
        }
        f.write_char('\'')?;
        for letter in name.chars() {
            match letter {
                '\'' => f.write_str("'\\''")?,
                letter => f.write_char(letter)?,
            }
        }
        f.write_char('\'')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::nft::table::{Place as At, Table};
    use crate::backend::seen::filter::{Chain, Condition, Hook, Origin, Part, Place, Rule, Verdict};
    use crate::backend::seen::routing::{self, Action, Interface, Route};
    use crate::backend::seen::sockets::Listener;
    use crate::check::facts::Descriptors;
    use crate::check::findings::Severity;
    use crate::check::procfs::Sysctls;
    use crate::model::{Families, Family, Mark, Protocol};
    use proptest::prelude::*;

    fn family() -> impl Strategy<Value = Family> {
        prop_oneof![Just(Family::V4), Just(Family::V6)]
    }

    fn mark() -> impl Strategy<Value = Mark> {
        (prop_oneof![Just(0x2000), Just(1), any::<u32>()], prop_oneof![Just(0x3000), Just(u32::MAX), any::<u32>()])
            .prop_map(|(value, mask)| Mark { value: value & mask, mask })
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("divert".to_owned()),
            Just("tp-tproxy-p".to_owned()),
            Just("tp-é-".to_owned()),
            Just("PREROUTING".to_owned()),
            "[a-z]{0,2}"
        ]
    }

    fn condition() -> impl Strategy<Value = Condition> {
        prop_oneof![
            family().prop_map(Condition::Family),
            any::<u8>().prop_map(Condition::Protocol),
            proptest::collection::vec(any::<(u16, u16)>(), 0..3).prop_map(Condition::Ports),
            mark().prop_map(|Mark { value, mask }| Condition::Mark { mask, value }),
            Just(Condition::Loopback),
            Just(Condition::TransparentSocket),
            any::<bool>().prop_map(|mark| Condition::NoWayBack { mark }),
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
            .prop_map(|(place, priority)| Place::of_number(place).map(|place| Hook { place, priority }));
        let origin = prop_oneof![Just(Origin::Nft), Just(Origin::IptablesNft), Just(Origin::IptablesLegacy)];
        let rules = proptest::collection::vec(proptest::collection::vec(part(), 0..5), 0..5);
        let table = prop_oneof![Just("libtproxy-tproxy".to_owned()), Just("mangle".to_owned()), name()];
        (origin, proptest::option::of(family()), table, name(), prop_oneof![hook, Just(None)], any::<bool>(), rules)
            .prop_map(|(origin, family, table, name, hook, drops, rules)| Chain {
                origin,
                family,
                table,
                name,
                hook,
                drops,
                rules: rules.into_iter().zip(1..).map(|(parts, handle)| Rule { handle, parts }).collect(),
            })
    }

    fn rule() -> impl Strategy<Value = routing::Rule> {
        let number = || prop_oneof![Just(0), Just(200), Just(201), Just(7470), Just(254), Just(255), any::<u32>()];
        let action = prop_oneof![
            number().prop_map(Action::Lookup),
            number().prop_map(Action::Goto),
            Just(Action::Nop),
            Just(Action::Refuse)
        ];
        let flags = any::<(bool, bool, bool)>();
        let protocol = prop_oneof![Just(116u8), any::<u8>()];
        (family(), number(), protocol, action, proptest::option::of(mark()), proptest::option::of("lo|eth0"), flags)
            .prop_map(|(family, priority, protocol, action, mark, incoming, (conditional, inverted, by_interface))| {
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
                }
            })
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let place = prop_oneof![Just((200, 7470)), any::<(u32, u32)>()];
        let place = place.prop_map(|(priority, table)| At { priority, table });
        let table = (place, any::<Option<u32>>()).prop_map(|(place, owner)| Table {
            name: "libtproxy-tproxy".to_owned(),
            place: Some(place),
            owner,
            owner_port: owner,
            persistent: true,
        });
        // A destination is our own text for the kernel's numbers.
        let destination = proptest::option::of("[0-9a-f:.]{1,39}/[0-9]{1,3}");
        let route = (family(), prop_oneof![Just(7470), any::<u32>()], destination, any::<bool>())
            .prop_map(|(family, table, destination, local)| Route { family, table, destination, local });
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
            any::<(u64, bool)>(),
        )
            .prop_map(|(chains, rules, routes, tables, listeners, sysctls, (filtered_by_rp, up))| Facts {
                chains: Some(chains),
                rules,
                routes,
                tables,
                listeners: Some(listeners),
                sysctls: Sysctls::of(sysctls.into_iter().collect()),
                filtered_by_rp,
                routed: Families::ALL,
                features: vec![(crate::check::findings::NF_TABLES, Ok(()))],
                interfaces: ["lo", "eth0"]
                    .map(|name| Interface {
                        index: 1,
                        name: name.to_owned(),
                        up,
                        kind: "bridge".to_owned(),
                        master: 0,
                        switches: Vec::new(),
                    })
                    .to_vec(),
                ..Facts::default()
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever a host has, there is no panic, no end that does not come, and no cure with a gap in it.
        #[test]
        fn every_host_can_be_judged(facts in facts()) {
            for finding in judge(&facts) {
                prop_assert!(!finding.found.is_empty());
                prop_assert!(!finding.cure.contains("{table}") && !finding.cure.contains("{flag}"), "{:?}", finding);
                prop_assert!(!finding.cure.contains("{pid}") && !finding.cure.contains("{chain}"), "{:?}", finding);
                // Outside quotes nothing that a shell takes for its own, but for what joins commands.
                let bare: String = finding.cure.split('\'').step_by(2).collect();
                prop_assert!(!bare.replace(" && ", "").contains(['<', '>', '|', ';', '&', '$', '`', '*', '(', '#']), "{}", bare);
                prop_assert!(finding.severity > Severity::Ok || finding.cure.is_empty());
            }
        }
    }

    #[test]
    fn names_of_others_are_no_commands() {
        assert_eq!(quoted("eth0.7").to_string(), "eth0.7");
        assert_eq!(quoted("$(reboot)").to_string(), "'$(reboot)'");
        assert_eq!(quoted("a'b").to_string(), "'a'\\''b'");
        let interface = Interface {
            index: 2,
            name: "a;reboot".to_owned(),
            up: true,
            kind: String::new(),
            master: 0,
            switches: Vec::new(),
        };
        let sysctls = [("ipv4/ip_forward", "1"), ("ipv4/conf/a;reboot/forwarding", "0")];
        let facts = Facts {
            interfaces: vec![interface],
            sysctls: Sysctls::of(sysctls.map(|(path, value)| (path.to_owned(), value.to_owned())).to_vec()),
            ..Facts::default()
        };
        let found = judge(&facts);
        let cure = &found.iter().find(|finding| finding.kind.id == "sysctl.forwarding_interface").unwrap().cure;
        assert_eq!(cure, "sysctl -w net/ipv4/conf/'a;reboot'/forwarding=1");
        let chain = Chain {
            origin: Origin::Nft,
            family: None,
            table: "t;reboot".to_owned(),
            name: "c".to_owned(),
            hook: None,
            drops: false,
            rules: Vec::new(),
        };
        assert_eq!(filters::removal(&chain, None, Family::V4), "");
    }

    /// What cannot be made in a network of our own, or not soon.
    #[test]
    fn what_is_nearly_used_up_is_named() {
        let tracked = |count: &str| {
            let sysctls = [("netfilter/nf_conntrack_count", count), ("netfilter/nf_conntrack_max", "1000")];
            Facts {
                sysctls: Sysctls::of(sysctls.map(|(path, value)| (path.to_owned(), value.to_owned())).to_vec()),
                ..Facts::default()
            }
        };
        let named = |facts: &Facts, id: &str| {
            let found = judge(facts);
            found.into_iter().find(|finding| finding.kind.id == id).map(|finding| (finding.severity, finding.cure))
        };
        let cure = "sysctl -w net.netfilter.nf_conntrack_max=2000".to_owned();
        assert_eq!(named(&tracked("900"), "conntrack.full"), None);
        assert_eq!(named(&tracked("950"), "conntrack.full"), Some((Severity::Warning, cure.clone())));
        assert_eq!(named(&tracked("1000"), "conntrack.full"), Some((Severity::Failure, cure)));
        let having = |soft, hard, used| {
            let descriptors = vec![Descriptors { pid: 7, soft, hard, used }];
            named(&Facts { descriptors, ..Facts::default() }, "limit.descriptors").unwrap()
        };
        let warned = |limit: &str| (Severity::Warning, format!("prlimit --pid 7 --nofile={limit}"));
        assert_eq!(having(1024, 4096, Some(500)), (Severity::Ok, String::new()));
        assert_eq!(having(1024, 4096, Some(1000)), warned("4096:4096"));
        assert_eq!(having(1000, u64::MAX, None), warned("65536:unlimited"));
        assert_eq!(having(100_000, 100_000, Some(99_000)), warned("200000:200000"));
        assert_eq!(having(12, 1 << 20, None), warned("65536:1048576"));
    }

    /// Chains that lead to each other, without end.
    #[test]
    fn chains_in_a_circle_end() {
        let chain = |name: &str, to: &str, hook| Chain {
            origin: Origin::Nft,
            family: None,
            table: "t".to_owned(),
            name: name.to_owned(),
            hook,
            drops: false,
            rules: vec![Rule { handle: 1, parts: vec![Part::Verdict(Verdict::Jump(to.to_owned()))] }; 100],
        };
        let hook = Hook { place: Place::Input, priority: 0 };
        let tproxy = Part::Tproxy { family: None, addr: None, port: 1 };
        let mut recipe = chain("r", "r", Some(Hook { place: Place::Prerouting, priority: -150 }));
        recipe.rules = vec![Rule { handle: 1, parts: vec![tproxy] }];
        let chains = vec![chain("a", "b", Some(hook)), chain("b", "a", None), recipe];
        judge(&Facts { chains: Some(chains), ..Facts::default() });
    }
}
