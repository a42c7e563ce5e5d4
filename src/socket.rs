//! Transparent sockets: bind, listen and connect with addresses that this host
//! does not own.
//!
//! "Transparent" is the kernel's `IP_TRANSPARENT` (`ip(7)`); it needs
//! CAP_NET_RAW or CAP_NET_ADMIN. Setting it at either level (SOL_IP, SOL_IPV6)
//! sets the one flag that both families look at.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::address::KernelAddr;
use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::sys;

/// How [`listen`] makes its socket. Each method changes one option and returns the options.
///
/// ```
/// use tproxy::socket::ListenOptions;
///
/// let options = ListenOptions::new().nonblocking(true).reuse_port(true);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "each method returns the changed options"]
pub struct ListenOptions {
    pub(crate) nonblocking: bool,
    pub(crate) reuse_port: bool,
    pub(crate) backlog: Option<u32>,
}

impl ListenOptions {
    /// A blocking socket that has its port to itself.
    pub fn new() -> ListenOptions {
        ListenOptions::default()
    }

    /// Makes the listening socket non-blocking.
    pub fn nonblocking(mut self, yes: bool) -> ListenOptions {
        self.nonblocking = yes;
        self
    }

    /// Lets several listeners share the port (SO_REUSEPORT); the kernel spreads the connections.
    pub fn reuse_port(mut self, yes: bool) -> ListenOptions {
        self.reuse_port = yes;
        self
    }

    /// Sets the number of connections that may wait to be accepted; by default as many as the system allows
    /// (net.core.somaxconn).
    pub fn backlog(mut self, connections: u32) -> ListenOptions {
        self.backlog = Some(connections);
        self
    }
}

/// How [`connect_from`] connects. Each method changes one option and returns the options.
///
/// ```
/// use tproxy::socket::ConnectOptions;
///
/// let options = ConnectOptions::new().nonblocking(true).keep_port(true);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "each method returns the changed options"]
pub struct ConnectOptions {
    pub(crate) nonblocking: bool,
    pub(crate) keep_port: bool,
    pub(crate) datagram: bool,
    pub(crate) data_follows: bool,
}

impl ConnectOptions {
    /// A blocking stream socket, from any port of the source.
    pub fn new() -> ConnectOptions {
        ConnectOptions::default()
    }

    /// Makes the socket non-blocking: the connection may still be in progress when the socket is returned.
    pub fn nonblocking(mut self, yes: bool) -> ConnectOptions {
        self.nonblocking = yes;
        self
    }

    /// Tries the source's own port first, and another port if that one is in use or not permitted.
    pub fn keep_port(mut self, yes: bool) -> ConnectOptions {
        self.keep_port = yes;
        self
    }

    /// Makes a UDP socket that is connected to the destination, and receives only from there.
    pub fn datagram(mut self, yes: bool) -> ConnectOptions {
        self.datagram = yes;
        self
    }

    /// Says that the caller will send at once: the final ACK of the handshake is delayed, to carry the data.
    pub fn data_follows(mut self, yes: bool) -> ConnectOptions {
        self.data_follows = yes;
        self
    }
}

/// `socket(2)`, transparent and close-on-exec.
///
/// An IPv6 stream or datagram socket is dual-stack; a datagram socket also
/// reports original destinations (`IP_RECVORIGDSTADDR`,
/// `IPV6_RECVORIGDSTADDR`).
///
/// ```no_run
/// use tproxy::socket2::{Domain, Type};
///
/// let socket = tproxy::socket::socket(Domain::IPV6, Type::DGRAM, None)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn socket(domain: Domain, kind: Type, protocol: Option<Protocol>) -> Result<Socket> {
    make(domain, kind, protocol)
}

/// As [`socket()`], for the caller to whom its time matters.
#[inline(always)]
pub(crate) fn make(domain: Domain, kind: Type, protocol: Option<Protocol>) -> Result<Socket> {
    if domain != Domain::IPV4 && domain != Domain::IPV6 {
        return Err(Error::with(
            libc::EAFNOSUPPORT,
            format_args!("address family {}: only AF_INET and AF_INET6 can be transparent", i32::from(domain)),
        ));
    }
    let base = base_type(kind);
    let socket = open(domain, kind, protocol)?;
    if domain == Domain::IPV6 && base != Type::RAW {
        socket.set_only_v6(false).map_err(|e| Error::socket(SocketOp::DualStack, Endpoints::default(), e))?;
    }
    make_transparent(&socket, domain)?;
    if base == Type::DGRAM {
        report_orig_dst(socket.as_fd(), domain)?;
    }
    Ok(socket)
}

/// Makes a socket transparent that the caller has already.
///
/// A datagram socket also reports original destinations from now on. Nothing
/// else about the socket changes: whether an IPv6 socket is dual-stack stays
/// as it is.
///
/// ```no_run
/// let socket = std::net::UdpSocket::bind("[::]:3053")?;
/// tproxy::socket::set_transparent(&socket)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn set_transparent(fd: impl AsFd) -> Result<()> {
    let fd = fd.as_fd();
    let socket = SockRef::from(&fd);
    let domain = domain_of(fd)?;
    let kind = socket.r#type().map_err(|e| Error::socket(SocketOp::Inspect, Endpoints::default(), e))?;
    make_transparent(&socket, domain)?;
    if kind == Type::DGRAM {
        report_orig_dst(fd, domain)?;
    }
    Ok(())
}

/// `bind(2)` to any address, whether this host owns it or not.
///
/// Makes the socket transparent first. A stream socket that is bound to port 0
/// gets its port when it connects (or listens), not now, so that one address
/// can hold more connections than there are ephemeral ports
/// (`IP_BIND_ADDRESS_NO_PORT`).
///
/// ```no_run
/// use tproxy::socket2::{Domain, Type};
///
/// let socket = tproxy::socket::socket(Domain::IPV4, Type::STREAM, None)?;
/// tproxy::socket::bind_nonlocal(&socket, "192.0.2.7:0".parse()?)?;
/// socket.connect(&"198.51.100.2:80".parse::<std::net::SocketAddr>()?.into())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn bind_nonlocal(fd: impl AsFd, addr: SocketAddr) -> Result<()> {
    let fd = fd.as_fd();
    let socket = SockRef::from(&fd);
    let domain = domain_of(fd)?;
    if domain != Domain::for_address(addr) {
        return Err(Error::new(
            libc::EAFNOSUPPORT,
            match domain {
                Domain::IPV6 => "an AF_INET address on an AF_INET6 socket: give it v4-mapped (::ffff:a.b.c.d)",
                _ => "an AF_INET6 address on an AF_INET socket",
            },
        ));
    }
    make_transparent(&socket, domain)?;
    let is_stream = addr.port() == 0
        && socket.r#type().map_err(|e| Error::socket(SocketOp::Inspect, Endpoints::default(), e))? == Type::STREAM;
    let addr = addr.into();
    if is_stream { bind_without_port(&socket, &addr) } else { bind(&socket, &addr) }
}

/// A listening transparent stream socket.
///
/// An IPv6 socket is dual-stack. SO_REUSEADDR is set, so that a restarted
/// program need not wait for its old connections to end.
///
/// ```no_run
/// use tproxy::socket::{ListenOptions, listen};
///
/// let listener: std::net::TcpListener = listen("[::]:3129".parse()?, ListenOptions::new())?.into();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn listen(addr: SocketAddr, options: ListenOptions) -> Result<Socket> {
    let socket = socket(Domain::for_address(addr), stream_type(options.nonblocking), None)?;
    let addr = KernelAddr::from(addr);
    let ends = Endpoints { local: Some(addr), remote: None };
    reuse_address(&socket, &addr)?;
    if options.reuse_port {
        socket.set_reuse_port(true).map_err(|e| Error::socket(SocketOp::ReusePort, ends, e))?;
    }
    bind(&socket, &addr)?;
    // The kernel takes the backlog for an unsigned number, and no more than net.core.somaxconn (`__sys_listen`).
    let backlog = options.backlog.map_or(-1, |backlog| i32::try_from(backlog).unwrap_or(i32::MAX));
    socket.listen(backlog).map_err(|e| Error::socket(SocketOp::Listen, ends, e))?;
    Ok(socket)
}

/// Connects to `dst` so that the server sees the connection come from `src`.
///
/// The port of `src` counts only with [`ConnectOptions::keep_port`], and
/// another is taken when that one is in use (or, below 1024, not permitted).
/// v4-mapped addresses are taken as the IPv4 addresses that they stand for.
///
/// ```no_run
/// use tproxy::socket::{ConnectOptions, connect_from};
///
/// let options = ConnectOptions::new().keep_port(true);
/// let server = connect_from("192.0.2.7:40000".parse()?, "198.51.100.2:80".parse()?, options)?;
/// let server = std::net::TcpStream::from(server);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn connect_from(src: SocketAddr, dst: SocketAddr, options: ConnectOptions) -> Result<Socket> {
    connect_between(&mut src.into(), &mut dst.into(), options)
}

/// As [`connect_from`], for the caller to whom its time matters. The addresses
/// become what is bound and connected to.
#[inline(always)]
pub(crate) fn connect_between(src: &mut KernelAddr, dst: &mut KernelAddr, options: ConnectOptions) -> Result<Socket> {
    src.make_canonical();
    dst.make_canonical();
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(Error::new(libc::EAFNOSUPPORT, "the source and the destination are of different address families"));
    }
    if src.is_unspecified() || src.is_multicast() || src.is_broadcast() || dst.is_unspecified() {
        return Err(not_of_one_host(src));
    }
    if options.keep_port && src.port() != 0 {
        connect_from_port(src, dst, options)
    } else {
        connect_from_any(src, dst, options)
    }
}

#[cold]
#[inline(never)]
fn not_of_one_host(src: &KernelAddr) -> Error {
    Error::invalid(if src.is_unspecified() {
        "the source is 0.0.0.0 or ::, from which the kernel would connect with an address of this host: give the \
         address that the server shall see, or use connect(2)"
    } else if src.is_multicast() || src.is_broadcast() {
        "the source is a multicast address or 255.255.255.255, which no answer can go to: give a client's address"
    } else {
        "the destination is 0.0.0.0 or ::, which the kernel takes for this host: give the server's address"
    })
}

/// From the source's own port if it can be had, else from any.
#[inline(never)]
fn connect_from_port(src: &mut KernelAddr, dst: &KernelAddr, options: ConnectOptions) -> Result<Socket> {
    let socket = open_towards(dst, options)?;
    if !bind_to_port(&socket, src)? {
        src.set_port(0);
        bind_to_any(&socket, src, options)?;
    }
    match connect(socket, src, dst, options) {
        // Bound, but this very pair of ends has a connection (or one in TIME_WAIT) already.
        Err(e) if e.errno() == libc::EADDRNOTAVAIL && src.port() != 0 => connect_from_any(src, dst, options),
        done => done,
    }
}

#[inline(always)]
fn connect_from_any(src: &mut KernelAddr, dst: &KernelAddr, options: ConnectOptions) -> Result<Socket> {
    src.set_port(0);
    let socket = open_towards(dst, options)?;
    bind_to_any(&socket, src, options)?;
    connect(socket, src, dst, options)
}

#[inline(always)]
fn open_towards(dst: &KernelAddr, options: ConnectOptions) -> Result<Socket> {
    let domain = if dst.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let kind = if options.datagram { Type::DGRAM } else { Type::STREAM };
    let socket = open(domain, if options.nonblocking { kind.nonblocking() } else { kind }, None)?;
    make_transparent(&socket, domain)?;
    if options.data_follows {
        sys::setsockopt_int(socket.as_fd(), libc::SOL_TCP, libc::TCP_QUICKACK, 0)
            .map_err(|e| Error::socket(SocketOp::DelayAck, Endpoints::default(), e))?;
    }
    Ok(socket)
}

#[inline(always)]
fn bind_to_any(socket: &Socket, src: &KernelAddr, options: ConnectOptions) -> Result<()> {
    // A datagram socket's port is no freer for knowing the destination.
    if options.datagram { bind(socket, src) } else { bind_without_port(socket, src) }
}

#[inline(always)]
fn connect(socket: Socket, src: &KernelAddr, dst: &KernelAddr, options: ConnectOptions) -> Result<Socket> {
    let failed = |e| Error::socket(SocketOp::Connect, Endpoints { local: Some(*src), remote: Some(*dst) }, e);
    let connected = sys::connect(socket.as_fd(), dst).map_err(failed)?;
    if connected && options.datagram {
        drain_early_datagrams(&socket);
    }
    Ok(socket)
}

/// Whether the very port of an address could be had.
fn bind_to_port(socket: &Socket, addr: &KernelAddr) -> Result<bool> {
    // Connections of one client port to several servers share the address and port.
    reuse_address(socket, addr)?;
    match bind(socket, addr) {
        Err(e) if [libc::EADDRINUSE, libc::EACCES].contains(&e.errno()) => Ok(false),
        bound => bound.map(|()| true),
    }
}

/// Drops what came between `bind` and `connect`: the socket was everybody's
/// then, and who reads from it takes all for the server's. One `recv`, as a
/// rule. (What another processor has under way at that moment may still come.)
fn drain_early_datagrams(socket: &Socket) {
    /// More than a receive buffer holds; a server that does not stop talking is none of them.
    const MANY: usize = 65_536;
    for _ in 0..MANY {
        let read = socket.recv_with_flags(&mut [], libc::MSG_DONTWAIT).map_err(sys::Errno::from);
        if read == Err(sys::Errno(libc::EAGAIN)) {
            break;
        }
    }
}

/// The kind of socket without the flags that `socket(2)` lets ride along.
fn base_type(kind: Type) -> Type {
    Type::from(i32::from(kind) & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK))
}

fn stream_type(nonblocking: bool) -> Type {
    if nonblocking { Type::STREAM.nonblocking() } else { Type::STREAM }
}

#[inline(always)]
pub(crate) fn open(domain: Domain, kind: Type, protocol: Option<Protocol>) -> Result<Socket> {
    sys::socket(domain.into(), kind.cloexec().into(), protocol.map_or(0, i32::from))
        .map(Socket::from)
        .map_err(|e| Error::socket(SocketOp::Create, Endpoints::default(), e))
}

/// The address family of a caller's descriptor, if it is one that can be transparent.
fn domain_of(fd: BorrowedFd<'_>) -> Result<Domain> {
    let domain = SockRef::from(&fd).domain().map_err(|e| Error::socket(SocketOp::Inspect, Endpoints::default(), e))?;
    if domain == Domain::IPV4 || domain == Domain::IPV6 {
        Ok(domain)
    } else {
        Err(Error::with(
            libc::EAFNOSUPPORT,
            format_args!("the descriptor is a socket of address family {}, not IPv4 or IPv6", i32::from(domain)),
        ))
    }
}

#[inline(always)]
pub(crate) fn make_transparent(socket: &Socket, domain: Domain) -> Result<()> {
    let (level, option) = match domain {
        Domain::IPV6 => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
        _ => (libc::SOL_IP, libc::IP_TRANSPARENT),
    };
    sys::setsockopt_int(socket.as_fd(), level, option, 1)
        .map_err(|e| Error::socket(SocketOp::Transparent, Endpoints::default(), e))
}

fn reuse_address(socket: &Socket, addr: &KernelAddr) -> Result<()> {
    sys::setsockopt_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
        .map_err(|e| Error::socket(SocketOp::ReuseAddress, Endpoints { local: Some(*addr), remote: None }, e))
}

/// Original destinations with every datagram; an IPv6 socket needs both levels, since it gets IPv4 too.
#[inline(always)]
fn report_orig_dst(fd: BorrowedFd<'_>, domain: Domain) -> Result<()> {
    let failed = |e: sys::Errno| Error::socket(SocketOp::ReportOrigDst, Endpoints::default(), e);
    if domain == Domain::IPV6 {
        sys::setsockopt_int(fd, libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR, 1).map_err(failed)?;
    }
    sys::setsockopt_int(fd, libc::SOL_IP, libc::IP_RECVORIGDSTADDR, 1).map_err(failed)
}

#[inline(always)]
pub(crate) fn bind(socket: &Socket, addr: &KernelAddr) -> Result<()> {
    sys::bind(socket.as_fd(), addr)
        .map_err(|e| Error::socket(SocketOp::Bind, Endpoints { local: Some(*addr), remote: None }, e))
}

/// Binds the address and leaves the port to `connect`, which knows the destination and so has more to choose from.
#[inline(always)]
fn bind_without_port(socket: &Socket, addr: &KernelAddr) -> Result<()> {
    match sys::setsockopt_int(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1) {
        // Linux before 4.2: the port is chosen at once, from fewer.
        Err(e) if e != sys::Errno(libc::ENOPROTOOPT) => {
            Err(Error::socket(SocketOp::BindAddressNoPort, Endpoints { local: Some(*addr), remote: None }, e))
        }
        _ => bind(socket, addr),
    }
}
