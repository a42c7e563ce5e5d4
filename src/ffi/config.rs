//! What rules are asked for and what they report: constants, structs, and how
//! C's become ours.

use std::ffi::{c_char, c_int};
use std::net::IpAddr;

use libc::{sockaddr, socklen_t};

use super::arg;
use crate::error::{Error, Result};
use crate::memory;
use crate::rules::{Backend, Config, Families, Listener, Mode, PortRange, Prefix, Protocol, Protocols};

/// Only bring packets to transparent sockets that they belong to: listeners
/// on addresses that this host does not own, and connections from such
/// addresses. Nothing is intercepted; listeners may be empty.
pub const TP_RULES_DIVERT_ONLY: u32 = 0x1;
/// Intercept by NAT redirection, where TPROXY cannot be had. The listener is
/// then an ordinary socket, not a transparent one (tp_orig_dst asks connection
/// tracking), on a wildcard or specific address. TCP only; no marks, no policy
/// routing, and connections from foreign addresses do not get their answers.
pub const TP_RULES_REDIRECT: u32 = 0x2;
/// Intercept the host's own traffic too. What comes from transparent sockets
/// is exempt: a proxy whose sockets towards servers are transparent
/// (tp_connect_from, tp_set_transparent) does not intercept itself.
///
/// What the host's own TCP services answer is left alone: where ports would
/// choose it too (none are given, or some above 1023), connection tracking
/// tells it, and so is active. Not so UDP services, nor any with
/// TP_RULES_NOTRACK: choose ports, dst or src so that their answers are not
/// among what is intercepted.
pub const TP_RULES_LOCAL_OUTPUT: u32 = 0x4;
/// Let traffic pass by while there is no listener; the default is to drop it.
/// Not with TP_RULES_LOCAL_OUTPUT or TP_RULES_REDIRECT, which cannot:
/// EOPNOTSUPP.
pub const TP_RULES_FAIL_OPEN: u32 = 0x8;
/// Accept connections and datagrams that are sent straight to a listener's
/// own address and port. By default they are dropped, since a proxy that
/// connects to the original destination would connect to itself, without end.
/// Dropped is what goes to an address of this host, link-local ones included,
/// or to a broadcast, anycast or multicast address. (A listener on loopback
/// cannot be reached from outside, and needs no such rule.)
pub const TP_RULES_ALLOW_DIRECT: u32 = 0x10;
/// Keep what is intercepted, and what transparent sockets send, out of
/// connection tracking.
pub const TP_RULES_NOTRACK: u32 = 0x20;
/// The rules outlive the process, and drop what they would intercept until an
/// instance of the same name, with this flag too, takes them over without a
/// gap, or tp_purge_rules removes them. Needs Linux 6.9.
pub const TP_RULES_PERSIST: u32 = 0x40;

/// nf_tables if the kernel has what is needed, else iptables.
pub const TP_BACKEND_AUTO: u32 = 0;
/// nf_tables, over netlink.
pub const TP_BACKEND_NFT: u32 = 1;
/// `iptables-restore`, one transaction for each family, in chains of our own;
/// in the legacy variant if that has rules already, else in the nft variant if
/// that has rules, else in the one that is called `iptables`. Refused with
/// EOPNOTSUPP: TP_RULES_FAIL_OPEN, TP_RULES_NOTRACK, TP_RULES_PERSIST, more than
/// 1000 prefixes. Chains have no owner: those of a killed process stay, and drop
/// what they intercept, until the next tp_install_rules of that name or
/// tp_purge_rules. With TP_RULES_LOCAL_OUTPUT what is exempt are not transparent
/// sockets but those whose SO_MARK is the mark of the rules. What is dropped for
/// want of a listener is counted as intercepted. Programs are run: see above.
pub const TP_BACKEND_IPTABLES: u32 = 2;

/// TCP.
pub const TP_PROTO_TCP: u32 = 0x1;
/// UDP.
pub const TP_PROTO_UDP: u32 = 0x2;

/// The destinations to intercept. tp_update_rules.
pub const TP_SET_DST: u32 = 1;
/// The sources to intercept. tp_update_rules.
pub const TP_SET_SRC: u32 = 2;
/// The destinations never to intercept. tp_update_rules.
pub const TP_SET_BYPASS: u32 = 3;

/// A script of `ip` and `nft` commands. tp_render_rules.
pub const TP_FORMAT_NFT: u32 = 1;
/// A script of `ip` and `iptables-restore` commands. tp_render_rules.
pub const TP_FORMAT_IPTABLES: u32 = 2;

/// IPv4.
pub const TP_FAMILY_IPV4: u32 = 0x1;
/// IPv6.
pub const TP_FAMILY_IPV6: u32 = 0x2;

const KNOWN_FLAGS: u32 = TP_RULES_DIVERT_ONLY
    | TP_RULES_REDIRECT
    | TP_RULES_LOCAL_OUTPUT
    | TP_RULES_FAIL_OPEN
    | TP_RULES_ALLOW_DIRECT
    | TP_RULES_NOTRACK
    | TP_RULES_PERSIST;

/// An address prefix: addr in network byte order, its first len bits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_prefix {
    /// AF_INET or AF_INET6.
    pub family: u8,
    /// 0 to 32, or 0 to 128.
    pub len: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// IPv4 in the first four bytes.
    pub addr: [u8; 16],
}

/// A range of ports in host byte order, both ends included.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_port_range {
    /// The lowest, at least 1.
    pub first: u16,
    /// The highest, at least first. One port: the same.
    pub last: u16,
}

/// What to intercept, for whom. Set it to zero (`= {0}`), then the fields
/// that matter: every field that is zero means its default. All of it is the
/// caller's and is read during the call only.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_rules_config {
    /// The instance's name: at most 20 letters, digits, '_', '.' and, not
    /// first, '-'. NULL: "tproxy". One network namespace holds several instances, if
    /// their names differ.
    pub name: *const c_char,
    /// Descriptors of the listening sockets that get what is intercepted.
    /// Protocol, family, address and port come from them. Each must be
    /// transparent, bound and, for TCP, listening (tp_listen makes such), and
    /// for each protocol and family there must be one address and port;
    /// sockets that share it by TP_LISTEN_REUSEPORT are fine. They are read now; a
    /// listener that ends later leaves no listener, and so no traffic.
    pub listeners: *const c_int,
    /// How many descriptors.
    pub n_listeners: usize,
    /// In place of listeners, the address and port of one in another process.
    /// The wildcard address of IPv6 serves both families.
    pub listen_addr: *const sockaddr,
    /// The length of listen_addr.
    pub listen_addrlen: socklen_t,
    /// TP_RULES_ flags, or 0.
    pub flags: u32,
    /// TP_BACKEND_AUTO, TP_BACKEND_NFT, TP_BACKEND_IPTABLES.
    pub backend: u32,
    /// TP_PROTO_TCP, TP_PROTO_UDP. 0: what the listeners are, else TCP. With listen_addr
    /// it says what listens there.
    pub protocols: u32,
    /// TP_FAMILY_IPV4, TP_FAMILY_IPV6. 0: those that the listeners serve, else both; IPv4
    /// alone on a host that has no IPv6 address.
    pub families: u32,
    /// The packet mark that means "for a local socket", in host byte order.
    /// 0: 0x2000, with mask 0x3000. TP_RULES_LOCAL_OUTPUT needs another for
    /// the host's own packets: the lowest other bit of the mask.
    pub mark: u32,
    /// The bits of the mark that are ours; the others are left as they are.
    /// 0: all of them, if mark is given.
    pub mark_mask: u32,
    /// The routing table that delivers to local sockets. 0: one that is free,
    /// from 7470.
    pub table: u32,
    /// The preference of the first of four routing policy rules, at most
    /// 32762. 0: four that are free, from 200.
    pub priority: u32,
    /// Destination ports to intercept, in any order, overlaps welcome.
    pub ports: *const tp_port_range,
    /// How many ranges. 0: every port.
    pub n_ports: usize,
    /// Destinations to intercept, in any order, overlaps welcome. What they
    /// name is intercepted even if it is this host's own address.
    pub dst: *const tp_prefix,
    /// How many prefixes. 0: every destination but this host's own addresses,
    /// loopback, broadcast and multicast.
    pub n_dst: usize,
    /// Sources to intercept.
    pub src: *const tp_prefix,
    /// How many prefixes. 0: every source.
    pub n_src: usize,
    /// Destinations never to intercept, whatever dst says. Nor are their
    /// answers: where ports (none, or some above 1023) and interfaces (none)
    /// would choose these too, connection tracking tells them from the rest,
    /// and so is active, with TP_RULES_NOTRACK for what comes from there.
    pub bypass: *const tp_prefix,
    /// How many prefixes.
    pub n_bypass: usize,
    /// Names of the interfaces by which forwarded traffic comes in. They need
    /// not exist yet. A trailing '*' makes a name a pattern, with both backends:
    /// "ppp*" matches "ppp", "ppp0" and "ppp10". A '*' elsewhere is EINVAL. A
    /// name that ends with '+' is EOPNOTSUPP with iptables, to which it would
    /// be a pattern.
    pub interfaces: *const *const c_char,
    /// How many names. 0: every interface.
    pub n_interfaces: usize,
}

/// The size of the first version of tp_rules_config: where its last field ends.
pub(super) const FIRST_VERSION: usize = std::mem::offset_of!(tp_rules_config, n_interfaces) + size_of::<usize>();

/// What the rules have done: packets, and their bytes from the IP header on.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_rules_stats {
    /// Given to a listener.
    pub intercepted_packets: u64,
    /// Their bytes.
    pub intercepted_bytes: u64,
    /// Given to a transparent socket that they belong to; errors (ICMP) about
    /// what it sent are among them.
    pub diverted_packets: u64,
    /// Their bytes.
    pub diverted_bytes: u64,
    /// Dropped, because there was no listener.
    pub dropped_packets: u64,
    /// Their bytes.
    pub dropped_bytes: u64,
    /// Dropped, because they were sent straight to a listener.
    pub direct_packets: u64,
    /// Their bytes.
    pub direct_bytes: u64,
}

/// The size of the first version of tp_rules_stats.
pub(super) const FIRST_STATS: usize = std::mem::offset_of!(tp_rules_stats, direct_bytes) + size_of::<u64>();

/// Decodes the struct; refuses what this version cannot do.
///
/// # Safety
/// Every pointer in it is NULL or points to what its comment says.
pub(super) unsafe fn decode(config: &tp_rules_config) -> Result<Config> {
    let flags = arg::flags(config.flags, KNOWN_FLAGS)?;
    let has = |flag| flags & flag != 0;
    check_known(config)?;
    let mode = match (has(TP_RULES_DIVERT_ONLY), has(TP_RULES_REDIRECT)) {
        (false, false) => Mode::Tproxy,
        (false, true) => Mode::Redirect,
        (true, false) => Mode::DivertOnly,
        (true, true) => return Err(Error::invalid("TP_RULES_DIVERT_ONLY with TP_RULES_REDIRECT: one or the other")),
    };
    let protocols = Protocols { tcp: config.protocols & TP_PROTO_TCP != 0, udp: config.protocols & TP_PROTO_UDP != 0 };
    // SAFETY: each by the caller's word.
    let (name, ports, dst, src, bypass, interfaces, listeners) = unsafe {
        (
            arg::text("name", config.name)?.unwrap_or_default(),
            arg::array("ports", config.ports, config.n_ports)?,
            prefixes("dst", config.dst, config.n_dst)?,
            prefixes("src", config.src, config.n_src)?,
            prefixes("bypass", config.bypass, config.n_bypass)?,
            names("interfaces", config.interfaces, config.n_interfaces)?,
            listeners(config, mode, protocols)?,
        )
    };
    Ok(Config {
        name: name.to_owned(),
        listeners,
        mode,
        backend: match config.backend {
            TP_BACKEND_AUTO => Backend::Auto,
            TP_BACKEND_NFT => Backend::Nft,
            TP_BACKEND_IPTABLES => Backend::Iptables,
            other => return Err(Error::invalid_with(format_args!("backend: {other} is not known"))),
        },
        local_output: has(TP_RULES_LOCAL_OUTPUT),
        fail_open: has(TP_RULES_FAIL_OPEN),
        allow_direct: has(TP_RULES_ALLOW_DIRECT),
        notrack: has(TP_RULES_NOTRACK),
        persist: has(TP_RULES_PERSIST),
        protocols,
        families: Families { v4: config.families & TP_FAMILY_IPV4 != 0, v6: config.families & TP_FAMILY_IPV6 != 0 },
        mark: config.mark,
        mark_mask: config.mark_mask,
        table: config.table,
        priority: config.priority,
        ports: memory::collect(ports.iter().map(|range| Ok(PortRange { first: range.first, last: range.last })))?,
        dst,
        src,
        bypass,
        interfaces,
    })
}

/// The listeners, by descriptor or by address.
///
/// # Safety
/// As for [`decode`].
unsafe fn listeners(config: &tp_rules_config, mode: Mode, protocols: Protocols) -> Result<Vec<Listener>> {
    // SAFETY: by the caller's word.
    let fds = unsafe { arg::array("listeners", config.listeners, config.n_listeners) }?;
    if config.listen_addr.is_null() && config.listen_addrlen == 0 {
        let listener = |(index, fd): (usize, &c_int)| {
            // SAFETY: the caller's descriptor, open during the call.
            let listener = unsafe { arg::fd(*fd) }.and_then(|fd| Listener::from_fd(fd, mode));
            listener.map_err(|e| Error::with(e.errno(), format_args!("listeners[{index}], descriptor {fd}: {e}")))
        };
        return memory::collect(fds.iter().enumerate().map(listener));
    }
    if !fds.is_empty() {
        return Err(Error::invalid("listeners and listen_addr: one or the other"));
    }
    // SAFETY: by the caller's word.
    let addr = unsafe { arg::address("listen_addr", config.listen_addr, config.listen_addrlen) }?;
    let tcp_alone = Protocols { tcp: true, udp: false };
    let protocols = if protocols == Protocols::default() { tcp_alone } else { protocols };
    let asked = [(protocols.tcp, Protocol::Tcp), (protocols.udp, Protocol::Udp)];
    asked.into_iter().filter(|(asked, _)| *asked).map(|(_, protocol)| Listener::at(addr, protocol)).collect()
}

/// # Safety
/// `items` is NULL or valid for reads of `len` prefixes.
pub(super) unsafe fn prefixes(what: &str, items: *const tp_prefix, len: usize) -> Result<Vec<Prefix>> {
    // SAFETY: by the caller's word.
    let items = unsafe { arg::array(what, items, len) }?;
    if items.is_empty() {
        return Ok(Vec::new());
    }
    let prefix = |(index, item): (usize, &tp_prefix)| {
        let [a, b, c, d, ..] = item.addr;
        let addr = match i32::from(item.family) {
            libc::AF_INET => IpAddr::from([a, b, c, d]),
            libc::AF_INET6 => IpAddr::from(item.addr),
            other => {
                return Err(Error::invalid_with(format_args!(
                    "{what}[{index}]: family {other} is neither AF_INET nor AF_INET6"
                )));
            }
        };
        if item.reserved != [0; 2] {
            return Err(Error::invalid_with(format_args!("{what}[{index}]: reserved must be zero")));
        }
        Prefix::new(addr, item.len).map_err(|e| Error::with(e.errno(), format_args!("{what}[{index}]: {e}")))
    };
    memory::collect(items.iter().enumerate().map(prefix))
}

/// # Safety
/// `items` is NULL or valid for reads of `len` pointers, each to a NUL-terminated string.
unsafe fn names(what: &str, items: *const *const c_char, len: usize) -> Result<Vec<String>> {
    // SAFETY: by the caller's word.
    let items = unsafe { arg::array(what, items, len) }?;
    if items.is_empty() {
        return Ok(Vec::new());
    }
    let name = |item: &*const c_char| {
        // SAFETY: by the caller's word.
        let name = unsafe { arg::text(what, *item) }?;
        Ok(name.ok_or_else(|| arg::null(what))?.to_owned())
    };
    memory::collect(items.iter().map(name))
}

/// Refuses values that mean nothing, and what this version cannot do.
fn check_known(config: &tp_rules_config) -> Result<()> {
    let known = |what: &str, value: u32, known: u32| match value & !known {
        0 => Ok(()),
        unknown => Err(Error::invalid_with(format_args!("{what}: {unknown:#x} is not known"))),
    };
    known("protocols", config.protocols, TP_PROTO_TCP | TP_PROTO_UDP)?;
    known("families", config.families, TP_FAMILY_IPV4 | TP_FAMILY_IPV6)?;
    Ok(())
}
