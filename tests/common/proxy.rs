//! What a proxy does, with the C functions.

use std::net::{SocketAddr, TcpListener, TcpStream};

use super::{accept, canonical, connect_from, orig_dst, patience};

/// The addresses of a connection as the proxy sees them.
pub struct Seen {
    pub peer: SocketAddr,
    pub orig_dst: SocketAddr,
}

/// Proxies one connection, from accept(2) until both directions have ended.
pub fn proxy_one(listener: &TcpListener, flags: u32) -> Seen {
    let (client, _) = accept(listener);
    let peer = client.peer_addr().unwrap();
    let orig_dst = orig_dst(&client).unwrap();
    let server = connect_from(peer, orig_dst, flags).unwrap_or_else(|e| panic!("{peer} to {orig_dst}: {e}"));
    let server = TcpStream::from(server);
    server.set_read_timeout(Some(patience())).unwrap();
    server.set_write_timeout(Some(patience())).unwrap();
    std::thread::scope(|scope| {
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            scope.spawn(move || {
                std::io::copy(&mut from, &mut to).unwrap();
                to.shutdown(std::net::Shutdown::Write).unwrap();
            });
        }
    });
    Seen { peer: canonical(peer), orig_dst: canonical(orig_dst) }
}
