//! What rules are asked for and what they report: constants, structs, and how
//! C's become ours.

use std::ffi::{c_char, c_int};
use std::net::IpAddr;

use libc::{sockaddr, socklen_t};

use super::arg;
use crate::error::{Error, Result};
use crate::memory;
use crate::model::ProtocolPorts;
use crate::rules::plan::DEFAULT_NAME;
use crate::rules::{
    Backend, Config, Families, IdRange, Listener, MacAddr, Mark, Mode, PortRange, Prefix, Protocol, Protocols,
};

/// Only deliver packets to existing transparent sockets: listeners on addresses that this host does not
/// own, and connections from such addresses. Nothing is intercepted; listeners may be empty.
pub const TP_RULES_DIVERT_ONLY: u32 = 0x1;
/// Intercept by NAT redirection, for systems without TPROXY.
///
/// The listener must then be an ordinary socket, not a transparent one, on a wildcard or specific address;
/// tp_orig_dst() queries connection tracking. Only TCP is supported. Marks and policy routing are not
/// used, and replies to connections from foreign addresses are not delivered.
pub const TP_RULES_REDIRECT: u32 = 0x2;
/// Also intercept traffic that this host sends.
///
/// Packets from transparent sockets are exempt: a proxy whose sockets towards servers are transparent
/// (tp_connect_from(), tp_set_transparent()) does not intercept its own connections.
///
/// If instances overlap, the first installed sends the packet back through lo, and only that instance takes
/// it there.
pub const TP_RULES_LOCAL_OUTPUT: u32 = 0x4;
/// Forward traffic normally while no listener exists; by default it is dropped. EOPNOTSUPP with
/// TP_RULES_LOCAL_OUTPUT or TP_RULES_REDIRECT.
pub const TP_RULES_FAIL_OPEN: u32 = 0x8;
/// Accept connections and datagrams addressed directly to a listener's address and port.
///
/// By default they are dropped, because a proxy that connects to the original destination would connect to
/// itself in an endless loop. Dropped are packets to an address of this host, including link-local
/// addresses, and to broadcast, anycast and multicast addresses. A listener on loopback cannot be reached
/// from other hosts and needs no such rule.
pub const TP_RULES_ALLOW_DIRECT: u32 = 0x10;
/// Exempt intercepted packets, and packets from transparent sockets, from connection tracking.
///
/// If the port selection includes ports above 1023, connection tracking has to see replies to recognize them.
/// Then only packets of transparent sockets and TCP packets that begin a connection are exempt; intercepted
/// datagrams are tracked.
pub const TP_RULES_NOTRACK: u32 = 0x20;
/// Keep the rules when the process ends.
///
/// The remaining rules drop the packets that they would intercept. An instance of the same name, also with
/// this flag, takes them over without a gap; tp_purge_rules() removes them. Needs Linux 6.9.
pub const TP_RULES_PERSIST: u32 = 0x40;
/// Intercept only TCP packets that begin a connection.
///
/// A TCP packet that begins nothing and belongs to no transparent socket is forwarded, not answered by a
/// reset. Existing connections continue when the rules are installed, and connections of another proxy host
/// are not broken. UDP is not affected. EOPNOTSUPP with TP_RULES_LOCAL_OUTPUT.
///
/// @since 0.2.0
pub const TP_RULES_NEW_ONLY: u32 = 0x80;
/// Deliver replies of servers on this host to the transparent sockets that connected to them.
///
/// Needed when the proxy connects with the client's address (tp_connect_from()) to a server on its own host:
/// on 127.0.0.0/8, ::1 or another address of the host. Without it, the server sends its replies to the client.
/// Clients that connect directly to that server are not affected. Uses connection tracking, also with
/// TP_RULES_NOTRACK, and sets the bits of mark_mask in the connection's mark (ct mark). EOPNOTSUPP with
/// TP_RULES_REDIRECT, and with both TP_RULES_NOTRACK and TP_RULES_LOCAL_OUTPUT.
///
/// @since 0.2.0
pub const TP_RULES_LOCAL_SERVERS: u32 = 0x100;

/// Use nf_tables if the kernel has the required features, otherwise iptables.
pub const TP_BACKEND_AUTO: u32 = 0;
/// Use nf_tables, over netlink.
pub const TP_BACKEND_NFT: u32 = 1;
/// Use iptables-restore, in one transaction per family and in separate chains.
///
/// Uses iptables-nft or iptables-legacy, whichever already has rules: the legacy variant if it has rules,
/// otherwise the nft variant if it has rules, otherwise the program called `iptables`. Runs programs: see
/// "Programs" in tproxy(7).
///
/// TP_RULES_FAIL_OPEN, TP_RULES_NOTRACK, TP_RULES_PERSIST and more than 1000 prefixes are EOPNOTSUPP. So are
/// all rules if the library was built without feature `iptables`; TP_BACKEND_AUTO then uses only nf_tables, and
/// tp_purge_rules() leaves chains of iptables.
/// Chains have no owner: those of a killed process remain, and drop the packets that they intercept, until
/// the next tp_install_rules() of that name or tp_purge_rules(). With TP_RULES_LOCAL_OUTPUT, sockets are
/// exempt by SO_MARK (set it to the rules' mark), not by being transparent. Packets dropped because no
/// listener exists are counted as intercepted.
pub const TP_BACKEND_IPTABLES: u32 = 2;

/// TCP.
pub const TP_PROTO_TCP: u32 = 0x1;
/// UDP.
pub const TP_PROTO_UDP: u32 = 0x2;

/// Destinations to intercept. For tp_update_rules() and tp_learn_addresses().
pub const TP_SET_DST: u32 = 1;
/// Sources to intercept. For tp_update_rules().
pub const TP_SET_SRC: u32 = 2;
/// Destinations that are never intercepted. For tp_update_rules() and tp_learn_addresses().
pub const TP_SET_BYPASS: u32 = 3;

/// Puts missing or overtaken routing back. For tp_verify_rules().
///
/// @since 0.2.0
pub const TP_VERIFY_REPAIR: u32 = 0x1;

/// Script of `ip` and `nft` commands. For tp_render_rules().
pub const TP_FORMAT_NFT: u32 = 1;
/// Script of `ip` and `iptables-restore` commands. For tp_render_rules().
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
    | TP_RULES_PERSIST
    | TP_RULES_NEW_ONLY
    | TP_RULES_LOCAL_SERVERS;

/// Address prefix: the first len bits of addr.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_prefix {
    /// AF_INET or AF_INET6.
    pub family: u8,
    /// Length in bits: 0 to 32 for AF_INET, 0 to 128 for AF_INET6.
    pub len: u8,
    /// Must be 0.
    pub reserved: [u8; 2],
    /// Address in network byte order; an IPv4 address is in the first four bytes.
    pub addr: [u8; 16],
}

/// Range of ports in host byte order, including both ends.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_port_range {
    /// Lowest port, at least 1.
    pub first: u16,
    /// Highest port, at least first; equal to first for a single port.
    pub last: u16,
    /// TP_PROTO_TCP, TP_PROTO_UDP or both: the protocols whose ports these are. 0: every protocol.
    pub protocols: u32,
}

/// Range of user or group numbers, including both ends.
///
/// @since 0.2.0
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_id_range {
    /// Lowest number.
    pub first: u32,
    /// Highest number, at least first; equal to first for a single number. Not 4294967295.
    pub last: u32,
}

/// Ethernet address.
///
/// @since 0.2.0
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_mac {
    /// The six bytes, in the order in which they are written.
    pub addr: [u8; 6],
}

/// Selects the traffic to intercept and the listeners that receive it.
///
/// Set the struct to zero (`= {0}`), then set the fields that are needed. A field that is 0 or NULL selects
/// its default.
///
/// A list that is NULL does not restrict the selection. A list that is not NULL and has 0 elements is an empty
/// set: with an empty ports, dst, src or interfaces nothing is intercepted, except that interfaces does not
/// restrict what this host sends (TP_RULES_LOCAL_OUTPUT). A NULL list with a number above 0 is EFAULT. Use
/// tp_update_rules() to add prefixes to an empty dst or src.
///
/// The struct and all data it points to belong to the caller and are read only during the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_rules_config {
    /// Name of the instance: 1 to 20 letters, digits, '_', '.' and '-' ('-' not first). NULL or empty: "tproxy". A
    /// network namespace can have several instances with different names.
    pub name: *const c_char,
    /// Descriptors of the listening sockets that receive intercepted traffic.
    ///
    /// They determine protocol, family, address and port. Each socket must be transparent, bound and, for TCP,
    /// listening (see tp_listen()). All sockets of one protocol and family must have the same address and port;
    /// several sockets may share it with TP_LISTEN_REUSEPORT. The sockets are inspected during the call only. If
    /// a listener is closed later, matching traffic is dropped.
    pub listeners: *const c_int,
    /// Number of descriptors.
    pub n_listeners: usize,
    /// Address and port of a listener in another process, instead of listeners. The IPv6 wildcard address
    /// serves both families.
    pub listen_addr: *const sockaddr,
    /// Size of listen_addr in bytes.
    pub listen_addrlen: socklen_t,
    /// TP_RULES_ flags, or 0.
    pub flags: u32,
    /// TP_BACKEND_AUTO, TP_BACKEND_NFT or TP_BACKEND_IPTABLES.
    pub backend: u32,
    /// TP_PROTO_TCP and TP_PROTO_UDP. 0: the protocols of the listeners, or TCP if there are none. With
    /// listen_addr, the protocols that listen there.
    pub protocols: u32,
    /// TP_FAMILY_IPV4 and TP_FAMILY_IPV6. 0: the families of the listeners, or both if there are none; only IPv4
    /// on a host that has no IPv6 address.
    pub families: u32,
    /// Packet mark that routes a packet to a local socket, in host byte order. 0: 0x2000, with mask 0x3000.
    /// TP_RULES_LOCAL_OUTPUT uses a second mark for this host's own packets: the lowest other bit of the mask.
    pub mark: u32,
    /// Mask of mark bits that the rules use; other bits are preserved. 0: 0xffffffff if mark is set, else
    /// 0x3000.
    pub mark_mask: u32,
    /// Number of the routing table that delivers packets to local sockets. 0: a free table, from 7470.
    pub table: u32,
    /// Priority of the first of four routing policy rules, at most 32762. 0: four free priorities, from 200.
    pub priority: u32,
    /// Destination ports to intercept, in any order; ranges may overlap. NULL: all ports.
    pub ports: *const tp_port_range,
    /// Number of ranges.
    pub n_ports: usize,
    /// Destinations to intercept, in any order; prefixes may overlap. Listed destinations are intercepted even
    /// if they are this host's own addresses. Traffic that this host sends to itself (interface "lo") is
    /// intercepted only with TP_RULES_LOCAL_OUTPUT. NULL: all destinations except this host's own addresses,
    /// loopback, broadcast and multicast.
    pub dst: *const tp_prefix,
    /// Number of prefixes.
    pub n_dst: usize,
    /// Sources to intercept. NULL: all sources.
    pub src: *const tp_prefix,
    /// Number of prefixes.
    pub n_src: usize,
    /// Destinations that are never intercepted; takes precedence over dst.
    ///
    /// Their replies are not intercepted either: see tp_install_rules().
    pub bypass: *const tp_prefix,
    /// Number of prefixes.
    pub n_bypass: usize,
    /// Names of the interfaces on which forwarded traffic arrives. "lo" has no effect. NULL: all interfaces.
    ///
    /// They need not exist yet. With both backends, a trailing '*' makes a name a pattern: "ppp*" matches
    /// "ppp", "ppp0" and "ppp10". A '*' elsewhere is EINVAL. A name that ends with '+' is EOPNOTSUPP with
    /// iptables, where it would be a pattern.
    pub interfaces: *const *const c_char,
    /// Number of names.
    pub n_interfaces: usize,
    /// Destination ports that are never intercepted or refused; takes precedence over ports and reject_ports.
    ///
    /// The fields from here on exist since 0.2.0.
    pub bypass_ports: *const tp_port_range,
    /// Number of ranges.
    pub n_bypass_ports: usize,
    /// Sources that are never intercepted; takes precedence over src.
    pub bypass_src: *const tp_prefix,
    /// Number of prefixes.
    pub n_bypass_src: usize,
    /// Names of interfaces; traffic that arrives on them is never intercepted. A trailing '*' makes a name a
    /// pattern, as in interfaces.
    pub bypass_interfaces: *const *const c_char,
    /// Number of names.
    pub n_bypass_interfaces: usize,
    /// Ethernet source addresses of forwarded traffic to intercept. NULL: all traffic, whether it arrived by
    /// Ethernet or not. Does not restrict what this host sends.
    pub macs: *const tp_mac,
    /// Number of addresses.
    pub n_macs: usize,
    /// Ethernet source addresses whose traffic is never intercepted.
    pub bypass_macs: *const tp_mac,
    /// Number of addresses.
    pub n_bypass_macs: usize,
    /// Users whose traffic is intercepted, of the traffic that this host sends. NULL: all users, and packets
    /// that belong to no socket.
    ///
    /// uids, gids and cgroups restrict TP_RULES_LOCAL_OUTPUT, and are EINVAL without it. A packet must match each
    /// of the lists that are not NULL. A socket belongs to the process that created it. The first packet of a
    /// connection or UDP flow decides: connection tracking keeps the decision in the bits of mark_mask of the
    /// connection's mark (ct mark). EOPNOTSUPP with TP_RULES_NOTRACK.
    pub uids: *const tp_id_range,
    /// Number of ranges.
    pub n_uids: usize,
    /// Users whose traffic is never intercepted.
    pub bypass_uids: *const tp_id_range,
    /// Number of ranges.
    pub n_bypass_uids: usize,
    /// Groups whose traffic is intercepted: the group of the process that created the socket. NULL: all groups.
    pub gids: *const tp_id_range,
    /// Number of ranges.
    pub n_gids: usize,
    /// Groups whose traffic is never intercepted.
    pub bypass_gids: *const tp_id_range,
    /// Number of ranges.
    pub n_bypass_gids: usize,
    /// Control groups whose traffic is intercepted: paths of cgroup v2 below its root, such as
    /// "system.slice/squid.service". Groups below them are included. They must exist (ENOENT); a group that is
    /// removed and created again is another group. NULL: all. Needs Linux 5.13.
    pub cgroups: *const *const c_char,
    /// Number of paths.
    pub n_cgroups: usize,
    /// Control groups whose traffic is never intercepted.
    pub bypass_cgroups: *const *const c_char,
    /// Number of paths.
    pub n_bypass_cgroups: usize,
    /// Mark (SO_MARK) of packets that this host sends and that are never intercepted. 0, with a bypass_mark_mask
    /// of 0: none.
    pub bypass_mark: u32,
    /// Mask of the bits of bypass_mark that count. 0: all bits.
    pub bypass_mark_mask: u32,
    /// Destination ports that are refused instead of intercepted: TCP with a reset, UDP with an ICMP error (port
    /// unreachable).
    ///
    /// They need not be among ports, nor their protocol among those of the listeners: UDP port 443 makes
    /// browsers fall back from QUIC to TCP at once. The other fields select as for intercepted packets.
    /// Takes precedence over ports. The packets count as dropped.
    pub reject_ports: *const tp_port_range,
    /// Number of ranges.
    pub n_reject_ports: usize,
}

/// The size of the first version of tp_rules_config: where its last field ends.
pub(super) const FIRST_VERSION: usize = std::mem::offset_of!(tp_rules_config, n_reject_ports) + size_of::<usize>();

/// Counters of the rules, in packets and in bytes. Bytes include the IP header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_rules_stats {
    /// Delivered to a listener.
    pub intercepted_packets: u64,
    /// Bytes of these packets.
    pub intercepted_bytes: u64,
    /// Delivered to an existing transparent socket, including ICMP errors about packets it sent.
    pub diverted_packets: u64,
    /// Bytes of these packets.
    pub diverted_bytes: u64,
    /// Dropped because no listener existed.
    pub dropped_packets: u64,
    /// Bytes of these packets.
    pub dropped_bytes: u64,
    /// Dropped because they were addressed directly to a listener.
    pub direct_packets: u64,
    /// Bytes of these packets.
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
    let protocols = match config.protocols {
        0 => None,
        given => Some(Protocols { tcp: given & TP_PROTO_TCP != 0, udp: given & TP_PROTO_UDP != 0 }),
    };
    let families = match config.families {
        0 => None,
        given => Some(Families { v4: given & TP_FAMILY_IPV4 != 0, v6: given & TP_FAMILY_IPV6 != 0 }),
    };
    let number = |number: u32| (number != 0).then_some(number);
    // SAFETY: each by the caller's word.
    let selection = unsafe { decode_selection(config) }?;
    // SAFETY: each by the caller's word.
    let (name, ports, dst, src, bypass, interfaces, listeners) = unsafe {
        (
            instance_name(config.name)?,
            arg::list("ports", config.ports, config.n_ports)?,
            prefix_list("dst", config.dst, config.n_dst)?,
            prefix_list("src", config.src, config.n_src)?,
            prefix_list("bypass", config.bypass, config.n_bypass)?,
            names("interfaces", config.interfaces, config.n_interfaces)?,
            listeners(config, mode, protocols)?,
        )
    };
    Ok(Config {
        name: name.map(str::to_owned),
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
        new_only: has(TP_RULES_NEW_ONLY),
        local_servers: has(TP_RULES_LOCAL_SERVERS),
        protocols,
        families,
        mark: mark(config.mark, config.mark_mask)?,
        table: number(config.table),
        priority: number(config.priority),
        ports: ports.map(|ports| port_ranges("ports", ports)).transpose()?,
        dst,
        src,
        bypass,
        interfaces,
        ..selection
    })
}

/// The fields since 0.2.0.
///
/// # Safety
/// As for [`decode`].
unsafe fn decode_selection(config: &tp_rules_config) -> Result<Config> {
    let c = config;
    // SAFETY: each by the caller's word.
    unsafe {
        Ok(Config {
            bypass_ports: port_ranges("bypass_ports", arg::array("bypass_ports", c.bypass_ports, c.n_bypass_ports)?)?,
            reject_ports: port_ranges("reject_ports", arg::array("reject_ports", c.reject_ports, c.n_reject_ports)?)?,
            bypass_src: prefix_list("bypass_src", c.bypass_src, c.n_bypass_src)?,
            bypass_interfaces: names("bypass_interfaces", c.bypass_interfaces, c.n_bypass_interfaces)?
                .unwrap_or_default(),
            macs: macs("macs", c.macs, c.n_macs)?,
            bypass_macs: macs("bypass_macs", c.bypass_macs, c.n_bypass_macs)?.unwrap_or_default(),
            uids: ids("uids", c.uids, c.n_uids)?,
            bypass_uids: ids("bypass_uids", c.bypass_uids, c.n_bypass_uids)?.unwrap_or_default(),
            gids: ids("gids", c.gids, c.n_gids)?,
            bypass_gids: ids("bypass_gids", c.bypass_gids, c.n_bypass_gids)?.unwrap_or_default(),
            cgroups: names("cgroups", c.cgroups, c.n_cgroups)?,
            bypass_cgroups: names("bypass_cgroups", c.bypass_cgroups, c.n_bypass_cgroups)?.unwrap_or_default(),
            bypass_mark: match (c.bypass_mark, c.bypass_mark_mask) {
                (0, 0) => None,
                (value, 0) => Some(value.into()),
                (value, mask) => Some(Mark { value, mask }),
            },
            ..Config::default()
        })
    }
}

/// # Safety
/// `items` is NULL or valid for reads of `len` addresses.
unsafe fn macs(what: &str, items: *const tp_mac, len: usize) -> Result<Option<Vec<MacAddr>>> {
    // SAFETY: by the caller's word.
    let items = unsafe { arg::list(what, items, len) }?;
    items.map(|items| memory::collect(items.iter().map(|mac| Ok(MacAddr(mac.addr))))).transpose()
}

/// # Safety
/// `items` is NULL or valid for reads of `len` ranges.
unsafe fn ids(what: &str, items: *const tp_id_range, len: usize) -> Result<Option<Vec<IdRange>>> {
    // SAFETY: by the caller's word.
    let items = unsafe { arg::list(what, items, len) }?;
    let range = |range: &tp_id_range| Ok(IdRange { first: range.first, last: range.last });
    items.map(|items| memory::collect(items.iter().map(range))).transpose()
}

/// The listeners, by descriptor or by address.
///
/// # Safety
/// As for [`decode`].
unsafe fn listeners(config: &tp_rules_config, mode: Mode, protocols: Option<Protocols>) -> Result<Vec<Listener>> {
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
    let protocols = protocols.unwrap_or(Protocols::TCP);
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

/// A list of prefixes that restricts the selection; `None`: NULL, it does not.
///
/// # Safety
/// As for [`prefixes()`].
unsafe fn prefix_list(what: &str, items: *const tp_prefix, len: usize) -> Result<Option<Vec<Prefix>>> {
    if items.is_null() && len == 0 {
        return Ok(None);
    }
    // SAFETY: by the caller's word.
    unsafe { prefixes(what, items, len) }.map(Some)
}

/// The name of an instance, of which an empty one stands for the default.
///
/// # Safety
/// `name` is NULL or NUL-terminated.
pub(super) unsafe fn instance_name<'a>(name: *const c_char) -> Result<Option<&'a str>> {
    // SAFETY: by the caller's word.
    let name = unsafe { arg::text("name", name) }?;
    Ok(name.map(|name| if name.is_empty() { DEFAULT_NAME } else { name }))
}

fn port_ranges(what: &str, ranges: &[tp_port_range]) -> Result<Vec<ProtocolPorts>> {
    let ports = |(index, range): (usize, &tp_port_range)| {
        if range.protocols & !(TP_PROTO_TCP | TP_PROTO_UDP) != 0 {
            return Err(Error::invalid_with(format_args!(
                "{what}[{index}]: protocols {:#x} has bits other than TP_PROTO_TCP and TP_PROTO_UDP",
                range.protocols
            )));
        }
        let protocols =
            Protocols { tcp: range.protocols & TP_PROTO_TCP != 0, udp: range.protocols & TP_PROTO_UDP != 0 };
        Ok(ProtocolPorts {
            range: PortRange { first: range.first, last: range.last },
            protocols: (range.protocols != 0).then_some(protocols),
        })
    };
    memory::collect(ranges.iter().enumerate().map(ports))
}

/// The mark that a caller gives by a value and a mask, of which 0 stands for the default.
fn mark(value: u32, mask: u32) -> Result<Option<Mark>> {
    match (value, mask) {
        (0, 0) => Ok(None),
        (0, _) => Err(Error::invalid("mark_mask without mark: say which of its bits mean \"ours\"")),
        (value, 0) => Ok(Some(value.into())),
        (value, mask) => Ok(Some(Mark { value, mask })),
    }
}

/// # Safety
/// `items` is NULL or valid for reads of `len` pointers, each to a NUL-terminated string.
unsafe fn names(what: &str, items: *const *const c_char, len: usize) -> Result<Option<Vec<String>>> {
    // SAFETY: by the caller's word.
    let Some(items) = unsafe { arg::list(what, items, len) }? else { return Ok(None) };
    let name = |item: &*const c_char| {
        // SAFETY: by the caller's word.
        let name = unsafe { arg::text(what, *item) }?;
        Ok(name.ok_or_else(|| arg::null(what))?.to_owned())
    };
    memory::collect(items.iter().map(name)).map(Some)
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
