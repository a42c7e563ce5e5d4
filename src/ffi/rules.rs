//! Rules.

use std::ffi::{CString, c_char, c_int, c_void};
use std::time::Duration;

use libc::{sockaddr, socklen_t};

use super::arg::{self, SizedOut};
use super::config::*;
use super::guard::guard;
use crate::error::{Error, Result};
use crate::memory;
use crate::prefix::Prefix;
use crate::rules::plan::DEFAULT_NAME;
use crate::rules::{self, Rules};
use crate::sys;

/// Handle of installed rules, from tp_install_rules().
///
/// Calls on one handle may come from any thread of the process that installed the rules. A forked child may
/// use its copy only after that process has ended, and only one child at a time. Until then its calls fail
/// with EBUSY, and tp_remove_rules() frees the copy and removes nothing.
#[allow(non_camel_case_types)]
pub struct tp_rules {
    rules: Rules,
}

/// Installs the kernel rules that deliver matching traffic to the listeners: an nf_tables table owned by
/// this process, and policy routing.
///
/// Intercepts forwarded traffic and, with TP_RULES_LOCAL_OUTPUT, locally generated traffic, as selected by
/// config; never traffic to this host's own addresses, loopback, broadcast or multicast, unless dst names
/// it. While no listener exists, matching traffic is dropped, so that no packet bypasses the proxy.
///
/// Replies of connections that others began are never intercepted: those of port forwards, of inbound services
/// of a LAN, of this host's services and of this host's own connections. If the port selection could match
/// them (ports is NULL or includes one above 1023), connection tracking is used to recognize them, which
/// enables it on this host:
///   - TCP: a packet that begins a connection is never a reply. Other packets are not intercepted if they are in
///     the reply direction of a tracked connection.
///   - UDP: a datagram in the reply direction of a tracked connection is not intercepted, unless a transparent
///     socket of this host began that connection. A host that sends a datagram to a client first therefore
///     receives the client's datagrams to that address and port directly.
///
/// Ports below 1024 count as ports of services, not of clients: replies to such ports are not recognized.
///
/// A listener that serves only one family leaves packets of the other family alone: with a listener on 0.0.0.0,
/// forwarded IPv6 packets bypass the proxy. A listener on the IPv6 wildcard address serves both, and rules for both
/// are installed whether this host has IPv6 or not. While IPv6 is disabled on lo, the kernel refuses the route that they need:
/// until tp_verify_rules() or tp_replace_rules() completes it, selected IPv6 packets are dropped.
///
/// If the selections of several instances overlap, the first installed instance intercepts.
///
/// Packets that no other host can legitimately send are never intercepted. If they match the selection,
/// they are dropped and counted as dropped:
///   - packets with one of this host's own addresses, a broadcast or a multicast address as the source,
///     unless they arrived on lo
///   - packets to 127.0.0.0/8 or ::1, unless they arrived on lo
///   - IPv4 packets from or to 0.0.0.0/8
///   - IPv6 packets from or to the unspecified address (::), a v4-mapped address (::ffff:0:0/96) or another
///     address in ::/80
///
/// IPv6 packets with such an address are not diverted to transparent sockets either. With iptables and
/// TP_RULES_REDIRECT, all these packets are left unchanged, because the nat table cannot drop.
///
/// The table belongs to the process: the kernel removes it when the process ends for any reason, and no
/// other program can change it (`nft flush ruleset` skips it). A forked child that has not called exec
/// keeps it. Routing has no owner: the routes and routing rules of a killed process affect no packet, and
/// the next tp_install_rules() or tp_purge_rules() removes them. After the rules are removed, traffic
/// flows as it did before they were installed. To restart without a gap, install rules under a second name
/// before the first process ends, or use TP_RULES_PERSIST.
///
/// @param config  traffic to intercept.
/// @param size    sizeof(struct tp_rules_config).
/// @param rules   receives the handle, only on success; tp_remove_rules() frees it.
/// @return 0, or -1 with errno:
///   EFAULT           config or rules is NULL, or an array is NULL while its count is not 0
///   EINVAL           a value is out of range, or flags has an unknown bit
///   EINVAL           a listener is not transparent, not bound or not listening
///   EINVAL           size is less than the size of the first version of the struct
///   E2BIG            config has fields that this version does not know, and they are not 0
///   EOPNOTSUPP       this version cannot do it, or the kernel lacks an option, which tp_last_error() names
///   EPERM            CAP_NET_ADMIN is missing in the owner of this network namespace
///   EBUSY            a running process has rules of this name, or uses this table or priority
///   EEXIST           another program uses the requested name, table or priority
///   EEXIST           rules of this name persist without an owner, and TP_RULES_PERSIST is not set
///   EBADF            a listener is not an open descriptor
///   ENOTSOCK         a listener is not a socket
///   ENETDOWN         the interface lo is down
///   EACCES           IPv6 is requested and disabled on lo
///   EAGAIN           other programs change nf_tables continuously
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// On failure no rule or route remains. Runs no program, except with TP_BACKEND_IPTABLES, and with
/// TP_BACKEND_AUTO if nf_tables is missing; see "Programs" in tproxy(7) for the errors of programs.
///
/// Reverse-path filtering works as before, whether net.ipv4.conf.*.src_valid_mark is set or not. No sysctl
/// is changed. Forwarding (net.ipv4.ip_forward, net.ipv6.conf.all.forwarding) is not required for
/// intercepted traffic.
///
/// Needs Linux 5.12.
///
/// Thread-safe.
///
/// @since 0.1.0
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
        let handle = sys::try_box(tp_rules { rules: installed }).map_err(|handle| {
            // They would persist otherwise.
            Error::no_memory().after(handle.rules.remove())
        })?;
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { rules.write_unaligned(Box::into_raw(handle)) };
        Ok(0)
    })
}

/// Removes the rules that tp_install_rules() installed and frees the handle.
///
/// Established proxied connections break: their packets are no longer diverted.
///
/// In a forked child of the process that installed the rules, while that process lives, it removes nothing
/// (like tp_forget_rules()) and returns 0. After that process has ended, the first child that calls it
/// removes the rules for all processes. If another process has already removed the rules, it removes nothing
/// and returns 0, even if another instance now has their name.
///
/// @param rules  handle, or NULL, which does nothing. The handle is freed whatever is returned.
/// @return 0, or -1 with errno if something could not be removed, which tp_last_error() names:
///   EBADF  the program closed the descriptors of the handle; nothing is written to them or closed, and
///          tp_purge_rules() removes what remains
///   EPERM  CAP_NET_ADMIN is missing; the kernel removes the table when the process ends
///
/// Rules and routes that are already removed are not an error. No other call may use the handle at the same
/// time.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_remove_rules(rules: *mut tp_rules) -> c_int {
    guard(|| {
        if rules.is_null() {
            return Ok(0);
        }
        // SAFETY: it came from Box::into_raw, and ends here.
        unsafe { Box::from_raw(rules) }.rules.remove()?;
        Ok(0)
    })
}

/// Frees a forked child's copy of a handle without removing the rules.
///
/// Closes the child's copies of the descriptors and frees the handle. Call it once, first, in a worker
/// process that was forked by the process that installed the rules. The kernel keeps the table until every
/// process that has the descriptors has ended or has called this function. In the process that installed
/// the rules, call tp_remove_rules() instead: there this function leaves routing behind, which the next
/// tp_install_rules() or tp_purge_rules() removes.
///
/// @param rules  handle, or NULL, which does nothing. The handle is freed.
///
/// errno is unchanged. Not async-signal-safe.
///
/// Thread-safe; no other call may use the handle at the same time.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_forget_rules(rules: *mut tp_rules) {
    let _: c_int = guard(|| {
        if !rules.is_null() {
            // SAFETY: it came from Box::into_raw, and ends here.
            unsafe { Box::from_raw(rules) }.rules.forget();
        }
        Ok(0)
    });
}

/// Atomically replaces the configuration of installed rules.
///
/// One transaction: each packet is processed by either the old or the new rules. Counters are preserved.
/// The name and TP_RULES_PERSIST cannot change. table and priority can: routing is added at its new place
/// before it is deleted at the old one. If they are 0, routing stays where it is, unless a routing rule of
/// another program takes intercepted packets first. On failure the old rules are unchanged.
///
/// @param rules   handle from tp_install_rules().
/// @param config  new configuration.
/// @param size    sizeof(struct tp_rules_config).
/// @return 0, or -1 with errno:
///   EFAULT   rules or config is NULL, or an array is NULL while its count is not 0
///   ENOENT   the table was removed, or now belongs to another instance
///   EBADF    the program closed the descriptors of the handle, or their numbers are now used otherwise
///   EBUSY    this is a forked child, and the process that installed the rules is running
///   EDEADLK  another thread was in a call on the handle when this process was forked
///   EINVAL, E2BIG, EOPNOTSUPP, EPERM
///            as for tp_install_rules(); its other errors are possible too
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_replace_rules(rules: *mut tp_rules, config: *const tp_rules_config, size: usize) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word; the struct is integers and pointers.
        let config = unsafe { arg::sized("config", config, size, FIRST_VERSION) }?;
        // SAFETY: by the caller's word.
        let rules = unsafe { installed(rules) }?;
        // SAFETY: by the caller's word.
        rules.replace(&unsafe { decode(&config) }?)?;
        Ok(0)
    })
}

/// Verifies that installed rules still work, and optionally repairs their routing.
///
/// Other programs can delete routing rules and routes (`ip rule flush`), or add routing rules that take
/// intercepted packets first, as wg-quick does. Connections then time out. With TP_VERIFY_REPAIR, missing
/// routing is added again, and routing that another program has overtaken is moved ahead of that program's
/// rules. It is added at its new place before it is deleted at the old one. If the configuration has a
/// priority, routing is not moved: use tp_replace_rules(). Also completes rules that were installed while
/// IPv6 was disabled on lo.
///
/// @param rules  handle from tp_install_rules().
/// @param flags  0 or TP_VERIFY_REPAIR.
/// @return 0 if the rules are as installed, or -1 with errno:
///   ENOENT    the table was removed, or now belongs to another instance, or the chains of iptables were
///             removed
///   ESTALE    routing is missing, or a routing rule of another program may take intercepted packets first,
///             or IPv6 was disabled on lo when the rules were installed
///   ESTALE    another process has changed the rules since this process was forked
///   ENOTCONN  no socket receives the packets that the rules intercept
///   EFAULT    rules is NULL
///   EINVAL    flags has an unknown bit
///   EBADF     the program closed the descriptors of the handle, or their numbers are now used otherwise
///   EBUSY     this is a forked child, and the process that installed the rules is running
///   EDEADLK   another thread was in a call on the handle when this process was forked
///   ENETDOWN  the interface lo is down, with TP_VERIFY_REPAIR
///
/// With TP_VERIFY_REPAIR the other errors of tp_install_rules() are possible too. Reads the routing rules and
/// at most 10,000 sockets of each family and protocol. With TP_BACKEND_IPTABLES, runs iptables-save; see
/// "Programs" in tproxy(7).
///
/// Thread-safe.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_verify_rules(rules: *mut tp_rules, flags: u32) -> c_int {
    guard(|| {
        let flags = arg::flags(flags, TP_VERIFY_REPAIR)?;
        // SAFETY: by the caller's word.
        let rules = unsafe { installed(rules) }?;
        if flags & TP_VERIFY_REPAIR != 0 { rules.repair() } else { rules.verify() }?;
        Ok(0)
    })
}

/// Instance of rules, as tp_list_rules() reports it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_instance {
    /// Name of the instance.
    pub name: *const c_char,
    /// TP_BACKEND_NFT or TP_BACKEND_IPTABLES.
    pub backend: u32,
    /// TP_RULES_ flags of its configuration.
    pub flags: u32,
    /// TP_FAMILY_ bits; 0 if unknown.
    pub families: u32,
    /// TP_PROTO_ bits; 0 if unknown.
    pub protocols: u32,
    /// Mark of packets for local sockets, and its mask; 0 if unknown.
    pub mark: u32,
    /// Mask of mark.
    pub mark_mask: u32,
    /// Routing table; 0 if unknown.
    pub table: u32,
    /// First routing rule priority; 0 if unknown.
    pub priority: u32,
    /// Process that owns the rules. 0: none, because they are persistent or their owner has ended. -1: a process in
    /// another PID namespace, or one that cannot be seen from here.
    pub owner_pid: i64,
    /// Address of its first listener, or NULL if it has none or it is unknown.
    pub listen_addr: *const sockaddr,
    /// Size of listen_addr, or 0.
    pub listen_addrlen: socklen_t,
    /// Counters since the rules were installed.
    pub stats: tp_rules_stats,
}

/// Function that receives an instance. The struct and all data it points to are valid only during the call.
#[allow(non_camel_case_types)]
pub type tp_instance_fn = Option<unsafe extern "C" fn(instance: *const tp_instance, context: *mut c_void)>;

/// Lists the instances of rules in this network namespace, whichever process installed them.
///
/// Includes persistent instances, and chains of iptables whose process was killed.
///
/// @param report   called once per instance, in the order of their names.
/// @param context  passed to report.
/// @return number of instances, or -1 with errno and report not called:
///   EFAULT           report is NULL
///   EPERM            CAP_NET_ADMIN is missing in the owner of this network namespace
///   EAGAIN, ETIMEDOUT, EOPNOTSUPP, EIO
///                    a program of iptables failed; see "Programs" in tproxy(7)
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// Runs iptables-save only if the kernel has chains of this library.
///
/// Thread-safe.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_list_rules(report: tp_instance_fn, context: *mut c_void) -> c_int {
    guard(|| {
        let report = report.ok_or_else(|| arg::null("report"))?;
        let instances = rules::list()?;
        for instance in &instances {
            let name = CString::new(instance.name.as_str()).unwrap_or_default();
            let addr = instance.listen_addr.map(socket2::SockAddr::from);
            let pair = |first: bool, second: bool| u32::from(first) | u32::from(second) << 1;
            let found = tp_instance {
                name: name.as_ptr(),
                backend: match instance.backend {
                    rules::Backend::Iptables => TP_BACKEND_IPTABLES,
                    _ => TP_BACKEND_NFT,
                },
                flags: instance.options.bits(),
                families: pair(instance.families.v4, instance.families.v6),
                protocols: pair(instance.protocols.tcp, instance.protocols.udp),
                mark: instance.mark.value,
                mark_mask: instance.mark.mask,
                table: instance.table,
                priority: instance.priority,
                owner_pid: match instance.owner {
                    rules::Owner::None => 0,
                    rules::Owner::Process(pid) => i64::from(pid),
                    rules::Owner::Elsewhere => -1,
                },
                listen_addr: addr.as_ref().map_or(std::ptr::null(), |addr| addr.as_ptr().cast()),
                listen_addrlen: addr.as_ref().map_or(0, socket2::SockAddr::len),
                stats: as_c(&instance.stats),
            };
            // SAFETY: the caller's function, and its context; name and address live until it returns.
            unsafe { report(&raw const found, context) };
        }
        Ok(instances.len() as c_int)
    })
}

/// Removes what a dead or persistent instance left behind: its rules, if they are persistent, and routing.
///
/// Never removes the rules of a running process. An instance that left nothing is not an error. Success
/// means that nothing is left: if this cannot be determined, the call fails.
///
/// @param name  name of the instance, or NULL for all instances.
/// @return 0, or -1 with errno:
///   EBUSY            a running process has these rules
///   EINVAL           name is not valid
///   EPERM            CAP_NET_ADMIN is missing in the owner of this network namespace
///   EAGAIN, ETIMEDOUT, EOPNOTSUPP, EIO
///                    a program of iptables failed; see "Programs" in tproxy(7)
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// Runs iptables only if the kernel has chains of this library there, which is read from the kernel.
/// Without /proc, or without permission to read /proc/net/ip_tables_names, the kernel is asked for the
/// legacy tables mangle and nat, and creates them, empty, if it can.
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_purge_rules(name: *const c_char) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word.
        rules::purge(unsafe { instance_name(name) }?)?;
        Ok(0)
    })
}

/// Adds prefixes to a set and removes prefixes from it, in one transaction, while the rules are active.
///
/// Sends only the change to the kernel, so the cost does not depend on the size of the set; occasionally,
/// when a set has grown, it is rebuilt as by tp_replace_rules().
///
/// Prefixes may overlap: an address is in the set as long as one prefix covers it. Adding a prefix that
/// is present is not an error. A prefix that is both added and removed is removed. A set may become empty:
/// with an empty dst or src, nothing is intercepted.
///
/// @param rules     handle from tp_install_rules().
/// @param set       TP_SET_DST, TP_SET_SRC or TP_SET_BYPASS. dst and src can be changed only if they were
///                  given to tp_install_rules(), because an omitted set matches all addresses; bypass can
///                  be changed except with TP_RULES_DIVERT_ONLY.
/// @param add       prefixes to add.
/// @param n_add     number of prefixes to add.
/// @param remove    prefixes to remove.
/// @param n_remove  number of prefixes to remove.
/// @return 0, or -1 with errno and with nothing changed:
///   EFAULT    rules is NULL, or an array is NULL while its count is not 0
///   EINVAL    set is unknown, or cannot be changed with this configuration
///   EINVAL    a prefix is not valid, or is of a family that the rules do not serve
///   ENOENT    a prefix to remove is not in the set
///   ENOENT    the table was removed, or now belongs to another instance
///   EMSGSIZE  the change exceeds the size of one transaction (about 10,000 prefixes with the default
///             net.core.wmem_max; no limit for root of the host)
///   EBADF     the program closed the descriptors of the handle, or their numbers are now used otherwise
///   EBUSY     this is a forked child, and the process that installed the rules is running
///   EDEADLK   another thread was in a call on the handle when this process was forked
///   ESTALE    another process has changed the rules since this process was forked, so the sets are not known
///             here: call tp_replace_rules() first
///
/// Thread-safe.
///
/// @since 0.1.0
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
        let set = set_of(set)?;
        // SAFETY: by the caller's word.
        let add = unsafe { prefixes("add", add, n_add) }?;
        // SAFETY: by the caller's word.
        let remove = unsafe { prefixes("remove", remove, n_remove) }?;
        // SAFETY: by the caller's word.
        unsafe { installed(rules) }?.update(set, &add, &remove)?;
        Ok(0)
    })
}

/// Adds addresses to a set for a limited time, after which the kernel removes them, while the rules are active.
///
/// For addresses that are known to be valid for a time, such as the answers of a DNS server. An address that is
/// already learned gets the new time, whether it is longer or shorter. Learned addresses add to the prefixes of
/// the configuration and of tp_update_rules(), which cannot remove them. They are kept by tp_replace_rules(),
/// and by TP_RULES_PERSIST when the rules are taken over.
///
/// Sends only the addresses to the kernel, so the cost does not depend on the size of the set. The first call
/// for a set and family replaces the rules as tp_replace_rules() does; until then, packets are not compared
/// with learned addresses.
///
/// @param rules        handle from tp_install_rules().
/// @param set          TP_SET_DST, which can be used only if dst was given to tp_install_rules(), empty or not,
///                     or TP_SET_BYPASS.
/// @param addrs        addresses: prefixes with len 32 (IPv4) or 128 (IPv6).
/// @param n            number of addresses.
/// @param ttl_seconds  time in seconds, at least 1.
/// @return 0, or -1 with errno and with nothing changed:
///   EFAULT      rules is NULL, or addrs is NULL while n is not 0
///   EINVAL      set is unknown or TP_SET_SRC
///   EINVAL      set is TP_SET_DST and dst is NULL: every destination is intercepted already
///   EINVAL      the rules have TP_RULES_DIVERT_ONLY
///   EINVAL      a prefix is not valid, is shorter than its address, or is of a family that the rules do not serve
///   EINVAL      ttl_seconds is 0
///   ENOSPC      the set would have more than 1,000,000 learned addresses of a family
///   EOPNOTSUPP  the rules are iptables rules
///   ENOENT      the table was removed, or now belongs to another instance
///   EMSGSIZE    the addresses exceed the size of one transaction (some thousands with the default
///               net.core.wmem_max; no limit for root of the host)
///   EBADF       the program closed the descriptors of the handle, or their numbers are now used otherwise
///   EBUSY       this is a forked child, and the process that installed the rules is running
///   EDEADLK     another thread was in a call on the handle when this process was forked
///   ESTALE      another process has changed the rules since this process was forked, so the sets are not known
///               here: call tp_replace_rules() first
///
/// When a bypassed address expires, its TCP connections are intercepted and reset, unless TP_RULES_NEW_ONLY is
/// set.
///
/// Connections that a flow table has offloaded are not ended, unlike by tp_update_rules(): they continue as they
/// were, because ending them would discard the cached routes of this host at each call.
///
/// The kernel frees the memory of expired addresses, and stops counting them, within ten seconds of their end.
/// Kernels before Linux 6.12 count an address of the call three times until it is learned, so that they report
/// ENOSPC earlier.
///
/// Thread-safe.
///
/// @since 0.2.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_learn_addresses(
    rules: *mut tp_rules,
    set: u32,
    addrs: *const tp_prefix,
    n: usize,
    ttl_seconds: u32,
) -> c_int {
    guard(|| {
        let set = set_of(set)?;
        // SAFETY: by the caller's word.
        let prefixes = unsafe { prefixes("addrs", addrs, n) }?;
        let address = |(index, prefix): (usize, &Prefix)| {
            let addr = prefix.addr();
            if *prefix == Prefix::from(addr) {
                return Ok(addr);
            }
            Err(Error::invalid_with(format_args!(
                "addrs[{index}]: {prefix} is not one address: prefixes cannot be learned"
            )))
        };
        let addrs = memory::collect(prefixes.iter().enumerate().map(address))?;
        // SAFETY: by the caller's word.
        unsafe { installed(rules) }?.learn(set, &addrs, Duration::from_secs(ttl_seconds.into()))?;
        Ok(0)
    })
}

/// The set of a `TP_SET_` constant.
fn set_of(set: u32) -> Result<rules::Set> {
    match set {
        TP_SET_DST => Ok(rules::Set::Dst),
        TP_SET_SRC => Ok(rules::Set::Src),
        TP_SET_BYPASS => Ok(rules::Set::Bypass),
        other => Err(Error::invalid_with(format_args!("set: {other} is not known"))),
    }
}

/// Reads the counters of the rules since they were installed.
///
/// @param rules  handle from tp_install_rules().
/// @param stats  receives the counters.
/// @param size   sizeof(struct tp_rules_stats).
/// @return 0, or -1 with errno:
///   EFAULT   rules or stats is NULL
///   EINVAL   size is less than the size of the first version of the struct
///   E2BIG    size is greater than the size of the struct in this version
///   ENOENT   the table was removed, or now belongs to another instance
///   EBADF    the program closed the descriptors of the handle, or their numbers are now used otherwise
///   EBUSY    this is a forked child, and the process that installed the rules is running; use
///            tp_read_stats()
///   EDEADLK  another thread was in a call on the handle when this process was forked
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_rules_stats(rules: *const tp_rules, stats: *mut tp_rules_stats, size: usize) -> c_int {
    guard(|| {
        let out = SizedOut::new("stats", stats, size, FIRST_STATS)?;
        // SAFETY: by the caller's word.
        let found = unsafe { installed(rules) }?.stats()?;
        // SAFETY: by the caller's word.
        unsafe { out.write(as_c(&found)) };
        Ok(0)
    })
}

/// Reads the counters of an instance by name, whichever process owns it.
///
/// @param name   name of the instance. NULL or empty: "tproxy".
/// @param stats  receives the counters.
/// @param size   sizeof(struct tp_rules_stats).
/// @return 0, or -1 with errno:
///   ENOENT  no rules of this name exist
///   EPERM   CAP_NET_ADMIN is missing in the owner of this network namespace
///   EFAULT  stats is NULL
///   EINVAL  name is not valid, or size is less than the size of the first version of the struct
///   E2BIG   size is greater than the size of the struct in this version
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_read_stats(name: *const c_char, stats: *mut tp_rules_stats, size: usize) -> c_int {
    guard(|| {
        let out = SizedOut::new("stats", stats, size, FIRST_STATS)?;
        // SAFETY: by the caller's word.
        let found = rules::stats_of(unsafe { instance_name(name) }?.unwrap_or(DEFAULT_NAME))?;
        // SAFETY: by the caller's word.
        unsafe { out.write(as_c(&found)) };
        Ok(0)
    })
}

/// What was counted, as C has it.
fn as_c(found: &rules::Stats) -> tp_rules_stats {
    tp_rules_stats {
        intercepted_packets: found.intercepted.packets,
        intercepted_bytes: found.intercepted.bytes,
        diverted_packets: found.diverted.packets,
        diverted_bytes: found.diverted.bytes,
        dropped_packets: found.dropped.packets,
        dropped_bytes: found.dropped.bytes,
        direct_packets: found.direct.packets,
        direct_bytes: found.direct.bytes,
    }
}

/// Writes the shell script that is equivalent to tp_install_rules() on a host where all names, tables and
/// priorities are free.
///
/// Has no other effect and needs no privilege. The script is for POSIX sh, NUL-terminated UTF-8, and exits
/// at the first command that fails. Rules that it installs belong to no process: they stay until they are
/// deleted.
///
/// @param config  configuration, as for tp_install_rules().
/// @param size    sizeof(struct tp_rules_config).
/// @param format  TP_FORMAT_NFT or TP_FORMAT_IPTABLES.
/// @param buf     buffer for the script, or NULL to query its size.
/// @param len     size of buf in bytes; on success the size of the script including its NUL.
/// @return 0, or -1 with errno and with nothing written:
///   EFAULT      config or len is NULL
///   ERANGE      the buffer is too small
///   EINVAL      format is unknown, or config is not valid, as for tp_install_rules()
///   EOPNOTSUPP  iptables cannot do what config requests
///   EOPNOTSUPP  format is TP_FORMAT_IPTABLES, and the library was built without feature `iptables`
///
/// Thread-safe.
///
/// @since 0.1.0
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
            other => return Err(Error::invalid_with(format_args!("format: {other} is not known"))),
        };
        // SAFETY: by the caller's word.
        let script = render(&unsafe { decode(&config) }?)?;
        let needed = script.len() + 1;
        // SAFETY: not NULL, and the caller's.
        let room = unsafe { len.read_unaligned() };
        if !buf.is_null() {
            if room < needed {
                return Err(Error::with(
                    libc::ERANGE,
                    format_args!("the script needs {needed} bytes, but there is room for {room}"),
                ));
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

/// The rules behind a handle.
///
/// # Safety
/// `rules` is NULL or a handle that has not been removed.
unsafe fn installed<'a>(rules: *const tp_rules) -> Result<&'a Rules> {
    // SAFETY: by the caller's word.
    unsafe { rules.as_ref() }.map(|handle| &handle.rules).ok_or_else(|| arg::null("rules"))
}
