//! Whatever message the kernel refuses, nothing is left, or everything is as it was.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use socket2::Socket;

use super::*;
use crate::netlink::Transport;
use crate::prefix::Prefix;
use crate::rules::{Listener, Protocol};
use crate::sys;

/// A transport to the kernel that spoils one message: the kernel gets one of a type that it does not know.
struct Spoiling {
    socket: Socket,
    /// How many messages until then; shared by the channels of one test, and far off once it has come.
    left: Arc<AtomicUsize>,
}

const NEVER: usize = usize::MAX / 2;

impl Transport for Spoiling {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        let mut bytes = bytes.to_vec();
        let mut at = 0;
        while at < bytes.len() {
            let len = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            let kind = u16::from_ne_bytes(bytes[at + 4..at + 6].try_into().unwrap());
            // The brackets of a transaction are not messages of their own.
            let bracket = kind == 0x10 && bytes.len() > len || kind == 0x11 && at > 0;
            if !bracket && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
                self.left.store(NEVER, Ordering::Relaxed);
                // An operation that nf_tables and rtnetlink do not have.
                bytes[at + 4] = if kind >> 8 == 0 { 0xfc } else { 0x7f };
            }
            at += len.next_multiple_of(4);
        }
        Transport::send(&mut self.socket, &bytes)
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        Transport::receive(&mut self.socket, buffer)
    }
}

fn spoiling(left: &Arc<AtomicUsize>) -> (Channel, Channel) {
    let open = |family| {
        let socket = Channel::socket(family).unwrap();
        Channel::over(Box::new(Spoiling { socket, left: left.clone() }))
    };
    (open(libc::NETLINK_NETFILTER), open(libc::NETLINK_ROUTE))
}

/// A network namespace for this thread.
#[allow(unsafe_code)]
fn enter_own_network() {
    // SAFETY: a plain system call, which changes this thread alone.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", sys::Errno::last());
    run("ip link set lo up");
}

fn run(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// All that could have changed; counters and set names aside.
fn state() -> String {
    let commands =
        ["nft -s list ruleset", "ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all"];
    // Not the routes that the kernel makes when it gets round to it, nor which thread nft believes to be the owner.
    let ours = |text: String| {
        let lines = text.lines().filter(|line| !line.contains("proto kernel"));
        lines.map(|line| line.split(" # progname").next().unwrap_or(line)).collect::<Vec<_>>().join("\n")
    };
    commands.map(run).map(ours).join("--\n")
}

fn config() -> Config {
    let families = Families::ALL;
    let listener = Listener { protocol: Protocol::Tcp, families, addr: None, port: 3129 };
    Config::new([listener]).ports([80])
}

fn full() -> Config {
    let prefix = |text: &str, len| Prefix::new(text.parse().unwrap(), len).unwrap();
    config()
        .dst([prefix("192.0.2.0", 24), prefix("2001:db8::", 32)])
        .src([prefix("10.0.0.0", 8)])
        .interfaces(["eth0"])
        .local_output(true)
        .notrack(true)
}

/// Spoils the first message, then the second, and so on, until there is none left to spoil. Gives how many there were.
fn each_message(mut attempt: impl FnMut(&Arc<AtomicUsize>) -> Result<()>) -> usize {
    for number in 1..500 {
        let left = Arc::new(AtomicUsize::new(number));
        let outcome = attempt(&left);
        let spoiled = left.load(Ordering::Relaxed) > NEVER / 2;
        match (outcome, spoiled) {
            (Err(error), true) => assert!(!error.to_string().is_empty() && error.errno() != 0),
            // What only looks, or tidies up, may do without an answer.
            (Ok(()), true) => {}
            (Ok(()), false) => return number - 1,
            (Err(error), false) => panic!("failed without a fault: {error}"),
        }
    }
    panic!("it never ends");
}

/// Asked for the rules of all families, the kernel says nothing of one that has none.
#[test]
fn install_in_family_without_routing_rules_works() {
    enter_own_network();
    run("ip -6 rule flush");
    run("ip -6 rule del pref 0");
    let (mut nft, mut route) = channels().unwrap();
    let found = route::rules(&mut route, Families::ALL).unwrap();
    assert!(!found.is_empty() && found.iter().all(|rule| rule.family == crate::model::Family::V4), "{found:?}");
    let rules = Instance::install(&config()).unwrap();
    let ours = |rule: &&FoundRule| rule.ours;
    let found = route::rules(&mut route, Families::ALL).unwrap();
    assert_eq!(found.iter().filter(ours).count(), 6, "{found:?}");
    // Nor is the list cut short when there is more than one part of it.
    for pref in 1000..1300 {
        run(&format!("ip rule add pref {pref} lookup main"));
    }
    let found = route::rules(&mut route, Families::ALL).unwrap();
    assert_eq!((found.iter().filter(ours).count(), found.len()), (6, 3 + 6 + 300));
    assert_eq!(table::list(&mut nft).unwrap().1.len(), 1);
    rules.remove().unwrap();
}

#[test]
fn install_that_fails_at_any_message_leaves_nothing() {
    enter_own_network();
    let before = state();
    let redirect = config().mode(Mode::Redirect);
    let divert = Config::divert_only();
    for config in [config(), full(), redirect, divert] {
        let undisturbed = Instance::install(&config).unwrap();
        let installed = state();
        undisturbed.remove().unwrap();
        let messages = each_message(|left| {
            let (nft, route) = spoiling(left);
            let outcome = Instance::install_by_nft(plan::make(&config).unwrap(), nft, route);
            // The removal, if there is anything to remove, goes undisturbed.
            let rest = left.swap(NEVER, Ordering::Relaxed);
            if outcome.is_ok() {
                assert_eq!(state(), installed, "it succeeded, and something is missing");
            }
            let outcome = outcome.and_then(Instance::remove);
            left.store(rest, Ordering::Relaxed);
            assert_eq!(state(), before);
            outcome
        });
        assert!(messages > 10, "{messages}");
    }
}

#[test]
fn replace_that_fails_at_any_message_changes_nothing() {
    enter_own_network();
    for (from, to) in [(config(), full()), (full(), config())] {
        each_message(|left| {
            let faults = Arc::new(AtomicUsize::new(NEVER));
            let (nft, route) = spoiling(&faults);
            let mut rules = Instance::install_by_nft(plan::make(&from).unwrap(), nft, route).unwrap();
            let before = state();
            faults.store(left.load(Ordering::Relaxed), Ordering::Relaxed);
            let outcome = rules.replace(&to);
            left.store(faults.swap(NEVER, Ordering::Relaxed), Ordering::Relaxed);
            let after = state();
            assert_eq!(outcome.is_err(), after == before, "{before}\n---- and then\n{after}");
            rules.remove().unwrap();
            outcome
        });
    }
}

/// The state with its elements in order: the kernel lists a hash table's in an order that changes as it grows.
fn sorted_state() -> Vec<String> {
    let mut words: Vec<String> = state().split_whitespace().map(|word| word.trim_matches(',').to_owned()).collect();
    words.sort_unstable();
    words
}

#[test]
fn update_that_fails_at_any_message_changes_nothing() {
    enter_own_network();
    let prefix = |text: &str, len| Prefix::new(text.parse().unwrap(), len).unwrap();
    let hundred = |len: u8| (0..100).map(move |n| prefix(&format!("10.1.{n}.0"), len));
    let mut many = full();
    many.dst.as_mut().unwrap().extend(hundred(24));
    let networks: Vec<Prefix> = hundred(25).collect();
    let updates: [(Config, &[Prefix], &[Prefix]); 4] = [
        // Of ranges; of ranges and of a set of one length; to a new such set; the first bypass.
        (full(), &[prefix("192.0.0.0", 16)], &[prefix("2001:db8::", 32)]),
        (many.clone(), &[prefix("192.0.3.0", 24), prefix("192.0.0.0", 16)], &[prefix("192.0.2.0", 24)]),
        (many, &networks, &[prefix("192.0.2.0", 24)]),
        (full(), &networks, &[]),
    ];
    for (number, (config, add, remove)) in updates.into_iter().enumerate() {
        let set = if number == 3 { Set::Bypass } else { Set::Dst };
        each_message(|left| {
            let faults = Arc::new(AtomicUsize::new(NEVER));
            let (nft, route) = spoiling(&faults);
            let plan = plan::make(&config).unwrap();
            let mut rules = Instance::install_by_nft(plan.clone(), nft, route).unwrap();
            let before = sorted_state();
            faults.store(left.load(Ordering::Relaxed), Ordering::Relaxed);
            let outcome = rules.update(set, add, remove);
            left.store(faults.swap(NEVER, Ordering::Relaxed), Ordering::Relaxed);
            let after = sorted_state();
            assert_eq!(outcome.is_err(), after == before, "{before:?}\n---- and then\n{after:?}");
            assert_eq!(outcome.is_err(), rules.plan == plan);
            rules.remove().unwrap();
            outcome
        });
    }
}
