//! Accepting an intercepted connection together with its original destination.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::Socket;

use crate::address::KernelAddr;
use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::{orig_dst, sys};

/// How [`accept`] accepts. Each method changes one option and returns the options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "each method returns the changed options"]
pub struct AcceptOptions {
    pub(crate) nonblocking: bool,
    pub(crate) transparent: bool,
}

impl AcceptOptions {
    /// A blocking socket, of a listener of any kind.
    pub fn new() -> AcceptOptions {
        AcceptOptions::default()
    }

    /// Makes the accepted socket non-blocking.
    pub fn nonblocking(mut self, yes: bool) -> AcceptOptions {
        self.nonblocking = yes;
        self
    }

    /// Says that the listener is transparent (TPROXY), so that the accepted socket need not be asked.
    ///
    /// For any other listener the original destination would be the listener's own address.
    pub fn transparent(mut self, yes: bool) -> AcceptOptions {
        self.transparent = yes;
        self
    }
}

/// An intercepted connection.
#[derive(Debug)]
#[non_exhaustive]
pub struct Accepted {
    /// The connection to the client.
    pub socket: Socket,
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub orig_dst: SocketAddr,
}

/// Accepts a connection, and finds its original destination as [`orig_dst()`](crate::orig_dst()) does.
///
/// A connection whose original destination cannot be found is closed. The addresses are of the listener's family: an IPv6
/// listener reports IPv4 addresses v4-mapped.
///
/// ```no_run
/// use tproxy::socket::{ListenOptions, listen};
/// use tproxy::{AcceptOptions, accept};
///
/// let listener = listen("[::]:3129".parse()?, ListenOptions::new())?;
/// let accepted = accept(&listener, AcceptOptions::new().transparent(true))?;
/// println!("{} wants {}", accepted.client, accepted.orig_dst);
/// let client = std::net::TcpStream::from(accepted.socket);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn accept(listener: impl AsFd, options: AcceptOptions) -> Result<Accepted> {
    let (mut client, mut to) = (KernelAddr::NONE, KernelAddr::NONE);
    let socket = accept_into(listener.as_fd(), Some(&mut client), &mut to, options)?;
    Ok(Accepted { socket, client: client.into(), orig_dst: to.into() })
}

/// As [`accept`], for the caller to whom its time matters: the addresses in place.
#[inline(always)]
pub(crate) fn accept_into(
    listener: BorrowedFd<'_>,
    client: Option<&mut KernelAddr>,
    to: &mut KernelAddr,
    options: AcceptOptions,
) -> Result<Socket> {
    let socket = sys::accept(listener, client, options.nonblocking).map_err(failed)?;
    if options.transparent {
        orig_dst::find_of_transparent(socket.as_fd(), to)?;
    } else {
        orig_dst::find(socket.as_fd(), to)?;
    }
    Ok(socket.into())
}

#[cold]
#[inline(never)]
fn failed(errno: sys::Errno) -> Error {
    Error::socket(SocketOp::Accept, Endpoints::default(), errno)
}
