//! Datagrams: received with their original destinations, answered from any
//! source.

use std::ffi::c_int;

use libc::{msghdr, sockaddr, socklen_t, ssize_t};

use super::arg::{self, AddressOut, DatagramAddressOut, SizedOut};
use super::guard::{guard, guard_hot, guard_uncancellable};
use super::sockets::TP_NONBLOCK;
use crate::address::KernelAddr;
use crate::error::{Error, Result};
use crate::sys;
use crate::udp::{self, ControlRoom, Datagram, Options, Replier};

/// In tp_datagram.flags: the datagram was longer than its place; len is what
/// there was room for, and the rest is lost.
pub const TP_DGRAM_TRUNC: u32 = 0x1;
/// In tp_datagram.flags: the socket reports more than there was room for, so
/// that the original destination or the segment length may be missing.
pub const TP_DGRAM_CTRUNC: u32 = 0x2;
/// In tp_datagram.flags: there is no original destination, because the socket
/// was not told to report it (tp_socket, tp_set_transparent), or because an
/// IPv6 datagram was sent to the unspecified or a v4-mapped address, which
/// would mean this host, or IPv4, to a socket call.
pub const TP_DGRAM_NO_ORIG_DST: u32 = 0x4;

/// The most datagrams that one tp_recv_datagrams receives, and that tp_reply
/// hands to the kernel at once.
pub const TP_BATCH_MAX: u32 = 64;

/// In tp_replier_config.flags: take no ports, reply by raw sockets alone. A
/// service that is started later then finds its port free; datagrams are not
/// sent in segments (UDP_SEGMENT), and each costs a checksum.
pub const TP_REPLIER_RAW: u32 = 0x100;

/// How a replier works. Every field zero means its default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct tp_replier_config {
    /// TP_NONBLOCK: a datagram for which there is no room at once is not sent,
    /// and its error is EAGAIN. TP_REPLIER_RAW.
    pub flags: u32,
    /// How many sockets of source ports there are at most; default 256. Two
    /// raw sockets may come on top.
    pub max_sockets: u32,
    /// After how many milliseconds without use a socket is closed, by a later
    /// tp_reply; default 60,000.
    pub idle_ms: u32,
    /// Zero.
    pub reserved: u32,
}

/// What a replier has done since it was opened.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct tp_replier_stats {
    /// Sockets that are open now, raw ones among them.
    pub sockets: u64,
    /// How often a socket was there already for the datagrams of one source
    /// port in a batch, or the port was known to be another's.
    pub hits: u64,
    /// How often one had to be made.
    pub misses: u64,
    /// Datagrams sent by a raw socket, since their source port is another's.
    pub raw: u64,
    /// Sockets closed because there were too many.
    pub evictions: u64,
    /// Datagrams that were not sent.
    pub errors: u64,
    /// Datagrams that were sent: elements of tp_reply's arrays.
    pub sent: u64,
}

const FIRST_CONFIG: usize = size_of::<tp_replier_config>();
const FIRST_STATS: usize = size_of::<tp_replier_stats>();

/// A replier.
#[allow(non_camel_case_types)]
pub struct tp_replier {
    replier: Replier,
}

/// Receives a datagram like recvfrom(2), and where it was going.
///
/// One system call does both. The socket is one of tp_socket or
/// tp_set_transparent (else the kernel does not report it); with UDP_GRO on it
/// use tp_recv_datagrams.
///
/// buf, len: where its bytes go; what has no room is lost. flags:
/// MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC, MSG_WAITALL, or 0, as for recvfrom(2).
/// src, srclen: who sent it. dst, dstlen: its original destination. Each
/// address as for recvfrom(2): NULL if it is not wanted; the length is that of
/// the place before, and that of the address after, and an address that has
/// no room is cut. A struct sockaddr_storage has enough. Addresses are of the
/// socket's family: an AF_INET6 socket gives IPv4 ones v4-mapped. If the kernel
/// does not tell the original destination, *dstlen is 0 and dst's family
/// AF_UNSPEC.
///
/// Returns how many bytes were received, 0 for an empty datagram too, or -1
/// with errno: EAGAIN: none is there, and the socket or the flags say not to
/// wait. EFAULT: buf is NULL and len is not 0, or the length of an address is
/// NULL. EINVAL: an unknown flag, or less room than a struct sockaddr_in has.
/// EBADF, ENOTSOCK: not a descriptor, not a socket. EINTR: a signal came.
/// ECONNREFUSED and the rest of recvmsg(2). Nothing is lost when it fails.
///
/// System calls: recvmsg. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_recvfrom(
    fd: c_int,
    buf: *mut std::ffi::c_void,
    len: usize,
    flags: c_int,
    src: *mut sockaddr,
    srclen: *mut socklen_t,
    dst: *mut sockaddr,
    dstlen: *mut socklen_t,
) -> ssize_t {
    guard_hot(|| {
        let flags = known(flags, libc::MSG_DONTWAIT | libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_WAITALL)?;
        // SAFETY: by the caller's word.
        let buffer = unsafe { arg::array_mut("buf", buf.cast(), len) }?;
        // SAFETY: by the caller's word.
        let (src, dst) =
            unsafe { (DatagramAddressOut::new("src", src, srclen)?, DatagramAddressOut::new("dst", dst, dstlen)?) };
        // SAFETY: the caller's descriptor, open during the call.
        let fd = unsafe { arg::fd(fd) }?;
        let (mut source, mut control) = (KernelAddr::NONE, ControlRoom::EMPTY);
        let (received, orig_dst) = udp::receive_one(fd, buffer, flags, &mut source, &mut control)?;
        // SAFETY: by the caller's word.
        unsafe {
            match orig_dst {
                Some(found) => found.of_family(source.family(), |addr| dst.write(Some(addr))),
                None => dst.write(None),
            }
            if source.with_ref(|addr| src.write(Some(addr))).is_none() {
                src.write(None);
            }
        }
        Ok(received as ssize_t)
    })
}

/// Finds the original destination in a message that the program received by
/// itself: with recvmsg(2), recvmmsg(2) or io_uring.
///
/// msg: as the kernel filled it, with room for control data (CMSG_SPACE(28)
/// and more if the socket reports more). Only the control data, msg_flags and
/// the family of msg_name are read, none of them is trusted, and msg is not
/// changed. addr and addrlen: as for tp_orig_dst; too little room is EINVAL.
/// The address is of the family of msg_name: IPv4 is v4-mapped where the
/// sender's address is of AF_INET6. Without msg_name it is as the kernel has
/// it.
///
/// Returns 0, or -1 with errno, addr and addrlen untouched: ENOENT: the
/// message has none. EFAULT: msg, addr or addrlen is NULL, or msg_control is
/// where msg_controllen is not 0. EINVAL: too little room.
///
/// System calls: none. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_msg_orig_dst(msg: *const msghdr, addr: *mut sockaddr, addrlen: *mut socklen_t) -> c_int {
    /// C need not have aligned it.
    #[repr(C, packed)]
    struct Unaligned(msghdr);
    guard_uncancellable(|| {
        let Some(out) = AddressOut::new(addr, addrlen) else { return Err(arg::no_place("addr", addr)) };
        // SAFETY: NULL, or valid for reads by the caller's word.
        let Some(msg) = (unsafe { msg.cast::<Unaligned>().as_ref() }) else { return Err(arg::null("msg")) };
        let (control, len) = (msg.0.msg_control.cast::<u8>(), msg.0.msg_controllen);
        // SAFETY: by the caller's word.
        let Some(control) = (unsafe { arg::slice(control, len) }) else {
            return Err(arg::no_array("msg_control", control, len));
        };
        let Some(found) = udp::orig_dst(control) else { return Err(no_orig_dst(msg.0.msg_flags)) };
        // SAFETY: by the caller's word.
        let family = unsafe { arg::family(msg.0.msg_name, msg.0.msg_namelen) };
        // SAFETY: by the caller's word.
        match found.of_family(family, |addr| unsafe { out.write(addr) }) {
            Ok(()) => Ok(0),
            // SAFETY: as above.
            Err(needed) => Err(unsafe { out.too_little(needed) }),
        }
    })
}

/// Receives as many datagrams as there are, with their senders and original
/// destinations: one system call.
///
/// It waits for the first datagram, unless the socket is non-blocking, and
/// never for more. dgrams, count: an array whose data and capacity say where
/// the bytes go; no more than TP_BATCH_MAX are received in a call. flags:
/// MSG_DONTWAIT, or 0.
///
/// In each that was received len, segment_len, flags, client and orig_dst are
/// set, and error is 0; the others are as they were. Addresses are of the
/// socket's family: an AF_INET6 socket gives IPv4 ones v4-mapped. A datagram
/// of no bytes is one too. One whose original destination the kernel does not
/// tell has TP_DGRAM_NO_ORIG_DST, and orig_dst.ss_family is AF_UNSPEC.
///
/// Where the socket has UDP_GRO (setsockopt(fd, IPPROTO_UDP, UDP_GRO, ...),
/// udp(7), Linux 5.0), datagrams of one flow and equal length come as one, up
/// to 64 KiB: segment_len then says how long each is. Give them room: what is
/// longer than capacity is cut.
///
/// Returns how many were received, at least 1 (0 if count is 0), or -1 with
/// errno: EAGAIN: none is there. EFAULT: dgrams is NULL, or data is where
/// capacity is not 0. EINVAL: an unknown flag. EBADF, ENOTSOCK: not a
/// descriptor, not a socket. EINTR: a signal came. ECONNREFUSED and the rest
/// of recvmmsg(2).
///
/// System calls: recvmmsg. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_recv_datagrams(
    fd: c_int,
    dgrams: *mut Datagram<'_>,
    count: std::ffi::c_uint,
    flags: c_int,
) -> c_int {
    guard_hot(|| {
        let flags = known(flags, libc::MSG_DONTWAIT)?;
        // SAFETY: by the caller's word, as is what they point to.
        let datagrams = unsafe { arg::array_mut("dgrams", dgrams, count as usize) }?;
        let datagrams = datagrams.get_mut(..udp::BATCH.min(count as usize)).unwrap_or_default();
        if let Some(at) = datagrams.iter().position(Datagram::lacks_memory) {
            return Err(arg::null(&format!("dgrams[{at}].data")));
        }
        // SAFETY: the caller's descriptor, open during the call.
        let fd = unsafe { arg::fd(fd) }?;
        if datagrams.is_empty() {
            return Ok(0);
        }
        Ok(udp::receive(fd, datagrams, flags)? as c_int)
    })
}

/// Opens a replier: it sends datagrams from any address and port.
///
/// There is one socket for each source port and family, however many source
/// addresses and clients there are. Such a socket takes nothing that is meant
/// for others: it is bound to an address that nobody uses (192.0.0.8, RFC 7600;
/// 100:0:0:1::1, RFC 9780), so that no packet finds it, and drops what
/// is sent there nevertheless. Servers on other sockets of that port, and on
/// specific addresses, are not disturbed, nor are the listeners of the
/// program itself; to start later, a server on the wildcard address needs
/// SO_REUSEADDR (or TP_REPLIER_RAW here).
///
/// Where another socket holds the port on the wildcard address without
/// SO_REUSEADDR (a DNS server on 0.0.0.0:53), or the port is below 1024 and
/// CAP_NET_BIND_SERVICE is missing, a raw socket sends the datagrams; that
/// needs CAP_NET_RAW. Whether the port is free is tried again once a second.
///
/// config, size: NULL and 0 for the defaults, or the struct and
/// sizeof(struct tp_replier_config). replier: where the handle goes, on
/// success alone; tp_replier_close ends it.
///
/// A replier is for one thread at a time; have one for each thread. Its
/// sockets are made by tp_reply as they are needed, in the network namespace
/// of the thread that calls it.
///
/// Returns 0, or -1 with errno: EFAULT: replier is NULL, or config is and size
/// is not 0. EINVAL: an unknown flag, reserved is not zero, max_sockets above
/// 65,536, or a size less than the first version's. E2BIG: config is larger
/// than this library knows, and the rest is not zero. EPERM: neither
/// CAP_NET_RAW nor CAP_NET_ADMIN. EMFILE, ENFILE, ENOBUFS, ENOMEM: as
/// tp_socket.
///
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_replier_open(
    config: *const tp_replier_config,
    size: usize,
    replier: *mut *mut tp_replier,
) -> c_int {
    guard(|| {
        if replier.is_null() {
            return Err(arg::null("replier"));
        }
        let mut options = Options::default();
        if !(config.is_null() && size == 0) {
            // SAFETY: by the caller's word.
            let config = unsafe { arg::sized("config", config, size, FIRST_CONFIG) }?;
            let flags = arg::flags(config.flags, TP_NONBLOCK | TP_REPLIER_RAW)?;
            if config.reserved != 0 {
                return Err(Error::invalid("config: reserved must be zero"));
            }
            if config.max_sockets > 1 << 16 {
                return Err(Error::invalid_with(format_args!(
                    "max_sockets: {} are more than the 65,536 that make sense",
                    config.max_sockets
                )));
            }
            options.nonblocking = flags & TP_NONBLOCK != 0;
            options.raw = flags & TP_REPLIER_RAW != 0;
            if config.max_sockets != 0 {
                options.max_sockets = config.max_sockets as usize;
            }
            if config.idle_ms != 0 {
                options.idle_ms = config.idle_ms.into();
            }
        }
        let made = tp_replier { replier: Replier::new(options)? };
        let opened = sys::try_box(made).map_err(|_| Error::no_memory())?;
        // SAFETY: by the caller's word.
        unsafe { replier.write_unaligned(Box::into_raw(opened)) };
        Ok(0)
    })
}

/// Sends datagrams, each from its orig_dst to its client: what
/// tp_recv_datagrams filled can be passed on as it is, with other data in
/// it.
///
/// Of each, data, len, segment_len, client and orig_dst are read, and error is
/// set: 0 if it was sent. One that cannot be sent does not keep the others
/// from it. Datagrams of one flow keep their order. orig_dst is an address and port, of
/// this host or not; client is of the same family, and either may be
/// v4-mapped. The interface is the route's; for a link-local client
/// sin6_scope_id says which.
///
/// If len is more than segment_len, and that is not 0, then it is sent as
/// several datagrams of segment_len bytes; and consecutive datagrams of one
/// flow and equal length (the last may be shorter) leave as one message:
/// UDP_SEGMENT does either, in one pass through the kernel. Where it cannot,
/// they are sent one by one.
///
/// What is longer than the way out allows is sent in fragments, and more than
/// 524 bytes without IPv4's DF flag: the news of a smaller MTU further on
/// would not come here, but to whom the source address belongs. (Linux takes
/// no path to be narrower than 552 bytes: DEFAULT_MIN_PMTU,
/// net/ipv4/route.c.)
///
/// dgrams, count: an array of any length. Returns how many of it were sent;
/// 0 is no failure of the call. Or -1 with errno: EFAULT: replier or dgrams is
/// NULL.
///
/// In error: EFAULT: data is NULL, and len is not 0. EAFNOSUPPORT: an
/// address that is neither of AF_INET nor of AF_INET6, or two of different
/// families. EINVAL: port 0. EADDRNOTAVAIL: from the unspecified address, or
/// a multicast one. EINVAL, ENETUNREACH: the kernel sends nothing from this
/// source (broadcast), or not to this client. EMSGSIZE: longer than a datagram can be. EAGAIN: TP_NONBLOCK, and no
/// room. EINTR: a signal came while waiting for room; the rest was not tried.
/// EPERM: a firewall refuses it, or no CAP_NET_RAW for a raw socket. ENOBUFS,
/// EMFILE, ENFILE, ENOMEM, and the rest of sendmsg(2) and socket(2).
///
/// System calls: for each 256 datagrams one sendmmsg for each source port among
/// them, and one for all whose source port is another's; one more for each
/// TP_BATCH_MAX that have a port in common, and for each that fails. A new
/// source port costs seven more. Nothing is allocated. The more datagrams, up
/// to 256, the less each of them costs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_reply(
    replier: *mut tp_replier,
    dgrams: *mut Datagram<'_>,
    count: std::ffi::c_uint,
) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word; one thread at a time.
        let replier = unsafe { replier.as_mut() }.ok_or_else(|| arg::null("replier"))?;
        // SAFETY: by the caller's word, as is what they point to.
        let datagrams = unsafe { arg::array_mut("dgrams", dgrams, count as usize) }?;
        Ok(replier.replier.reply(datagrams) as c_int)
    })
}

/// Reads what a replier has done.
///
/// stats, size: where it goes, and sizeof(struct tp_replier_stats). By the
/// thread that uses the replier.
///
/// Returns 0, or -1 with errno: EFAULT: replier or stats is NULL. EINVAL: a
/// size less than the first version's. E2BIG: larger than this library knows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_replier_stats(
    replier: *const tp_replier,
    stats: *mut tp_replier_stats,
    size: usize,
) -> c_int {
    guard(|| {
        let out = SizedOut::new("stats", stats, size, FIRST_STATS)?;
        // SAFETY: by the caller's word.
        let replier = unsafe { replier.as_ref() }.ok_or_else(|| arg::null("replier"))?;
        let found = replier.replier.stats();
        let found = tp_replier_stats {
            sockets: found.sockets,
            hits: found.hits,
            misses: found.misses,
            raw: found.raw,
            evictions: found.evictions,
            errors: found.errors,
            sent: found.sent,
        };
        // SAFETY: by the caller's word.
        unsafe { out.write(found) };
        Ok(0)
    })
}

/// Closes a replier and its sockets. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_replier_close(replier: *mut tp_replier) {
    guard(|| {
        if !replier.is_null() {
            // SAFETY: a handle of tp_replier_open, by the caller's word not closed before.
            drop(unsafe { Box::from_raw(replier) });
        }
        Ok(0)
    });
}

/// The flags of `recvmsg(2)`, none of which may be unknown.
fn known(flags: c_int, known: c_int) -> Result<c_int> {
    arg::flags(flags as u32, known as u32).map(|flags| flags as c_int)
}

#[cold]
fn no_orig_dst(flags: c_int) -> Error {
    Error::new(
        libc::ENOENT,
        match flags & libc::MSG_CTRUNC {
            0 => {
                "the message has no original destination: its socket does not report it (tp_socket and \
                 tp_set_transparent make it do so), or there was no room for control data"
            }
            _ => "the control data were cut (MSG_CTRUNC): give recvmsg() more room for them",
        },
    )
}
