//! Datagrams as the kernel takes and gives them: `struct msghdr`, many at a
//! time. The one file of this folder that handles pointers.
//!
//! All of it is on the stack, and only what is used of it is written: nothing
//! is allocated.

use std::ffi::c_void;
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{iovec, mmsghdr, msghdr, sockaddr_storage};

use super::BATCH;
use super::control::{Control, Outgoing};
use super::datagram::{CTRUNC, Datagram, TRUNC};
use super::raw;
use crate::address::{self, KernelAddr};

/// No address: AF_UNSPEC.
// SAFETY: integers, for which all zero is valid.
pub(super) const NO_ADDRESS: sockaddr_storage = unsafe { zeroed() };

/// Writes an address, or that there is none.
#[inline(always)]
pub(super) fn store_address(storage: &mut sockaddr_storage, addr: &KernelAddr) {
    // SAFETY: an address is no longer than the storage, and nothing but bytes.
    unsafe { ptr::from_mut(storage).cast::<KernelAddr>().write(*addr) };
}

/// The address that is there.
#[inline(always)]
pub(super) fn load_address(storage: &sockaddr_storage) -> KernelAddr {
    // SAFETY: as above.
    unsafe { ptr::from_ref(storage).cast::<KernelAddr>().read() }
}

/// A datagram's bytes. Its fields are private, or by a C caller's word: so many bytes are there while it lives.
pub(super) fn bytes<'a>(data: *mut c_void, len: usize) -> &'a [u8] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(data.cast(), len) }
}

/// The same, to be written.
pub(super) fn bytes_mut<'a>(data: *mut c_void, len: usize) -> &'a mut [u8] {
    if data.is_null() || len == 0 {
        return &mut [];
    }
    // SAFETY: as for bytes(); the borrow of the datagram is exclusive.
    unsafe { std::slice::from_raw_parts_mut(data.cast(), len) }
}

/// Room for a datagram's control data: an original destination (48 bytes), a
/// segment length (24), and what else a program may have asked for: packet
/// info (40), a time stamp (32), TTL and TOS (24 each).
const CONTROL: usize = 192;

/// Aligned as `struct cmsghdr` is.
#[repr(C, align(8))]
struct ControlRoom([MaybeUninit<u8>; CONTROL]);

impl ControlRoom {
    const EMPTY: ControlRoom = ControlRoom([MaybeUninit::uninit(); CONTROL]);

    /// What the kernel wrote there.
    #[inline(always)]
    fn parse(&self, message: &msghdr) -> Control {
        let len = message.msg_controllen.min(CONTROL);
        let mut control = Control::default();
        // SAFETY: the kernel has written so many bytes.
        control.read(unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), len) });
        control
    }
}

fn header(name: *mut c_void, name_len: usize, parts: *mut iovec, n_parts: usize) -> msghdr {
    // SAFETY: integers and pointers, for which all zero is valid.
    let mut message: msghdr = unsafe { zeroed() };
    message.msg_name = name;
    message.msg_namelen = name_len as libc::socklen_t;
    message.msg_iov = parts;
    message.msg_iovlen = n_parts;
    message
}

/// One `recvmsg(2)`: how many bytes, and what the control data say. `source`, which was none, is from whom.
#[inline(always)]
pub(super) fn receive_one(
    fd: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    flags: i32,
    source: &mut KernelAddr,
) -> io::Result<(usize, Control)> {
    let mut control = ControlRoom::EMPTY;
    let mut part = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let name = source.as_mut_bytes();
    let mut message = header(name.as_mut_ptr().cast(), name.len(), &raw mut part, 1);
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL;
    // SAFETY: what the message points to is alive, and as long as it says.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((len as usize, control.parse(&message)))
}

/// One `recvmmsg(2)`, straight into the datagrams. Those beyond the number that it gives are as they were.
pub(super) fn receive(fd: BorrowedFd<'_>, datagrams: &mut [Datagram<'_>], flags: i32) -> io::Result<usize> {
    let mut controls = [const { ControlRoom::EMPTY }; BATCH];
    let mut parts = [const { MaybeUninit::<iovec>::uninit() }; BATCH];
    let mut messages = [const { MaybeUninit::<mmsghdr>::uninit() }; BATCH];
    let count = datagrams.len().min(BATCH);
    for (at, datagram) in datagrams.iter_mut().take(count).enumerate() {
        let (data, capacity, client) = datagram.place();
        let part = parts[at].write(iovec { iov_base: data, iov_len: capacity });
        let mut message = header(ptr::from_mut(client).cast(), size_of_val(client), part, 1);
        message.msg_control = (&raw mut controls[at]).cast();
        message.msg_controllen = CONTROL;
        messages[at].write(mmsghdr { msg_hdr: message, msg_len: 0 });
    }
    let flags = flags | libc::MSG_WAITFORONE;
    // SAFETY: count messages are initialised; what they point to is alive, and as long as they say.
    let received = unsafe {
        libc::recvmmsg(fd.as_raw_fd(), messages.as_mut_ptr().cast(), count as libc::c_uint, flags as _, ptr::null_mut())
    };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    for (at, datagram) in datagrams.iter_mut().take(received).enumerate() {
        // SAFETY: one of the messages above.
        let message = unsafe { messages[at].assume_init_ref() };
        let control = controls[at].parse(&message.msg_hdr);
        let cut = |kernel: i32, ours: u32| if message.msg_hdr.msg_flags & kernel != 0 { ours } else { 0 };
        let cut = cut(libc::MSG_TRUNC, TRUNC) | cut(libc::MSG_CTRUNC, CTRUNC);
        datagram.received(message.msg_len as usize, control, cut);
    }
    Ok(received)
}

/// From whom to whom: two addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// A message that waits in an [`Outbox`]: one datagram of a flow, or several of
/// equal length, which the kernel cuts apart (`UDP_SEGMENT`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'d> {
    pub flow: &'d Flow,
    /// The place of its first datagram among those that were given to send.
    pub first: usize,
    /// How long each of its datagrams is, but for the last, which may be shorter.
    pub unit: usize,
    /// How many datagrams it is on the wire.
    pub segments: usize,
    /// The UDP header, for a raw socket.
    pub header: Option<[u8; raw::HEADER]>,
    len: usize,
    first_part: usize,
    parts: usize,
}

/// The most datagrams that the kernel cuts a message into: `UDP_MAX_SEGMENTS`, include/linux/udp.h, before 6.9.
pub(super) const MAX_SEGMENTS: usize = 64;
/// The most bytes of such a message: what IPv4's length field leaves.
pub(super) const MAX_GSO: usize = 65_507;

impl<'d> Message<'d> {
    /// A message of a datagram, or of as many as `data` has of `unit` bytes.
    pub(super) fn new(flow: &'d Flow, first: usize, unit: usize, data: &[u8]) -> Message<'d> {
        let segments = data.len().div_ceil(unit.max(1)).max(1);
        Message { flow, first, unit, segments, header: None, len: data.len(), first_part: 0, parts: 1 }
    }

    /// Whether one more datagram can be cut off its end.
    #[inline(always)]
    fn takes(&self, flow: &Flow, data: &[u8]) -> bool {
        self.flow == flow
            && self.header.is_none()
            && self.len == self.unit * self.segments
            && (1..=self.unit).contains(&data.len())
            && self.segments < MAX_SEGMENTS
            && self.len + data.len() <= MAX_GSO
    }

    /// Its control data.
    #[inline(always)]
    fn control(&self) -> Outgoing {
        let scope = match self.flow.to {
            // A link-local source is one of the interface that the client is on.
            SocketAddr::V6(to) => to.scope_id(),
            SocketAddr::V4(_) => 0,
        };
        let segment_len = if self.segments > 1 { u16::try_from(self.unit).ok() } else { None };
        Outgoing::new(self.flow.from.ip(), scope, segment_len)
    }

    /// Whom it goes to. A raw socket takes a port for a protocol (raw(7)).
    #[inline(always)]
    fn name(&self) -> address::Bytes {
        let mut to = self.flow.to;
        if self.header.is_some() {
            to.set_port(0);
        }
        address::encode(to)
    }
}

/// Messages for one `sendmmsg(2)`.
pub(super) struct Outbox<'d> {
    messages: [MaybeUninit<Message<'d>>; BATCH],
    parts: [MaybeUninit<&'d [u8]>; BATCH],
    len: usize,
    n_parts: usize,
}

impl<'d> Outbox<'d> {
    pub(super) fn new() -> Outbox<'d> {
        Outbox {
            messages: [const { MaybeUninit::uninit() }; BATCH],
            parts: [const { MaybeUninit::uninit() }; BATCH],
            len: 0,
            n_parts: 0,
        }
    }

    /// Whether there is room for neither a message nor a part of one.
    pub(super) fn is_full(&self) -> bool {
        self.n_parts == BATCH
    }

    /// Adds a message of some data. Not when it is full.
    #[inline(always)]
    pub(super) fn push(&mut self, message: Message<'d>, data: &'d [u8]) {
        self.messages[self.len].write(Message { first_part: self.n_parts, ..message });
        self.parts[self.n_parts].write(data);
        self.len += 1;
        self.n_parts += 1;
    }

    /// Adds a datagram to the message that came last, if that is of the same kind. Not when it is full.
    #[inline(always)]
    pub(super) fn join(&mut self, flow: &Flow, data: &'d [u8]) -> bool {
        let Some(last) = self.len.checked_sub(1) else { return false };
        // SAFETY: the first len messages are initialised.
        let last = unsafe { self.messages[last].assume_init_mut() };
        if !last.takes(flow, data) {
            return false;
        }
        last.parts += 1;
        last.segments += 1;
        last.len += data.len();
        self.parts[self.n_parts].write(data);
        self.n_parts += 1;
        true
    }

    fn message(&self, at: usize) -> &Message<'d> {
        debug_assert!(at < self.len);
        // SAFETY: the first len messages are initialised.
        unsafe { self.messages[at].assume_init_ref() }
    }

    /// The parts of a message of this outbox.
    #[inline(always)]
    fn parts(&self, message: &Message<'d>) -> &[&'d [u8]] {
        let parts = &self.parts[message.first_part..message.first_part + message.parts];
        // SAFETY: the first n_parts parts are initialised, and a message has some of those.
        unsafe { &*(ptr::from_ref(parts) as *const [&'d [u8]]) }
    }

    /// Sends them all, and says which failed: one system call, and one more for each of those.
    #[inline(always)]
    pub(super) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        flags: i32,
        mut failed: impl FnMut(&Message<'d>, &[&'d [u8]], io::Error),
    ) {
        let mut names = [const { MaybeUninit::<address::Bytes>::uninit() }; BATCH];
        let mut controls = [const { MaybeUninit::<Outgoing>::uninit() }; BATCH];
        // A raw message has a part more, its header; it has one part of data.
        let mut iovecs = [const { MaybeUninit::<iovec>::uninit() }; 2 * BATCH];
        let mut headers = [const { MaybeUninit::<mmsghdr>::uninit() }; BATCH];
        let mut n_iovecs = 0;
        let mut part = |bytes: &[u8]| {
            iovecs[n_iovecs].write(iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
            n_iovecs += 1;
        };
        for at in 0..self.len {
            let message = self.message(at);
            if let Some(header) = &message.header {
                part(header);
            }
            self.parts(message).iter().for_each(|data| part(data));
        }
        let mut iovec = iovecs.as_mut_ptr().cast::<iovec>();
        for at in 0..self.len {
            let message = self.message(at);
            let name = names[at].write(message.name());
            let control = controls[at].write(message.control());
            let n_parts = message.parts + usize::from(message.header.is_some());
            let mut header = header(name.as_mut_ptr().cast(), address::len(message.flow.to), iovec, n_parts);
            header.msg_control = control.bytes().as_ptr().cast_mut().cast();
            header.msg_controllen = control.bytes().len();
            headers[at].write(mmsghdr { msg_hdr: header, msg_len: 0 });
            // SAFETY: as many were written above, in the same order.
            iovec = unsafe { iovec.add(n_parts) };
        }
        let mut say = |at: usize, error: io::Error| {
            let message = self.message(at);
            failed(message, self.parts(message), error);
        };
        let mut at = 0;
        while at < self.len {
            // SAFETY: len messages are initialised; what they point to is alive, and as long as they say.
            let sent = unsafe {
                libc::sendmmsg(
                    fd.as_raw_fd(),
                    headers[at..].as_mut_ptr().cast(),
                    (self.len - at) as libc::c_uint,
                    flags as _,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) => at += sent,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    let errno = error.raw_os_error();
                    say(at, error);
                    at += 1;
                    // No room, or a signal: the rest would fare no better.
                    if let Some(errno @ (libc::EAGAIN | libc::EINTR)) = errno {
                        for rest in at..self.len {
                            say(rest, io::Error::from_raw_os_error(errno));
                        }
                        at = self.len;
                    }
                }
            }
        }
        self.len = 0;
        self.n_parts = 0;
    }
}
