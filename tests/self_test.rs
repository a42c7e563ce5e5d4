//! tp_self_test: probes through rules in a temporary network namespace.

mod common;

use common::*;
use tproxy::ffi::*;

fn self_test(config: &RulesConfig) -> Result<Vec<Found>, Failed> {
    let mut found: Vec<Found> = Vec::new();
    let failures = config.with(|config| {
        // SAFETY: the callback takes such a context; what the config points to is alive during the call.
        checked(unsafe { tp_self_test(config, size_of::<tp_rules_config>(), Some(take), (&raw mut found).cast()) })
    })?;
    assert_eq!(failures as usize, found.iter().filter(|f| f.severity == TP_SEVERITY_FAILURE).count());
    Ok(found)
}

/// A configuration for a listener on an address.
fn at_addr(listen: &str) -> RulesConfig {
    RulesConfig::new().listen_addr(listen.parse().unwrap())
}

/// Severity, id, and the first words of each finding.
fn short(found: &[Found]) -> Vec<(u32, &str, &str)> {
    found.iter().map(|f| (f.severity, f.id.as_str(), f.message.split(" from ").next().unwrap())).collect()
}

/// Asserts which families and protocols a configuration serves.
fn assert_served(config: &RulesConfig, v4: bool, v6: bool, udp: bool) {
    assert_eq!(short(&self_test(config).unwrap()), served(v4, v6, udp));
}

const BOTH: u32 = TP_PROTO_TCP | TP_PROTO_UDP;

fn served(v4: bool, v6: bool, udp: bool) -> Vec<(u32, &'static str, &'static str)> {
    let mut expected = Vec::new();
    for (served, connection, datagram) in
        [(v4, "IPv4 connection", "IPv4 datagram"), (v6, "IPv6 connection", "IPv6 datagram")]
    {
        if served {
            expected.push((TP_SEVERITY_OK, "self_test.connection", connection));
            if udp {
                expected.push((TP_SEVERITY_OK, "self_test.datagram", datagram));
            }
        }
    }
    for (absent, words) in [
        (!v4, "IPv4: not selected by the configuration"),
        (!v6, "IPv6: not selected by the configuration"),
        (!udp, "udp: not selected by the configuration"),
    ] {
        if absent {
            expected.push((TP_SEVERITY_NOTE, "self_test.skipped", words));
        }
    }
    expected
}

#[test]
fn self_test_of_working_config_delivers_and_answers() {
    let all = at_addr("[::]:3129").protocols(BOTH);
    assert_served(&all, true, true, true);
    assert_served(&at_addr("[::]:3129"), true, true, false);
    assert_served(&at_addr("0.0.0.0:3129").protocols(BOTH), true, false, true);
    assert_served(&at_addr("127.0.0.1:3129").protocols(BOTH), true, false, true);
    assert_served(&at_addr("[::1]:3129").protocols(BOTH), false, true, true);
    let bypass = ["203.0.113.0/24", "2001:db8:2::/48"];
    let selected = all
        .clone()
        .port_ranges([(443, 8443)])
        .mark(0x10)
        .mark_mask(0x10)
        .dst(["192.0.2.128/25", "2001:db8:77::/48"])
        .src(["10.0.0.0/8", "fd00::/8"])
        .bypass(bypass)
        .interfaces(&["eth7"]);
    let found = self_test(&selected).unwrap();
    assert_eq!(short(&found), served(true, true, true));
    assert!(
        found[0].message.contains(" from 10.0.0.2:") && found[0].message.contains(" to 192.0.2.130:443:"),
        "{found:?}"
    );
    assert_served(&at_addr("[::]:3129").bypass(bypass), true, true, false);
    for flags in [TP_RULES_LOCAL_OUTPUT, TP_RULES_FAIL_OPEN, TP_RULES_ALLOW_DIRECT, TP_RULES_NOTRACK, TP_RULES_PERSIST]
    {
        assert_served(&all.clone().flags(flags), true, true, true);
    }
    assert_served(&at_addr("[::]:3129").flags(TP_RULES_REDIRECT), true, true, false);
    assert_served(&at_addr("203.0.113.1:3129").flags(TP_RULES_REDIRECT), true, false, false);
    assert_served(&all.backend(TP_BACKEND_IPTABLES), true, true, true);
}

/// No probe is sent that the rules would not intercept.
#[test]
fn self_test_of_empty_list_sends_no_probe() {
    let config = || at_addr("[::]:3129");
    let nothing: [&str; 0] = [];
    assert_served(&config().ports(&[]), false, false, false);
    assert_served(&config().dst(nothing), false, false, false);
    assert_served(&config().src(nothing), false, false, false);
    assert_served(&config().interfaces(&nothing), false, false, false);
    assert_served(&config().bypass(nothing), true, true, false);
    assert_served(&config().src(["10.0.0.0/8"]), true, false, false);
    assert_served(&config().dst(["2001:db8:77::/48"]), false, true, false);
}

#[test]
fn self_test_of_divert_only_delivers_to_foreign_addresses() {
    assert_served(&RulesConfig::new().flags(TP_RULES_DIVERT_ONLY).protocols(BOTH), true, true, true);
}

/// Packets that are translated to the address of a listener on loopback are martians.
fn losing_config() -> RulesConfig {
    at_addr("127.0.0.1:3129").flags(TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT)
}

#[test]
fn self_test_of_lost_probe_names_last_hook() {
    let found = self_test(&losing_config()).unwrap();
    assert_eq!(found[0].severity, TP_SEVERITY_FAILURE, "{found:#?}");
    let words = "lost; last seen at hook prerouting, last: routing did not deliver it (a martian, or no route)";
    assert!(found[0].message.ends_with(words), "{found:#?}");
}

/// A machine that is busy may delay some of the calls, not all of them.
#[test]
fn self_test_of_lost_probe_takes_less_than_three_seconds() {
    let elapsed = || {
        let begin = std::time::Instant::now();
        self_test(&losing_config()).unwrap();
        begin.elapsed()
    };
    let taken: Vec<_> = std::iter::repeat_with(elapsed).take(5).collect();
    assert!(taken.iter().any(|elapsed| *elapsed < limit(3000)), "{taken:?}");
}

/// The destination of the probe is the listener itself, and the rules drop direct connections. The chain is named.
#[test]
fn self_test_of_dropped_probe_names_chain_and_rule() {
    let found = self_test(&at_addr("0.0.0.0:3129").dst(["192.0.2.1/32"]).ports(&[3129])).unwrap();
    assert_eq!(found[0].severity, TP_SEVERITY_FAILURE, "{found:#?}");
    let words = "; last seen in chain direct of table libtproxy-tproxy, where rule ";
    assert!(found[0].message.contains(words) && found[0].message.ends_with(" dropped it"), "{found:#?}");
}

#[test]
fn self_test_leaves_network_of_caller_unchanged() {
    let net = Net::new();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let before = net.state() + &net.ip("-o link") + &net.ip("addr");
    net.run(|| {
        let namespace = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let mine = namespace();
        let found = self_test(&RulesConfig::of(&listener)).unwrap();
        assert_eq!(short(&found), served(true, true, false));
        assert_eq!(namespace(), mine);
    });
    assert_eq!(net.state() + &net.ip("-o link") + &net.ip("addr"), before);
}

#[test]
fn self_test_with_bad_config_or_without_privilege_is_refused() {
    if process::role().is_some() {
        let failed = self_test(&RulesConfig::new().flags(TP_RULES_DIVERT_ONLY)).unwrap_err();
        return println!("errno {}: {}", failed.errno, failed.sentence);
    }
    let failed = self_test(&RulesConfig::new()).unwrap_err();
    assert_eq!(failed.errno, libc::EINVAL);
    assert!(failed.sentence.contains("no listeners"), "{failed}");
    // SAFETY: a callback of NULL is refused.
    let failed = checked(unsafe { tp_self_test(&config(), size_of::<tp_rules_config>(), None, std::ptr::null_mut()) });
    assert_eq!(failed.unwrap_err().errno, libc::EFAULT);
    let setpriv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", "--"];
    let test = self_test_with_bad_config_or_without_privilege_is_refused;
    let output = Net::new().output(process::by_program(&setpriv, test, "self-test"));
    assert!(output.contains("errno 1: unshare(CLONE_NEWNET): ") && output.contains("`unshare -r PROGRAM`"), "{output}");
}

/// No descriptor, thread or blocked signal is left.
#[test]
fn self_test_leaves_nothing_in_the_process() {
    process::alone(self_test_leaves_nothing_in_the_process, || {
        let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
        let blocked = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            status.lines().find(|line| line.starts_with("SigBlk")).unwrap().to_owned()
        };
        let config = RulesConfig::new().flags(TP_RULES_DIVERT_ONLY);
        self_test(&config).unwrap();
        let before = (count("fd"), count("task"), blocked());
        for _ in 0..5 {
            self_test(&config).unwrap();
            assert_eq!(check().iter().filter(|finding| finding.severity == TP_SEVERITY_FAILURE).count(), 0);
        }
        assert_eq!((count("fd"), count("task"), blocked()), before);
    });
}
