//! A router between a client and two servers. A port of one server is intercepted, with and without the router's own
//! connections.

mod common;

use std::net::{IpAddr, TcpListener};

use common::*;
use tproxy::ffi::*;

const PORT: u16 = 8080;
/// The addresses of the server whose port is intercepted, and of the other server.
const ONE: [&str; 2] = ["203.0.113.2", "2001:db8:2::2"];
const TWO: [&str; 2] = ["192.0.2.2", "2001:db8:3::2"];

/// client --- router === server one, server two.
struct Site {
    client: Net,
    router: Net,
    one: Net,
    two: Net,
}

impl Site {
    fn new() -> Site {
        let site = Site { client: Net::new(), router: Net::new(), one: Net::new(), two: Net::new() };
        let hosts = [
            (&site.client, "to-client", ["198.51.100.1", "2001:db8:1::1"], ["198.51.100.2", "2001:db8:1::2"]),
            (&site.one, "to-one", ["203.0.113.1", "2001:db8:2::1"], ONE),
            (&site.two, "to-two", ["192.0.2.1", "2001:db8:3::1"], TWO),
        ];
        for (net, name, gateway, own) in hosts {
            let [near, far] = [gateway, own].map(|[v4, v6]| [format!("{v4}/24"), format!("{v6}/64")]);
            Net::link(
                (&site.router, name, &near.each_ref().map(String::as_str)),
                (net, "eth0", &far.each_ref().map(String::as_str)),
            );
            for gateway in gateway {
                net.ip(&format!("route add default via {gateway}"));
            }
            net.ready(&["eth0"]);
        }
        site.router.ready(&["to-client", "to-one", "to-two"]);
        site.router.forward();
        site
    }
}

/// The host that answers the client and the router at the addresses of server one and server two.
fn answers(flags: u32, family: usize) -> [String; 4] {
    let site = Site::new();
    let serve = |net: &Net| net.run(|| TcpListener::bind(at(ip("::"), PORT)).unwrap());
    let (one, two) = (serve(&site.one), serve(&site.two));
    let proxy = site.router.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let dst = ONE.map(|addr| format!("{addr}/{}", if addr.contains(':') { 128 } else { 32 }));
    let config = RulesConfig::of(&proxy).ports(&[PORT]).dst(dst).flags(flags);
    let _rules = site.router.run(|| config.install()).unwrap();
    while_answering(&[(&one, "one"), (&two, "two"), (&proxy, "proxy")], || {
        let flows = [(&site.client, ONE), (&site.client, TWO), (&site.router, ONE), (&site.router, TWO)];
        flows.map(|(from, to)| {
            let to: IpAddr = ip(to[family]);
            from.run(|| ask(at(to, PORT))).map_or_else(|e| e.to_string(), |heard| heard.answer)
        })
    })
}

#[test]
fn install_rules_on_router_intercepts_forwarded_connections() {
    for family in [0, 1] {
        let [client_one, client_two, router_one, router_two] = answers(0, family);
        assert_eq!([client_one, client_two], ["proxy", "two"], "from the client");
        assert_eq!([router_one, router_two], ["one", "two"], "the router's own");
    }
}

#[test]
fn install_rules_local_output_intercepts_connections_of_router() {
    for family in [0, 1] {
        let [client_one, client_two, router_one, router_two] = answers(TP_RULES_LOCAL_OUTPUT, family);
        assert_eq!([client_one, client_two], ["proxy", "two"], "from the client");
        assert_eq!([router_one, router_two], ["proxy", "two"], "the router's own");
    }
}
