//! Who and what is intercepted: each field of the configuration, to include and to exempt, with both backends.

mod common;

use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::Command;

use common::process::Process;
use common::*;
use tproxy::ffi::*;

const BACKENDS: [u32; 2] = [TP_BACKEND_NFT, TP_BACKEND_IPTABLES];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x22];

/// A lab with listeners for TCP and UDP on the proxy's host, and a server.
struct Case {
    lab: Lab,
    tcp: TcpListener,
    udp: OwnedFd,
    server: TcpListener,
}

impl Case {
    fn new() -> Case {
        let lab = Lab::new();
        let server = lab.serve(80);
        let tcp = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
        let udp = lab.proxy.run(|| receiver("[::]:3129".parse().unwrap()));
        Case { lab, tcp, udp, server }
    }

    fn config(&self, backend: u32) -> RulesConfig {
        RulesConfig::new().listeners(&[&self.tcp, &self.udp]).backend(backend)
    }

    fn install(&self, config: &RulesConfig) -> Rules {
        self.lab.proxy.run(|| config.install()).unwrap()
    }

    /// Who replies to the client's connection: "proxy" or "server".
    fn heard(&self, hosts: Hosts) -> String {
        while_answering(&[(&self.tcp, "proxy"), (&self.server, "server")], || {
            self.lab.client.run(|| said(at(hosts.server, 80))).unwrap_or_else(|e| e.to_string())
        })
    }

    /// The client's datagram to this port reaches the proxy.
    fn datagram_is_intercepted(&self, hosts: Hosts, port: u16) -> bool {
        let server = self.lab.server.run(|| UdpSocket::bind(at(hosts.server, port)).unwrap());
        server.set_read_timeout(Some(limit(50))).unwrap();
        let client = self.lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
        client.send_to(b"who", at(hosts.server, port)).unwrap();
        wait_for("the datagram", || match receive_datagram(&self.udp, limit(20)) {
            Some(_) => Some(true),
            None => server.recv(&mut [0; 8]).ok().map(|_| false),
        })
    }
}

/// A configuration, made from one that is given along with the client's Ethernet address.
type Select<'a> = &'a dyn Fn(RulesConfig, [u8; 6]) -> RulesConfig;

/// Each configuration with who replies to the client.
fn client_hears(cases: &[(&str, Select<'_>, &str)]) {
    for backend in BACKENDS {
        let case = Case::new();
        let link = case.lab.client.ip("-o link show eth0");
        let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned();
        let mac = mac.parse::<tproxy::rules::MacAddr>().unwrap().0;
        for (what, select, expected) in cases {
            let config = select(case.config(backend), mac);
            let rules = case.install(&config);
            for hosts in [v4(), v6()] {
                assert_eq!(case.heard(hosts), *expected, "{what}, {} backend {backend}", hosts.server);
            }
            case.lab.proxy.run(|| rules.remove()).unwrap();
        }
    }
}

#[test]
fn ports_of_one_protocol_leave_the_other_protocol_alone() {
    for backend in BACKENDS {
        let case = Case::new();
        let ports = [(80, TP_PROTO_TCP), (53, TP_PROTO_UDP), (443, 0)];
        let _rules = case.install(&case.config(backend).ports_of(&ports));
        for hosts in [v4(), v6()] {
            assert_eq!(case.heard(hosts), "proxy");
            assert!(case.datagram_is_intercepted(hosts, 53), "backend {backend}");
            assert!(!case.datagram_is_intercepted(hosts, 80), "backend {backend}");
            assert!(case.datagram_is_intercepted(hosts, 443), "backend {backend}");
        }
    }
}

#[test]
fn ports_only_of_tcp_intercept_no_datagram() {
    for backend in BACKENDS {
        let case = Case::new();
        let _rules = case.install(&case.config(backend).ports_of(&[(80, TP_PROTO_TCP), (81, TP_PROTO_TCP)]));
        for hosts in [v4(), v6()] {
            assert_eq!(case.heard(hosts), "proxy");
            assert!(!case.datagram_is_intercepted(hosts, 80), "backend {backend}");
        }
    }
}

#[test]
fn bypass_ports_win_over_ports() {
    client_hears(&[
        ("of every port", &|c, _| c.bypass_ports(&[(80, 0)]), "server"),
        ("of a list", &|c, _| c.ports(&[80, 443]).bypass_ports(&[(80, TP_PROTO_TCP)]), "server"),
        ("of another protocol", &|c, _| c.ports(&[80]).bypass_ports(&[(80, TP_PROTO_UDP)]), "proxy"),
        ("of another port", &|c, _| c.bypass_ports(&[(81, 0)]), "proxy"),
        ("over a refusal", &|c, _| c.bypass_ports(&[(80, 0)]).reject_ports(&[(80, 0)]), "server"),
    ]);
}

#[test]
fn bypass_src_wins_over_src() {
    let clients = ["198.51.100.2/32", "2001:db8:1::2/128"];
    client_hears(&[
        ("of every source", &|c, _| c.bypass_src(clients), "server"),
        ("of a list", &|c, _| c.src(["198.51.100.0/24", "2001:db8:1::/64"]).bypass_src(clients), "server"),
        ("of another source", &|c, _| c.bypass_src(["198.51.100.77/32", "2001:db8:1::77/128"]), "proxy"),
    ]);
}

#[test]
fn bypass_interfaces_win_over_interfaces() {
    client_hears(&[
        ("of every interface", &|c, _| c.bypass_interfaces(&["eth0"]), "server"),
        ("by pattern", &|c, _| c.interfaces(&["eth0", "eth1"]).bypass_interfaces(&["eth*"]), "server"),
        ("of another interface", &|c, _| c.bypass_interfaces(&["eth1", "wg*"]), "proxy"),
        ("of none", &|c, _| c.bypass_interfaces::<&str>(&[]), "proxy"),
    ]);
}

#[test]
fn macs_select_ethernet_sources() {
    client_hears(&[
        ("the client's", &|c, mac| c.macs(&[OTHER_MAC, mac]), "proxy"),
        ("another's", &|c, _| c.macs(&[OTHER_MAC]), "server"),
        ("none", &|c, _| c.macs(&[]), "server"),
        ("exempt", &|c, mac| c.bypass_macs(&[mac]), "server"),
        ("another's exempt", &|c, _| c.bypass_macs(&[OTHER_MAC]), "proxy"),
        ("both", &|c, mac| c.macs(&[mac]).bypass_macs(&[mac]), "server"),
        ("with sources", &|c, mac| c.macs(&[mac]).src(["192.0.2.0/24"]), "server"),
    ]);
}

/// A refused connection ends at once, and a refused datagram is answered by an error; others are intercepted.
#[test]
fn reject_ports_refuse_at_once() {
    for backend in BACKENDS {
        for flags in [0, TP_RULES_NEW_ONLY] {
            let case = Case::new();
            let reject = [(80, TP_PROTO_TCP), (443, TP_PROTO_UDP), (8443, 0)];
            let rules = case.install(&case.config(backend).flags(flags).reject_ports(&reject));
            for hosts in [v4(), v6()] {
                let what = format!("{} flags {flags:#x} backend {backend}", hosts.server);
                for port in [80, 8443] {
                    let refused = case.lab.client.run(|| connect_in_vain(at(hosts.server, port))).unwrap_err();
                    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{what}");
                }
                for port in [443, 8443] {
                    let client = case.lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
                    client.connect(at(hosts.server, port)).unwrap();
                    client.set_read_timeout(Some(patience())).unwrap();
                    client.send(b"quic").unwrap();
                    let refused = client.recv(&mut [0; 8]).unwrap_err();
                    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{what}");
                }
                assert!(case.datagram_is_intercepted(hosts, 53), "{what}");
                let heard = while_answering(&[(&case.tcp, "proxy")], || {
                    case.lab.client.run(|| said(at(hosts.server, 443))).unwrap()
                });
                assert_eq!(heard, "proxy", "{what}");
            }
            case.lab.proxy.run(|| rules.remove()).unwrap();
            assert_eq!(case.heard(v4()), "server");
        }
    }
}

/// A proxy for TCP refuses QUIC, within its selection only.
#[test]
fn reject_ports_need_no_listener_of_the_protocol() {
    for backend in BACKENDS {
        let case = Case::new();
        let selected = ["203.0.113.2/32", "2001:db8:2::2/128"];
        let config = RulesConfig::of(&case.tcp).dst(selected).ports(&[443]).reject_ports(&[(443, TP_PROTO_UDP)]);
        let _rules = case.install(&config.backend(backend));
        let refused = |hosts: Hosts, to| {
            let client = case.lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
            client.connect(at(to, 443)).unwrap();
            client.set_read_timeout(Some(silence())).unwrap();
            client.send(b"quic").unwrap();
            client.recv(&mut [0; 8]).unwrap_err().kind()
        };
        for (hosts, other) in [(v4(), "203.0.113.3"), (v6(), "2001:db8:2::3")] {
            let _server = case.lab.server.run(|| UdpSocket::bind(at(ip(other), 443)).unwrap());
            assert_eq!(
                refused(hosts, hosts.server),
                ErrorKind::ConnectionRefused,
                "{} backend {backend}",
                hosts.server
            );
            assert_ne!(refused(hosts, ip(other)), ErrorKind::ConnectionRefused, "{other} backend {backend}");
        }
    }
}

/// With REDIRECT too.
#[test]
fn reject_ports_refuse_with_redirect() {
    for backend in BACKENDS {
        let case = Case::new();
        let plain = case.lab.proxy.run(|| TcpListener::bind("[::]:3130").unwrap());
        let config = RulesConfig::of(&plain).flags(TP_RULES_REDIRECT).ports(&[80]).reject_ports(&[(81, TP_PROTO_TCP)]);
        let _rules = case.install(&config.backend(backend));
        for hosts in [v4(), v6()] {
            let refused = case.lab.client.run(|| connect_in_vain(at(hosts.server, 81))).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{} backend {backend}", hosts.server);
            let heard =
                while_answering(&[(&plain, "proxy")], || case.lab.client.run(|| said(at(hosts.server, 80))).unwrap());
            assert_eq!(heard, "proxy");
        }
    }
}

/// What this host hears when it connects itself, with a socket that was changed.
fn own_heard(case: &Case, hosts: Hosts, change: impl Fn(&socket2::Socket) + Sync) -> String {
    while_answering(&[(&case.tcp, "proxy"), (&case.server, "server")], || {
        case.lab.proxy.run(|| {
            let to = at(hosts.server, 80);
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
            change(&socket);
            socket.connect_timeout(&to.into(), patience()).unwrap();
            let mut stream = std::net::TcpStream::from(socket);
            stream.set_read_timeout(Some(patience())).unwrap();
            std::io::Write::write_all(&mut stream, b"who am I?").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut words = String::new();
            std::io::Read::read_to_string(&mut stream, &mut words).unwrap();
            words
        })
    })
}

/// What is tried, the configuration that is made for it, and who replies to this host.
type OwnerCase<'a> = (&'a str, &'a dyn Fn(RulesConfig) -> RulesConfig, &'a str);

/// The test runs as user and group 0 of its namespace.
#[test]
fn owners_select_traffic_of_this_host() {
    let cases: &[OwnerCase<'_>] = &[
        ("everyone", &|c| c, "proxy"),
        ("user", &|c| c.uids(&[(0, 0)]), "proxy"),
        ("user, or another", &|c| c.uids(&[(0, 0), (1000, 1999)]), "proxy"),
        ("another user", &|c| c.uids(&[(1, 4_294_967_294)]), "server"),
        ("no user", &|c| c.uids(&[]), "server"),
        ("user exempt", &|c| c.bypass_uids(&[(0, 0)]), "server"),
        ("another user exempt", &|c| c.bypass_uids(&[(1, 100)]), "proxy"),
        ("group", &|c| c.gids(&[(0, 0)]), "proxy"),
        ("another group", &|c| c.gids(&[(5, 5), (7, 9)]), "server"),
        ("group exempt", &|c| c.bypass_gids(&[(0, 0)]), "server"),
        ("user and another group", &|c| c.uids(&[(0, 0)]).gids(&[(5, 5)]), "server"),
        ("user, and exempt", &|c| c.uids(&[(0, 0)]).bypass_gids(&[(0, 0)]), "server"),
        ("user and ports", &|c| c.uids(&[(0, 0)]).ports(&[80, 443]), "proxy"),
        ("user and other destinations", &|c| c.uids(&[(0, 0)]).dst(["192.0.2.0/24"]), "server"),
    ];
    for backend in BACKENDS {
        let case = Case::new();
        for (what, select, expected) in cases {
            // iptables knows no numbers that have no meaning in the user namespace, where there is but 0.
            if backend == TP_BACKEND_IPTABLES && what.contains("another") {
                continue;
            }
            let config = select(RulesConfig::of(&case.tcp).flags(TP_RULES_LOCAL_OUTPUT).backend(backend));
            let rules = case.install(&config);
            for hosts in [v4(), v6()] {
                let heard = own_heard(&case, hosts, |_| {});
                assert_eq!(heard, *expected, "{what}, {} backend {backend}", hosts.server);
            }
            case.lab.proxy.run(|| rules.remove()).unwrap();
        }
    }
}

#[test]
fn owners_select_with_redirect() {
    for backend in BACKENDS {
        let case = Case::new();
        let plain = case.lab.proxy.run(|| TcpListener::bind("[::]:3130").unwrap());
        for (uid, expected) in [(0, "plain"), (1, "server")] {
            if backend == TP_BACKEND_IPTABLES && uid == 1 {
                continue;
            }
            let config = RulesConfig::of(&plain).flags(TP_RULES_REDIRECT | TP_RULES_LOCAL_OUTPUT).ports(&[80]);
            let rules = case.install(&config.uids(&[(uid, uid)]).backend(backend));
            for hosts in [v4(), v6()] {
                let heard = while_answering(&[(&plain, "plain"), (&case.server, "server")], || {
                    case.lab.proxy.run(|| said(at(hosts.server, 80))).unwrap()
                });
                assert_eq!(heard, expected, "{} backend {backend}", hosts.server);
            }
            case.lab.proxy.run(|| rules.remove()).unwrap();
        }
    }
}

#[test]
fn bypass_mark_exempts_sockets() {
    for backend in BACKENDS {
        let case = Case::new();
        let config = RulesConfig::of(&case.tcp).flags(TP_RULES_LOCAL_OUTPUT).backend(backend);
        for (mask, marks) in [
            (0, [(0x40, "server"), (0x41, "proxy"), (0, "proxy")]),
            (0xf0, [(0x4f, "server"), (0x50, "proxy"), (0, "proxy")]),
        ] {
            let rules = case.install(&config.clone().bypass_mark(0x40).bypass_mark_mask(mask));
            for (mark, expected) in marks {
                for hosts in [v4(), v6()] {
                    let heard = own_heard(&case, hosts, |socket| socket.set_mark(mark).unwrap());
                    assert_eq!(heard, expected, "mark {mark:#x}/{mask:#x} {} backend {backend}", hosts.server);
                }
            }
            case.lab.proxy.run(|| rules.remove()).unwrap();
        }
    }
}

/// A process that ends leaves its connection to the kernel, whose packets have no owner. They reach the proxy too.
#[test]
fn owners_keep_connections_of_killed_processes() {
    for backend in BACKENDS {
        let case = Case::new();
        let config = RulesConfig::of(&case.tcp).flags(TP_RULES_LOCAL_OUTPUT).uids(&[(0, 0)]).backend(backend);
        let _rules = case.install(&config);
        for hosts in [v4(), v6()] {
            let to = hosts.server.to_string();
            let script = "import socket,sys,time; s=socket.create_connection((sys.argv[1],80)); s.sendall(b'x'); print('on',flush=True); time.sleep(60)";
            let mut command = Command::new("python3");
            command.args(["-c", script, &to]);
            let mut child = Process::start(&case.lab.proxy, command, "on");
            let (mut accepted, _) = accept(&case.tcp);
            accepted.set_read_timeout(Some(patience())).unwrap();
            std::io::Read::read_exact(&mut accepted, &mut [0]).unwrap();
            child.kill();
            let end = std::io::Read::read(&mut accepted, &mut [0]);
            assert!(
                matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
                "{} backend {backend}",
                hosts.server
            );
            // The proxy's own end is acknowledged: the connection does not remain half open.
            drop(accepted);
        }
        let port = |state: &str| case.lab.proxy.command("ss", &["-Htn", "state", state, "sport = :80"]);
        eventually("the proxy's connections end", || port("last-ack").is_empty() && port("fin-wait-1").is_empty());
        assert!(accept_within(&case.server, std::time::Duration::ZERO).is_none());
    }
}

#[test]
fn selection_that_cannot_be_served_is_refused() {
    Net::new().run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let errno = |config: RulesConfig| config.install().err().unwrap().errno;
        let own = || RulesConfig::of(&listener).flags(TP_RULES_LOCAL_OUTPUT);
        assert_eq!(errno(RulesConfig::of(&listener).uids(&[(0, 0)])), libc::EINVAL);
        assert_eq!(errno(RulesConfig::of(&listener).bypass_mark(1)), libc::EINVAL);
        assert_eq!(errno(own().uids(&[(2, 1)])), libc::EINVAL);
        assert_eq!(errno(own().uids(&[(0, u32::MAX)])), libc::EINVAL);
        assert_eq!(errno(own().bypass_mark(3).bypass_mark_mask(1)), libc::EINVAL);
        assert_eq!(errno(own().cgroups(&["../other"])), libc::EINVAL);
        assert_eq!(errno(own().cgroups(&["/"])), libc::EINVAL);
        let notrack = RulesConfig::of(&listener).flags(TP_RULES_LOCAL_OUTPUT | TP_RULES_NOTRACK);
        assert_eq!(errno(notrack.gids(&[(0, 0)])), libc::EOPNOTSUPP);
        let divert = || RulesConfig::new().flags(TP_RULES_DIVERT_ONLY);
        assert_eq!(errno(divert().reject_ports(&[(80, 0)])), libc::EINVAL);
        assert_eq!(errno(divert().bypass_src(["192.0.2.0/24"])), libc::EINVAL);
        assert_eq!(errno(RulesConfig::of(&listener).ports_of(&[(80, 4)])), libc::EINVAL);
        assert_eq!(errno(RulesConfig::of(&listener).reject_ports(&[(0, 0)])), libc::EINVAL);
        assert_eq!(errno(RulesConfig::of(&listener).bypass_interfaces(&["a b"])), libc::EINVAL);
        let iptables = RulesConfig::of(&listener).backend(TP_BACKEND_IPTABLES).bypass_interfaces(&["ppp+"]);
        assert_eq!(errno(iptables), libc::EOPNOTSUPP);
    });
}

/// A control group that exists while the test runs. An ordinary user may not make one.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Cgroup> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(std::path::Path::new);
        let root = roots.iter().find(|root| root.join("cgroup.controllers").exists())?;
        let group = root.join(format!("libtproxy-{name}-{}", std::process::id()));
        std::fs::create_dir(&group).ok()?;
        Some(Cgroup(group))
    }

    /// Its path below the root.
    fn path(&self) -> &str {
        self.0.file_name().unwrap().to_str().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Processes that were killed leave it a moment later.
        eventually("the control group is empty", || std::fs::remove_dir(&self.0).is_ok());
    }
}

#[test]
fn cgroups_select_traffic_of_this_host() {
    let (Some(group), Some(other)) = (Cgroup::new("one"), Cgroup::new("other")) else {
        // Root runs it.
        return;
    };
    for backend in BACKENDS {
        let case = Case::new();
        let own = || RulesConfig::of(&case.tcp).flags(TP_RULES_LOCAL_OUTPUT).backend(backend);
        let cases = [
            ("its", own().cgroups(&[group.path()]), "proxy"),
            ("both", own().cgroups(&[other.path(), &format!("/{}/", group.path())]), "proxy"),
            ("another's", own().cgroups(&[other.path()]), "server"),
            ("none", own().cgroups::<&str>(&[]), "server"),
            ("exempt", own().bypass_cgroups(&[group.path()]), "server"),
            ("another's exempt", own().bypass_cgroups(&[other.path()]), "proxy"),
        ];
        for (what, config, expected) in &cases {
            let rules = case.install(config);
            for hosts in [v4(), v6()] {
                let script = "import os,socket,sys; open(sys.argv[2]+'/cgroup.procs','w').write(str(os.getpid())); \
                              s=socket.create_connection((sys.argv[1],80),20); s.sendall(b'who am I?'); s.shutdown(1); \
                              print(s.recv(100).decode())";
                let to = hosts.server.to_string();
                let heard = while_answering(&[(&case.tcp, "proxy"), (&case.server, "server")], || {
                    case.lab.proxy.command("python3", &["-c", script, &to, group.0.to_str().unwrap()])
                });
                assert_eq!(heard.trim(), *expected, "{what}, {to} backend {backend}");
            }
            case.lab.proxy.run(|| rules.remove()).unwrap();
        }
        let missing = case.lab.proxy.run(|| own().cgroups(&["libtproxy-missing/one"]).install());
        let missing = missing.err().unwrap();
        assert_eq!(missing.errno, libc::ENOENT);
        assert!(missing.sentence.contains("libtproxy-missing/one"), "{}", missing.sentence);
    }
}
