//! Sets of very many prefixes: the kernel covers exactly the addresses that were asked for.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};

use common::*;
use tproxy::ffi::*;

/// A prefix as a number: family by its size in bits, address, length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Wanted {
    bits: u32,
    addr: u128,
    len: u32,
}

impl Wanted {
    fn v4(addr: u32, len: u32) -> Wanted {
        Wanted { bits: 32, addr: (addr & !u32::MAX.checked_shr(len).unwrap_or(0)).into(), len }
    }

    fn v6(addr: u128, len: u32) -> Wanted {
        Wanted { bits: 128, addr: addr & !u128::MAX.checked_shr(len).unwrap_or(0), len }
    }

    fn last(&self) -> u128 {
        self.addr | ((1 << (self.bits - self.len)) - 1)
    }

    fn prefix(&self) -> tp_prefix {
        let mut prefix = tp_prefix { family: 0, len: self.len as u8, reserved: [0; 2], addr: [0; 16] };
        if self.bits == 32 {
            prefix.family = libc::AF_INET as u8;
            prefix.addr[..4].copy_from_slice(&(self.addr as u32).to_be_bytes());
        } else {
            prefix.family = libc::AF_INET6 as u8;
            prefix.addr = self.addr.to_be_bytes();
        }
        prefix
    }
}

fn as_c(wanted: &[Wanted]) -> Vec<tp_prefix> {
    wanted.iter().map(Wanted::prefix).collect()
}

/// The ranges of addresses that the prefixes of a family cover, with gaps between them.
fn union(wanted: &[Wanted], bits: u32) -> Vec<(u128, u128)> {
    merged(wanted.iter().filter(|prefix| prefix.bits == bits).map(|prefix| (prefix.addr, prefix.last())))
}

/// Merges ranges until there are gaps between them: a sweep along the address space counts how many ranges are open.
fn merged(ranges: impl Iterator<Item = (u128, u128)>) -> Vec<(u128, u128)> {
    let mut steps: BTreeMap<u128, i32> = BTreeMap::new();
    for (first, last) in ranges {
        *steps.entry(first).or_default() += 1;
        *steps.entry(last + 1).or_default() -= 1;
    }
    let (mut depth, mut first, mut ranges) = (0, 0, Vec::new());
    for (at, step) in steps {
        if depth == 0 && step > 0 {
            first = at;
        }
        let outside = depth > 0 && depth + step == 0;
        depth += step;
        if outside {
            ranges.push((first, at - 1));
        }
    }
    ranges
}

/// The sets that hold the prefixes of a kind, such as `dst4`: one set of ranges, and one for each length with many
/// prefixes, with that length. Each name may end with "-2".
fn sets(net: &Net, kind: &str) -> Vec<(String, Option<u32>)> {
    let listing = net.nft_with(&["-t", "list", "table", "inet", "libtproxy-tproxy"]);
    let names = listing.lines().filter_map(|line| line.trim().strip_prefix("set ")?.strip_suffix(" {"));
    let of_kind = |name: &str| {
        let rest = name.strip_suffix("-2").unwrap_or(name).strip_prefix(kind)?;
        Some((name.to_owned(), rest.strip_prefix('-').map(|len| len.parse().unwrap())))
    };
    names.filter_map(of_kind).collect()
}

/// The ranges of addresses that a kind of set covers in the kernel.
fn held(net: &Net, kind: &str) -> Vec<(u128, u128)> {
    let sets = sets(net, kind);
    assert_eq!(sets.iter().filter(|(_, len)| len.is_none()).count(), 1, "{sets:?}");
    sets.iter().flat_map(|(name, len)| elements(net, kind, name, *len)).collect()
}

/// The elements of a set.
fn elements(net: &Net, kind: &str, set: &str, len: Option<u32>) -> Vec<(u128, u128)> {
    let bits = if kind.ends_with('4') { 32 } else { 128 };
    let json = net.nft_with(&["-j", "list", "set", "inet", "libtproxy-tproxy", set]);
    let Some((_, elements)) = json.split_once("\"elem\": [") else { return Vec::new() };
    // {"prefix": {"addr": A, "len": N}}, {"range": [A, B]} or A: quoted words, and a number after "len".
    let mut quoted = elements.split('"').skip(1).step_by(2);
    let mut behind = elements.split('"').skip(2).step_by(2);
    let mut ranges = Vec::new();
    let mut next = || Some((quoted.next()?, behind.next()?));
    while let Some((word, _)) = next() {
        let range = match word {
            "prefix" => {
                next();
                let addr = number(next().unwrap().0);
                let (_, len) = next().unwrap();
                let len: u32 = len.trim_matches([':', ' ', '}', ']', ',', '{', '\n']).parse().unwrap();
                (addr, Wanted { bits, addr, len }.last())
            }
            "range" => (number(next().unwrap().0), number(next().unwrap().0)),
            addr => (number(addr), Wanted { bits, addr: number(addr), len: len.unwrap_or(bits) }.last()),
        };
        ranges.push(range);
    }
    ranges
}

fn number(text: &str) -> u128 {
    match ip(text) {
        IpAddr::V4(addr) => addr.to_bits().into(),
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

/// Asserts that the kernel's sets cover exactly what the prefixes cover.
fn assert_held(net: &Net, which: &str, wanted: &[Wanted]) {
    for (bits, family) in [(32, "4"), (128, "6")] {
        let (held, wanted) = (merged(held(net, &format!("{which}{family}")).into_iter()), union(wanted, bits));
        let differ = held.iter().zip(&wanted).find(|(held, wanted)| held != wanted);
        assert!(held == wanted, "{which}{family}: {} for {}, first {differ:?}", held.len(), wanted.len());
    }
}

/// The lab, in which the server answers at every address that no other host has.
struct World {
    lab: Lab,
    server: TcpListener,
    listener: TcpListener,
}

impl World {
    fn new() -> World {
        let lab = Lab::new();
        lab.proxy.ip("route add default via 203.0.113.2");
        lab.proxy.ip("route add default via 2001:db8:2::2");
        for family in ["-4", "-6"] {
            lab.server.ip(&format!("{family} rule add pref 100 iif eth0 lookup 100"));
            lab.server.ip(&format!("{family} route add local default dev lo table 100"));
        }
        let server = lab.server.run(|| listen("[::]:80".parse().unwrap(), 0)).unwrap();
        let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        World { lab, server, listener }
    }

    /// Rules for port 80, without lists of prefixes.
    fn config(&self) -> RulesConfig {
        RulesConfig::of(&self.listener).ports(&[80])
    }

    fn install(&self, config: &RulesConfig) -> Rules {
        self.lab.proxy.run(|| config.install().unwrap())
    }

    /// Which host answers at each address.
    fn answers(&self, to: &[IpAddr]) -> Vec<String> {
        while_answering(&[(&self.server, "server"), (&self.listener, "proxy")], || {
            let answer = |to: &IpAddr| match self.lab.client.run(|| ask(at(*to, 80))) {
                Ok(heard) => heard.answer,
                Err(error) => error.to_string(),
            };
            to.iter().map(answer).collect()
        })
    }

    /// Asserts who answers at both ends of some ranges, and at the addresses next to them.
    fn assert_intercepted(&self, wanted: &[Wanted]) {
        const SAMPLE: usize = 8;
        for bits in [32, 128] {
            let ranges = union(wanted, bits);
            let some = ranges.iter().step_by((ranges.len() / SAMPLE).max(1));
            let ends = some.flat_map(|(first, last)| {
                [(first.saturating_sub(1), "server"), (*first, "proxy"), (*last, "proxy"), (last + 1, "server")]
            });
            let (to, expected): (Vec<_>, Vec<_>) =
                ends.map(|(addr, who)| (address(bits, addr), who)).filter(|(addr, _)| is_elsewhere(*addr)).unzip();
            assert!(to.len() >= SAMPLE);
            for (to, (heard, expected)) in to.iter().zip(self.answers(&to).into_iter().zip(expected)) {
                assert_eq!(heard, expected, "{to}");
            }
        }
    }
}

fn address(bits: u32, number: u128) -> IpAddr {
    match bits {
        32 => Ipv4Addr::from_bits(number as u32).into(),
        _ => Ipv6Addr::from_bits(number).into(),
    }
}

/// Whether an address is a unicast address outside of the lab.
fn is_elsewhere(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => match v4.octets() {
            [198, 51, 100, _] | [203, 0, 113, _] => false,
            [first, ..] => (1..224).contains(&first) && first != 127,
        },
        IpAddr::V6(v6) => !v6.is_unspecified() && !matches!(v6.segments(), [0x2001, 0xdb8, ..]),
    }
}

/// Random prefixes, a tenth of them in 10.64.0.0/10; some cover others, lie within others, touch others, or occur twice.
fn scattered(random: &mut Random, count: usize) -> Vec<Wanted> {
    let mut wanted = Vec::new();
    for number in 0..count {
        let v4 = match number % 10 {
            0 => 0x0A40_0000 | (random.below(1 << 14) as u32) << 8,
            _ => (random.below(1 << 24) as u32) << 8,
        };
        wanted.push(Wanted::v4(v4, 24));
        let next = v4.wrapping_add(0x100);
        wanted.extend(match number % 50 {
            5 => Some(Wanted::v4(v4, 19)),
            15 => Some(Wanted::v4(v4 | 77, 32)),
            20 | 25 => Some(Wanted::v4(next, 24)),
            30 | 35 => Some(Wanted::v4(next, 32)),
            45 => Some(Wanted::v4(v4, 24)),
            _ => None,
        });
        if number % 10 == 0 {
            let v6 = 0x2000 << 112 | u128::from(random.below(1 << 29)) << 96 | u128::from(random.below(1 << 16)) << 80;
            wanted.push(Wanted::v6(v6, 48));
            let next = v6 + (1 << 80);
            wanted.extend(match number % 50 {
                0 => Some(Wanted::v6(v6, 35)),
                10 => Some(Wanted::v6(v6 | 77, 128)),
                20 => Some(Wanted::v6(next, 48)),
                30 => Some(Wanted::v6(next, 128)),
                _ => Some(Wanted::v6(v6, 48)),
            });
        }
    }
    // The ends of the address space.
    wanted.extend([Wanted::v4(0, 32), Wanted::v4(u32::MAX, 32)]);
    wanted
}

#[test]
fn update_rules_of_100000_prefixes_covers_what_was_asked() {
    let world = World::new();
    let mut random = Random(3);
    let mut wanted = scattered(&mut random, 100_000);
    let rules = world.install(&world.config().dst(as_c(&wanted)));
    assert_held(&world.lab.proxy, "dst", &wanted);
    world.assert_intercepted(&wanted);
    for round in 0..3 {
        // The removed prefixes often cover or touch others; the added ones lie anywhere.
        let gone: HashSet<Wanted> = (0..500).map(|_| wanted[random.below(wanted.len() as u64) as usize]).collect();
        let more = scattered(&mut random, 300);
        let remove: Vec<Wanted> = gone.iter().copied().collect();
        rules.update(TP_SET_DST, &as_c(&more), &as_c(&remove)).unwrap();
        wanted.extend(more);
        wanted.retain(|prefix| !gone.contains(prefix));
        assert_held(&world.lab.proxy, "dst", &wanted);
        if round == 2 {
            world.assert_intercepted(&wanted);
        }
    }
    world.lab.proxy.run(|| rules.remove()).unwrap();
}

/// Many prefixes of one length for each family, outside of the lab.
fn many_single() -> Vec<Wanted> {
    (0..500)
        .flat_map(|n| [Wanted::v4(0x0B00_0000 | n << 8, 32), Wanted::v6(0x3000 << 112 | u128::from(n), 128)])
        .collect()
}

/// An address is looked up in the sets of one length and in the set of ranges, in each of the three lists.
#[test]
fn update_rules_finds_members_by_length_and_by_range() {
    for (set, kind) in [(TP_SET_DST, "dst"), (TP_SET_SRC, "src"), (TP_SET_BYPASS, "bypass")] {
        let world = World::new();
        // One prefix of a rare length, which becomes a range.
        let elsewhere =
            as_c(&[many_single(), vec![Wanted::v4(0x0C00_0000, 19), Wanted::v6(0x3001 << 112, 35)]].concat());
        let config = match set {
            TP_SET_DST => world.config().dst(elsewhere),
            TP_SET_SRC => world.config().src(elsewhere),
            _ => world.config().bypass(elsewhere),
        };
        let rules = world.install(&config);
        for (family, len) in [("4", 32), ("6", 128)] {
            let lengths: Vec<Option<u32>> =
                sets(&world.lab.proxy, &format!("{kind}{family}")).into_iter().map(|(_, len)| len).collect();
            assert_eq!(lengths, [Some(len), None], "{kind}{family}");
        }
        let (outside, inside) = if set == TP_SET_BYPASS { ("proxy", "server") } else { ("server", "proxy") };
        let answers = || world.answers(&[v4().server, v6().server]);
        assert_eq!(answers(), [outside; 2], "{kind}");
        // The address that the list is about, as a host and as a network.
        let own = |[v4_len, v6_len]: [u8; 2]| match set {
            TP_SET_SRC => prefixes(&[&format!("198.51.100.2/{v4_len}"), &format!("2001:db8:1::2/{v6_len}")]),
            _ => prefixes(&[&format!("203.0.113.2/{v4_len}"), &format!("2001:db8:2::2/{v6_len}")]),
        };
        for lens in [[32, 128], [24, 64]] {
            rules.update(set, &own(lens), &[]).unwrap();
            assert_eq!(answers(), [inside; 2], "{kind} {lens:?}");
            rules.update(set, &[], &own(lens)).unwrap();
            assert_eq!(answers(), [outside; 2], "{kind} {lens:?}");
        }
        world.lab.proxy.run(|| rules.remove()).unwrap();
    }
}

/// From a few prefixes to many of several lengths and back, in small steps, each a transaction of its own.
#[test]
fn update_rules_3000_times_covers_what_was_asked() {
    const STEPS: u64 = 3000;
    const SETS: [(u32, &str); 3] = [(TP_SET_DST, "dst"), (TP_SET_SRC, "src"), (TP_SET_BYPASS, "bypass")];
    let world = World::new();
    let mut random = Random(11);
    let some = |random: &mut Random| {
        // Most have one of three lengths.
        let host_bits = match random.below(4) {
            0 => random.below(13) as u32,
            other => 4 * (other as u32 - 1),
        };
        match random.below(2) {
            0 => Wanted::v4(0x0A00_0000 | random.below(1 << 16) as u32, 32 - host_bits),
            _ => Wanted::v6(0x3000 << 112 | u128::from(random.below(1 << 16)) << 64, 64 - host_bits),
        }
    };
    let first = [Wanted::v4(0x0A00_0000, 24), Wanted::v6(0x3000 << 112, 48)];
    let mut all = SETS.map(|_| first.to_vec());
    let config = world.config().dst(as_c(&first)).src(as_c(&first)).bypass(as_c(&first));
    let rules = world.install(&config);
    let mut most = 0;
    for step in 1..=STEPS {
        // At first more prefixes are added than removed, later fewer.
        let (most_added, most_removed) = if step < STEPS / 2 { (8, 2) } else { (2, 8) };
        let which = random.below(3) as usize;
        let wanted = &mut all[which];
        let add: Vec<Wanted> = (0..random.below(most_added)).map(|_| some(&mut random)).collect();
        let remove: Vec<Wanted> = (0..random.below(most_removed))
            .filter_map(|_| wanted.get(random.below(wanted.len().max(1) as u64) as usize).copied())
            .collect();
        rules.update(SETS[which].0, &as_c(&add), &as_c(&remove)).unwrap();
        wanted.retain(|prefix| !add.contains(prefix));
        wanted.extend(add);
        wanted.retain(|prefix| !remove.contains(prefix));
        if step % (STEPS / 10) == 0 {
            for (wanted, (_, kind)) in all.iter().zip(SETS) {
                assert_held(&world.lab.proxy, kind, wanted);
            }
            most = most.max(sets(&world.lab.proxy, "dst4").len());
        }
    }
    assert_eq!(most, 1 + 3, "not every length had a set of its own");
    world.lab.proxy.run(|| rules.remove()).unwrap();
}

/// Without privilege over the initial user namespace one transaction cannot hold so many: the sets come first, in pieces.
#[test]
fn install_rules_with_a_million_prefixes_intercepts() {
    let world = World::new();
    let before = world.lab.proxy.state();
    // One /24 of every sixteen, so that none touches another, in random order.
    let wanted: Vec<Wanted> =
        (0..1_000_000u32).map(|number| Wanted::v4((number.wrapping_mul(0x9E37_79B1) & 0xF_FFFF) << 12, 24)).collect();
    let rules = world.install(&world.config().dst(as_c(&wanted)));
    let last = wanted.iter().map(Wanted::last).find(|last| is_elsewhere(address(32, *last))).unwrap();
    let (inside, outside) = (address(32, last), address(32, last + 1));
    assert_eq!(world.answers(&[inside, outside]), ["proxy", "server"]);
    world.lab.proxy.run(|| rules.remove()).unwrap();
    assert_eq!(world.answers(&[inside]), ["server"]);
    assert_eq!(world.lab.proxy.state(), before);
}
