//! Rules.

use std::ffi::{c_char, c_int};
use std::sync::Mutex;

use libc::{sockaddr, socklen_t};

use super::arg;
use super::guard::guard;
use crate::error::{Error, Result};
use crate::rules::{Config, Families, Listener, PortRange, Rules};

/// Only bring packets to transparent sockets that they belong to: listeners
/// on addresses that this host does not own, and connections from such
/// addresses. Nothing is intercepted; listeners may be empty.
pub const TP_RULES_DIVERT_ONLY: u32 = 0x1;
/// Intercept by NAT redirection, where TPROXY cannot be had. Not supported
/// by this version: EOPNOTSUPP.
pub const TP_RULES_REDIRECT: u32 = 0x2;
/// Intercept the host's own connections too. Not supported by this version:
/// EOPNOTSUPP.
pub const TP_RULES_LOCAL_OUTPUT: u32 = 0x4;
/// Let traffic pass by while there is no listener; the default is to drop
/// it. Not supported by this version: EOPNOTSUPP.
pub const TP_RULES_FAIL_OPEN: u32 = 0x8;
/// Leave connections alone that are made straight to a listener's own address
/// and port. By default they are dropped, since a proxy that connects to
/// the original destination would connect to itself, without end. (A listener
/// on loopback cannot be reached from outside, and needs no such rule.)
pub const TP_RULES_ALLOW_DIRECT: u32 = 0x10;
/// Keep what is intercepted out of connection tracking. Not supported by this
/// version: EOPNOTSUPP.
pub const TP_RULES_NOTRACK: u32 = 0x20;
/// The rules outlive the process. Not supported by this version: EOPNOTSUPP.
pub const TP_RULES_PERSIST: u32 = 0x40;

/// The backend that the kernel has; today nf_tables.
pub const TP_BACKEND_AUTO: u32 = 0;
/// nf_tables, over netlink.
pub const TP_BACKEND_NFT: u32 = 1;
/// iptables. Not supported by this version: EOPNOTSUPP.
pub const TP_BACKEND_IPTABLES: u32 = 2;

/// TCP.
pub const TP_TCP: u32 = 0x1;
/// UDP. Rules for it are not supported by this version: EOPNOTSUPP.
pub const TP_UDP: u32 = 0x2;

/// IPv4.
pub const TP_IPV4: u32 = 0x1;
/// IPv6.
pub const TP_IPV6: u32 = 0x2;

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
    /// The instance's name: at most 20 letters, digits, '_', '-' and '.'.
    /// NULL: "tproxy". One network namespace holds several instances, if
    /// their names differ.
    pub name: *const c_char,
    /// Descriptors of the listening sockets that get what is intercepted.
    /// Protocol, family, address and port come from them. Each must be
    /// transparent, bound and listening (tp_listen makes such), and for each
    /// family there must be one address and port; sockets that share it by
    /// TP_REUSEPORT are fine. They are read now; a listener that ends later
    /// leaves no listener, and so no traffic.
    pub listeners: *const c_int,
    /// How many descriptors.
    pub n_listeners: usize,
    /// A listener in another process. Not supported by this version:
    /// EOPNOTSUPP.
    pub listen_addr: *const sockaddr,
    /// The length of listen_addr.
    pub listen_addrlen: socklen_t,
    /// TP_RULES_ flags, or 0.
    pub flags: u32,
    /// TP_BACKEND_AUTO, TP_BACKEND_NFT, TP_BACKEND_IPTABLES.
    pub backend: u32,
    /// TP_TCP, TP_UDP. 0: what the listeners are, else TCP.
    pub protocols: u32,
    /// TP_IPV4, TP_IPV6. 0: those that the listeners serve, else both.
    pub families: u32,
    /// The packet mark that means "for a local socket", in host byte order.
    /// 0: 0x1000, with mask 0x3000.
    pub mark: u32,
    /// The bits of the mark that are ours; the others are left as they are.
    /// 0: all of them, if mark is given.
    pub mark_mask: u32,
    /// The routing table that delivers to local sockets. 0: one that is free,
    /// from 7470.
    pub table: u32,
    /// The preference of the first of three routing policy rules, at most
    /// 32763. 0: three that are free, from 200.
    pub priority: u32,
    /// Destination ports to intercept, in any order, overlaps welcome.
    pub ports: *const tp_port_range,
    /// How many ranges. 0: every port.
    pub n_ports: usize,
    /// Destinations to intercept. Not supported by this version: EOPNOTSUPP.
    pub dst: *const tp_prefix,
    /// How many prefixes. 0: every destination.
    pub n_dst: usize,
    /// Sources to intercept. Not supported by this version: EOPNOTSUPP.
    pub src: *const tp_prefix,
    /// How many prefixes. 0: every source.
    pub n_src: usize,
    /// Destinations never to intercept. Not supported by this version:
    /// EOPNOTSUPP.
    pub bypass: *const tp_prefix,
    /// How many prefixes.
    pub n_bypass: usize,
    /// Names of the interfaces by which forwarded traffic comes in. Not
    /// supported by this version: EOPNOTSUPP.
    pub interfaces: *const *const c_char,
    /// How many names. 0: every interface.
    pub n_interfaces: usize,
}

/// The size of the first version of tp_rules_config: where its last field ends.
const FIRST_VERSION: usize = std::mem::offset_of!(tp_rules_config, n_interfaces) + size_of::<usize>();

/// Installed rules. Calls on one handle may come from any thread.
#[allow(non_camel_case_types)]
pub struct tp_rules {
    rules: Mutex<Rules>,
}

/// Makes the kernel bring connections to the listeners: an nf_tables table of
/// this process, and policy routing. No other program is run.
///
/// What is intercepted is TCP to config's ports that comes in from the
/// network for someone else: never what goes to this host's own addresses,
/// to loopback, broadcast or multicast. While there is no listener, what
/// would be intercepted is dropped, so that nothing gets past the proxy.
///
/// The table belongs to the process: the kernel removes it when the process
/// ends, however it ends, and no other program can change it (`nft flush
/// ruleset` leaves it alone). A child that was forked and did not exec keeps
/// it alive. Routing has no owner: what a killed process leaves of it affects
/// no packet, and the next instance in its place removes it. Once the rules
/// are gone, traffic flows as if they had never been.
///
/// All or nothing: on failure nothing is left. Reverse-path filtering works
/// as before, with net.ipv4.conf.*.src_valid_mark set or not; no sysctl is
/// changed, and forwarding (net.ipv4.ip_forward,
/// net.ipv6.conf.all.forwarding) is not needed for what is intercepted.
///
/// config: what to intercept. size: sizeof(struct tp_rules_config). rules:
/// where the handle goes, on success alone; tp_remove_rules ends it.
///
/// Returns 0, or -1 with errno: EFAULT: config, rules or an array is NULL.
/// EINVAL: a value out of range, a listener that is not transparent, bound or
/// listening, an unknown flag, or a size less than the first version's.
/// E2BIG: config is larger than this library knows, and the rest is not zero.
/// EOPNOTSUPP: this version cannot do it, or the kernel lacks an option;
/// tp_last_error names it. EPERM: no CAP_NET_ADMIN over this network
/// namespace. EBUSY: a living process has rules of this name, or has this
/// table or priority. EEXIST: someone else has what was asked for. EBADF,
/// ENOTSOCK: a listener that is no descriptor, no socket. ENETDOWN: lo is
/// down. EAGAIN: others change nf_tables without pause. EMFILE, ENFILE,
/// ENOBUFS, ENOMEM: as tp_socket.
///
/// Needs Linux 5.12. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_install_rules(
    config: *const tp_rules_config,
    size: usize,
    rules: *mut *mut tp_rules,
) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word; the struct is integers and pointers.
        let config = unsafe { arg::sized("config", config, size, FIRST_VERSION) }?;
        if rules.is_null() {
            return Err(arg::null("rules"));
        }
        // SAFETY: by the caller's word.
        let installed = Rules::install(&unsafe { decode(&config) }?)?;
        let handle = Box::new(tp_rules { rules: Mutex::new(installed) });
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { rules.write_unaligned(Box::into_raw(handle)) };
        Ok(0)
    })
}

/// Removes what tp_install_rules installed, and frees the handle.
///
/// Established connections of the proxy lose their way: packets of theirs are
/// no longer diverted. rules may be NULL, which does nothing. The handle is
/// gone whatever is returned; no other call may use it at the same time.
///
/// Returns 0, or -1 with errno if something could not be removed, which
/// tp_last_error names. Rules and routes that somebody else removed already
/// are no error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_remove_rules(rules: *mut tp_rules) -> c_int {
    guard(|| {
        if rules.is_null() {
            return Ok(0);
        }
        // SAFETY: it came from Box::into_raw, and ends here.
        let handle = unsafe { Box::from_raw(rules) };
        let rules = handle.rules.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        rules.remove()?;
        Ok(0)
    })
}

/// Decodes the struct; refuses what this version cannot do.
///
/// # Safety
/// Every pointer in it is NULL or points to what its comment says.
unsafe fn decode(config: &tp_rules_config) -> Result<Config> {
    let flags = arg::flags(config.flags, KNOWN_FLAGS)?;
    refuse_unsupported(config, flags)?;
    // SAFETY: by the caller's word.
    let name = unsafe { arg::text("name", config.name) }?.unwrap_or_default();
    // SAFETY: by the caller's word.
    let fds = unsafe { arg::array("listeners", config.listeners, config.n_listeners) }?;
    // SAFETY: by the caller's word.
    let ports = unsafe { arg::array("ports", config.ports, config.n_ports) }?;
    let mut listeners = Vec::with_capacity(fds.len());
    for (index, fd) in fds.iter().enumerate() {
        // SAFETY: the caller's descriptor, open during the call.
        let listener = unsafe { arg::fd(*fd) }.and_then(Listener::from_fd);
        listeners
            .push(listener.map_err(|e| Error::new(e.errno(), format!("listeners[{index}], descriptor {fd}: {e}")))?);
    }
    Ok(Config {
        name: name.to_owned(),
        listeners,
        divert_only: flags & TP_RULES_DIVERT_ONLY != 0,
        allow_direct: flags & TP_RULES_ALLOW_DIRECT != 0,
        families: Families { v4: config.families & TP_IPV4 != 0, v6: config.families & TP_IPV6 != 0 },
        mark: config.mark,
        mark_mask: config.mark_mask,
        table: config.table,
        priority: config.priority,
        ports: ports.iter().map(|range| PortRange { first: range.first, last: range.last }).collect(),
    })
}

fn refuse_unsupported(config: &tp_rules_config, flags: u32) -> Result<()> {
    let known = |what: &str, value: u32, known: u32| match value & !known {
        0 => Ok(()),
        unknown => Err(Error::invalid(format!("{what}: {unknown:#x} is not known"))),
    };
    known("protocols", config.protocols, TP_TCP | TP_UDP)?;
    known("families", config.families, TP_IPV4 | TP_IPV6)?;
    if config.backend > TP_BACKEND_IPTABLES {
        return Err(Error::invalid(format!("backend: {} is not known", config.backend)));
    }
    let unsupported = [
        ("flag TP_RULES_REDIRECT", flags & TP_RULES_REDIRECT != 0),
        ("flag TP_RULES_LOCAL_OUTPUT", flags & TP_RULES_LOCAL_OUTPUT != 0),
        ("flag TP_RULES_FAIL_OPEN", flags & TP_RULES_FAIL_OPEN != 0),
        ("flag TP_RULES_NOTRACK", flags & TP_RULES_NOTRACK != 0),
        ("flag TP_RULES_PERSIST", flags & TP_RULES_PERSIST != 0),
        ("backend TP_BACKEND_IPTABLES", config.backend == TP_BACKEND_IPTABLES),
        ("protocols TP_UDP", config.protocols & TP_UDP != 0),
        ("field listen_addr", !config.listen_addr.is_null() || config.listen_addrlen != 0),
        ("field dst", config.n_dst != 0),
        ("field src", config.n_src != 0),
        ("field bypass", config.n_bypass != 0),
        ("field interfaces", config.n_interfaces != 0),
    ];
    match unsupported.iter().find(|(_, asked)| *asked) {
        Some((what, _)) => Err(Error::new(
            libc::EOPNOTSUPP,
            format!("{what} is not supported by version {} of this library", crate::VERSION),
        )),
        None => Ok(()),
    }
}
