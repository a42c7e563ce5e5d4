//! Where an intercepted connection was going.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use socket2::SockRef;

use crate::address::{KernelAddr, as_family_of, canonical};
use crate::error::{Ends, Error, Result, Step};
use crate::sys;

/// The original destination of an accepted stream socket.
///
/// A transparent socket (TPROXY) has it as its own local address. Any other
/// asks connection tracking (REDIRECT, DNAT). Connection tracking is never
/// asked about a transparent socket: it may hold another connection's entry.
pub fn orig_dst(fd: BorrowedFd<'_>) -> Result<SocketAddr> {
    let mut addr = KernelAddr::NONE;
    find(fd, &mut addr)?;
    Ok(addr.into())
}

/// As [`orig_dst`], for the caller to whom its time matters: in place.
#[inline(always)]
pub(crate) fn find(fd: BorrowedFd<'_>, addr: &mut KernelAddr) -> Result<()> {
    let failed = |e: sys::Errno| match e.0 {
        libc::EOPNOTSUPP | libc::ENOPROTOOPT => not_of_a_family(),
        _ => Error::socket(Step::Inspect, Ends::default(), e),
    };
    let transparent = sys::getsockopt_int(fd, libc::SOL_IP, libc::IP_TRANSPARENT).map_err(failed)?;
    sys::local_addr(fd, addr).map_err(failed)?;
    if !addr.is_ipv4() && !addr.is_ipv6() {
        return Err(not_of_a_family());
    }
    if addr.is_unspecified() || addr.port() == 0 {
        return Err(not_accepted());
    }
    if transparent == 0 {
        *addr = before_nat(fd, *addr)?.into();
    }
    Ok(())
}

/// What connection tracking knows of a connection that came to this address.
fn before_nat(fd: BorrowedFd<'_>, local: KernelAddr) -> Result<SocketAddr> {
    let socket = SockRef::from(&fd);
    // The level follows the address, not the socket: a v4-mapped connection is IPv4's.
    let found = if canonical(local.into()).is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    match found {
        Ok(found) => match found.as_socket().map(|found| as_family_of(local.into(), found)) {
            // Tracked, but not translated: the client wanted this very socket.
            Some(same) if same == local.into() => Err(not_intercepted()),
            Some(found) => Ok(found),
            None => Err(Error::new(libc::EIO, "connection tracking answered with an address of no known family")),
        },
        Err(e) => Err(match sys::Errno::from(e) {
            sys::Errno(libc::ENOENT | libc::ENOPROTOOPT) => not_intercepted(),
            e => Error::socket(Step::Inspect, Ends { local: Some(local), remote: None }, e),
        }),
    }
}

#[cold]
fn not_of_a_family() -> Error {
    Error::new(libc::EAFNOSUPPORT, "the descriptor is not an IPv4 or IPv6 stream socket")
}

#[cold]
fn not_accepted() -> Error {
    Error::new(libc::ENOTCONN, "not an accepted connection: the socket has no address of its own (is it the listener?)")
}

#[cold]
fn not_intercepted() -> Error {
    Error::new(
        libc::ENOENT,
        "the connection was not intercepted: the socket is not transparent (TPROXY), and connection tracking knows no \
         REDIRECT or DNAT of it",
    )
}
