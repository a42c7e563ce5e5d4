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

/// Makes the new socket non-blocking (O_NONBLOCK). Flag of tp_listen() and tp_connect_from().
pub const TP_NONBLOCK: u32 = 0x1;
/// Lets several listeners share the address and port; the kernel distributes connections among them
/// (SO_REUSEPORT). Flag of tp_listen().
pub const TP_LISTEN_REUSEPORT: u32 = 0x2;
/// Connects from the port in src if it is available, otherwise from any port. Flag of tp_connect_from().
pub const TP_CONNECT_KEEP_PORT: u32 = 0x4;
/// Creates a UDP socket instead of a TCP socket. Flag of tp_connect_from().
pub const TP_CONNECT_DGRAM: u32 = 0x8;
/// The caller will send data immediately: delays the final ACK of the handshake so that it carries the
/// data. Flag of tp_connect_from().
pub const TP_CONNECT_DATA_FOLLOWS: u32 = 0x10;

/// Creates a transparent socket.
///
/// Works like socket(2) and sets IP_TRANSPARENT (ip(7)), so that the socket can bind to, listen on and
/// send from addresses that this host does not own. An AF_INET6 socket is dual-stack (IPV6_V6ONLY is
/// off): it also handles IPv4, as v4-mapped addresses. A SOCK_DGRAM socket also reports the original
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
        Ok(socket::make(Domain::from(domain), Type::from(r#type), protocol)?.into_raw_fd())
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
/// serves IPv6 and IPv4; one on 127.0.0.1 or ::1 is reached only by interception. SO_REUSEADDR is set, so
/// that a program can be restarted at once.
///
/// @param addr     struct sockaddr_in or sockaddr_in6, in network byte order. With port 0 the kernel
///                 chooses a port, which getsockname(2) reports.
/// @param addrlen  size of addr in bytes.
/// @param backlog  as for listen(2); if negative, the system's maximum (net.core.somaxconn) is used.
/// @param flags    TP_NONBLOCK and TP_LISTEN_REUSEPORT, or 0.
/// @return descriptor, which the caller closes, or -1 with errno:
///   EFAULT           addr is NULL
///   EINVAL           addrlen does not fit the address family, or flags has an unknown bit
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
        let flags = arg::flags(flags, TP_NONBLOCK | TP_LISTEN_REUSEPORT)?;
        // SAFETY: by the caller's word.
        let addr = unsafe { arg::address("addr", addr, addrlen) }?;
        let options = ListenOptions {
            nonblocking: flags & TP_NONBLOCK != 0,
            reuse_port: flags & TP_LISTEN_REUSEPORT != 0,
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
/// Source port: without TP_CONNECT_KEEP_PORT, any port that is free for this destination; the port in src
/// is ignored. With TP_CONNECT_KEEP_PORT, the port in src, unless it is 0, in use (EADDRINUSE or
/// EADDRNOTAVAIL) or not permitted (below 1024 without CAP_NET_BIND_SERVICE); then any port.
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
/// @param flags   TP_CONNECT_KEEP_PORT, TP_NONBLOCK, TP_CONNECT_DGRAM and TP_CONNECT_DATA_FOLLOWS, or 0.
/// @return connected socket, which the caller closes, or -1 with errno:
///   EFAULT           src or dst is NULL
///   EINVAL           srclen or dstlen does not fit its address family
///   EINVAL           flags has an unknown bit
///   EINVAL           TP_CONNECT_DATA_FOLLOWS is given together with TP_CONNECT_DGRAM
///   EINVAL           src is multicast or 255.255.255.255 (the broadcast address of a subnet is not refused)
///   EINVAL           src or dst is unspecified (0.0.0.0, ::, ::ffff:0.0.0.0): the kernel would use an
///                    address of this host, or connect to this host
///   EAFNOSUPPORT     a family is neither AF_INET nor AF_INET6, or src and dst differ in family
///   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
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
/// With TP_CONNECT_KEEP_PORT, SO_REUSEADDR is set in place of IP_BIND_ADDRESS_NO_PORT. With
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
