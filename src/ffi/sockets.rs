//! Sockets and original destinations.

use std::ffi::c_int;
use std::os::fd::IntoRawFd;

use libc::{sockaddr, socklen_t};
use socket2::{Domain, Protocol, Type};

use super::arg::{self, AddressOut};
use super::guard::{guard, guard_hot, guard_uncancellable};
use crate::address::KernelAddr;
use crate::error::Error;
use crate::orig_dst;
use crate::socket::{self, ConnectOptions, ListenOptions};
use crate::sys::SavedErrno;

/// The new socket is non-blocking (O_NONBLOCK). tp_listen, tp_connect_from.
pub const TP_NONBLOCK: u32 = 0x1;
/// Several listeners share the address and port, and the kernel spreads
/// the connections among them (SO_REUSEPORT). tp_listen.
pub const TP_LISTEN_REUSEPORT: u32 = 0x2;
/// Connect from the source's own port if it can be had, else from any
/// other. tp_connect_from.
pub const TP_CONNECT_KEEP_PORT: u32 = 0x4;
/// A datagram socket instead of a stream socket. tp_connect_from.
pub const TP_CONNECT_DGRAM: u32 = 0x8;
/// What is to be sent on the connection is there already: the packet that ends
/// the handshake waits for it. tp_connect_from.
pub const TP_CONNECT_DATA_FOLLOWS: u32 = 0x10;

/// Makes a socket like socket(2) that is transparent: it can be bound to,
/// listen on and send from addresses that this host does not own
/// (IP_TRANSPARENT, ip(7)).
///
/// An AF_INET6 socket is dual-stack (IPV6_V6ONLY off): it serves IPv4 too,
/// as v4-mapped addresses. A SOCK_DGRAM socket also reports the original
/// destination of every datagram (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR).
/// The descriptor is close-on-exec.
///
/// domain: AF_INET or AF_INET6. type: SOCK_STREAM, SOCK_DGRAM or SOCK_RAW,
/// with SOCK_NONBLOCK if wished. protocol: 0, or as for socket(2).
///
/// Returns a descriptor, which the caller closes, or -1 with errno:
/// EAFNOSUPPORT: domain is neither of the two, or the kernel has no IPv6.
/// EPERM: neither CAP_NET_RAW nor CAP_NET_ADMIN. EINVAL, EPROTONOSUPPORT,
/// ESOCKTNOSUPPORT: type or protocol, as socket(2). EMFILE, ENFILE: a
/// descriptor limit. ENOBUFS, ENOMEM: no memory.
///
/// System calls: socket and one setsockopt for each option named above.
/// Thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn tp_socket(domain: c_int, r#type: c_int, protocol: c_int) -> c_int {
    guard_hot(|| {
        let protocol = (protocol != 0).then(|| Protocol::from(protocol));
        Ok(socket::make(Domain::from(domain), Type::from(r#type), protocol)?.into_raw_fd())
    })
}

/// Makes a socket transparent that the program has already: from socket
/// activation, an event library, another language.
///
/// As with tp_socket a SOCK_DGRAM socket reports original destinations from
/// then on. Nothing else changes: whether an AF_INET6 socket is dual-stack
/// stays as it is. Do it before bind, and on a listener before it is given to
/// tp_install_rules. Connections that a transparent listener accepts are
/// transparent.
///
/// Returns 0, or -1 with errno: EBADF, ENOTSOCK: not a descriptor, not a
/// socket. EAFNOSUPPORT: not a socket of AF_INET or AF_INET6. EPERM: neither
/// CAP_NET_RAW nor CAP_NET_ADMIN.
///
/// Thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn tp_set_transparent(fd: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller's descriptor, open during the call.
        socket::set_transparent(unsafe { arg::fd(fd) }?)?;
        Ok(0)
    })
}

/// Binds a socket to any address, whether this host owns it or not.
///
/// The socket is made transparent first; it need not come from tp_socket.
/// addr is a struct sockaddr_in or sockaddr_in6 of the socket's family, in
/// network byte order; an AF_INET6 socket takes IPv4 addresses v4-mapped.
///
/// A stream socket that is bound to port 0 gets its port when it connects or
/// listens (IP_BIND_ADDRESS_NO_PORT); until then getsockname(2) shows 0. So
/// one address can hold more connections, to several destinations, than there
/// are ephemeral ports.
///
/// Returns 0, or -1 with errno: EFAULT: addr is NULL. EINVAL: addrlen does
/// not fit the family, or the socket is bound already. EAFNOSUPPORT: the
/// address is not of the socket's family, or neither is of AF_INET or
/// AF_INET6. EBADF, ENOTSOCK: not a descriptor, not a socket. EPERM: neither
/// CAP_NET_RAW nor CAP_NET_ADMIN. EACCES: a port below 1024 without
/// CAP_NET_BIND_SERVICE. EADDRINUSE: another socket has that address and
/// port. EADDRNOTAVAIL and the rest of bind(2).
///
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_bind_nonlocal(fd: c_int, addr: *const sockaddr, addrlen: socklen_t) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word.
        let addr = unsafe { arg::address("addr", addr, addrlen) }?;
        // SAFETY: the caller's descriptor, open during the call.
        socket::bind_nonlocal(unsafe { arg::fd(fd) }?, addr)?;
        Ok(0)
    })
}

/// Makes a transparent stream socket that listens on an address, whether
/// this host owns it or not.
///
/// This is the listener to give to tp_install_rules. 0.0.0.0 serves IPv4,
/// :: serves IPv6 and IPv4, 127.0.0.1 and ::1 are reached by interception
/// alone. SO_REUSEADDR is set, so that a program can be restarted at once.
///
/// addr: a struct sockaddr_in or sockaddr_in6, in network byte order; with
/// port 0 the kernel chooses one (getsockname(2) tells). backlog: as
/// listen(2); negative asks for the most that the system allows
/// (net.core.somaxconn). flags: TP_NONBLOCK, TP_LISTEN_REUSEPORT, or 0.
///
/// Returns a descriptor, which the caller closes, or -1 with errno: EFAULT:
/// addr is NULL. EINVAL: addrlen does not fit the family, or flags has an
/// unknown bit. EAFNOSUPPORT: the address family is neither AF_INET nor
/// AF_INET6, or the kernel lacks it. EPERM, EACCES, EADDRINUSE,
/// EADDRNOTAVAIL: as tp_bind_nonlocal. EMFILE, ENFILE, ENOBUFS, ENOMEM: as
/// tp_socket.
///
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_listen(addr: *const sockaddr, addrlen: socklen_t, backlog: c_int, flags: u32) -> c_int {
    guard(|| {
        let flags = arg::flags(flags, TP_NONBLOCK | TP_LISTEN_REUSEPORT)?;
        // SAFETY: by the caller's word.
        let addr = unsafe { arg::address("addr", addr, addrlen) }?;
        let options =
            ListenOptions { nonblocking: flags & TP_NONBLOCK != 0, reuse_port: flags & TP_LISTEN_REUSEPORT != 0 };
        Ok(socket::listen(addr, backlog, options)?.into_raw_fd())
    })
}

/// Connects to dst so that the server sees the connection come from src, an
/// address that this host need not own.
///
/// src and dst: a struct sockaddr_in or sockaddr_in6 each, in network byte
/// order, of one family; v4-mapped addresses are taken as IPv4, so what
/// accept(2) and tp_orig_dst gave can be passed on as it is. The answers come
/// back to this host if it is on their way, and to the socket by the divert
/// rule that tp_install_rules installs (not with TP_RULES_REDIRECT). So does
/// what routers and hosts say of its packets (ICMP): that they are too big for
/// a link, or refused.
///
/// The port: without TP_CONNECT_KEEP_PORT any that is free for this destination; the
/// port in src does not count. With TP_CONNECT_KEEP_PORT the one in src, unless it is
/// 0, in use (EADDRINUSE or EADDRNOTAVAIL within) or not permitted (below
/// 1024 without CAP_NET_BIND_SERVICE): then any, as without.
///
/// flags: TP_CONNECT_KEEP_PORT, TP_NONBLOCK, TP_CONNECT_DGRAM, TP_CONNECT_DATA_FOLLOWS, or 0. With TP_NONBLOCK the connection
/// may still be under way when the descriptor is returned: wait until it is
/// writable, then SO_ERROR tells. Without, the call waits, at most as long as
/// the kernel tries (net.ipv4.tcp_syn_retries).
///
/// With TP_CONNECT_DGRAM it is a UDP socket, connected to dst: send(2) sends from src,
/// and recv(2) receives what dst answers to it. (What others sent to src at the
/// very moment of the call is dropped; where a datagram of theirs that slips
/// through matters, look at the sender that recvfrom(2) gives.) What the
/// client sends goes to the listener as before. Several such sockets, to
/// different destinations, can have one port of src (SO_REUSEADDR). Let there
/// be no two with the same port and destination: the kernel does not refuse
/// that, and gives the answers to either.
///
/// With TP_CONNECT_DATA_FOLLOWS the ACK that ends the handshake leaves with what is
/// sent first, and so does the one for the first answer, if it can: a packet or
/// two less for a short connection (TCP_QUICKACK off, tcp(7)). For a program
/// that has the client's first bytes before it connects. If nothing is sent,
/// the ACK leaves after 200 ms (TCP_DELACK_MAX, include/net/tcp.h), or when
/// setsockopt(TCP_QUICKACK, 1) lets it; a server that speaks first waits so long.
///
/// Returns a connected socket, which the caller closes, or -1 with
/// errno: EFAULT: src or dst is NULL. EINVAL: a length that does not fit its
/// family, an unknown flag, TP_CONNECT_DATA_FOLLOWS with TP_CONNECT_DGRAM, or src or dst is
/// unspecified (0.0.0.0, ::, ::ffff:0.0.0.0): the kernel would connect with an
/// address of this host, or to this host. EAFNOSUPPORT: a family other than
/// AF_INET and AF_INET6, or two different ones. EPERM: neither CAP_NET_RAW nor
/// CAP_NET_ADMIN. EADDRNOTAVAIL: no port of src is left towards dst. EINTR: a
/// signal came while waiting. ECONNREFUSED, ETIMEDOUT, ENETUNREACH,
/// EHOSTUNREACH and the rest of connect(2). EMFILE, ENFILE, ENOBUFS, ENOMEM:
/// as tp_socket. On failure no descriptor is left open.
///
/// System calls: socket, setsockopt(IP_TRANSPARENT),
/// setsockopt(IP_BIND_ADDRESS_NO_PORT), bind, connect; with TP_CONNECT_KEEP_PORT
/// SO_REUSEADDR in place of IP_BIND_ADDRESS_NO_PORT, and with TP_CONNECT_DGRAM neither
/// or SO_REUSEADDR, and a recv at the end, so that nothing is left that came
/// from others before the connect; with TP_CONNECT_DATA_FOLLOWS one setsockopt more.
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_connect_from(
    src: *const sockaddr,
    srclen: socklen_t,
    dst: *const sockaddr,
    dstlen: socklen_t,
    flags: u32,
) -> c_int {
    guard_hot(|| {
        let flags = arg::flags(flags, TP_NONBLOCK | TP_CONNECT_KEEP_PORT | TP_CONNECT_DGRAM | TP_CONNECT_DATA_FOLLOWS)?;
        // SAFETY: by the caller's word.
        let mut src = unsafe { arg::kernel_address("src", src, srclen) }?;
        // SAFETY: by the caller's word.
        let mut dst = unsafe { arg::kernel_address("dst", dst, dstlen) }?;
        let options = ConnectOptions {
            nonblocking: flags & TP_NONBLOCK != 0,
            keep_port: flags & TP_CONNECT_KEEP_PORT != 0,
            datagram: flags & TP_CONNECT_DGRAM != 0,
            data_follows: flags & TP_CONNECT_DATA_FOLLOWS != 0,
        };
        if options.datagram && options.data_follows {
            return Err(Error::invalid("flags: TP_CONNECT_DATA_FOLLOWS is for streams, not for TP_CONNECT_DGRAM"));
        }
        // A connection under way, a port that is taken: calls fail on the way to success.
        let errno = SavedErrno::errno();
        let socket = socket::connect_between(&mut src, &mut dst, options)?;
        errno.restore();
        Ok(socket.into_raw_fd())
    })
}

/// Where an accepted connection was going before it was intercepted.
///
/// Works for both ways of interception: a transparent socket (TPROXY) has
/// the original destination as its own address; any other asks connection
/// tracking (SO_ORIGINAL_DST: REDIRECT, DNAT). Connection tracking is never
/// asked about a transparent socket, since it may hold another connection's
/// entry.
///
/// A connection that was made straight to a transparent listener gives the
/// listener's own address: the original destination is where the client
/// connected to.
///
/// fd: a stream socket from accept(2). addr and addrlen: as getsockname(2),
/// a place and its size, which becomes the size of the address; but too
/// little room is EINVAL, not a cut address. A struct sockaddr_storage always
/// has enough. The address is in network byte order and of the socket's
/// family: an IPv4 connection of an AF_INET6 listener gives it v4-mapped.
///
/// Returns 0, or -1 with errno, addr and addrlen untouched: EFAULT: addr or
/// addrlen is NULL. EINVAL: too little room. ENOENT: the socket is not
/// transparent, and no REDIRECT or DNAT of the connection is known. ENOTCONN:
/// a socket that is bound to every address, or to none: not an accepted one. EBADF, ENOTSOCK: not a descriptor, not a
/// socket. EAFNOSUPPORT: not a socket of AF_INET or AF_INET6.
///
/// System calls: getsockopt and getsockname; one more getsockopt if the
/// socket is not transparent. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_orig_dst(fd: c_int, addr: *mut sockaddr, addrlen: *mut socklen_t) -> c_int {
    guard_uncancellable(|| {
        let Some(out) = AddressOut::new(addr, addrlen) else { return Err(arg::no_place("addr", addr)) };
        let mut found = KernelAddr::NONE;
        // SAFETY: the caller's descriptor, open during the call.
        orig_dst::find(unsafe { arg::fd(fd) }?, &mut found)?;
        // SAFETY: by the caller's word.
        if let Some(Err(needed)) = found.with_ref(|addr| unsafe { out.write(addr) }) {
            // SAFETY: as above.
            return Err(unsafe { out.too_little(needed) });
        }
        Ok(0)
    })
}
