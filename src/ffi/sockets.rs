//! Sockets and original destinations.

use std::ffi::c_int;
use std::os::fd::IntoRawFd;

use libc::{sockaddr, socklen_t};
use socket2::{Domain, Protocol, Type};

use super::arg::{self, AddressOut};
use super::guard::{guard, guard_hot, guard_uncancellable};
use crate::accept::{self, AcceptOptions};
use crate::address::KernelAddr;
use crate::error::{Error, Result};
use crate::orig_dst;
use crate::socket::{self, ConnectOptions, ListenOptions, SourcePort};
use crate::sys::SavedErrno;

/// Makes the new socket non-blocking (O_NONBLOCK). Flag of tp_listen(), tp_connect_from() and tp_accept().
pub const TP_NONBLOCK: u32 = 0x1;
/// Lets several listeners share the address and port; the kernel distributes connections among them
/// (SO_REUSEPORT). Flag of tp_listen().
pub const TP_LISTEN_REUSEPORT: u32 = 0x2;
/// Connects from the port in src if it is available, otherwise from any port. Flag of tp_connect_from() and
/// tp_connect_socket().
pub const TP_CONNECT_KEEP_PORT: u32 = 0x4;
/// Creates a UDP socket instead of a TCP socket. Flag of tp_connect_from().
pub const TP_CONNECT_DGRAM: u32 = 0x8;
/// The caller will send data immediately: delays the final ACK of the handshake so that it carries the
/// data. Flag of tp_connect_from() and tp_connect_socket().
pub const TP_CONNECT_DATA_FOLLOWS: u32 = 0x10;
/// The listener serves IPv6 only (IPV6_V6ONLY), so that another socket can serve IPv4 on the same port. Flag
/// of tp_listen().
pub const TP_LISTEN_V6ONLY: u32 = 0x20;
/// Connects from the port in src, or fails with EADDRINUSE. Flag of tp_connect_from() and
/// tp_connect_socket().
pub const TP_CONNECT_SAME_PORT: u32 = 0x40;
/// The listener is transparent: its connections were intercepted by TPROXY, and tp_accept() does not ask the
/// socket. Flag of tp_accept().
pub const TP_ACCEPT_TPROXY: u32 = 0x80;

/// Creates a transparent socket.
///
/// Works like socket(2) and sets IP_TRANSPARENT (ip(7)), so that the socket can bind to, listen on and
/// send from addresses that this host does not own. An AF_INET6 socket is dual-stack (IPV6_V6ONLY is
/// off): it also handles IPv4, as v4-mapped addresses. To serve IPv6 only, set IPV6_V6ONLY before bind(2),
/// or use tp_listen() with TP_LISTEN_V6ONLY. A SOCK_DGRAM socket also reports the original
/// destination of each datagram (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR). The descriptor is
/// close-on-exec.
///
/// @param domain    AF_INET or AF_INET6.
/// @param type      SOCK_STREAM, SOCK_DGRAM or SOCK_RAW; SOCK_NONBLOCK may be added.
/// @param protocol  0, or a protocol as for socket(2).
/// @return descriptor, which the caller closes, or -1 with errno:
///   EAFNOSUPPORT     domain is neither AF_INET nor AF_INET6, or the kernel has no IPv6
///   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
///   EINVAL           type is invalid, as for socket(2)
///   EPROTONOSUPPORT  the protocol is not supported, as for socket(2)
///   ESOCKTNOSUPPORT  the socket type is not supported, as for socket(2)
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// System calls: socket, and one setsockopt per option named above.
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub extern "C" fn tp_socket(domain: c_int, r#type: c_int, protocol: c_int) -> c_int {
    guard_hot(|| {
        let protocol = (protocol != 0).then(|| Protocol::from(protocol));
        Ok(socket::make(Domain::from(domain), Type::from(r#type), protocol, false)?.into_raw_fd())
    })
}

/// Makes an existing socket transparent.
///
/// For sockets that come from socket activation, an event library or another language. As with
/// tp_socket(), a SOCK_DGRAM socket reports original destinations from then on. Other options are
/// unchanged: an AF_INET6 socket stays dual-stack or IPv6-only as it was. Call this before bind(2), and
/// for a listener before it is passed to tp_install_rules(). Connections accepted by a transparent
/// listener are transparent.
///
/// @param fd  socket of family AF_INET or AF_INET6.
/// @return 0, or -1 with errno:
///   EBADF         fd is not an open descriptor
///   ENOTSOCK      fd is not a socket
///   EAFNOSUPPORT  the socket's family is neither AF_INET nor AF_INET6
///   EPERM         neither CAP_NET_RAW nor CAP_NET_ADMIN
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub extern "C" fn tp_set_transparent(fd: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller's descriptor, open during the call.
        socket::set_transparent(unsafe { arg::fd(fd) }?)?;
        Ok(0)
    })
}

/// Binds a socket to any address, including addresses that this host does not own.
///
/// The socket is made transparent first; it need not come from tp_socket(). A stream socket bound to
/// port 0 gets its port when it connects or listens (IP_BIND_ADDRESS_NO_PORT); until then getsockname(2)
/// reports port 0. One address can therefore hold more connections, to several destinations, than there
/// are ephemeral ports.
///
/// @param fd       socket of family AF_INET or AF_INET6.
/// @param addr     struct sockaddr_in or sockaddr_in6 of the socket's family, in network byte order. For
///                 an AF_INET6 socket, IPv4 addresses are given v4-mapped.
/// @param addrlen  size of addr in bytes.
/// @return 0, or -1 with errno:
///   EFAULT         addr is NULL
///   EINVAL         addrlen does not fit the address family, or the socket is already bound
///   EAFNOSUPPORT   addr is not of the socket's family, or a family is neither AF_INET nor AF_INET6
///   EBADF          fd is not an open descriptor
///   ENOTSOCK       fd is not a socket
///   EPERM          neither CAP_NET_RAW nor CAP_NET_ADMIN
///   EACCES         the port is below 1024, without CAP_NET_BIND_SERVICE
///   EADDRINUSE     another socket has this address and port
///   EADDRNOTAVAIL  as for bind(2); its other errors are possible too
///
/// Thread-safe.
///
/// @since 0.1.0
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

/// Creates a transparent TCP socket that listens on any address, including addresses that this host does
/// not own.
///
/// The socket is meant to be passed to tp_install_rules(). A listener on 0.0.0.0 serves IPv4; one on ::
/// serves IPv6 and IPv4, or with TP_LISTEN_V6ONLY only IPv6; one on 127.0.0.1 or ::1 is reached only by interception. SO_REUSEADDR is set, so
/// that a program can be restarted at once.
///
/// @param addr     struct sockaddr_in or sockaddr_in6, in network byte order. With port 0 the kernel
///                 chooses a port, which getsockname(2) reports.
/// @param addrlen  size of addr in bytes.
/// @param backlog  as for listen(2); if negative, the system's maximum (net.core.somaxconn) is used.
/// @param flags    TP_NONBLOCK, TP_LISTEN_REUSEPORT and TP_LISTEN_V6ONLY, or 0.
/// @return descriptor, which the caller closes, or -1 with errno:
///   EFAULT           addr is NULL
///   EINVAL           addrlen does not fit the address family, or flags has an unknown bit
///   EINVAL           TP_LISTEN_V6ONLY is given, and addr is an IPv4 address or v4-mapped
///   EAFNOSUPPORT     the family is neither AF_INET nor AF_INET6, or the kernel lacks it
///   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
///   EACCES           the port is below 1024, without CAP_NET_BIND_SERVICE
///   EADDRINUSE       another socket has this address and port
///   EADDRNOTAVAIL    as for bind(2)
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_listen(addr: *const sockaddr, addrlen: socklen_t, backlog: c_int, flags: u32) -> c_int {
    guard(|| {
        let flags = arg::flags(flags, TP_NONBLOCK | TP_LISTEN_REUSEPORT | TP_LISTEN_V6ONLY)?;
        // SAFETY: by the caller's word.
        let addr = unsafe { arg::address("addr", addr, addrlen) }?;
        let options = ListenOptions {
            nonblocking: flags & TP_NONBLOCK != 0,
            reuse_port: flags & TP_LISTEN_REUSEPORT != 0,
            only_v6: flags & TP_LISTEN_V6ONLY != 0,
            backlog: u32::try_from(backlog).ok(),
        };
        Ok(socket::listen(addr, options)?.into_raw_fd())
    })
}

/// Connects to dst with src as the source address, which this host need not own.
///
/// The server sees a connection from src. Replies return to this host if it is on their path, and reach
/// the socket through the divert rule of tp_install_rules() (not with TP_RULES_REDIRECT). The same applies
/// to ICMP errors about its packets (packet too big, port unreachable).
///
/// Source port: without TP_CONNECT_KEEP_PORT and TP_CONNECT_SAME_PORT, any port that is free for this
/// destination; the port in src is ignored. With TP_CONNECT_KEEP_PORT, the port in src, unless it is 0, in
/// use (EADDRINUSE or EADDRNOTAVAIL) or not permitted (below 1024 without CAP_NET_BIND_SERVICE); then any
/// port. With TP_CONNECT_SAME_PORT, the port in src and no other.
///
/// TP_NONBLOCK: the connection may still be in progress when the call returns. Wait until the socket is
/// writable, then read SO_ERROR. Without TP_NONBLOCK the call blocks, at most as long as the kernel
/// retries (net.ipv4.tcp_syn_retries).
///
/// TP_CONNECT_DGRAM: the socket is a UDP socket connected to dst. send(2) sends from src, and recv(2)
/// receives what dst sends to src. A datagram from a third party that arrives at src during the call is
/// dropped. If one that slips through would matter, check the sender that recvfrom(2) reports.
/// Datagrams that the client sends still go to the listener. Several such sockets may share a port of
/// src if their destinations differ (SO_REUSEADDR). Do not create two with the same port and
/// destination: the kernel allows it and delivers replies to an arbitrary one.
///
/// TP_CONNECT_DATA_FOLLOWS: the final ACK of the handshake is sent with the first data, and the ACK of
/// the first reply also waits for data if it can, which saves one or two packets on a short connection
/// (TCP_QUICKACK off, tcp(7)). It is meant for a program that has the client's first bytes before it
/// connects. If no data is sent, the ACK is sent after 200 ms (TCP_DELACK_MAX, include/net/tcp.h) or
/// after setsockopt(TCP_QUICKACK, 1); a server that sends first waits that long.
///
/// @param src     struct sockaddr_in or sockaddr_in6, in network byte order. A v4-mapped address is
///                treated as IPv4, so results of accept(2) and tp_orig_dst() can be passed unchanged.
/// @param srclen  size of src in bytes.
/// @param dst     address to connect to, of the same family as src, in the same form.
/// @param dstlen  size of dst in bytes.
/// @param flags   TP_CONNECT_KEEP_PORT or TP_CONNECT_SAME_PORT, TP_NONBLOCK, TP_CONNECT_DGRAM and
///                TP_CONNECT_DATA_FOLLOWS, or 0.
/// @return connected socket, which the caller closes, or -1 with errno:
///   EFAULT           src or dst is NULL
///   EINVAL           srclen or dstlen does not fit its address family
///   EINVAL           flags has an unknown bit
///   EINVAL           TP_CONNECT_DATA_FOLLOWS is given together with TP_CONNECT_DGRAM
///   EINVAL           TP_CONNECT_SAME_PORT is given together with TP_CONNECT_KEEP_PORT, or the port in src
///                    is 0
///   EINVAL           src is multicast or 255.255.255.255 (the broadcast address of a subnet is not refused)
///   EINVAL           src or dst is unspecified (0.0.0.0, ::, ::ffff:0.0.0.0): the kernel would use an
///                    address of this host, or connect to this host
///   EAFNOSUPPORT     a family is neither AF_INET nor AF_INET6, or src and dst differ in family
///   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
///   EADDRINUSE       with TP_CONNECT_SAME_PORT: another socket has the address and port of src, or the
///                    addresses and ports of src and dst have a connection (or one in TIME_WAIT)
///   EACCES           with TP_CONNECT_SAME_PORT: the port is below 1024, without CAP_NET_BIND_SERVICE
///   EADDRNOTAVAIL    no port of src is free for dst
///   EINTR            a signal interrupted the wait
///   ECONNREFUSED, ETIMEDOUT, ENETUNREACH, EHOSTUNREACH
///                    as for connect(2); its other errors are possible too
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// On failure no descriptor is left open.
///
/// System calls: socket, setsockopt(IP_TRANSPARENT), setsockopt(IP_BIND_ADDRESS_NO_PORT), bind, connect.
/// With TP_CONNECT_KEEP_PORT or TP_CONNECT_SAME_PORT, SO_REUSEADDR is set in place of IP_BIND_ADDRESS_NO_PORT. With
/// TP_CONNECT_DGRAM, IP_BIND_ADDRESS_NO_PORT is never set, and a recv at the end discards datagrams
/// that arrived from others before the connect. TP_CONNECT_DATA_FOLLOWS adds one setsockopt.
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_connect_from(
    src: *const sockaddr,
    srclen: socklen_t,
    dst: *const sockaddr,
    dstlen: socklen_t,
    flags: u32,
) -> c_int {
    guard_hot(|| {
        check_connect_flags(flags, TP_NONBLOCK | TP_CONNECT_DGRAM)?;
        // SAFETY: by the caller's word.
        let Some(mut from) = (unsafe { arg::parsed_address(src, srclen) }) else {
            // SAFETY: as above.
            return Err(unsafe { arg::no_address("src", src, srclen) });
        };
        // SAFETY: by the caller's word.
        let Some(mut to) = (unsafe { arg::parsed_address(dst, dstlen) }) else {
            // SAFETY: as above.
            return Err(unsafe { arg::no_address("dst", dst, dstlen) });
        };
        // A connection under way, a port that is taken: calls fail on the way to success.
        let errno = SavedErrno::errno();
        let socket = socket::connect_between(&mut from, &mut to, connect_options(flags))?;
        errno.restore();
        Ok(socket.into_raw_fd())
    })
}

/// Refuses unknown flags and combinations that exclude each other; `more` are the flags that not every call has.
///
/// Separate from [`connect_options`]: with a Result of several bytes the compiler copies the addresses in small pieces.
#[inline(always)]
fn check_connect_flags(flags: u32, more: u32) -> Result<()> {
    let flags = arg::flags(flags, TP_CONNECT_KEEP_PORT | TP_CONNECT_SAME_PORT | TP_CONNECT_DATA_FOLLOWS | more)?;
    let both = |these: u32| flags & these == these;
    if both(TP_CONNECT_KEEP_PORT | TP_CONNECT_SAME_PORT) {
        return Err(Error::invalid("flags: TP_CONNECT_SAME_PORT excludes TP_CONNECT_KEEP_PORT"));
    }
    if both(TP_CONNECT_DGRAM | TP_CONNECT_DATA_FOLLOWS) {
        return Err(Error::invalid("flags: TP_CONNECT_DATA_FOLLOWS is for streams, not for TP_CONNECT_DGRAM"));
    }
    Ok(())
}

/// Separate from [`connect_options`], so that calls without these flags do not compute it.
#[cold]
#[inline(never)]
fn own_port(flags: u32) -> SourcePort {
    if flags & TP_CONNECT_KEEP_PORT != 0 { SourcePort::Keep } else { SourcePort::Same }
}

#[inline(always)]
fn connect_options(flags: u32) -> ConnectOptions {
    let has = |flag: u32| flags & flag != 0;
    ConnectOptions {
        nonblocking: has(TP_NONBLOCK),
        port: if has(TP_CONNECT_KEEP_PORT | TP_CONNECT_SAME_PORT) { own_port(flags) } else { SourcePort::Any },
        datagram: has(TP_CONNECT_DGRAM),
        data_follows: has(TP_CONNECT_DATA_FOLLOWS),
    }
}

/// Connects a socket of the caller's to dst with src as the source address, which this host need not own.
///
/// Does with an existing socket what tp_connect_from() does with a new one, so that options can be set
/// before: SO_MARK, SO_BINDTODEVICE, SO_RCVBUF, IP_TOS, TCP_FASTOPEN_CONNECT, TCP_CONGESTION, Multipath TCP
/// (IPPROTO_MPTCP). The socket is made transparent; it need not come from tp_socket(). It is a stream or
/// datagram socket on which bind(2), listen(2) and connect(2) were not called. An AF_INET socket takes IPv4
/// addresses, also v4-mapped. An AF_INET6 socket takes IPv6 addresses, and also IPv4 addresses unless it is
/// IPv6-only (IPV6_V6ONLY).
///
/// Whether the call waits for the connection is decided by the socket (O_NONBLOCK). If the socket is
/// non-blocking, the connection may still be in progress when the call returns 0: wait until the socket is
/// writable, then read SO_ERROR. With TCP_FASTOPEN_CONNECT, the connection may begin with the first data.
/// Replies, ICMP errors and datagrams of third parties are as described in tp_connect_from(). With IP_TOS or
/// IPV6_TCLASS set before, the connection has the client's DSCP from the first packet on (docs/dscp.md in the
/// source).
///
/// @param fd      the caller's socket, which stays the caller's, also if the call fails.
/// @param src     struct sockaddr_in or sockaddr_in6, in network byte order, as for tp_connect_from().
/// @param srclen  size of src in bytes.
/// @param dst     address to connect to, of the same family as src, in the same form.
/// @param dstlen  size of dst in bytes.
/// @param flags   TP_CONNECT_KEEP_PORT or TP_CONNECT_SAME_PORT, and TP_CONNECT_DATA_FOLLOWS (stream sockets
///                only), or 0.
/// @return 0, or -1 with errno:
///   EFAULT           src or dst is NULL
///   EINVAL           srclen or dstlen does not fit its address family
///   EINVAL           flags has an unknown bit, or TP_NONBLOCK or TP_CONNECT_DGRAM
///   EINVAL           TP_CONNECT_DATA_FOLLOWS is given, and the socket is a datagram socket
///   EINVAL           TP_CONNECT_SAME_PORT is given together with TP_CONNECT_KEEP_PORT, or the port in src
///                    is 0
///   EINVAL           src is multicast or 255.255.255.255, or src or dst is unspecified
///   EINVAL           the socket is bound already, listens, or is connecting
///   EISCONN          the socket is connected already
///   EAFNOSUPPORT     a family is neither AF_INET nor AF_INET6, or src and dst differ in family
///   EAFNOSUPPORT     the addresses are IPv6 and the socket is AF_INET, or they are IPv4 and the socket is
///                    IPv6-only
///   ESOCKTNOSUPPORT  the socket is neither a stream socket nor a datagram socket
///   EBADF            fd is not an open descriptor
///   ENOTSOCK         fd is not a socket
///   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
///   EADDRINUSE       with TP_CONNECT_SAME_PORT: another socket has the address and port of src
///   EADDRINUSE       with TP_CONNECT_SAME_PORT or TP_CONNECT_KEEP_PORT: the addresses and ports of src and
///                    dst have a connection (or one in TIME_WAIT)
///   EACCES           with TP_CONNECT_SAME_PORT: the port is below 1024, without CAP_NET_BIND_SERVICE
///   EADDRNOTAVAIL    no port of src is free for dst
///   EINTR            a signal interrupted the wait; the kernel goes on connecting, as after connect(2)
///   EINPROGRESS      the socket is blocking, and its SO_SNDTIMEO has passed; the kernel goes on connecting
///   ECONNREFUSED, ETIMEDOUT, ENETUNREACH, EHOSTUNREACH
///                    as for connect(2); its other errors, and those of bind(2), are possible too
///
/// State after a failure: if the call fails before connect(2), the socket is as it was, including
/// IP_TRANSPARENT. After connect(2) has failed (EADDRNOTAVAIL, EADDRINUSE of a connection, EINTR,
/// EINPROGRESS, ECONNREFUSED and the errors named beside it), the socket stays transparent and bound to src.
/// A program may call connect(2) again, from the same source; tp_connect_socket() then fails with EINVAL. For
/// another source, close the socket and create another.
///
/// TP_CONNECT_KEEP_PORT: a bound socket cannot change its port. Where tp_connect_from() connects from another
/// port because src and dst have a connection already, this call fails with EADDRINUSE. Call it again with a
/// new socket and without the flag.
///
/// System calls: getsockname; getsockopt(SO_TYPE); getsockopt and setsockopt of IP_TRANSPARENT, of
/// IP_BIND_ADDRESS_NO_PORT (stream sockets; with a source port SO_REUSEADDR) and with
/// TP_CONNECT_DATA_FOLLOWS of TCP_QUICKACK, where setsockopt is left out if the option is set; bind; connect.
/// getsockopt(IPV6_V6ONLY) if an AF_INET6 socket connects to an IPv4 address; fcntl if the connection is in
/// progress; a recv for a datagram socket.
///
/// Thread-safe.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_connect_socket(
    fd: c_int,
    src: *const sockaddr,
    srclen: socklen_t,
    dst: *const sockaddr,
    dstlen: socklen_t,
    flags: u32,
) -> c_int {
    guard(|| {
        check_connect_flags(flags, 0)?;
        // SAFETY: by the caller's word.
        let src = unsafe { arg::address("src", src, srclen) }?;
        // SAFETY: by the caller's word.
        let dst = unsafe { arg::address("dst", dst, dstlen) }?;
        // SAFETY: the caller's descriptor, open during the call.
        socket::connect_socket(unsafe { arg::fd(fd) }?, src, dst, connect_options(flags))?;
        Ok(0)
    })
}

/// Accepts a connection, and returns the client's address and the original destination.
///
/// Does what accept4(2) and tp_orig_dst() do, in one call. Both addresses are of the listener's family: an
/// IPv4 connection of an AF_INET6 listener is reported v4-mapped (tp_unmap_addr() converts it).
///
/// TP_ACCEPT_TPROXY: the listener is transparent (tp_listen(), tp_set_transparent()), so the accepted socket
/// has the original destination as its local address, and is not asked whether it is transparent. Do not use
/// this flag with TP_RULES_REDIRECT: the result would be the listener's own address.
///
/// A connection that was accepted and whose original destination cannot be found is closed. A client can
/// cause this only with a listener that is not transparent, by connecting to it directly (ENOENT): a program
/// that gets ENOENT calls tp_accept() again.
///
/// @param listener     listening stream socket of family AF_INET or AF_INET6.
/// @param client       buffer for the client's address, in network byte order, or NULL.
/// @param clientlen    size of client in bytes; on success the size of the address. Ignored if client is
///                     NULL.
/// @param orig_dst     buffer for the original destination, in network byte order.
/// @param orig_dstlen  size of orig_dst in bytes; on success the size of the address. A short buffer is
///                     EINVAL; an address is never truncated. A struct sockaddr_storage is always enough.
/// @param flags        TP_ACCEPT_TPROXY and TP_NONBLOCK, or 0.
/// @return descriptor of the connection, close-on-exec, which the caller closes, or -1 with errno and with
///         the buffers and sizes unchanged:
///   EFAULT        orig_dst or orig_dstlen is NULL, or clientlen is NULL and client is not
///   EINVAL        flags has an unknown bit, or the socket does not listen
///   EINVAL        a buffer is too small: a connection is accepted and closed, unless the buffer is too small
///                 for an IPv4 address
///   EBADF         listener is not an open descriptor
///   ENOTSOCK      listener is not a socket
///   EOPNOTSUPP    listener is not a stream socket
///   EAGAIN        the listener is non-blocking, and no connection waits
///   EINTR         a signal interrupted the wait
///   ECONNABORTED  the connection ended before it was accepted
///   EMFILE        the descriptor limit of the process is reached
///   ENFILE        the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM
///                 not enough memory
///   ENOENT        the connection was not intercepted: its socket is not transparent, and connection
///                 tracking has no REDIRECT or DNAT of it; the connection is closed
///   EAFNOSUPPORT  the listener's family is neither AF_INET nor AF_INET6; the connection is closed
///
/// Other errors of accept(2) are possible too.
///
/// System calls: accept4 and getsockname with TP_ACCEPT_TPROXY; otherwise accept4, getsockopt and
/// getsockname, and one more getsockopt if the socket is not transparent.
///
/// Thread-safe.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_accept(
    listener: c_int,
    client: *mut sockaddr,
    clientlen: *mut socklen_t,
    orig_dst: *mut sockaddr,
    orig_dstlen: *mut socklen_t,
    flags: u32,
) -> c_int {
    guard_hot(|| {
        let flags = arg::flags(flags, TP_NONBLOCK | TP_ACCEPT_TPROXY)?;
        let options =
            AcceptOptions { nonblocking: flags & TP_NONBLOCK != 0, transparent: flags & TP_ACCEPT_TPROXY != 0 };
        let Some(to_out) = AddressOut::new(orig_dst, orig_dstlen) else {
            return Err(arg::no_place("orig_dst", orig_dst));
        };
        let from_out = AddressOut::new(client, clientlen);
        if !client.is_null() && clientlen.is_null() {
            return Err(arg::no_place("client", client));
        }
        // SAFETY: by the caller's word.
        unsafe {
            to_out.check_room_for_any()?;
            if let Some(out) = &from_out {
                out.check_room_for_any()?;
            }
        }
        let (mut from, mut to) = (KernelAddr::NONE, KernelAddr::NONE);
        // SAFETY: the caller's descriptor, open during the call.
        let listener = unsafe { arg::fd(listener) }?;
        let socket = accept::accept_into(listener, from_out.is_some().then_some(&mut from), &mut to, options)?;
        // SAFETY: by the caller's word. Nothing is written unless there is room for both.
        unsafe {
            if let Some(out) = &from_out {
                out.check_room(&from)?;
            }
            if let Some(Err(needed)) = to.with_ref(|to| to_out.write(to)) {
                return Err(to_out.too_little(needed));
            }
            if let Some(out) = &from_out {
                from.with_ref(|from| out.write(from));
            }
        }
        Ok(socket.into_raw_fd())
    })
}

/// Returns the destination that an accepted connection had before it was intercepted.
///
/// Works for both kinds of interception. A transparent socket (TPROXY) has the original destination as
/// its local address. For any other socket, connection tracking is queried (SO_ORIGINAL_DST: REDIRECT,
/// DNAT). Connection tracking is never queried for a transparent socket, because it may hold the entry
/// of a different connection. For a connection made directly to a transparent listener, the result is
/// the listener's own address, to which the client connected.
///
/// @param fd       stream socket from accept(2).
/// @param addr     buffer for the address, in network byte order and of the socket's family: an IPv4
///                 connection of an AF_INET6 listener is reported v4-mapped.
/// @param addrlen  size of addr in bytes; on success the size of the address. A short buffer is
///                 EINVAL; the address is never truncated. A struct sockaddr_storage is always enough.
/// @return 0, or -1 with errno and with addr and addrlen unchanged:
///   EFAULT        addr or addrlen is NULL
///   EINVAL        the buffer is too small
///   ENOENT        the socket is not transparent, and connection tracking has no REDIRECT or DNAT of it
///   ENOTCONN      the socket is bound to the wildcard address, or not bound: it was not accepted
///   EBADF         fd is not an open descriptor
///   ENOTSOCK      fd is not a socket
///   EAFNOSUPPORT  the socket's family is neither AF_INET nor AF_INET6
///
/// System calls: getsockopt and getsockname; one more getsockopt if the socket is not transparent.
///
/// Thread-safe.
///
/// @since 0.1.0
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

/// Converts a v4-mapped address to the IPv4 address that it stands for.
///
/// ::ffff:a.b.c.d in a struct sockaddr_in6 becomes a.b.c.d in a struct sockaddr_in, in place, with the same
/// port. The bytes after it are set to zero, up to the size that the struct sockaddr_in6 had. Any other IPv4
/// or IPv6 address is unchanged. AF_INET6 sockets that also serve IPv4 report v4-mapped addresses
/// (tp_accept(), tp_orig_dst(), tp_recv_datagrams()); a program that compares or prints addresses converts
/// them first.
///
/// @param addr     struct sockaddr_in or sockaddr_in6.
/// @param addrlen  size of addr in bytes; becomes sizeof(struct sockaddr_in) if the address is converted.
/// @return 0, or -1 with errno and with addr and addrlen unchanged:
///   EFAULT  addr or addrlen is NULL
///   EINVAL  addr is not an IPv4 or IPv6 address, or addrlen does not fit its family
///
/// System calls: none.
///
/// Thread-safe.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_unmap_addr(addr: *mut sockaddr, addrlen: *mut socklen_t) -> c_int {
    guard_uncancellable(|| {
        let Some(place) = AddressOut::new(addr, addrlen) else { return Err(arg::no_place("addr", addr)) };
        // SAFETY: by the caller's word.
        unsafe { place.unmap() }?;
        Ok(0)
    })
}
