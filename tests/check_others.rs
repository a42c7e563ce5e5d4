//! tp_check on hosts where other programs or local users are hostile, or where /proc is missing: names that are not text,
//! processes of others, and very many of everything. The findings are true, and each fix changes only what it is about.

mod common;

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use common::process::Process;
use common::*;

/// What a process does that a test has started.
fn play(role: &str) {
    match role {
        "check" => print_check(),
        "check without capget" => {
            deny_capget();
            print_check();
        }
        "work" => {
            let begin = used();
            print_check();
            let end = used();
            println!("used {} {}", (end.0 - begin.0).as_millis(), end.1);
        }
        "hold" => {
            // A name that clears the terminal and reverses the direction of the text.
            std::fs::write("/proc/self/comm", "\x1b[2J\u{202e}1)\n").unwrap();
            let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
            let _rules = intercept(&listener, 80).unwrap();
            drop(listener);
            println!("ready");
            process::wait_to_be_killed();
        }
        other => panic!("{other}"),
    }
}

/// A command by which another program starts this one in a role.
fn by_program(program: &[&str], role: &str) -> Command {
    process::by_program(program, check_of_large_host_does_bounded_work, role)
}

/// Denies this process capget(2), as the seccomp filter of a container does.
fn deny_capget() {
    const NR: u32 = 0;
    let (load, equals, give) =
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ, libc::BPF_RET);
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        op(load, 0, 0, NR),
        op(equals, 0, 1, libc::SYS_capget as u32),
        op(give, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        op(give, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives until the calls return; the filter concerns only this process, which a test has started.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

fn print_check() {
    for finding in check() {
        println!("finding {} {} {} | {}", finding.severity, finding.id, finding.message, finding.fix);
    }
}

/// The processor time and the most memory in KiB that this process has used.
fn used() -> (Duration, i64) {
    // SAFETY: a struct of integers, valid for writes.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let time = |time: libc::timeval| Duration::from_micros(time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64);
    (time(usage.ru_utime) + time(usage.ru_stime), usage.ru_maxrss)
}

fn find<'a>(found: &'a [Found], id: &str) -> &'a Found {
    found.iter().find(|finding| finding.id == id).unwrap_or_else(|| panic!("{id} not among {found:#?}"))
}

/// Whether no character of a text controls a terminal or changes how its neighbors look.
fn is_harmless(text: &str) -> bool {
    let misleads = |letter: char| {
        letter.is_control()
            || ('\u{200b}'..='\u{200f}').contains(&letter)
            || ('\u{2028}'..='\u{202e}').contains(&letter)
    };
    !text.chars().any(|letter| misleads(letter) || ('\u{2066}'..='\u{2069}').contains(&letter) || letter == '\u{feff}')
}

/// Whether a text is a valid shell command of printable ASCII.
fn is_a_command(fix: &str) -> bool {
    let parsed = Command::new("sh").args(["-n", "-c", fix]).output().unwrap().status.success();
    parsed && fix.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// Asserts that every finding is harmless, and every fix a command.
fn all_harmless(found: &[Found]) {
    for finding in found {
        assert!(is_harmless(&finding.message) && finding.message.len() < 2000, "{finding:?}");
        assert!(is_a_command(&finding.fix), "{finding:?}");
    }
}

/// Runs a test with a lab where the proxy answers on port 80. The second argument of the test says whether it does.
fn with_proxy(test: impl FnOnce(&Lab, &dyn Fn(Expected) -> bool)) {
    let lab = Lab::new();
    let server = lab.serve(80);
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    let works = |expected| {
        let ask = |hosts: Hosts| match expected {
            Expected::Working => lab.client.run(|| said_eventually(at(hosts.server, 80))),
            Expected::Broken => lab.client.run(|| said_within(at(hosts.server, 80), silence())).ok(),
        };
        [v4(), v6()].into_iter().all(|hosts| ask(hosts).as_deref() == Some("proxy"))
    };
    while_answering(&[(&listener, "proxy"), (&server, "server")], || test(&lab, &works));
}

/// How long to wait for the proxy.
enum Expected {
    Working,
    Broken,
}
use Expected::*;

/// A namespace where port 80 is intercepted, without traffic.
fn intercepting() -> (Net, (TcpListener, Rules)) {
    let net = Net::new();
    net.forward();
    let listener = net.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let rules = net.run(|| intercept(&listener, 80)).unwrap();
    (net, (listener, rules))
}

/// The language of nft, a shell or a terminal would misread the name of the chain.
#[test]
fn check_chain_with_hostile_name_has_fix_that_works() {
    for name in ["a\\u202eb", "\\u200b", "x;y", "a b", "a'\\\"$(id)`", "-x", "x\\ny", "\\u00e9", "\\u001b[2J"] {
        with_proxy(|lab, works| {
            assert!(works(Working));
            let chain = |hook: &str| {
                let name = name.replace('\'', "\\u0027");
                format!(
                    "nft -j '{{\"nftables\":[{{\"add\":{{\"table\":{{\"family\":\"inet\",\"name\":\"{name}\"}}}}}},
                    {{\"add\":{{\"chain\":{{\"family\":\"inet\",\"table\":\"{name}\",\"name\":\"{name}\",{hook}}}}}}}]}}'"
                )
            };
            lab.proxy.sh(&chain("\"type\":\"filter\",\"hook\":\"input\",\"prio\":0,\"policy\":\"drop\""));
            assert!(!works(Broken), "{name}: it works");
            let found = lab.proxy.run(check);
            all_harmless(&found);
            let finding = find(&found, "filter.input_drop");
            assert!(!finding.fix.is_empty(), "{finding:?}");
            lab.proxy.sh(&finding.fix);
            // The policy still drops packets without the mark, such as neighbor discovery; the neighbors are static.
            assert!(works(Working), "{name}: not fixed by {}", finding.fix);
        });
    }
}

/// iptables takes any bytes for the name of a chain.
#[test]
fn check_iptables_nft_chain_with_hostile_name_has_fix_that_works() {
    iptables_chains_with_hostile_names(["iptables-nft", "ip6tables-nft"]);
}

#[test]
fn check_iptables_legacy_chain_with_hostile_name_has_fix_that_works() {
    if provided(Requirement::LegacyIptables) {
        iptables_chains_with_hostile_names(["iptables-legacy", "ip6tables-legacy"]);
    }
}

fn iptables_chains_with_hostile_names(programs: [&str; 2]) {
    // printf's octal escapes, in a word for sh.
    for (name, shown) in [
        (r"\303\050", r"\xc3("),
        (r"a\342\200\256b", r"a\u{202e}b"),
        (r"a\047b", "a'b"),
        (r"\044\050id\051", "$(id)"),
        (r"\377", r"\xff"),
    ] {
        for ip in programs {
            let (net, _rules) = intercepting();
            // A jump leads to the chain; its other rule must stay.
            net.sh(&format!(
                "n=\"$(printf '{name}')\"; {ip} -t mangle -N \"$n\"; {ip} -t mangle -A \"$n\" -p tcp --dport 81 -j MARK --set-mark 7
                 {ip} -t mangle -A \"$n\" -p tcp --dport 82 -j MARK --or-mark 0x2000; {ip} -t mangle -A PREROUTING -j \"$n\""
            ));
            let found = net.run(check);
            all_harmless(&found);
            let finding = find(&found, "filter.mark_collision");
            assert!(finding.message.contains(shown), "{ip}: {finding:?}");
            let before = net.run(|| Command::new(ip).args(["-t", "mangle", "-S"]).output().unwrap().stdout);
            net.sh(&finding.fix);
            let after = net.run(|| Command::new(ip).args(["-t", "mangle", "-S"]).output().unwrap().stdout);
            let (before, after) = (String::from_utf8_lossy(&before), String::from_utf8_lossy(&after));
            assert!(before.contains("--dport 82"), "{before}");
            let expected: Vec<&str> = before.lines().filter(|line| !line.contains("--dport 82")).collect();
            assert_eq!(after.lines().collect::<Vec<_>>(), expected, "{ip}: {}", finding.fix);
        }
    }
}

/// The names of interfaces may have any bytes except `/`, `:` and blanks.
#[test]
fn check_interface_with_hostile_name_has_fix_that_works() {
    for name in [r"a\044\050id\051", r"\377x", r"a\342\200\256b", r"a\073b", r"-w", r"a\075b", r"\052"] {
        let (net, _rules) = intercepting();
        net.sh(&format!(
            "n=\"$(printf -- '{name}')\"; ip link add name \"$n\" type veth peer name peer; ip link set dev \"$n\" up
             echo 0 >/proc/sys/net/ipv4/conf/\"$n\"/forwarding
             ip rule add pref 100 iif \"$n\" prohibit; ip rule add pref 90 iif \"$n\" lookup 7470"
        ));
        let found = net.run(check);
        all_harmless(&found);
        for id in ["sysctl.forwarding_interface", "rule.table_shared"] {
            let finding = find(&found, id);
            net.sh(&finding.fix);
            let left = net.run(check);
            assert!(left.iter().all(|other| other.id != id), "{name}: {} does not fix {finding:?}", finding.fix);
        }
        // Another routing rule for the same interface is still there.
        let rules = net.run(|| Command::new("ip").arg("rule").output().unwrap().stdout);
        assert!(String::from_utf8_lossy(&rules).contains("\n100:"), "{name}");
    }
}

/// Starts a process that has rules, by way of another program.
fn holding(net: &Net, program: &[&str]) -> Process {
    Process::start(net, by_program(program, "hold"), "ready")
}

/// The holder has another PID in its own PID namespace than it has here.
#[test]
fn check_names_holder_in_inner_pid_namespace_by_its_pid_here() {
    let net = Net::new();
    // The first process of a PID namespace would ignore the signal.
    let mut child = holding(&net, &["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "\"$@\"; exit 0", "sh"]);
    let (mut holder, mut next) = (child.id(), Some(child.id()));
    while let Some(pid) = next {
        holder = pid;
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        next = children.split_whitespace().next().map(|pid| pid.parse().unwrap());
    }
    let found = net.run(check);
    all_harmless(&found);
    assert_eq!(find(&found, "listener.gone").fix, format!("kill {holder}"));
    assert!(find(&found, "instance").message.contains(&format!("of process {holder}, ")), "{found:#?}");
    net.sh(&format!("kill {holder}"));
    child.child.wait().unwrap();
    assert!(net.run(check).iter().all(|finding| finding.id != "instance"), "the rules are there");
}

/// The holder is outside of the PID namespace of the caller: no process in there is named.
#[test]
fn check_does_not_name_holder_outside_of_pid_namespace() {
    let net = Net::new();
    let _holder = holding(&net, &[]);
    let inside = |options: &[&str]| net.output(by_program(&[&["unshare"], options].concat(), "check"));
    let output = inside(&["--pid", "--fork", "--mount-proc"]);
    assert!(output.contains("of a process in another PID namespace"), "{output}");
    // The PIDs in the outer /proc are not those that kill(1) takes inside.
    let with_outer_proc = inside(&["--pid", "--fork"]);
    assert!(with_outer_proc.contains("of a process that cannot be seen from here"), "{with_outer_proc}");
    for output in [output, with_outer_proc] {
        assert!(
            output.contains("\nfinding 3 listener.gone ") || output.starts_with("finding 3 listener.gone "),
            "{output}"
        );
        assert!(!output.contains("kill ") && !output.contains("prlimit --pid 2 "), "{output}");
    }
}

/// A process may have any name.
#[test]
fn install_rules_shows_holder_with_hostile_name_with_escapes() {
    let net = Net::new();
    let child = holding(&net, &[]);
    all_harmless(&net.run(check));
    let failed = net.run(|| intercept(&listen("[::]:3129".parse().unwrap(), 0).unwrap(), 80)).err().unwrap();
    let expected = format!("process {} (\\u{{1b}}[2J\\u{{202e}}1)\\u{{a}})", child.id());
    assert!(is_harmless(&failed.sentence) && failed.sentence.contains(&expected), "{failed}");
}

/// A file that cannot be read is not reported as missing.
#[test]
fn check_without_proc_reports_nothing_as_missing() {
    let (net, _rules) = intercepting();
    let without_proc = ["unshare", "--mount", "sh", "-ec", "mount -t tmpfs tmpfs /proc; exec \"$@\"", "sh"];
    let output = net.output(by_program(&without_proc, "check"));
    let findings: Vec<&str> =
        output.lines().filter_map(|line| line.split_once("finding ").map(|(_, rest)| rest)).collect();
    let troubles: Vec<&&str> = findings.iter().filter(|line| line.starts_with(['2', '3'])).collect();
    assert!(troubles.is_empty(), "{troubles:#?}");
    for expected in [
        "0 privilege.net_admin CAP_NET_ADMIN is in effect ",
        "0 privilege.transparent an IPv4 socket was made transparent ",
        "0 kernel.nft_tproxy ",
        "0 kernel.version Linux ",
        "0 instance tproxy: by nf_tables, of a process that cannot be seen from here",
        "1 check.unseen sysctls: ",
        "1 check.unseen legacy IPv4 iptables: /proc/net cannot be read",
    ] {
        assert!(findings.iter().any(|line| line.starts_with(expected)), "{expected}: {output}");
    }
    assert!(!output.contains("privilege.bind_service"), "{output}");
}

/// A seccomp filter that denies capget(2) does not take the capabilities away.
#[test]
fn check_without_capget_reports_no_capability_as_missing() {
    let (net, _rules) = intercepting();
    let output = net.output(by_program(&[], "check without capget"));
    assert!(output.contains("finding 1 check.unseen capabilities: "), "{output}");
    assert!(!output.contains(" privilege.net_admin ") && !output.contains(" privilege.bind_service "), "{output}");
    for expected in
        [" privilege.transparent an IPv6 socket was made", " kernel.nft_tproxy ", " instance tproxy: by nf_tables"]
    {
        assert!(output.contains(expected), "{expected}: {output}");
    }
}

/// A host that is not a router takes routes from router advertisements, and keeps them when it becomes a router.
#[test]
fn check_fix_of_forwarding_keeps_routes_of_router_advertisements() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    lab.proxy
        .sh("sysctl -qw net.ipv6.conf.all.forwarding=0 net.ipv6.conf.eth1.accept_ra=1 net.ipv6.conf.eth0.accept_ra=0");
    lab.proxy.sh(&find(&lab.proxy.run(check), "sysctl.forwarding_v6").fix);
    let values = lab.proxy.command(
        "sysctl",
        &["-n", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.eth1.accept_ra", "net.ipv6.conf.eth0.accept_ra"],
    );
    assert_eq!(values, "1\n2\n0\n");
}

/// Two routing rules have the same preference; `ip rule del` by preference would delete the first.
#[test]
fn check_reports_only_equal_routing_rules_as_duplicates() {
    let net = Net::new();
    net.sh("for f in -4 -6; do a=10.1.0.0/16 b=10.2.0.0/16; [ $f = -4 ] || { a=2001:db8:1::/48; b=2001:db8:2::/48; }
        ip $f rule add pref 300 from $a fwmark 7 lookup 50; ip $f rule add pref 301 from $b fwmark 7 lookup 50
        ip $f rule add pref 302 fwmark 8 ipproto udp sport 1 lookup 50
        ip $f rule add pref 303 fwmark 8 ipproto udp sport 2-3 lookup 50
        ip $f rule add pref 304 fwmark 9 ipproto tcp dport 80 lookup 50
        ip $f rule add pref 305 fwmark 9 ipproto tcp dport 81 lookup 50; done");
    let rules = || [net.ip("-4 rule"), net.ip("-6 rule")].join("");
    let before = rules();
    let found = net.run(check);
    assert!(found.iter().all(|finding| finding.id != "rule.duplicate"), "{found:#?}");
    // The fix deletes the second of two equal rules, and not its neighbor.
    net.sh("ip rule add pref 310 from 10.2.0.0/16 fwmark 7 lookup 50; ip rule add pref 310 from 10.3.0.0/16 fwmark 7 lookup 50");
    let fix = find(&net.run(check), "rule.duplicate").fix.clone();
    net.sh(&fix);
    let after = rules();
    let expected = before.replacen("32766:", "310:\tfrom 10.3.0.0/16 fwmark 0x7 lookup 50\n32766:", 1);
    assert_eq!(after, expected, "{fix}");
}

/// The library's own route has the same destination.
#[test]
fn check_fix_deletes_foreign_default_route_only() {
    with_proxy(|lab, works| {
        lab.proxy.sh("ip route add default via 203.0.113.2 metric 7 table 7470
            ip -6 route add unreachable default metric 7 table 7470
            ip -6 route add unreachable 2001:db8:77::/48 table 7470");
        let found = lab.proxy.run(check);
        let foreign: Vec<&Found> = found.iter().filter(|finding| finding.id == "route.foreign").collect();
        assert_eq!(foreign.len(), 2, "{found:#?}");
        foreign.iter().for_each(|finding| lab.proxy.sh(&finding.fix));
        for family in ["-4", "-6"] {
            let left = lab.proxy.ip(&format!("{family} route show table 7470"));
            assert_eq!(left.lines().count(), 1, "{left}");
            assert!(left.starts_with("local default dev lo"), "{left}");
        }
        assert!(works(Working));
    });
}

/// Before the rules that intercept, packets have no mark: the fix accepts what the rules select, and no more.
#[test]
fn check_fix_accepts_only_intercepted_packets_in_nft_firewall() {
    accepts_only_intercepted_packets(
        "nft 'table inet fw { chain c { type filter hook prerouting priority raw; policy drop; meta l4proto icmpv6 accept
            iif lo accept\n}\n}'",
    );
}

#[test]
fn check_fix_accepts_only_intercepted_packets_in_iptables_nft_firewall() {
    accepts_only_intercepted_packets(
        "for ip in iptables ip6tables; do $ip-nft -t raw -A PREROUTING -p ipv6-icmp -j ACCEPT
            $ip-nft -t raw -A PREROUTING -i lo -j ACCEPT; $ip-nft -t raw -P PREROUTING DROP; done",
    );
}

#[test]
fn check_fix_accepts_only_intercepted_packets_in_iptables_legacy_firewall() {
    if provided(Requirement::LegacyIptables) {
        accepts_only_intercepted_packets(
            "for ip in iptables ip6tables; do $ip-legacy -t raw -A PREROUTING -p ipv6-icmp -j ACCEPT
                $ip-legacy -t raw -A PREROUTING -p tcp -j DROP; done",
        );
    }
}

fn accepts_only_intercepted_packets(firewall: &str) {
    with_proxy(|lab, works| {
        let own = lab.proxy.run(|| TcpListener::bind(at(ip("::"), 82)).unwrap());
        let reaches = |port| {
            let connect = |hosts: Hosts| lab.client.run(|| connect_in_vain(at(hosts.proxy, port)));
            [v4(), v6()].into_iter().any(|hosts| connect(hosts).is_ok())
        };
        lab.proxy.sh(firewall);
        assert!(!works(Broken) && !reaches(82), "{firewall}");
        let found = lab.proxy.run(check);
        for finding in found.iter().filter(|finding| finding.id == "filter.prerouting_drop") {
            assert!(!finding.fix.contains("policy") && !finding.fix.contains("-P "), "{finding:?}");
            lab.proxy.sh(&finding.fix);
        }
        assert!(works(Working), "{found:#?}");
        assert!(!reaches(82) && !reaches(80), "the host is open: {found:#?}");
        drop(own);
    });
}

/// Other programs or users have very many of everything. A process of its own measures, since other tests run meanwhile.
#[test]
fn check_of_large_host_does_bounded_work() {
    if let Some(role) = process::role() {
        return play(&role);
    }
    let (net, _rules) = intercepting();
    // The send buffer of a user namespace's socket does not take all rules in one transaction.
    let in_pieces = |lines: &[String]| lines.chunks(100).for_each(|some| _ = net.nft(&some.join("\n")));
    net.nft("add table inet fw; add chain inet fw i { type filter hook input priority 0; policy drop; }
        add chain inet fw p { type filter hook prerouting priority mangle; }
        add set inet fw pairs { type inet_service . ipv4_addr; }; add rule inet fw i tcp dport . ip saddr @pairs accept");
    // TPROXY rules, each for another port.
    let tproxy = |port: u32| {
        format!("add rule inet fw p tcp dport {port} tproxy to :{} meta mark set 1 accept", 10_000 + port % 999)
    };
    in_pieces(&(1..4000).map(tproxy).collect::<Vec<_>>());
    // Each level jumps to the next twice: 2 to the power of 15 paths.
    in_pieces(&(0..16).map(|level| format!("add chain inet fw c{level}")).collect::<Vec<_>>());
    let jumps = (0..14).rev().map(|level| {
        let next = level + 1;
        format!("add rule inet fw c{level} tcp dport 80 jump c{next}\nadd rule inet fw c{level} ip saddr 192.0.2.1 jump c{next}")
    });
    in_pieces(&jumps.collect::<Vec<_>>());
    net.nft("add rule inet fw i jump c0");
    // A firewall with many rules, each with a set.
    let rule = |n: u32| {
        format!("add rule inet fw c15 ip saddr 10.{}.{}.1 tcp dport {{ {}, {} }} accept", n / 250, n % 250, n, n + 7)
    };
    in_pieces(&(1..1000).map(rule).collect::<Vec<_>>());
    net.nft("add rule inet fw i jump c15");
    let pair = |n: u32| format!("{} . 10.{}.{}.1", 1 + n % 60_000, n / 250 % 250, n % 250);
    for some in (0..20_000).collect::<Vec<u32>>().chunks(1000) {
        let elements = some.iter().map(|n| pair(*n)).collect::<Vec<_>>().join(", ");
        net.nft(&format!("add element inet fw pairs {{ {elements} }}"));
    }
    net.sh("for a in $(seq 1 1000); do echo rule add pref $((20000 + a)) fwmark $a/0xffff lookup $((1000 + a)); done | ip -batch -
        for a in $(seq 0 19); do for b in $(seq 0 249); do echo route add 10.$a.$b.0/24 dev lo table 1001; done; done | ip -batch -");
    let output = net.output(by_program(&[], "work"));
    let line = output.lines().find_map(|line| line.strip_prefix("used ")).expect(&output);
    let (time, memory) = line.split_once(' ').unwrap();
    println!("{time} ms of processor time, {memory} KiB");
    // An optimized build takes a tenth of that. Unbounded work would take minutes and gigabytes.
    assert!(Duration::from_millis(time.parse().unwrap()) < limit(3000), "{line}");
    assert!(memory.parse::<u64>().unwrap() < 64 << 10, "{line}");
    for expected in ["filter.input_drop the policy of chain inet fw i ", "routes: only 64 of "] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    // The number of findings of one kind is bounded.
    assert!(output.lines().filter(|line| line.contains("finding 3 listener.gone ")).count() <= 100, "{output}");
    assert!(output.contains(" more findings of this kind: listener.gone"), "{output}");
}
