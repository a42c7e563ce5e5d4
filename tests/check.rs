//! tp_check changes nothing, is quick, and says what it could not see.

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

/// Rules, routes and switches of a host, as text.
fn everything(net: &Net) -> String {
    let sysctls = "find /proc/sys/net/ipv4 /proc/sys/net/ipv6/conf /proc/sys/net/bridge /proc/sys/net/core -type f -readable \
                   ! -name '*fastopen_key' ! -name stable_secret ! -name flush -exec grep -H . {} + | sort";
    let script = format!("nft -a list ruleset; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names; {sysctls}");
    net.state() + &net.command("sh", &["-c", &script])
}

#[test]
fn a_healthy_host_gives_no_warning_and_stays_as_it_is() {
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

/// Who listens on one interface, and intercepts what comes in by it, has what he wants.
#[test]
fn a_listener_of_the_interface_that_the_rules_name_is_fine() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    lab.proxy.run(|| socket2::SockRef::from(&listener).bind_device(Some(b"eth0")).unwrap());
    let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
    let install = || {
        let interface = c"eth0".as_ptr();
        let config = tp_rules_config { listeners: &raw const fd, n_listeners: 1, ..config() };
        Rules::install(&tp_rules_config { interfaces: &raw const interface, n_interfaces: 1, ..config }).unwrap()
    };
    let _rules = lab.proxy.run(install);
    assert_eq!(troubles(&lab.proxy.run(check)), [] as [&Found; 0]);
}

/// Nothing in nf_tables has happened: no event, and the generation is the same.
#[test]
fn the_trial_transaction_is_never_committed() {
    let net = Net::new();
    let mut monitor =
        net.run(|| Command::new("nft").arg("monitor").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let (send, events) = mpsc::channel();
    let lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
    let reader = std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| send.send(line)));
    // It listens from some moment on.
    let mut made = 0;
    let first = (0..100).find_map(|number| {
        net.nft(&format!("add table ip before{number}"));
        made += 1;
        events.recv_timeout(Duration::from_millis(100)).ok()
    });
    assert!(first.is_some(), "nft monitor says nothing");
    net.run(check);
    net.nft("add table ip seen");
    // The generation comes behind what it is of.
    let mut seen = vec![String::new()];
    while seen[seen.len() - 1] != "add table ip seen" {
        seen.push(events.recv_timeout(PATIENCE).unwrap());
    }
    let generation = events.recv_timeout(PATIENCE).unwrap();
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    let _ = reader.join();
    seen.retain(|line| !line.is_empty() && !line.starts_with('#') && !line.contains("before"));
    assert_eq!(seen, ["add table ip seen"]);
    // The first transaction of this network is number 2.
    assert!(generation.starts_with(&format!("# new generation {} ", made + 2)), "{generation}");
}

#[test]
fn it_takes_less_than_a_tenth_of_a_second() {
    let net = Net::new();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = net.run(|| intercept(&listener, 80)).unwrap();
    // A host with some history.
    net.nft("add table inet fw; add chain inet fw c { type filter hook input priority 0; policy accept; }");
    // In pieces that a user namespace's socket takes.
    for hundred in 10..20 {
        let rule =
            |port| format!("add rule inet fw c tcp dport {{ {port}, 9 }} ip saddr 192.0.2.{} accept\n", port % 250);
        net.nft(&(hundred * 100..(hundred + 1) * 100).map(rule).collect::<String>());
    }
    (0..30).for_each(|number| net.sh(&format!("ip link add v{number}a type veth peer name v{number}b")));
    // A table as a router of the Internet has.
    net.sh("for a in $(seq 0 79); do for b in $(seq 0 249); do echo route add 10.$a.$b.0/24 dev lo table 77; done; done | ip -batch -
        ip rule add pref 30000 lookup 77");
    // The best of a few: other tests run at the same time.
    let measure = || {
        let begin = Instant::now();
        net.run(check);
        begin.elapsed()
    };
    let best = (0..30).map(|_| measure()).min().unwrap();
    println!("{best:?}");
    let unseen = net.run(check).into_iter().find(|finding| finding.id == "check.unseen").unwrap();
    assert!(unseen.message.starts_with("IPv4 routes of table 77: all but the first 10"), "{unseen:?}");
    assert!(best < Duration::from_millis(100), "{best:?}");
}

/// Root of a user namespace in the network of another.
#[test]
fn capabilities_over_another_network_are_none() {
    const ALONE: &str = "TPROXY_TEST_POWERLESS";
    if std::env::var_os(ALONE).is_some() {
        let found = check();
        found.iter().for_each(|f| println!("finding {} {} {} | {}", f.severity, f.id, f.message, f.fix));
        return;
    }
    let test = std::env::current_exe().unwrap();
    let name = "capabilities_over_another_network_are_none";
    let output = Net::new().command(
        "unshare",
        &["--map-root-user", "env", &format!("{ALONE}=1"), test.to_str().unwrap(), "--exact", name, "--nocapture"],
    );
    for expected in [
        "finding 2 privilege.net_admin CAP_NET_ADMIN is in effect in a user namespace, and this network belongs to another | \n",
        "finding 3 privilege.transparent IPv4",
        "finding 1 check.unseen nf_tables",
    ] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    assert!(!output.contains(" kernel.nf") && !output.contains("| set"), "{output}");
}

/// Facts that are no trouble.
#[test]
fn what_does_no_harm_is_a_note() {
    let net = Net::new();
    net.sh("sysctl -qw net.ipv4.ip_early_demux=0 net.ipv4.conf.lo.accept_local=1
        ip rule add pref 300 fwmark 7 lookup 50; ip rule add pref 301 fwmark 7 lookup 50");
    let found = net.run(check);
    assert_eq!(troubles(&found), [] as [&Found; 0]);
    for id in ["sysctl.ip_early_demux", "sysctl.accept_local", "kernel.version", "iptables.variants"] {
        assert!(found.iter().any(|f| f.id == id && f.fix.is_empty()), "{id}: {found:#?}");
    }
    cured(&net, "rule.duplicate", TP_SEVERITY_NOTE);
    assert!(net.ip("rule").contains("300:") && !net.ip("rule").contains("301:"));
}

/// In a process of its own, without capabilities: another tests this by starting it.
#[test]
fn without_privileges_it_says_what_it_cannot_see() {
    const ALONE: &str = "TPROXY_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        let found = check();
        found.iter().for_each(|f| println!("finding {} {} {} | {}", f.severity, f.id, f.message, f.fix));
        return;
    }
    let net = Net::new();
    net.sh("ip rule del pref 32766; sysctl -qw net.ipv4.ip_local_port_range='40000 40003'");
    let output = net.command(
        "setpriv",
        &[
            "--bounding-set=-all",
            "--inh-caps=-all",
            "--",
            "env",
            &format!("{ALONE}=1"),
            std::env::current_exe().unwrap().to_str().unwrap(),
            "--exact",
            "without_privileges_it_says_what_it_cannot_see",
            "--nocapture",
        ],
    );
    for expected in [
        "finding 2 privilege.net_admin ",
        "finding 3 privilege.transparent IPv4",
        "finding 1 check.unseen nf_tables",
        "finding 3 rule.main_missing ",
        "finding 2 sysctl.ip_local_port_range",
    ] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    // The bounding set is empty: no program that it starts could have them.
    assert!(!output.contains("| set") && output.contains("(the bounding set)"), "{output}");
}

#[test]
fn a_callback_is_needed() {
    // SAFETY: no function is called.
    let failed = checked(unsafe { tp_check(None, std::ptr::null_mut()) }).unwrap_err();
    assert_eq!((failed.errno, failed.sentence.as_str()), (libc::EFAULT, "report is NULL"));
}
