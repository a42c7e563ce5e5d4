//! The Rust interface, as a program that depends on the crate has it.

mod common;

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use common::{Lab, Net, at, limit, said, v4, v6, while_answering};
use tproxy::rules::{Backend, Config, Listener, Mark, Mode, PortRange, Prefix, Protocols, Rules, Set, purge, stats_of};
use tproxy::socket::{ConnectOptions, ListenOptions, SourcePort, connect_from, listen};
use tproxy::udp::{Datagram, Replier, ReplierOptions};

const fn is_send<T: Send>() {}
const fn is_send_and_sync<T: Send + Sync + 'static>() {}

/// What threads may share, and what they may hand on.
const _: () = {
    is_send_and_sync::<Rules>();
    is_send_and_sync::<Config>();
    is_send_and_sync::<tproxy::Error>();
    is_send_and_sync::<tproxy::check::Finding>();
    is_send::<Replier>();
    is_send::<Datagram<'_>>();
};

fn listener(net: &Net) -> TcpListener {
    net.run(|| listen(at(common::ip("::"), 3129), ListenOptions::new().backlog(64))).unwrap().into()
}

fn config(listener: &TcpListener) -> Config {
    Config::new([Listener::from_fd(listener, Mode::Tproxy).unwrap()])
}

#[test]
fn rules_of_config_intercept_what_it_selects() {
    let lab = Lab::new();
    let (server, other) = (lab.serve(80), lab.serve(81));
    let listener = listener(&lab.proxy);
    let answers = |port| [v4(), v6()].map(|hosts| lab.client.run(|| said(at(hosts.server, port)).unwrap()));
    while_answering(&[(&server, "server"), (&other, "server"), (&listener, "proxy")], || {
        for backend in [Backend::Nft, Backend::Iptables] {
            let all = || config(&listener).backend(backend).name("rust").mark(Mark { value: 0x10, mask: 0x30 });
            let rules = lab.proxy.run(|| Rules::install(&all())).unwrap();
            assert_eq!(answers(80), ["proxy", "proxy"]);
            let selected = || all().protocols(Protocols::TCP).ports([PortRange::from(80)]).interfaces(["eth*"]);
            lab.proxy.run(|| rules.replace(&selected().dst([]))).unwrap();
            assert_eq!(answers(80), ["server", "server"]);
            lab.proxy.run(|| rules.update(Set::Dst, &["203.0.113.0/24".parse().unwrap()], &[])).unwrap();
            assert_eq!(
                (answers(80), answers(81)),
                (["proxy", "server"].map(String::from), ["server", "server"].map(String::from))
            );
            assert!(lab.proxy.run(|| stats_of("rust")).unwrap().intercepted.packets > 0);
            lab.proxy.run(|| rules.remove()).unwrap();
            assert_eq!(answers(80), ["server", "server"]);
            assert_eq!(lab.proxy.run(|| stats_of("rust")).unwrap_err().errno(), libc::ENOENT);
        }
    });
}

/// One value, and every method of it from several threads at a time: each change is made once, and none is lost.
#[test]
fn rules_are_used_by_several_threads_at_a_time() {
    const THREADS: u8 = 4;
    const CHANGES: u8 = 50;
    let net = Net::new();
    let prefix = |thread, number| Prefix::new(Ipv4Addr::new(10, thread, number, 0).into(), 24).unwrap();
    let config = || Config::new([Listener::at(at(common::ip("::"), 3129), tproxy::rules::Protocol::Tcp).unwrap()]);
    let rules = net.run(|| Rules::install(&config().dst([]))).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let rules = &rules;
            scope.spawn(move || {
                for number in 0..CHANGES {
                    rules.update(Set::Dst, &[prefix(thread, number)], &[]).unwrap();
                    assert_eq!(rules.stats().unwrap().intercepted.packets, 0);
                }
            });
        }
    });
    // A prefix that is not there cannot be removed.
    let all: Vec<Prefix> = (0..THREADS).flat_map(|t| (0..CHANGES).map(move |n| prefix(t, n))).collect();
    rules.update(Set::Dst, &[], &all).unwrap();
    assert_eq!(rules.update(Set::Dst, &[], &all[..1]).unwrap_err().errno(), libc::ENOENT);
    // Another thread may end them.
    let before_end = std::thread::spawn(move || rules.remove()).join().unwrap();
    before_end.unwrap();
    net.run(|| purge(None)).unwrap();
    assert!(!net.command("nft", &["list", "tables"]).contains("libtproxy"));
}

/// The second number of `ss` is the length of the queue.
#[test]
fn listen_backlog_is_as_given_or_the_largest() {
    let net = Net::new();
    // A child that another test is starting may still hold a closed listener: each has a port of its own.
    let queue = |port: u16, options: ListenOptions| {
        let _listener = net.run(|| listen(at(common::ip("::"), port), options)).unwrap();
        let listeners = net.command("ss", &["-Hltn", &format!("sport = {port}")]);
        listeners.split_whitespace().nth(2).unwrap().to_owned()
    };
    let largest = net.command("cat", &["/proc/sys/net/core/somaxconn"]);
    assert_eq!(queue(1, ListenOptions::new()), largest.trim());
    assert_eq!(queue(2, ListenOptions::new().backlog(u32::MAX)), largest.trim());
    assert_eq!(queue(3, ListenOptions::new().backlog(7)), "7");
}

/// A connection from the client's address, and an errno that a program can match on.
#[test]
fn connect_from_gives_socket_or_errno() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(|| Rules::install(&Config::divert_only())).unwrap();
    let options = ConnectOptions::new().port(SourcePort::Keep);
    let stream = lab.proxy.run(|| connect_from(at(v4().client, 40_000), at(v4().server, 80), options)).unwrap();
    let (_accepted, from) = server.accept().unwrap();
    assert_eq!(common::canonical(from), at(v4().client, 40_000));
    drop(stream);
    let refused = lab.proxy.run(|| connect_from(at(v4().client, 0), at(v4().server, 9), ConnectOptions::new()));
    let error = std::io::Error::from(refused.unwrap_err());
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

/// A replier that is made by one thread and used by another, with datagrams that go along.
#[test]
fn replier_is_handed_to_another_thread() {
    let lab = Lab::new();
    let client = lab.client.run(|| std::net::UdpSocket::bind(at(v4().client, 40_000)).unwrap());
    client.set_read_timeout(Some(limit(5000))).unwrap();
    let options = ReplierOptions::new().max_sockets(0).idle(Duration::MAX);
    let mut replier = lab.proxy.run(|| Replier::new(options)).unwrap();
    let mut words = *b"pong";
    let mut datagram = Datagram::new(&mut words);
    datagram.set_len(4);
    datagram.set_client(at(v4().client, 40_000));
    datagram.set_orig_dst(at(v4().server, 53));
    let stats = lab.proxy.run(move || {
        assert_eq!(replier.reply(&mut [datagram]), 1);
        replier.stats()
    });
    assert_eq!((stats.sent, stats.errors, stats.sockets), (1, 0, 1));
    let mut heard = [0; 10];
    assert_eq!(client.recv_from(&mut heard).unwrap(), (4, at(v4().server, 53)));
}

#[test]
fn ports_and_prefixes_are_parsed_as_they_are_shown() {
    for text in ["80", "8000-8100"] {
        assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
    }
    for text in ["", "0", "+80", "80-", "-80", "90-80", "1-65536", "1-2-3", " 80"] {
        assert_eq!(text.parse::<PortRange>().unwrap_err().errno(), libc::EINVAL, "{text:?}");
    }
    for text in ["192.0.2.0/24", "2001:db8::/32", "::/0"] {
        let prefix = text.parse::<Prefix>().unwrap();
        assert_eq!(prefix.to_string(), text);
        assert_eq!(Prefix::new(prefix.addr(), prefix.prefix_len()).unwrap(), prefix);
    }
    assert_eq!(Prefix::from(Ipv4Addr::LOCALHOST), "127.0.0.1/32".parse().unwrap());
    for text in ["", "192.0.2.0/", "192.0.2.0/33", "192.0.2.0/+1", "192.0.2/24", "eth0"] {
        assert_eq!(text.parse::<Prefix>().unwrap_err().errno(), libc::EINVAL, "{text:?}");
    }
}
