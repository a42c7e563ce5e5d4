//! The error type of this library: an errno value for the program and a
//! message for the operator.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::io;
use std::net::SocketAddr;

use crate::address::KernelAddr;
use crate::errno::Errno;
use crate::sys;

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Error with an errno value and a message: the failed operation, the cause, and a fix if one is known.
///
/// Creating a frequent error (EAGAIN of a receive call) allocates nothing. The message is formatted when it is displayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(Repr);

/// Only two words: every function of this crate passes errors on, and few create one.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Repr {
    /// The message; `None`: its allocation failed.
    Sentence { errno: i32, sentence: Option<Box<Cow<'static, str>>> },
    /// A failed system call on a socket, with the errno of the kernel. The addresses are omitted if their allocation failed.
    Socket { errno: i32, step: SocketOp, endpoints: Option<Box<Endpoints>> },
}

/// The failed system call on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketOp {
    Create,
    DualStack,
    OnlyV6,
    Transparent,
    ReportOrigDst,
    BindAddressNoPort,
    ReuseAddress,
    ReusePort,
    DelayAck,
    Bind,
    Listen,
    Connect,
    Accept,
    Inspect,
    Receive,
    Prepare,
}

/// The addresses of the failed call, if it had any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Endpoints {
    pub local: Option<KernelAddr>,
    pub remote: Option<KernelAddr>,
}

impl Error {
    /// Creates an error with a fixed message.
    #[cold]
    #[inline(never)]
    pub(crate) fn new(errno: i32, sentence: &'static str) -> Self {
        Error::of_sentence(errno, Cow::Borrowed(sentence))
    }

    /// Creates an error with a formatted message.
    #[cold]
    #[inline(never)]
    pub(crate) fn with(errno: i32, sentence: fmt::Arguments<'_>) -> Self {
        let mut text = Text::default();
        // If an allocation fails, the message ends there.
        let _ = text.write_fmt(sentence);
        Error::of_sentence(errno, Cow::Owned(text.0))
    }

    fn of_sentence(errno: i32, sentence: Cow<'static, str>) -> Self {
        let sentence = Some(sentence).filter(|sentence| !sentence.is_empty());
        Error(Repr::Sentence { errno, sentence: sentence.and_then(|sentence| sys::try_box(sentence).ok()) })
    }

    /// Creates an EOPNOTSUPP error: this build lacks a feature.
    #[cfg(not(all(feature = "check", feature = "self-test", feature = "iptables")))]
    pub(crate) fn lacks(feature: &str) -> Self {
        Error::with(
            libc::EOPNOTSUPP,
            format_args!("this build of libtproxy lacks feature `{feature}`: install a build that has it"),
        )
    }

    /// Creates an ENOMEM error.
    #[cold]
    #[inline(never)]
    pub(crate) fn no_memory() -> Self {
        Error(Repr::Sentence { errno: libc::ENOMEM, sentence: None })
    }

    /// Creates an EINVAL error.
    pub(crate) fn invalid(sentence: &'static str) -> Self {
        Error::new(libc::EINVAL, sentence)
    }

    /// Creates an EINVAL error with a formatted message.
    pub(crate) fn invalid_with(sentence: fmt::Arguments<'_>) -> Self {
        Error::with(libc::EINVAL, sentence)
    }

    /// Creates an error from the failed operation and its cause.
    #[cold]
    #[inline(never)]
    pub(crate) fn io(what: fmt::Arguments<'_>, cause: Errno) -> Self {
        Error::with(cause.0, format_args!("{what}: {cause}"))
    }

    /// Creates an error from a failed system call on a socket.
    pub(crate) fn socket(step: SocketOp, endpoints: Endpoints, cause: impl Into<Errno>) -> Self {
        Error::of_socket(step, endpoints, cause.into())
    }

    #[cold]
    #[inline(never)]
    fn of_socket(step: SocketOp, endpoints: Endpoints, Errno(errno): Errno) -> Self {
        let endpoints = Some(endpoints)
            .filter(|endpoints| *endpoints != Endpoints::default())
            .and_then(|endpoints| sys::try_box(endpoints).ok());
        Error(Repr::Socket { errno, step, endpoints })
    }

    /// Adds the error of a failed rollback, if the rollback failed.
    #[cold]
    #[inline(never)]
    pub(crate) fn after(self, undoing: Result<()>) -> Self {
        match undoing {
            Ok(()) => self,
            Err(other) => {
                Error::with(self.errno(), format_args!("{self}; the completed steps could not be undone: {other}"))
            }
        }
    }

    /// Returns the errno value, as in `errno(3)`.
    ///
    /// ```
    /// let error = "192.0.2.0/33".parse::<tproxy::rules::Prefix>().unwrap_err();
    /// assert_eq!(error.errno(), 22); // EINVAL
    /// println!("{error}");
    /// ```
    pub fn errno(&self) -> i32 {
        match self.0 {
            Repr::Sentence { errno, .. } | Repr::Socket { errno, .. } => errno,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Sentence { sentence: Some(sentence), .. } => f.write_str(sentence),
            Repr::Sentence { errno: libc::ENOMEM, sentence: None } => {
                f.write_str("not enough memory: free memory, or raise the limit of the process (ulimit -v, memory.max)")
            }
            Repr::Sentence { errno, sentence: None } => {
                write!(f, "{}; not enough memory for the rest of the message", Errno(*errno))
            }
            Repr::Socket { errno, step, endpoints } => {
                f.write_str(step.call())?;
                let endpoints = endpoints.as_deref().copied().unwrap_or_default();
                if let Some(local) = endpoints.local {
                    write!(f, " from {}", SocketAddr::from(local))?;
                }
                if let Some(remote) = endpoints.remote {
                    write!(f, " to {}", SocketAddr::from(remote))?;
                }
                write!(f, ": {}", Errno(*errno))?;
                match step.fix(*errno) {
                    Some(fix) => write!(f, "; {fix}"),
                    None => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    /// Keeps the errno, as [`io::Error::raw_os_error`]. The message is lost, because an `io::Error` has only one of both.
    ///
    /// ```
    /// let error = tproxy::rules::Listener::at("[::]:0".parse()?, tproxy::rules::Protocol::Tcp).unwrap_err();
    /// assert!(error.to_string().contains("no port"));
    /// assert_eq!(std::io::Error::from(error).raw_os_error(), Some(22)); // EINVAL
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn from(error: Error) -> io::Error {
        io::Error::from_raw_os_error(error.errno())
    }
}

impl SocketOp {
    fn call(self) -> &'static str {
        match self {
            SocketOp::Create => "socket()",
            SocketOp::DualStack => "setsockopt(IPV6_V6ONLY, 0)",
            SocketOp::OnlyV6 => "setsockopt(IPV6_V6ONLY, 1)",
            SocketOp::Transparent => "setsockopt(IP_TRANSPARENT, 1)",
            SocketOp::ReportOrigDst => "setsockopt(IP_RECVORIGDSTADDR, 1)",
            SocketOp::BindAddressNoPort => "setsockopt(IP_BIND_ADDRESS_NO_PORT, 1)",
            SocketOp::ReuseAddress => "setsockopt(SO_REUSEADDR, 1)",
            SocketOp::ReusePort => "setsockopt(SO_REUSEPORT, 1)",
            SocketOp::DelayAck => "setsockopt(TCP_QUICKACK, 0)",
            SocketOp::Bind => "bind()",
            SocketOp::Listen => "listen()",
            SocketOp::Connect => "connect()",
            SocketOp::Accept => "accept()",
            SocketOp::Inspect => "reading the socket",
            SocketOp::Receive => "receiving datagrams",
            SocketOp::Prepare => "preparing the reply socket",
        }
    }

    /// Returns a fix for the operator.
    fn fix(self, errno: i32) -> Option<&'static str> {
        Some(match (self, errno) {
            (SocketOp::Transparent, libc::EPERM) => {
                "IP_TRANSPARENT needs CAP_NET_RAW or CAP_NET_ADMIN in the user namespace that owns this network \
                 namespace: run as root, or start the program with the capability by systemd's \
                 `AmbientCapabilities=CAP_NET_RAW` or `setpriv --inh-caps=+net_raw --ambient-caps=+net_raw PROGRAM`"
            }
            (SocketOp::Create, libc::EAFNOSUPPORT) => {
                "this kernel does not support the address family (IPv6 may be disabled at boot, or not be built in)"
            }
            (SocketOp::Create | SocketOp::Accept, libc::EMFILE) => {
                "the process is at its descriptor limit: raise `ulimit -n` (RLIMIT_NOFILE)"
            }
            (SocketOp::Create | SocketOp::Accept, libc::ENFILE) => {
                "the system is at its descriptor limit: raise sysctl fs.file-max"
            }
            (SocketOp::Create, libc::EPERM | libc::EACCES) => {
                "raw sockets need CAP_NET_RAW; for other sockets, a security module or a seccomp filter refuses the call"
            }
            (SocketOp::Bind, libc::EACCES) => {
                "ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
            }
            (SocketOp::Bind, libc::EADDRINUSE) => "another socket uses this address and port (`ss -tulnp` shows it)",
            (SocketOp::Bind, libc::EAFNOSUPPORT) => "the address and the socket are of different families",
            (SocketOp::Bind, libc::EINVAL) => {
                "the socket is already bound, or the address is link-local and has no scope id"
            }
            (SocketOp::Listen, libc::EADDRINUSE) => {
                "another socket listens on this address and port (`ss -tlnp` shows it)"
            }
            (SocketOp::Connect, libc::EADDRNOTAVAIL) => {
                "all ports of the source address are in use for connections to this destination (widen \
                 net.ipv4.ip_local_port_range)"
            }
            (SocketOp::Connect, libc::EADDRINUSE) => {
                "these addresses and ports have a connection already, or one in TIME_WAIT (`ss -tan` shows it); another \
                 port needs another socket"
            }
            (SocketOp::Connect, libc::EINPROGRESS) => {
                "the socket's send timeout (SO_SNDTIMEO) has passed, and the kernel goes on trying to connect"
            }
            (SocketOp::Accept, libc::EINVAL) => "the socket does not listen: call listen(2) first",
            (SocketOp::Connect, libc::ENETUNREACH) => "this host has no route to the destination (see `ip route get`)",
            (SocketOp::Connect, libc::ETIMEDOUT) => {
                "if the destination is up, its replies to the source address may not pass through this host, or no rule \
                 diverts them to the socket (tp_install_rules)"
            }
            _ => return None,
        })
    }
}

/// A growing text. Writing fails if an allocation fails.
#[derive(Debug, Default)]
pub(crate) struct Text(pub String);

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.try_reserve(text.len()).map_err(|_| fmt::Error)?;
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_error_names_call_endpoints_cause_and_fix() {
        let addr = |text: &str| KernelAddr::from(text.parse::<SocketAddr>().unwrap());
        let endpoints = Endpoints { local: Some(addr("192.0.2.1:0")), remote: Some(addr("[2001:db8::1]:80")) };
        let error = Error::socket(SocketOp::Connect, endpoints, Errno(libc::ENETUNREACH));
        assert_eq!(error.errno(), libc::ENETUNREACH);
        assert_eq!(
            error.to_string(),
            "connect() from 192.0.2.1:0 to [2001:db8::1]:80: Network is unreachable; this host has no route to \
             the destination (see `ip route get`)"
        );
    }

    #[test]
    fn io_error_keeps_errno_and_kind() {
        let error = io::Error::from(Error::new(libc::EADDRINUSE, "taken"));
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
