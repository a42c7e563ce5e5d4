//! The original destination of an intercepted connection.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::SockRef;

use crate::address::{KernelAddr, as_family_of, canonical};
use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::sys::{self, Errno};

/// Returns the original destination of an accepted stream socket.
///
/// For a transparent socket (TPROXY), it is the local address. For other
/// sockets, connection tracking is queried (REDIRECT, DNAT). It is never
/// queried for a transparent socket, because it may have the entry of another
/// connection with the same addresses and ports.
///
/// ```no_run
/// # let listener = std::net::TcpListener::bind("[::]:3129")?;
/// let (client, from) = listener.accept()?;
/// println!("{from} wants {}", tproxy::orig_dst(&client)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn orig_dst(fd: impl AsFd) -> Result<SocketAddr> {
    let mut addr = KernelAddr::NONE;
    find(fd.as_fd(), &mut addr)?;
    Ok(addr.into())
}

/// Like [`orig_dst`], without a copy of the result.
#[inline(always)]
pub(crate) fn find(fd: BorrowedFd<'_>, addr: &mut KernelAddr) -> Result<()> {
    match sys::getsockopt_int(fd, libc::SOL_IP, libc::IP_TRANSPARENT) {
        Ok(0) => before_nat(fd, addr),
        Ok(_) => own_address(fd, addr).map_err(no_address),
        Err(why) => Err(no_address(why)),
    }
}

/// As [`find`], of a socket that is known to be transparent: it is not asked.
#[inline(always)]
pub(crate) fn find_of_transparent(fd: BorrowedFd<'_>, addr: &mut KernelAddr) -> Result<()> {
    own_address(fd, addr).map_err(no_address)
}

/// Returns the local address of the socket.
#[inline(always)]
fn own_address(fd: BorrowedFd<'_>, addr: &mut KernelAddr) -> sys::Result<()> {
    sys::local_addr(fd, addr)?;
    if !addr.is_ipv4() && !addr.is_ipv6() {
        return Err(Errno(libc::EAFNOSUPPORT));
    }
    if addr.is_unspecified() || addr.port() == 0 {
        return Err(Errno(libc::ENOTCONN));
    }
    Ok(())
}

#[cold]
#[inline(never)]
fn no_address(why: Errno) -> Error {
    match why.0 {
        libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENOPROTOOPT => {
            Error::new(libc::EAFNOSUPPORT, "the descriptor is not an IPv4 or IPv6 stream socket")
        }
        libc::ENOTCONN => Error::new(
            libc::ENOTCONN,
            "not an accepted connection: the socket has no address of its own (is it the listener?)",
        ),
        _ => Error::socket(SocketOp::Inspect, Endpoints::default(), why),
    }
}

/// Queries connection tracking for a connection to the local address of the socket.
#[inline(never)]
fn before_nat(fd: BorrowedFd<'_>, addr: &mut KernelAddr) -> Result<()> {
    own_address(fd, addr).map_err(no_address)?;
    let local = SocketAddr::from(*addr);
    let socket = SockRef::from(&fd);
    // The level depends on the address, not on the socket: a v4-mapped connection is IPv4.
    let found = if canonical(local).is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    let found = found.map_err(|e| match Errno::from(e) {
        Errno(libc::ENOENT | libc::ENOPROTOOPT) => not_intercepted(),
        e => Error::socket(SocketOp::Inspect, Endpoints { local: Some(*addr), remote: None }, e),
    })?;
    let unknown = || Error::new(libc::EIO, "connection tracking returned an address of an unknown family");
    match as_family_of(local, found.as_socket().ok_or_else(unknown)?) {
        // Tracked, but not translated: the client connected to this socket directly.
        same if same == local => Err(not_intercepted()),
        found => {
            *addr = found.into();
            Ok(())
        }
    }
}

#[cold]
fn not_intercepted() -> Error {
    Error::new(
        libc::ENOENT,
        "the connection was not intercepted: the socket is not transparent (TPROXY), and connection tracking knows no \
         REDIRECT or DNAT of it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};

    #[test]
    fn orig_dst_of_what_is_no_connection_says_what_it_is() {
        let refused = |fd: BorrowedFd<'_>| {
            let mut addr = KernelAddr::NONE;
            find_of_transparent(fd, &mut addr).unwrap_err()
        };
        let (unix, _other) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let error = refused(unix.as_fd());
        assert_eq!(error.errno(), libc::EAFNOSUPPORT, "{error}");
        assert!(error.to_string().contains("not an IPv4 or IPv6 stream socket"), "{error}");
        for domain in [Domain::IPV4, Domain::IPV6] {
            let error = refused(Socket::new(domain, Type::STREAM, None).unwrap().as_fd());
            assert_eq!(error.errno(), libc::ENOTCONN, "{error}");
            assert!(error.to_string().contains("not an accepted connection"), "{error}");
        }
        for errno in [libc::EOPNOTSUPP, libc::ENOPROTOOPT] {
            assert_eq!(no_address(Errno(errno)).errno(), libc::EAFNOSUPPORT);
        }
        assert_eq!(no_address(Errno(libc::ENOTSOCK)).errno(), libc::ENOTSOCK);
    }
}
