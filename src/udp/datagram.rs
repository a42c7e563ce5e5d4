//! The datagram struct that C and Rust share.

use std::cell::Cell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::net::SocketAddr;

use libc::sockaddr_storage;

use super::control::Control;
use super::storage;
use crate::address::KernelAddr;

/// Describes one datagram, or a GRO/GSO batch of equally sized datagrams of one flow.
///
/// tp_recv_datagrams() fills it and tp_reply() sends it. 296 bytes on 64-bit machines. Addresses are in
/// network byte order, other fields in host byte order.
#[repr(C)]
#[derive(Debug)]
pub struct Datagram<'a> {
    /// Buffer of the caller. May be NULL if it holds no bytes.
    data: *mut c_void,
    /// Size of the buffer. Read by tp_recv_datagrams(), ignored by tp_reply().
    capacity: usize,
    /// Number of bytes received or to send. Zero-length datagrams are valid.
    len: usize,
    /// Segment size. If non-zero and less than len, data holds consecutive datagrams of this size; the last
    /// may be shorter (UDP_GRO, UDP_SEGMENT).
    segment_len: u32,
    /// TP_DGRAM_TRUNC, TP_DGRAM_CTRUNC and TP_DGRAM_NO_ORIG_DST. Ignored by tp_reply().
    flags: u32,
    /// errno of this datagram; 0 if it was received or sent.
    error: Cell<i32>,
    /// Sender of a received datagram; destination of tp_reply().
    client: sockaddr_storage,
    /// Original destination of a received datagram; source address of tp_reply(). ss_family is AF_UNSPEC (0)
    /// if the kernel did not report it.
    orig_dst: sockaddr_storage,
    _memory: PhantomData<&'a mut [u8]>,
}

/// The datagram was truncated.
pub(crate) const TRUNC: u32 = 0x1;
/// The control data was truncated, because the socket reports more than fits the buffer.
pub(crate) const CTRUNC: u32 = 0x2;
/// The original destination is unknown.
pub(crate) const NO_ORIG_DST: u32 = 0x4;

impl<'a> Datagram<'a> {
    /// Creates an empty datagram with `memory` as its buffer. To send bytes that
    /// are in the buffer, call [`set_len`](Self::set_len).
    ///
    /// ```
    /// use tproxy::udp::Datagram;
    ///
    /// let mut memory = *b"pong";
    /// let mut datagram = Datagram::new(&mut memory);
    /// datagram.set_len(4);
    /// datagram.set_client("192.0.2.7:40000".parse()?);
    /// assert_eq!((datagram.data(), datagram.orig_dst()), (&b"pong"[..], None));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(memory: &'a mut [u8]) -> Datagram<'a> {
        Datagram {
            data: memory.as_mut_ptr().cast(),
            capacity: memory.len(),
            len: 0,
            segment_len: 0,
            flags: 0,
            error: Cell::new(0),
            client: storage::NO_ADDRESS,
            orig_dst: storage::NO_ADDRESS,
            _memory: PhantomData,
        }
    }

    /// Returns the bytes that were received, or that will be sent.
    #[inline(always)]
    pub fn data(&self) -> &[u8] {
        storage::bytes(self.data, self.len)
    }

    /// Returns the whole buffer.
    pub fn memory(&mut self) -> &mut [u8] {
        storage::bytes_mut(self.data, self.capacity)
    }

    /// Sets the number of bytes to send. It is limited to the size of the buffer.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.capacity);
    }

    /// Returns the segment size. If it is not 0 and less than the length, the datagram holds consecutive datagrams of this size;
    /// the last may be shorter (UDP_GRO, UDP_SEGMENT).
    pub fn segment_len(&self) -> u32 {
        self.segment_len
    }

    /// Sets the segment size: the data is sent as several datagrams of this length.
    pub fn set_segment_len(&mut self, len: u32) {
        self.segment_len = len;
    }

    /// Whether the received datagram was longer than the buffer.
    pub fn is_truncated(&self) -> bool {
        self.flags & TRUNC != 0
    }

    /// Returns the errno value of a datagram that was not sent.
    pub fn error(&self) -> Option<i32> {
        Some(self.error.get()).filter(|errno| *errno != 0)
    }

    /// Returns the sender of a received datagram, which is the destination of a reply.
    pub fn client(&self) -> Option<SocketAddr> {
        storage::address(&self.client).get()
    }

    /// Returns the original destination of a received datagram, which is the source of a reply.
    pub fn orig_dst(&self) -> Option<SocketAddr> {
        storage::address(&self.orig_dst).get()
    }

    /// Sets the destination of a reply.
    pub fn set_client(&mut self, client: SocketAddr) {
        storage::store_address(&mut self.client, &client.into());
    }

    /// Sets the source of a reply.
    pub fn set_orig_dst(&mut self, orig_dst: SocketAddr) {
        storage::store_address(&mut self.orig_dst, &orig_dst.into());
    }

    /// Whether the buffer is NULL although its size is not 0.
    pub(crate) fn lacks_memory(&self) -> bool {
        self.data.is_null() && self.capacity != 0
    }

    /// Returns the source and the destination of the reply, as stored.
    #[inline(always)]
    pub(super) fn ends(&self) -> (&KernelAddr, &KernelAddr) {
        (storage::address(&self.orig_dst), storage::address(&self.client))
    }

    /// Whether the buffer is NULL although the length is not 0.
    #[inline(always)]
    pub(super) fn lacks_data(&self) -> bool {
        self.data.is_null() && self.len != 0
    }

    #[inline(always)]
    pub(super) fn set_error(&self, errno: i32) {
        self.error.set(errno);
    }

    /// Offset of `client`, which `orig_dst` follows.
    pub(super) const CLIENT_AT: usize = {
        let at = std::mem::offset_of!(Datagram<'_>, client);
        assert!(std::mem::offset_of!(Datagram<'_>, orig_dst) == at + size_of::<sockaddr_storage>());
        at
    };

    /// Returns the buffer for received bytes, and its size.
    pub(super) fn memory_parts(&self) -> (*mut c_void, usize) {
        (self.data, self.capacity)
    }

    /// Sets the fields of a received datagram.
    #[inline(always)]
    pub(super) fn received(&mut self, len: usize, mut control: Control, cut: u32) {
        control.orig_dst.map_to_family(Some(self.client.ss_family.into()));
        self.len = len;
        self.segment_len = control.segment_len;
        self.flags = cut | if control.orig_dst.is_none() { NO_ORIG_DST } else { 0 };
        self.error.set(0);
        storage::store_address(&mut self.orig_dst, &control.orig_dst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagram_has_its_memory_and_what_was_put_there() {
        let mut memory = *b"0123456789";
        let mut datagram = Datagram::new(&mut memory);
        assert_eq!(datagram.data(), b"");
        assert_eq!(datagram.memory(), b"0123456789");
        datagram.memory()[0] = b'x';
        datagram.set_len(3);
        assert_eq!(datagram.data(), b"x12");
        datagram.set_len(11);
        assert_eq!(datagram.data(), b"x123456789");
        assert!(!datagram.lacks_memory() && !datagram.lacks_data());
        let to = "192.0.2.1:53".parse().unwrap();
        datagram.set_orig_dst(to);
        datagram.set_segment_len(5);
        datagram.set_error(libc::EPERM);
        assert_eq!((datagram.orig_dst(), datagram.segment_len(), datagram.error()), (Some(to), 5, Some(libc::EPERM)));
        assert_eq!(datagram.client(), None);
    }

    #[test]
    fn datagram_received_is_truncated_if_the_kernel_says_so() {
        let mut memory = [0; 4];
        let mut datagram = Datagram::new(&mut memory);
        let to = "192.0.2.1:53".parse().unwrap();
        for (cut, truncated) in [(0, false), (TRUNC, true), (CTRUNC, false), (TRUNC | CTRUNC, true)] {
            datagram.set_error(libc::EPERM);
            datagram.received(4, Control { orig_dst: KernelAddr::from(to), segment_len: 2 }, cut);
            assert_eq!((datagram.is_truncated(), datagram.flags), (truncated, cut));
            assert_eq!((datagram.data().len(), datagram.segment_len(), datagram.error()), (4, 2, None));
            assert_eq!(datagram.orig_dst(), Some(to));
        }
        datagram.received(4, Control::default(), TRUNC);
        assert_eq!((datagram.flags, datagram.orig_dst()), (TRUNC | NO_ORIG_DST, None));
    }

    #[test]
    fn datagram_without_memory_lacks_what_it_says_to_have() {
        let mut datagram = Datagram::new(&mut []);
        datagram.data = std::ptr::null_mut();
        assert!(!datagram.lacks_memory() && !datagram.lacks_data());
        (datagram.capacity, datagram.len) = (1, 0);
        assert!(datagram.lacks_memory() && !datagram.lacks_data());
        (datagram.capacity, datagram.len) = (0, 1);
        assert!(!datagram.lacks_memory() && datagram.lacks_data());
    }
}
