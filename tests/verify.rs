//! `tp_verify_rules`, the places of routing rules among those of other programs, and `tp_list_rules`.

mod common;

use std::net::TcpListener;

use common::process::{Process, in_role, role, wait_to_be_killed};
use common::*;
use libc::{EFAULT, EINVAL, ENOENT, ENOTCONN, ESTALE};
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];

/// A client's connection is accepted by the proxy's listener.
fn expect_intercepted(lab: &Lab, listener: &TcpListener) {
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            let served = scope.spawn(|| accept(listener));
            lab.client.run(|| connect(at(hosts.server, 80)));
            served.join().unwrap();
        });
    }
}

/// What wg-quick adds, which sends packets elsewhere before any rule behind it.
fn start_vpn(net: &Net, place: Option<u32>) {
    let place = |behind| place.map(|first: u32| format!("pref {}", first + behind)).unwrap_or_default();
    for family in ["-4", "-6"] {
        net.ip(&format!("{family} route add blackhole default table 51820"));
        net.ip(&format!("{family} rule add not fwmark 51820 table 51820 {}", place(1)));
        net.ip(&format!("{family} rule add table main suppress_prefixlength 0 {}", place(0)));
    }
}

/// The preferences of the library's rules.
fn places(net: &Net, family: &str) -> Vec<u32> {
    let rules = net.ip(&format!("{family} rule show"));
    rules
        .lines()
        .filter(|line| line.ends_with("proto 116"))
        .map(|line| line.split(':').next().unwrap().parse().unwrap())
        .collect()
}

fn errno(outcome: Result<(), Failed>) -> i32 {
    outcome.unwrap_err().errno
}

#[test]
fn verify_rules_repairs_missing_routing() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen(at(ip("::"), 3129), 0)).unwrap();
        let _server = lab.serve(80);
        let config = RulesConfig::of(&listener).backend(backend).ports(&[80]).flags(TP_RULES_LOCAL_OUTPUT);
        let rules = lab.proxy.run(|| config.install()).unwrap();
        let verify = |flags| lab.proxy.run(|| rules.verify(flags));
        verify(0).unwrap();
        let state = lab.proxy.state();
        for damage in [
            "-4 rule del pref 200",
            "-6 rule del pref 201",
            "-4 rule del pref 203",
            "-6 route flush table 7470",
            "-4 route flush table 7470",
        ] {
            lab.proxy.ip(damage);
            assert_eq!(errno(verify(0)), ESTALE, "{damage}");
            verify(TP_VERIFY_REPAIR).unwrap();
            verify(0).unwrap();
            let sorted = |text: &str| {
                let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
                lines.sort();
                lines
            };
            assert_eq!(sorted(&lab.proxy.state()), sorted(&state), "{damage}");
        }
        expect_intercepted(&lab, &listener);
        drop(listener);
        assert_eq!(errno(verify(0)), ENOTCONN);
        assert_eq!(errno(verify(TP_VERIFY_REPAIR)), ENOTCONN);
        assert_eq!(errno(verify(2)), EINVAL);
    }
    // SAFETY: NULL is an error.
    assert_eq!(checked(unsafe { tp_verify_rules(std::ptr::null_mut(), 0) }).unwrap_err().errno, EFAULT);
}

#[test]
fn verify_rules_without_table_is_enoent() {
    let net = Net::new();
    net.run(|| {
        let listener = listen(at(ip("::"), 3129), 0).unwrap();
        let config = RulesConfig::of(&listener).ports(&[80]);
        let rules = config.clone().backend(TP_BACKEND_IPTABLES).install().unwrap();
        for program in ["iptables", "ip6tables"] {
            net.sh(&format!("{program} -t mangle -F; {program} -t mangle -X"));
        }
        assert_eq!(errno(rules.verify(TP_VERIFY_REPAIR)), ENOENT);
    });
}

#[test]
fn verify_rules_moves_ahead_of_vpn() {
    for backend in BACKENDS {
        // Without a place, the kernel puts the rule before the second that there is.
        for place in [None, Some(100), Some(201)] {
            let lab = Lab::new();
            let listener = lab.proxy.run(|| listen(at(ip("::"), 3129), 0)).unwrap();
            let config = RulesConfig::of(&listener).backend(backend).ports(&[80]);
            let before = lab.proxy.state();
            let rules = lab.proxy.run(|| config.install()).unwrap();
            let verify = |flags| lab.proxy.run(|| rules.verify(flags));
            start_vpn(&lab.proxy, place);
            assert_eq!(errno(verify(0)), ESTALE);
            verify(TP_VERIFY_REPAIR).unwrap();
            verify(0).unwrap();
            expect_intercepted(&lab, &listener);
            let first = places(&lab.proxy, "-4")[0];
            assert!(first < 200, "{}", lab.proxy.ip("rule"));
            assert_eq!(places(&lab.proxy, "-4"), [first, first + 1, first + 3]);
            assert_eq!(places(&lab.proxy, "-6"), [first, first + 1, first + 3]);
            // Others know of the new place: nobody removes it, nor takes it.
            lab.proxy.run(|| {
                purge(None).unwrap();
                let second = config.clone().name("second").install().unwrap();
                rules.verify(0).unwrap();
                second.verify(0).unwrap();
                let listed = list_rules().unwrap();
                assert_eq!(listed.len(), 2);
                assert_eq!((listed[1].name.as_str(), listed[1].priority), ("tproxy", first));
                assert_ne!(listed[0].table, listed[1].table);
                assert!(listed[0].priority.abs_diff(first) >= 4, "{listed:?}");
                second.remove().unwrap();
                // It moves once more.
                for family in ["-4", "-6"] {
                    lab.proxy.ip(&format!("{family} rule add fwmark 0x2000/0x2000 unreachable pref {first}"));
                }
                rules.verify(TP_VERIFY_REPAIR).unwrap();
                assert!(places(&lab.proxy, "-4")[0] + 3 < first);
                purge(None).unwrap();
                rules.verify(0).unwrap();
                rules.remove().unwrap();
            });
            for family in ["-4", "-6"] {
                lab.proxy.ip(&format!("{family} rule del fwmark 0x2000/0x2000"));
                lab.proxy.ip(&format!("{family} rule del table 51820"));
                lab.proxy.ip(&format!("{family} rule del table main suppress_prefixlength 0"));
                lab.proxy.ip(&format!("{family} route flush table 51820"));
            }
            if backend == TP_BACKEND_NFT {
                assert_eq!(lab.proxy.state(), before);
            }
        }
    }
}

/// A rule that surely leaves the packets alone is not in the way.
#[test]
fn install_rules_chooses_place_ahead_of_rules_that_take_its_packets() {
    for (other, first) in [
        ("not fwmark 51820 lookup 51820 pref 105", 101),
        ("lookup main suppress_prefixlength 0 pref 110", 106),
        ("fwmark 0x2000/0x3000 lookup 99 pref 150", 146),
        ("to 203.0.113.0/24 lookup 99 pref 50", 46),
        ("not iif lo lookup 99 pref 60", 56),
        ("fwmark 0x1000/0x3000 lookup 99 pref 100", 200),
        ("fwmark 0x4000/0x4000 lookup 99 pref 100", 96),
        ("iif lo lookup 99 pref 100", 200),
        ("oif dummy0 lookup 99 pref 100", 200),
        ("not fwmark 0x2000/0x2000 lookup 99 pref 100", 200),
        ("nop pref 100", 200),
        ("lookup local pref 100", 200),
        // There is no room ahead.
        ("lookup 99 pref 3", 200),
        ("lookup 99 pref 210", 200),
        ("lookup 99 pref 203", 199),
    ] {
        let net = Net::new();
        net.ip(&format!("-4 rule add {other}"));
        net.run(|| {
            let rules = divert_only().unwrap();
            assert_eq!(places(&net, "-4")[0], first, "{other}");
            let taken = other == "lookup 99 pref 3";
            assert_eq!(
                rules.verify(TP_VERIFY_REPAIR).map_err(|e| e.errno),
                if taken { Err(ESTALE) } else { Ok(()) },
                "{other}"
            );
        });
    }
}

#[test]
fn replace_rules_moves_to_another_priority_and_table() {
    for backend in BACKENDS {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen(at(ip("::"), 3129), 0)).unwrap();
        let config = RulesConfig::of(&listener).backend(backend).ports(&[80]);
        lab.proxy.run(|| {
            let before = lab.proxy.state();
            let rules = config.clone().priority(300).table(99).install().unwrap();
            for (priority, table, expected) in
                [(0, 0, (300, 99)), (400, 0, (400, 99)), (0, 98, (400, 98)), (500, 97, (500, 97)), (300, 99, (300, 99))]
            {
                rules.replace(&config.clone().priority(priority).table(table)).unwrap();
                let listed = list_rules().unwrap();
                assert_eq!((listed[0].priority, listed[0].table), expected);
                assert_eq!(places(&lab.proxy, "-6")[0], expected.0);
                assert_eq!(places(&lab.proxy, "-6").len(), 3);
                let routes = lab.proxy.ip("-6 route show table all proto 116");
                assert_eq!(routes.lines().count(), 1, "{routes}");
                assert!(routes.contains(&format!("table {}", expected.1)), "{routes}");
                rules.verify(0).unwrap();
                expect_intercepted(&lab, &listener);
            }
            // On failure everything is as it was.
            lab.proxy.ip("rule add pref 600 lookup main");
            lab.proxy.ip("route add local default dev lo table 96");
            let state = lab.proxy.state();
            rules.replace(&config.clone().priority(600)).unwrap_err();
            rules.replace(&config.clone().priority(302)).unwrap_err();
            rules.replace(&config.clone().table(96)).unwrap_err();
            assert_eq!(lab.proxy.state(), state);
            lab.proxy.ip("rule del pref 600");
            lab.proxy.ip("route flush table 96");
            rules.remove().unwrap();
            if backend == TP_BACKEND_NFT {
                assert_eq!(lab.proxy.state(), before);
            }
        });
    }
}

#[test]
fn verify_rules_completes_ipv6() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen(at(ip("::"), 3129), 0)).unwrap();
    let before = lab.proxy.state();
    for backend in BACKENDS {
        lab.proxy.sysctl("ipv6/conf/lo/disable_ipv6", "1");
        let rules = lab.proxy.run(|| RulesConfig::of(&listener).backend(backend).ports(&[80]).install()).unwrap();
        let verify = |flags| lab.proxy.run(|| rules.verify(flags));
        assert_eq!(errno(verify(0)), ESTALE);
        assert_eq!(errno(verify(TP_VERIFY_REPAIR)), ESTALE);
        lab.proxy.sysctl("ipv6/conf/lo/disable_ipv6", "0");
        assert_eq!(errno(verify(0)), ESTALE);
        verify(TP_VERIFY_REPAIR).unwrap();
        expect_intercepted(&lab, &listener);
        let routes = lab.proxy.ip("-6 route show table 7470");
        assert!(routes.contains("local default") && !routes.contains("blackhole"), "{routes}");
        // Disabled again: the kernel deletes the route, and the repair drops what it cannot deliver.
        lab.proxy.sysctl("ipv6/conf/lo/disable_ipv6", "1");
        assert_eq!(errno(verify(TP_VERIFY_REPAIR)), ESTALE);
        assert!(lab.proxy.ip("-6 route show table 7470").contains("blackhole"));
        lab.proxy.sysctl("ipv6/conf/lo/disable_ipv6", "0");
        lab.proxy.run(|| rules.remove()).unwrap();
        if backend == TP_BACKEND_NFT {
            assert_eq!(lab.proxy.state(), before);
        }
    }
}

#[test]
fn list_rules_reports_each_instance() {
    if role().is_some() {
        let listener = listen("127.0.0.1:3131".parse().unwrap(), 0).unwrap();
        let config = RulesConfig::of(&listener).ports(&[82]).dst(["192.0.2.0/24"]);
        let _rules = config.name("c-other").mark(0x10).mark_mask(0x30).install().unwrap();
        println!("ready");
        wait_to_be_killed();
    }
    let net = Net::new();
    assert_eq!(net.run(list_rules).unwrap(), []);
    let other = Process::start(&net, in_role(list_rules_reports_each_instance, "owner"), "ready");
    net.run(|| {
        let listener = listen(at(ip("::"), 3129), 0).unwrap();
        let redirected = TcpListener::bind(at(ip("0.0.0.0"), 3130)).unwrap();
        let config = RulesConfig::of(&listener).ports(&[80]);
        let _first = config.clone().name("a-first").flags(TP_RULES_LOCAL_OUTPUT).install().unwrap();
        let second = RulesConfig::of(&redirected).ports(&[81]).flags(TP_RULES_REDIRECT).name("b-iptables");
        let _second = second.backend(TP_BACKEND_IPTABLES).install().unwrap();
        config.clone().name("d-persists").flags(TP_RULES_PERSIST).install().unwrap().abandon();
        eventually("the rules have no owner", || list_rules().unwrap().iter().any(|one| one.owner_pid == 0));
        // A table in the library's form, with words that mean nothing; and the tables of a sweep and of a successor.
        net.nft("add table inet libtproxy-e-odd { comment \"libtproxy: priority 900 table 900\"; }");
        net.nft("add table inet libtproxy-f-foreign { comment \"another\"; }");
        net.nft("add table inet libtproxy--1-a-first { comment \"libtproxy: priority 800 table 800\"; }");
        let listed = list_rules().unwrap();
        let own = i64::from(std::process::id());
        let both = TP_FAMILY_IPV4 | TP_FAMILY_IPV6;
        let expected = |name: &str| Listed {
            name: name.to_owned(),
            backend: TP_BACKEND_NFT,
            flags: 0,
            families: both,
            protocols: TP_PROTO_TCP,
            mark: (0x2000, 0x3000),
            table: 0,
            priority: 0,
            owner_pid: own,
            listen_addr: Some("[::]:3129".parse().unwrap()),
            intercepted: 0,
        };
        let places: Vec<(u32, u32)> = listed.iter().map(|one| (one.priority, one.table)).collect();
        let without: Vec<Listed> = listed.into_iter().map(|one| Listed { table: 0, priority: 0, ..one }).collect();
        assert_eq!(
            without,
            [
                Listed { flags: TP_RULES_LOCAL_OUTPUT, ..expected("a-first") },
                Listed {
                    backend: TP_BACKEND_IPTABLES,
                    flags: TP_RULES_REDIRECT,
                    families: TP_FAMILY_IPV4,
                    listen_addr: Some("0.0.0.0:3130".parse().unwrap()),
                    ..expected("b-iptables")
                },
                Listed {
                    mark: (0x10, 0x30),
                    families: TP_FAMILY_IPV4,
                    owner_pid: i64::from(other.id()),
                    listen_addr: Some("127.0.0.1:3131".parse().unwrap()),
                    ..expected("c-other")
                },
                Listed { flags: TP_RULES_PERSIST, owner_pid: 0, ..expected("d-persists") },
            ]
        );
        assert_eq!(places, [(204, 7471), (208, 7472), (200, 7470), (212, 7473)]);
        // SAFETY: NULL is an error.
        let failed = checked(unsafe { tp_list_rules(None, std::ptr::null_mut()) });
        assert_eq!(failed.unwrap_err().errno, EFAULT);
        purge(Some("d-persists")).unwrap();
    });
}

/// A replacement changes what is listed, as does one that comes after another process took the rules over.
#[test]
fn list_rules_reports_replacement() {
    let net = Net::new();
    net.run(|| {
        let listener = listen(at(ip("::"), 3129), 0).unwrap();
        let config = RulesConfig::of(&listener).ports(&[80]).flags(TP_RULES_PERSIST);
        let rules = config.install().unwrap();
        rules.replace(&config.clone().mark(0x40).mark_mask(0xc0).families(TP_FAMILY_IPV4)).unwrap();
        let listed = list_rules().unwrap();
        assert_eq!((listed.len(), listed[0].mark, listed[0].families), (1, (0x40, 0xc0), TP_FAMILY_IPV4));
        rules.abandon();
        // A child of another test may hold the descriptors until it calls exec(2).
        eventually("the rules have no owner", || list_rules().unwrap()[0].owner_pid == 0);
        assert_eq!(list_rules().unwrap(), [Listed { owner_pid: 0, ..listed[0].clone() }]);
        let rules = config.install().unwrap();
        assert_eq!(list_rules().unwrap()[0].mark, (0x2000, 0x3000));
        rules.abandon();
        eventually("the rules have no owner", || list_rules().unwrap()[0].owner_pid == 0);
        assert_eq!(net.nft("list tables").lines().count(), 2);
        purge(Some("tproxy")).unwrap();
        assert_eq!(net.nft("list tables"), "");
        assert_eq!(places(&net, "-4"), [0; 0]);
    });
}
