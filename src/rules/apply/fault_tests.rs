//! Whatever message the kernel refuses, nothing is left, or everything is as it was.

use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::Socket;

use super::learn::Renewal;
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
fn enter_own_network() {
    enter_own(libc::CLONE_NEWNET);
    run("ip link set lo up");
}

/// A mount namespace for this thread, with an empty /run, where the legacy iptables has its lock.
fn enter_own_mounts() {
    enter_own(libc::CLONE_NEWNS);
    run("mount -t tmpfs tmpfs /run");
}

#[allow(unsafe_code)]
fn enter_own(namespace: i32) {
    // SAFETY: a plain system call, which changes this thread alone.
    assert_eq!(unsafe { libc::unshare(namespace) }, 0, "{}", sys::Errno::last());
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

#[test]
fn learn_that_fails_at_any_message_changes_nothing() {
    enter_own_network();
    let addr = |text: &str| text.parse().unwrap();
    let (first, both) = ([addr("192.0.2.9")], [addr("192.0.2.10"), addr("2001:db8::9")]);
    for (set, renewal) in [(Set::Dst, Renewal::Add), (Set::Bypass, Renewal::AddDeleteAdd)] {
        for learned_before in [false, true] {
            each_message(|left| {
                let faults = Arc::new(AtomicUsize::new(NEVER));
                let (nft, route) = spoiling(&faults);
                let mut rules = Instance::install_by_nft(plan::make(&full()).unwrap(), nft, route).unwrap();
                if learned_before {
                    rules.learn(set, &first, DAY).unwrap();
                }
                let (before, plan) = (without_times(&sorted_state()), rules.plan.clone());
                faults.store(left.load(Ordering::Relaxed), Ordering::Relaxed);
                let outcome = rules.learn_by(set, &both, DAY, renewal);
                left.store(faults.swap(NEVER, Ordering::Relaxed), Ordering::Relaxed);
                let after = without_times(&sorted_state());
                assert_eq!(outcome.is_err(), after == before, "{before:?}\n---- and then\n{after:?}");
                assert_eq!(outcome.is_err(), rules.plan == plan);
                rules.remove().unwrap();
                outcome
            });
        }
    }
}

const DAY: Duration = Duration::from_secs(86_400);

/// A state without the times that addresses have left.
fn without_times(state: &[String]) -> Vec<String> {
    let is_time = |word: &str| word.ends_with("ms") && word.starts_with(|letter: char| letter.is_ascii_digit());
    state.iter().filter(|word| !is_time(word)).cloned().collect()
}

/// Milliseconds until an address leaves a set, at most.
fn time_left(set: &str, addr: &str) -> Option<u128> {
    let listed = run(&format!("nft -j list set inet libtproxy-tproxy {set}"));
    let (_, behind) = listed.split_once(&format!("\"val\": \"{addr}\""))?;
    let (_, seconds) = behind.split_once("\"expires\": ")?;
    let seconds: u128 = seconds.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().unwrap();
    Some((seconds + 1) * 1000)
}

#[test]
fn learn_again_gives_new_time_on_every_kernel() {
    enter_own_network();
    for renewal in [Renewal::Add, Renewal::AddDeleteAdd] {
        if renewal == Renewal::Add && Renewal::of_this_kernel() != Renewal::Add {
            continue;
        }
        let mut rules = Instance::install(&full()).unwrap();
        let addrs = ["192.0.2.9".parse().unwrap(), "2001:db8::9".parse().unwrap(), "192.0.2.9".parse().unwrap()];
        for time in [DAY, 2 * DAY, DAY, DAY / 2] {
            rules.learn_by(Set::Dst, &addrs, time, renewal).unwrap();
            for (set, addr) in [("learned-dst4", "192.0.2.9"), ("learned-dst6", "2001:db8::9")] {
                let left = time_left(set, addr).unwrap();
                let whole = time.as_millis();
                assert!((whole - whole / 4..=whole + 1000).contains(&left), "{renewal:?} {set}: {left} of {whole} ms");
            }
        }
        rules.remove().unwrap();
    }
}

/// A transport that counts what is sent and received: messages and bytes.
struct Counting {
    socket: Socket,
    counts: Arc<[AtomicUsize; 4]>,
}

impl Counting {
    fn count(&self, at: usize, len: usize) {
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.counts[at + 1].fetch_add(len, Ordering::Relaxed);
    }
}

impl Transport for Counting {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        self.count(0, bytes.len());
        Transport::send(&mut self.socket, bytes)
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        Transport::receive(&mut self.socket, buffer)?;
        self.count(2, buffer.len());
        Ok(())
    }
}

#[test]
fn learn_costs_the_same_beside_many_elements() {
    enter_own_network();
    let counts = Arc::new([const { AtomicUsize::new(0) }; 4]);
    let counting = |family| {
        let socket = Channel::socket(family).unwrap();
        Channel::over(Box::new(Counting { socket, counts: counts.clone() }))
    };
    for renewal in [Renewal::Add, Renewal::AddDeleteAdd] {
        let (nft, route) = (counting(libc::NETLINK_NETFILTER), counting(libc::NETLINK_ROUTE));
        let mut rules = Instance::install_by_nft(plan::make(&full()).unwrap(), nft, route).unwrap();
        let addrs = |first: u32, count: u32| -> Vec<IpAddr> {
            (first..first + count).map(|number| std::net::Ipv4Addr::from(number).into()).collect()
        };
        rules.learn_by(Set::Dst, &addrs(1, 1), DAY, renewal).unwrap();
        let mut cost = |count: u32, from: u32| {
            counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
            rules.learn_by(Set::Dst, &addrs(from, count), DAY, renewal).unwrap();
            counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>()
        };
        let few = (cost(1, 2), cost(1, 2));
        (1..=50).for_each(|n| _ = cost(2000, n * 2000));
        let many = (cost(1, 10), cost(1, 10));
        assert_eq!(few, many, "messages and bytes sent, and received: for a new and for a known address");
        assert!(few.0[0] <= 3 && few.0[1] + few.0[3] < 2000, "{few:?}");
        rules.remove().unwrap();
    }
}

/// A transport to a kernel without nf_tables: it asks for a subsystem that no kernel has, which is answered alike.
struct WithoutNfTables(Socket);

impl Transport for WithoutNfTables {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        /// No message can be for a subsystem that is beyond NFNL_SUBSYS_COUNT, and no batch for NFNL_SUBSYS_NONE.
        const NO_SUBSYSTEM: u8 = 255;
        const NONE: [u8; 2] = [0, 0];
        const BATCH_BEGIN: u16 = 0x10;
        let mut bytes = bytes.to_vec();
        let mut at = 0;
        while at < bytes.len() {
            let len = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            match u16::from_ne_bytes(bytes[at + 4..at + 6].try_into().unwrap()) {
                // The subsystem is the upper byte of a message's type, and the `res_id` of a batch.
                BATCH_BEGIN => bytes[at + 18..at + 20].copy_from_slice(&NONE),
                kind if kind >> 8 != 0 => bytes[at + 5] = NO_SUBSYSTEM,
                _ => {}
            }
            at += len.next_multiple_of(4);
        }
        Transport::send(&mut self.0, &bytes)
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        Transport::receive(&mut self.0, buffer)
    }
}

fn channels_without_nf_tables() -> Result<(Channel, Channel)> {
    let nft = WithoutNfTables(Channel::socket(libc::NETLINK_NETFILTER).unwrap());
    Ok((Channel::over(Box::new(nft)), Channel::open(libc::NETLINK_ROUTE).unwrap()))
}

/// The library's chains in the tables of both families, as the programs of this host list them.
fn chains() -> String {
    let saved = ["iptables-save", "ip6tables-save"].map(run).concat();
    saved.lines().filter(|line| line.contains("tp-")).collect::<Vec<_>>().join("\n")
}

/// The host's own connections, so that one network is enough: without interception they go to where nobody answers.
fn own_connections() -> Config {
    Config { local_output: true, backend: Backend::Auto, ..config() }
}

#[test]
#[cfg(feature = "iptables")]
fn install_without_nf_tables_intercepts_by_iptables() {
    enter_own_network();
    enter_own_mounts();
    run("ip link add void type veth peer name nowhere");
    run("ip link set nowhere up");
    run("ip addr add 198.51.100.1/24 dev void");
    run("ip -6 addr add 2001:db8::1/64 dev void nodad");
    run("ip link set void up");
    // Without interception a connection fails after some seconds.
    std::fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "2").unwrap();
    // Another program has a rule in the first slot. A dead process has left one in the second.
    run("ip rule add pref 202 fwmark 7 lookup main");
    let before = state();
    run("ip rule add pref 205 fwmark 0x2000/0x3000 lookup 7471 protocol 116");
    run("ip route add local default dev lo table 7499 protocol 116");

    let listener = crate::socket::listen("[::]:3129".parse().unwrap(), Default::default()).unwrap();
    let listener = std::net::TcpListener::from(listener);
    let mut rules = Instance::install_over(&own_connections(), &channels_without_nf_tables).unwrap();
    assert_eq!((rules.installed, rules.claimed), (Installed::Iptables, false));
    assert_eq!((rules.routing.priority, rules.routing.table), (204, 7471));
    let chains_of_80 = chains();
    assert!(chains_of_80.contains("--dport 80"), "{chains_of_80}");
    let (mut nft, mut route) = channels().unwrap();
    assert_eq!(table::list(&mut nft).unwrap().1, []);
    let found = route::rules(&mut route, Families::ALL).unwrap();
    assert_eq!(found.iter().filter(|rule| rule.ours).count(), 8, "{found:?}");

    for destination in ["198.51.100.9:80", "[2001:db8::9]:80"] {
        let destination = destination.parse().unwrap();
        let client = std::net::TcpStream::connect::<std::net::SocketAddr>(destination).unwrap();
        let (accepted, from) = listener.accept().unwrap();
        let canonical = |addr: std::net::SocketAddr| std::net::SocketAddr::new(addr.ip().to_canonical(), addr.port());
        assert_eq!(canonical(accepted.local_addr().unwrap()), destination);
        assert_eq!(canonical(from), client.local_addr().unwrap());
    }
    assert!(rules.stats().unwrap().intercepted.packets >= 2, "{:?}", rules.stats());

    rules.replace(&own_connections().ports([81])).unwrap();
    assert!(chains().contains("--dport 81"), "{}", chains());
    rules.remove().unwrap();
    assert_eq!(chains(), "");
    run("ip route del local default dev lo table 7499 protocol 116");
    assert_eq!(state_without_iptables(&state()), state_without_iptables(&before));
}

/// Tables that the programs of iptables have made stay, and are empty.
fn state_without_iptables(state: &str) -> String {
    let (tables, routing) = state.split_once("--\n").unwrap();
    assert!(!tables.contains("tp-"), "{tables}");
    routing.to_owned()
}

#[test]
fn install_without_nf_tables_of_what_iptables_cannot_do_is_eopnotsupp() {
    enter_own_network();
    let before = state();
    for config in [
        own_connections().fail_open(true).local_output(false),
        own_connections().persist(true),
        own_connections().backend(Backend::Nft),
    ] {
        let error = Instance::install_over(&config, &channels_without_nf_tables).err().unwrap();
        assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
        let sentence = error.to_string();
        assert!(sentence.contains("CONFIG_NF_TABLES") && !sentence.contains("iptables"), "{sentence}");
        assert_eq!(state(), before);
    }
}

#[test]
#[cfg(feature = "iptables")]
fn install_without_nf_tables_that_fails_by_iptables_names_both_failures() {
    enter_own_network();
    enter_own_mounts();
    run("ip route add local default dev lo table 7480");
    let before = state();
    let config = own_connections().table(7480);
    let error = Instance::install_over(&config, &channels_without_nf_tables).err().unwrap();
    let sentence = error.to_string();
    assert_eq!(error.errno(), libc::EEXIST, "{sentence}");
    assert!(sentence.contains("CONFIG_NF_TABLES") && sentence.contains("; and by iptables instead: "), "{sentence}");
    assert_eq!(state(), before);
}

/// Only where nf_tables is missing are the rules made by iptables.
#[test]
fn install_of_name_in_use_does_not_fall_back_to_iptables() {
    enter_own_network();
    let rules = Instance::install(&own_connections()).unwrap();
    let before = state();
    assert_eq!(Instance::install(&own_connections()).err().unwrap().errno(), libc::EBUSY);
    assert_eq!(state(), before);
    assert_eq!(rules.installed, Installed::Nft);
    rules.remove().unwrap();
}

/// A transport to the kernel that takes no more than so many bytes at once, as a socket does whose buffer cannot grow.
struct Narrow {
    socket: Socket,
    most: usize,
    /// The most that was sent at once.
    sent: Arc<AtomicUsize>,
}

impl Transport for Narrow {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        if bytes.len() > self.most {
            return Err(sys::Errno(libc::EMSGSIZE));
        }
        self.sent.fetch_max(bytes.len(), Ordering::Relaxed);
        Transport::send(&mut self.socket, bytes)
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        Transport::receive(&mut self.socket, buffer)
    }
}

#[test]
fn install_and_replace_through_a_narrow_socket_put_in_as_much() {
    enter_own_network();
    let before = state();
    let networks = |first: u8| {
        let network = move |n: u16| {
            let [high, low] = n.to_be_bytes();
            Prefix::new(std::net::Ipv4Addr::new(first, high, low, 0).into(), 25).unwrap()
        };
        (0..2000).map(network).collect::<Vec<_>>()
    };
    let config = full().dst(networks(20)).src(networks(30)).bypass(networks(40));
    let install = |most: usize| {
        let sent = Arc::new(AtomicUsize::new(0));
        let nft = Narrow { socket: Channel::socket(libc::NETLINK_NETFILTER).unwrap(), most, sent: sent.clone() };
        let route = Channel::open(libc::NETLINK_ROUTE).unwrap();
        let installed = Instance::install_by_nft(plan::make(&config).unwrap(), Channel::over(Box::new(nft)), route);
        (installed, sent.load(Ordering::Relaxed))
    };
    let (undisturbed, whole) = install(usize::MAX);
    let installed = sorted_state();
    undisturbed.unwrap().remove().unwrap();
    // One message has 900 networks of some 20 bytes.
    const ONE_MESSAGE: usize = 25_000;
    assert!(whole > 4 * ONE_MESSAGE, "{whole}");
    for most in [whole, whole - 1, whole / 2, whole / 4, ONE_MESSAGE] {
        let mut rules = install(most).0.unwrap_or_else(|error| panic!("{most}: {error}"));
        assert!(sorted_state() == installed, "{most}");
        rules.replace(&full()).unwrap();
        rules.replace(&config).unwrap();
        rules.remove().unwrap();
        assert_eq!(state(), before);
    }
    // A message that does not fit by itself.
    for most in [10_000, 5000] {
        let error = install(most).0.err().unwrap();
        assert_eq!(error.errno(), libc::EMSGSIZE, "{error}");
        assert_eq!(state(), before);
    }
}

#[test]
fn install_beside_another_instance_overlaps_neither_its_priorities_nor_its_table() {
    enter_own_network();
    let first = Instance::install(&config()).unwrap();
    let slot = |rules: &Instance| (rules.routing.priority, rules.routing.table);
    assert_eq!(slot(&first), (200, 7470));
    let other = || config().name("other");
    for priority in [197, 199, 200, 201, 203] {
        let error = Instance::install(&other().priority(priority).table(7500)).err().unwrap();
        assert_eq!(error.errno(), libc::EBUSY, "{priority}: {error}");
    }
    for priority in [196, 204] {
        let rules = Instance::install(&other().priority(priority).table(7500)).unwrap();
        assert_eq!(slot(&rules), (priority, 7500));
        rules.remove().unwrap();
    }
    assert_eq!(Instance::install(&other().priority(1000).table(7470)).err().unwrap().errno(), libc::EBUSY);
    // What is not asked for is chosen.
    for (config, expected) in
        [(other(), (204, 7471)), (other().priority(1000), (1000, 7471)), (other().table(7500), (204, 7500))]
    {
        let rules = Instance::install(&config).unwrap();
        assert_eq!(slot(&rules), expected);
        rules.remove().unwrap();
    }
    first.remove().unwrap();
}

/// The kernel releases what a closed socket owned some time later.
fn not_busy<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    crate::test_time::wait_for("the former owner is gone", || match attempt() {
        Err(error) if error.errno() == libc::EBUSY => None,
        done => Some(done),
    })
}

#[test]
fn install_of_persistent_rules_keeps_their_slot() {
    enter_own_network();
    let persistent = || config().persist(true);
    drop(Instance::install(&persistent().priority(1000)).unwrap());
    for config in [persistent().priority(1004), persistent().table(7500), persistent().priority(1000).table(7500)] {
        let error = not_busy(|| Instance::install(&config)).err().unwrap();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
        assert!(error.to_string().contains("priority 1000 and table 7470"), "{error}");
    }
    let error = not_busy(|| Instance::install(&config())).err().unwrap();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    assert!(error.to_string().contains("TP_RULES_PERSIST"), "{error}");
    for config in [persistent(), persistent().priority(1000), persistent().priority(1000).table(7470)] {
        drop(not_busy(|| Instance::install(&config)).unwrap());
    }
    not_busy(|| Instance::install(&persistent())).unwrap().remove().unwrap();
    // A table without an owner that does not persist is no instance's.
    run("nft add table inet libtproxy-tproxy { comment \"libtproxy: priority 200 table 7470\"; }");
    for config in [config(), persistent()] {
        let error = Instance::install(&config).err().unwrap();
        assert_eq!(error.errno(), libc::EEXIST, "{error}");
        assert!(error.to_string().contains("nft delete table inet"), "{error}");
    }
}
