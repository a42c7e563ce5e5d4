//! Rules.

use std::ffi::{c_char, c_int};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

use libc::{sockaddr, socklen_t};

use super::arg;
use super::guard::guard;
use crate::error::{Error, Result};
use crate::rules::{self, Backend, Config, Families, Listener, Mode, PortRange, Prefix, Protocol, Protocols, Rules};

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
pub const TP_RULES_LOCAL_OUTPUT: u32 = 0x4;
/// Let traffic pass by while there is no listener; the default is to drop it.
/// Not with TP_RULES_LOCAL_OUTPUT or TP_RULES_REDIRECT, which cannot:
/// EOPNOTSUPP.
pub const TP_RULES_FAIL_OPEN: u32 = 0x8;
/// Leave connections alone that are made straight to a listener's own address
/// and port. By default they are dropped, since a proxy that connects to
/// the original destination would connect to itself, without end. (A listener
/// on loopback cannot be reached from outside, and needs no such rule.)
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
/// the nft or the legacy variant, whichever has rules already. Refused with
/// EOPNOTSUPP: TP_RULES_FAIL_OPEN, TP_RULES_NOTRACK, TP_RULES_PERSIST, more than
/// 1000 prefixes. Chains have no owner: those of a killed process stay, and drop
/// what they intercept, until the next tp_install_rules of that name or
/// tp_purge_rules. With TP_RULES_LOCAL_OUTPUT what is exempt are not transparent
/// sockets but those whose SO_MARK is the mark of the rules. What is dropped for
/// want of a listener is counted as intercepted. The programs are run as
/// children: the process must not ignore SIGCHLD, nor wait for children that it
/// did not start.
pub const TP_BACKEND_IPTABLES: u32 = 2;

/// TCP.
pub const TP_TCP: u32 = 0x1;
/// UDP.
pub const TP_UDP: u32 = 0x2;

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
    /// The instance's name: at most 20 letters, digits, '_', '.' and, not
    /// first, '-'. NULL: "tproxy". One network namespace holds several instances, if
    /// their names differ.
    pub name: *const c_char,
    /// Descriptors of the listening sockets that get what is intercepted.
    /// Protocol, family, address and port come from them. Each must be
    /// transparent, bound and, for TCP, listening (tp_listen makes such), and
    /// for each protocol and family there must be one address and port;
    /// sockets that share it by TP_REUSEPORT are fine. They are read now; a
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
    /// TP_TCP, TP_UDP. 0: what the listeners are, else TCP. With listen_addr
    /// it says what listens there.
    pub protocols: u32,
    /// TP_IPV4, TP_IPV6. 0: those that the listeners serve, else both; IPv4
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
    /// Destinations never to intercept, whatever dst says.
    pub bypass: *const tp_prefix,
    /// How many prefixes.
    pub n_bypass: usize,
    /// Names of the interfaces by which forwarded traffic comes in. They need
    /// not exist yet.
    pub interfaces: *const *const c_char,
    /// How many names. 0: every interface.
    pub n_interfaces: usize,
}

/// The size of the first version of tp_rules_config: where its last field ends.
const FIRST_VERSION: usize = std::mem::offset_of!(tp_rules_config, n_interfaces) + size_of::<usize>();

/// What the rules have done: packets, and their bytes from the IP header on.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_rules_stats {
    /// Given to a listener.
    pub intercepted_packets: u64,
    /// Their bytes.
    pub intercepted_bytes: u64,
    /// Given to a transparent socket that they belong to.
    pub diverted_packets: u64,
    /// Their bytes.
    pub diverted_bytes: u64,
    /// Dropped, because there was no listener.
    pub dropped_packets: u64,
    /// Their bytes.
    pub dropped_bytes: u64,
    /// Dropped, because they were sent straight to a listener.
    pub guarded_packets: u64,
    /// Their bytes.
    pub guarded_bytes: u64,
}

/// The size of the first version of tp_rules_stats.
const FIRST_STATS: usize = std::mem::offset_of!(tp_rules_stats, guarded_bytes) + size_of::<u64>();

/// Installed rules. Calls on one handle may come from any thread.
#[allow(non_camel_case_types)]
pub struct tp_rules {
    rules: Mutex<Rules>,
}

/// Makes the kernel bring connections to the listeners: an nf_tables table of
/// this process, and policy routing. No other program is run (but for
/// `iptables-restore` and `iptables-save`, with that backend).
///
/// What is intercepted is what comes in from the network for someone else, and
/// with TP_RULES_LOCAL_OUTPUT what this host sends: as config says, and never
/// what goes to this host's own addresses, to loopback, broadcast or
/// multicast, unless dst names it. While there is no listener, what would be
/// intercepted is dropped, so that nothing gets past the proxy.
///
/// The table belongs to the process: the kernel removes it when the process
/// ends, however it ends, and no other program can change it (`nft flush
/// ruleset` leaves it alone). A child that was forked and did not exec keeps
/// it alive. Routing has no owner: what a killed process leaves of it affects
/// no packet, and the next tp_install_rules or tp_purge_rules removes it. Once
/// the rules are gone, traffic flows as if they had never been. To restart
/// without a gap, install under a second name before the first ends, or use
/// TP_RULES_PERSIST.
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
/// down. EACCES: IPv6 is asked for and disabled on lo. EAGAIN: others change nf_tables without pause. EMFILE, ENFILE,
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

/// Replaces what the rules ask for, in one transaction: every packet is treated
/// either by the old rules or by the new. Counters go on.
///
/// config, size: as tp_install_rules. The name and TP_RULES_PERSIST stay as
/// they are, and so do table and priority (leave them zero, or say the same).
/// On failure the old rules are as they were.
///
/// Returns 0, or -1 with errno as tp_install_rules; EFAULT also if rules is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_replace_rules(rules: *mut tp_rules, config: *const tp_rules_config, size: usize) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word; the struct is integers and pointers.
        let config = unsafe { arg::sized("config", config, size, FIRST_VERSION) }?;
        // SAFETY: by the caller's word.
        let mut rules = unsafe { locked(rules) }?;
        // SAFETY: by the caller's word.
        rules.replace(&unsafe { decode(&config) }?)?;
        Ok(0)
    })
}

/// Removes what a dead or persistent instance left: its rules if they
/// persist, and routing. Never what a living process has.
///
/// name: the instance's, or NULL for all of them. An instance that left
/// nothing is no error.
///
/// Returns 0, or -1 with errno: EBUSY: a living process has these rules.
/// EINVAL: no valid name. EPERM: no CAP_NET_ADMIN over this network namespace.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_purge_rules(name: *const c_char) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word.
        rules::purge(unsafe { arg::text("name", name) }?)?;
        Ok(0)
    })
}

/// Adds prefixes to a set and removes others from it, in one transaction,
/// while the rules work. What is sent to the kernel is the change alone.
///
/// set: TP_SET_DST, TP_SET_SRC or TP_SET_BYPASS. dst and src can be changed if
/// they were given (none given means every address), bypass always. A set may
/// become empty: an empty dst or src intercepts nothing. Prefixes may
/// overlap: an address is in the set as long as one of them covers it. To add
/// one that is there is fine; what is both added and removed is removed.
///
/// Returns 0, or -1 with errno and nothing changed: EFAULT: rules is NULL, or
/// an array with a count. EINVAL: no such set, no valid prefix, or of a family
/// that the rules do not serve. ENOENT: a prefix to be removed is not there.
/// EMSGSIZE: a larger change than one transaction may be here (some 10,000
/// prefixes with the default net.core.wmem_max, any number as root of the host).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_update_rules(
    rules: *mut tp_rules,
    set: u32,
    add: *const tp_prefix,
    n_add: usize,
    remove: *const tp_prefix,
    n_remove: usize,
) -> c_int {
    guard(|| {
        let set = match set {
            TP_SET_DST => rules::Set::Dst,
            TP_SET_SRC => rules::Set::Src,
            TP_SET_BYPASS => rules::Set::Bypass,
            other => return Err(Error::invalid(format!("set: {other} is not known"))),
        };
        // SAFETY: by the caller's word.
        let add = unsafe { prefixes("add", add, n_add) }?;
        // SAFETY: by the caller's word.
        let remove = unsafe { prefixes("remove", remove, n_remove) }?;
        // SAFETY: by the caller's word.
        unsafe { locked(rules) }?.update(set, &add, &remove)?;
        Ok(0)
    })
}

/// Reads what the rules have done since they were installed.
///
/// stats, size: where it goes, and sizeof(struct tp_rules_stats).
///
/// Returns 0, or -1 with errno: EFAULT: rules or stats is NULL. EINVAL: a size
/// less than the first version's. E2BIG: larger than this library knows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_rules_stats(rules: *const tp_rules, stats: *mut tp_rules_stats, size: usize) -> c_int {
    guard(|| {
        if stats.is_null() {
            return Err(arg::null("stats"));
        }
        if size < FIRST_STATS {
            return Err(Error::invalid(format!(
                "stats: a size of {size} is less than the first version's {FIRST_STATS}"
            )));
        }
        if size > size_of::<tp_rules_stats>() {
            return Err(Error::new(libc::E2BIG, "stats: it has fields that this version of the library cannot fill"));
        }
        // SAFETY: by the caller's word.
        let found = unsafe { locked(rules) }?.stats()?;
        let found = tp_rules_stats {
            intercepted_packets: found.intercepted.packets,
            intercepted_bytes: found.intercepted.bytes,
            diverted_packets: found.diverted.packets,
            diverted_bytes: found.diverted.bytes,
            dropped_packets: found.dropped.packets,
            dropped_bytes: found.dropped.bytes,
            guarded_packets: found.guarded.packets,
            guarded_bytes: found.guarded.bytes,
        };
        // SAFETY: size bytes of the caller's, and no more than ours has.
        unsafe { stats.cast::<u8>().copy_from_nonoverlapping((&raw const found).cast(), size) };
        Ok(0)
    })
}

/// Writes the script that would do what tp_install_rules does on a host where
/// nothing is taken, and does nothing else. It needs no privilege.
///
/// It is a POSIX shell script, NUL-terminated UTF-8, and it ends at the first
/// command that fails. Rules made by it belong to
/// no process: they stay until somebody deletes them.
///
/// config, size: as tp_install_rules. format: TP_FORMAT_NFT or
/// TP_FORMAT_IPTABLES. buf, len: a place and its size, which becomes the size of the
/// script with its NUL; buf may be NULL to learn that size alone.
///
/// Returns 0, or -1 with errno and nothing written: EFAULT: config or len is
/// NULL. ERANGE: too little room. EINVAL: as tp_install_rules, or no such
/// format. EOPNOTSUPP: what iptables cannot do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_render_rules(
    config: *const tp_rules_config,
    size: usize,
    format: u32,
    buf: *mut c_char,
    len: *mut usize,
) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word; the struct is integers and pointers.
        let config = unsafe { arg::sized("config", config, size, FIRST_VERSION) }?;
        if len.is_null() {
            return Err(arg::null("len"));
        }
        let render = match format {
            TP_FORMAT_NFT => rules::render_nft,
            TP_FORMAT_IPTABLES => rules::render_iptables,
            other => return Err(Error::invalid(format!("format: {other} is not known"))),
        };
        // SAFETY: by the caller's word.
        let script = render(&unsafe { decode(&config) }?)?;
        let needed = script.len() + 1;
        // SAFETY: not NULL, and the caller's.
        let room = unsafe { len.read_unaligned() };
        if !buf.is_null() {
            if room < needed {
                let sentence = format!("the script needs {needed} bytes, but there is room for {room}");
                return Err(Error::new(libc::ERANGE, sentence));
            }
            // SAFETY: room for the script and its NUL, by the caller's word.
            unsafe {
                buf.cast::<u8>().copy_from_nonoverlapping(script.as_ptr(), script.len());
                buf.add(script.len()).write(0);
            }
        }
        // SAFETY: not NULL, and the caller's.
        unsafe { len.write_unaligned(needed) };
        Ok(0)
    })
}

/// The rules behind a handle, for this call alone.
///
/// # Safety
/// `rules` is NULL or a handle that has not been removed.
unsafe fn locked<'a>(rules: *const tp_rules) -> Result<MutexGuard<'a, Rules>> {
    // SAFETY: by the caller's word.
    let handle = unsafe { rules.as_ref() }.ok_or_else(|| arg::null("rules"))?;
    Ok(handle.rules.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// Decodes the struct; refuses what this version cannot do.
///
/// # Safety
/// Every pointer in it is NULL or points to what its comment says.
unsafe fn decode(config: &tp_rules_config) -> Result<Config> {
    let flags = arg::flags(config.flags, KNOWN_FLAGS)?;
    let has = |flag| flags & flag != 0;
    check_known(config)?;
    let mode = match (has(TP_RULES_DIVERT_ONLY), has(TP_RULES_REDIRECT)) {
        (false, false) => Mode::Tproxy,
        (false, true) => Mode::Redirect,
        (true, false) => Mode::DivertOnly,
        (true, true) => return Err(Error::invalid("TP_RULES_DIVERT_ONLY with TP_RULES_REDIRECT: one or the other")),
    };
    let protocols = Protocols { tcp: config.protocols & TP_TCP != 0, udp: config.protocols & TP_UDP != 0 };
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
            other => return Err(Error::invalid(format!("backend: {other} is not known"))),
        },
        local_output: has(TP_RULES_LOCAL_OUTPUT),
        fail_open: has(TP_RULES_FAIL_OPEN),
        allow_direct: has(TP_RULES_ALLOW_DIRECT),
        notrack: has(TP_RULES_NOTRACK),
        persist: has(TP_RULES_PERSIST),
        protocols,
        families: Families { v4: config.families & TP_IPV4 != 0, v6: config.families & TP_IPV6 != 0 },
        mark: config.mark,
        mark_mask: config.mark_mask,
        table: config.table,
        priority: config.priority,
        ports: ports.iter().map(|range| PortRange { first: range.first, last: range.last }).collect(),
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
            listener.map_err(|e| Error::new(e.errno(), format!("listeners[{index}], descriptor {fd}: {e}")))
        };
        return fds.iter().enumerate().map(listener).collect();
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
unsafe fn prefixes(what: &str, items: *const tp_prefix, len: usize) -> Result<Vec<Prefix>> {
    // SAFETY: by the caller's word.
    let items = unsafe { arg::array(what, items, len) }?;
    let prefix = |(index, item): (usize, &tp_prefix)| {
        let [a, b, c, d, ..] = item.addr;
        let addr = match i32::from(item.family) {
            libc::AF_INET => IpAddr::from([a, b, c, d]),
            libc::AF_INET6 => IpAddr::from(item.addr),
            other => {
                return Err(Error::invalid(format!("{what}[{index}]: family {other} is neither AF_INET nor AF_INET6")));
            }
        };
        if item.reserved != [0; 2] {
            return Err(Error::invalid(format!("{what}[{index}]: reserved must be zero")));
        }
        Prefix::new(addr, item.len).map_err(|e| Error::new(e.errno(), format!("{what}[{index}]: {e}")))
    };
    items.iter().enumerate().map(prefix).collect()
}

/// # Safety
/// `items` is NULL or valid for reads of `len` pointers, each to a NUL-terminated string.
unsafe fn names(what: &str, items: *const *const c_char, len: usize) -> Result<Vec<String>> {
    // SAFETY: by the caller's word.
    let items = unsafe { arg::array(what, items, len) }?;
    let name = |item: &*const c_char| {
        // SAFETY: by the caller's word.
        let name = unsafe { arg::text(what, *item) }?;
        Ok(name.ok_or_else(|| arg::null(what))?.to_owned())
    };
    items.iter().map(name).collect()
}

/// Refuses values that mean nothing, and what this version cannot do.
fn check_known(config: &tp_rules_config) -> Result<()> {
    let known = |what: &str, value: u32, known: u32| match value & !known {
        0 => Ok(()),
        unknown => Err(Error::invalid(format!("{what}: {unknown:#x} is not known"))),
    };
    known("protocols", config.protocols, TP_TCP | TP_UDP)?;
    known("families", config.families, TP_IPV4 | TP_IPV6)?;
    Ok(())
}
