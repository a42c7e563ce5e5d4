//! Rules.

use std::ffi::{c_char, c_int};

use super::arg::{self, SizedOut};
use super::config::*;
use super::guard::guard;
use crate::error::{Error, Result};
use crate::rules::{self, Rules};
use crate::sys;

/// Installed rules. Calls on one handle may come from any thread of the process
/// that installed them. A forked child may use its copy only after that process
/// has ended, and no two children at the same time; until then its calls fail
/// with EBUSY, and tp_remove_rules frees the copy and removes nothing.
#[allow(non_camel_case_types)]
pub struct tp_rules {
    rules: Rules,
}

/// Makes the kernel bring connections to the listeners: an nf_tables table of
/// this process, and policy routing. It runs no program, except with
/// TP_BACKEND_IPTABLES, and with TP_BACKEND_AUTO where nf_tables is missing.
///
/// What is intercepted is what comes in from the network for someone else, and
/// with TP_RULES_LOCAL_OUTPUT what this host sends: as config says, and never
/// what goes to this host's own addresses, to loopback, broadcast or
/// multicast, unless dst names it. While there is no listener, what would be
/// intercepted is dropped, so that nothing gets past the proxy.
///
/// Packets that no other host can have sent are never intercepted; if they
/// match the selection, they are dropped and counted as dropped. These are
/// packets that did not come in by lo and have one of this host's own
/// addresses, a broadcast or a multicast address as their source; packets to
/// 127.0.0.0/8 or ::1 that did not come in by lo; IPv4 packets from or to
/// 0.0.0.0/8; and IPv6 packets from or to the unspecified address (::), a
/// v4-mapped one (::ffff:0:0/96) or another of ::/80. IPv6 packets with such an
/// address are not diverted to transparent sockets either. (With iptables and
/// TP_RULES_REDIRECT they are left alone: the nat table cannot drop.)
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
/// down. EACCES: IPv6 is asked for and disabled on lo. EAGAIN: others change
/// nf_tables without pause. EMFILE, ENFILE, ENOBUFS, ENOMEM: as tp_socket.
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
        let handle = sys::try_box(tp_rules { rules: installed }).map_err(|handle| {
            // They would persist otherwise.
            Error::no_memory().after(handle.rules.remove())
        })?;
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
/// In a forked child of the process that installed the rules, while that
/// process lives, it removes nothing (as tp_forget_rules) and returns 0. After
/// that process has ended, the first child that calls it removes the rules for
/// all. If another process has removed the rules already, it does nothing and
/// returns 0; it does nothing to another instance that has their name now.
///
/// Returns 0, or -1 with errno if something could not be removed, which
/// tp_last_error names. EBADF: the program has closed the descriptors of the
/// handle; nothing is written to them or closed, and tp_purge_rules removes
/// what is left. Rules and routes that were removed already are no error.
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

/// Gives up a forked child's copy of a handle: closes the child's copies of
/// the descriptors, frees the handle, and removes nothing.
///
/// A worker process that was forked by the process which installed the rules
/// calls it once, first of all. Until every process that has the descriptors
/// has ended or called it, the kernel keeps the table. In the process that
/// installed the rules it leaves routing behind, which the next
/// tp_install_rules or tp_purge_rules removes; there, call tp_remove_rules.
///
/// @param rules  handle, or NULL, which does nothing. The handle is freed.
///
/// Async-signal-safe: no. Thread-safe; no other call may use the handle at the
/// same time. errno is unchanged.
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

/// Replaces what the rules ask for, in one transaction: every packet is treated
/// either by the old rules or by the new. Counters go on.
///
/// config, size: as tp_install_rules. The name and TP_RULES_PERSIST stay as
/// they are, and so do table and priority (leave them zero, or say the same).
/// On failure the old rules are as they were.
///
/// Returns 0, or -1 with errno as tp_install_rules; EFAULT also if rules is
/// NULL; EBADF, EBUSY, EDEADLK, ENOENT: as tp_rules_stats.
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

/// Removes what a dead or persistent instance left: its rules if they
/// persist, and routing. Never what a living process has.
///
/// name: the instance's, or NULL for all of them. An instance that left
/// nothing is no error. On success nothing is left: if it cannot be known
/// whether something is left, the call fails.
///
/// Runs iptables only if the kernel has chains of this library there. Which
/// chains it has is read from the kernel. (Without /proc, or without the right
/// to read /proc/net/ip_tables_names, the kernel is asked for the legacy tables
/// mangle and nat, and makes them, empty, if it can.)
///
/// Returns 0, or -1 with errno:
///   EBUSY       a living process has these rules
///   EINVAL      no valid name
///   EPERM       no CAP_NET_ADMIN over this network namespace
///   EAGAIN, ETIMEDOUT, EOPNOTSUPP, EIO
///               a program of iptables failed, see above
///   EMFILE, ENFILE, ENOBUFS, ENOMEM
///               as tp_socket
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_purge_rules(name: *const c_char) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word.
        rules::purge(unsafe { arg::text("name", name) }?)?;
        Ok(0)
    })
}

/// Adds prefixes to a set and removes others from it, in one transaction,
/// while the rules work. What is sent to the kernel is the change alone, and
/// what it costs does not grow with the set; but once in a while, as a set
/// grows, it is sent whole, as tp_replace_rules would.
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
/// EBADF, EBUSY, EDEADLK: as tp_rules_stats. ENOENT also if the table is gone.
/// ESTALE: another process has changed the rules since this one was forked, so
/// that the sets are not known here; call tp_replace_rules first.
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
            other => return Err(Error::invalid_with(format_args!("set: {other} is not known"))),
        };
        // SAFETY: by the caller's word.
        let add = unsafe { prefixes("add", add, n_add) }?;
        // SAFETY: by the caller's word.
        let remove = unsafe { prefixes("remove", remove, n_remove) }?;
        // SAFETY: by the caller's word.
        unsafe { installed(rules) }?.update(set, &add, &remove)?;
        Ok(0)
    })
}

/// Reads what the rules have done since they were installed.
///
/// stats, size: where it goes, and sizeof(struct tp_rules_stats).
///
/// Returns 0, or -1 with errno: EFAULT: rules or stats is NULL. EINVAL: a size
/// less than the first version's. E2BIG: larger than this library knows.
/// ENOENT: the table is gone, or is another instance's by now. EBADF: the
/// program has closed the descriptors of the handle, or something else has
/// their numbers. EBUSY: this is a forked child, and the process that
/// installed the rules lives (tp_read_stats works). EDEADLK: another thread
/// was in a call on the handle when this process was forked.
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

/// Reads what the rules of an instance have done, whatever process they
/// belong to.
///
/// name: the instance's; NULL: "tproxy". stats, size: as tp_rules_stats.
///
/// Returns 0, or -1 with errno: ENOENT: there are no rules of this name.
/// EPERM: no CAP_NET_ADMIN over this network namespace. EFAULT, EINVAL, E2BIG:
/// as tp_rules_stats; EINVAL also if the name is not valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_read_stats(name: *const c_char, stats: *mut tp_rules_stats, size: usize) -> c_int {
    guard(|| {
        let out = SizedOut::new("stats", stats, size, FIRST_STATS)?;
        // SAFETY: by the caller's word.
        let found = rules::stats_of(unsafe { arg::text("name", name) }?.unwrap_or_default())?;
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
