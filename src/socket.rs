//! Transparent sockets: bind, listen and connect with addresses that this host
//! does not own.
//!
//! A socket is transparent if `IP_TRANSPARENT` is set (`ip(7)`), which needs
//! CAP_NET_RAW or CAP_NET_ADMIN. Both levels (SOL_IP, SOL_IPV6) set the same
//! flag, which both families use.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::address::{KernelAddr, canonical};
use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::sys;

/// Options of [`listen`]. Each method changes one option and returns the options.
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
    pub(crate) only_v6: bool,
    pub(crate) backlog: Option<u32>,
}

impl ListenOptions {
    /// Creates the default options: a blocking socket that does not share its port.
    pub fn new() -> ListenOptions {
        ListenOptions::default()
    }

    /// Makes the listening socket non-blocking.
    pub fn nonblocking(mut self, yes: bool) -> ListenOptions {
        self.nonblocking = yes;
        self
    }

    /// Lets several listeners share the port (SO_REUSEPORT); the kernel distributes the connections.
    pub fn reuse_port(mut self, yes: bool) -> ListenOptions {
        self.reuse_port = yes;
        self
    }

    /// Creates a socket that serves only IPv6 (IPV6_V6ONLY). The address must then be an IPv6 address.
    pub fn only_v6(mut self, yes: bool) -> ListenOptions {
        self.only_v6 = yes;
        self
    }

    /// Sets the number of connections that may wait to be accepted; by default as many as the system allows
    /// (net.core.somaxconn).
    pub fn backlog(mut self, connections: u32) -> ListenOptions {
        self.backlog = Some(connections);
        self
    }
}

/// Options of [`connect_from`] and [`connect_socket`]. Each method changes one option and returns the options.
///
/// ```
/// use tproxy::socket::{ConnectOptions, SourcePort};
///
/// let options = ConnectOptions::new().nonblocking(true).port(SourcePort::Keep);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "each method returns the changed options"]
pub struct ConnectOptions {
    pub(crate) nonblocking: bool,
    pub(crate) port: SourcePort,
    pub(crate) datagram: bool,
    pub(crate) data_follows: bool,
}

impl ConnectOptions {
    /// Creates the default options: a blocking stream socket, and any source port.
    pub fn new() -> ConnectOptions {
        ConnectOptions::default()
    }

    /// Makes the socket non-blocking: the connection may still be in progress when the socket is returned.
    ///
    /// Not for [`connect_socket`]: the caller's socket has its own mode.
    pub fn nonblocking(mut self, yes: bool) -> ConnectOptions {
        self.nonblocking = yes;
        self
    }

    /// Sets how the source port is chosen. The default is [`SourcePort::Any`].
    pub fn port(mut self, port: SourcePort) -> ConnectOptions {
        self.port = port;
        self
    }

    /// Creates a UDP socket that is connected to the destination, and receives only from there.
    ///
    /// Not for [`connect_socket`]: the caller's socket has its own type.
    pub fn datagram(mut self, yes: bool) -> ConnectOptions {
        self.datagram = yes;
        self
    }

    /// The caller will send data immediately: delays the final ACK of the handshake so that it carries the data.
    pub fn data_follows(mut self, yes: bool) -> ConnectOptions {
        self.data_follows = yes;
        self
    }
}

/// Choice of the source port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourcePort {
    /// Any port that is free for the destination.
    #[default]
    Any,
    /// The port of the source address if it is available, otherwise any port.
    Keep,
    /// The port of the source address, or `EADDRINUSE`.
    Same,
}

/// Creates a transparent, close-on-exec socket (`socket(2)`).
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
    make_once(domain, kind, protocol, false)
}

/// Like [`make`], as one function without inlining, for callers that are not hot.
#[inline(never)]
fn make_once(domain: Domain, kind: Type, protocol: Option<Protocol>, only_v6: bool) -> Result<Socket> {
    make(domain, kind, protocol, only_v6)
}

/// Like [`socket()`], inlined into hot callers.
#[inline(always)]
pub(crate) fn make(domain: Domain, kind: Type, protocol: Option<Protocol>, only_v6: bool) -> Result<Socket> {
    if domain != Domain::IPV4 && domain != Domain::IPV6 {
        return Err(Error::with(
            libc::EAFNOSUPPORT,
            format_args!("address family {}: only AF_INET and AF_INET6 can be transparent", i32::from(domain)),
        ));
    }
    let base = base_type(kind);
    let socket = open(domain, kind, protocol)?;
    if domain == Domain::IPV6 && base != Type::RAW {
        let step = if only_v6 { SocketOp::OnlyV6 } else { SocketOp::DualStack };
        socket.set_only_v6(only_v6).map_err(|e| Error::socket(step, Endpoints::default(), e))?;
    }
    make_transparent(&socket, domain)?;
    if base == Type::DGRAM {
        report_orig_dst(socket.as_fd(), domain)?;
    }
    Ok(socket)
}

/// Makes an existing socket transparent.
///
/// A datagram socket then also reports original destinations. Nothing else
/// changes, such as whether an IPv6 socket is dual-stack.
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

/// Binds a socket to any address, whether this host owns it or not (`bind(2)`).
///
/// Makes the socket transparent first. A stream socket that is bound to port 0
/// gets its port when it connects or listens, not immediately, so that one address
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

/// Creates a listening transparent stream socket.
///
/// An IPv6 socket is dual-stack, unless [`ListenOptions::only_v6`] is set. SO_REUSEADDR is set, so that a restarted
/// program need not wait until its old connections have ended.
///
/// ```no_run
/// use tproxy::socket::{ListenOptions, listen};
///
/// let listener: std::net::TcpListener = listen("[::]:3129".parse()?, ListenOptions::new())?.into();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn listen(addr: SocketAddr, options: ListenOptions) -> Result<Socket> {
    if options.only_v6 && canonical(addr).is_ipv4() {
        return Err(Error::invalid(
            "a socket that serves IPv6 only cannot listen on an IPv4 address, nor on a v4-mapped address",
        ));
    }
    let socket = make_once(Domain::for_address(addr), stream_type(options.nonblocking), None, options.only_v6)?;
    let addr = KernelAddr::from(addr);
    let ends = Endpoints { local: Some(addr), remote: None };
    reuse_address(&socket, &addr)?;
    if options.reuse_port {
        socket.set_reuse_port(true).map_err(|e| Error::socket(SocketOp::ReusePort, ends, e))?;
    }
    bind(&socket, &addr)?;
    // The kernel interprets the backlog as unsigned, and limits it to net.core.somaxconn (`__sys_listen`).
    let backlog = options.backlog.map_or(-1, |backlog| i32::try_from(backlog).unwrap_or(i32::MAX));
    socket.listen(backlog).map_err(|e| Error::socket(SocketOp::Listen, ends, e))?;
    Ok(socket)
}

/// Connects to `dst` with the source address `src`.
///
/// [`ConnectOptions::port`] selects the source port. v4-mapped addresses are used as IPv4 addresses.
///
/// ```no_run
/// use tproxy::socket::{ConnectOptions, SourcePort, connect_from};
///
/// let options = ConnectOptions::new().port(SourcePort::Keep);
/// let server = connect_from("192.0.2.7:40000".parse()?, "198.51.100.2:80".parse()?, options)?;
/// let server = std::net::TcpStream::from(server);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn connect_from(src: SocketAddr, dst: SocketAddr, options: ConnectOptions) -> Result<Socket> {
    connect_between(&mut src.into(), &mut dst.into(), options)
}

/// Like [`connect_from`], inlined into hot callers. The addresses are changed to
/// those of `bind` and `connect`.
#[inline(always)]
pub(crate) fn connect_between(src: &mut KernelAddr, dst: &mut KernelAddr, options: ConnectOptions) -> Result<Socket> {
    check_ends(src, dst)?;
    match options.port {
        SourcePort::Any => connect_from_any(src, dst, options),
        _ => connect_from_port(src, dst, &options),
    }
}

/// Converts v4-mapped addresses to IPv4, and refuses pairs of addresses that no connection can have.
#[inline(always)]
fn check_ends(src: &mut KernelAddr, dst: &mut KernelAddr) -> Result<()> {
    src.make_canonical();
    dst.make_canonical();
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(Error::new(libc::EAFNOSUPPORT, "the source and the destination are of different address families"));
    }
    if src.is_unspecified() || src.is_multicast() || src.is_broadcast() || dst.is_unspecified() {
        return Err(not_of_one_host(src));
    }
    Ok(())
}

/// Refuses a source without a port if the options require it.
fn check_port(src: &KernelAddr, options: ConnectOptions) -> Result<()> {
    if options.port == SourcePort::Same && src.port() == 0 {
        return Err(Error::invalid("the source has port 0, and the connection shall come from the source's own port"));
    }
    Ok(())
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

/// Connects from the port of the source address. If it is not available and [`SourcePort::Keep`] allows it, connects from any port.
///
/// Options are passed by reference, so that calls from any port do not pack them.
#[cold]
#[inline(never)]
fn connect_from_port(src: &mut KernelAddr, dst: &KernelAddr, options: &ConnectOptions) -> Result<Socket> {
    let options = *options;
    check_port(src, options)?;
    if src.port() == 0 {
        return connect_from_any(src, dst, options);
    }
    let socket = open_towards(dst, options)?;
    // Connections from one client port to several servers share the address and port.
    reuse_address(&socket, src)?;
    match bind(&socket, src) {
        Err(e) if may_take_another_port(&e, options) => {
            src.set_port(0);
            bind_to_any(&socket, src, options)?;
        }
        bound => bound?,
    }
    match connect(socket, src, dst, options) {
        // Bound, but a connection (or one in TIME_WAIT) has the same addresses and ports.
        Err(e) if e.errno() == libc::EADDRNOTAVAIL && src.port() != 0 => match options.port {
            SourcePort::Same => Err(pair_in_use(src, dst)),
            _ => connect_from_any(src, dst, options),
        },
        done => done,
    }
}

/// Whether `bind(2)` failed because of the port, so that another port may be tried.
fn may_take_another_port(error: &Error, options: ConnectOptions) -> bool {
    options.port != SourcePort::Same && [libc::EADDRINUSE, libc::EACCES].contains(&error.errno())
}

/// `connect(2)` of a socket that is bound to a port fails with EADDRNOTAVAIL if the addresses and ports of both ends are in
/// use (`__inet_hash_connect`, net/ipv4/inet_hashtables.c).
#[cold]
fn pair_in_use(src: &KernelAddr, dst: &KernelAddr) -> Error {
    let ends = Endpoints { local: Some(*src), remote: Some(*dst) };
    Error::socket(SocketOp::Connect, ends, sys::Errno(libc::EADDRINUSE))
}

/// Connects an existing socket, on which the caller may have set options, like [`connect_from`].
///
/// The socket must be an unbound stream or datagram socket. An IPv6 socket that is not IPv6-only also connects between
/// IPv4 addresses. If the call fails before `connect(2)`, the socket is unchanged. After `connect(2)` has failed, the socket
/// stays transparent and bound, and cannot be given to this call again.
///
/// On a non-blocking socket, the connection may still be in progress when the call returns. With [`SourcePort::Keep`], a port
/// that already has a connection to `dst` is `EADDRINUSE`: a bound socket cannot change its port.
///
/// ```no_run
/// use tproxy::socket::{ConnectOptions, connect_socket};
/// use tproxy::socket2::{Domain, Socket, Type};
///
/// let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
/// socket.set_mark(7)?;
/// connect_socket(&socket, "192.0.2.7:0".parse()?, "198.51.100.2:80".parse()?, ConnectOptions::new())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn connect_socket(fd: impl AsFd, src: SocketAddr, dst: SocketAddr, options: ConnectOptions) -> Result<()> {
    if options.nonblocking || options.datagram {
        return Err(Error::invalid("the mode and the type of a socket that exists are the socket's own"));
    }
    let (mut src, mut dst) = (KernelAddr::from(src), KernelAddr::from(dst));
    check_ends(&mut src, &mut dst)?;
    check_port(&src, options)?;
    let fd = fd.as_fd();
    let options = ConnectOptions { datagram: prepare_ends(fd, &mut src, &mut dst)? == Type::DGRAM, ..options };
    if options.datagram && options.data_follows {
        return Err(Error::invalid("data_follows is for stream sockets"));
    }
    bind_given(fd, &mut src, options)?;
    let ends = Endpoints { local: Some(src), remote: Some(dst) };
    match sys::connect(fd, &dst) {
        Ok(true) if options.datagram => drain_early_datagrams(&SockRef::from(&fd)),
        Ok(true) => {}
        // On a blocking socket, it means that SO_SNDTIMEO has expired (socket(7)).
        Ok(false) if SockRef::from(&fd).nonblocking().unwrap_or(true) => {}
        Ok(false) => return Err(Error::socket(SocketOp::Connect, ends, sys::Errno(libc::EINPROGRESS))),
        Err(sys::Errno(libc::EADDRNOTAVAIL)) if src.port() != 0 && !options.datagram => {
            return Err(pair_in_use(&src, &dst));
        }
        Err(e) => return Err(Error::socket(SocketOp::Connect, ends, e)),
    }
    Ok(())
}

/// Returns the type of a caller's socket, and converts the addresses to its family. Refuses a socket that cannot be connected. Does
/// not change the socket.
fn prepare_ends(fd: BorrowedFd<'_>, src: &mut KernelAddr, dst: &mut KernelAddr) -> Result<Type> {
    let failed = |e: sys::Errno| Error::socket(SocketOp::Inspect, Endpoints::default(), e);
    let mut own = KernelAddr::NONE;
    sys::local_addr(fd, &mut own).map_err(failed)?;
    if !own.is_ipv4() && !own.is_ipv6() {
        return Err(other_family(own.family().unwrap_or(libc::AF_UNSPEC)));
    }
    if own.is_ipv4() && src.is_ipv6() {
        return Err(Error::new(libc::EAFNOSUPPORT, "the socket is an AF_INET socket, and the addresses are IPv6"));
    }
    let kind = Type::from(sys::getsockopt_int(fd, libc::SOL_SOCKET, libc::SO_TYPE).map_err(failed)?);
    if kind != Type::STREAM && kind != Type::DGRAM {
        return Err(Error::new(libc::ESOCKTNOSUPPORT, "the socket is neither a stream socket nor a datagram socket"));
    }
    if !own.is_unspecified() || own.port() != 0 {
        return Err(if SockRef::from(&fd).peer_addr().is_ok() {
            Error::new(libc::EISCONN, "the socket is already connected")
        } else {
            Error::invalid(
                "the socket is bound already: give one on which bind(2), listen(2) or connect(2) was not called",
            )
        });
    }
    if own.is_ipv6() && src.is_ipv4() {
        if sys::getsockopt_int(fd, libc::SOL_IPV6, libc::IPV6_V6ONLY).map_err(failed)? != 0 {
            return Err(Error::new(
                libc::EAFNOSUPPORT,
                "the socket is IPv6-only (IPV6_V6ONLY), and the addresses are of IPv4",
            ));
        }
        src.map_to_family(Some(libc::AF_INET6));
        dst.map_to_family(Some(libc::AF_INET6));
    }
    Ok(kind)
}

/// Makes a caller's socket transparent and binds it. On failure, the socket is unchanged. Afterwards, port 0 in `src` means that
/// `connect(2)` chooses the port.
fn bind_given(fd: BorrowedFd<'_>, src: &mut KernelAddr, options: ConnectOptions) -> Result<()> {
    let socket = SockRef::from(&fd);
    let (level, name) = transparent_option(if src.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 });
    let transparent = ChangedOption::set(fd, SocketOp::Transparent, level, name, 1)?;
    let delayed = if options.data_follows {
        Some(ChangedOption::set(fd, SocketOp::DelayAck, libc::SOL_TCP, libc::TCP_QUICKACK, 0)?)
    } else {
        None
    };
    if options.port != SourcePort::Any && src.port() != 0 {
        let reused = ChangedOption::set(fd, SocketOp::ReuseAddress, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        match bind(&socket, src) {
            Err(e) if may_take_another_port(&e, options) => drop(reused),
            bound => {
                bound?;
                reused.keep();
                delayed.into_iter().for_each(ChangedOption::keep);
                transparent.keep();
                return Ok(());
            }
        }
    }
    src.set_port(0);
    let without_port = if options.datagram {
        None
    } else {
        match ChangedOption::set(fd, SocketOp::BindAddressNoPort, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1) {
            // Linux before 4.2; Multipath TCP before Linux 6.10.
            Err(e) if [libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&e.errno()) => None,
            set => Some(set?),
        }
    };
    bind(&socket, src)?;
    [Some(transparent), delayed, without_port].into_iter().flatten().for_each(ChangedOption::keep);
    Ok(())
}

/// A changed option of a caller's socket, which is restored when the value is dropped.
struct ChangedOption<'a> {
    fd: BorrowedFd<'a>,
    level: i32,
    name: i32,
    /// `None`: nothing to restore.
    before: Option<i32>,
}

impl<'a> ChangedOption<'a> {
    fn set(fd: BorrowedFd<'a>, step: SocketOp, level: i32, name: i32, value: i32) -> Result<ChangedOption<'a>> {
        let failed = |e| Error::socket(step, Endpoints::default(), e);
        let before = sys::getsockopt_int(fd, level, name).map_err(failed)?;
        if before == value {
            return Ok(ChangedOption { fd, level, name, before: None });
        }
        sys::setsockopt_int(fd, level, name, value).map_err(failed)?;
        Ok(ChangedOption { fd, level, name, before: Some(before) })
    }

    fn keep(mut self) {
        self.before = None;
    }
}

impl Drop for ChangedOption<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // The kernel accepts the former value.
            let _ = sys::setsockopt_int(self.fd, self.level, self.name, before);
        }
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
    // For a datagram socket, the destination does not matter for the choice of the port.
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

/// Discards datagrams that arrived between `bind` and `connect`, when the socket
/// received from any sender: the caller would mistake them for the server's.
/// Usually makes one `recv` call. (A datagram that another CPU is delivering at
/// that moment may still arrive.)
fn drain_early_datagrams(socket: &Socket) {
    /// More datagrams than a receive buffer holds, so that a server that sends continuously does not block the call.
    const MANY: usize = 65_536;
    for _ in 0..MANY {
        let read = socket.recv_with_flags(&mut [], libc::MSG_DONTWAIT).map_err(sys::Errno::from);
        if read == Err(sys::Errno(libc::EAGAIN)) {
            break;
        }
    }
}

/// Returns the type of a socket without the flags of `socket(2)`.
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

/// Returns the address family of a caller's socket, if it can be transparent.
fn domain_of(fd: BorrowedFd<'_>) -> Result<Domain> {
    let domain = SockRef::from(&fd).domain().map_err(|e| Error::socket(SocketOp::Inspect, Endpoints::default(), e))?;
    if domain == Domain::IPV4 || domain == Domain::IPV6 { Ok(domain) } else { Err(other_family(domain.into())) }
}

#[cold]
fn other_family(family: i32) -> Error {
    Error::with(
        libc::EAFNOSUPPORT,
        format_args!("the descriptor is a socket of address family {family}, not IPv4 or IPv6"),
    )
}

#[inline(always)]
pub(crate) fn make_transparent(socket: &Socket, domain: Domain) -> Result<()> {
    let (level, option) = transparent_option(domain);
    sys::setsockopt_int(socket.as_fd(), level, option, 1)
        .map_err(|e| Error::socket(SocketOp::Transparent, Endpoints::default(), e))
}

/// Returns the level and the name of the option.
#[inline(always)]
fn transparent_option(domain: Domain) -> (i32, i32) {
    match domain {
        Domain::IPV6 => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
        _ => (libc::SOL_IP, libc::IP_TRANSPARENT),
    }
}

fn reuse_address(socket: &Socket, addr: &KernelAddr) -> Result<()> {
    sys::setsockopt_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
        .map_err(|e| Error::socket(SocketOp::ReuseAddress, Endpoints { local: Some(*addr), remote: None }, e))
}

/// Enables original destinations for received datagrams. An IPv6 socket needs both levels, because it receives IPv4 too.
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

/// Binds the address without a port. `connect` chooses the port, and has more ports available because it knows the destination.
#[inline(always)]
fn bind_without_port(socket: &Socket, addr: &KernelAddr) -> Result<()> {
    match sys::setsockopt_int(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1) {
        // Before Linux 4.2, `bind` chooses the port, from fewer ports.
        Err(e) if e != sys::Errno(libc::ENOPROTOOPT) => {
            Err(Error::socket(SocketOp::BindAddressNoPort, Endpoints { local: Some(*addr), remote: None }, e))
        }
        _ => bind(socket, addr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_options_are_set_by_their_methods() {
        let listen = ListenOptions::new();
        assert_eq!(listen.nonblocking(true), ListenOptions { nonblocking: true, ..listen });
        assert_eq!(listen.reuse_port(true), ListenOptions { reuse_port: true, ..listen });
        assert_eq!(listen.only_v6(true), ListenOptions { only_v6: true, ..listen });
        assert_eq!(listen.backlog(7), ListenOptions { backlog: Some(7), ..listen });
        let connect = ConnectOptions::new();
        assert_eq!(connect.nonblocking(true), ConnectOptions { nonblocking: true, ..connect });
        assert_eq!(connect.port(SourcePort::Keep), ConnectOptions { port: SourcePort::Keep, ..connect });
        assert_eq!(connect.datagram(true), ConnectOptions { datagram: true, ..connect });
        assert_eq!(connect.data_follows(true), ConnectOptions { data_follows: true, ..connect });
    }

    #[test]
    fn bind_nonlocal_of_other_family_says_how_to_give_the_address() {
        for (domain, addr, words) in [
            (Domain::IPV6, "192.0.2.1:80", "v4-mapped"),
            (Domain::IPV4, "[2001:db8::1]:80", "an AF_INET6 address on an AF_INET socket"),
        ] {
            let socket = Socket::new(domain, Type::STREAM, None).unwrap();
            let error = bind_nonlocal(&socket, addr.parse().unwrap()).unwrap_err();
            assert!(error.errno() == libc::EAFNOSUPPORT && error.to_string().contains(words), "{error}");
        }
    }

    /// Each of them is said in its own words.
    #[test]
    fn connect_from_addresses_of_no_host_is_refused() {
        let good: SocketAddr = "192.0.2.1:80".parse().unwrap();
        for (src, dst, words) in [
            ("0.0.0.0:1", "192.0.2.1:80", "the source is 0.0.0.0 or ::"),
            ("[::]:1", "[2001:db8::1]:80", "the source is 0.0.0.0 or ::"),
            ("224.0.0.1:1", "192.0.2.1:80", "the source is a multicast address"),
            ("255.255.255.255:1", "192.0.2.1:80", "255.255.255.255, which no answer can go to"),
            ("[ff02::1]:1", "[2001:db8::1]:80", "the source is a multicast address"),
            ("192.0.2.7:1", "0.0.0.0:80", "the destination is 0.0.0.0 or ::"),
            ("[2001:db8::7]:1", "[::]:80", "the destination is 0.0.0.0 or ::"),
        ] {
            let error = connect_from(src.parse().unwrap(), dst.parse().unwrap(), ConnectOptions::new()).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
            assert!(error.to_string().contains(words), "{src} {dst}: {error}");
        }
        let same = ConnectOptions::new().port(SourcePort::Same);
        let error = connect_from("192.0.2.7:0".parse().unwrap(), good, same).unwrap_err();
        assert!(error.errno() == libc::EINVAL && error.to_string().contains("port 0"), "{error}");
        // The socket's own mode and type.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        for options in [ConnectOptions::new().nonblocking(true), ConnectOptions::new().datagram(true)] {
            let error = connect_socket(&socket, "192.0.2.7:1".parse().unwrap(), good, options).unwrap_err();
            assert!(error.errno() == libc::EINVAL && error.to_string().contains("socket's own"), "{error}");
        }
    }
}
