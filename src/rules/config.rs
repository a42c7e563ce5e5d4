//! What a caller config for, in values that cannot be misread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use socket2::{Domain, SockRef, Type};

use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::model::{Backend, Families, Mode, PortRange, Protocol, Protocols};
use crate::prefix::Prefix;
use crate::sys;

/// The config: what to intercept, and for whom. A default value asks for what most want.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The instance; empty: "tproxy". Its table is called "libtproxy-" and this.
    pub name: String,
    /// The listeners that get what is intercepted.
    pub listeners: Vec<Listener>,
    /// How they get it.
    pub mode: Mode,
    /// What the kernel is told it by.
    pub backend: Backend,
    /// Intercept the host's own traffic too. What comes from transparent sockets is exempt, so that a proxy whose
    /// upstream sockets are transparent never intercepts itself.
    pub local_output: bool,
    /// Without a listener let traffic pass by, instead of dropping it.
    pub fail_open: bool,
    /// Leave connections alone that are made straight to the listener, instead of dropping them.
    pub allow_direct: bool,
    /// Keep what is intercepted out of connection tracking.
    pub notrack: bool,
    /// The rules outlive the process.
    pub persist: bool,
    /// Only these protocols; both `false`: those of the listeners.
    pub protocols: Protocols,
    /// Only these families; both `false`: those of the listeners.
    pub families: Families,
    /// The bits of a packet's mark that say "ours"; 0: [`Mark::DEFAULT`](crate::model::Mark::DEFAULT).
    pub mark: u32,
    /// The bits of the mark that are ours to set; 0: all, or with a default mark those of
    /// [`Mark::DEFAULT`](crate::model::Mark::DEFAULT).
    pub mark_mask: u32,
    /// The routing table; 0: one that is free.
    pub table: u32,
    /// The preference of the first of four routing policy rules; 0: one that is free.
    pub priority: u32,
    /// Destination ports to intercept; none: all.
    pub ports: Vec<PortRange>,
    /// Destinations to intercept; none: all but those that are the host's own, or nobody's.
    pub dst: Vec<Prefix>,
    /// Sources to intercept; none: all.
    pub src: Vec<Prefix>,
    /// Destinations never to intercept.
    pub bypass: Vec<Prefix>,
    /// Names of the interfaces by which forwarded traffic comes in; none: all.
    pub interfaces: Vec<String>,
}

/// A listening socket, as far as rules need to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// What it listens for.
    pub protocol: Protocol,
    /// The families whose connections it gets.
    pub families: Families,
    /// The address that it is bound to; `None`: every address.
    pub addr: Option<IpAddr>,
    /// The port that it is bound to.
    pub port: u16,
}

impl Listener {
    /// Reads all of it off a live socket.
    ///
    /// The socket must be a TCP or UDP socket of IPv4 or IPv6 that is bound to a port, listens if it is TCP, and is
    /// transparent unless the mode is [`Mode::Redirect`]; else the error says which of these it is not.
    pub fn from_fd(fd: impl AsFd, mode: Mode) -> Result<Listener> {
        let fd = fd.as_fd();
        let failed = |e| Error::socket(SocketOp::Inspect, Endpoints::default(), e);
        let unknown = |e: io::Error| failed(e.into());
        let socket = SockRef::from(&fd);
        let domain = socket.domain().map_err(unknown)?;
        if domain != Domain::IPV4 && domain != Domain::IPV6 {
            return Err(Error::invalid("it is not a socket of IPv4 or IPv6"));
        }
        let protocol = match socket.r#type().map_err(unknown)? {
            Type::STREAM => Protocol::Tcp,
            Type::DGRAM => Protocol::Udp,
            _ => return Err(Error::invalid("it is neither a stream nor a datagram socket")),
        };
        let transparent = sys::getsockopt_int(fd, libc::SOL_IP, libc::IP_TRANSPARENT).map_err(failed)? != 0;
        if !transparent && mode != Mode::Redirect {
            return Err(Error::invalid(
                "it is not transparent, so the kernel would never give it an intercepted packet: make it with \
                 tp_listen or tp_socket, or call tp_set_transparent before bind",
            ));
        }
        if transparent && mode == Mode::Redirect {
            return Err(Error::invalid(
                "it is transparent, and tp_orig_dst would take its connections for TPROXY's: TP_RULES_REDIRECT needs \
                 a listener made with socket, bind and listen",
            ));
        }
        let local = socket.local_addr().map_err(unknown)?.as_socket();
        let local = local.ok_or_else(|| Error::invalid("it has no address of IPv4 or IPv6"))?;
        if local.port() == 0 {
            return Err(Error::invalid("it is not bound to a port"));
        }
        let listens = || sys::getsockopt_int(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN).map_err(failed);
        if protocol == Protocol::Tcp && listens()? == 0 {
            return Err(Error::invalid("it does not listen: call listen first"));
        }
        let dual_stack = domain == Domain::IPV6 && !socket.only_v6().map_err(unknown)?;
        Ok(Listener::new(local, protocol, dual_stack))
    }

    /// A listener in another process; `[::]` serves both families.
    pub fn at(addr: SocketAddr, protocol: Protocol) -> Result<Listener> {
        if addr.port() == 0 {
            return Err(Error::invalid("listen_addr: it has no port"));
        }
        Ok(Listener::new(addr, protocol, true))
    }

    fn new(local: SocketAddr, protocol: Protocol, dual_stack: bool) -> Listener {
        let (families, addr) = match local.ip().to_canonical() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => (Families { v4: dual_stack, v6: true }, None),
            // `::ffff:0.0.0.0` is every IPv4 address.
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => (Families { v4: true, v6: false }, None),
            ip @ IpAddr::V4(_) => (Families { v4: true, v6: false }, Some(ip)),
            ip @ IpAddr::V6(_) => (Families { v4: false, v6: true }, Some(ip)),
        };
        Listener { protocol, families, addr, port: local.port() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_listener_address_gives_its_families() {
        let at = |ip: &str, dual| {
            let listener = Listener::new(SocketAddr::new(ip.parse().unwrap(), 1), Protocol::Tcp, dual);
            (listener.families.v4, listener.families.v6, listener.addr.map(|a| a.to_string()))
        };
        assert_eq!(at("0.0.0.0", false), (true, false, None));
        assert_eq!(at("::", true), (true, true, None));
        assert_eq!(at("::", false), (false, true, None));
        assert_eq!(at("::ffff:0.0.0.0", true), (true, false, None));
        assert_eq!(at("::ffff:127.0.0.1", true), (true, false, Some("127.0.0.1".to_owned())));
        assert_eq!(at("::1", true), (false, true, Some("::1".to_owned())));
    }
}
