//! Datagrams: received with their original destinations, answered from any
//! source.

use std::ffi::c_int;
use std::time::Duration;

use libc::{msghdr, sockaddr, socklen_t, ssize_t};

use super::arg::{self, AddressOut, DatagramAddressOut, SizedOut};
use super::guard::{guard, guard_hot, guard_uncancellable};
use super::sockets::TP_NONBLOCK;
use crate::address::KernelAddr;
use crate::error::{Error, Result};
use crate::sys;
use crate::udp::{self, ControlBuffer, Datagram, Replier, ReplierOptions};

/// The datagram was truncated: len equals capacity and the rest was discarded. In tp_datagram.flags.
pub const TP_DGRAM_TRUNC: u32 = 0x1;
/// The control data was truncated, because the socket reports more than fits the library's buffer: the
/// original destination or the segment size may be missing. In tp_datagram.flags.
pub const TP_DGRAM_CTRUNC: u32 = 0x2;
/// The original destination is unknown. In tp_datagram.flags.
///
/// Either the socket does not report original destinations (see tp_socket(), tp_set_transparent()), or an
/// IPv6 datagram was sent to the unspecified address or to a v4-mapped address. In a socket call these
/// would mean this host, or IPv4.
pub const TP_DGRAM_NO_ORIG_DST: u32 = 0x4;

/// Maximum number of datagrams that one tp_recv_datagrams() call receives, and that tp_reply() passes to
/// the kernel in one system call.
pub const TP_BATCH_MAX: u32 = 64;

/// Send only through raw sockets and bind no ports, so that services started later can bind theirs.
///
/// Datagrams are then not sent as segments (UDP_SEGMENT), and a checksum is computed for each datagram.
/// In tp_replier_config.flags.
pub const TP_REPLIER_RAW: u32 = 0x100;

/// Configuration of a replier. A field that is 0 selects its default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct tp_replier_config {
    /// TP_NONBLOCK and TP_REPLIER_RAW. With TP_NONBLOCK, a datagram that does not fit the send buffer is not
    /// sent, and its error is EAGAIN.
    pub flags: u32,
    /// Maximum number of sockets for source ports; default 256. Up to two raw sockets are additional.
    pub max_sockets: u32,
    /// Idle time in milliseconds after which a later tp_reply() closes a socket; default 60,000.
    pub idle_ms: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// Counters of a replier since it was opened.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct tp_replier_stats {
    /// Sockets that are open now, including raw sockets.
    pub sockets: u64,
    /// Cache hits: lookups that found a socket for the source port, or a cached "port in use". There is one
    /// lookup per source port in a batch.
    pub hits: u64,
    /// Cache misses: lookups that had to create a socket.
    pub misses: u64,
    /// Datagrams sent through a raw socket because another socket holds the source port.
    pub raw: u64,
    /// Sockets closed because max_sockets was reached.
    pub evictions: u64,
    /// Datagrams that were not sent.
    pub errors: u64,
    /// Datagrams that were sent, counted as elements of the arrays passed to tp_reply().
    pub sent: u64,
}

const FIRST_CONFIG: usize = size_of::<tp_replier_config>();
const FIRST_STATS: usize = size_of::<tp_replier_stats>();

/// Handle of a replier, from tp_replier_open().
#[allow(non_camel_case_types)]
pub struct tp_replier {
    replier: Replier,
}

/// Receives a datagram with its sender and original destination (one recvmsg(2)).
///
/// The socket must come from tp_socket() or tp_set_transparent(); otherwise the kernel does not report
/// the original destination. For a socket with UDP_GRO use tp_recv_datagrams().
///
/// @param fd      UDP socket.
/// @param buf     buffer for the data; bytes that do not fit are discarded.
/// @param len     size of buf in bytes.
/// @param flags   MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC and MSG_WAITALL, as for recvfrom(2), or 0.
/// @param src     buffer for the sender's address, or NULL.
/// @param srclen  size of src before the call, size of the address after it; an address that does not
///                fit is truncated, as by recvfrom(2). A struct sockaddr_storage is always enough.
/// @param dst     buffer for the original destination, or NULL.
/// @param dstlen  as srclen, for dst. If the kernel does not report the original destination, *dstlen is
///                set to 0 and the family of dst to AF_UNSPEC.
/// @return number of bytes received, which is 0 for an empty datagram, or -1 with errno:
///   EAGAIN        nothing is queued and the call may not block
///   EFAULT        buf is NULL while len is not 0
///   EFAULT        src is not NULL while srclen is NULL, or dst is not NULL while dstlen is NULL
///   EINVAL        flags has an unknown bit
///   EINVAL        *srclen or *dstlen is less than sizeof(struct sockaddr_in)
///   EBADF         fd is not an open descriptor
///   ENOTSOCK      fd is not a socket
///   EINTR         a signal interrupted the wait
///   ECONNREFUSED  as for recvmsg(2); its other errors are possible too
///
/// Addresses have the socket's family: an AF_INET6 socket reports IPv4 addresses v4-mapped. A call that
/// fails discards no datagram.
///
/// System calls: recvmsg.
///
/// Thread-safe.
///
/// @since 0.1.0
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
        let (mut source, mut control) = (KernelAddr::NONE, ControlBuffer::EMPTY);
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

/// Extracts the original destination from a message that the caller received itself.
///
/// For programs that use recvmsg(2), recvmmsg(2) or io_uring. Only the control data, msg_flags and the
/// family of msg_name are read. None of them is trusted, and msg is not changed.
///
/// @param msg      message as filled in by the kernel, with a control buffer of at least CMSG_SPACE(28)
///                 bytes, or more if the socket reports more.
/// @param addr     buffer for the address. An IPv4 address is v4-mapped if the family of msg_name is
///                 AF_INET6; without msg_name it is unchanged.
/// @param addrlen  size of addr in bytes; on success the size of the address. A short buffer is
///                 EINVAL; the address is never truncated.
/// @return 0, or -1 with errno and with addr and addrlen unchanged:
///   ENOENT  the message has no original destination
///   EFAULT  msg, addr or addrlen is NULL, or msg_control is NULL while msg_controllen is not 0
///   EINVAL  the buffer is too small
///
/// System calls: none.
///
/// Thread-safe.
///
/// @since 0.1.0
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

/// Receives a batch of datagrams with their senders and original destinations (one recvmmsg(2)).
///
/// Blocks until one datagram arrives, unless fd is non-blocking or MSG_DONTWAIT is given, then returns
/// what is queued.
///
/// Sets len, segment_len, flags, error, client and orig_dst of each received element; other elements are
/// unchanged. error is 0. Addresses have the socket's family: an AF_INET6 socket reports IPv4 addresses
/// v4-mapped. If the kernel does not report the original destination, TP_DGRAM_NO_ORIG_DST is set and
/// orig_dst.ss_family is AF_UNSPEC.
///
/// If UDP_GRO is set on the socket (udp(7), Linux 5.0), equally sized datagrams of one flow are received
/// as one element of up to 64 KiB, and segment_len is their size. Provide buffers that are large enough:
/// an element longer than capacity is truncated.
///
/// @param fd      UDP socket from tp_socket() or tp_set_transparent().
/// @param dgrams  array; data and capacity of each element name the receive buffer.
/// @param count   number of elements; at most TP_BATCH_MAX are used.
/// @param flags   0 or MSG_DONTWAIT.
/// @return number of datagrams received (0 only if count is 0), or -1 with errno:
///   EAGAIN        nothing is queued and the call may not block
///   EFAULT        dgrams is NULL, or an element has capacity > 0 and data == NULL
///   EINVAL        flags has an unknown bit
///   EBADF         fd is not an open descriptor
///   ENOTSOCK      fd is not a socket
///   EINTR         a signal interrupted the wait
///   ECONNREFUSED  as for recvmmsg(2); its other errors are possible too
///
/// System calls: recvmmsg.
///
/// Thread-safe.
///
/// @since 0.1.0
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

/// Opens a replier, which sends datagrams from any source address and port.
///
/// A replier has one socket per source port and family, regardless of the number of source addresses and
/// clients. The socket cannot receive traffic meant for other sockets: it is bound to an address that is
/// not in use (192.0.0.8, RFC 7600; 100:0:0:1::1, RFC 9780), and drops packets sent to that address.
/// Servers on other sockets of the port, servers on specific addresses and the listeners of the program
/// are not disturbed. A server that starts later on the wildcard address needs SO_REUSEADDR (or set
/// TP_REPLIER_RAW here).
///
/// If another socket holds the port on the wildcard address without SO_REUSEADDR (such as a DNS server on
/// 0.0.0.0:53), or if the port is below 1024 and CAP_NET_BIND_SERVICE is missing, datagrams are sent
/// through a raw socket, which needs CAP_NET_RAW. The port is tried again once per second.
///
/// @param config   configuration, or NULL for the defaults.
/// @param size     sizeof(struct tp_replier_config), or 0 if config is NULL.
/// @param replier  receives the handle, only on success; tp_replier_close() frees it.
/// @return 0, or -1 with errno:
///   EFAULT           replier is NULL, or config is NULL while size is not 0
///   EINVAL           flags has an unknown bit, or reserved is not 0
///   EINVAL           max_sockets is greater than 65,536
///   EINVAL           size is less than the size of the first version of the struct
///   E2BIG            config has fields that this version does not know, and they are not 0
///   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
///   EMFILE           the descriptor limit of the process is reached
///   ENFILE           the descriptor limit of the system is reached
///   ENOBUFS, ENOMEM  not enough memory
///
/// A replier may be used by only one thread at a time; open one per thread. tp_reply() creates sockets as
/// needed, in the network namespace of the thread that calls it.
///
/// Thread-safe.
///
/// @since 0.1.0
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
        let mut options = ReplierOptions::new();
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
                options.idle = Duration::from_millis(config.idle_ms.into());
            }
        }
        let made = tp_replier { replier: Replier::new(options)? };
        let opened = sys::try_box(made).map_err(|_| Error::no_memory())?;
        // SAFETY: by the caller's word.
        unsafe { replier.write_unaligned(Box::into_raw(opened)) };
        Ok(0)
    })
}

/// Sends a batch of datagrams, each from its orig_dst to its client.
///
/// Elements that tp_recv_datagrams() filled can be passed unchanged, with new data. Reads data, len,
/// segment_len, client and orig_dst of each element, and sets error, to 0 if the element was sent. A
/// datagram that fails does not stop the others. Datagrams of one flow keep their order.
///
/// orig_dst is an address and port, which this host need not own. client must be of the same family;
/// either may be v4-mapped. The route selects the outgoing interface; for a link-local client,
/// sin6_scope_id selects it.
///
/// If segment_len is non-zero and less than len, the element is sent as several datagrams of segment_len
/// bytes. Consecutive, equally sized datagrams of one flow (the last may be shorter) are sent as one
/// message. Both use UDP_SEGMENT, one pass through the kernel; if that is not possible, the datagrams are
/// sent one by one.
///
/// Datagrams that exceed the MTU of the outgoing interface are fragmented. IPv4 payloads above 524 bytes
/// are sent without DF, because ICMP "fragmentation needed" would go to the owner of the source address,
/// not to this host. (Linux assumes that no path has an MTU below 552 bytes: DEFAULT_MIN_PMTU,
/// net/ipv4/route.c.)
///
/// @param replier  handle from tp_replier_open().
/// @param dgrams   array of datagrams.
/// @param count    number of elements; any number.
/// @return number of elements sent, which may be 0, or -1 with errno:
///   EFAULT  replier or dgrams is NULL
///
/// Errors of a single element, in its field error:
///   EFAULT         data is NULL while len is not 0
///   EAFNOSUPPORT   an address family is neither AF_INET nor AF_INET6, or the families differ
///   EINVAL         a port is 0
///   EINVAL         client is the unspecified address
///   EADDRNOTAVAIL  orig_dst is the unspecified address or a multicast address
///   EINVAL, ENETUNREACH
///                  the kernel refuses this source (broadcast) or this client
///   EMSGSIZE       the data is longer than a datagram can be
///   EAGAIN         the send buffer is full, with TP_NONBLOCK
///   EINTR          a signal interrupted the wait for send buffer space; the remaining elements were
///                  not tried
///   EPERM          a firewall rejected the datagram, or a raw socket is needed without CAP_NET_RAW
///   ENOBUFS, EMFILE, ENFILE, ENOMEM
///                  as for sendmsg(2) and socket(2); their other errors are possible too
///
/// System calls, per 256 datagrams: one sendmmsg per source port, and one for all datagrams whose source
/// port another socket holds; one more per TP_BATCH_MAX datagrams of one port, and one more per failed
/// datagram. A new source port costs seven more system calls. The larger the batch, up to 256, the lower
/// the cost per datagram. Nothing is allocated.
///
/// Use a replier from one thread at a time.
///
/// @since 0.1.0
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

/// Reads the counters of a replier.
///
/// Call it from the thread that uses the replier.
///
/// @param replier  handle from tp_replier_open().
/// @param stats    receives the counters.
/// @param size     sizeof(struct tp_replier_stats).
/// @return 0, or -1 with errno:
///   EFAULT  replier or stats is NULL
///   EINVAL  size is less than the size of the first version of the struct
///   E2BIG   size is greater than the size of the struct in this version
///
/// @since 0.1.0
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

/// Closes a replier and its sockets.
///
/// @param replier  handle from tp_replier_open(), or NULL, which does nothing.
///
/// @since 0.1.0
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
