//! Rules that are replaced or updated while traffic flows, that outlive their process, or that are taken over.

mod common;

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use libc::{EBUSY, EEXIST, EINVAL, ENOENT};
use tproxy::ffi::*;

/// The networks of the server.
const SERVERS: [&str; 2] = ["203.0.113.0/24", "2001:db8:2::/64"];

/// Takes over rules that were abandoned.
fn take_over(config: &RulesConfig) -> Rules {
    not_busy(|| config.install())
}

/// Repeats an attempt while the rules have an owner. Rules that were just abandoned may have one for a moment: a child that
/// another test is starting has the socket until it calls exec(2).
fn not_busy<T>(attempt: impl Fn() -> Result<T, Failed>) -> T {
    wait_for("the rules have an owner", || match attempt() {
        Err(failed) if failed.errno == EBUSY => None,
        done => Some(done.unwrap()),
    })
}

fn listener(lab: &Lab) -> TcpListener {
    lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT)).unwrap()
}

/// Whether a connection to a server's port is intercepted; otherwise the server must get it.
fn intercepted(lab: &Lab, hosts: Hosts, listener: &TcpListener, server: &TcpListener) -> bool {
    let port = server.local_addr().unwrap().port();
    let _client = lab.client.run(|| connect(at(hosts.server, port)));
    wait_for("neither the proxy nor the server gets the connection", || {
        match (accept_within(listener, Duration::ZERO), accept_within(server, Duration::ZERO)) {
            (None, None) => None,
            (Some(_), None) => Some(true),
            (None, Some(_)) => Some(false),
            (Some(_), Some(_)) => panic!("the proxy and the server both got a connection"),
        }
    })
}

/// Clients connect without pause while the body runs; gives the number of their connections. Each must be intercepted,
/// none may fail, and no first packet may be lost: the client would send it again.
fn under_load(lab: &Lab, listener: &TcpListener, server: &TcpListener, body: impl FnOnce()) -> usize {
    let (done, made, accepted) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let repeated = lab.client.syns_repeated();
    listener.set_nonblocking(true).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut deadline = None;
            while !done.load(Ordering::Relaxed) || accepted.load(Ordering::Relaxed) < made.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok(_) => _ = accepted.fetch_add(1, Ordering::Relaxed),
                    Err(_) => std::thread::sleep(Duration::from_micros(50)),
                }
                if done.load(Ordering::Relaxed) {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience());
                    assert!(Instant::now() < deadline, "{accepted:?} of {made:?} connections were intercepted");
                }
            }
        });
        for hosts in [v4(), v6()] {
            let (done, made, accepted, lab) = (&done, &made, &accepted, &lab);
            scope.spawn(move || {
                lab.client.run(|| {
                    while !done.load(Ordering::Relaxed) {
                        // Packets of more connections than the listener's queue holds would be dropped.
                        if made.load(Ordering::Relaxed) > accepted.load(Ordering::Relaxed) + 1000 {
                            std::thread::yield_now();
                            continue;
                        }
                        let stream = connect(at(hosts.server, 80));
                        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                        made.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
        }
        let outcome = catch_unwind(AssertUnwindSafe(body));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| resume_unwind(panic));
    });
    assert!(accept_within(server, Duration::ZERO).is_none(), "a connection was not intercepted");
    assert_eq!(lab.client.syns_repeated(), repeated, "first packets were lost");
    made.into_inner()
}

#[test]
fn replace_rules_under_load_leaves_no_gap() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let many = |len: u8| -> Vec<tp_prefix> {
        (0..5000).map(|n| format!("10.{}.{}.0/{len}", n / 250, n % 250)).collect::<Vec<_>>().prefixes()
    };
    let (many, more) = (many(24), many(25));
    let http = RulesConfig::of(&listener).ports(&[80]);
    let configs = [
        http.clone().dst([SERVERS.prefixes(), many.clone()].concat()),
        http.clone(),
        http.ports(&[80, 81]).dst(SERVERS).flags(TP_RULES_LOCAL_OUTPUT),
        RulesConfig::of(&listener).dst(SERVERS).flags(TP_RULES_NOTRACK | TP_RULES_ALLOW_DIRECT),
    ];
    let before = lab.proxy.state();
    let rules = lab.proxy.run(|| configs[0].install()).unwrap();
    let made = under_load(&lab, &listener, &lab.serve(80), || {
        lab.proxy.run(|| {
            for n in 1..=200 {
                rules.replace(&configs[n % configs.len()]).unwrap();
                std::thread::sleep(Duration::from_millis(1));
                if n % configs.len() == 0 {
                    // First so many prefixes of one length that they get a set of their own, then some of that set.
                    rules.update(TP_SET_DST, &more[..1000], &many[..10]).unwrap();
                    rules.update(TP_SET_DST, &more[1000..1010], &more[..10]).unwrap();
                }
            }
        });
    });
    assert!(made > 200, "only {made} connections");
    lab.proxy.run(|| rules.remove()).unwrap();
    assert_eq!(lab.proxy.state(), before);
}

/// The rules serve IPv4 first, then both families: the IPv6 route of another program in the same table is not taken for
/// one of the library's.
#[test]
fn replace_rules_with_foreign_route_in_table_is_eexist() {
    let lab = Lab::new();
    let plain = lab.proxy.run(|| listen("0.0.0.0:3129".parse().unwrap(), TP_LISTEN_REUSEPORT)).unwrap();
    let dual = lab.proxy.run(|| listen("[::]:3130".parse().unwrap(), 0)).unwrap();
    lab.proxy.ip("-6 route add default dev eth1 table 7470");
    let rules = lab.proxy.run(|| intercept(&plain, 80)).unwrap();
    let before = lab.proxy.state();
    let failed = rules.replace(&RulesConfig::of(&dual).ports(&[80])).unwrap_err();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert_eq!(lab.proxy.state(), before);
    assert!(intercepted(&lab, v4(), &plain, &lab.serve(80)));
}

/// The TCP listener serves both families, the UDP socket only IPv4: UDP over IPv6 is forwarded.
#[test]
fn install_rules_leaves_protocol_without_listener_alone() {
    for backend in [TP_BACKEND_NFT, TP_BACKEND_IPTABLES] {
        let lab = Lab::new();
        let tcp = listener(&lab);
        let udp = lab.proxy.run(|| receiver("0.0.0.0:3129".parse().unwrap()));
        let config = RulesConfig::new().listeners(&[&tcp, &udp]).backend(backend);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        let server = lab.server.run(|| std::net::UdpSocket::bind("[::]:53")).unwrap();
        server.set_read_timeout(Some(patience())).unwrap();
        lab.client.run(|| std::net::UdpSocket::bind("[::]:0").unwrap().send_to(b"hello", at(v6().server, 53))).unwrap();
        assert_eq!(server.recv(&mut [0; 10]).unwrap(), 5);
        lab.client
            .run(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"hello", at(v4().server, 53)))
            .unwrap();
        assert_eq!(receive_datagram(&udp, patience()).unwrap().2, at(v4().server, 53));
    }
}

#[test]
fn replace_rules_changes_selection_and_keeps_counters() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let (http, other) = (lab.serve(80), lab.serve(81));
    let rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    assert!(intercepted(&lab, v4(), &listener, &http));
    let counted = rules.stats().intercepted_packets;
    let config = RulesConfig::of(&listener);
    lab.proxy.run(|| rules.replace(&config.clone().ports(&[81]).dst(["203.0.113.2/32"]))).unwrap();
    assert!(!intercepted(&lab, v4(), &listener, &http));
    assert!(intercepted(&lab, v4(), &listener, &other));
    assert!(!intercepted(&lab, v6(), &listener, &other));
    assert!(rules.stats().intercepted_packets > counted, "the counters begin anew");
    // A configuration that is refused changes nothing.
    let failed = rules.replace(&config.ports(&[0])).unwrap_err();
    assert_eq!(failed.errno, EINVAL);
    assert!(intercepted(&lab, v4(), &listener, &other));
}

#[test]
fn update_rules_adds_and_removes_prefixes() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let config = RulesConfig::of(&listener).ports(&[80]).dst(["192.0.2.0/24", "203.0.113.0/25"]);
    let rules = lab.proxy.run(|| config.install()).unwrap();
    let update = |set, add: &[&str], remove: &[&str]| rules.update(set, &prefixes(add), &prefixes(remove));
    assert!(intercepted(&lab, v4(), &listener, &server));
    assert!(!intercepted(&lab, v6(), &listener, &server));
    // A wider prefix replaces the first and is removed again; a neighbor and all of IPv6 are added.
    update(TP_SET_DST, &["203.0.112.0/23", "2001:db8::/32"], &["203.0.113.0/25"]).unwrap();
    assert!(intercepted(&lab, v4(), &listener, &server));
    assert!(intercepted(&lab, v6(), &listener, &server));
    update(TP_SET_BYPASS, &["203.0.113.2/32"], &[]).unwrap();
    assert!(!intercepted(&lab, v4(), &listener, &server));
    update(TP_SET_BYPASS, &[], &["203.0.113.2/32"]).unwrap();
    assert!(intercepted(&lab, v4(), &listener, &server));
    update(TP_SET_DST, &["192.0.3.0/24", "255.255.255.255/32", "0.0.0.0/32"], &["203.0.112.0/23"]).unwrap();
    assert!(!intercepted(&lab, v4(), &listener, &server));
    let held = lab.proxy.nft("list sets");
    for range in ["0.0.0.0,", "192.0.2.0/23", "255.255.255.255"] {
        assert!(held.contains(range), "{held}");
    }
    // If a prefix to be removed is not in the set, none is added.
    let failed = update(TP_SET_DST, &["203.0.113.0/24"], &["198.18.0.0/15"]).unwrap_err();
    assert_eq!(failed.errno, ENOENT);
    assert!(!intercepted(&lab, v4(), &listener, &server));
    // An empty set intercepts nothing.
    update(TP_SET_DST, &[], &["192.0.2.0/24", "192.0.3.0/24", "255.255.255.255/32", "0.0.0.0/32", "2001:db8::/32"])
        .unwrap();
    assert!(!intercepted(&lab, v6(), &listener, &server));
}

#[test]
fn rules_stats_counts_intercepted_diverted_dropped_and_direct_packets() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    assert_eq!(rules.stats().intercepted_packets, 0);
    // Each first packet of a connection counts, also one that TCP sends again.
    let syns = || lab.client.syns_sent();
    let before = syns();
    assert!(intercepted(&lab, v4(), &listener, &server));
    let (stats, sent) = (rules.stats(), syns() - before);
    // The listener gets the first packet, the accepted socket the others.
    assert_eq!((stats.intercepted_packets, stats.intercepted_bytes), (sent, 60 * sent));
    assert!(stats.diverted_packets > 0 && stats.diverted_bytes >= 52 * stats.diverted_packets);
    assert_eq!((stats.dropped_packets, stats.direct_packets), (0, 0));
    let before = syns();
    lab.client.run(|| connect_in_vain(at(v4().proxy, 3129))).unwrap_err();
    assert_eq!(rules.stats().direct_packets, syns() - before);
    lab.proxy.run(|| close(listener));
    let before = syns();
    lab.client.run(|| connect_in_vain(at(v6().server, 80))).unwrap_err();
    let (stats, sent) = (rules.stats(), syns() - before);
    assert_eq!((stats.dropped_packets, stats.dropped_bytes), (sent, 80 * sent));
}

#[test]
fn install_rules_fail_open_without_listener_forwards() {
    let lab = Lab::new();
    let first = listener(&lab);
    let server = lab.serve(80);
    let config = RulesConfig::of(&first).ports(&[80]).flags(TP_RULES_FAIL_OPEN);
    let _rules = lab.proxy.run(|| config.install()).unwrap();
    assert!(intercepted(&lab, v4(), &first, &server));
    lab.proxy.run(|| close(first));
    let unreached = lab.proxy.run(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    for hosts in [v4(), v6()] {
        assert!(!intercepted(&lab, hosts, &unreached, &server));
    }
    let second = listener(&lab);
    assert!(intercepted(&lab, v6(), &second, &server));
}

#[test]
fn install_rules_with_listen_addr_serves_listener_of_other_process() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let config = RulesConfig::new().listen_addr(at(ip("::"), 3129)).ports(&[80]);
    let _rules = lab.proxy.run(|| config.install()).unwrap();
    for hosts in [v4(), v6()] {
        assert!(intercepted(&lab, hosts, &listener, &server));
    }
}

#[test]
fn install_rules_restart_under_second_name_leaves_no_gap() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let before = lab.proxy.state();
    let config = RulesConfig::of(&listener).ports(&[80]);
    let (old, new) = (config.clone().name("old"), config.name("new"));
    let mut installed = lab.proxy.run(|| old.install()).unwrap();
    under_load(&lab, &listener, &lab.serve(80), || {
        for n in 0..20 {
            // The next instance comes before the last one goes, whichever of the two was there first.
            let next = lab.proxy.run(|| if n % 2 == 0 { new.install() } else { old.install() }).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            std::mem::replace(&mut installed, next).remove().unwrap();
        }
    });
    installed.remove().unwrap();
    assert_eq!(lab.proxy.state(), before);
}

#[test]
fn install_rules_persist_intercepts_without_owner_until_taken_over_or_purged() {
    let lab = Lab::new();
    let before = lab.proxy.state();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let plain = RulesConfig::of(&listener).ports(&[80]);
    let config = plain.clone().flags(TP_RULES_PERSIST);
    // abandon() closes the handle's sockets and removes nothing, as the end of a process does.
    let rules = lab.proxy.run(|| config.install()).unwrap();
    assert_eq!(lab.proxy.run(|| config.install()).err().unwrap().errno, EBUSY);
    assert_eq!(lab.proxy.run(|| purge(Some("tproxy"))).unwrap_err().errno, EBUSY);
    rules.abandon();
    // Without an owner they still intercept.
    for hosts in [v4(), v6()] {
        assert!(intercepted(&lab, hosts, &listener, &server));
    }
    let failed = lab.proxy.run(|| plain.install()).err().unwrap();
    assert_eq!(failed.errno, EEXIST);
    assert!(failed.sentence.contains("tp_purge_rules"), "{failed}");

    // They are taken over with another configuration, under load, without a gap.
    let wider = RulesConfig::of(&listener)
        .ports(&[80, 81])
        .dst(["203.0.113.0/24", "2001:db8::/32"])
        .flags(TP_RULES_PERSIST | TP_RULES_LOCAL_OUTPUT);
    let configs = [&wider, &config];
    under_load(&lab, &listener, &server, || {
        for n in 0..20 {
            lab.proxy.run(|| take_over(configs[n % 2])).abandon();
        }
    });
    // Sets replace sets, which have other names.
    lab.proxy.run(|| take_over(&wider)).abandon();
    lab.proxy.run(|| take_over(&wider)).abandon();
    let rules = lab.proxy.run(|| take_over(&wider));
    assert!(intercepted(&lab, v4(), &listener, &server));
    lab.proxy.run(|| rules.remove()).unwrap();
    assert_eq!(lab.proxy.state(), before);

    lab.proxy.run(|| config.install()).unwrap().abandon();
    assert_ne!(lab.proxy.state(), before);
    lab.proxy.run(|| purge(Some("other"))).unwrap();
    assert_ne!(lab.proxy.state(), before);
    lab.proxy.run(|| not_busy(|| purge(Some("tproxy"))));
    assert_eq!(lab.proxy.state(), before);
    lab.proxy.run(|| config.install()).unwrap().abandon();
    // tp_purge_rules(NULL) passes over rules that have an owner: it is called when they have none.
    lab.proxy.run(|| not_busy(|| purge(Some("tproxy")).and_then(|()| purge(None))));
    assert_eq!(lab.proxy.state(), before);
}

/// A process was killed after it claimed its name and before it filled the table.
#[test]
fn install_rules_persist_takes_over_empty_table() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let config = RulesConfig::of(&listener).ports(&[80]).flags(TP_RULES_PERSIST);
    lab.proxy.run(|| config.install()).unwrap().abandon();
    // The table as the killed process would have left it.
    lab.proxy.nft("flush table inet libtproxy-tproxy");
    for object in [
        "chain inet libtproxy-tproxy prerouting",
        "chain inet libtproxy-tproxy divert",
        "counter inet libtproxy-tproxy dropped",
    ] {
        lab.proxy.nft(&format!("flush table inet libtproxy-tproxy; delete {object}"));
    }
    let rules = lab.proxy.run(|| take_over(&config));
    assert!(intercepted(&lab, v4(), &listener, &lab.serve(80)));
    lab.proxy.run(|| rules.remove()).unwrap();
}

/// With TP_CONNECT_KEEP_PORT both connections of the proxy have the same five-tuple, which connection tracking would confuse.
#[test]
fn install_rules_notrack_keeps_client_port_beside_connection_tracking() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    lab.proxy.nft(
        "table inet firewall {
            chain input { type filter hook input priority 0; ct state invalid drop
            }
            chain output { type filter hook output priority 0; ct state invalid drop
            }
        }",
    );
    let config = RulesConfig::of(&listener).ports(&[80]).flags(TP_RULES_NOTRACK);
    let _rules = lab.proxy.run(|| config.install()).unwrap();
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            let served = scope.spawn(|| answer_one(&server));
            scope.spawn(|| lab.proxy.run(|| proxy_one(&listener, TP_CONNECT_KEEP_PORT)));
            let heard = lab.ask(at(hosts.server, 80)).unwrap();
            assert_eq!(served.join().unwrap(), heard.from);
        });
    }
    let tracked = lab.proxy.run(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack"));
    assert!(!tracked.unwrap_or_default().contains("dport=80 "));
}

#[test]
fn render_rules_script_intercepts() {
    for format in [TP_FORMAT_NFT, TP_FORMAT_IPTABLES] {
        let lab = Lab::new();
        let listener = listener(&lab);
        let server = lab.serve(80);
        let script = RulesConfig::of(&listener).ports(&[80]).dst(["203.0.113.2/32", "2001:db8:2::/64"]).render(format);
        lab.proxy.command("sh", &["-c", &script]);
        for hosts in [v4(), v6()] {
            assert!(intercepted(&lab, hosts, &listener, &server), "{script}");
        }
    }
}

#[test]
fn install_rules_after_rendered_script_is_eexist_until_purged() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let config = RulesConfig::of(&listener).ports(&[80]);
    lab.proxy.command("sh", &["-c", &config.render(TP_FORMAT_NFT)]);
    assert_eq!(lab.proxy.run(|| config.install()).err().unwrap().errno, EEXIST);
    lab.proxy.run(|| purge(Some("tproxy"))).unwrap();
    assert!(!intercepted(&lab, v4(), &listener, &server));
}

#[test]
fn replace_rules_and_update_rules_with_iptables_change_selection() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let (http, other) = (lab.serve(80), lab.serve(81));
    let config = RulesConfig::of(&listener).backend(TP_BACKEND_IPTABLES);
    let first = config.clone().ports(&[80]).dst(SERVERS);
    let rules = lab.proxy.run(|| first.install()).unwrap();
    let busy = lab.proxy.run(|| first.install()).err().unwrap();
    assert_eq!(busy.errno, EBUSY, "{busy}");
    let before = lab.client.syns_sent();
    for hosts in [v4(), v6()] {
        assert!(intercepted(&lab, hosts, &listener, &http));
    }
    let sent = lab.client.syns_sent() - before;
    for hosts in [v4(), v6()] {
        assert!(!intercepted(&lab, hosts, &listener, &other));
    }
    lab.proxy.run(|| {
        let stats = rules.stats();
        assert_eq!(stats.intercepted_packets, sent);
        assert!(stats.diverted_packets >= 2);
        rules.update(TP_SET_DST, &[], &prefixes(&["203.0.113.0/24"])).unwrap();
    });
    assert!(!intercepted(&lab, v4(), &listener, &http));
    assert!(intercepted(&lab, v6(), &listener, &http));
    lab.proxy.run(|| rules.replace(&config.ports(&[81]))).unwrap();
    for hosts in [v4(), v6()] {
        assert!(!intercepted(&lab, hosts, &listener, &http));
        assert!(intercepted(&lab, hosts, &listener, &other));
    }
    let before = lab.client.syns_sent();
    lab.client.run(|| connect_in_vain(at(v4().proxy, 3129))).unwrap_err();
    assert_eq!(lab.proxy.run(|| rules.stats()).direct_packets, lab.client.syns_sent() - before);
    lab.proxy.run(|| rules.remove()).unwrap();
    assert!(!lab.proxy.command("iptables-save", &[]).contains("tproxy"));
    assert!(!lab.proxy.command("ip6tables-save", &[]).contains("tproxy"));
}

/// iptables chains have no owner: chains of a killed process drop the packets that they select until a new instance takes
/// them over or they are purged.
#[test]
fn install_rules_with_iptables_takes_over_chains_of_killed_process() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let config = RulesConfig::of(&listener).ports(&[80]).backend(TP_BACKEND_IPTABLES);
    // What a killed process leaves: its descriptors are closed, and nothing is removed.
    let leave = || {
        let script = config.render(TP_FORMAT_IPTABLES);
        lab.proxy.command("sh", &["-c", &script]);
    };
    // A chain of another program, whose name has the form of the library's.
    lab.proxy.command("iptables", &["-t", "mangle", "-N", "tp-link-p"]);
    leave();
    let rules = lab.proxy.run(|| config.install()).unwrap();
    assert_eq!(lab.proxy.command("iptables-save", &[]).matches("-A PREROUTING").count(), 1, "one jump, not two");
    assert!(intercepted(&lab, v4(), &listener, &server));
    lab.proxy.run(|| rules.remove()).unwrap();
    leave();
    lab.proxy.run(|| purge(Some("other"))).unwrap();
    assert!(lab.proxy.command("iptables-save", &[]).contains("tp-tproxy-p"));
    lab.proxy.run(|| purge(None)).unwrap();
    let held = lab.proxy.command("iptables-save", &[]);
    assert!(!held.contains("tp-tproxy-p") && held.contains(":tp-link-p"), "{held}");
    assert!(!lab.proxy.state().contains("proto 116"));
    assert!(!intercepted(&lab, v4(), &listener, &server));
}
