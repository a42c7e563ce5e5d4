//! Where an intercepted connection was going.

use std::net::{SocketAddr, SocketAddrV6};
use std::os::fd::BorrowedFd;

use socket2::{SockAddr, SockRef};

use crate::error::{Ends, Error, Result, Step};
use crate::socket::canonical;
use crate::sys;

/// The original destination of an accepted stream socket.
///
/// A transparent socket (TPROXY) has it as its own local address. Any other
/// asks connection tracking (REDIRECT, DNAT). Connection tracking is never
/// asked about a transparent socket: it may hold another connection's entry.
pub fn orig_dst(fd: BorrowedFd<'_>) -> Result<SocketAddr> {
    let transparent =
        sys::getsockopt_int(fd, libc::SOL_IP, libc::IP_TRANSPARENT).map_err(|e| match e.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT) => {
                Error::new(libc::EAFNOSUPPORT, "the descriptor is not an IPv4 or IPv6 stream socket")
            }
            _ => Error::socket(Step::Inspect, Ends::default(), &e),
        })?;
    let socket = SockRef::from(&fd);
    let local = socket
        .local_addr()
        .map_err(|e| Error::socket(Step::Inspect, Ends::default(), &e))?
        .as_socket()
        .ok_or_else(|| Error::new(libc::EAFNOSUPPORT, "the descriptor is not an IPv4 or IPv6 stream socket"))?;
    if local.ip().to_canonical().is_unspecified() || local.port() == 0 {
        return Err(Error::new(
            libc::ENOTCONN,
            "not an accepted connection: the socket has no address of its own (is it the listener?)",
        ));
    }
    if transparent != 0 {
        return Ok(local);
    }
    // The level follows the address, not the socket: a v4-mapped connection is IPv4's.
    let before_nat = match canonical(local) {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    match before_nat {
        Ok(found) => match as_family_of(local, &found)? {
            // Tracked, but not translated: the client wanted this very socket.
            same if same == local => Err(not_intercepted()),
            found => Ok(found),
        },
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOPROTOOPT) => not_intercepted(),
            _ => Error::socket(Step::Inspect, Ends { local: Some(local), remote: None }, &e),
        }),
    }
}

fn not_intercepted() -> Error {
    Error::new(
        libc::ENOENT,
        "the connection was not intercepted: the socket is not transparent (TPROXY), and connection tracking knows no \
         REDIRECT or DNAT of it",
    )
}

/// An IPv4 answer for an IPv6 socket is v4-mapped, like every other address of that socket.
fn as_family_of(local: SocketAddr, found: &SockAddr) -> Result<SocketAddr> {
    let found = found
        .as_socket()
        .ok_or_else(|| Error::new(libc::EIO, "connection tracking answered with an address of no known family"))?;
    Ok(match (local, found) {
        (SocketAddr::V6(_), SocketAddr::V4(v4)) => {
            SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0))
        }
        _ => found,
    })
}
