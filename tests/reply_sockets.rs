//! The sockets of a replier: they receive nothing and disturb no other socket, and their number is bounded.

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::datagrams::*;
use common::*;
use tproxy::ffi::*;

/// The addresses to which a replier binds its sockets.
const DUMMIES: [&str; 2] = ["192.0.0.8", "100:0:0:1::1"];

/// The sockets of repliers in this thread's namespace.
fn reply_sockets() -> Vec<UdpSocketState> {
    let bound = |socket: &UdpSocketState| DUMMIES.iter().any(|dummy| socket.addr.ip() == ip(dummy));
    udp_socket_states().into_iter().filter(bound).collect()
}

#[test]
fn reply_sockets_queue_nothing_and_take_no_request() {
    for hosts in [v4(), v6()] {
        let lab = Lab::new();
        let (listener, _rules) = intercept_udp(&lab, 53);
        let client = lab.client.run(|| udp(at(hosts.client, 0)));
        let here = client.local_addr().unwrap();
        let asked = at(nobody(here.is_ipv6(), 1), 53);
        let mut replier = lab.proxy.run(|| open_replier(&replier_config()));
        for round in 0..5 {
            client.send_to(b"question", asked).unwrap();
            let got = receive_datagram(&listener, patience()).unwrap_or_else(|| panic!("round {round}"));
            assert_eq!(got, ("question".to_owned(), here, asked));
            assert_eq!(lab.proxy.run(|| send_reply(&mut replier, asked, here, b"answer")), None);
            assert_eq!(hear(&client, 1), [(b"answer".to_vec(), asked)]);
        }
        // The rules divert datagrams to the address of a reply socket to that socket, which drops them.
        let dummy = at(ip(DUMMIES[usize::from(here.is_ipv6())]), 53);
        for _ in 0..5 {
            client.send_to(b"to the dummy", dummy).unwrap();
        }
        let expected = UdpSocketState { addr: dummy, queued: 0, dropped: 5 };
        eventually("the reply socket drops all", || lab.proxy.run(reply_sockets) == [expected.clone()]);
    }
}

/// Asserts that a service on this port gets a request, and that its reply comes back.
fn is_served(client: &UdpSocket, service: &UdpSocket, at: SocketAddr) {
    client.send_to(b"are you there?", at).unwrap();
    let (words, from) = hear(service, 1).remove(0);
    service.send_to(&words, from).unwrap();
    assert_eq!(hear(client, 1), [(b"are you there?".to_vec(), at)]);
}

#[test]
fn reply_from_port_of_service_does_not_disturb_it() {
    for (hosts, any) in [(v4(), "0.0.0.0"), (v6(), "::")] {
        for (bound, shares, raw) in [(ip(any), false, 5), (ip(any), true, 0), (hosts.proxy, false, 0)] {
            let lab = Lab::new();
            let (_listener, _rules) = intercept_udp(&lab, 7777);
            let client = lab.client.run(|| udp(at(hosts.client, 0)));
            let here = client.local_addr().unwrap();
            let serve = || {
                lab.proxy.run(|| {
                    let domain = socket2::Domain::for_address(at(bound, 53));
                    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
                    socket.set_reuse_address(shares).unwrap();
                    socket.bind(&at(bound, 53).into())?;
                    let socket = UdpSocket::from(socket);
                    socket.set_read_timeout(Some(patience())).unwrap();
                    Ok::<_, std::io::Error>(socket)
                })
            };
            let service = serve().unwrap();
            let mut replier = lab.proxy.run(|| open_replier(&replier_config()));
            let from = at(nobody(here.is_ipv6(), 1), 53);
            for _ in 0..5 {
                assert_eq!(lab.proxy.run(|| send_reply(&mut replier, from, here, b"from elsewhere")), None);
                assert_eq!(hear(&client, 1), [(b"from elsewhere".to_vec(), from)]);
                is_served(&client, &service, at(hosts.proxy, 53));
            }
            let stats = replier.stats();
            assert_eq!((stats.raw, stats.misses, stats.hits), (raw, 1, 4), "{bound} shares {shares}");
            // The service restarts while the replier is open. Another test's child may have a copy of its socket for a moment.
            drop(service);
            let service = wait_for("the port is in use", || serve().ok());
            is_served(&client, &service, at(hosts.proxy, 53));
        }
    }
}

/// A port that another socket holds is tried again after a second, not for each datagram.
#[test]
fn reply_from_port_that_is_free_again_binds_it() {
    let lab = Lab::new();
    let hosts = v4();
    let client = lab.client.run(|| udp(at(hosts.client, 0)));
    let here = client.local_addr().unwrap();
    let from = at(nobody(false, 1), 53);
    let service = lab.proxy.run(|| udp(at(ip("0.0.0.0"), 53)));
    lab.proxy.run(|| {
        let begin = Instant::now();
        let mut replier = open_replier(&replier_config());
        for _ in 0..100 {
            assert_eq!(send_reply(&mut replier, from, here, b"raw"), None);
        }
        let (stats, seconds) = (replier.stats(), begin.elapsed().as_secs());
        assert_eq!((stats.raw, stats.sockets), (100, 1));
        assert!((1..=1 + seconds).contains(&stats.misses), "{} attempts in {:?}", stats.misses, begin.elapsed());
        drop(service);
        eventually("the port is bound", || {
            assert_eq!(send_reply(&mut replier, from, here, b"again"), None);
            replier.stats().sockets == 2
        });
        let before = replier.stats();
        assert_eq!(send_reply(&mut replier, from, here, b"not raw"), None);
        assert_eq!(replier.stats().raw, before.raw);
    });
}

#[test]
fn reply_of_two_repliers_shares_port() {
    let lab = Lab::new();
    let client = lab.client.run(|| udp(at(v6().client, 0)));
    let here = client.local_addr().unwrap();
    let from = at(nobody(true, 1), 53);
    lab.proxy.run(|| {
        let mut repliers = [open_replier(&replier_config()), open_replier(&replier_config())];
        for replier in &mut repliers {
            assert_eq!(send_reply(replier, from, here, b"one of two"), None);
            assert_eq!(replier.stats().raw, 0);
        }
    });
    assert_eq!(hear(&client, 2).len(), 2);
}

/// The ports of the reply sockets in this thread's namespace, in order.
fn reply_ports() -> Vec<u16> {
    let mut ports: Vec<u16> = reply_sockets().iter().map(|socket| socket.addr.port()).collect();
    ports.sort_unstable();
    ports
}

/// A child that another test is starting has copies of closed sockets until it calls exec(2): the lists of sockets become right
/// a moment later.
#[test]
fn reply_from_many_ports_closes_least_recently_used_sockets() {
    let lab = Lab::new();
    let client = lab.client.run(|| udp(at(v4().client, 0)));
    let here = client.local_addr().unwrap();
    let source = |port: u16| at(nobody(false, 1), port);
    lab.proxy.run(|| {
        let mut replier = open_replier(&tp_replier_config { max_sockets: 4, idle_ms: u32::MAX, ..replier_config() });
        for _ in 0..3 {
            for port in 1..=20 {
                assert_eq!(send_reply(&mut replier, source(port), here, b"x"), None);
                eventually("at most four sockets", || reply_sockets().len() <= 4);
            }
        }
        eventually("the last four ports", || reply_ports() == [17, 18, 19, 20]);
        assert_eq!((replier.stats().sockets, replier.stats().evictions, replier.stats().misses), (4, 56, 60));
        assert_eq!(send_reply(&mut replier, source(17), here, b"x"), None);
        assert_eq!(send_reply(&mut replier, source(30), here, b"x"), None);
        eventually("18 was used least recently", || reply_ports() == [17, 19, 20, 30]);
        drop(replier);
        eventually("all are closed", || reply_ports().is_empty());
    });
    hear(&client, 62);
}

#[test]
fn reply_closes_idle_sockets() {
    let lab = Lab::new();
    let client = lab.client.run(|| udp(at(v4().client, 0)));
    let here = client.local_addr().unwrap();
    let source = |port: u16| at(nobody(false, 1), port);
    lab.proxy.run(|| {
        let mut replier = open_replier(&tp_replier_config { idle_ms: 200, ..replier_config() });
        for port in [17, 18, 19] {
            assert_eq!(send_reply(&mut replier, source(port), here, b"x"), None);
        }
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(send_reply(&mut replier, source(40), here, b"x"), None);
        eventually("the idle ones are closed", || reply_ports() == [40]);
    });
    hear(&client, 4);
}

#[test]
fn reply_raw_binds_no_port() {
    let lab = Lab::new();
    for hosts in [v4(), v6()] {
        let client = lab.client.run(|| udp(at(hosts.client, 0)));
        let here = client.local_addr().unwrap();
        let from = at(nobody(here.is_ipv6(), 1), 53);
        lab.proxy.run(|| {
            let mut replier = open_replier(&tp_replier_config { flags: TP_REPLIER_RAW, ..replier_config() });
            // An empty datagram, one of odd length, one in fragments, and the longest.
            for len in [0, 1, 99, 4000, 65_507] {
                assert_eq!(send_reply(&mut replier, from, here, &vec![b'x'; len]), None, "{len}");
            }
            assert_eq!(send_reply(&mut replier, from, here, &[b'x'; 65_528]), Some(libc::EMSGSIZE));
            assert_eq!(reply_sockets(), []);
        });
        let lens: Vec<usize> = hear(&client, 5).iter().map(|(bytes, _)| bytes.len()).collect();
        assert_eq!(lens, [0, 1, 99, 4000, 65_507]);
    }
}

#[test]
fn connect_from_dgram_exchanges_with_server_and_takes_nothing_else() {
    for hosts in [v4(), v6()] {
        let lab = Lab::new();
        let (listener, _rules) = intercept_udp(&lab, 53);
        let server = lab.server.run(|| udp(at(hosts.server, 53)));
        let other = lab.server.run(|| udp(at(hosts.server, 54)));
        let client = lab.client.run(|| udp(at(hosts.client, 0)));
        let (here, there) = (client.local_addr().unwrap(), server.local_addr().unwrap());
        let upstream = lab
            .proxy
            .run(|| UdpSocket::from(connect_from(here, there, TP_CONNECT_DGRAM | TP_CONNECT_KEEP_PORT).unwrap()));
        // The same port towards another server.
        let second = lab.proxy.run(|| {
            let to = other.local_addr().unwrap();
            UdpSocket::from(connect_from(here, to, TP_CONNECT_DGRAM | TP_CONNECT_KEEP_PORT).unwrap())
        });
        upstream.set_read_timeout(Some(patience())).unwrap();
        second.set_read_timeout(Some(patience())).unwrap();
        for _ in 0..3 {
            upstream.send(b"for the server").unwrap();
            assert_eq!(hear(&server, 1), [(b"for the server".to_vec(), here)]);
            server.send_to(b"for the client", here).unwrap();
            assert_eq!(hear(&upstream, 1), [(b"for the client".to_vec(), there)]);
            second.send(b"for the other").unwrap();
            assert_eq!(hear(&other, 1), [(b"for the other".to_vec(), here)]);
            client.send_to(b"more", there).unwrap();
            assert_eq!(receive_datagram(&listener, patience()).unwrap(), ("more".to_owned(), here, there));
        }
        // Without TP_CONNECT_KEEP_PORT the kernel chooses a port.
        let any = lab.proxy.run(|| UdpSocket::from(connect_from(here, there, TP_CONNECT_DGRAM).unwrap()));
        any.send(b"x").unwrap();
        let (_, from) = hear(&server, 1).remove(0);
        assert_eq!(from.ip(), here.ip());
        assert_ne!(from.port(), here.port());
        let again = lab.proxy.run(|| connect_from(here, there, TP_CONNECT_DGRAM | TP_NONBLOCK).unwrap());
        // SAFETY: reads the descriptor's flags.
        assert_ne!(unsafe { libc::fcntl(again.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK, 0);
    }
}

#[test]
fn replier_open_with_bad_config_is_einval() {
    let open = |config| Replier::open(&config).map(drop).unwrap_err();
    assert_eq!(open(tp_replier_config { flags: 0x2, ..replier_config() }).errno, libc::EINVAL);
    assert_eq!(open(tp_replier_config { reserved: 1, ..replier_config() }).errno, libc::EINVAL);
    assert_eq!(open(tp_replier_config { max_sockets: 1 << 17, ..replier_config() }).errno, libc::EINVAL);
}
