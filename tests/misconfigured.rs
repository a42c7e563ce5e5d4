//! Hosts on which transparent proxying fails silently: each test misconfigures a host, shows that traffic breaks, expects
//! the finding that names the cause, runs the command that the finding prints, and shows that traffic flows again.

mod common;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use common::*;
use tproxy::ffi::*;

/// What intercepts port 80 for the listener on port 3129.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Library,
    LibraryWith(u32),
    /// The library, after another program has done this.
    LibraryAfter(&'static str),
    /// The recipe of the kernel's documentation, with mark 1 and table 100.
    Iptables,
    IptablesLegacy,
    Nft,
}
use By::*;

const IPTABLES: &str = "for ip in IP ip6SIX; do
    $ip -t mangle -N DIVERT
    $ip -t mangle -A PREROUTING -p tcp -m socket -j DIVERT
    $ip -t mangle -A DIVERT -j MARK --set-mark 1
    $ip -t mangle -A DIVERT -j ACCEPT
    $ip -t mangle -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 3129 --tproxy-mark 1
    done";
const NFT: &str = "nft 'table inet byhand {
    chain pre { type filter hook prerouting priority mangle;
        socket transparent 1 socket wildcard 0 meta mark set 1 accept
        meta l4proto tcp th dport 80 tproxy to :3129 meta mark set 1 accept
    }
}'";
const ROUTES: &str =
    "for f in -4 -6; do ip $f rule add fwmark 1 lookup 100; ip $f route add local default dev lo table 100; done";

/// A connection of the client.
#[derive(Clone, Copy)]
enum Flow {
    /// Port 80 of the server; the proxy answers.
    Proxied(fn() -> Hosts),
    /// Port 81 of the server, which is forwarded.
    Forwarded(fn() -> Hosts),
    /// Port 82 of the proxy's host itself.
    Own(fn() -> Hosts),
}
use Flow::*;

struct Row {
    id: &'static str,
    by: By,
    /// Shell commands that break the proxy's host.
    spoil: &'static str,
    broken: Flow,
}

const fn row(id: &'static str, by: By, spoil: &'static str, broken: Flow) -> Row {
    Row { id, by, spoil, broken }
}

/// A lab in which the proxy and the server answer.
struct World<'a> {
    lab: &'a Lab,
}

impl World<'_> {
    /// Whether a connection is answered by the right host, with a time limit for each step.
    fn works_within(&self, flow: Flow, limit: std::time::Duration) -> bool {
        let (to, words) = match flow {
            Proxied(hosts) => (at(hosts().server, 80), "proxy"),
            Forwarded(hosts) => (at(hosts().server, 81), "server"),
            Own(hosts) => (at(hosts().proxy, 82), "own"),
        };
        self.lab.client.run(|| said_within(to, limit)).is_ok_and(|answer| answer == words)
    }

    /// The same, at the latest after some attempts.
    fn works(&self, flow: Flow) -> bool {
        (0..4).any(|_| self.works_within(flow, limit(5000)))
    }

    fn is_broken(&self, flow: Flow) -> bool {
        !self.works_within(flow, silence())
    }
}

fn install(by: By, proxy: &Net, listener: &TcpListener) -> Option<Rules> {
    let rules = |flags| {
        let config = RulesConfig::of(listener).ports(&[80]).flags(flags);
        Some(proxy.run(|| config.install()).unwrap())
    };
    let by_hand = |script: &str| {
        proxy.sh(script);
        proxy.sh(ROUTES);
        None
    };
    match by {
        Library => rules(0),
        LibraryAfter(before) => {
            proxy.sh(before);
            rules(0)
        }
        LibraryWith(flags) => rules(flags),
        Iptables => by_hand(&IPTABLES.replace("IP", "iptables-nft").replace("ip6SIX", "ip6tables-nft")),
        IptablesLegacy => by_hand(&IPTABLES.replace("IP", "iptables-legacy").replace("ip6SIX", "ip6tables-legacy")),
        Nft => by_hand(NFT),
    }
}

/// Runs a test on a host where everything works.
fn world(by: By, test: impl FnOnce(&World<'_>)) {
    let lab = Lab::new();
    let (one, other) = (lab.serve(80), lab.serve(81));
    let own = lab.proxy.run(|| TcpListener::bind(at(ip("::"), 82)).unwrap());
    let listener = match by {
        LibraryWith(flags) if flags & TP_RULES_REDIRECT != 0 => {
            lab.proxy.run(|| TcpListener::bind("127.0.0.1:3129").unwrap())
        }
        _ => lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap(),
    };
    if by == LibraryWith(TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT) {
        lab.proxy.sysctl("ipv4/conf/all/route_localnet", "1");
    }
    let _rules = install(by, &lab.proxy, &listener);
    let answering = [(&one, "server"), (&other, "server"), (&own, "own"), (&listener, "proxy")];
    while_answering(&answering, || test(&World { lab: &lab }));
}

/// Breaks the host, expects the finding and runs its command. The error says which step failed.
fn tried(row: &Row) -> Result<(), String> {
    let mut outcome = Ok(());
    world(row.by, |world| outcome = tried_in(row, world));
    outcome
}

fn tried_in(row: &Row, world: &World<'_>) -> Result<(), String> {
    let proxy = &world.lab.proxy;
    let must = |yes: bool, what: &str, found: &[Found]| match yes {
        true => Ok(()),
        false => Err(format!("{} ({}): {what} {:#?}", row.id, row.spoil, troubles(found))),
    };
    must(world.works(row.broken), "it never worked", &[])?;
    let before = proxy.run(check);
    must(troubles(&before).is_empty(), "a healthy host is warned", &before)?;
    proxy.sh(row.spoil);
    must(world.is_broken(row.broken), "it still works", &[])?;
    let found = proxy.run(check);
    let named: Vec<&Found> = troubles(&found).into_iter().filter(|finding| finding.id == row.id).collect();
    must(!named.is_empty(), "not named among", &found)?;
    for finding in named {
        must(!finding.fix.is_empty() && !finding.fix.contains("{"), "no command", &found)?;
        proxy.sh(&finding.fix);
    }
    let after = proxy.run(check);
    must(world.works(row.broken), "not fixed by these commands; left is", &[found, after.clone()].concat())?;
    must(troubles(&after).iter().all(|finding| finding.id != row.id), "still found", &after)
}

fn all(rows: &[Row]) {
    let mut failed = Vec::new();
    // Only a few at a time, since each row has three hosts.
    for some in rows.chunks(4) {
        std::thread::scope(|scope| {
            let tests: Vec<_> = some.iter().map(|row| scope.spawn(move || tried(row))).collect();
            failed.extend(tests.into_iter().filter_map(|test| test.join().unwrap().err()));
        });
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn check_names_and_fixes_routing() {
    all(&[
        row("route.loopback_down", Library, "ip link set lo down", Proxied(v6)),
        row("route.missing", Library, "ip route flush table 7470", Proxied(v4)),
        row("route.missing", Library, "ip -6 route flush table 7470", Proxied(v6)),
        row("route.missing", Nft, "ip route flush table 100", Proxied(v4)),
        row("route.foreign", Library, "ip route add 203.0.113.0/24 dev eth1 table 7470", Proxied(v4)),
        row("rule.missing", Library, "ip rule del pref 201", Proxied(v4)),
        row("rule.missing", Library, "ip -6 rule del pref 201", Proxied(v6)),
        row("rule.missing", Iptables, "ip -6 rule del fwmark 1", Proxied(v6)),
        row(
            "rule.guard_missing",
            Library,
            "ip rule del pref 200; sysctl -qw net.ipv4.conf.all.src_valid_mark=1",
            Proxied(v4),
        ),
        row("rule.shadowed", Library, "ip rule add pref 100 lookup main", Proxied(v4)),
        row("rule.shadowed", Library, "ip -6 rule add pref 100 blackhole", Proxied(v6)),
        row("rule.shadowed", Library, "ip -6 rule add pref 100 iif eth0 prohibit", Proxied(v6)),
        row("rule.shadowed", Nft, "ip rule add pref 100 lookup main", Proxied(v4)),
        row(
            "rule.mark_collision",
            Library,
            "ip rule add pref 150 fwmark 0x2000/0x2000 lookup 50; ip route add unreachable default table 50",
            Proxied(v4),
        ),
        row("rule.table_shared", Library, "ip rule add pref 150 from 198.51.100.0/24 lookup 7470", Forwarded(v4)),
        row("rule.local_missing", Library, "ip rule del pref 0", Own(v4)),
        row("rule.local_missing", Library, "ip -6 rule del pref 0", Own(v6)),
        row("rule.main_missing", Library, "ip rule del pref 32766", Proxied(v4)),
        row("rule.main_missing", Library, "ip -6 rule del pref 32766", Proxied(v6)),
    ]);
}

#[test]
fn check_names_and_fixes_sysctls() {
    all(&[
        row("sysctl.src_valid_mark", Iptables, "sysctl -qw net.ipv4.conf.all.src_valid_mark=1", Proxied(v4)),
        row("sysctl.src_valid_mark", Nft, "sysctl -qw net.ipv4.conf.all.src_valid_mark=1", Proxied(v4)),
        row("sysctl.tcp_fwmark_accept", Nft, "sysctl -qw net.ipv4.tcp_fwmark_accept=1", Proxied(v4)),
        row("sysctl.tcp_fwmark_accept", Iptables, "sysctl -qw net.ipv4.tcp_fwmark_accept=1", Proxied(v6)),
        row("sysctl.ip_forward", Library, "sysctl -qw net.ipv4.ip_forward=0", Forwarded(v4)),
        row("sysctl.forwarding_v6", Library, "sysctl -qw net.ipv6.conf.all.forwarding=0", Forwarded(v6)),
        row("sysctl.forwarding_interface", Library, "sysctl -qw net.ipv4.conf.eth0.forwarding=0", Forwarded(v4)),
        row("sysctl.disable_ipv6", Library, "sysctl -qw net.ipv6.conf.lo.disable_ipv6=1", Proxied(v6)),
    ]);
}

#[test]
fn check_names_and_fixes_filters_of_other_programs() {
    all(&[
        row(
            "filter.prerouting_drop",
            Library,
            "nft 'table inet fw { chain c { type filter hook prerouting priority raw; tcp dport 80 drop; }\n}'",
            Proxied(v4),
        ),
        row(
            "filter.prerouting_drop",
            Library,
            "nft 'table inet fw { chain c { type filter hook prerouting priority filter; tcp dport { 80, 443 } drop; }\n}'",
            Proxied(v6),
        ),
        row(
            "filter.input_drop",
            Library,
            "nft 'table inet fw { chain c { type filter hook input priority filter; policy drop;
                ct state established,related accept; ct state invalid drop; iifname lo accept; meta l4proto icmpv6 accept;
                tcp dport { 22, 82 } accept; }\n}'",
            Proxied(v4),
        ),
        row(
            "filter.input_drop",
            Library,
            "nft 'table ip6 fw { chain open { tcp dport 22 accept; }
                chain c { type filter hook input priority filter; jump open; meta l4proto icmpv6 accept; reject; }\n}'",
            Proxied(v6),
        ),
        row(
            "filter.input_drop",
            Library,
            "iptables-nft -P INPUT DROP; iptables-nft -A INPUT -i lo -j ACCEPT; iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT
             iptables-nft -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            Proxied(v4),
        ),
        row(
            "filter.output_drop",
            Library,
            "nft 'table ip fw { chain c { type filter hook output priority filter; policy drop; }\n}'",
            Proxied(v4),
        ),
        row("filter.output_drop", Library, "iptables-nft -P OUTPUT DROP", Proxied(v4)),
        row(
            "filter.mark_overwritten",
            Library,
            "nft 'table inet fw { chain c { type filter hook prerouting priority -140; meta mark set 0x40000; }\n}'",
            Proxied(v4),
        ),
        row(
            "filter.mark_overwritten",
            Library,
            "nft 'table inet fw { chain c { type filter hook prerouting priority -100; iifname eth0 meta mark set ct mark; }\n}'",
            Proxied(v6),
        ),
        row(
            "filter.mark_collision",
            Library,
            "nft 'table inet fw { chain c { type filter hook prerouting priority -200; tcp dport 81 meta mark set 0x2000; }\n}'",
            Forwarded(v4),
        ),
        row(
            "filter.mark_collision",
            Library,
            "ip6tables-nft -t mangle -A PREROUTING -p tcp --dport 81 -j MARK --or-mark 0x2000",
            Forwarded(v6),
        ),
        row(
            "filter.nat",
            Library,
            "nft 'table ip fw { chain c { type nat hook prerouting priority -190; tcp dport 80 redirect to :82; }\n}'",
            Proxied(v4),
        ),
        row(
            "filter.mark_overwritten",
            LibraryAfter("iptables-nft -t mangle -A PREROUTING -p udp --dport 9 -j MARK --set-mark 1"),
            "iptables-nft -t mangle -A PREROUTING -p tcp --dport 80 -j MARK --set-mark 1",
            Proxied(v4),
        ),
        row("filter.rpfilter", Nft, FIREWALLD, Proxied(v6)),
        row("filter.rpfilter", Iptables, FIREWALLD, Proxied(v4)),
    ]);
}

/// As firewalld's IPv6_rpfilter, for both families.
const FIREWALLD: &str =
    "nft 'table inet firewalld { chain filter_PREROUTING { type filter hook prerouting priority filter + 10;
    icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept; fib saddr . mark . iif oif missing drop; }\n}'";

#[test]
fn check_names_and_fixes_legacy_iptables() {
    if !provided(Requirement::LegacyIptables) {
        return;
    }
    all(&[
        row("sysctl.src_valid_mark", IptablesLegacy, "sysctl -qw net.ipv4.conf.eth0.src_valid_mark=1", Proxied(v4)),
        row(
            "filter.prerouting_drop",
            Library,
            "iptables-legacy -t raw -A PREROUTING -p tcp --dport 80 -j DROP",
            Proxied(v4),
        ),
        row(
            "filter.input_drop",
            Library,
            "ip6tables-legacy -N good; ip6tables-legacy -A good -p tcp --dport 22 -j ACCEPT; ip6tables-legacy -A INPUT -j good
             ip6tables-legacy -A INPUT -p icmpv6 -j ACCEPT; ip6tables-legacy -P INPUT DROP",
            Proxied(v6),
        ),
    ]);
}

#[test]
fn check_names_and_fixes_tproxy_rule_of_other_proxy() {
    world(Library, |world| {
        let proxy = &world.lab.proxy;
        let other = proxy.run(|| listen("[::]:9999".parse().unwrap(), 0)).unwrap();
        let row = row(
            "filter.tproxy_elsewhere",
            Library,
            "nft 'table inet other { chain c { type filter hook prerouting priority -140
                tcp dport 80 tproxy to :9999 meta mark set 1 accept\n}\n}'; RULES",
            Proxied(v4),
        );
        let spoil: &'static str = row.spoil.replace("RULES", ROUTES).leak();
        while_answering(&[(&other, "other")], || tried_in(&Row { spoil, ..row }, world).unwrap());
    });
}

#[test]
fn check_names_and_fixes_redirection_to_loopback() {
    tried(&row(
        "sysctl.route_localnet",
        LibraryWith(TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT),
        "sysctl -qw net.ipv4.conf.all.route_localnet=0",
        Proxied(v4),
    ))
    .unwrap();
}

#[test]
fn check_names_and_fixes_bridges_that_filter_ip() {
    if !provided(Requirement::Sysctl("bridge/bridge-nf-call-iptables")) {
        return;
    }
    for (id, family, hosts) in [
        ("sysctl.bridge_nf_call_iptables", "bridge-nf-call-iptables", v4 as fn() -> Hosts),
        ("sysctl.bridge_nf_call_ip6tables", "bridge-nf-call-ip6tables", v6),
    ] {
        world(Library, |world| {
            // The client's link becomes a port of a bridge, which takes over its addresses.
            let proxy = &world.lab.proxy;
            proxy.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0
                ip link add br0 address 02:00:00:00:00:0b type bridge; ip link set eth0 master br0; ip link set br0 up
                ip addr flush dev eth0; ip addr add 198.51.100.1/24 dev br0; ip addr add 2001:db8:1::1/64 dev br0 nodad");
            proxy.ready(&["br0"]);
            let spoil = format!("sysctl -qw net.bridge.{family}=1");
            tried_in(&Row { id, by: Library, spoil: spoil.leak(), broken: Proxied(hosts) }, world).unwrap();
        });
    }
}

#[test]
fn check_names_and_fixes_rp_filter_with_asymmetric_routes() {
    world(Library, |world| {
        let lab = world.lab;
        Net::link((&lab.client, "eth9", &["192.0.2.2/24"]), (&lab.proxy, "eth9", &["192.0.2.1/24"]));
        // The proxy reaches the client by one link, and the client sends by the other.
        lab.client.sh("ip route add 203.0.113.2 via 192.0.2.1 src 198.51.100.2");
        let row = row("sysctl.rp_filter", Library, "sysctl -qw net.ipv4.conf.all.rp_filter=1", Proxied(v4));
        tried_in(&row, world).unwrap();
    });
}

#[test]
fn check_names_and_fixes_narrow_port_range() {
    world(Library, |world| {
        let proxy = &world.lab.proxy;
        let onward = || {
            let connect = || connect_from(at(v4().client, 0), at(v4().server, 81), 0);
            proxy.run(|| (0..9).map(|_| connect()).collect::<Vec<_>>()).into_iter().filter(Result::is_ok).count()
        };
        assert_eq!(onward(), 9);
        proxy.sh("sysctl -qw net.ipv4.ip_local_port_range='40000 40003'");
        assert!(onward() < 9, "the range has no effect");
        fix_finding(proxy, "sysctl.ip_local_port_range", TP_SEVERITY_WARNING);
        assert_eq!(onward(), 9);
    });
}

/// The address that the server sees when the proxy connects as the client, from a port that was not in use before.
fn seen_by_server(lab: &Lab, hosts: Hosts, flags: u32) -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(4000);
    let server = lab.serve(83);
    let from = at(hosts.client, NEXT.fetch_add(1, Ordering::Relaxed));
    let _onward = lab.proxy.run(|| connect_from(from, at(hosts.server, 83), flags | TP_NONBLOCK)).unwrap();
    accept(&server).1
}

#[test]
fn check_names_and_fixes_masquerading() {
    let nft =
        "nft 'table inet fw { chain c { type nat hook postrouting priority srcnat; oifname eth1 masquerade\n}\n}'";
    let iptables = |variant: &str| {
        format!("for ip in ip ip6; do ${{ip}}tables-{variant} -t nat -A POSTROUTING -o eth1 -j MASQUERADE; done")
    };
    let mut rules = vec![nft.to_owned(), iptables("nft")];
    if provided(Requirement::LegacyIptables) {
        rules.push(iptables("legacy"));
    }
    for spoil in &rules {
        let lab = Lab::new();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        lab.proxy.sh(spoil);
        for hosts in [v4(), v6()] {
            assert_ne!(seen_by_server(&lab, hosts, 0).ip(), hosts.client, "{spoil}");
        }
        let found = lab.proxy.run(check);
        let findings = found.iter().filter(|finding| finding.id == "filter.masquerade");
        findings.for_each(|finding| lab.proxy.sh(&finding.fix));
        for (hosts, port) in [(v4(), 84), (v6(), 85)] {
            assert_eq!(seen_by_server(&lab, hosts, 0).ip(), hosts.client, "{spoil}");
            // Forwarded connections are still translated.
            let server = lab.serve(port);
            lab.client.run(|| connect(at(hosts.server, port)));
            assert_ne!(accept(&server).1.ip(), hosts.client, "{spoil}");
        }
    }
}

/// Recent kernels hold both connections of the proxy in one entry of connection tracking. It is named and fixed all the same.
#[test]
fn check_names_and_fixes_connection_tracking() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    lab.proxy
        .sh("nft 'table inet fw { chain in { type filter hook input priority filter; ct state invalid drop\n}\n}'");
    // The file appears when connection tracking is loaded.
    if !provided(Requirement::Sysctl("netfilter/nf_conntrack_count")) {
        return;
    }
    let entries = || lab.proxy.run(|| std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap());
    seen_by_server(&lab, v4(), TP_CONNECT_KEEP_PORT);
    assert_ne!(entries(), "0\n", "nothing is tracked");
    fix_finding(&lab.proxy, "conntrack.keep_port", TP_SEVERITY_NOTE);
    let before = entries();
    seen_by_server(&lab, v6(), TP_CONNECT_KEEP_PORT);
    assert_eq!(entries(), before, "the connection is tracked");
}
