//! Flows that a flow table has offloaded: the kernel forwards their packets before any rule sees them.

mod common;

use std::net::UdpSocket;

use common::*;
use tproxy::ffi::*;

/// A lab whose proxy offloads each forwarded flow of UDP to port 7000.
fn lab_with_flow_table() -> Lab {
    let lab = Lab::new();
    lab.proxy.nft(
        "table inet fw { flowtable ft { hook ingress priority 0; devices = { eth0, eth1 }; }; \
         counter slow { }; \
         chain forward { type filter hook forward priority 0; udp dport 7000 counter name slow flow add @ft; }; }",
    );
    lab
}

/// Packets that the forward chain has seen: not those of offloaded flows.
fn slow(lab: &Lab) -> String {
    lab.proxy.nft("list counter inet fw slow")
}

/// A client that has a flow to the server, which is offloaded.
struct Flow {
    client: UdpSocket,
    server: UdpSocket,
}

impl Flow {
    fn begin(lab: &Lab, to: std::net::SocketAddr) -> Flow {
        let server = lab.server.run(|| UdpSocket::bind(to).unwrap());
        let client = lab.client.run(|| {
            let client = UdpSocket::bind(at(ip(if to.is_ipv4() { "0.0.0.0" } else { "::" }), 0)).unwrap();
            client.connect(to).unwrap();
            client
        });
        server.set_read_timeout(Some(patience())).unwrap();
        client.set_read_timeout(Some(patience())).unwrap();
        let flow = Flow { client, server };
        eventually("the flow is offloaded", || {
            let before = slow(lab);
            (0..3).for_each(|_| flow.exchange());
            slow(lab) == before
        });
        flow
    }

    fn exchange(&self) {
        let mut buffer = [0; 16];
        self.client.send(b"x").unwrap();
        let (_, from) = self.server.recv_from(&mut buffer).unwrap();
        self.server.send_to(b"y", from).unwrap();
        self.client.recv(&mut buffer).unwrap();
    }

    /// The next datagrams are intercepted.
    fn expect_intercepted(&self, rules: &Rules) {
        let before = rules.stats().intercepted_packets;
        eventually("the flow is intercepted", || {
            self.client.send(b"x").unwrap();
            rules.stats().intercepted_packets > before
        });
    }
}

#[test]
fn update_rules_and_replace_rules_end_offloaded_flows() {
    if !provided(Requirement::FlowTable) {
        return;
    }
    for backend in [TP_BACKEND_NFT, TP_BACKEND_IPTABLES] {
        for hosts in [v4(), v6()] {
            for by_update in [true, false] {
                let lab = lab_with_flow_table();
                let server = hosts.server.to_string();
                let socket = lab.proxy.run(|| receiver(at(ip("::"), 3053)));
                let config = RulesConfig::of(&socket).backend(backend).ports(&[7000]);
                let elsewhere = config.clone().dst(["192.0.2.0/24", "2001:db8:ffff::/48"]);
                let rules = lab.proxy.run(|| elsewhere.install()).unwrap();
                let flow = Flow::begin(&lab, at(hosts.server, 7000));
                let state = lab.proxy.ip("rule") + &lab.proxy.ip("-6 rule");
                lab.proxy.run(|| match by_update {
                    true => rules.update(TP_SET_DST, &prefixes(&[&server]), &[]).unwrap(),
                    false => rules.replace(&config.dst([&server[..]])).unwrap(),
                });
                flow.expect_intercepted(&rules);
                assert_eq!(lab.proxy.ip("rule") + &lab.proxy.ip("-6 rule"), state);
                lab.proxy.run(|| rules.remove()).unwrap();
            }
        }
    }
}
