//! Routing rules and tables of other programs, whatever their numbers: the library ends its work, and leaves them alone.

mod common;

use common::*;
use libc::EEXIST;
use tproxy::ffi::*;

fn install(flags: u32) -> Result<(), Failed> {
    let listener = listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT).unwrap();
    RulesConfig::of(&listener).ports(&[80]).flags(flags).install()?.remove()
}

/// Routing rules in the library's form, at preferences that no instance can have.
#[test]
fn install_rules_sweeps_routing_rules_at_highest_preferences() {
    for family in ["-4", "-6"] {
        for action in ["fwmark 7 lookup 100", "fwmark 7 lookup 4294967295", "nop", "iif lo fwmark 7 goto 4294967295"] {
            for preference in [4_294_967_295u32, 4_294_967_294, 4_294_967_292, 4_294_967_291, 32_767, 1] {
                if action.contains("goto") && preference > 4_294_967_292 {
                    continue;
                }
                let net = Net::new();
                let before = net.state();
                net.ip(&format!("{family} rule add pref {preference} {action} protocol 116"));
                net.run(|| install(0)).unwrap_or_else(|e| panic!("{family} {preference} {action}: {e}"));
                net.run(|| purge(None)).unwrap();
                let foreign = action.contains("goto") && preference != 4_294_967_292;
                assert_eq!(net.state() == before, !foreign, "{family} {preference} {action}");
            }
        }
    }
}

/// Another program uses the library's protocol number.
#[test]
fn install_rules_and_purge_rules_keep_foreign_routing_rules() {
    let rules = [
        "pref 300 fwmark 7 lookup main",
        "pref 301 fwmark 7 lookup local",
        "pref 302 fwmark 7 lookup default",
        "pref 303 fwmark 7 lookup 100 suppress_prefixlength 0",
        "pref 304 fwmark 7 lookup 100 iif eth0",
        "pref 305 fwmark 7 lookup 100 oif eth0",
        "pref 306 not fwmark 7 lookup 100",
        "pref 307 lookup 100",
        "pref 308 fwmark 7 lookup 100 uidrange 0-0",
        "pref 309 fwmark 7 lookup 100 ipproto tcp dport 80",
        "pref 310 fwmark 7 blackhole",
        "pref 311 iif lo fwmark 7 goto 400",
        "pref 4294967295 lookup 100",
    ];
    let sources = [
        "-4 rule add pref 320 from 192.0.2.0/24 fwmark 7 lookup 100",
        "-6 rule add pref 320 from 2001:db8::/32 fwmark 7 lookup 100",
    ];
    let net = Net::new();
    for family in ["-4", "-6"] {
        rules.iter().for_each(|rule| drop(net.ip(&format!("{family} rule add {rule} protocol 116"))));
        for table in ["main", "default", "100"] {
            net.ip(&format!("{family} route add local default dev lo table {table} protocol 116"));
        }
    }
    sources.iter().for_each(|rule| drop(net.ip(&format!("{rule} protocol 116"))));
    let before = net.state();
    net.run(|| install(0)).unwrap();
    assert_eq!(net.state(), before);
    net.run(|| purge(None)).unwrap();
    assert_eq!(net.state(), before);
}

/// Tables with names and comments in the library's form, which claim a slot that the library never uses.
#[test]
fn install_rules_and_purge_rules_keep_tables_that_claim_impossible_slots() {
    for place in [
        "priority 4294967295 table 254",
        "priority 4294967294 table 100",
        "priority 200 table 254",
        "priority 200 table 0",
        "priority 0 table 100",
    ] {
        let net = Net::new();
        net.nft(&format!("add table inet libtproxy-tproxy {{ comment \"libtproxy: {place}\"; }}"));
        net.nft(&format!("add table inet libtproxy-other {{ comment \"libtproxy: {place}\"; }}"));
        net.ip("rule add pref 4294967295 fwmark 7 lookup 100 protocol 116");
        net.ip("route add local default dev lo table main protocol 116");
        let main = net.ip("-4 route show table main");
        for flags in [0, TP_RULES_PERSIST] {
            assert_eq!(net.run(|| install(flags)).unwrap_err().errno, EEXIST, "{place}");
        }
        let failed = net.run(|| purge(Some("tproxy"))).unwrap_err();
        assert!(
            failed.errno == EEXIST && failed.sentence.contains("nft delete table inet libtproxy-tproxy"),
            "{failed}"
        );
        net.run(|| purge(None)).unwrap();
        assert_eq!(net.ip("-4 route show table main"), main);
        assert_eq!(net.nft("list tables").lines().count(), 2);
        net.nft("delete table inet libtproxy-tproxy");
        net.run(|| install(0)).unwrap();
    }
}

/// A ruleset that was saved during a sweep and loaded again has the table of the sweep, without an owner.
#[test]
fn install_rules_and_purge_rules_remove_table_of_sweep_without_owner() {
    let net = Net::new();
    let before = net.state();
    net.nft("add table inet libtproxy--sweep { comment \"libtproxy: priority 200 table 7470\"; }");
    net.ip("rule add pref 201 fwmark 0x2000/0x3000 lookup 7470 protocol 116");
    net.run(|| install(0)).unwrap();
    assert_eq!(net.state(), before);
    net.nft("add table inet libtproxy--sweep");
    net.ip("rule add pref 201 fwmark 0x2000/0x3000 lookup 7470 protocol 116");
    net.run(|| purge(None)).unwrap();
    assert_eq!(net.state(), before);
}
