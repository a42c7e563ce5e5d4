//! Processes that are killed at any moment, and many that work at once.

mod common;

use std::ffi::CString;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::*;
use libc::{EBUSY, SIGKILL};
use tproxy::ffi::*;

/// Says to a process that it is not the test itself, but one that the test started; and under which name.
const ROLE: &str = "TPROXY_TEST_ROLE";

/// What a configuration points to, kept together with it.
struct OwnedConfig {
    name: CString,
    listener: i32,
    dst: Vec<tp_prefix>,
}

impl OwnedConfig {
    fn new(name: &str, listener: &impl AsRawFd) -> OwnedConfig {
        OwnedConfig {
            name: CString::new(name).unwrap(),
            listener: listener.as_raw_fd(),
            dst: prefixes(&["203.0.113.0/24", "2001:db8:2::/64"]),
        }
    }

    fn config(&self, flags: u32, families: u32) -> tp_rules_config {
        tp_rules_config {
            name: self.name.as_ptr(),
            listeners: &raw const self.listener,
            n_listeners: 1,
            flags,
            families,
            dst: self.dst.as_ptr(),
            n_dst: self.dst.len(),
            ..config()
        }
    }

    fn install(&self) -> Result<Rules, Failed> {
        Rules::install(&self.config(0, 0))
    }
}

fn listener() -> TcpListener {
    listen("[::]:3129".parse().unwrap(), TP_LISTEN_REUSEPORT).unwrap()
}

/// Starts a test of this file as a process of its own, in this namespace.
fn start(net: &Net, test: &str, role: &str) -> Child {
    net.run(|| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    })
}

/// In half of the namespaces each dead process is followed by one that installs in good order; in the others the dead
/// mostly meet the dead.
#[test]
fn a_process_may_be_killed_at_any_moment() {
    if let Ok(name) = std::env::var(ROLE) {
        change_for_ever(&name);
    }
    // Much of the time the kernel waits for its own grace periods; so several at once.
    std::thread::scope(|scope| {
        for seed in 0..8 {
            scope.spawn(move || kill_again_and_again(seed, if seed % 2 == 0 { 1 } else { 5 }));
        }
    });
}

/// All that can be done with rules, over and over.
fn change_for_ever(name: &str) -> ! {
    let listener = listener();
    let config = OwnedConfig::new(name, &listener);
    let (more, less) = (prefixes(&["203.0.112.0/24", "2001:db8:3::/48"]), prefixes(&["203.0.113.0/24"]));
    println!("ready");
    loop {
        let rules = config.install().unwrap();
        rules.update(TP_SET_DST, &more, &less).unwrap();
        rules.update(TP_SET_BYPASS, &less, &[]).unwrap();
        rules.replace(&config.config(TP_RULES_LOCAL_OUTPUT, 0)).unwrap();
        rules.update(TP_SET_DST, &less, &less).unwrap();
        rules.replace(&config.config(TP_RULES_NOTRACK, TP_FAMILY_IPV4)).unwrap();
        rules.replace(&config.config(0, 0)).unwrap();
        rules.remove().unwrap();
    }
}

fn kill_again_and_again(seed: u64, every: usize) {
    const KILLS: usize = 125;
    /// About what one round of changes takes.
    const ROUND: u64 = 3000;
    let net = Net::new();
    let before = net.state();
    let listener = net.run(listener);
    let config = OwnedConfig::new("", &listener);
    let mut random = Random(seed);
    let next = || start(&net, "a_process_may_be_killed_at_any_moment", "");
    let mut child = next();
    for number in 0..KILLS {
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.ends_with("ready")), "the other process did not start");
        std::thread::sleep(Duration::from_micros(random.below(ROUND)));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(SIGKILL), "it failed before it was killed: {status}");
        if number % 10 == 0 {
            assert_eq!(net.nft("list tables"), "");
            assert_rules_of_one_instance(&net, 4);
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
    child.kill().unwrap();
    child.wait().unwrap();
    net.run(|| purge(None)).unwrap();
    assert_eq!(net.state(), before);
}

/// Each family has no rule of ours twice, and no more than one instance makes.
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

/// Four have a name each, and four have one name.
#[test]
fn processes_that_work_at_once_disturb_each_other_by_name_alone() {
    const SHARED: &str = "shared";
    if let Ok(name) = std::env::var(ROLE) {
        install_and_remove(&name, name == SHARED);
        return;
    }
    let net = Net::new();
    let before = net.state();
    let names = ["one", "two", "three", "four", SHARED, SHARED, SHARED, SHARED];
    let test = "processes_that_work_at_once_disturb_each_other_by_name_alone";
    let children = names.map(|name| (name, start(&net, test, name)));
    for (name, child) in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stdout));
    }
    assert_eq!(net.state(), before);
}

fn install_and_remove(name: &str, may_be_busy: bool) {
    let listener = listener();
    let config = OwnedConfig::new(name, &listener);
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
