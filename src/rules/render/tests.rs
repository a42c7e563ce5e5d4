//! The scripts of configurations that differ in one respect each, compared with what is recorded in
//! `tests/golden/scripts.txt`. A difference that is wanted is recorded by `UPDATE_GOLDEN=1 cargo test --lib scripts`, and
//! reviewed as text.

use std::fmt::Write;
use std::process::Command;

use super::*;
use crate::rules::{Backend, Families, Listener, MacAddr, Mark, Mode, Prefix, Protocol, Protocols, Rules};
use Protocol::{Tcp, Udp};

fn listener(protocol: Protocol, addr: &str) -> Listener {
    Listener::at(addr.parse().unwrap(), protocol).unwrap()
}

fn config(listeners: &[(Protocol, &str)]) -> Config {
    every_port(listeners).ports([80])
}

fn every_port(listeners: &[(Protocol, &str)]) -> Config {
    Config::new(listeners.iter().map(|(protocol, addr)| listener(*protocol, addr)))
}

/// One dual-stack TCP listener, for port 80.
fn http() -> Config {
    config(&HTTP)
}

fn prefixes(texts: &[&str]) -> Vec<Prefix> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// So many networks of one length, no two of them neighbors: they get a set of their own.
fn many() -> Vec<Prefix> {
    (0..64).map(|n| format!("10.0.{}.0/24", 2 * n).parse().unwrap()).collect()
}

const HTTP: [(Protocol, &str); 1] = [(Tcp, "[::]:3129")];
const DNS: [(Protocol, &str); 1] = [(Udp, "[::]:3053")];
const BOTH: [(Protocol, &str); 2] = [HTTP[0], DNS[0]];
const V4: Families = Families { v4: true, v6: false };
const V6: Families = Families { v4: false, v6: true };
const UDP: Protocols = Protocols { tcp: false, udp: true };
const TCP_AND_UDP: Protocols = Protocols { tcp: true, udp: true };

fn configurations() -> Vec<(&'static str, Config)> {
    let redirect = |addrs: &[(Protocol, &str)]| config(addrs).mode(Mode::Redirect);
    let divert = Config::divert_only;
    let bypass = || prefixes(&["192.0.2.0/24", "2001:db8::/32"]);
    let dst = || prefixes(&["198.51.100.0/24", "2001:db8::/32"]);
    let src = || prefixes(&["10.0.0.0/8"]);
    let interfaces = ["eth0", "ppp*", "wg-1"];
    vec![
        ("one port", http()),
        ("a range of ports", http().ports([80..=81])),
        ("ports", http().ports([443..=443, 80..=80, 8000..=8100, 8050..=8200])),
        ("every port", every_port(&HTTP)),
        ("no port", http().ports([0u16; 0])),
        ("ports of each protocol", config(&BOTH).ports_of(Tcp, [80, 443]).ports_of(Udp, [53])),
        ("ports, some exempt", config(&BOTH).bypass_ports([22, 25]).bypass_ports_of(Udp, [123])),
        ("refused ports", http().reject_ports_of(Udp, [443]).reject_ports([853])),
        ("sources and interfaces, some exempt", http().bypass_src(src()).bypass_interfaces(interfaces)),
        ("Ethernet sources", http().macs([MacAddr([2, 0, 0, 0, 0, 1])]).bypass_macs([MacAddr([2, 0, 0, 0, 0, 2])])),
        ("users and groups", http().local_output(true).uids([1000..=1999]).bypass_gids([33]).bypass_mark(0x40)),
        (
            "control groups",
            http().local_output(true).cgroups(["user.slice"]).bypass_cgroups(["system.slice/a.service"]),
        ),
        ("new connections only", config(&BOTH).new_only(true)),
        ("local servers", divert().local_servers(true)),
        ("TCP and UDP", config(&BOTH)),
        ("UDP", config(&DNS)),
        ("UDP of listeners of both", config(&BOTH).protocols(UDP)),
        ("TCP over IPv4, UDP over IPv6", config(&[(Tcp, "0.0.0.0:3129"), (Udp, "[2001:db8::1]:3053")])),
        ("IPv4", config(&BOTH).families(V4)),
        ("IPv6", config(&BOTH).families(V6)),
        ("a listener for each family", config(&[(Tcp, "127.0.0.1:3129"), (Tcp, "[2001:db8::1]:3130")])),
        ("allow direct", config(&BOTH).allow_direct(true)),
        ("fail open", http().fail_open(true)),
        ("persist", http().persist(true)),
        ("name, mark, table and priority", {
            http().name("name-of_20.character").mark(Mark { value: 0x40, mask: 0xc0 }).table(100).priority(1000)
        }),
        ("a mark of all bits", http().mark(7)),
        ("dst", http().dst(prefixes(&["198.51.100.0/24", "198.51.100.0/25", "203.0.113.7"]))),
        ("dst of IPv6", http().dst(prefixes(&["2001:db8::/32", "2001:db9::1"]))),
        ("no dst", http().dst([])),
        ("src", http().src(prefixes(&["10.0.0.0/8", "fd00::/8"]))),
        ("no src", http().src([])),
        ("bypass", http().bypass(bypass())),
        ("many of a length", http().dst(many()).src(many()).bypass([many(), bypass()].concat())),
        ("bypass, every port", every_port(&BOTH).bypass(bypass())),
        ("bypass, every port, not tracked", every_port(&BOTH).bypass(bypass()).notrack(true)),
        ("bypass, every port, an interface", every_port(&HTTP).bypass(bypass()).interfaces(["eth0"])),
        ("src, bypass and dst", config(&BOTH).src(src()).bypass(bypass()).dst(prefixes(&["0.0.0.0/0", "::/0"]))),
        ("interfaces", config(&BOTH).interfaces(interfaces)),
        ("a pattern of interfaces, every port", every_port(&HTTP).interfaces(["ppp*"])),
        ("own traffic", config(&BOTH).local_output(true)),
        ("own traffic, no interface", config(&HTTP).local_output(true).interfaces([""; 0])),
        ("own traffic, a mark of all bits", http().local_output(true).mark(7)),
        ("own traffic, every port", every_port(&BOTH).local_output(true)),
        ("own UDP traffic, every port", every_port(&DNS).local_output(true)),
        ("own traffic, every port, bypass", every_port(&HTTP).local_output(true).bypass(bypass())),
        ("own traffic, src and dst", http().local_output(true).src(src()).dst(dst()).interfaces(interfaces)),
        ("not tracked", config(&BOTH).notrack(true)),
        ("own traffic, not tracked", every_port(&BOTH).notrack(true).local_output(true)),
        ("new connections", every_port(&BOTH).new_only(true)),
        ("new connections of one port", http().new_only(true)),
        ("new connections, own ones too", every_port(&HTTP).new_only(true).local_output(true)),
        ("new connections, not tracked", every_port(&HTTP).new_only(true).notrack(true)),
        ("new connections, redirected", redirect(&HTTP).new_only(true)),
        ("servers of this host", config(&BOTH).local_servers(true)),
        ("servers of this host, a mark of all bits", http().local_servers(true).mark(7)),
        ("servers of this host, every port, not tracked", every_port(&HTTP).local_servers(true).notrack(true)),
        ("servers of this host, own traffic", every_port(&BOTH).local_servers(true).local_output(true)),
        ("servers of this host, redirected", redirect(&HTTP).local_servers(true)),
        ("servers of this host, diverted", divert().local_servers(true)),
        ("divert", divert()),
        ("divert UDP", divert().protocols(UDP)),
        ("divert TCP and UDP, not tracked", divert().protocols(TCP_AND_UDP).notrack(true)),
        ("divert IPv4", divert().protocols(TCP_AND_UDP).families(V4)),
        ("divert IPv6 for a listener", every_port(&HTTP).mode(Mode::DivertOnly).families(V6)),
        ("redirect", redirect(&HTTP)),
        ("redirect to addresses", redirect(&[(Tcp, "198.51.100.1:3129"), (Tcp, "[2001:db8::1]:3130")])),
        ("redirect dst, src, bypass", redirect(&HTTP).src(src()).dst(dst()).bypass(bypass()).interfaces(interfaces)),
        ("redirect own traffic, every port", every_port(&HTTP).mode(Mode::Redirect).local_output(true)),
        ("redirect own traffic to loopback", {
            redirect(&[(Tcp, "127.0.0.1:3129"), (Tcp, "[::1]:3129")]).local_output(true).dst(dst())
        }),
    ]
}

/// The lines of a script, but runs of at least three lines that the first script of the format has too: of these the
/// first, and how many follow.
fn shortened(script: &str, first: &str) -> String {
    let (lines, known): (Vec<&str>, Vec<&str>) = (script.lines().collect(), first.lines().collect());
    let common = |at: usize, known_at: usize| {
        lines[at..].iter().zip(&known[known_at..]).take_while(|(line, known)| line == known).count()
    };
    let (mut text, mut at) = (String::new(), 0);
    while at < lines.len() {
        let run = (0..known.len()).map(|known_at| common(at, known_at)).max().unwrap_or(0);
        let (more, taken) =
            if run < 3 { (String::new(), 1) } else { (format!("\n    and {} more lines", run - 1), run) };
        writeln!(text, "{}{more}", lines[at]).unwrap();
        at += taken;
    }
    text
}

#[cfg(feature = "iptables")]
#[test]
fn scripts_of_configurations_are_as_recorded() {
    let mut made = String::new();
    let mut first = [String::new(), String::new()];
    for (what, config) in configurations() {
        let scripts = [("nft", render_nft(&config)), ("iptables", render_iptables(&config))];
        for ((format, script), first) in scripts.into_iter().zip(&mut first) {
            let script = script.unwrap_or_else(|error| format!("{error}\n"));
            writeln!(made, "==== {what}: {format}\n{}", shortened(&script, first)).unwrap();
            if first.is_empty() {
                *first = script;
            }
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/scripts.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &made).unwrap();
    }
    let recorded = std::fs::read_to_string(path).unwrap_or_default();
    let sections = |text: &str| text.split("==== ").map(str::to_owned).collect::<Vec<_>>();
    for (made, recorded) in sections(&made).iter().zip(sections(&recorded)) {
        let title = made.lines().next().unwrap_or_default();
        for (made, recorded) in made.lines().zip(recorded.lines()) {
            assert_eq!(made, recorded, "{title}; `UPDATE_GOLDEN=1 cargo test --lib scripts` records what is made");
        }
    }
    assert!(made == recorded, "a rule is new or gone; `UPDATE_GOLDEN=1 cargo test --lib scripts` records what is made");
}

/// Does something in a thread with a network namespace of its own.
fn in_own_network<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    #[allow(unsafe_code)]
    let enter = || {
        // SAFETY: a plain system call, which changes this new thread alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
        shell("ip link set lo up");
        body()
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What nf_tables has, as bytecode and as text, without the owner and the handles.
fn held() -> Vec<String> {
    let listing = shell("nft --debug=netlink list ruleset");
    let (bytecode, text) = listing.split_once("\ntable ").unwrap();
    let expressions = bytecode.lines().filter(|line| line.starts_with("  ["));
    let text = text
        .lines()
        .filter(|line| !line.is_empty() && !line.contains("flags owner") && !line.contains("comment \"libtproxy:"));
    let text = text.map(|line| line.split(" # ").next().unwrap_or(line));
    expressions.chain(text).map(str::to_owned).collect()
}

/// The bytes of each statement do what its text says.
#[test]
fn scripts_make_the_kernel_hold_what_install_makes_it_hold() {
    for (what, config) in configurations() {
        let Ok(script) = render_nft(&config) else { continue };
        // This host need not have them (tests/selection.rs makes some).
        if script.contains("cgroupv2") {
            continue;
        }
        let ours = in_own_network(|| {
            let _rules = Rules::install(&config.backend(Backend::Nft)).unwrap();
            held()
        });
        let theirs = in_own_network(|| {
            shell(&script);
            held()
        });
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs, "{what}");
        }
        assert_eq!(ours.len(), theirs.len(), "{what}");
    }
}
