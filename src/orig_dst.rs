//! Where an intercepted connection was going.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use socket2::SockRef;

use crate::address::{as_family_of, canonical};
use crate::error::{Ends, Error, Result, Step};
use crate::sys;

/// The original destination of an accepted stream socket.
///
/// A transparent socket (TPROXY) has it as its own local address. Any other
/// asks connection tracking (REDIRECT, DNAT). Connection tracking is never
/// asked about a transparent socket: it may hold another connection's entry.
pub fn orig_dst(fd: BorrowedFd<'_>) -> Result<SocketAddr> {
    find(fd)
}

/// As [`orig_dst`], for the caller to whom its time matters.
#[inline(always)]
pub(crate) fn find(fd: BorrowedFd<'_>) -> Result<SocketAddr> {
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
        Ok(found) => match found.as_socket().map(|found| as_family_of(local, found)) {
            // Tracked, but not translated: the client wanted this very socket.
            Some(same) if same == local => Err(not_intercepted()),
            Some(found) => Ok(found),
            None => Err(Error::new(libc::EIO, "connection tracking answered with an address of no known family")),
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
