//! Rules that change while traffic flows, outlive their process, or are taken over.

mod common;

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::*;
use libc::{EBUSY, EEXIST, EINVAL, ENOENT};
use tproxy::ffi::*;

/// What a configuration points to, kept together with it.
struct OwnedConfig {
    name: std::ffi::CString,
    listener: i32,
    ports: Vec<tp_port_range>,
    dst: Vec<tp_prefix>,
    flags: u32,
}

impl OwnedConfig {
    fn new(listener: &impl AsRawFd, ports: &[u16], dst: &[&str], flags: u32) -> OwnedConfig {
        OwnedConfig {
            name: c"tproxy".to_owned(),
            listener: listener.as_raw_fd(),
            ports: ports.iter().map(|port| tp_port_range { first: *port, last: *port }).collect(),
            dst: prefixes(dst),
            flags,
        }
    }

    fn named(self, name: &str) -> OwnedConfig {
        OwnedConfig { name: std::ffi::CString::new(name).unwrap(), ..self }
    }

    fn config(&self) -> tp_rules_config {
        tp_rules_config {
            name: self.name.as_ptr(),
            listeners: &raw const self.listener,
            n_listeners: 1,
            flags: self.flags,
            ports: self.ports.as_ptr(),
            n_ports: self.ports.len(),
            dst: self.dst.as_ptr(),
            n_dst: self.dst.len(),
            ..config()
        }
    }

    fn install(&self) -> Result<Rules, Failed> {
        Rules::install(&self.config())
    }

    /// Takes over what was abandoned.
    fn take_over(&self) -> Rules {
        not_busy(|| self.install())
    }
}

/// Does something with what was abandoned. A child that another test is just starting may hold on to the socket, until
/// it becomes another program.
fn not_busy<T>(attempt: impl Fn() -> Result<T, Failed>) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(failed) if failed.errno == EBUSY && std::time::Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            done => return done.unwrap(),
        }
    }
}

fn listener(lab: &Lab) -> TcpListener {
    lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT)).unwrap()
}

/// Whether a connection to a server's port is intercepted; else the server must get it.
fn intercepted(lab: &Lab, hosts: Hosts, listener: &TcpListener, server: &TcpListener) -> bool {
    let port = server.local_addr().unwrap().port();
    let _client = lab.client.run(|| TcpStream::connect_timeout(&at(hosts.server, port), PATIENCE)).unwrap();
    let step = Duration::from_millis(2);
    loop {
        match (accept_within(listener, step), accept_within(server, step)) {
            (None, None) => {}
            (Some(_), None) => return true,
            (None, Some(_)) => return false,
            (Some(_), Some(_)) => panic!("one connection, two ends"),
        }
    }
}

/// Clients that connect without pause while something is done; how many connections they made. None may fail, and
/// none may reach the server.
fn under_load(lab: &Lab, listener: &TcpListener, server: &TcpListener, body: impl FnOnce()) -> usize {
    let (done, made, got) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    listener.set_nonblocking(true).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) || got.load(Ordering::Relaxed) < made.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok(_) => _ = got.fetch_add(1, Ordering::Relaxed),
                    Err(_) => std::thread::sleep(Duration::from_micros(50)),
                }
            }
        });
        for hosts in [v4(), v6()] {
            let (done, made, got, lab) = (&done, &made, &got, &lab);
            scope.spawn(move || {
                lab.client.run(|| {
                    while !done.load(Ordering::Relaxed) {
                        // More than the listener's queue holds would be dropped, whatever the rules are.
                        if made.load(Ordering::Relaxed) > got.load(Ordering::Relaxed) + 1000 {
                            std::thread::yield_now();
                            continue;
                        }
                        // A lost packet would take a second to be sent again.
                        let stream = TcpStream::connect_timeout(&at(hosts.server, 80), Duration::from_millis(900));
                        socket2::SockRef::from(&stream.expect("a connection failed"))
                            .set_linger(Some(Duration::ZERO))
                            .unwrap();
                        made.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
        }
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        done.store(true, Ordering::Relaxed);
        ended.unwrap();
    });
    assert!(accept_within(server, Duration::from_millis(50)).is_none(), "a connection was not intercepted");
    made.into_inner()
}

#[test]
fn replacing_leaves_no_gap() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let all = ["203.0.113.0/24", "2001:db8:2::/64"];
    let many = |len: u8| -> Vec<tp_prefix> {
        let texts: Vec<String> = (0..5000).map(|n| format!("10.{}.{}.0/{len}", n / 250, n % 250)).collect();
        prefixes(&texts.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (many, more) = (many(24), many(25));
    let mut large = OwnedConfig::new(&listener, &[80], &all, 0);
    large.dst.extend(&many);
    let config = [
        large,
        OwnedConfig::new(&listener, &[80], &[], 0),
        OwnedConfig::new(&listener, &[80, 81], &all, TP_RULES_LOCAL_OUTPUT),
        OwnedConfig::new(&listener, &[], &all, TP_RULES_NOTRACK | TP_RULES_ALLOW_DIRECT),
    ];
    let before = lab.proxy.state();
    let rules = lab.proxy.run(|| config[0].install()).unwrap();
    let made = under_load(&lab, &listener, &lab.serve(80), || {
        lab.proxy.run(|| {
            for n in 1..=200 {
                rules.replace(&config[n % config.len()].config()).unwrap();
                std::thread::sleep(Duration::from_millis(1));
                if n % config.len() == 0 {
                    // So many of a length that they get a set of their own; then some of that.
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

/// IPv4 alone, then both: somebody's route in the table must not be taken for ours.
#[test]
fn a_route_of_someone_else_stops_a_replacement() {
    let lab = Lab::new();
    let plain = lab.proxy.run(|| listen("0.0.0.0:3129".parse().unwrap(), TP_LISTEN_REUSEPORT)).unwrap();
    let dual = lab.proxy.run(|| listen("[::]:3130".parse().unwrap(), 0)).unwrap();
    lab.proxy.ip("-6 route add default dev eth1 table 7470");
    let rules = lab.proxy.run(|| OwnedConfig::new(&plain, &[80], &[], 0).install()).unwrap();
    let before = lab.proxy.state();
    let failed = rules.replace(&OwnedConfig::new(&dual, &[80], &[], 0).config()).unwrap_err();
    assert_eq!(failed.errno, EEXIST, "{failed}");
    assert_eq!(lab.proxy.state(), before);
    assert!(intercepted(&lab, v4(), &plain, &lab.serve(80)));
}

/// TCP over both families, UDP over IPv4 alone: nobody asked for UDP over IPv6.
#[test]
fn what_no_listener_serves_is_left_alone() {
    for backend in [TP_BACKEND_NFT, TP_BACKEND_IPTABLES] {
        let lab = Lab::new();
        let tcp = listener(&lab);
        let udp = lab.proxy.run(|| receiver("0.0.0.0:3129".parse().unwrap()));
        let fds = [tcp.as_raw_fd(), udp.as_raw_fd()];
        let _rules = lab
            .proxy
            .run(|| Rules::install(&tp_rules_config { listeners: fds.as_ptr(), n_listeners: 2, backend, ..config() }))
            .unwrap();
        let server = lab.server.run(|| std::net::UdpSocket::bind("[::]:53")).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        lab.client.run(|| std::net::UdpSocket::bind("[::]:0").unwrap().send_to(b"hello", at(v6().server, 53))).unwrap();
        assert_eq!(server.recv(&mut [0; 10]).unwrap(), 5);
        lab.client
            .run(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"hello", at(v4().server, 53)))
            .unwrap();
        assert_eq!(receive_datagram(&udp, PATIENCE).unwrap().2, at(v4().server, 53));
    }
}

#[test]
fn what_was_replaced_is_what_counts() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let (http, other) = (lab.serve(80), lab.serve(81));
    let rules = lab.proxy.run(|| OwnedConfig::new(&listener, &[80], &[], 0).install()).unwrap();
    assert!(intercepted(&lab, v4(), &listener, &http));
    let counted = rules.stats().intercepted_packets;
    lab.proxy.run(|| rules.replace(&OwnedConfig::new(&listener, &[81], &["203.0.113.2/32"], 0).config())).unwrap();
    assert!(!intercepted(&lab, v4(), &listener, &http));
    assert!(intercepted(&lab, v4(), &listener, &other));
    assert!(!intercepted(&lab, v6(), &listener, &other));
    assert!(rules.stats().intercepted_packets > counted, "counters go on");
    // A config that cannot be carried out changes nothing.
    let failed = rules.replace(&OwnedConfig::new(&listener, &[0], &[], 0).config()).unwrap_err();
    assert_eq!(failed.errno, EINVAL);
    assert!(intercepted(&lab, v4(), &listener, &other));
}

#[test]
fn prefixes_come_and_go() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let rules =
        lab.proxy.run(|| OwnedConfig::new(&listener, &[80], &["192.0.2.0/24", "203.0.113.0/25"], 0).install()).unwrap();
    let update = |set, add: &[&str], remove: &[&str]| rules.update(set, &prefixes(add), &prefixes(remove));
    assert!(intercepted(&lab, v4(), &listener, &server));
    assert!(!intercepted(&lab, v6(), &listener, &server));
    // A wider one takes its place, then goes; a neighbour comes, and all of IPv6.
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
    // What is not there cannot be removed, and then nothing is added either.
    let failed = update(TP_SET_DST, &["203.0.113.0/24"], &["198.18.0.0/15"]).unwrap_err();
    assert_eq!(failed.errno, ENOENT);
    assert!(!intercepted(&lab, v4(), &listener, &server));
    // An empty set intercepts nothing.
    update(TP_SET_DST, &[], &["192.0.2.0/24", "192.0.3.0/24", "255.255.255.255/32", "0.0.0.0/32", "2001:db8::/32"])
        .unwrap();
    assert!(!intercepted(&lab, v6(), &listener, &server));
}

#[test]
fn counters_count_what_was_intercepted_diverted_dropped_and_guarded() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let rules = lab.proxy.run(|| OwnedConfig::new(&listener, &[80], &[], 0).install()).unwrap();
    assert_eq!(rules.stats().intercepted_packets, 0);
    assert!(intercepted(&lab, v4(), &listener, &server));
    let stats = rules.stats();
    // The first packet is the listener's; the handshake's end, and what follows, the connection's.
    assert_eq!((stats.intercepted_packets, stats.intercepted_bytes), (1, 60));
    assert!(stats.diverted_packets > 0 && stats.diverted_bytes >= 52 * stats.diverted_packets);
    assert_eq!((stats.dropped_packets, stats.direct_packets), (0, 0));
    lab.client.run(|| TcpStream::connect_timeout(&at(v4().proxy, 3129), NEVER)).unwrap_err();
    assert_eq!(rules.stats().direct_packets, 1);
    drop(listener);
    lab.client.run(|| TcpStream::connect_timeout(&at(v6().server, 80), NEVER)).unwrap_err();
    assert_eq!((rules.stats().dropped_packets, rules.stats().dropped_bytes), (1, 80));
}

#[test]
fn fail_open_lets_traffic_pass_while_there_is_no_listener() {
    let lab = Lab::new();
    let first = listener(&lab);
    let server = lab.serve(80);
    let _rules = lab.proxy.run(|| OwnedConfig::new(&first, &[80], &[], TP_RULES_FAIL_OPEN).install()).unwrap();
    assert!(intercepted(&lab, v4(), &first, &server));
    drop(first);
    let nobody = lab.proxy.run(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    for hosts in [v4(), v6()] {
        assert!(!intercepted(&lab, hosts, &nobody, &server));
    }
    let second = listener(&lab);
    assert!(intercepted(&lab, v6(), &second, &server));
}

#[test]
fn a_listener_in_another_process_is_named_by_its_address() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let addr = socket2::SockAddr::from(std::net::SocketAddr::from(([0u16; 8], 3129)));
    let port = tp_port_range { first: 80, last: 80 };
    let _rules = lab.proxy.run(|| {
        Rules::install(&tp_rules_config {
            listen_addr: addr.as_ptr().cast(),
            listen_addrlen: addr.len(),
            ports: &raw const port,
            n_ports: 1,
            ..config()
        })
        .unwrap()
    });
    for hosts in [v4(), v6()] {
        assert!(intercepted(&lab, hosts, &listener, &server));
    }
}

#[test]
fn a_restart_by_a_second_name_leaves_no_gap_in_either_order() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let before = lab.proxy.state();
    let config = |name| OwnedConfig::new(&listener, &[80], &[], 0).named(name);
    let (old, new) = (config("old"), config("new"));
    let mut installed = lab.proxy.run(|| old.install()).unwrap();
    under_load(&lab, &listener, &lab.serve(80), || {
        for n in 0..20 {
            // The next comes before the last goes, whichever of the two was there first.
            let next = lab.proxy.run(|| if n % 2 == 0 { new.install() } else { old.install() }).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            std::mem::replace(&mut installed, next).remove().unwrap();
        }
    });
    installed.remove().unwrap();
    assert_eq!(lab.proxy.state(), before);
}

#[test]
fn rules_that_persist_hold_the_place_of_a_dead_process_until_taken_over_or_purged() {
    let lab = Lab::new();
    let before = lab.proxy.state();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let config = OwnedConfig::new(&listener, &[80], &[], TP_RULES_PERSIST);
    // The process ends without removing them: here, by forgetting the handle and closing its socket.
    let rules = lab.proxy.run(|| config.install()).unwrap();
    assert_eq!(lab.proxy.run(|| config.install()).err().unwrap().errno, EBUSY);
    assert_eq!(lab.proxy.run(|| purge(Some("tproxy"))).unwrap_err().errno, EBUSY);
    rules.abandon();
    // Orphaned, they still intercept.
    for hosts in [v4(), v6()] {
        assert!(intercepted(&lab, hosts, &listener, &server));
    }
    let failed = lab.proxy.run(|| OwnedConfig::new(&listener, &[80], &[], 0).install()).err().unwrap();
    assert_eq!(failed.errno, EEXIST);
    assert!(failed.sentence.contains("tp_purge_rules"), "{failed}");

    // Taken over with another config, under load, without a gap.
    let wider = OwnedConfig::new(
        &listener,
        &[80, 81],
        &["203.0.113.0/24", "2001:db8::/32"],
        TP_RULES_PERSIST | TP_RULES_LOCAL_OUTPUT,
    );
    let both = [&wider, &config];
    under_load(&lab, &listener, &server, || {
        for n in 0..20 {
            lab.proxy.run(|| both[n % 2].take_over()).abandon();
        }
    });
    let rules = lab.proxy.run(|| wider.take_over());
    lab.proxy.run(|| rules.remove()).unwrap();
    assert_eq!(lab.proxy.state(), before);

    lab.proxy.run(|| config.install()).unwrap().abandon();
    assert_ne!(lab.proxy.state(), before);
    lab.proxy.run(|| purge(Some("other"))).unwrap();
    assert_ne!(lab.proxy.state(), before);
    lab.proxy.run(|| not_busy(|| purge(Some("tproxy"))));
    assert_eq!(lab.proxy.state(), before);
    lab.proxy.run(|| config.install()).unwrap().abandon();
    // By no name, what is still somebody's is passed over: ask until nothing is.
    lab.proxy.run(|| not_busy(|| purge(Some("tproxy")).and_then(|()| purge(None))));
    assert_eq!(lab.proxy.state(), before);
}

/// A process that is killed after it claimed its name, and before it filled the table, is no obstacle to the next.
#[test]
fn an_empty_table_that_persists_is_taken_over() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let config = OwnedConfig::new(&listener, &[80], &[], TP_RULES_PERSIST);
    lab.proxy.run(|| config.install()).unwrap().abandon();
    // As the killed process would have left it.
    lab.proxy.nft("flush table inet libtproxy-tproxy");
    for object in [
        "chain inet libtproxy-tproxy prerouting",
        "chain inet libtproxy-tproxy divert",
        "counter inet libtproxy-tproxy dropped",
    ] {
        lab.proxy.nft(&format!("flush table inet libtproxy-tproxy; delete {object}"));
    }
    let rules = lab.proxy.run(|| config.take_over());
    assert!(intercepted(&lab, v4(), &listener, &lab.serve(80)));
    lab.proxy.run(|| rules.remove()).unwrap();
}

/// Both halves of a proxied connection have the same five-tuple when the client's port is kept; connection tracking
/// would take the one for the other.
#[test]
fn without_tracking_a_kept_port_works_beside_connection_tracking() {
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
    let _rules = lab.proxy.run(|| OwnedConfig::new(&listener, &[80], &[], TP_RULES_NOTRACK).install()).unwrap();
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

/// The script, run by hand, intercepts as the library does.
#[test]
fn a_rendered_script_intercepts() {
    for format in [TP_FORMAT_NFT, TP_FORMAT_IPTABLES] {
        let lab = Lab::new();
        let listener = listener(&lab);
        let server = lab.serve(80);
        let script =
            render(&OwnedConfig::new(&listener, &[80], &["203.0.113.2/32", "2001:db8:2::/64"], 0).config(), format);
        lab.proxy.command("sh", &["-c", &script]);
        for hosts in [v4(), v6()] {
            assert!(intercepted(&lab, hosts, &listener, &server), "{script}");
        }
    }
}

#[test]
fn what_a_script_made_is_respected_and_can_be_purged() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let script = render(&OwnedConfig::new(&listener, &[80], &[], 0).config(), TP_FORMAT_NFT);
    lab.proxy.command("sh", &["-c", &script]);
    assert_eq!(lab.proxy.run(|| OwnedConfig::new(&listener, &[80], &[], 0).install()).err().unwrap().errno, EEXIST);
    lab.proxy.run(|| purge(Some("tproxy"))).unwrap();
    assert!(!intercepted(&lab, v4(), &listener, &server));
}

fn by_iptables(config: &OwnedConfig) -> tp_rules_config {
    tp_rules_config { backend: TP_BACKEND_IPTABLES, ..config.config() }
}

#[test]
fn iptables_rules_are_replaced_updated_counted_and_removed() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let (http, other) = (lab.serve(80), lab.serve(81));
    let all = ["203.0.113.0/24", "2001:db8:2::/64"];
    let config = OwnedConfig::new(&listener, &[80], &all, 0);
    let rules = lab.proxy.run(|| Rules::install(&by_iptables(&config))).unwrap();
    let busy = lab.proxy.run(|| Rules::install(&by_iptables(&config))).err().unwrap();
    assert_eq!(busy.errno, EBUSY, "{busy}");
    for hosts in [v4(), v6()] {
        assert!(intercepted(&lab, hosts, &listener, &http));
        assert!(!intercepted(&lab, hosts, &listener, &other));
    }
    lab.proxy.run(|| {
        let stats = rules.stats();
        assert_eq!(stats.intercepted_packets, 2);
        assert!(stats.diverted_packets >= 2);
        rules.update(TP_SET_DST, &[], &prefixes(&["203.0.113.0/24"])).unwrap();
    });
    assert!(!intercepted(&lab, v4(), &listener, &http));
    assert!(intercepted(&lab, v6(), &listener, &http));
    lab.proxy.run(|| rules.replace(&by_iptables(&OwnedConfig::new(&listener, &[81], &[], 0)))).unwrap();
    for hosts in [v4(), v6()] {
        assert!(!intercepted(&lab, hosts, &listener, &http));
        assert!(intercepted(&lab, hosts, &listener, &other));
    }
    lab.client.run(|| TcpStream::connect_timeout(&at(v4().proxy, 3129), NEVER)).unwrap_err();
    assert_eq!(lab.proxy.run(|| rules.stats()).direct_packets, 1);
    lab.proxy.run(|| rules.remove()).unwrap();
    assert!(!lab.proxy.command("iptables-save", &[]).contains("tproxy"));
    assert!(!lab.proxy.command("ip6tables-save", &[]).contains("tproxy"));
}

/// Chains have no owner: what a killed process left drops what it intercepted, until somebody comes or cleans up.
#[test]
fn iptables_rules_of_a_dead_process_are_taken_over_or_purged() {
    let lab = Lab::new();
    let listener = listener(&lab);
    let server = lab.serve(80);
    let config = OwnedConfig::new(&listener, &[80], &[], 0);
    // As if killed: the descriptors close, and nothing is removed.
    let leave = || {
        let script = render(&config.config(), TP_FORMAT_IPTABLES);
        lab.proxy.command("sh", &["-c", &script]);
    };
    // Somebody's chain, whose name could be one of ours.
    lab.proxy.command("iptables", &["-t", "mangle", "-N", "tp-link-p"]);
    leave();
    let rules = lab.proxy.run(|| Rules::install(&by_iptables(&config))).unwrap();
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
