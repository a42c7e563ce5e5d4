//! What the kernel holds after `tp_install_rules` is what it holds after `nft`
//! and `ip` were given the same: the same bytecode, sets, rules and routes.

mod common;

use std::os::fd::AsRawFd;
use std::process::Command;

use common::*;
use tproxy::ffi::*;

/// The rules as the kernel runs them, chain by chain, and the sets, without handles.
fn nf_tables(net: &Net) -> String {
    let listing = net.nft_with(&["--debug=netlink", "list", "ruleset"]);
    // First the bytecode, then the text. The sets are compared as text, since `nft`
    // puts elements into an interval set that mean nothing to the kernel.
    let (bytecode, text) = listing.split_once("\ntable ").unwrap();
    let expressions = bytecode.lines().filter(|line| line.starts_with("  ["));
    let chains = text
        .lines()
        .filter(|line| !line.is_empty() && !line.contains("flags owner") && !line.contains("\tcomment \"libtproxy:"));
    // "# progname ..." stands behind the name of a table that is owned.
    let chains = chains.map(|line| line.split(" # ").next().unwrap());
    expressions.chain(chains).collect::<Vec<_>>().join("\n")
}

fn routing(net: &Net) -> String {
    ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"].map(|args| net.ip(args)).join("--\n")
}

/// Two namespaces alike, with the addresses that the configurations name.
fn host() -> Net {
    let net = Net::new();
    net.ip("addr add 192.0.2.1/32 dev lo");
    net
}

fn compare(ours: &Net, nft: &str, ip: &str) {
    let theirs = host();
    theirs.nft(nft);
    assert_eq!(nf_tables(ours), nf_tables(&theirs));
    for line in ip.lines() {
        theirs.ip(line);
    }
    assert_eq!(routing(ours), routing(&theirs));
}

#[test]
fn a_dual_stack_listener_with_all_defaults() {
    let net = host();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let ports = [(8000, 8100), (80, 80)].map(|(first, last)| tp_port_range { first, last });
    let _rules = net.run(|| intercept_ports(&listener, &ports)).unwrap();
    compare(&net, include_str!("golden/dual.nft"), include_str!("golden/default.ip"));
}

/// A configuration in which everything is said that can be.
fn with_everything<T>(body: impl FnOnce(&tp_rules_config) -> T) -> T {
    let v4 = listen("192.0.2.1:3129".parse().unwrap(), 0).unwrap();
    let v6 = listen("[::1]:3130".parse().unwrap(), 0).unwrap();
    let udp = receiver("[::]:3131".parse().unwrap());
    let fds = [v4.as_raw_fd(), v6.as_raw_fd(), udp.as_raw_fd()];
    let src = prefixes(&["10.0.0.0/8"]);
    let dst = prefixes(&["255.255.255.255/32", "198.51.101.0/24", "::/0", "198.51.100.0/24", "198.51.100.128/25"]);
    let bypass = prefixes(&["198.51.100.7/32"]);
    let interfaces = [c"wg-1".as_ptr(), c"ppp*".as_ptr(), c"eth0".as_ptr()];
    body(&tp_rules_config {
        name: c"two".as_ptr(),
        listeners: fds.as_ptr(),
        n_listeners: fds.len(),
        flags: TP_RULES_LOCAL_OUTPUT | TP_RULES_NOTRACK,
        mark: 6,
        table: 100,
        priority: 1000,
        src: src.as_ptr(),
        n_src: src.len(),
        dst: dst.as_ptr(),
        n_dst: dst.len(),
        bypass: bypass.as_ptr(),
        n_bypass: bypass.len(),
        interfaces: interfaces.as_ptr(),
        n_interfaces: interfaces.len(),
        ..config()
    })
}

#[test]
fn everything_at_once() {
    let net = host();
    let _rules = net.run(|| with_everything(Rules::install)).unwrap();
    compare(&net, include_str!("golden/addresses.nft"), include_str!("golden/chosen.ip"));
}

#[test]
fn the_rendered_script_does_the_same() {
    let net = host();
    let _rules = net.run(|| with_everything(Rules::install)).unwrap();
    let script = Net::new().run(|| {
        Command::new("ip").args(["addr", "add", "192.0.2.1/32", "dev", "lo"]).status().unwrap();
        with_everything(|config| render(config, TP_FORMAT_NFT))
    });
    let theirs = host();
    theirs.command("sh", &["-c", &script]);
    assert_eq!(nf_tables(&net), nf_tables(&theirs));
    assert_eq!(routing(&net), routing(&theirs));
}

/// Where answers could be chosen: connection tracking tells them.
#[test]
fn answers_are_told_by_the_rendered_scripts_too() {
    let with_answers = |backend, body: &dyn Fn(&tp_rules_config) -> Option<Rules>| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let fd = listener.as_raw_fd();
        let bypass = prefixes(&["198.51.100.7/32", "2001:db8::/32"]);
        body(&tp_rules_config {
            listeners: &raw const fd,
            n_listeners: 1,
            flags: TP_RULES_LOCAL_OUTPUT,
            backend,
            bypass: bypass.as_ptr(),
            n_bypass: bypass.len(),
            ..config()
        })
    };
    let iptables = |net: &Net| {
        let saved = ["iptables-nft-save", "ip6tables-nft-save"].map(|program| net.command(program, &["-t", "mangle"]));
        saved.concat().lines().filter(|line| line.starts_with("-A")).map(|line| format!("{line}\n")).collect::<String>()
    };
    for (backend, format) in [(TP_BACKEND_NFT, TP_FORMAT_NFT), (TP_BACKEND_IPTABLES, TP_FORMAT_IPTABLES)] {
        let (ours, theirs) = (host(), host());
        let _rules = ours.run(|| with_answers(backend, &|config| Some(Rules::install(config).unwrap())));
        let script = std::sync::Mutex::new(String::new());
        Net::new().run(|| {
            with_answers(backend, &|config| {
                *script.lock().unwrap() = render(config, format);
                None
            })
        });
        let script = script.into_inner().unwrap();
        theirs.command("sh", &["-c", &script]);
        let words = if backend == TP_BACKEND_NFT {
            assert_eq!(nf_tables(&ours), nf_tables(&theirs));
            ["ct direction reply ip6 saddr @bypass6 return", "ct direction reply ct status & assured == assured return"]
        } else {
            assert_eq!(iptables(&ours), iptables(&theirs));
            ["-m conntrack --ctdir REPLY -s 198.51.100.7/32 -j RETURN", "--ctdir REPLY --ctstatus ASSURED -j RETURN"]
        };
        assert!(words.iter().all(|words| script.contains(words)), "{script}");
    }
}

/// Scattered prefixes of two lengths of each family, and a few of others.
fn many_prefixes() -> Vec<String> {
    let hundred = (0..100).flat_map(|n| {
        [format!("10.{n}.2.0/24"), format!("11.0.{n}.1/32"), format!("3000:{n}::/48"), format!("3001::{n}/128")]
    });
    hundred.chain(["12.0.0.0/9", "3002::/33"].map(str::to_owned)).collect()
}

/// Lengths of which there are many have sets of their own.
#[test]
fn many_prefixes_of_a_length() {
    let texts = many_prefixes();
    let prefixes = prefixes(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let with_many = |body: &dyn Fn(&tp_rules_config) -> String| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let fd = listener.as_raw_fd();
        body(&tp_rules_config {
            listeners: &raw const fd,
            n_listeners: 1,
            dst: prefixes.as_ptr(),
            n_dst: prefixes.len(),
            src: prefixes.as_ptr(),
            n_src: prefixes.len(),
            bypass: prefixes.as_ptr(),
            n_bypass: prefixes.len(),
            ..config()
        })
    };
    let net = host();
    let ours = net.run(|| {
        with_many(&|config| {
            let _rules = Rules::install(config).unwrap();
            nf_tables(&net)
        })
    });
    let golden = include_str!("golden/many.nft");
    let list = |family: char, len: &str| {
        let of_length = |text: &&String| text.ends_with(len) && text.contains(':') == (family == '6');
        texts.iter().filter(of_length).map(|text| text.trim_end_matches(len)).collect::<Vec<_>>().join(", ")
    };
    let golden = [('4', "/24"), ('4', "/32"), ('6', "/48"), ('6', "/128")]
        .into_iter()
        .fold(golden.to_owned(), |nft, (family, len)| nft.replace(&format!("@{family}{len}@"), &list(family, len)));
    let theirs = host();
    theirs.nft(&golden);
    assert_eq!(ours, nf_tables(&theirs));
    let script = Net::new().run(|| with_many(&|config| render(config, TP_FORMAT_NFT)));
    let rendered = host();
    rendered.command("sh", &["-c", &script]);
    assert_eq!(ours, nf_tables(&rendered));
}

#[test]
fn redirection_with_local_output() {
    let net = host();
    let _rules = net.run(|| {
        let v4 = std::net::TcpListener::bind("192.0.2.1:3129").unwrap();
        let v6 = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
        v6.set_only_v6(true).unwrap();
        v6.bind(&"[::]:3130".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
        v6.listen(1).unwrap();
        let fds = [v4.as_raw_fd(), v6.as_raw_fd()];
        let port = tp_port_range { first: 80, last: 80 };
        Rules::install(&tp_rules_config {
            listeners: fds.as_ptr(),
            n_listeners: 2,
            flags: TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT,
            ports: &raw const port,
            n_ports: 1,
            ..config()
        })
        .unwrap()
    });
    compare(&net, include_str!("golden/redirect.nft"), "");
}

#[test]
fn divert_only_for_one_family() {
    let net = host();
    let _rules = net.run(|| {
        Rules::install(&tp_rules_config { flags: TP_RULES_DIVERT_ONLY, families: TP_FAMILY_IPV6, ..config() }).unwrap()
    });
    let only_v6: String =
        include_str!("golden/default.ip").lines().filter(|l| l.starts_with("-6")).map(|l| format!("{l}\n")).collect();
    compare(&net, include_str!("golden/divert.nft"), &only_v6);
}
