//! Processes that are killed at any moment, and many processes at once.

mod common;

use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use common::*;
use libc::{EBUSY, SIGKILL};
use tproxy::ffi::*;

fn listener() -> TcpListener {
    listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT).unwrap()
}

fn config(name: &str, listener: &TcpListener) -> RulesConfig {
    RulesConfig::of(listener).name(name).dst(["203.0.113.0/24", "2001:db8:2::/64"])
}

/// In half of the namespaces each killed process is followed by one that installs rules undisturbed; in the others most
/// are followed by processes that are killed too.
#[test]
fn install_rules_killed_at_any_moment_leaves_nothing_in_the_way() {
    if let Some(name) = process::role() {
        change_until_killed(&name);
    }
    // The kernel waits for grace periods much of the time: several namespaces work at once.
    std::thread::scope(|scope| {
        for seed in 0..8 {
            scope.spawn(move || kill_repeatedly(seed, if seed % 2 == 0 { 1 } else { 5 }));
        }
    });
}

/// Makes every call for rules, until the process is killed.
fn change_until_killed(name: &str) -> ! {
    let listener = listener();
    let config = config(name, &listener);
    let (more, less) = (prefixes(&["203.0.112.0/24", "2001:db8:3::/48"]), prefixes(&["203.0.113.0/24"]));
    println!("ready");
    loop {
        let rules = config.install().unwrap();
        rules.update(TP_SET_DST, &more, &less).unwrap();
        rules.update(TP_SET_BYPASS, &less, &[]).unwrap();
        rules.replace(&config.clone().flags(TP_RULES_LOCAL_OUTPUT)).unwrap();
        rules.update(TP_SET_DST, &less, &less).unwrap();
        rules.replace(&config.clone().flags(TP_RULES_NOTRACK).families(TP_FAMILY_IPV4)).unwrap();
        rules.replace(&config).unwrap();
        rules.remove().unwrap();
    }
}

fn kill_repeatedly(seed: u64, every: usize) {
    const KILLS: usize = 125;
    /// The microseconds that one round of changes takes, more or less.
    const ROUND: u64 = 3000;
    let net = Net::new();
    let before = net.state();
    let listener = net.run(listener);
    let config = config("", &listener);
    let mut random = Random(seed);
    let next = || {
        let command = process::in_role(install_rules_killed_at_any_moment_leaves_nothing_in_the_way, "");
        process::Process::start(&net, command, "ready")
    };
    let mut child = next();
    for number in 0..KILLS {
        std::thread::sleep(Duration::from_micros(random.below(ROUND)));
        let status = child.kill();
        assert_eq!(status.signal(), Some(SIGKILL), "the process failed before it was killed: {status}");
        if number % 10 == 0 {
            assert_eq!(net.nft("list tables"), "");
            // And one that is there for the time of an update.
            assert_rules_of_one_instance(&net, 5);
        }
        if number % every == 0 {
            let rules = net.run(|| config.install()).unwrap_or_else(|failed| panic!("after kill {number}: {failed}"));
            if number % 10 == 0 {
                assert_eq!(net.nft("list tables"), "table inet libtproxy-tproxy\n");
                assert_rules_of_one_instance(&net, 3);
            }
            net.run(|| rules.remove()).unwrap();
        }
        child = next();
    }
    child.kill();
    net.run(|| purge(None)).unwrap();
    assert_eq!(net.state(), before);
}

/// Asserts that each family has no more of the library's routing rules than one instance makes, and none twice.
fn assert_rules_of_one_instance(net: &Net, most: usize) {
    for family in ["-4 rule", "-6 rule"] {
        let text = net.ip(family);
        let mut ours: Vec<&str> = text.lines().filter(|line| line.contains("proto 116")).collect();
        assert!(ours.len() <= most, "{text}");
        let before = ours.len();
        ours.sort_unstable();
        ours.dedup();
        assert_eq!(ours.len(), before, "{text}");
    }
}

/// Four processes have a name each, and four share one name.
#[test]
fn install_rules_in_eight_processes_is_busy_only_for_the_same_name() {
    const SHARED: &str = "shared";
    if let Some(name) = process::role() {
        install_and_remove(&name, name == SHARED);
        return;
    }
    let net = Net::new();
    let before = net.state();
    let names = ["one", "two", "three", "four", SHARED, SHARED, SHARED, SHARED];
    let start = |name| {
        let mut command = process::in_role(install_rules_in_eight_processes_is_busy_only_for_the_same_name, name);
        net.run(|| command.stdout(Stdio::piped()).spawn().unwrap())
    };
    for (name, child) in names.map(|name| (name, start(name))) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stdout));
    }
    assert_eq!(net.state(), before);
}

fn install_and_remove(name: &str, may_be_busy: bool) {
    let listener = listener();
    let config = config(name, &listener);
    for _ in 0..200 {
        let rules = loop {
            match config.install() {
                Err(failed) if may_be_busy && failed.errno == EBUSY => std::thread::yield_now(),
                done => break done.unwrap(),
            }
        };
        rules.remove().unwrap();
    }
}
