//! Sends and receives batches of `struct msghdr`. This file and `storage` are
//! the only ones of this folder that handle pointers.
//!
//! Little of the data is on the stack: the kernel writes received data and control data into the caller's structs, and messages
//! to send are assembled in memory of the replier. Only the used part of this memory is written. Nothing is allocated.

use std::ffi::c_void;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{iovec, mmsghdr, msghdr, sockaddr_storage};

use super::BATCH;
use super::control::{Control, Outgoing};
use super::datagram::{CTRUNC, Datagram, TRUNC};
use super::raw;
use crate::address::KernelAddr;
use crate::sys;

/// Size of the buffer for a datagram's control data: an original destination (48
/// bytes), a segment length (24), and data that the program may have enabled:
/// packet info (40), a time stamp (32), TTL and TOS (24 each).
const CONTROL: usize = 192;

/// Buffer with the alignment of `struct cmsghdr`.
#[repr(C, align(8))]
pub(crate) struct ControlBuffer([MaybeUninit<u8>; CONTROL]);

impl ControlBuffer {
    pub(crate) const EMPTY: ControlBuffer = ControlBuffer([MaybeUninit::uninit(); CONTROL]);

    /// Returns the bytes that the kernel wrote.
    #[inline(always)]
    fn written(&self, message: &msghdr) -> &[u8] {
        let len = message.msg_controllen.min(CONTROL);
        // SAFETY: the kernel has written `len` bytes.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), len) }
    }
}

#[inline(always)]
fn msghdr_of(name: *mut c_void, name_len: usize, parts: *mut iovec, n_parts: usize) -> msghdr {
    // SAFETY: integers and pointers, for which all zero is valid.
    let mut message: msghdr = unsafe { zeroed() };
    message.msg_name = name;
    message.msg_namelen = name_len as libc::socklen_t;
    message.msg_iov = parts;
    message.msg_iovlen = n_parts;
    message
}

/// Calls `recvmsg(2)`; returns the number of bytes and the control data. `source` must be empty and receives the sender's
/// address. An address of another family than IPv4 and IPv6 is truncated.
#[inline(always)]
pub(super) fn receive_one<'c>(
    fd: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    flags: i32,
    source: &mut KernelAddr,
    control: &'c mut ControlBuffer,
) -> sys::Result<(usize, &'c [u8])> {
    let mut part = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let name = source.as_mut_bytes();
    let mut message = msghdr_of(name.as_mut_ptr().cast(), name.len(), &raw mut part, 1);
    message.msg_control = ptr::from_mut(control).cast();
    message.msg_controllen = CONTROL;
    // SAFETY: the buffers that the message points to are alive, and have the given sizes.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    if len < 0 {
        return Err(sys::Errno::last());
    }
    Ok((len as usize, control.written(&message)))
}

/// Layout of the memory in a datagram's struct that the kernel writes: an address, followed by control data. Both are within
/// `client` and `orig_dst`, which are adjacent and are set after the control data have been read.
const NAME_LEN: usize = size_of::<KernelAddr>();
const CONTROL_AT: usize = NAME_LEN.next_multiple_of(align_of::<libc::cmsghdr>());
const _: () = assert!(CONTROL_AT + CONTROL <= 2 * size_of::<sockaddr_storage>());

/// Calls `recvmmsg(2)` with the datagrams' memory, and returns the number of datagrams. Other datagrams are unchanged.
pub(super) fn receive(fd: BorrowedFd<'_>, datagrams: &mut [Datagram<'_>], flags: i32) -> sys::Result<usize> {
    // The stack size follows the number: programs with small stacks pass few datagrams.
    match datagrams.len() {
        0..=1 => receive_at_most::<1>(fd, datagrams, flags),
        2..=4 => receive_at_most::<4>(fd, datagrams, flags),
        5..=16 => receive_at_most::<16>(fd, datagrams, flags),
        17..=32 => receive_at_most::<32>(fd, datagrams, flags),
        _ => receive_at_most::<BATCH>(fd, datagrams, flags),
    }
}

#[inline(never)]
fn receive_at_most<const N: usize>(
    fd: BorrowedFd<'_>,
    datagrams: &mut [Datagram<'_>],
    flags: i32,
) -> sys::Result<usize> {
    let mut parts = [const { MaybeUninit::<iovec>::uninit() }; N];
    let mut messages = [const { MaybeUninit::<mmsghdr>::uninit() }; N];
    let count = datagrams.len().min(N);
    for (at, datagram) in datagrams.iter_mut().take(count).enumerate() {
        let (data, capacity) = datagram.memory_parts();
        parts[at].write(iovec { iov_base: data, iov_len: capacity });
        let addresses = addresses_of(datagram);
        let mut message = msghdr_of(addresses.cast(), NAME_LEN, (&raw mut parts[at]).cast(), 1);
        // SAFETY: the pointer is within the two addresses.
        message.msg_control = unsafe { addresses.add(CONTROL_AT) }.cast();
        message.msg_controllen = CONTROL;
        messages[at].write(mmsghdr { msg_hdr: message, msg_len: 0 });
    }
    let flags = flags | libc::MSG_WAITFORONE;
    // SAFETY: `count` messages are initialized; the buffers that they point to are alive, and have the given sizes.
    let received = unsafe {
        libc::recvmmsg(fd.as_raw_fd(), messages.as_mut_ptr().cast(), count as libc::c_uint, flags as _, ptr::null_mut())
    };
    let received = usize::try_from(received).map_err(|_| sys::Errno::last())?;
    for (at, datagram) in datagrams.iter_mut().take(received).enumerate() {
        // SAFETY: one of the messages above.
        let message = unsafe { messages[at].assume_init_ref() };
        let written = message.msg_hdr.msg_controllen.min(CONTROL);
        let mut control = Control::default();
        // SAFETY: the kernel has written `written` bytes within the two addresses.
        unsafe {
            let data = addresses_of(datagram).add(CONTROL_AT);
            control.read(std::slice::from_raw_parts(data, written));
            // The control data must not remain in the addresses.
            data.write_bytes(0, written);
        }
        let flag = |kernel: i32, ours: u32| if message.msg_hdr.msg_flags & kernel != 0 { ours } else { 0 };
        let flags = flag(libc::MSG_TRUNC, TRUNC) | flag(libc::MSG_CTRUNC, CTRUNC);
        datagram.received(message.msg_len as usize, control, flags);
    }
    Ok(received)
}

/// Returns a pointer to `client`, which `orig_dst` follows.
#[inline(always)]
fn addresses_of(datagram: &mut Datagram<'_>) -> *mut u8 {
    // SAFETY: the offset is within the struct.
    unsafe { ptr::from_mut(datagram).cast::<u8>().add(Datagram::CLIENT_AT) }
}

/// Allocates a zeroed value without a copy on the stack, or fails with ENOMEM.
pub(super) fn zeroed_box<T: Zeroed>() -> sys::Result<Box<T>> {
    let layout = std::alloc::Layout::new::<T>();
    const { assert!(size_of::<T>() != 0) };
    // SAFETY: the layout is not of size zero; a new allocation of that layout, filled with zeros, is a T and a Box's.
    unsafe {
        let memory = std::alloc::alloc_zeroed(layout).cast::<T>();
        if memory.is_null() { Err(sys::Errno(libc::ENOMEM)) } else { Ok(Box::from_raw(memory)) }
    }
}

/// Types for which all zero is a valid value.
///
/// # Safety
/// All bytes zero must be a valid value of the type.
pub(super) unsafe trait Zeroed {}

// SAFETY: the length is 0, so no item is read.
unsafe impl<T, const N: usize> Zeroed for ArrayVec<T, N> {}

/// Array of at most `N` items without allocation. Only pushed items are written.
pub(super) struct ArrayVec<T, const N: usize> {
    items: [MaybeUninit<T>; N],
    len: usize,
}

impl<T: Copy, const N: usize> ArrayVec<T, N> {
    pub(super) const fn new() -> ArrayVec<T, N> {
        ArrayVec { items: [const { MaybeUninit::uninit() }; N], len: 0 }
    }

    #[inline(always)]
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Replaces the contents by `len` copies of an item.
    #[inline(always)]
    pub(super) fn fill(&mut self, item: T, len: usize) {
        self.items[..len].fill(MaybeUninit::new(item));
        self.len = len;
    }

    /// Appends an item. Panics if the array is full.
    #[inline(always)]
    pub(super) fn push(&mut self, item: T) {
        self.items[self.len].write(item);
        self.len += 1;
    }

    #[inline(always)]
    pub(super) fn get(&self) -> &[T] {
        // SAFETY: the first `len` items are initialized: only push() and fill() increase `len`.
        unsafe { std::slice::from_raw_parts(self.items.as_ptr().cast(), self.len) }
    }

    #[inline(always)]
    pub(super) fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.items.as_mut_ptr().cast(), self.len) }
    }
}

/// Source and destination: two addresses of one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flow {
    pub from: KernelAddr,
    pub to: KernelAddr,
}

impl Flow {
    #[inline(always)]
    fn same_as(&self, other: &Flow) -> bool {
        self.from.same_as(&other.from) && self.to.same_as(&other.to)
    }
}

/// A message in a [`SendBatch`]: one datagram of a flow, or several of equal
/// length, which the kernel sends as segments (`UDP_SEGMENT`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'d> {
    pub flow: &'d Flow,
    /// Length of each of its datagrams, except the last, which may be shorter.
    pub segment: usize,
    /// Index of its first datagram in the caller's array.
    pub first: u16,
    /// Number of datagrams on the wire.
    pub segments: u8,
    first_iovec: u8,
    first_part: u8,
    parts: u8,
}

/// Maximum number of segments of a message: `UDP_MAX_SEGMENTS`, include/linux/udp.h, before 6.9.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Maximum size of such a message, from the length field of IPv4.
pub(super) const MAX_GSO: usize = 65_507;

/// Additional data of a message that a raw socket sends.
struct Raw {
    header: [u8; raw::HEADER],
    /// Destination, with port 0: a raw socket interprets the port as a protocol (raw(7)).
    name: KernelAddr,
}

// SAFETY: all fields are MaybeUninit, for which any bytes are valid.
unsafe impl Zeroed for SendBuffers {}

// SAFETY: its pointers are read only while a SendBatch borrows it, which has written them.
unsafe impl Send for SendBuffers {}

/// Memory for the messages of a [`SendBatch`]. Only the used part is written.
pub(super) struct SendBuffers {
    headers: [MaybeUninit<mmsghdr>; BATCH],
    controls: [MaybeUninit<Outgoing>; BATCH],
    raws: [MaybeUninit<Raw>; BATCH],
    // A raw message has one more part for its header, and one part of data.
    iovecs: [MaybeUninit<iovec>; 2 * BATCH],
}

/// Messages for one `sendmmsg(2)`.
pub(super) struct SendBatch<'r, 'd> {
    room: &'r mut SendBuffers,
    messages: ArrayVec<Message<'d>, BATCH>,
    /// Number of parts.
    parts: usize,
    n_iovecs: usize,
    /// Length of the last message.
    len: usize,
}

impl<'r, 'd> SendBatch<'r, 'd> {
    #[inline(always)]
    pub(super) fn new(room: &'r mut SendBuffers) -> SendBatch<'r, 'd> {
        SendBatch { room, messages: ArrayVec::new(), parts: 0, n_iovecs: 0, len: 0 }
    }

    /// Whether no further message or part fits.
    #[inline(always)]
    pub(super) fn is_full(&self) -> bool {
        self.parts == BATCH
    }

    /// Appends a part.
    #[inline(always)]
    fn iovec(&mut self, base: *const u8, len: usize) {
        self.room.iovecs[self.n_iovecs].write(iovec { iov_base: base.cast_mut().cast(), iov_len: len });
        self.n_iovecs += 1;
    }

    /// Adds a message with the data of one datagram, or of several with `segment` bytes each. With a UDP header for a raw
    /// socket. The batch must not be full.
    #[inline(always)]
    pub(super) fn push(
        &mut self,
        flow: &'d Flow,
        first: u16,
        segment: usize,
        data: &'d [u8],
        header: Option<[u8; raw::HEADER]>,
    ) {
        let at = self.messages.get().len();
        let first_iovec = self.n_iovecs;
        let mut name = flow.to.as_bytes().as_ptr();
        if let Some(header) = header {
            let raw = self.room.raws[at].write(Raw { header, name: flow.to });
            raw.name.set_port(0);
            name = raw.name.as_bytes().as_ptr();
            let header = raw.header.as_ptr();
            self.iovec(header, raw::HEADER);
        }
        let first_part = self.n_iovecs;
        self.iovec(data.as_ptr(), data.len());
        let n_iovecs = self.n_iovecs - first_iovec;
        let segments = if segment == data.len() { 1 } else { data.len().div_ceil(segment.max(1)) };
        // A link-local source address belongs to the interface of the client.
        let control = self.room.controls[at].write(Outgoing::new(&flow.from, flow.to.scope()));
        if segments > 1 {
            control.add_segment_len(segment as u16);
        }
        // send() sets the pointer to the parts, after all of them were added.
        let mut msg_hdr = msghdr_of(name.cast_mut().cast(), flow.to.as_bytes().len(), ptr::null_mut(), n_iovecs);
        msg_hdr.msg_controllen = control.bytes().len();
        msg_hdr.msg_control = ptr::from_mut(control).cast();
        self.room.headers[at].write(mmsghdr { msg_hdr, msg_len: 0 });
        self.messages.push(Message {
            flow,
            segment,
            first,
            segments: segments as u8,
            first_iovec: first_iovec as u8,
            first_part: first_part as u8,
            parts: 1,
        });
        self.parts += 1;
        self.len = data.len();
    }

    /// Adds a datagram to the last message, if flow and length allow it. The batch must not be full, and not be for a raw
    /// socket.
    #[inline(always)]
    pub(super) fn join(&mut self, flow: &Flow, data: &'d [u8]) -> bool {
        let Some(last) = self.messages.get_mut().last_mut() else { return false };
        let takes = last.flow.same_as(flow)
            && self.len == last.segment * usize::from(last.segments)
            && (1..=last.segment).contains(&data.len())
            && usize::from(last.segments) < MAX_SEGMENTS
            && self.len + data.len() <= MAX_GSO;
        if !takes {
            return false;
        }
        last.segments += 1;
        last.parts += 1;
        self.len += data.len();
        let (segments, segment) = (last.segments, last.segment);
        // SAFETY: as many headers as messages are initialized.
        let header = unsafe { &mut self.room.headers[self.messages.get().len() - 1].assume_init_mut().msg_hdr };
        header.msg_iovlen += 1;
        if segments == 2 {
            // SAFETY: push() set the pointer to control data to which no other reference exists.
            let control = unsafe { &mut *header.msg_control.cast::<Outgoing>() };
            control.add_segment_len(segment as u16);
            header.msg_controllen = control.bytes().len();
        }
        self.iovec(data.as_ptr(), data.len());
        self.parts += 1;
        true
    }

    /// Returns the data of a message, datagram by datagram.
    pub(super) fn parts(&self, message: &Message<'d>) -> impl Iterator<Item = &'d [u8]> {
        self.room.iovecs.iter().skip(message.first_part.into()).take(message.parts.into()).map(|part| {
            // SAFETY: the parts of a message are initialized, and were made from such slices.
            unsafe {
                let part = part.assume_init_ref();
                std::slice::from_raw_parts(part.iov_base.cast(), part.iov_len)
            }
        })
    }

    /// Sends all messages and reports which failed. Makes one system call, and one more for each failed message.
    #[inline(always)]
    pub(super) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        flags: i32,
        mut failed: impl FnMut(&SendBatch<'_, 'd>, &Message<'d>, sys::Errno),
    ) {
        let len = self.messages.get().len();
        // After the last write to the parts, which would invalidate pointers created before.
        let iovecs = (&raw mut self.room.iovecs).cast::<iovec>();
        for (header, message) in self.room.headers.iter_mut().zip(self.messages.get()) {
            // SAFETY: as many headers as messages are initialized, and their parts are within the array.
            unsafe { header.assume_init_mut().msg_hdr.msg_iov = iovecs.add(message.first_iovec.into()) };
        }
        let mut at = 0;
        while at < len {
            // SAFETY: `len` messages are initialized; the buffers that they point to are alive, and have the given sizes.
            let sent = unsafe {
                libc::sendmmsg(
                    fd.as_raw_fd(),
                    self.room.headers[at..].as_mut_ptr().cast(),
                    (len - at) as libc::c_uint,
                    flags as _,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) => at += sent,
                Err(_) => at = self.say(at, sys::Errno::last(), &mut failed),
            }
        }
        self.messages = ArrayVec::new();
        self.parts = 0;
        self.n_iovecs = 0;
    }

    /// Reports a failed message, and returns the index of the next message to send.
    #[cold]
    #[inline(never)]
    fn say(
        &self,
        at: usize,
        error: sys::Errno,
        mut failed: impl FnMut(&SendBatch<'_, 'd>, &Message<'d>, sys::Errno),
    ) -> usize {
        let messages = self.messages.get();
        failed(self, &messages[at], error);
        if let sys::Errno(libc::EAGAIN | libc::EINTR) = error {
            // The buffer is full, or a signal arrived: the remaining messages would fail too.
            for rest in &messages[at + 1..] {
                failed(self, rest, error);
            }
            return messages.len();
        }
        at + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::udp::control::UDP_SEGMENT;
    use std::net::SocketAddr;

    fn flow(from: &str, to: &str) -> Flow {
        let parsed = |text: &str| KernelAddr::from(text.parse::<SocketAddr>().unwrap());
        Flow { from: parsed(from), to: parsed(to) }
    }

    /// Puts datagrams of these lengths into a batch, the first by push() and the others by join() where it takes them.
    /// Gives how many datagrams each message has.
    fn joined(lens: &[usize]) -> Vec<usize> {
        let flow = flow("192.0.2.1:53", "198.51.100.1:4000");
        let data = vec![0; MAX_GSO + 1];
        let mut buffers = zeroed_box().unwrap();
        let mut batch = SendBatch::new(&mut buffers);
        for (number, len) in lens.iter().enumerate() {
            assert_eq!(batch.is_full(), number == BATCH);
            if number == 0 || !batch.join(&flow, &data[..*len]) {
                batch.push(&flow, number as u16, *len, &data[..*len], None);
            }
        }
        assert_eq!(batch.is_full(), lens.len() == BATCH);
        let mut number = 0;
        for (at, message) in batch.messages.get().iter().enumerate() {
            let parts: Vec<usize> = batch.parts(message).map(<[u8]>::len).collect();
            assert_eq!(parts, lens[number..number + parts.len()], "{lens:?}");
            assert_eq!((usize::from(message.first), usize::from(message.segments)), (number, parts.len()));
            number += parts.len();
            // SAFETY: as many headers as messages are initialised, and their control data.
            let (n_iovecs, control) = unsafe {
                let header = &batch.room.headers[at].assume_init_ref().msg_hdr;
                (header.msg_iovlen, std::slice::from_raw_parts(header.msg_control.cast::<u8>(), header.msg_controllen))
            };
            assert_eq!(n_iovecs, parts.len());
            let segment = [libc::SOL_UDP.to_ne_bytes(), UDP_SEGMENT.to_ne_bytes()].concat();
            let at = control.windows(8).position(|window| window == segment);
            let len = at.map(|at| u16::from_ne_bytes([control[at + 8], control[at + 9]]));
            assert_eq!(len.map(usize::from), (parts.len() > 1).then_some(parts[0]), "{lens:?}");
        }
        batch.messages.get().iter().map(|message| usize::from(message.segments)).collect()
    }

    #[test]
    fn batch_joins_datagrams_of_one_length_and_a_shorter_last() {
        assert_eq!(joined(&[100]), [1]);
        assert_eq!(joined(&[100, 100, 100]), [3]);
        assert_eq!(joined(&[100, 100, 99, 100, 100]), [3, 2]);
        assert_eq!(joined(&[100, 1, 1]), [2, 1]);
        assert_eq!(joined(&[100, 101, 101]), [1, 2]);
        assert_eq!(joined(&[100, 0, 100]), [1, 1, 1]);
        assert_eq!(joined(&[0, 0]), [1, 1]);
        assert_eq!(joined(&[1, 1, 1]), [3]);
    }

    #[test]
    fn batch_joins_no_more_than_a_packet_holds() {
        assert_eq!(joined(&[32_754, 32_753]), [2]);
        assert_eq!(joined(&[32_754, 32_754]), [1, 1]);
        assert_eq!(joined(&[20_000; 5]), [3, 2]);
        assert_eq!(joined(&[1000; BATCH]), [MAX_SEGMENTS]);
    }

    #[test]
    fn batch_joins_no_more_datagrams_than_the_kernel_cuts_apart() {
        let flow = flow("192.0.2.1:53", "198.51.100.1:4000");
        let data = [0; 1000];
        let mut buffers = zeroed_box().unwrap();
        for segments in 1..=MAX_SEGMENTS {
            let mut batch = SendBatch::new(&mut buffers);
            batch.push(&flow, 0, 10, &data[..10 * segments], None);
            for more in segments..MAX_SEGMENTS {
                assert!(batch.join(&flow, &data[..10]), "{segments} and {more}");
            }
            assert!(!batch.join(&flow, &data[..10]), "{segments}");
        }
    }

    /// With no room, or after a signal, the others would fare no better: they are not tried.
    #[test]
    fn batch_that_finds_no_room_gives_up_the_rest() {
        let flow = flow("192.0.2.1:53", "198.51.100.1:4000");
        let mut buffers = zeroed_box().unwrap();
        let mut batch = SendBatch::new(&mut buffers);
        for number in 0..4 {
            batch.push(&flow, number, 1, b"x", None);
        }
        for (at, errno, failed, next) in [
            (0, libc::EAGAIN, vec![0, 1, 2, 3], 4),
            (2, libc::EINTR, vec![2, 3], 4),
            (3, libc::EAGAIN, vec![3], 4),
            (0, libc::EPERM, vec![0], 1),
            (2, libc::EMSGSIZE, vec![2], 3),
        ] {
            let mut told = Vec::new();
            let told_of = |_: &SendBatch<'_, '_>, message: &Message<'_>, error: sys::Errno| {
                assert_eq!(error, sys::Errno(errno));
                told.push(message.first);
            };
            assert_eq!(batch.say(at, sys::Errno(errno), told_of), next);
            assert_eq!(told, failed);
        }
    }

    #[test]
    fn batch_joins_datagrams_of_one_flow() {
        let one = flow("192.0.2.1:53", "198.51.100.1:4000");
        let mut buffers = zeroed_box().unwrap();
        let mut batch = SendBatch::new(&mut buffers);
        assert!(!batch.join(&one, b"x"));
        batch.push(&one, 0, 1, b"x", None);
        for (from, to) in [
            ("192.0.2.2:53", "198.51.100.1:4000"),
            ("192.0.2.1:54", "198.51.100.1:4000"),
            ("192.0.2.1:53", "198.51.100.2:4000"),
            ("192.0.2.1:53", "198.51.100.1:4001"),
            ("[2001:db8::1]:53", "198.51.100.1:4000"),
        ] {
            assert!(!batch.join(&flow(from, to), b"x"), "{from} {to}");
        }
        assert!(batch.join(&one.clone(), b"x"));
    }
}
