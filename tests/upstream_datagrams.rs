//! Datagram sockets towards servers, as `tp_connect_from` makes them.

mod common;

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use tproxy::ffi::*;

/// Between bind and connect the socket is everybody's. Of a stranger who never stops talking to the client next to nothing
/// is heard: what another processor has under way at that moment. (Without care it is one socket in twenty.)
#[test]
fn hardly_anybody_but_the_server_is_heard() {
    const SOCKETS: usize = 20_000;
    for hosts in [v4(), v6()] {
        let lab = Lab::new();
        let _rules = lab
            .proxy
            .run(|| {
                Rules::install(&tp_rules_config { flags: TP_RULES_DIVERT_ONLY, protocols: TP_PROTO_UDP, ..config() })
            })
            .unwrap();
        let client = at(hosts.client, 4321);
        let server = lab.server.run(|| UdpSocket::bind(at(hosts.server, 53)).unwrap());
        let stranger = lab.server.run(|| UdpSocket::bind(at(hosts.server, 54)).unwrap());
        let enough = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    let _ = stranger.send_to(b"not yours", client);
                }
            });
            let heard = lab.proxy.run(|| {
                let mut heard = 0;
                for _ in 0..SOCKETS {
                    let fd = connect_from(
                        client,
                        at(hosts.server, 53),
                        TP_CONNECT_DGRAM | TP_NONBLOCK | TP_CONNECT_KEEP_PORT,
                    )
                    .unwrap();
                    let socket = UdpSocket::from(fd);
                    heard += usize::from(socket.recv(&mut [0; 100]).is_ok());
                }
                heard
            });
            enough.store(true, Ordering::Relaxed);
            assert!(heard < SOCKETS / 100, "{heard} of {SOCKETS} sockets heard a stranger");
        });
        drop(server);
    }
}
