//! After `tp_install_rules` the kernel holds the same bytecode, sets, routing rules and routes as after `nft` and `ip` have
//! loaded the files in `tests/golden`.

mod common;

use common::*;
use tproxy::ffi::*;

/// The rules as bytecode, chain by chain, and the sets as text, without handles.
fn nf_tables(net: &Net) -> String {
    let listing = net.nft_with(&["--debug=netlink", "list", "ruleset"]);
    // First the bytecode, then the text. The sets are compared as text, since `nft`
    // puts elements into an interval set that mean nothing to the kernel.
    let (bytecode, text) = listing.split_once("\ntable ").unwrap();
    let expressions = bytecode.lines().filter(|line| line.starts_with("  ["));
    let chains = text
        .lines()
        .filter(|line| !line.is_empty() && !line.contains("flags owner") && !line.contains("\tcomment \"libtproxy:"));
    // "# progname ..." follows the name of a table that has an owner.
    let chains = chains.map(|line| line.split(" # ").next().unwrap());
    expressions.chain(chains).collect::<Vec<_>>().join("\n")
}

fn routing(net: &Net) -> String {
    ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"].map(|args| net.ip(args)).join("--\n")
}

/// A namespace with the addresses that the configurations use.
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
fn install_rules_dual_stack_with_defaults_equals_golden() {
    let net = host();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let config = RulesConfig::of(&listener).port_ranges([(8000, 8100), (80, 80)]);
    let _rules = net.run(|| config.install()).unwrap();
    compare(&net, include_str!("golden/dual.nft"), include_str!("golden/default.ip"));
}

/// Runs a function with a configuration that sets every field, in this thread's namespace.
fn with_every_field<T>(body: impl FnOnce(&RulesConfig) -> T) -> T {
    let v4 = listen("192.0.2.1:3129".parse().unwrap(), 0).unwrap();
    let v6 = listen("[::1]:3130".parse().unwrap(), 0).unwrap();
    let udp = receiver("[::]:3131".parse().unwrap());
    let config = RulesConfig::new()
        .name("two")
        .listeners(&[&v4, &v6, &udp])
        .flags(TP_RULES_LOCAL_OUTPUT | TP_RULES_NOTRACK)
        .mark(6)
        .table(100)
        .priority(1000)
        .src(["10.0.0.0/8"])
        .dst(["255.255.255.255/32", "198.51.101.0/24", "::/0", "198.51.100.0/24", "198.51.100.128/25"])
        .bypass(["198.51.100.7/32"])
        .interfaces(&["wg-1", "ppp*", "eth0"]);
    body(&config)
}

#[test]
fn install_rules_with_every_field_equals_golden() {
    let net = host();
    let _rules = net.run(|| with_every_field(RulesConfig::install)).unwrap();
    compare(&net, include_str!("golden/addresses.nft"), include_str!("golden/chosen.ip"));
}

#[test]
fn render_rules_script_equals_install_rules() {
    let net = host();
    let _rules = net.run(|| with_every_field(RulesConfig::install)).unwrap();
    let script = host().run(|| with_every_field(|config| config.render(TP_FORMAT_NFT)));
    let theirs = host();
    theirs.command("sh", &["-c", &script]);
    assert_eq!(nf_tables(&net), nf_tables(&theirs));
    assert_eq!(routing(&net), routing(&theirs));
}

/// Where the selection could match replies, connection tracking recognizes them.
#[test]
fn render_rules_script_recognizes_replies_as_install_rules_does() {
    fn with_replies<T>(backend: u32, body: impl FnOnce(&RulesConfig) -> T) -> T {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let bypass = ["198.51.100.7/32", "2001:db8::/32"];
        body(&RulesConfig::of(&listener).flags(TP_RULES_LOCAL_OUTPUT).backend(backend).bypass(bypass))
    }
    let iptables = |net: &Net| {
        let saved = ["iptables-nft-save", "ip6tables-nft-save"].map(|program| net.command(program, &["-t", "mangle"]));
        saved.concat().lines().filter(|line| line.starts_with("-A")).map(|line| format!("{line}\n")).collect::<String>()
    };
    for (backend, format) in [(TP_BACKEND_NFT, TP_FORMAT_NFT), (TP_BACKEND_IPTABLES, TP_FORMAT_IPTABLES)] {
        let (ours, theirs) = (host(), host());
        let _rules = ours.run(|| with_replies(backend, RulesConfig::install)).unwrap();
        let script = Net::new().run(|| with_replies(backend, |config| config.render(format)));
        theirs.command("sh", &["-c", &script]);
        let words = if backend == TP_BACKEND_NFT {
            assert_eq!(nf_tables(&ours), nf_tables(&theirs));
            ["!= syn ct direction reply return", "ct status & assured == assured ct direction reply return"]
        } else {
            assert_eq!(iptables(&ours), iptables(&theirs));
            ["-p tcp ! --syn -m conntrack --ctdir REPLY -j RETURN", "--ctdir REPLY --ctstatus ASSURED -j RETURN"]
        };
        assert!(words.iter().all(|words| script.contains(words)), "{script}");
    }
}

/// Many prefixes of two lengths for each family, and a few of other lengths.
fn many_prefixes() -> Vec<String> {
    let hundred = (0..100).flat_map(|n| {
        [format!("10.{n}.2.0/24"), format!("11.0.{n}.1/32"), format!("3000:{n}::/48"), format!("3001::{n}/128")]
    });
    hundred.chain(["12.0.0.0/9", "3002::/33"].map(str::to_owned)).collect()
}

/// Each length with many prefixes has a set of its own.
#[test]
fn install_rules_with_many_prefixes_of_a_length_equals_golden() {
    let texts = many_prefixes();
    let with_many = |body: &dyn Fn(&RulesConfig) -> String| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        body(&RulesConfig::of(&listener).dst(&texts).src(&texts).bypass(&texts))
    };
    let net = host();
    let ours = net.run(|| {
        with_many(&|config| {
            let _rules = config.install().unwrap();
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
    let script = Net::new().run(|| with_many(&|config| config.render(TP_FORMAT_NFT)));
    let rendered = host();
    rendered.command("sh", &["-c", &script]);
    assert_eq!(ours, nf_tables(&rendered));
}

#[test]
fn install_rules_redirect_with_local_output_equals_golden() {
    let net = host();
    let _rules = net.run(|| {
        let v4 = std::net::TcpListener::bind("192.0.2.1:3129").unwrap();
        let v6 = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
        v6.set_only_v6(true).unwrap();
        v6.bind(&"[::]:3130".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
        v6.listen(1).unwrap();
        let flags = TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT;
        RulesConfig::new().listeners(&[&v4, &v6]).flags(flags).ports(&[80]).install().unwrap()
    });
    compare(&net, include_str!("golden/redirect.nft"), "");
}

#[test]
fn install_rules_divert_only_for_one_family_equals_golden() {
    let net = host();
    let config = RulesConfig::new().flags(TP_RULES_DIVERT_ONLY).families(TP_FAMILY_IPV6);
    let _rules = net.run(|| config.install()).unwrap();
    let only_v6: String =
        include_str!("golden/default.ip").lines().filter(|l| l.starts_with("-6")).map(|l| format!("{l}\n")).collect();
    compare(&net, include_str!("golden/divert.nft"), &only_v6);
}

/// Whom and what rules select: the script that is rendered makes the same rules as the call, whose bytecode `nft` reads.
#[test]
fn render_rules_script_selects_as_install_rules_does() {
    fn selecting<T>(body: impl FnOnce(&RulesConfig) -> T) -> T {
        let tcp = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let udp = receiver("[::]:3129".parse().unwrap());
        let config = RulesConfig::new()
            .listeners(&[&tcp, &udp])
            .flags(TP_RULES_LOCAL_OUTPUT | TP_RULES_LOCAL_SERVERS)
            .ports_of(&[(80, TP_PROTO_TCP), (443, TP_PROTO_TCP), (53, TP_PROTO_UDP), (5353, 0)])
            .bypass_ports(&[(8080, 0), (443, TP_PROTO_UDP)])
            .reject_ports(&[(443, TP_PROTO_UDP), (853, 0), (854, TP_PROTO_TCP)])
            .bypass_src(["10.1.0.0/16", "2001:db8:7::/48"])
            .bypass_interfaces(&["wg0", "docker*"])
            .macs(&[[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]])
            .bypass_macs(&[[2, 0, 0, 0, 0, 3]])
            .uids(&[(0, 0), (1000, 1999)])
            .bypass_uids(&[(1500, 1500)])
            .gids(&[(0, 99)])
            .bypass_gids(&[(33, 33)])
            .bypass_mark(0x40)
            .bypass_mark_mask(0xf0);
        body(&config)
    }
    let (ours, theirs) = (host(), host());
    let _rules = ours.run(|| selecting(RulesConfig::install)).unwrap();
    let script = Net::new().run(|| selecting(|config| config.render(TP_FORMAT_NFT)));
    theirs.command("sh", &["-c", &script]);
    assert_eq!(nf_tables(&ours), nf_tables(&theirs));
    assert_eq!(routing(&ours), routing(&theirs));
}
