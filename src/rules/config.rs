//! What a caller asks for, in values that cannot be misread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use socket2::{Domain, SockRef, Type};

use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::model::{Backend, Families, IdRange, MacAddr, Mark, Mode, PortRange, Protocol, ProtocolPorts, Protocols};
use crate::prefix::Prefix;
use crate::sys;

/// Selects the traffic to intercept and the listeners that receive it.
///
/// [`Config::new`] intercepts TCP or UDP on every port, as the listeners are. Each method changes one setting and returns
/// the config. Lists narrow the selection: a list that is not set does not restrict anything, and an empty list selects
/// nothing.
///
/// ```
/// use tproxy::rules::{Backend, Config, Listener, Protocol};
///
/// let listener = Listener::at("[::]:3129".parse()?, Protocol::Tcp)?;
/// let config = Config::new([listener])
///     .name("web")
///     .backend(Backend::Nft)
///     .ports([80, 443])
///     .dst(["192.0.2.0/24".parse()?, "2001:db8::/32".parse()?])
///     .bypass(["192.0.2.1".parse()?]);
/// # let _ = config;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "each method returns the changed config"]
pub struct Config {
    pub(crate) name: Option<String>,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) mode: Mode,
    pub(crate) backend: Backend,
    pub(crate) local_output: bool,
    pub(crate) fail_open: bool,
    pub(crate) allow_direct: bool,
    pub(crate) notrack: bool,
    pub(crate) persist: bool,
    pub(crate) new_only: bool,
    pub(crate) local_servers: bool,
    pub(crate) protocols: Option<Protocols>,
    pub(crate) families: Option<Families>,
    pub(crate) mark: Option<Mark>,
    pub(crate) table: Option<u32>,
    pub(crate) priority: Option<u32>,
    pub(crate) ports: Option<Vec<ProtocolPorts>>,
    pub(crate) bypass_ports: Vec<ProtocolPorts>,
    pub(crate) reject_ports: Vec<ProtocolPorts>,
    pub(crate) dst: Option<Vec<Prefix>>,
    pub(crate) src: Option<Vec<Prefix>>,
    pub(crate) bypass: Option<Vec<Prefix>>,
    pub(crate) bypass_src: Option<Vec<Prefix>>,
    pub(crate) interfaces: Option<Vec<String>>,
    pub(crate) bypass_interfaces: Vec<String>,
    pub(crate) macs: Option<Vec<MacAddr>>,
    pub(crate) bypass_macs: Vec<MacAddr>,
    pub(crate) uids: Option<Vec<IdRange>>,
    pub(crate) bypass_uids: Vec<IdRange>,
    pub(crate) gids: Option<Vec<IdRange>>,
    pub(crate) bypass_gids: Vec<IdRange>,
    pub(crate) cgroups: Option<Vec<String>>,
    pub(crate) bypass_cgroups: Vec<String>,
    pub(crate) bypass_mark: Option<Mark>,
}

impl Config {
    /// Intercepts for these listeners; only [`Mode::DivertOnly`] can do without any.
    pub fn new(listeners: impl IntoIterator<Item = Listener>) -> Config {
        Config { listeners: listeners.into_iter().collect(), ..Config::default() }
    }

    /// Only delivers packets to existing transparent sockets, and intercepts nothing.
    ///
    /// ```no_run
    /// use tproxy::rules::{Config, Rules};
    ///
    /// let rules = Rules::install(&Config::divert_only())?;
    /// # Ok::<(), tproxy::Error>(())
    /// ```
    pub fn divert_only() -> Config {
        Config { mode: Mode::DivertOnly, ..Config::default() }
    }

    /// Sets the name of the instance, "tproxy" by default. Its table is called "libtproxy-" and this name.
    ///
    /// A name has 1 to 20 letters, digits, '_', '.' and '-' ('-' not first).
    pub fn name(mut self, name: impl Into<String>) -> Config {
        self.name = Some(name.into());
        self
    }

    /// Sets how packets reach the listeners, [`Mode::Tproxy`] by default.
    pub fn mode(mut self, mode: Mode) -> Config {
        self.mode = mode;
        self
    }

    /// Sets the backend, [`Backend::Auto`] by default.
    pub fn backend(mut self, backend: Backend) -> Config {
        self.backend = backend;
        self
    }

    /// Also intercepts traffic that this host sends.
    ///
    /// Packets from transparent sockets are exempt, so that a proxy whose upstream sockets are transparent never
    /// intercepts its own connections.
    pub fn local_output(mut self, yes: bool) -> Config {
        self.local_output = yes;
        self
    }

    /// Forwards traffic normally while no listener exists; by default it is dropped.
    pub fn fail_open(mut self, yes: bool) -> Config {
        self.fail_open = yes;
        self
    }

    /// Accepts packets addressed directly to a listener's address and port; by default they are dropped.
    pub fn allow_direct(mut self, yes: bool) -> Config {
        self.allow_direct = yes;
        self
    }

    /// Exempts intercepted packets from connection tracking.
    pub fn notrack(mut self, yes: bool) -> Config {
        self.notrack = yes;
        self
    }

    /// Keeps the rules when the process ends.
    pub fn persist(mut self, yes: bool) -> Config {
        self.persist = yes;
        self
    }

    /// Intercepts only TCP packets that begin a connection.
    ///
    /// A TCP packet that begins nothing and belongs to no socket is forwarded, not answered by a reset. UDP is not affected.
    pub fn new_only(mut self, yes: bool) -> Config {
        self.new_only = yes;
        self
    }

    /// Delivers replies of servers on this host to the transparent sockets that connected to them.
    pub fn local_servers(mut self, yes: bool) -> Config {
        self.local_servers = yes;
        self
    }

    /// Intercepts only these protocols; by default those of the listeners.
    pub fn protocols(mut self, protocols: Protocols) -> Config {
        self.protocols = Some(protocols);
        self
    }

    /// Intercepts only these families.
    ///
    /// By default those of the listeners are intercepted, and only IPv4 on a host that has no IPv6 address.
    pub fn families(mut self, families: Families) -> Config {
        self.families = Some(families);
        self
    }

    /// Sets the packet mark that routes a packet to a local socket, [`Mark::DEFAULT`] by default.
    ///
    /// A number stands for a mark of all 32 bits. With [`Config::local_output`] the mask must have a bit that the value
    /// does not have.
    pub fn mark(mut self, mark: impl Into<Mark>) -> Config {
        self.mark = Some(mark.into());
        self
    }

    /// Sets the number of the routing table that delivers packets to local sockets; by default a free table is used.
    pub fn table(mut self, table: u32) -> Config {
        self.table = Some(table);
        self
    }

    /// Sets the priority of the first of four routing policy rules, from 1 to 32762; by default free priorities are used.
    pub fn priority(mut self, priority: u32) -> Config {
        self.priority = Some(priority);
        self
    }

    /// Intercepts only these destination ports: numbers, or ranges such as `8000..=8100`, in any order.
    ///
    /// ```
    /// use tproxy::rules::{Config, PortRange};
    ///
    /// let config = Config::new([]).ports([80, 443]);
    /// let config = config.ports([PortRange::from(80), PortRange::from(8000..=8100)]);
    /// # let _ = config;
    /// ```
    pub fn ports(mut self, ports: impl IntoIterator<Item = impl Into<PortRange>>) -> Config {
        self.ports = Some(ports.into_iter().map(|range| range.into().into()).collect());
        self
    }

    /// Intercepts these destination ports of one protocol, besides those that [`Config::ports`] and earlier calls chose.
    ///
    /// Of a protocol for which no port is chosen, nothing is intercepted.
    ///
    /// ```
    /// use tproxy::rules::{Config, Protocol};
    ///
    /// let config = Config::new([]).ports_of(Protocol::Tcp, [80, 443]).ports_of(Protocol::Udp, [53]);
    /// # let _ = config;
    /// ```
    pub fn ports_of(mut self, protocol: Protocol, ports: impl IntoIterator<Item = impl Into<PortRange>>) -> Config {
        self.ports.get_or_insert_default().extend(of_protocol(protocol, ports));
        self
    }

    /// Never intercepts or rejects these destination ports, whatever [`Config::ports`] has.
    pub fn bypass_ports(mut self, ports: impl IntoIterator<Item = impl Into<PortRange>>) -> Config {
        self.bypass_ports = ports.into_iter().map(|range| range.into().into()).collect();
        self
    }

    /// Never intercepts or rejects these destination ports of one protocol, besides those of earlier calls.
    pub fn bypass_ports_of(
        mut self,
        protocol: Protocol,
        ports: impl IntoIterator<Item = impl Into<PortRange>>,
    ) -> Config {
        self.bypass_ports.extend(of_protocol(protocol, ports));
        self
    }

    /// Refuses packets to these destination ports instead of intercepting them: with a reset for TCP, and with an ICMP error
    /// (port unreachable) for UDP.
    ///
    /// The ports need not be among [`Config::ports`], nor the protocol among those of the listeners. Addresses,
    /// sources and interfaces select as for intercepted packets.
    pub fn reject_ports(mut self, ports: impl IntoIterator<Item = impl Into<PortRange>>) -> Config {
        self.reject_ports = ports.into_iter().map(|range| range.into().into()).collect();
        self
    }

    /// Refuses packets to these destination ports of one protocol, besides those of earlier calls.
    ///
    /// ```
    /// use tproxy::rules::{Config, Protocol};
    ///
    /// // Browsers fall back from QUIC to TCP at once.
    /// let config = Config::new([]).ports([80, 443]).reject_ports_of(Protocol::Udp, [443]);
    /// # let _ = config;
    /// ```
    pub fn reject_ports_of(
        mut self,
        protocol: Protocol,
        ports: impl IntoIterator<Item = impl Into<PortRange>>,
    ) -> Config {
        self.reject_ports.extend(of_protocol(protocol, ports));
        self
    }

    /// Intercepts only these destinations, even if they are this host's own addresses.
    ///
    /// By default every destination is intercepted except this host's own addresses, loopback, broadcast and multicast.
    pub fn dst(mut self, dst: impl IntoIterator<Item = Prefix>) -> Config {
        self.dst = Some(dst.into_iter().collect());
        self
    }

    /// Intercepts only packets from these sources.
    pub fn src(mut self, src: impl IntoIterator<Item = Prefix>) -> Config {
        self.src = Some(src.into_iter().collect());
        self
    }

    /// Never intercepts these destinations, whatever [`Config::dst`] has, nor their replies.
    pub fn bypass(mut self, bypass: impl IntoIterator<Item = Prefix>) -> Config {
        self.bypass = Some(bypass.into_iter().collect());
        self
    }

    /// Never intercepts packets from these sources, whatever [`Config::src`] has.
    pub fn bypass_src(mut self, src: impl IntoIterator<Item = Prefix>) -> Config {
        self.bypass_src = Some(src.into_iter().collect());
        self
    }

    /// Never intercepts traffic that arrives by an interface of one of these names; a trailing `*` makes a name a pattern.
    pub fn bypass_interfaces(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Config {
        self.bypass_interfaces = names.into_iter().map(Into::into).collect();
        self
    }

    /// Intercepts forwarded traffic only if it comes from these Ethernet addresses. Traffic that did not arrive by Ethernet
    /// is not intercepted then.
    pub fn macs(mut self, macs: impl IntoIterator<Item = MacAddr>) -> Config {
        self.macs = Some(macs.into_iter().collect());
        self
    }

    /// Never intercepts traffic from these Ethernet addresses.
    pub fn bypass_macs(mut self, macs: impl IntoIterator<Item = MacAddr>) -> Config {
        self.bypass_macs = macs.into_iter().collect();
        self
    }

    /// With [`Config::local_output`], intercepts this host's traffic only if its socket belongs to one of these users.
    ///
    /// ```
    /// use tproxy::rules::Config;
    ///
    /// let config = Config::new([]).local_output(true).uids([1000]).bypass_gids([65534..=65534]);
    /// # let _ = config;
    /// ```
    pub fn uids(mut self, uids: impl IntoIterator<Item = impl Into<IdRange>>) -> Config {
        self.uids = Some(uids.into_iter().map(Into::into).collect());
        self
    }

    /// Never intercepts traffic of this host whose socket belongs to one of these users.
    pub fn bypass_uids(mut self, uids: impl IntoIterator<Item = impl Into<IdRange>>) -> Config {
        self.bypass_uids = uids.into_iter().map(Into::into).collect();
        self
    }

    /// With [`Config::local_output`], intercepts this host's traffic only if its socket belongs to one of these groups.
    pub fn gids(mut self, gids: impl IntoIterator<Item = impl Into<IdRange>>) -> Config {
        self.gids = Some(gids.into_iter().map(Into::into).collect());
        self
    }

    /// Never intercepts traffic of this host whose socket belongs to one of these groups.
    pub fn bypass_gids(mut self, gids: impl IntoIterator<Item = impl Into<IdRange>>) -> Config {
        self.bypass_gids = gids.into_iter().map(Into::into).collect();
        self
    }

    /// With [`Config::local_output`], intercepts this host's traffic only if its socket is in one of these control groups or
    /// below: paths of cgroup v2, such as "system.slice/squid.service". They must exist. Needs Linux 5.13.
    pub fn cgroups(mut self, paths: impl IntoIterator<Item = impl Into<String>>) -> Config {
        self.cgroups = Some(paths.into_iter().map(Into::into).collect());
        self
    }

    /// Never intercepts traffic of this host whose socket is in one of these control groups or below.
    pub fn bypass_cgroups(mut self, paths: impl IntoIterator<Item = impl Into<String>>) -> Config {
        self.bypass_cgroups = paths.into_iter().map(Into::into).collect();
        self
    }

    /// Never intercepts traffic of this host whose packets have this mark (SO_MARK). A number stands for a mark of all 32
    /// bits.
    pub fn bypass_mark(mut self, mark: impl Into<Mark>) -> Config {
        self.bypass_mark = Some(mark.into());
        self
    }

    /// Intercepts forwarded traffic only if it arrives by an interface of one of these names.
    ///
    /// A trailing `*` makes a name a pattern: "ppp*" matches "ppp", "ppp0" and "ppp10". An empty list, with
    /// [`Config::local_output`], intercepts only what this host sends.
    pub fn interfaces(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Config {
        self.interfaces = Some(names.into_iter().map(Into::into).collect());
        self
    }
}

fn of_protocol(
    protocol: Protocol,
    ports: impl IntoIterator<Item = impl Into<PortRange>>,
) -> impl Iterator<Item = ProtocolPorts> {
    let protocols = Some(Protocols { tcp: protocol == Protocol::Tcp, udp: protocol == Protocol::Udp });
    ports.into_iter().map(move |range| ProtocolPorts { range: range.into(), protocols })
}

/// A listening socket, as far as rules need to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
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
    ///
    /// ```no_run
    /// use tproxy::rules::{Listener, Mode};
    /// use tproxy::socket::{ListenOptions, listen};
    ///
    /// let socket = listen("[::]:3129".parse()?, ListenOptions::new())?;
    /// let listener = Listener::from_fd(&socket, Mode::Tproxy)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use tproxy::rules::{Families, Listener, Protocol};
    ///
    /// let listener = Listener::at("[::]:3129".parse()?, Protocol::Udp)?;
    /// assert_eq!((listener.families, listener.port), (Families::ALL, 3129));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
