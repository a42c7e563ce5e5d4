//! Lists of a configuration: NULL does not restrict the selection, an empty list selects nothing.

mod common;

use common::*;
use libc::{EFAULT, EINVAL};
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];
const NOTHING: [&str; 0] = [];

/// The length of a list in a configuration.
type Length = fn(&mut tp_rules_config) -> &mut usize;

/// A configuration with one empty list.
type WithEmptyList = fn(RulesConfig) -> RulesConfig;

const EMPTY_LISTS: [(&str, WithEmptyList); 4] = [
    ("ports", |config| config.ports(&[])),
    ("dst", |config| config.dst(NOTHING)),
    ("src", |config| config.src(NOTHING)),
    ("interfaces", |config| config.interfaces(&NOTHING)),
];

/// Who answers a client of each family that asks the server's port 80.
fn answers(lab: &Lab) -> [String; 2] {
    [v4(), v6()].map(|hosts| lab.client.run(|| said(at(hosts.server, 80)).unwrap()))
}

/// Who answers the proxy's host itself.
fn own_answers(lab: &Lab) -> [String; 2] {
    [v4(), v6()].map(|hosts| lab.proxy.run(|| said(at(hosts.server, 80)).unwrap()))
}

#[test]
fn install_rules_with_empty_list_intercepts_nothing() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let transparent = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let ordinary = lab.proxy.run(|| std::net::TcpListener::bind("[::]:3130").unwrap());
    while_answering(&[(&server, "server"), (&transparent, "proxy"), (&ordinary, "proxy")], || {
        for backend in BACKENDS {
            let config = |flags| {
                let redirect = flags & TP_RULES_REDIRECT != 0;
                let listener = if redirect { &ordinary } else { &transparent };
                RulesConfig::of(listener).flags(flags).backend(backend)
            };
            for flags in [0, TP_RULES_REDIRECT, TP_RULES_LOCAL_OUTPUT, TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT] {
                let local = flags & TP_RULES_LOCAL_OUTPUT != 0;
                for (name, empty) in EMPTY_LISTS {
                    let case = format!("{name} flags {flags:#x} backend {backend}");
                    let rules = lab.proxy.run(|| empty(config(flags)).install()).expect(&case);
                    assert_eq!(answers(&lab), ["server", "server"], "{case}");
                    // The interfaces are those of forwarded traffic.
                    let own = if local && name == "interfaces" { "proxy" } else { "server" };
                    if local {
                        assert_eq!(own_answers(&lab), [own, own], "{case}");
                    }
                    lab.proxy.run(|| rules.replace(&config(flags))).expect(&case);
                    assert_eq!(answers(&lab), ["proxy", "proxy"], "{case}");
                    lab.proxy.run(|| rules.replace(&empty(config(flags)))).expect(&case);
                    assert_eq!(answers(&lab), ["server", "server"], "{case}");
                    lab.proxy.run(|| rules.remove()).expect(&case);
                }
            }
        }
        let notrack = RulesConfig::of(&transparent).flags(TP_RULES_NOTRACK).backend(TP_BACKEND_NFT);
        for (name, empty) in EMPTY_LISTS {
            let rules = lab.proxy.run(|| empty(notrack.clone()).install()).unwrap();
            assert_eq!(answers(&lab), ["server", "server"], "{name}");
            lab.proxy.run(|| rules.remove()).unwrap();
        }
    });
}

/// An empty set is one that can be filled; it is empty again after its last prefix was removed.
#[test]
fn update_rules_fills_empty_list() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let servers = ["203.0.113.0/24", "2001:db8:2::/64"].prefixes();
    let clients = ["198.51.100.0/24", "2001:db8:1::/64"].prefixes();
    while_answering(&[(&server, "server"), (&listener, "proxy")], || {
        for backend in BACKENDS {
            let config = RulesConfig::of(&listener).ports(&[80]).backend(backend);
            for (set, empty, prefixes) in [
                (TP_SET_DST, config.clone().dst(NOTHING), &servers),
                (TP_SET_SRC, config.clone().src(NOTHING), &clients),
            ] {
                let case = format!("set {set} backend {backend}");
                let rules = lab.proxy.run(|| empty.install()).unwrap();
                assert_eq!(answers(&lab), ["server", "server"], "{case}");
                lab.proxy.run(|| rules.update(set, &prefixes[..1], &[])).unwrap();
                assert_eq!(answers(&lab), ["proxy", "server"], "{case}");
                lab.proxy.run(|| rules.update(set, &prefixes[1..], &prefixes[..1])).unwrap();
                assert_eq!(answers(&lab), ["server", "proxy"], "{case}");
                lab.proxy.run(|| rules.update(set, &[], &prefixes[1..])).unwrap();
                assert_eq!(answers(&lab), ["server", "server"], "{case}");
                lab.proxy.run(|| rules.remove()).unwrap();
            }
        }
    });
}

/// No bypass and an empty one are the same, also where nothing is intercepted; a list that is NULL cannot be updated.
#[test]
fn update_rules_of_null_list_is_einval() {
    let net = Net::new();
    net.run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let prefix = ["192.0.2.0/24"].prefixes();
        for backend in BACKENDS {
            let rules = RulesConfig::of(&listener).bypass(NOTHING).backend(backend).install().unwrap();
            for set in [TP_SET_DST, TP_SET_SRC] {
                let failed = rules.update(set, &prefix, &[]).unwrap_err();
                assert_eq!(failed.errno, EINVAL);
                assert!(failed.sentence.contains("restricts nothing"), "{failed:?}");
            }
            rules.update(TP_SET_BYPASS, &prefix, &[]).unwrap();
            rules.update(TP_SET_BYPASS, &[], &prefix).unwrap();
            rules.remove().unwrap();
        }
        let divert = RulesConfig::new().flags(TP_RULES_DIVERT_ONLY);
        let rules = divert.clone().bypass(NOTHING).install().unwrap();
        for set in [TP_SET_DST, TP_SET_SRC, TP_SET_BYPASS] {
            let failed = rules.update(set, &prefix, &[]).unwrap_err();
            assert_eq!(failed.errno, EINVAL);
            assert!(failed.sentence.contains("TP_RULES_DIVERT_ONLY"), "{failed:?}");
        }
        rules.remove().unwrap();
        for (name, empty) in EMPTY_LISTS {
            assert_eq!(empty(divert.clone()).install().unwrap_err().errno, EINVAL, "{name}");
        }
    });
}

/// Rules that intercept nothing are as they should be.
#[test]
fn check_of_rules_with_empty_list_gives_no_warning() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    for backend in BACKENDS {
        for flags in [0, TP_RULES_LOCAL_OUTPUT] {
            for (name, empty) in EMPTY_LISTS {
                let config = empty(RulesConfig::of(&listener).backend(backend).flags(flags));
                let rules = lab.proxy.run(|| config.install()).unwrap();
                let found = lab.proxy.run(check);
                let case = format!("{name} flags {flags:#x} backend {backend}");
                assert_eq!(troubles(&found), [] as [&Found; 0], "{case}");
                lab.proxy.run(|| rules.remove()).unwrap();
            }
        }
    }
}

/// Rules that bypass nothing look for no replies, and so do not switch connection tracking on.
#[test]
fn render_rules_of_empty_list_has_no_rule_for_it() {
    let config = || RulesConfig::new().listen_addr("[::]:3129".parse().unwrap());
    for format in [TP_FORMAT_NFT, TP_FORMAT_IPTABLES] {
        assert_eq!(config().bypass(NOTHING).render(format), config().render(format));
        let candidates = |config: RulesConfig| {
            let script = config.render(format);
            // The jumps to the chain that selects by addresses, or to what follows it where there are no addresses.
            let jumps = ["goto select", "goto vet", "-j tp-tproxy-s"];
            let of_hook = |line: &&str| line.contains(" prerouting ") || line.starts_with("-A tp-tproxy-p ");
            script.lines().filter(of_hook).filter(|line| jumps.iter().any(|jump| line.contains(jump))).count()
        };
        assert!(candidates(config()) > 0);
        assert_eq!(candidates(config().ports(&[])), 0);
        assert_eq!(candidates(config().interfaces(&NOTHING)), 0);
    }
}

/// An empty name is that of the default instance, as NULL is; it does not stand for every instance.
#[test]
fn empty_name_is_default_instance() {
    Net::new().run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let config = || RulesConfig::of(&listener).ports(&[80]).flags(TP_RULES_PERSIST);
        config().name("").install().unwrap().abandon();
        config().name("other").listeners(&[]).listen_addr("[::]:3130".parse().unwrap()).install().unwrap().abandon();
        assert_eq!(config().name("tproxy").render(TP_FORMAT_NFT), config().name("").render(TP_FORMAT_NFT));
        purge(Some("")).unwrap();
        let tables = std::process::Command::new("nft").args(["list", "tables"]).output().unwrap().stdout;
        assert_eq!(String::from_utf8(tables).unwrap(), "table inet libtproxy-other\n");
    });
}

#[test]
fn rules_config_with_null_list_of_some_length_is_efault() {
    let addr = socket2::SockAddr::from("[::]:3129".parse::<std::net::SocketAddr>().unwrap());
    let given = || {
        let mut config = config();
        (config.listen_addr, config.listen_addrlen) = (addr.as_ptr().cast(), addr.len());
        config
    };
    let lengths: [(&str, Length); 5] = [
        ("ports", |config| &mut config.n_ports),
        ("dst", |config| &mut config.n_dst),
        ("src", |config| &mut config.n_src),
        ("bypass", |config| &mut config.n_bypass),
        ("interfaces", |config| &mut config.n_interfaces),
    ];
    Net::new().run(|| {
        for (name, length) in lengths {
            let mut config = given();
            *length(&mut config) = 1;
            assert_eq!(Rules::install(&config).unwrap_err().errno, EFAULT, "{name:?}");
        }
    });
}
