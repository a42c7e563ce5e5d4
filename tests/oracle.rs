//! Random configurations and random packets: what the kernel does is compared with a model of the contract
//! (`oracle/model.rs`), for rules of both backends and for the scripts of tp_render_rules().
//!
//! ORACLE_PAIRS is the number of pairs of configuration and packet (default: 10,000), ORACLE_SEED the number of the first
//! case. What disagrees is reduced to a minimal case and printed with the value of ORACLE_REPLAY that runs it again.

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

use common::*;
use generate::{Case, simpler};
use model::{Fate, Instance, Kind, Packet, fate};
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
    if let Some(ports) = &instance.ports {
        config = config.port_ranges(ports.iter().copied());
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
    config
}

/// What the model expects to be seen of a packet.
fn expected(p: &Packet, fate: Fate, without_rules: Outcome) -> Outcome {
    let segment = matches!(p.kind, Kind::Ack | Kind::SynAck);
    match fate {
        Fate::Untouched => without_rules,
        Fate::Dropped => Outcome::Nothing,
        Fate::Refused => Outcome::Reset,
        // TCP does not answer what is sent to several hosts.
        Fate::Taken(_) if p.protocol() == TP_PROTO_TCP && model::is_shared(p.dst) => Outcome::Nothing,
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
            let fate = fate(&case.instances, p);
            let outcomes = (expected(p, fate, without_rules[packet]), outcomes[packet]);
            compared += 1;
            if outcomes.0 != outcomes.1
                && !known::differs(&case.instances, p, matches!(way, Way::Iptables | Way::IptablesScript))
            {
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
        return (case.clone(), steps);
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

#[test]
fn install_rules_of_random_configs_agrees_with_model() {
    let pairs = number("ORACLE_PAIRS").unwrap_or(10_000);
    let first = number("ORACLE_SEED").unwrap_or(1);
    let (mut compared, mut found) = (0, Vec::new());
    let mut seed = first;
    let begun = std::time::Instant::now();
    while compared < pairs && found.len() < 5 {
        let case = Case::random(seed);
        let script = if seed % 2 == 0 { Way::NftScript } else { Way::IptablesScript };
        let (count, disagreements) = run(&case, &[Way::Nft, Way::Iptables, script]);
        compared += count as u64;
        if let Some(first) = disagreements.first() {
            let (minimal, steps) = shrink(&case, first.way, first.packet);
            let again = run(&minimal, &[first.way]).1;
            let shown: Vec<String> = again.iter().chain(&disagreements[..1]).take(1).map(|d| d.to_string()).collect();
            let replay = format!("{seed}:{}:{steps:?}", first.packet).replace(' ', "");
            println!(
                "{} disagreements with seed {seed}; the first, made minimal:\n{minimal}{}\nORACLE_REPLAY={replay}\n",
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
