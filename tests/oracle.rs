//! Random configurations and random packets: what the kernel does is compared with a model of the contract
//! (`oracle/model.rs`), for rules of both backends and for the scripts of tp_render_rules().
//!
//! ORACLE_PAIRS is the number of pairs of configuration and packet (default: 10,000), ORACLE_SEED the number of the first
//! case. What disagrees is reduced to a minimal case and printed with the value of ORACLE_REPLAY that runs it again.

#[path = "oracle/case.rs"]
mod case;
mod common;
#[path = "oracle/generate.rs"]
mod generate;
#[path = "oracle/known.rs"]
mod known;
#[path = "oracle/model.rs"]
mod model;
#[path = "oracle/network.rs"]
mod network;
#[path = "oracle/packet.rs"]
mod packet;

use std::fmt;

use case::{Fate, From, Instance, Kind, Packet, PortRange, is_shared};
use common::*;
use generate::{Case, simpler};
use model::fate;
use network::{Listeners, Network, Outcome};
use tproxy::ffi::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Nft,
    Iptables,
    NftScript,
    IptablesScript,
}

/// A packet whose fate is not the one of the model.
struct Disagreement {
    way: Way,
    packet: usize,
    expected: Fate,
    outcomes: (Outcome, Outcome),
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (expected, got) = self.outcomes;
        write!(f, "{:?}: expected {expected:?} ({:?}), got {got:?}", self.way, self.expected)
    }
}

fn config(index: usize, instance: &Instance, listeners: &Listeners, way: Way) -> RulesConfig {
    let fds: Vec<&dyn std::os::fd::AsRawFd> = listeners.iter().map(|(_, socket)| socket as _).collect();
    let nft = matches!(way, Way::Nft | Way::NftScript);
    let mut config = RulesConfig::new()
        .name(&format!("oracle{index}"))
        .flags(instance.flags)
        .backend(if nft { TP_BACKEND_NFT } else { TP_BACKEND_IPTABLES })
        .families(instance.families)
        .protocols(instance.protocols)
        .table(7470 + index as u32)
        .priority(200 + 4 * index as u32);
    if !instance.has(TP_RULES_DIVERT_ONLY) {
        config = config.listeners(&fds);
    }
    if let Some(dst) = &instance.dst {
        config = config.dst(dst);
    }
    if let Some(src) = &instance.src {
        config = config.src(src);
    }
    if let Some(bypass) = &instance.bypass {
        config = config.bypass(bypass);
    }
    if let Some(interfaces) = &instance.interfaces {
        config = config.interfaces(interfaces);
    }
    if !instance.bypass_src.is_empty() {
        config = config.bypass_src(&instance.bypass_src);
    }
    if !instance.bypass_interfaces.is_empty() {
        config = config.bypass_interfaces(&instance.bypass_interfaces);
    }
    let macs = |froms: &[From]| froms.iter().map(|from| network::mac_of(*from)).collect::<Vec<_>>();
    if let Some(list) = &instance.macs {
        config = config.macs(&macs(list));
    }
    if !instance.bypass_macs.is_empty() {
        config = config.bypass_macs(&macs(&instance.bypass_macs));
    }
    if let Some(uids) = &instance.uids {
        config = config.uids(uids);
    }
    if let Some(gids) = &instance.gids {
        config = config.gids(gids);
    }
    if !instance.bypass_uids.is_empty() {
        config = config.bypass_uids(&instance.bypass_uids);
    }
    if !instance.bypass_gids.is_empty() {
        config = config.bypass_gids(&instance.bypass_gids);
    }
    config = config.bypass_mark(instance.bypass_mark.0).bypass_mark_mask(instance.bypass_mark.1);
    let ranges = |ports: &Vec<PortRange>| -> Vec<tp_port_range> {
        ports
            .iter()
            .map(|(first, last, protocols)| tp_port_range { first: *first, last: *last, protocols: *protocols })
            .collect()
    };
    config.port_lists(
        instance.ports.as_ref().map(ranges),
        ranges(&instance.bypass_ports),
        ranges(&instance.reject_ports),
    )
}

/// What the model expects to be seen of a packet.
fn expected(p: &Packet, fate: Fate, without_rules: Outcome) -> Outcome {
    let segment = matches!(p.kind, Kind::Ack | Kind::SynAck);
    match fate {
        Fate::Untouched => without_rules,
        Fate::Dropped => Outcome::Nothing,
        // No host answers what is sent to several.
        Fate::Refused if is_shared(p.dst) => Outcome::Nothing,
        Fate::Refused if p.kind == Kind::Udp => Outcome::Unreachable,
        Fate::Refused => Outcome::Reset,
        // IPv4's routing looks for groups of this host before its rules.
        Fate::Taken(_) if p.dst.is_ipv4() && p.dst.is_multicast() => Outcome::Nothing,
        // TCP does not answer what is sent to several hosts.
        Fate::Taken(_) if p.protocol() == TP_PROTO_TCP && is_shared(p.dst) => Outcome::Nothing,
        // A listener does not know the connection.
        Fate::Taken(_) | Fate::Diverted if segment => Outcome::Reset,
        Fate::Diverted if p.kind == Kind::Error => Outcome::Nothing,
        Fate::Diverted => Outcome::Diverted,
        Fate::Taken(index) => Outcome::Listener(index),
    }
}

/// Runs a case in a network of its own; gives how many packets were compared, and what disagrees.
fn run(case: &Case, ways: &[Way]) -> (usize, Vec<Disagreement>) {
    let network = Network::new();
    let live = |listeners: Vec<Listeners>| -> Vec<Listeners> {
        let dead = |i: usize| case.instances[i].dead;
        listeners.into_iter().enumerate().map(|(i, l)| if dead(i) { Vec::new() } else { l }).collect()
    };
    let listen = || case.instances.iter().enumerate().map(|(i, instance)| network.listen(i, instance)).collect();
    let send = |listeners: &[Listeners]| network.send(&case.packets, &listeners.iter().collect::<Vec<_>>());
    let without_rules = send(&live(listen()));
    let (mut compared, mut disagreements) = (0, Vec::new());
    'ways: for way in ways {
        let listeners: Vec<Listeners> = listen();
        let mut installed = Vec::new();
        for (index, instance) in case.instances.iter().enumerate() {
            let config = config(index, instance, &listeners[index], *way);
            let result = network.host().run(|| match way {
                Way::Nft | Way::Iptables => config.install().map(Some),
                Way::NftScript | Way::IptablesScript => {
                    let format = if *way == Way::NftScript { TP_FORMAT_NFT } else { TP_FORMAT_IPTABLES };
                    config.try_render(format).map(|script| {
                        network.host().sh(&script);
                        None
                    })
                }
            });
            match result {
                Ok(rules) => installed.push(rules),
                Err(error) if error.errno == libc::EOPNOTSUPP => {
                    while let Some(rules) = installed.pop() {
                        drop(rules);
                    }
                    continue 'ways;
                }
                Err(error) => panic!("{way:?}: {error}\n{case}"),
            }
        }
        let listeners = live(listeners);
        let outcomes = send(&listeners);
        drop(installed);
        for (packet, p) in case.packets.iter().enumerate() {
            let iptables = matches!(way, Way::Iptables | Way::IptablesScript);
            if known::differs(&case.instances, p, iptables) {
                continue;
            }
            let fate = fate(&case.instances, p, iptables);
            let outcomes = (expected(p, fate, without_rules[packet]), outcomes[packet]);
            compared += 1;
            if outcomes.0 != outcomes.1 {
                disagreements.push(Disagreement { way: *way, packet, expected: fate, outcomes });
            }
        }
        if matches!(way, Way::NftScript | Way::IptablesScript) {
            break;
        }
    }
    (compared, disagreements)
}

/// The simplest case that still disagrees, with the numbers of the steps that lead to it.
fn shrink(case: &Case, way: Way, packet: usize) -> (Case, Vec<usize>) {
    let mut steps = Vec::new();
    let disagrees = |case: &Case| !run(case, &[way]).1.is_empty();
    let mut best = Case { packets: vec![case.packets[packet].clone()], instances: case.instances.clone() };
    if !disagrees(&best) {
        best.packets = case.packets[..=packet].to_vec();
        let mut size = best.packets.len() / 2;
        while size > 0 {
            let mut at = 0;
            while at < best.packets.len() {
                let mut fewer = best.clone();
                fewer.packets.drain(at..(at + size).min(fewer.packets.len()));
                if disagrees(&fewer) {
                    best = fewer;
                } else {
                    at += size;
                }
            }
            size /= 2;
        }
    }
    let mut step = 0;
    while let Some(candidate) = simpler(&best, step) {
        if candidate != best && disagrees(&candidate) {
            best = candidate;
            steps.push(step);
        } else {
            step += 1;
        }
    }
    (best, steps)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// The case that ORACLE_REPLAY names: SEED:PACKET:STEPS.
fn replayed(text: &str) -> Case {
    let parts: Vec<&str> = text.split(':').collect();
    let numbers = |text: &str| -> Vec<usize> { text.split(',').filter_map(|n| n.parse().ok()).collect() };
    let mut case = Case::random(parts[0].parse().unwrap());
    case.packets = vec![case.packets[parts[1].parse::<usize>().unwrap()].clone()];
    for step in numbers(parts[2].trim_matches(['[', ']'])) {
        case = simpler(&case, step).unwrap();
    }
    case
}

#[test]
fn install_rules_of_random_configs_agrees_with_model() {
    if let Ok(text) = std::env::var("ORACLE_REPLAY") {
        let case = replayed(&text);
        println!("{case}");
        let ways = [[Way::Nft, Way::Iptables, Way::NftScript], [Way::Nft, Way::Iptables, Way::IptablesScript]];
        for disagreement in ways.iter().flat_map(|ways| run(&case, ways).1) {
            println!("{disagreement}");
        }
        return;
    }
    let pairs = number("ORACLE_PAIRS").unwrap_or(10_000);
    let first = number("ORACLE_SEED").unwrap_or(1);
    let (mut compared, mut found) = (0, Vec::new());
    let mut seed = first;
    let begun = std::time::Instant::now();
    while compared < pairs && found.len() < 5 {
        let case = Case::random(seed);
        let script = if seed.is_multiple_of(2) { Way::NftScript } else { Way::IptablesScript };
        let (count, disagreements) = run(&case, &[Way::Nft, Way::Iptables, script]);
        compared += count as u64;
        if let Some(first) = disagreements.first() {
            let (minimal, steps) = shrink(&case, first.way, first.packet);
            let again = run(&minimal, &[first.way]).1;
            let shown: Vec<String> = again.iter().chain(&disagreements[..1]).take(1).map(|d| d.to_string()).collect();
            let replay = format!("{seed}:{}:{steps:?}", first.packet).replace(' ', "");
            println!(
                "{:?}\n{} disagreements with seed {seed}; the first, made minimal:\n{minimal}{}\nORACLE_REPLAY={replay}\n",
                case.packets[first.packet],
                disagreements.len(),
                shown.concat()
            );
            found.push(seed);
        }
        seed += 1;
    }
    println!("{compared} pairs in {:?}, seeds {first} to {}", begun.elapsed(), seed - 1);
    assert!(found.is_empty(), "the model and the kernel disagree with the seeds {found:?}");
}
