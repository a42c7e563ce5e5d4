//! The network of most tests: a client, a proxy and a server.

use std::net::{IpAddr, SocketAddr, TcpListener};

use super::{Heard, Net, ask, wait_for};

/// client --- proxy --- server. The proxy's host is a router, and forwards what it does not intercept.
pub struct Lab {
    pub client: Net,
    pub proxy: Net,
    pub server: Net,
}

/// One address of each host, of one family.
#[derive(Clone, Copy)]
pub struct Hosts {
    pub client: IpAddr,
    pub proxy: IpAddr,
    pub server: IpAddr,
}

pub fn v4() -> Hosts {
    Hosts { client: ip("198.51.100.2"), proxy: ip("198.51.100.1"), server: ip("203.0.113.2") }
}

pub fn v6() -> Hosts {
    Hosts { client: ip("2001:db8:1::2"), proxy: ip("2001:db8:1::1"), server: ip("2001:db8:2::2") }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// An IPv4-mapped address as an IPv4 address; other addresses unchanged.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => at(addr.ip().to_canonical(), addr.port()),
        _ => addr,
    }
}

impl Lab {
    pub fn new() -> Lab {
        let lab = Lab { client: Net::new(), proxy: Net::new(), server: Net::new() };
        Net::link(
            (&lab.client, "eth0", &["198.51.100.2/24", "198.51.100.9/24", "2001:db8:1::9/64", "2001:db8:1::2/64"]),
            (&lab.proxy, "eth0", &["198.51.100.1/24", "2001:db8:1::1/64"]),
        );
        Net::link(
            (&lab.proxy, "eth1", &["203.0.113.1/24", "2001:db8:2::1/64"]),
            (
                &lab.server,
                "eth0",
                &[
                    "203.0.113.2/24",
                    "203.0.113.3/24",
                    "203.0.113.4/24",
                    "2001:db8:2::2/64",
                    "2001:db8:2::3/64",
                    "2001:db8:2::4/64",
                ],
            ),
        );
        for (net, v4, v6) in
            [(&lab.client, "198.51.100.1", "2001:db8:1::1"), (&lab.server, "203.0.113.1", "2001:db8:2::1")]
        {
            net.ip(&format!("route add default via {v4}"));
            net.ip(&format!("route add default via {v6}"));
        }
        for (net, name) in [(&lab.client, "eth0"), (&lab.proxy, "eth0"), (&lab.proxy, "eth1"), (&lab.server, "eth0")] {
            net.ready(&[name]);
        }
        lab.proxy.forward();
        lab
    }

    /// The server's listener on a port, for both families. A former listener may still be open for a moment, in a child
    /// of another test that has not called exec(2) yet.
    pub fn serve(&self, port: u16) -> TcpListener {
        let bind = || match TcpListener::bind(at(ip("::"), port)) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => None,
            listener => Some(listener.unwrap()),
        };
        self.server.run(|| wait_for("the port is in use", bind))
    }

    /// The client connects, sends a request and reads the reply.
    pub fn ask(&self, to: SocketAddr) -> std::io::Result<Heard> {
        self.client.run(|| ask(to))
    }
}
