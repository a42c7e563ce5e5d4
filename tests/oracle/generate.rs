//! Random cases, and simpler ones.

use std::fmt;

use tproxy::ffi::*;

use crate::case::{DIVERT_PORT, FOREIGN, From, Instance, Kind, Packet, PortRange};
use crate::common::*;

/// Configurations in the order of installation, and packets that are sent one after the other.
#[derive(Clone)]
pub struct Case {
    pub instances: Vec<Instance>,
    pub packets: Vec<Packet>,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for instance in &self.instances {
            let Instance { flags, families, protocols, listen, dead, .. } = instance;
            write!(f, "  instance {} port {}", listen.0, listen.1)?;
            for (flag, name) in FLAGS {
                if flags & flag != 0 {
                    write!(f, " {name}")?;
                }
            }
            write!(f, " families {families} protocols {protocols}")?;
            let lists: [(&str, &dyn fmt::Debug); 14] = [
                ("ports", &instance.ports),
                ("bypass_ports", &instance.bypass_ports),
                ("reject_ports", &instance.reject_ports),
                ("dst", &instance.dst),
                ("src", &instance.src),
                ("bypass", &instance.bypass),
                ("bypass_src", &instance.bypass_src),
                ("interfaces", &instance.interfaces),
                ("bypass_interfaces", &instance.bypass_interfaces),
                ("macs", &instance.macs),
                ("bypass_macs", &instance.bypass_macs),
                ("uids, gids", &(&instance.uids, &instance.gids)),
                ("bypass_uids, bypass_gids", &(&instance.bypass_uids, &instance.bypass_gids)),
                ("bypass_mark", &instance.bypass_mark),
            ];
            for (name, list) in lists {
                let list = format!("{list:?}");
                if !["None", "[]", "(None, None)", "([], [])", "(0, 0)"].contains(&list.as_str()) {
                    write!(f, " {name} {list}")?;
                }
            }
            writeln!(f, "{}", if *dead { " dead" } else { "" })?;
        }
        for p in self.packets.iter().take(3) {
            writeln!(f, "  {p:?}")?;
        }
        Ok(())
    }
}

impl PartialEq for Case {
    fn eq(&self, other: &Case) -> bool {
        self.to_string() == other.to_string()
    }
}

const FLAGS: [(u32, &str); 9] = [
    (TP_RULES_DIVERT_ONLY, "DIVERT_ONLY"),
    (TP_RULES_REDIRECT, "REDIRECT"),
    (TP_RULES_LOCAL_OUTPUT, "LOCAL_OUTPUT"),
    (TP_RULES_FAIL_OPEN, "FAIL_OPEN"),
    (TP_RULES_ALLOW_DIRECT, "ALLOW_DIRECT"),
    (TP_RULES_NOTRACK, "NOTRACK"),
    (TP_RULES_PERSIST, "PERSIST"),
    (TP_RULES_NEW_ONLY, "NEW_ONLY"),
    (TP_RULES_LOCAL_SERVERS, "LOCAL_SERVERS"),
];

const LISTEN: [&str; 9] = ["::", "::", "::", "::", "0.0.0.0", "198.51.100.1", "127.0.0.1", "::1", "2001:db8:1::1"];
const PORTS: [&[PortRange]; 14] = [
    &[(80, 80, 0)],
    &[(53, 53, 0), (443, 443, 0)],
    &[(1, 1023, 0)],
    &[(1024, 65535, 0)],
    &[(1, 65535, 0)],
    &[(2000, 7777, 0)],
    &[(3129, 3131, 0)],
    &[(80, 80, 0), (20000, 65535, 0)],
    &[(7777, 7777, 0)],
    &[],
    &[(80, 80, 1), (1, 65535, 2)],
    &[(1, 500, 1), (53, 53, 3)],
    &[(443, 443, 2)],
    &[(80, 7777, 1), (53, 53, 2)],
];
const DST: [&str; 20] = [
    "0.0.0.0/0",
    "192.0.2.10/32",
    "192.0.2.0/24",
    "198.51.100.1/32",
    "127.0.0.0/8",
    "10.0.0.0/8",
    "224.0.0.0/4",
    "198.51.100.255/32",
    "192.0.2.77/32",
    "0.0.0.0/8",
    "::/0",
    "2001:db8:9::10/128",
    "2001:db8:9::/64",
    "2001:db8:1::1/128",
    "::1/128",
    "2001:db8:a::/48",
    "ff00::/8",
    "fe80::/10",
    "2001:db8:9::77/128",
    "::ffff:0:0/96",
];
const SRC: [&str; 10] = [
    "10.1.0.0/16",
    "10.0.0.0/8",
    "203.0.113.0/24",
    "192.0.2.0/24",
    "198.51.100.1/32",
    "2001:db8:a:1::/64",
    "2001:db8:a::/48",
    "2001:db8:9::/64",
    "2001:db8:2::/64",
    "2001:db8:1::1/128",
];
const INTERFACES: [&[&str]; 5] = [&["eth0"], &["eth1"], &["eth*"], &["absent", "eth1"], &[]];
const MACS: [&[From]; 4] = [&[From::Client], &[From::Server], &[From::Client, From::Server], &[]];
/// Root, whom every user namespace has, and nobody.
const IDS: [&[(u32, u32)]; 2] = [&[(0, 0)], &[]];
const CLIENTS: [[&str; 2]; 2] = [["10.1.0.5", "10.2.0.5"], ["2001:db8:a:1::5", "2001:db8:a:2::5"]];
const SERVERS: [[&str; 2]; 2] = [["192.0.2.10", "192.0.2.20"], ["2001:db8:9::10", "2001:db8:9::20"]];
const HOSTS: [[&str; 2]; 2] = [["198.51.100.1", "203.0.113.1"], ["2001:db8:1::1", "2001:db8:2::1"]];
const ODD_SRC: [[&str; 6]; 2] = [
    ["198.51.100.1", "203.0.113.1", "127.0.0.1", "0.0.0.5", "224.0.0.5", "198.51.100.255"],
    ["2001:db8:1::1", "2001:db8:2::1", "::1", "::ffff:192.0.2.9", "ff02::5", "::7f00:1"],
];
const ODD_DST: [[&str; 7]; 2] = [
    ["127.0.0.1", "0.0.0.5", "224.0.0.5", "198.51.100.255", "255.255.255.255", "198.51.100.1", "203.0.113.1"],
    ["::1", "::ffff:192.0.2.10", "ff02::5", "fe80::1", "::7f00:1", "2001:db8:1::1", "2001:db8:2::1"],
];
const TARGETS: [u16; 9] = [53, 80, 80, 443, 2000, 3129, 3130, 3131, DIVERT_PORT];

/// Packets of a case: enough for the time that the installation of its rules takes.
const PACKETS: usize = 80;

struct Choices(Random);

impl Choices {
    fn one_in(&mut self, n: u64) -> bool {
        self.0.below(n) == 0
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.0.below(list.len() as u64) as usize]
    }

    fn prefixes(&mut self, pool: &[&'static str], families: u32) -> Option<Vec<&'static str>> {
        match self.0.below(8) {
            0 => {
                let served =
                    |prefix: &&str| families & if prefix.contains(':') { TP_FAMILY_IPV6 } else { TP_FAMILY_IPV4 } != 0;
                let pool: Vec<&str> = pool.iter().copied().filter(served).collect();
                Some((0..self.0.below(6)).map(|_| self.of(&pool)).collect())
            }
            1 | 2 => {
                let served =
                    |prefix: &&str| families & if prefix.contains(':') { TP_FAMILY_IPV6 } else { TP_FAMILY_IPV4 } != 0;
                let pool: Vec<&str> = pool.iter().copied().filter(served).collect();
                Some((0..1 + self.0.below(6)).map(|_| self.of(&pool)).collect())
            }
            _ => None,
        }
    }

    fn instance(&mut self, index: usize, redirect: bool, simple: bool) -> Instance {
        let listen = if redirect { self.of(&["::", "0.0.0.0", "198.51.100.1"]) } else { self.of(&LISTEN) };
        let own = if listen.contains('.') { TP_FAMILY_IPV4 } else { TP_FAMILY_IPV6 };
        let both = TP_FAMILY_IPV4 | TP_FAMILY_IPV6;
        let families = if listen == "::" { self.of(&[both, both, both, TP_FAMILY_IPV4, TP_FAMILY_IPV6]) } else { own };
        let protocols = if redirect { TP_PROTO_TCP } else { self.of(&[TP_PROTO_TCP, TP_PROTO_UDP, 3, 3]) };
        let mut flags = 0;
        if redirect {
            flags |= TP_RULES_REDIRECT;
        } else if self.one_in(10) {
            flags |= TP_RULES_DIVERT_ONLY;
        } else if self.one_in(3) {
            flags |= TP_RULES_LOCAL_OUTPUT;
        }
        let intercepts = flags & TP_RULES_DIVERT_ONLY == 0;
        for (flag, often, allowed) in [
            (TP_RULES_FAIL_OPEN, 4, !simple && intercepts && !redirect && flags & TP_RULES_LOCAL_OUTPUT == 0),
            (TP_RULES_ALLOW_DIRECT, 4, intercepts),
            (TP_RULES_NOTRACK, 4, !simple && !redirect),
            (TP_RULES_NEW_ONLY, 4, intercepts && !redirect && flags & TP_RULES_LOCAL_OUTPUT == 0),
            (TP_RULES_LOCAL_SERVERS, 6, !redirect),
        ] {
            if allowed && self.one_in(often) {
                flags |= flag;
            }
        }
        if flags & TP_RULES_NOTRACK != 0 && flags & TP_RULES_LOCAL_OUTPUT != 0 {
            flags &= !TP_RULES_LOCAL_SERVERS;
        }
        let mut instance =
            Instance { flags, families, protocols, listen: (listen, 3129 + index as u16), ..Instance::default() };
        if intercepts {
            instance.ports = (!self.one_in(4)).then(|| self.of(&PORTS).to_vec());
            instance.dst = self.prefixes(&DST, families);
            instance.src = self.prefixes(&SRC, families);
            instance.bypass = self.prefixes(&DST[1..], families);
            instance.bypass_ports = if self.one_in(5) { self.of(&PORTS).to_vec() } else { Vec::new() };
            instance.reject_ports = if self.one_in(5) { self.of(&PORTS).to_vec() } else { Vec::new() };
            instance.bypass_src =
                if self.one_in(2) { Vec::new() } else { self.prefixes(&SRC, families).unwrap_or_default() };
            instance.bypass_interfaces = if self.one_in(8) { self.of(&INTERFACES).to_vec() } else { Vec::new() };
            instance.macs = self.one_in(8).then(|| self.of(&MACS).to_vec());
            instance.bypass_macs = if self.one_in(8) { self.of(&MACS).to_vec() } else { Vec::new() };
            if flags & TP_RULES_LOCAL_OUTPUT != 0 && flags & TP_RULES_NOTRACK == 0 && self.one_in(2) {
                instance.bypass_mark = self.of(&[(0, 0), (0, 0), (7, 0xf), (5, 5), (7, u32::MAX), (8, 8)]);
                instance.uids = self.one_in(3).then(|| self.of(&IDS).to_vec());
                instance.gids = self.one_in(3).then(|| self.of(&IDS).to_vec());
                instance.bypass_uids = if self.one_in(6) { self.of(&IDS).to_vec() } else { Vec::new() };
                instance.bypass_gids = if self.one_in(6) { self.of(&IDS).to_vec() } else { Vec::new() };
            }
            instance.interfaces = self.one_in(4).then(|| self.of(&INTERFACES).to_vec());
            instance.dead = self.one_in(6);
        }
        instance
    }

    fn packet(&mut self) -> Packet {
        let family = self.0.below(2) as usize;
        let from = self.of(&[From::Client, From::Client, From::Server, From::Host]);
        let kind = self.of(&[Kind::Syn, Kind::Syn, Kind::Ack, Kind::SynAck, Kind::Udp, Kind::Udp, Kind::Error]);
        let [clients, servers, hosts] = [CLIENTS, SERVERS, HOSTS].map(|addresses| ip(self.of(&addresses[family])));
        let foreign = ip(FOREIGN[family]);
        let mut p = Packet {
            from,
            kind,
            src: clients,
            dst: servers,
            port: self.of(&TARGETS),
            reply: false,
            exempt: false,
            mark: 0,
        };
        (p.src, p.dst) = match from {
            From::Client => (clients, self.of(&[servers, servers, servers, hosts, foreign])),
            From::Server => (servers, self.of(&[clients, clients, hosts, foreign])),
            From::Host => (hosts, self.of(&[servers, servers, clients, hosts])),
        };
        match self.0.below(10) {
            0 => p.src = ip(self.of(&ODD_SRC[family])),
            1 => {
                p.dst = ip(self.of(&ODD_DST[family]));
                if from == From::Host && matches!(p.dst, std::net::IpAddr::V4(dst) if dst.octets()[3] == 255) {
                    // The kernel finds the routes of broadcasts before it comes to the library's rules.
                    p.dst = servers;
                }
                if p.dst == ip("fe80::1") && from != From::Client {
                    p.dst = ip("fe80::2");
                }
            }
            _ => {
                let known = match from {
                    From::Client => p.dst == servers || p.dst == hosts,
                    From::Server => p.dst != foreign,
                    From::Host => p.dst == clients,
                };
                p.reply = known && kind != Kind::Error && !(from == From::Host && kind == Kind::Ack) && self.one_in(3);
            }
        }
        if from == From::Host {
            p.exempt = self.one_in(4);
            p.mark = if p.exempt { 0x2000 } else { self.of(&[0, 0, 7]) };
            if kind == Kind::Error {
                p.kind = Kind::Udp;
            }
        }
        if p.kind == Kind::Error {
            p.port = DIVERT_PORT;
            if self.one_in(2) {
                p.dst = foreign;
            }
        }
        p
    }
}

impl Case {
    pub fn random(seed: u64) -> Case {
        let mut choices = Choices(Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        for _ in 0..3 {
            choices.0.below(2);
        }
        let (redirect, simple) = (choices.one_in(8), choices.one_in(2));
        let count = choices.of(&[1, 1, 2, 3]);
        let instances = (0..count).map(|index| choices.instance(index, redirect, simple)).collect();
        let packets = (0..PACKETS).map(|_| choices.packet()).collect();
        Case { instances, packets }
    }
}

/// The case with something left out; `None`: there are fewer ways to do that.
pub fn simpler(case: &Case, step: usize) -> Option<Case> {
    let mut new = case.clone();
    let per_instance = FLAGS.len() + 7 + 6 * 4 + 11;
    if step >= case.instances.len() * (per_instance + 1) {
        let p = &mut new.packets[0];
        match step - case.instances.len() * (per_instance + 1) {
            0 => p.exempt = false,
            1 => p.reply = false,
            2 => p.kind = Kind::Syn,
            3 => p.kind = Kind::Udp,
            _ => return None,
        }
        return Some(new);
    }
    let index = case.instances.len() - 1 - step / (per_instance + 1);
    let instance = &mut new.instances[index];
    match step % (per_instance + 1) {
        0 if case.instances.len() > 1 => drop(new.instances.remove(index)),
        0 => {}
        1 => instance.dst = None,
        2 => instance.src = None,
        3 => instance.bypass = None,
        4 => instance.interfaces = None,
        5 => instance.ports = None,
        6 => instance.dead = false,
        7 if instance.flags & TP_RULES_REDIRECT == 0 => (instance.listen.0, instance.families) = ("::", 3),
        7 => {}
        n if n < 8 + FLAGS.len() && FLAGS[n - 8].0 == TP_RULES_REDIRECT => {}
        n if n < 8 + FLAGS.len() => {
            instance.flags &= !FLAGS[n - 8].0;
            if instance.flags & TP_RULES_LOCAL_OUTPUT == 0 {
                // These are not valid without it.
                (instance.uids, instance.gids, instance.bypass_mark) = (None, None, (0, 0));
                instance.bypass_uids.clear();
                instance.bypass_gids.clear();
            }
        }
        n if n < 8 + FLAGS.len() + 11 => match n - 8 - FLAGS.len() {
            0 => instance.bypass_ports.clear(),
            1 => instance.reject_ports.clear(),
            2 => instance.bypass_src.clear(),
            3 => instance.bypass_interfaces.clear(),
            4 => instance.macs = None,
            5 => instance.bypass_macs.clear(),
            6 => instance.uids = None,
            7 => instance.gids = None,
            8 => instance.bypass_uids.clear(),
            9 => instance.bypass_gids.clear(),
            _ => instance.bypass_mark = (0, 0),
        },
        n => {
            let n = n - 11;
            let (list, at) = ((n - 8 - FLAGS.len()) / 6, (n - 8 - FLAGS.len()) % 6);
            let list = [&mut instance.dst, &mut instance.src, &mut instance.bypass, &mut instance.interfaces]
                .into_iter()
                .nth(list);
            if let Some(Some(list)) = list.filter(|list| list.as_ref().is_some_and(|list| at < list.len())) {
                list.remove(at);
            }
        }
    }
    Some(new)
}
