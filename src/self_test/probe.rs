//! The probes: a connection and a datagram, their destinations, and their results.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use super::network::Network;
use crate::address::canonical;
use crate::error::{Error, Result};
use crate::model::{Family, Mode, PortRange, Protocol};
use crate::netlink::Channel;
use crate::orig_dst::orig_dst;
use crate::plan::Plan;
use crate::prefix::Prefix;
use crate::rules::{Config, Listener, Rules};
use crate::self_test::trace::{Step, Tracer};
use crate::socket::{self, ListenOptions};
use crate::sys;

/// Time limit in milliseconds. A lost SYN is sent again after a second (TCP_TIMEOUT_INIT). The rest is for a busy machine.
const PATIENCE: u64 = 2500;
/// Interval in milliseconds at which a datagram is sent again.
const REPEAT: u64 = 300;
const PAUSE: Duration = Duration::from_millis(2);
/// One address per family.
type Pair = (Ipv4Addr, Ipv6Addr);
/// Default source and destination of probes (RFC 5737, RFC 3849).
const CLIENTS: Pair = (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
const SERVERS: Pair = (Ipv4Addr::new(203, 0, 113, 2), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2));
const ELSEWHERE: Pair = (Ipv4Addr::new(198, 18, 0, 2), Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 2));
const GATEWAYS: Pair = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1));
const PORT: u16 = 80;

/// Result of a probe.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ProbeResult {
    Served,
    /// The probe was delivered with a wrong address.
    Wrong(String),
    /// The probe reached the listener, and the reply was lost.
    Unanswered,
    /// The probe was refused, or could not be sent.
    Failed(String),
    Lost,
}

/// A probe and its state.
#[derive(Debug)]
pub(super) struct Probe {
    pub family: Family,
    pub protocol: Protocol,
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub result: ProbeResult,
    steps: Vec<Step>,
    socket: Option<Socket>,
    /// The accepted connection.
    accepted: Option<Socket>,
    settled: bool,
}

impl Probe {
    /// Describes where the probe was last seen.
    pub fn seen(&self) -> String {
        // Only the first packet: later packets take the same path.
        let Some(packet) = self.steps.first().map(|step| step.packet) else {
            return "; it did not arrive in the tested network namespace".to_owned();
        };
        let steps: Vec<&Step> = self.steps.iter().filter(|step| step.packet == packet).collect();
        if let Some(by) = steps.iter().find(|step| step.dropped) {
            let rule = by.rule.map_or("its policy".to_owned(), |handle| format!("rule {handle}"));
            return format!("; last seen in chain {} of table {}, where {rule} dropped it", by.chain, by.table);
        }
        let Some(hook) = steps.iter().rev().find_map(|step| step.hook()) else { return String::new() };
        let meaning = match hook.split(',').next() {
            Some("prerouting") => "routing did not deliver it (a martian, or no route)",
            Some("input") => "no socket received it",
            Some("forward" | "postrouting") => "it was forwarded instead of delivered to the listener",
            _ => "",
        };
        format!("; last seen at hook {hook}: {meaning}")
    }
}

/// Whether the config can intercept a probe of this family: none of its lists is empty.
pub(super) fn intercepts(config: &Config, family: Family) -> bool {
    let any_port = config.ports.as_ref().is_none_or(|ports| !ports.is_empty());
    let any_interface = config.interfaces.as_ref().is_none_or(|names| !names.is_empty());
    any_port && any_interface && client(config, family).is_some() && destination(config, family).is_some()
}

/// Returns the source of the probes of a family; `None`: the config selects none.
fn client(config: &Config, family: Family) -> Option<IpAddr> {
    let exempt = |addr: &IpAddr| config.bypass_src.iter().flatten().any(|prefix| prefix.covers(*addr));
    match &config.src {
        Some(src) => of_family(src, family).map(Prefix::sample).find(|addr| !exempt(addr)),
        None => Some(sample(CLIENTS, family)).filter(|addr| !exempt(addr)),
    }
}

/// Returns the destination of the probes of a family; `None`: the config selects none.
fn destination(config: &Config, family: Family) -> Option<IpAddr> {
    let candidates: Vec<IpAddr> = match &config.dst {
        Some(dst) => of_family(dst, family).map(Prefix::sample).collect(),
        None => vec![sample(SERVERS, family), sample(ELSEWHERE, family)],
    };
    let bypassed = |addr: &IpAddr| config.bypass.iter().flatten().any(|prefix| prefix.covers(*addr));
    candidates.into_iter().find(|addr| !bypassed(addr))
}

fn of_family(prefixes: &[Prefix], family: Family) -> impl Iterator<Item = &Prefix> {
    prefixes.iter().filter(move |prefix| prefix.family() == family)
}

fn sample((v4, v6): Pair, family: Family) -> IpAddr {
    if family == Family::V4 { v4.into() } else { v6.into() }
}

/// Opens listeners, installs the rules, sends all probes, and waits until each has a result.
pub(super) fn run(config: &Config, plan: &Plan, network: &Network) -> Result<Vec<Probe>> {
    let mut config = config.clone();
    // The rules end with the network namespace.
    config.persist = false;
    let mut families = plan.families;
    for family in plan.families.iter() {
        let Some(from) = client(&config, family) else { continue };
        match network.connect(from, sample(GATEWAYS, family)) {
            Ok(()) => {}
            // The kernel does not support this family. Rules for both families work without it.
            Err(_) if config.families.is_none() && family == Family::V6 => families.v6 = false,
            Err(e) => return Err(e),
        }
    }
    let mut probes = Vec::new();
    for family in families.iter() {
        for protocol in plan.protocols.iter() {
            let Some(to) = target(&mut config, plan, family, protocol) else { continue };
            let Some(from) = client(&config, family) else { continue };
            probes.push(Probe {
                family,
                protocol,
                from: SocketAddr::new(from, 0),
                to,
                result: ProbeResult::Lost,
                steps: Vec::new(),
                socket: None,
                accepted: None,
                settled: false,
            });
        }
    }
    let listeners = listeners(&config, network)?;
    let mut nft =
        Channel::open(libc::NETLINK_NETFILTER).map_err(|e| Error::io(format_args!("socket(NETLINK_NETFILTER)"), e))?;
    // Without nf_tables, the rules may use iptables, and packets are not traced.
    let mut tracer = Tracer::start(&mut nft).ok();
    let _rules = Rules::install(&config)?;
    network.in_client_ns(|| probes.iter_mut().for_each(send))?;
    let deadline = sys::coarse_ms() + PATIENCE;
    let mut steps = Vec::new();
    let mut again = sys::coarse_ms() + REPEAT;
    while probes.iter().any(|probe| !probe.settled) && sys::coarse_ms() < deadline {
        if sys::coarse_ms() > again {
            probes.iter().for_each(Probe::repeat);
            again += REPEAT;
        }
        listeners.iter().for_each(|(protocol, listener)| serve(*protocol, listener, &mut probes, plan.mode));
        probes.iter_mut().for_each(poll_reply);
        if let Some(tracer) = &mut tracer {
            steps.append(&mut tracer.steps());
        }
        std::thread::sleep(PAUSE);
    }
    for probe in &mut probes {
        let numbers = (u32::from(probe.family.nfproto()), Some(probe.protocol.number()));
        let own: Vec<u32> = steps.iter().filter(|s| (s.family, s.protocol) == numbers).map(|s| s.packet).collect();
        probe.steps = steps.iter().filter(|step| own.contains(&step.packet)).cloned().collect::<Vec<_>>();
    }
    Ok(probes)
}

/// Returns the destination of a probe. If nothing is intercepted, it is the foreign address of a listener, which is opened if there
/// is none.
fn target(config: &mut Config, plan: &Plan, family: Family, protocol: Protocol) -> Option<SocketAddr> {
    if plan.mode != Mode::DivertOnly {
        // No packet can be sent to port 0, which a list without some ports begins with.
        let some_port =
            |ports: &Vec<PortRange>| ports.iter().find(|range| range.last > 0).map(|range| range.first.max(1));
        let port = plan.ports.of(protocol).as_ref().map_or(Some(PORT), some_port)?;
        if !intercepts(config, family) {
            return None;
        }
        let served = config.listeners.iter().any(|l| l.protocol == protocol && l.families.contains(family));
        return destination(config, family).filter(|_| served).map(|addr| SocketAddr::new(addr, port));
    }
    let own = |listener: &&Listener| {
        listener.protocol == protocol && listener.addr.is_some() && listener.families.contains(family)
    };
    if let Some(listener) = config.listeners.iter().find(own) {
        return Some(SocketAddr::new(listener.addr?, listener.port));
    }
    let to = SocketAddr::new(sample(SERVERS, family), PORT);
    config.listeners.push(Listener::at(to, protocol).ok()?);
    Some(to)
}

/// Opens listeners as the config describes them.
fn listeners(config: &Config, network: &Network) -> Result<Vec<(Protocol, Socket)>> {
    let mut made: Vec<(SocketAddr, Protocol, Socket)> = Vec::new();
    for listener in &config.listeners {
        let any: IpAddr = if listener.families.v6 { IpAddr::from([0u16; 8]) } else { IpAddr::from([0u8; 4]) };
        let addr = SocketAddr::new(listener.addr.unwrap_or(any), listener.port);
        if made.iter().any(|(other, protocol, _)| (*other, *protocol) == (addr, listener.protocol)) {
            continue;
        }
        let socket = match (config.mode, listener.protocol) {
            (Mode::Redirect, _) => {
                if let Some(addr) = listener.addr {
                    network.own(addr)?;
                }
                ordinary(addr).map_err(|e| Error::io(format_args!("listener on {addr}"), e))?
            }
            (_, Protocol::Tcp) => socket::listen(addr, ListenOptions::new().nonblocking(true))?,
            (_, Protocol::Udp) => {
                let socket = socket::socket(Domain::for_address(addr), Type::DGRAM.nonblocking(), None)?;
                socket::bind_nonlocal(socket.as_fd(), addr)?;
                socket
            }
        };
        made.push((addr, listener.protocol, socket));
    }
    Ok(made.into_iter().map(|(_, protocol, socket)| (protocol, socket)).collect::<Vec<_>>())
}

/// Opens a listener that is not transparent, for NAT.
fn ordinary(addr: SocketAddr) -> sys::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.cloexec().nonblocking(), None)?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&SockAddr::from(addr))?;
    socket.listen(16)?;
    Ok(socket)
}

/// Sends a probe. This thread is in the client namespace.
fn send(probe: &mut Probe) {
    let sent = || -> sys::Result<Socket> {
        let kind = if probe.protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
        let socket = Socket::new(Domain::for_address(probe.to), kind.cloexec().nonblocking(), None)?;
        socket.bind(&SockAddr::from(probe.from))?;
        match socket.connect(&SockAddr::from(probe.to)).map_err(sys::Errno::from) {
            Ok(()) | Err(sys::Errno(libc::EINPROGRESS)) => {}
            failed => failed?,
        }
        if probe.protocol == Protocol::Udp {
            socket.send(b"?")?;
        }
        Ok(socket)
    };
    match sent() {
        Ok(socket) => {
            probe.from = socket.local_addr().ok().and_then(|addr| addr.as_socket()).unwrap_or(probe.from);
            probe.socket = Some(socket);
        }
        Err(e) => probe.finish(ProbeResult::Failed(e.to_string())),
    }
}

impl Probe {
    fn repeat(&self) {
        if let (Protocol::Udp, false, Some(socket)) = (self.protocol, self.settled, &self.socket) {
            let _ = socket.send(b"?");
        }
    }

    fn finish(&mut self, result: ProbeResult) {
        (self.result, self.settled) = (result, true);
    }
}

/// Replies to probes that have reached a listener.
fn serve(protocol: Protocol, listener: &Socket, probes: &mut [Probe], mode: Mode) {
    let whose = |probes: &mut [Probe], peer: SocketAddr| {
        probes.iter().position(|probe| probe.protocol == protocol && probe.from == canonical(peer))
    };
    match protocol {
        Protocol::Tcp => {
            while let Ok((mut stream, peer)) = listener.accept() {
                let Some(probe) =
                    peer.as_socket().and_then(|peer| whose(probes, peer)).and_then(|at| probes.get_mut(at))
                else {
                    continue;
                };
                match orig_dst(stream.as_fd()).map(canonical) {
                    Ok(found) if found == probe.to => probe.result = ProbeResult::Unanswered,
                    Ok(found) => {
                        probe.finish(ProbeResult::Wrong(format!("delivered, but with original destination {found}")))
                    }
                    Err(e) => {
                        probe.finish(ProbeResult::Wrong(format!("delivered, but without original destination: {e}")))
                    }
                }
                let _ = stream.write_all(b"!");
                probe.accepted = Some(stream);
            }
        }
        Protocol::Udp => {
            let mut words = [std::mem::MaybeUninit::uninit(); 16];
            while let Ok((_, peer)) = listener.recv_from(&mut words) {
                let Some(probe) =
                    peer.as_socket().and_then(|peer| whose(probes, peer)).and_then(|at| probes.get_mut(at))
                else {
                    continue;
                };
                probe.result = ProbeResult::Unanswered;
                if let Err(e) = reply(probe, listener, mode) {
                    probe.finish(ProbeResult::Wrong(format!("delivered, but the reply could not be sent: {e}")));
                }
            }
        }
    }
}

/// Replies to a datagram from its original destination.
fn reply(probe: &Probe, listener: &Socket, mode: Mode) -> Result<()> {
    let failed = |e: io::Error| {
        let e = sys::Errno::from(e);
        Error::with(e.0, format_args!("{e}"))
    };
    if mode == Mode::DivertOnly {
        // The listener is bound to this address.
        return listener.send_to(b"!", &SockAddr::from(probe.from)).map(drop).map_err(failed);
    }
    let socket = socket::socket(Domain::for_address(probe.to), Type::DGRAM.nonblocking(), None)?;
    socket.set_reuse_address(true).map_err(failed)?;
    socket::bind_nonlocal(socket.as_fd(), probe.to)?;
    socket.send_to(b"!", &SockAddr::from(probe.from)).map(drop).map_err(failed)
}

/// Whether the reply has arrived.
fn poll_reply(probe: &mut Probe) {
    let (false, Some(socket)) = (probe.settled, &mut probe.socket) else { return };
    match socket.read(&mut [0; 16]).map_err(sys::Errno::from) {
        Ok(1..) if probe.result == ProbeResult::Unanswered => probe.finish(ProbeResult::Served),
        Ok(_) => probe.finish(ProbeResult::Wrong("a reply arrived, but the listener received no probe".to_owned())),
        Err(sys::Errno(libc::EAGAIN | libc::ENOTCONN | libc::EINTR)) => {}
        Err(e) => probe.finish(ProbeResult::Failed(e.to_string())),
    }
}
