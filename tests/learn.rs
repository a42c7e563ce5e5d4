//! Addresses that are in a set for a time.

mod common;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use common::*;
use libc::{EFAULT, EINVAL, ENOENT, ENOSPC, EOPNOTSUPP};
use tproxy::ffi::*;

const NOTHING: [&str; 0] = [];
const BOTH: [&str; 2] = ["203.0.113.2/32", "2001:db8:2::2/128"];
/// A time that no test outlasts, in seconds.
const LONG: u32 = 100_000;

fn listener(lab: &Lab) -> TcpListener {
    lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT)).unwrap()
}

/// Who answers a client of each family that asks the server's port 80, or an error: the listener resets a connection whose
/// bypass ends while it is open.
fn answers(lab: &Lab) -> [String; 2] {
    [v4(), v6()].map(|hosts| lab.client.run(|| said(at(hosts.server, 80)).unwrap_or_else(|error| error.to_string())))
}

/// Who answers the proxy's host itself.
fn own_answers(lab: &Lab) -> [String; 2] {
    [v4(), v6()].map(|hosts| lab.proxy.run(|| said(at(hosts.server, 80)).unwrap()))
}

/// A lab in which a proxy or the server answers while the body runs.
fn answering(body: impl FnOnce(&Lab, &TcpListener)) {
    let lab = Lab::new();
    let (server, proxy) = (lab.serve(80), listener(&lab));
    while_answering(&[(&server, "server"), (&proxy, "proxy")], || body(&lab, &proxy));
}

fn table(lab: &Lab) -> String {
    lab.proxy.nft_with(&["list", "table", "inet", "libtproxy-tproxy"])
}

/// Addresses of one family, each of another number.
fn numbered(family: i32, numbers: std::ops::Range<u32>) -> Vec<tp_prefix> {
    let prefix = |number: u32| {
        let mut addr = [0; 16];
        addr[..4].copy_from_slice(&number.to_be_bytes());
        tp_prefix { family: family as u8, len: if family == libc::AF_INET { 32 } else { 128 }, reserved: [0; 2], addr }
    };
    numbers.map(prefix).collect()
}

/// Learns so many addresses at a time as one transaction takes.
fn learn_all(rules: &Rules, set: u32, addrs: &[tp_prefix]) {
    addrs.chunks(2000).for_each(|some| rules.learn(set, some, LONG).unwrap());
}

#[test]
fn learn_addresses_intercepts_destination_until_its_time_is_over() {
    for flags in [0, TP_RULES_NOTRACK, TP_RULES_REDIRECT] {
        let lab = Lab::new();
        let (server, transparent) = (lab.serve(80), listener(&lab));
        let ordinary = lab.proxy.run(|| TcpListener::bind("[::]:3130").unwrap());
        while_answering(&[(&server, "server"), (&transparent, "proxy"), (&ordinary, "proxy")], || {
            let listener = if flags == TP_RULES_REDIRECT { &ordinary } else { &transparent };
            let config = RulesConfig::of(listener).dst(NOTHING).ports(&[80]).flags(flags);
            let rules = lab.proxy.run(|| config.install()).unwrap();
            assert_eq!(answers(&lab), ["server", "server"]);
            assert!(
                !table(&lab).contains("learned"),
                "packets are compared with learned addresses before there are any"
            );
            rules.learn(TP_SET_DST, &BOTH[..1].prefixes(), LONG).unwrap();
            assert_eq!(answers(&lab), ["proxy", "server"], "{flags:#x}");
            rules.learn(TP_SET_DST, &BOTH.prefixes(), LONG).unwrap();
            assert_eq!(answers(&lab), ["proxy", "proxy"], "{flags:#x}");
            // A shorter time takes the place of a longer one.
            rules.learn(TP_SET_DST, &BOTH.prefixes(), 1).unwrap();
            let after = || (answers(&lab) == ["server", "server"]).then_some(());
            wait_for("learned addresses do not leave their set", after);
        });
    }
}

#[test]
fn learn_addresses_bypasses_until_their_time_is_over() {
    answering(|lab, proxy| {
        let config = RulesConfig::of(proxy).ports(&[80]).flags(TP_RULES_LOCAL_OUTPUT);
        let rules = lab.proxy.run(|| config.install()).unwrap();
        assert_eq!(answers(lab), ["proxy", "proxy"]);
        rules.learn(TP_SET_BYPASS, &BOTH.prefixes(), LONG).unwrap();
        assert_eq!(answers(lab), ["server", "server"]);
        assert_eq!(own_answers(lab), ["server", "server"]);
        rules.learn(TP_SET_BYPASS, &BOTH[1..].prefixes(), 1).unwrap();
        wait_for("a bypass does not end", || (answers(lab) == ["server", "proxy"]).then_some(()));
        assert_eq!(own_answers(lab), ["server", "proxy"]);
    });
}

#[test]
fn learn_addresses_again_gives_them_the_new_time() {
    answering(|lab, proxy| {
        let rules = lab.proxy.run(|| RulesConfig::of(proxy).dst(["192.0.2.0/24"]).install()).unwrap();
        let begin = Instant::now();
        rules.learn(TP_SET_DST, &BOTH.prefixes(), 3).unwrap();
        while begin.elapsed() < Duration::from_secs(5) {
            rules.learn(TP_SET_DST, &BOTH.prefixes(), LONG).unwrap();
            assert_eq!(answers(lab), ["proxy", "proxy"]);
        }
        // The prefixes of the configuration can be changed beside them.
        rules.update(TP_SET_DST, &["198.18.0.0/16"].prefixes(), &["192.0.2.0/24"].prefixes()).unwrap();
        assert_eq!(answers(lab), ["proxy", "proxy"]);
        // A learned address is no prefix of the set.
        let failed = rules.update(TP_SET_DST, &[], &BOTH.prefixes()).unwrap_err();
        assert_eq!(failed.errno, ENOENT, "{failed}");
    });
}

#[test]
fn replace_rules_keeps_learned_addresses() {
    answering(|lab, proxy| {
        let config = RulesConfig::of(proxy).dst(NOTHING);
        let rules = lab.proxy.run(|| config.clone().ports(&[80]).install()).unwrap();
        rules.learn(TP_SET_DST, &BOTH.prefixes(), LONG).unwrap();
        let with_source = config.clone().src(["198.51.100.0/24", "2001:db8:1::/64"]);
        for replacement in [config.clone(), with_source, config.clone()] {
            rules.replace(&replacement).unwrap();
            assert_eq!(answers(lab), ["proxy", "proxy"]);
        }
        rules.replace(&config.clone().families(TP_FAMILY_IPV4)).unwrap();
        assert_eq!(answers(lab), ["proxy", "server"]);
        rules.replace(&RulesConfig::new().flags(TP_RULES_DIVERT_ONLY)).unwrap();
        assert_eq!(answers(lab), ["server", "server"]);
        // With every destination, a bypass is learned.
        rules.replace(&RulesConfig::of(proxy)).unwrap();
        rules.learn(TP_SET_BYPASS, &BOTH[..1].prefixes(), LONG).unwrap();
        assert_eq!(answers(lab), ["server", "proxy"]);
        rules.replace(&config.clone().families(TP_FAMILY_IPV6)).unwrap();
        assert_eq!(answers(lab), ["server", "proxy"]);
        rules.replace(&config).unwrap();
        assert_eq!(answers(lab), ["server", "proxy"], "a bypass counts more than a destination");
        rules.learn(TP_SET_BYPASS, &BOTH[..1].prefixes(), 1).unwrap();
        wait_for("a bypass does not end", || (answers(lab) == ["proxy", "proxy"]).then_some(()));
    });
}

#[test]
fn install_rules_persist_takes_over_learned_addresses() {
    answering(|lab, proxy| {
        let config = RulesConfig::of(proxy).dst(NOTHING).flags(TP_RULES_PERSIST);
        let before = lab.proxy.state();
        let rules = lab.proxy.run(|| config.install()).unwrap();
        rules.learn(TP_SET_DST, &BOTH[1..].prefixes(), LONG).unwrap();
        rules.abandon();
        assert_eq!(answers(lab), ["server", "proxy"]);
        // Once with the same configuration, once with one more set.
        let with_source = config.clone().src(["198.51.100.0/24", "2001:db8:1::/64"]);
        for config in [&config, &with_source] {
            let again = wait_for("the rules have an owner", || lab.proxy.run(|| config.install()).ok());
            assert_eq!(answers(lab), ["server", "proxy"]);
            again.abandon();
        }
        let rules = wait_for("the rules have an owner", || lab.proxy.run(|| config.install()).ok());
        rules.learn(TP_SET_DST, &BOTH.prefixes(), LONG).unwrap();
        assert_eq!(answers(lab), ["proxy", "proxy"]);
        rules.learn(TP_SET_DST, &BOTH.prefixes(), 1).unwrap();
        wait_for("learned addresses do not leave", || (answers(lab) == ["server", "server"]).then_some(()));
        rules.remove().unwrap();
        assert_eq!(lab.proxy.state(), before);
    });
}

#[test]
fn learn_addresses_refuses_what_cannot_be_learned() {
    answering(|lab, proxy| {
        let config = RulesConfig::of(proxy).ports(&[80]);
        let rules = lab.proxy.run(|| config.install()).unwrap();
        let before = lab.proxy.state();
        let refused = |set, addrs: &[tp_prefix], ttl, errno, words: &str| {
            let failed = rules.learn(set, addrs, ttl).unwrap_err();
            assert_eq!(failed.errno, errno, "{failed}");
            assert!(failed.to_string().contains(words), "{failed}");
        };
        refused(TP_SET_DST, &BOTH.prefixes(), LONG, EINVAL, "dst NULL");
        refused(TP_SET_SRC, &BOTH.prefixes(), LONG, EINVAL, "TP_SET_BYPASS");
        refused(99, &BOTH.prefixes(), LONG, EINVAL, "99");
        refused(TP_SET_BYPASS, &["203.0.113.2/31"].prefixes(), LONG, EINVAL, "203.0.113.2/31");
        refused(TP_SET_BYPASS, &["2001:db8::/127"].prefixes(), LONG, EINVAL, "2001:db8::/127");
        refused(TP_SET_BYPASS, &BOTH.prefixes(), 0, EINVAL, "0 seconds");
        refused(TP_SET_BYPASS, &[tp_prefix { family: 77, ..BOTH.prefixes()[0] }], LONG, EINVAL, "77");
        // SAFETY: NULL handle, or NULL array: both are refused.
        let failed =
            checked(unsafe { tp_learn_addresses(std::ptr::null_mut(), TP_SET_BYPASS, std::ptr::null(), 0, 1) });
        assert_eq!(failed.unwrap_err().errno, EFAULT);
        rules.learn(TP_SET_BYPASS, &[], LONG).unwrap();
        assert_eq!(lab.proxy.state(), before);
        lab.proxy.run(|| rules.replace(&config.clone().families(TP_FAMILY_IPV4))).unwrap();
        refused_family(&rules);
        lab.proxy.run(|| rules.replace(&RulesConfig::new().flags(TP_RULES_DIVERT_ONLY))).unwrap();
        let failed = rules.learn(TP_SET_BYPASS, &BOTH.prefixes(), LONG).unwrap_err();
        assert_eq!(failed.errno, EINVAL, "{failed}");
        assert_eq!(answers(lab), ["server", "server"]);
    });
}

fn refused_family(rules: &Rules) {
    let failed = rules.learn(TP_SET_BYPASS, &BOTH.prefixes(), LONG).unwrap_err();
    assert_eq!(failed.errno, EINVAL, "{failed}");
    rules.learn(TP_SET_BYPASS, &BOTH[..1].prefixes(), LONG).unwrap();
}

#[test]
fn learn_addresses_with_iptables_is_eopnotsupp() {
    let lab = Lab::new();
    let proxy = listener(&lab);
    let config = RulesConfig::of(&proxy).dst(NOTHING).backend(TP_BACKEND_IPTABLES);
    let rules = lab.proxy.run(|| config.install()).unwrap();
    let before = lab.proxy.state();
    for set in [TP_SET_DST, TP_SET_BYPASS] {
        let failed = rules.learn(set, &BOTH.prefixes(), LONG).unwrap_err();
        assert_eq!(failed.errno, EOPNOTSUPP, "{failed}");
        assert!(failed.to_string().contains("iptables"), "{failed}");
    }
    assert_eq!(lab.proxy.state(), before);
}

#[test]
fn learn_addresses_of_a_million_is_the_most() {
    answering(|lab, proxy| {
        let rules = lab.proxy.run(|| RulesConfig::of(proxy).dst(NOTHING).install()).unwrap();
        let first = 0x0a00_0000;
        learn_all(&rules, TP_SET_DST, &numbered(libc::AF_INET, first..first + 1_000_000 - 1));
        rules.learn(TP_SET_DST, &BOTH[..1].prefixes(), LONG).unwrap();
        let failed = rules.learn(TP_SET_DST, &["192.0.2.9/32"].prefixes(), LONG).unwrap_err();
        assert_eq!(failed.errno, ENOSPC, "{failed}");
        assert!(failed.to_string().contains("1000000"), "{failed}");
        // The other family and the other set have their own count; what is learned may be learned again.
        rules.learn(TP_SET_DST, &BOTH[1..].prefixes(), LONG).unwrap();
        rules.learn(TP_SET_BYPASS, &["192.0.2.9/32"].prefixes(), LONG).unwrap();
        assert_eq!(answers(lab), ["proxy", "proxy"]);
        let again = rules.learn(TP_SET_DST, &BOTH[..1].prefixes(), LONG);
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let numbers: Vec<u32> = release.split('.').take(2).filter_map(|number| number.parse().ok()).collect();
        if numbers >= vec![6, 12] {
            again.unwrap();
        }
    });
}
