//! tp_check changes nothing, does bounded work, and reports what it could not see.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::*;
use tproxy::ffi::*;

fn ids(found: &[Found]) -> Vec<&str> {
    found.iter().map(|finding| finding.id.as_str()).collect()
}

/// Rules, routes and sysctls of a host, as text.
fn everything(net: &Net) -> String {
    let sysctls = "find /proc/sys/net/ipv4 /proc/sys/net/ipv6/conf /proc/sys/net/bridge /proc/sys/net/core -type f -readable \
                   ! -name '*fastopen_key' ! -name stable_secret ! -name flush -exec grep -H . {} + | sort";
    let script = format!("nft -a list ruleset; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names; {sysctls}");
    net.state() + &net.command("sh", &["-c", &script])
}

#[test]
fn check_healthy_host_gives_no_warning_and_changes_nothing() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    for net in [&lab.client, &lab.proxy, &Net::new()] {
        let before = everything(net);
        let found = net.run(check);
        assert_eq!(troubles(&found), [] as [&Found; 0]);
        assert_eq!(everything(net), before);
    }
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    let before = everything(&lab.proxy);
    let generation = || lab.proxy.command("nft", &["-d", "netlink", "list", "tables"]);
    let monitored = generation();
    let found = lab.proxy.run(check);
    assert_eq!(troubles(&found), [] as [&Found; 0]);
    assert_eq!((everything(&lab.proxy), generation()), (before, monitored));
    for id in [
        "instance",
        "privilege.net_admin",
        "privilege.transparent",
        "kernel.nf_tables",
        "kernel.nft_socket",
        "kernel.nft_tproxy",
        "kernel.nft_fib",
        "kernel.owner_tables",
        "kernel.policy_routing",
        "limit.descriptors",
    ] {
        assert!(
            found.iter().any(|f| f.id == id && f.severity == TP_SEVERITY_OK && f.fix.is_empty()),
            "{id}: {found:#?}"
        );
    }
    assert!(!ids(&found).contains(&"check.unseen"), "{found:#?}");
}

/// A listener that is bound to an interface gets what comes in by that interface.
#[test]
fn check_listener_bound_to_interface_of_rules_gives_no_warning() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    lab.proxy.run(|| socket2::SockRef::from(&listener).bind_device(Some(b"eth0")).unwrap());
    let config = RulesConfig::of(&listener).interfaces(&["eth0"]);
    let _rules = lab.proxy.run(|| config.install()).unwrap();
    assert_eq!(troubles(&lab.proxy.run(check)), [] as [&Found; 0]);
}

/// The routing rule for this host's own packets belongs to the instance.
#[test]
fn check_of_rules_for_local_output_gives_no_warning() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    for backend in [TP_BACKEND_NFT, TP_BACKEND_IPTABLES] {
        let config = RulesConfig::of(&listener).ports(&[80]).flags(TP_RULES_LOCAL_OUTPUT).backend(backend);
        let rules = lab.proxy.run(|| config.install()).unwrap();
        assert_eq!(troubles(&lab.proxy.run(check)), [] as [&Found; 0], "backend {backend}");
        lab.proxy.run(|| rules.remove()).unwrap();
    }
}

/// nf_tables sends no event, and its generation stays the same.
#[test]
fn check_trial_transaction_is_not_committed() {
    let net = Net::new();
    let mut monitor =
        net.run(|| Command::new("nft").arg("monitor").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let (send, events) = mpsc::channel();
    let lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
    let reader = std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| send.send(line)));
    // nft monitor reports changes from some moment on.
    let mut made = 0;
    wait_for("nft monitor prints an event", || {
        net.nft(&format!("add table ip before{made}"));
        made += 1;
        events.recv_timeout(limit(100)).ok()
    });
    net.run(check);
    net.nft("add table ip seen");
    // The line with the generation follows the changes of that generation.
    let mut seen = vec![String::new()];
    while seen[seen.len() - 1] != "add table ip seen" {
        seen.push(events.recv_timeout(patience()).unwrap());
    }
    let generation = events.recv_timeout(patience()).unwrap();
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    let _ = reader.join();
    seen.retain(|line| !line.is_empty() && !line.starts_with('#') && !line.contains("before"));
    assert_eq!(seen, ["add table ip seen"]);
    // The first transaction of this network is number 2.
    assert!(generation.starts_with(&format!("# new generation {} ", made + 2)), "{generation}");
}

/// The processor time of this thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the time.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The least processor time of several calls.
fn check_time(net: &Net) -> Duration {
    let time = |_| {
        net.run(|| {
            let begin = thread_time();
            check();
            thread_time() - begin
        })
    };
    (0..20).map(time).min().unwrap()
}

/// Processor time, since other tests run meanwhile, and beside that of nft, since machines differ.
#[test]
fn check_large_host_takes_no_longer_than_listing_its_rules() {
    let net = Net::new();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = net.run(|| intercept(&listener, 80)).unwrap();
    net.nft("add table inet fw; add chain inet fw c { type filter hook input priority 0; policy accept; }");
    // The send buffer of a user namespace's socket does not take all rules in one transaction.
    for hundred in 10..20 {
        let rule =
            |port| format!("add rule inet fw c tcp dport {{ {port}, 9 }} ip saddr 192.0.2.{} accept\n", port % 250);
        net.nft(&(hundred * 100..(hundred + 1) * 100).map(rule).collect::<String>());
    }
    (0..30).for_each(|number| net.sh(&format!("ip link add v{number}a type veth peer name v{number}b")));
    net.ip("rule add pref 30000 lookup 77");
    let add_routes = |first: u32| {
        net.sh(&format!(
            "for a in $(seq {first} {}); do for b in $(seq 0 249); do echo route add 10.$a.$b.0/24 dev lo table 77; done; \
             done | ip -batch -",
            first + 79
        ));
    };
    add_routes(0);
    let unseen = net.run(check).into_iter().find(|finding| finding.id == "check.unseen").unwrap();
    assert!(unseen.message.starts_with("IPv4 routes of table 77: only the first 10"), "{unseen:?}");
    let listing = |_| {
        let begin = Instant::now();
        net.nft("list ruleset");
        begin.elapsed()
    };
    let (time, listing) = (check_time(&net), (0..5).map(listing).min().unwrap());
    assert!(time < listing, "tp_check took {time:?}, nft list ruleset {listing:?}");
    // Routes that are not read take no time.
    add_routes(80);
    add_routes(160);
    let with_more_routes = check_time(&net);
    assert!(with_more_routes < 2 * time, "{time:?} with 20,000 routes, {with_more_routes:?} with 60,000");
}

/// Prints the findings, for a test that started this process.
fn print_check() {
    check().iter().for_each(|f| println!("finding {} {} {} | {}", f.severity, f.id, f.message, f.fix));
}

/// Root of a user namespace calls in the network namespace of another user namespace.
#[test]
fn check_in_network_of_other_user_namespace_reports_privileges() {
    if process::role().is_some() {
        return print_check();
    }
    let unshare = ["unshare", "--map-root-user"];
    let command = process::by_program(&unshare, check_in_network_of_other_user_namespace_reports_privileges, "check");
    let output = Net::new().output(command);
    for expected in [
        "finding 2 privilege.net_admin CAP_NET_ADMIN is in effect in a user namespace, but another user namespace owns this network namespace | \n",
        "finding 3 privilege.transparent IPv4",
        "finding 1 check.unseen nf_tables",
    ] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    assert!(!output.contains(" kernel.nf") && !output.contains("| set"), "{output}");
}

#[test]
fn check_harmless_settings_are_notes() {
    let net = Net::new();
    net.sh("sysctl -qw net.ipv4.ip_early_demux=0 net.ipv4.conf.lo.accept_local=1
        ip rule add pref 300 fwmark 7 lookup 50; ip rule add pref 301 fwmark 7 lookup 50");
    let found = net.run(check);
    assert_eq!(troubles(&found), [] as [&Found; 0]);
    for id in ["sysctl.ip_early_demux", "sysctl.accept_local", "kernel.version", "iptables.variants"] {
        assert!(found.iter().any(|f| f.id == id && f.fix.is_empty()), "{id}: {found:#?}");
    }
    fix_finding(&net, "rule.duplicate", TP_SEVERITY_NOTE);
    assert!(net.ip("rule").contains("300:") && !net.ip("rule").contains("301:"));
}

#[test]
fn check_without_privileges_reports_what_it_cannot_see() {
    if process::role().is_some() {
        return print_check();
    }
    let net = Net::new();
    net.sh("ip rule del pref 32766; sysctl -qw net.ipv4.ip_local_port_range='40000 40003'");
    let setpriv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"];
    let output =
        net.output(process::by_program(&setpriv, check_without_privileges_reports_what_it_cannot_see, "check"));
    for expected in [
        "finding 2 privilege.net_admin ",
        "finding 3 privilege.transparent IPv4",
        "finding 1 check.unseen nf_tables",
        "finding 3 rule.main_missing ",
        "finding 2 sysctl.ip_local_port_range",
    ] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    // The bounding set is empty: no program that this process starts could have capabilities.
    assert!(!output.contains("| set") && output.contains("because the bounding set lacks it"), "{output}");
}

#[test]
fn check_without_callback_is_efault() {
    // SAFETY: NULL is no function, and none is called.
    let failed = checked(unsafe { tp_check(None, std::ptr::null_mut()) }).unwrap_err();
    assert_eq!((failed.errno, failed.sentence.as_str()), (libc::EFAULT, "report is NULL"));
}
