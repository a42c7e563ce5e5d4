//! Replies: they arrive unchanged, also in batches and segments, and each reply that cannot be sent has an error.

mod common;

use std::io::Read;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use common::datagrams::*;
use common::*;
use tproxy::ffi::*;

#[test]
fn reply_above_524_bytes_may_be_fragmented_by_routers() {
    let lab = Lab::new();
    let (client, packets) = lab.client.run(|| {
        use socket2::{Domain, Protocol, Socket, Type};
        (udp(at(v4().client, 0)), Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP)).unwrap())
    });
    let (from, here) = (at(nobody(false, 1), 53), client.local_addr().unwrap());
    lab.proxy.run(|| {
        let mut replier = open_replier(&replier_config());
        for len in [524, 525] {
            assert_eq!(send_reply(&mut replier, from, here, &vec![b'x'; len]), None);
        }
    });
    let df: Vec<(usize, bool)> = (0..2)
        .map(|_| {
            let mut packet = [0; 1000];
            let len = (&packets).read(&mut packet).unwrap();
            // RFC 791: the header has 20 bytes, and DF is the second bit of byte 6; UDP's has 8.
            (len - 28, packet[6] & 0x40 != 0)
        })
        .collect();
    assert_eq!(df, [(524, true), (525, false)]);
}

#[test]
fn reply_through_interface_with_small_mtu_is_fragmented() {
    let lab = Lab::new();
    // Below an MTU of 1280 the kernel turns off IPv6 on the interface.
    lab.proxy.sh("ip link set eth0 mtu 300");
    let client = lab.client.run(|| udp(at(v4().client, 0)));
    let (here, far) = (client.local_addr().unwrap(), at(nobody(false, 1), 53));
    for ports in [1, 2] {
        lab.proxy.run(|| {
            let mut replier = open_replier(&replier_config());
            let mut bytes = [[b'x'; 400]; 6];
            let mut batch: Vec<_> = bytes
                .iter_mut()
                .zip(0..)
                .map(|(bytes, n)| reply_of(bytes, SocketAddr::new(far.ip(), 53 + n % ports), here))
                .collect();
            assert_eq!(replier.reply(&mut batch), 6);
            assert_eq!(send_reply(&mut replier, far, here, &[b'x'; 400]), None);
            assert_eq!(send_reply(&mut replier, far, here, &[b'x'; 200]), None);
        });
        let lens: Vec<usize> = hear(&client, 8).iter().map(|(bytes, _)| bytes.len()).collect();
        assert_eq!(lens, [400, 400, 400, 400, 400, 400, 400, 200]);
    }
}

#[test]
fn reply_that_fails_does_not_stop_the_others() {
    let lab = Lab::new();
    lab.proxy.nft(
        "table inet filter {
            chain out {
                type filter hook output priority 0;
                ip daddr 198.51.100.9 drop
                ip6 daddr 2001:db8:1::9 drop
            }
        }",
    );
    for raw in [false, true] {
        for (hosts, refused) in [(v4(), "198.51.100.9"), (v6(), "2001:db8:1::9")] {
            let client = lab.client.run(|| udp(at(hosts.client, 0)));
            let here = client.local_addr().unwrap();
            let v6 = here.is_ipv6();
            let (from, other) = (at(nobody(v6, 1), 53), at(nobody(!v6, 1), 53));
            let unspecified: IpAddr = ip(if v6 { "::" } else { "0.0.0.0" });
            let multicast: IpAddr = ip(if v6 { "ff02::1" } else { "224.0.0.1" });
            let good = (from, here, 0);
            let cases = [
                good,
                (from, at(ip(refused), 1), libc::EPERM),
                good,
                (from, at(hosts.client, 0), libc::EINVAL),
                (at(from.ip(), 0), here, libc::EINVAL),
                (other, here, libc::EAFNOSUPPORT),
                (at(unspecified, 53), here, libc::EADDRNOTAVAIL),
                (at(multicast, 53), here, libc::EADDRNOTAVAIL),
                good,
            ];
            let errors: Vec<i32> = lab.proxy.run(|| {
                let flags = if raw { TP_REPLIER_RAW } else { 0 };
                let mut replier = open_replier(&tp_replier_config { flags, ..replier_config() });
                let mut bytes = vec![[b'x'; 10]; cases.len()];
                let mut batch: Vec<_> =
                    bytes.iter_mut().zip(cases).map(|(bytes, (from, to, _))| reply_of(bytes, from, to)).collect();
                // A second call replaces the errors of the first.
                for _ in 0..2 {
                    assert_eq!(replier.reply(&mut batch), 3);
                }
                assert_eq!((replier.stats().errors, replier.stats().sent), (12, 6));
                batch.iter().map(|one| one.error().unwrap_or(0)).collect()
            });
            assert_eq!(errors, cases.map(|(_, _, errno)| errno), "raw {raw}, IPv6 {v6}");
            assert_eq!(hear(&client, 6), vec![(vec![b'x'; 10], from); 6]);
        }
    }
}

#[test]
fn reply_without_route_is_enetunreach() {
    let net = Net::new();
    net.run(|| {
        let mut replier = open_replier(&replier_config());
        let (from, to) = (at(ip("192.0.2.1"), 53), at(ip("198.51.100.1"), 53));
        assert_eq!(send_reply(&mut replier, from, to, b"x"), Some(libc::ENETUNREACH));
        assert_eq!(replier.stats().errors, 1);
    });
}

#[test]
fn reply_without_address_is_eafnosupport() {
    let net = Net::new();
    net.run(|| {
        let mut replier = open_replier(&replier_config());
        let mut room = [0; 10];
        let mut blank = [tproxy::udp::Datagram::new(&mut room)];
        assert_eq!((replier.reply(&mut blank), blank[0].error()), (0, Some(libc::EAFNOSUPPORT)));
        assert_eq!(replier.reply(&mut []), 0);
    });
}

#[test]
fn reply_with_segments_arrives_as_datagrams() {
    for raw in [false, true] {
        let lab = Lab::new();
        for hosts in [v4(), v6()] {
            let client = lab.client.run(|| udp(at(hosts.client, 0)));
            let here = client.local_addr().unwrap();
            let from = at(nobody(here.is_ipv6(), 1), 53);
            // One segment, several, segments longer than the MTU of 1,500, more segments than the kernel takes at once, and
            // segments of one byte.
            for (len, segment_len) in [(100, 1200), (6000, 1200), (6001, 2000), (9000, 100), (200, 1)] {
                let mut bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
                let expected: Vec<_> = bytes.chunks(segment_len).map(|bytes| (bytes.to_vec(), from)).collect();
                lab.proxy.run(|| {
                    let flags = if raw { TP_REPLIER_RAW } else { 0 };
                    let mut replier = open_replier(&tp_replier_config { flags, ..replier_config() });
                    let mut one = [reply_of(&mut bytes, from, here)];
                    one[0].set_segment_len(segment_len as u32);
                    assert_eq!(replier.reply(&mut one), 1, "{len} by {segment_len}: {:?}", one[0].error());
                });
                assert_eq!(hear(&client, expected.len()), expected, "{len} by {segment_len}, raw {raw}");
            }
        }
    }
}

#[test]
fn reply_batch_of_two_flows_arrives_unchanged() {
    let lab = Lab::new();
    let clients: Vec<UdpSocket> = lab.client.run(|| (0..2).map(|_| udp(at(v4().client, 0))).collect());
    let from = at(nobody(false, 1), 53);
    // Runs of equal lengths, shorter ends, empty datagrams between, datagrams longer than the MTU, two clients in turn.
    let plan: Vec<(usize, usize)> = [100, 100, 100, 50, 100, 100, 0, 0, 100, 2000, 2000, 10, 1400, 1400, 1400, 1399]
        .iter()
        .enumerate()
        .flat_map(|(at, len)| if at % 3 == 2 { vec![(0, *len), (1, *len)] } else { vec![(0, *len)] })
        .cycle()
        .take(150)
        .collect();
    let mut bytes: Vec<Vec<u8>> = plan.iter().enumerate().map(|(at, (_, len))| vec![at as u8; *len]).collect();
    let expected = |client: usize| -> Vec<Vec<u8>> {
        plan.iter().zip(0u8..).filter(|((to, _), _)| *to == client).map(|((_, len), at)| vec![at; *len]).collect()
    };
    let expected = [expected(0), expected(1)];
    lab.proxy.run(|| {
        let mut replier = open_replier(&replier_config());
        let ends: Vec<SocketAddr> = clients.iter().map(|client| client.local_addr().unwrap()).collect();
        let mut batch: Vec<_> =
            bytes.iter_mut().zip(&plan).map(|(bytes, (to, _))| reply_of(bytes, from, ends[*to])).collect();
        assert_eq!(replier.reply(&mut batch), plan.len());
        assert_eq!(replier.stats().sockets, 1);
    });
    for (client, expected) in clients.iter().zip(expected) {
        let heard: Vec<Vec<u8>> = hear(client, expected.len()).into_iter().map(|(bytes, _)| bytes).collect();
        assert_eq!(heard, expected);
    }
}

#[test]
fn reply_batch_of_many_ports_and_families_arrives_in_order_of_each_flow() {
    let lab = Lab::new();
    let clients: Vec<UdpSocket> =
        lab.client.run(|| [v4(), v4(), v6(), v6()].iter().map(|hosts| udp(at(hosts.client, 0))).collect());
    let ends: Vec<SocketAddr> = clients.iter().map(|client| client.local_addr().unwrap()).collect();
    // Some ports are held by other sockets.
    let taken: Vec<UdpSocket> = lab.proxy.run(|| {
        [("0.0.0.0", 1003), ("0.0.0.0", 1017), ("::", 1005)].iter().map(|(any, port)| udp(at(ip(any), *port))).collect()
    });
    let mapped = |addr: SocketAddr| match addr.ip() {
        IpAddr::V4(v4) => at(v4.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    };
    let mut random = Random(1);
    let mut expected: Vec<Vec<(Vec<u8>, SocketAddr)>> = vec![Vec::new(); 4];
    let mut plan = Vec::new();
    let mut from = at(nobody(false, 1), 1000);
    let mut client = 0;
    for number in 0..1000u64 {
        // A third of the datagrams belongs to the flow of the one before.
        if random.below(3) != 0 {
            client = random.below(4) as usize;
            from = at(nobody(ends[client].is_ipv6(), 1 + random.below(3) as u8), 1000 + random.below(40) as u16);
        }
        let len = [0, 8, 8, 8, 100, 100, 1400, 2000][random.below(8) as usize];
        let mut bytes = vec![number as u8; len];
        bytes.iter_mut().zip(number.to_be_bytes()).for_each(|(byte, of)| *byte = of);
        let bad = random.below(20) == 0;
        if !bad {
            expected[client].push((bytes.clone(), from));
        }
        let to = if bad { at(ends[client].ip(), 0) } else { ends[client] };
        plan.push((
            bytes,
            if random.below(4) == 0 { mapped(from) } else { from },
            if random.below(4) == 0 { mapped(to) } else { to },
        ));
    }
    let heard = std::thread::scope(|scope| {
        let hear_all = |(client, expected): (&UdpSocket, &Vec<_>)| {
            let (client, count) = (client.try_clone().unwrap(), expected.len());
            scope.spawn(move || hear(&client, count))
        };
        let threads: Vec<_> = clients.iter().zip(&expected).map(hear_all).collect();
        lab.proxy.run(|| {
            let mut replier = open_replier(&replier_config());
            let bad: Vec<bool> = plan.iter().map(|(_, _, to)| to.port() == 0).collect();
            let mut batch: Vec<_> = plan.iter_mut().map(|(bytes, from, to)| reply_of(bytes, *from, *to)).collect();
            assert_eq!(replier.reply(&mut batch), bad.iter().filter(|bad| !**bad).count());
            for (one, bad) in batch.iter().zip(bad) {
                assert_eq!(one.error(), bad.then_some(libc::EINVAL));
            }
            assert!(replier.stats().raw > 0);
        });
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    drop(taken);
    // The order within each flow must be kept; the flows may interleave.
    let by_flow = |mut heard: Vec<(Vec<u8>, SocketAddr)>| {
        heard.sort_by_key(|(_, from)| *from);
        heard
    };
    for (heard, expected) in heard.into_iter().zip(expected) {
        assert_eq!(by_flow(heard), by_flow(expected));
    }
}

#[test]
fn reply_message_that_is_refused_has_error_in_each_datagram() {
    let lab = Lab::new();
    lab.proxy.nft(
        "table inet filter {
            chain out {
                type filter hook output priority 0
                udp dport 9 drop
            }
        }",
    );
    for hosts in [v4(), v6()] {
        let client = lab.client.run(|| udp(at(hosts.client, 0)));
        let here = client.local_addr().unwrap();
        let (from, refused) = (at(nobody(here.is_ipv6(), 1), 53), at(hosts.client, 9));
        // Two flows from one port: consecutive datagrams of a flow become one message.
        let to = [here, refused, refused, refused, here, refused, here, here, refused, refused];
        lab.proxy.run(|| {
            let mut bytes = vec![[b'x'; 100]; to.len()];
            let mut replier = open_replier(&replier_config());
            let mut batch: Vec<_> = bytes.iter_mut().zip(to).map(|(bytes, to)| reply_of(bytes, from, to)).collect();
            assert_eq!(replier.reply(&mut batch), 4);
            let errors: Vec<Option<i32>> = batch.iter().map(|one| one.error()).collect();
            assert_eq!(errors, to.map(|to| (to == refused).then_some(libc::EPERM)));
            assert_eq!((replier.stats().errors, replier.stats().sent), (6, 4));
        });
        assert_eq!(hear(&client, 4), vec![(vec![b'x'; 100], from); 4]);
    }
}
