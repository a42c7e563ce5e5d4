//! `tp_orig_dst` for every kind of socket.

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use common::*;

/// Redirects port 80 by a rule of an administrator.
fn redirect(net: &Net) {
    net.nft(
        "table inet nat {
            chain prerouting { type nat hook prerouting priority dstnat
                tcp dport 80 redirect to :3129
            }
        }",
    );
}

/// The accepted end of a connection that the client makes.
fn accepted(lab: &Lab, listener: &TcpListener, to: SocketAddr) -> TcpStream {
    let _client = lab.client.run(|| connect(to));
    accept(listener).0
}

#[test]
fn orig_dst_redirected_gives_destination() {
    let lab = Lab::new();
    redirect(&lab.proxy);
    let dual = lab.proxy.run(|| TcpListener::bind("[::]:3129")).unwrap();
    for hosts in [v4(), v6()] {
        let to = at(hosts.server, 80);
        let found = orig_dst(&accepted(&lab, &dual, to)).unwrap();
        assert!(found.is_ipv6(), "the address has another family than the socket");
        assert_eq!(canonical(found), to);
    }
    lab.proxy.run(|| close(dual));
    let plain = lab.proxy.run(|| TcpListener::bind("0.0.0.0:3129")).unwrap();
    let to = at(v4().server, 80);
    assert_eq!(orig_dst(&accepted(&lab, &plain, to)).unwrap(), to);
}

#[test]
fn orig_dst_not_redirected_is_enoent() {
    let lab = Lab::new();
    let listener = lab.proxy.run(|| TcpListener::bind("[::]:3129")).unwrap();
    let enoent = |stream: &TcpStream| {
        let failed = orig_dst(stream).unwrap_err();
        assert_eq!(failed.errno, libc::ENOENT, "{failed}");
        assert!(failed.sentence.contains("not intercepted"), "{failed}");
    };
    // Without NAT in the namespace (getsockopt fails with ENOPROTOOPT or ENOENT), and with NAT for other connections.
    for hosts in [v4(), v6()] {
        enoent(&accepted(&lab, &listener, at(hosts.proxy, 3129)));
    }
    redirect(&lab.proxy);
    for hosts in [v4(), v6()] {
        enoent(&accepted(&lab, &listener, at(hosts.proxy, 3129)));
    }
}

/// Connection tracking may have another destination for the five-tuple.
#[test]
fn orig_dst_transparent_does_not_use_connection_tracking() {
    let lab = Lab::new();
    lab.proxy.nft(
        "table inet nat {
            chain prerouting { type nat hook prerouting priority dstnat
                ip daddr 203.0.113.3 tcp dport 80 dnat ip to 203.0.113.2
            }
        }",
    );
    let listener = lab.proxy.run(|| listen("[::]:3129".parse().unwrap(), 0)).unwrap();
    let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
    for hosts in [v4(), v6()] {
        let to = at(hosts.server, 80);
        assert_eq!(canonical(orig_dst(&accepted(&lab, &listener, to)).unwrap()), to);
    }
}

#[test]
fn orig_dst_direct_connection_gives_listener_address() {
    let net = Net::new();
    let to: SocketAddr = "127.0.0.1:3129".parse().unwrap();
    let listener = net.run(|| listen(to, 0)).unwrap();
    let _client = net.run(|| TcpStream::connect(to)).unwrap();
    assert_eq!(orig_dst(&accept(&listener).0).unwrap(), to);
}

#[test]
fn orig_dst_unconnected_socket_is_enotconn() {
    let net = Net::new();
    net.run(|| {
        for errno in [
            orig_dst(&listen("[::]:3129".parse().unwrap(), 0).unwrap()).unwrap_err().errno,
            orig_dst(&TcpListener::bind("0.0.0.0:3130").unwrap()).unwrap_err().errno,
            orig_dst(&UdpSocket::bind("0.0.0.0:53").unwrap()).unwrap_err().errno,
            orig_dst(&socket(libc::AF_INET, libc::SOCK_STREAM).unwrap()).unwrap_err().errno,
            orig_dst(&socket(libc::AF_INET6, libc::SOCK_DGRAM).unwrap()).unwrap_err().errno,
        ] {
            assert_eq!(errno, libc::ENOTCONN);
        }
    });
}
