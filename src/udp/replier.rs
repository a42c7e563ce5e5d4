//! Sends replies from any source address.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::datagram::Datagram;
use super::message::{ArrayVec, Flow, MAX_GSO, MAX_SEGMENTS, Message, SendBatch, SendBuffers, zeroed_box};
use super::pool::{self, Egress, Key, SocketPool};
use super::raw;
use crate::address::KernelAddr;
use crate::error::{Error, Result};
use crate::sys::{self, Errno};

/// Options of a [`Replier`]. Each method changes one option and returns the options.
///
/// ```
/// use std::time::Duration;
/// use tproxy::udp::ReplierOptions;
///
/// let options = ReplierOptions::new().max_sockets(1024).idle(Duration::from_secs(10)).nonblocking(true);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "each method returns the changed options"]
pub struct ReplierOptions {
    pub(crate) max_sockets: usize,
    pub(crate) idle: Duration,
    pub(crate) nonblocking: bool,
    pub(crate) raw: bool,
}

impl ReplierOptions {
    /// Creates the default options: at most 256 sockets, closed after a minute without use.
    pub fn new() -> ReplierOptions {
        ReplierOptions { max_sockets: 256, idle: Duration::from_secs(60), nonblocking: false, raw: false }
    }

    /// Sets the maximum number of open sockets. There is one per source port. 0 is the same as 1.
    pub fn max_sockets(mut self, sockets: usize) -> ReplierOptions {
        self.max_sockets = sockets;
        self
    }

    /// Sets the time after which an unused socket is closed.
    pub fn idle(mut self, time: Duration) -> ReplierOptions {
        self.idle = time;
        self
    }

    /// Refuses a datagram with EAGAIN if the socket's buffer is full; by default the call waits.
    pub fn nonblocking(mut self, yes: bool) -> ReplierOptions {
        self.nonblocking = yes;
        self
    }

    /// Sends all replies through raw sockets, and binds no port.
    pub fn raw(mut self, yes: bool) -> ReplierOptions {
        self.raw = yes;
        self
    }
}

impl Default for ReplierOptions {
    fn default() -> ReplierOptions {
        ReplierOptions::new()
    }
}

/// Counters of a [`Replier`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplierStats {
    /// Sockets that are open now, including raw sockets.
    pub sockets: u64,
    /// Cache hits: lookups that found a socket for the source port, or a cached "port in use". There is one lookup per source
    /// port in a batch.
    pub hits: u64,
    /// Cache misses: lookups that had to create a socket.
    pub misses: u64,
    /// Datagrams sent through a raw socket.
    pub raw: u64,
    /// Sockets closed because the maximum number was reached.
    pub evictions: u64,
    /// Datagrams that were not sent.
    pub errors: u64,
    /// Datagrams that were sent.
    pub sent: u64,
}

/// Sends datagrams from any address and port. Only one thread at a time may use it.
pub struct Replier {
    sources: SocketPool,
    /// Buffers for messages. They are too large for a small stack.
    scratch: Scratch,
    flags: i32,
    raw: u64,
    errors: u64,
    sent: u64,
}

struct Scratch {
    batch: Batch,
    room: Box<SendBuffers>,
    /// For the segments of one message that are sent one by one.
    spare: Box<SendBuffers>,
}

/// Returns the errno value of a datagram that cannot be sent between two addresses.
#[inline(always)]
fn check(datagram: &Datagram<'_>, from: &KernelAddr, to: &KernelAddr) -> std::result::Result<(), i32> {
    match from {
        _ if from.port() == 0 || to.port() == 0 => Err(libc::EINVAL),
        // The kernel would choose a source address.
        _ if from.is_unspecified() || from.is_multicast() => Err(libc::EADDRNOTAVAIL),
        // The kernel would send it to this host.
        _ if to.is_unspecified() => Err(libc::EINVAL),
        _ if datagram.lacks_data() => Err(libc::EFAULT),
        _ => Ok(()),
    }
}

/// Number of replies that are sorted by source port together. It exceeds the size of a system call, because larger batches
/// have more replies per port.
const SORTED: usize = 256;

/// A datagram that can be sent.
#[derive(Clone, Copy)]
struct Pending {
    flow: Flow,
    number: u16,
    /// Index of the next datagram that the same socket sends.
    next: u16,
}

/// Marks the end of a list.
const END: u16 = u16::MAX;

/// List of the datagrams that one socket sends, in the caller's order.
#[derive(Clone, Copy)]
struct Group {
    first: u16,
    last: u16,
    /// Length of the longest datagram.
    longest: usize,
}

/// At most [`SORTED`] datagrams, by source port.
struct Batch {
    items: Box<ArrayVec<Pending, SORTED>>,
    ports: Box<ArrayVec<(Key, Group), SORTED>>,
    /// Hash table of indices into `ports` plus one; 0: empty. Its length is a power of two, and half of it stays empty, so that
    /// searches end.
    table: Box<ArrayVec<u16, { 2 * SORTED }>>,
}

impl Batch {
    fn new() -> sys::Result<Batch> {
        Ok(Batch { items: zeroed_box()?, ports: zeroed_box()?, table: zeroed_box()? })
    }

    /// Prepares the batch for a number of datagrams.
    #[inline(always)]
    fn clear(&mut self, datagrams: usize) {
        self.items.clear();
        self.ports.clear();
        self.table.fill(0, 2 * datagrams.next_power_of_two());
    }

    /// Adds a datagram. The error is an errno value.
    #[inline(always)]
    fn add(&mut self, datagram: &Datagram<'_>, number: usize) -> std::result::Result<(), i32> {
        let (from, to) = datagram.ends();
        if from.is_ipv4() && to.is_ipv4() {
            check(datagram, from, to)?;
            self.push(from, to, number, datagram.data().len());
            return Ok(());
        }
        let (mut from, mut to) = (*from, *to);
        for end in [&mut from, &mut to] {
            if end.get().is_none() {
                return Err(libc::EAFNOSUPPORT);
            }
            end.make_canonical();
        }
        if from.is_ipv4() != to.is_ipv4() {
            return Err(libc::EAFNOSUPPORT);
        }
        check(datagram, &from, &to)?;
        self.push(&from, &to, number, datagram.data().len());
        Ok(())
    }

    #[inline(always)]
    fn push(&mut self, from: &KernelAddr, to: &KernelAddr, number: usize, len: usize) {
        let key = Key::new(from.is_ipv6(), from.port());
        let place = self.items.get().len() as u16;
        self.items.push(Pending { flow: Flow { from: *from, to: *to }, number: number as u16, next: END });
        let alone = Group { first: place, last: place, longest: len };
        let table = self.table.get_mut();
        let mut at = key.spread() as usize;
        loop {
            let entry = &mut table[at & (table.len() - 1)];
            match self.ports.get_mut().get_mut(usize::from(entry.wrapping_sub(1))) {
                Some((found, group)) if *found == key => {
                    append(self.items.get_mut(), group, alone);
                    return;
                }
                Some(_) => at += 1,
                None => {
                    self.ports.push((key, alone));
                    *entry = self.ports.get().len() as u16;
                    return;
                }
            }
        }
    }
}

/// Appends one list to another.
#[inline(always)]
fn append(items: &mut [Pending], group: &mut Group, more: Group) {
    items[usize::from(group.last)].next = more.first;
    group.last = more.last;
    group.longest = group.longest.max(more.longest);
}

/// Iterates over a list, beginning with an item.
#[inline(always)]
fn from_item(items: &[Pending], first: u16) -> impl Iterator<Item = &Pending> {
    let mut next = first;
    std::iter::from_fn(move || {
        let item = items.get(usize::from(next))?;
        next = item.next;
        Some(item)
    })
}

impl Replier {
    /// Creates a replier without sockets. Fails with EPERM if the process may not open transparent sockets.
    pub fn new(options: ReplierOptions) -> Result<Replier> {
        pool::check_privilege()?;
        let scratch = || sys::Result::Ok(Scratch { batch: Batch::new()?, room: zeroed_box()?, spare: zeroed_box()? });
        let scratch = scratch().map_err(|_| Error::no_memory())?;
        let idle_ms = u64::try_from(options.idle.as_millis()).unwrap_or(u64::MAX);
        Ok(Replier {
            sources: SocketPool::new(options.max_sockets.max(1), idle_ms, options.raw)?,
            scratch,
            flags: if options.nonblocking { libc::MSG_DONTWAIT } else { 0 },
            raw: 0,
            errors: 0,
            sent: 0,
        })
    }

    /// Sends each datagram from its `orig_dst` to its `client`, and returns the
    /// number of datagrams that were sent. The others have an error. Datagrams
    /// of one flow keep their order.
    ///
    /// ```no_run
    /// use tproxy::udp::{Datagram, Replier, ReplierOptions};
    ///
    /// let mut answer = *b"pong";
    /// let mut datagram = Datagram::new(&mut answer);
    /// datagram.set_len(4);
    /// datagram.set_orig_dst("203.0.113.2:53".parse()?);
    /// datagram.set_client("192.0.2.7:40000".parse()?);
    /// let mut replier = Replier::new(ReplierOptions::new())?;
    /// if replier.reply(&mut [datagram]) == 0 {
    ///     eprintln!("the reply was not sent");
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reply(&mut self, datagrams: &mut [Datagram<'_>]) -> usize {
        let now = sys::coarse_ms();
        self.sources.sweep(now);
        let mut sent = 0;
        for batch in datagrams.chunks_mut(SORTED) {
            self.reply_batch(batch, now);
            sent += batch.iter().filter(|datagram| datagram.error().is_none()).count();
        }
        self.sent += sent as u64;
        self.errors += (datagrams.len() - sent) as u64;
        sent
    }

    /// Returns the counters.
    pub fn stats(&self) -> ReplierStats {
        let counts = self.sources.counts;
        ReplierStats {
            sockets: self.sources.open() as u64,
            hits: counts.hits,
            misses: counts.misses,
            raw: self.raw,
            evictions: counts.evictions,
            errors: self.errors,
            sent: self.sent,
        }
    }

    /// Makes one system call for each source port, and one for all raw replies of a family.
    #[inline(always)]
    fn reply_batch(&mut self, datagrams: &[Datagram<'_>], now: u64) {
        let Replier { sources, scratch, flags, raw: by_raw, .. } = self;
        let Scratch { batch, room, spare } = scratch;
        let (flags, spare) = (*flags, Cell::new(Some(&mut **spare)));
        batch.clear(datagrams.len());
        for (number, datagram) in datagrams.iter().enumerate() {
            datagram.set_error(batch.add(datagram, number).err().unwrap_or(0));
        }
        let Batch { items, ports, .. } = batch;
        let mut raw = [None; 2];
        for (key, group) in ports.get() {
            match sources.egress(*key, group.longest, now) {
                Ok(Egress::Port(fd)) => {
                    let by = BatchSender { items: items.get(), datagrams, fd, flags, raw: false, spare: &spare };
                    by.send(group.first, room);
                }
                Ok(Egress::Raw) => match &mut raw[usize::from(key.is_v6())] {
                    Some(all) => append(items.get_mut(), all, *group),
                    none => *none = Some(*group),
                },
                Err(error) => {
                    from_item(items.get(), group.first)
                        .for_each(|item| datagrams[usize::from(item.number)].set_error(error.errno()));
                }
            }
        }
        for (v6, group) in [false, true].into_iter().zip(raw) {
            let Some(group) = group else { continue };
            let ours = || from_item(items.get(), group.first).map(|item| &datagrams[usize::from(item.number)]);
            match sources.raw(v6) {
                Ok(fd) => {
                    BatchSender { items: items.get(), datagrams, fd, flags, raw: true, spare: &spare }
                        .send(group.first, room);
                }
                Err(error) => ours().for_each(|datagram| datagram.set_error(error.errno())),
            }
            *by_raw += ours().filter(|datagram| datagram.error().is_none()).count() as u64;
        }
    }
}

/// A socket, and the datagrams that it sends.
struct BatchSender<'a, 'b, 's> {
    items: &'a [Pending],
    datagrams: &'a [Datagram<'b>],
    fd: BorrowedFd<'a>,
    flags: i32,
    raw: bool,
    spare: &'a Cell<Option<&'s mut SendBuffers>>,
}

impl<'a> BatchSender<'a, '_, '_> {
    /// Sends a list of datagrams.
    #[inline(always)]
    fn send(&self, first: u16, room: &mut SendBuffers) {
        let mut outbox = SendBatch::new(room);
        let mut next = first;
        while let Some(item) = self.items.get(usize::from(next)) {
            let place = next;
            next = item.next;
            let datagram = &self.datagrams[usize::from(item.number)];
            let data = datagram.data();
            let segment = match datagram.segment_len() as usize {
                0 => data.len(),
                segment => segment.min(data.len()),
            };
            if self.raw || segment != data.len() {
                self.push_pieces(&mut outbox, place, segment);
                continue;
            }
            if outbox.is_full() {
                self.flush(&mut outbox);
            }
            if !outbox.join(&item.flow, data) {
                outbox.push(&item.flow, place, segment, data, None);
            }
        }
        outbox.send(self.fd, self.flags, |outbox, message, error| self.failed(outbox, message, error));
    }

    /// Adds a datagram that needs several messages or a UDP header.
    #[inline(never)]
    fn push_pieces(&self, outbox: &mut SendBatch<'_, 'a>, place: u16, segment: usize) {
        let raw = self.raw;
        let item = &self.items[usize::from(place)];
        let data = self.datagrams[usize::from(item.number)].data();
        if raw && segment > raw::LONGEST {
            self.datagrams[usize::from(item.number)].set_error(libc::EMSGSIZE);
            return;
        }
        // The segments of one message.
        let most = if raw { segment } else { segment * (MAX_GSO / segment.max(1)).clamp(1, MAX_SEGMENTS) };
        let flow = &item.flow;
        for data in pieces(data, most) {
            if outbox.is_full() {
                self.flush(outbox);
            }
            if raw || !outbox.join(flow, data) {
                let header = raw.then(|| raw::header(flow.from.into(), flow.to.into(), data));
                outbox.push(flow, place, segment, data, header);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn flush(&self, outbox: &mut SendBatch<'_, 'a>) {
        outbox.send(self.fd, self.flags, |outbox, message, error| self.failed(outbox, message, error));
    }

    #[cold]
    #[inline(never)]
    fn failed(&self, outbox: &SendBatch<'_, 'a>, message: &Message<'a>, error: Errno) {
        let items = from_item(self.items, message.first);
        // It may fit as fragments.
        let df_cleared = refuses_segments(error) && !self.raw && pool::clear_df(self.fd).is_ok();
        let again = message.segments > 1 && refuses_segments(error) || df_cleared && error == Errno(libc::EMSGSIZE);
        for (item, part) in items.zip(outbox.parts(message)) {
            let error = match self.spare.take().filter(|_| again) {
                Some(room) => {
                    let sent = send_one_by_one(message.flow, message.segment, part, self.fd, self.flags, room);
                    self.spare.set(Some(room));
                    sent
                }
                None => Err(error),
            };
            if let Err(Errno(errno)) = error {
                self.datagrams[usize::from(item.number)].set_error(errno);
            }
        }
    }
}

/// Whether the kernel may accept the same segments one by one: the route does
/// not support segmentation (EIO, and EINVAL before Linux 4.18), or a segment
/// must be fragmented (EINVAL, EMSGSIZE).
fn refuses_segments(error: Errno) -> bool {
    matches!(error.0, libc::EINVAL | libc::EMSGSIZE | libc::EIO | libc::EOPNOTSUPP)
}

/// Sends each segment as a separate datagram.
fn send_one_by_one(
    flow: &Flow,
    segment: usize,
    data: &[u8],
    fd: BorrowedFd<'_>,
    flags: i32,
    room: &mut SendBuffers,
) -> sys::Result<()> {
    let mut first_error = None;
    let mut outbox = SendBatch::new(room);
    let mut send = |outbox: &mut SendBatch<'_, '_>| {
        outbox.send(fd, flags, |_, _, error| _ = first_error.get_or_insert(error));
    };
    for segment in pieces(data, segment) {
        if outbox.is_full() {
            send(&mut outbox);
        }
        outbox.push(flow, 0, segment.len(), segment, None);
    }
    send(&mut outbox);
    first_error.map_or(Ok(()), Err)
}

/// Splits data into segments of a length. Empty data are one segment.
#[inline(always)]
fn pieces(data: &[u8], len: usize) -> impl Iterator<Item = &[u8]> {
    let (first, rest) = data.split_at(len.min(data.len()));
    std::iter::once(first).chain(rest.chunks(len.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    use proptest::prelude::*;

    #[test]
    fn reply_between_addresses_of_no_host_is_refused() {
        let mut batch = Batch::new().unwrap();
        batch.clear(SORTED);
        let mut added = |from: &str, to: &str| {
            let mut datagram = Datagram::new(&mut []);
            datagram.set_orig_dst(from.parse().unwrap());
            datagram.set_client(to.parse().unwrap());
            batch.add(&datagram, 0).err().unwrap_or(0)
        };
        for (from, to, errno) in [
            ("192.0.2.1:53", "198.51.100.1:1", 0),
            ("192.0.2.1:0", "198.51.100.1:1", libc::EINVAL),
            ("192.0.2.1:53", "198.51.100.1:0", libc::EINVAL),
            ("0.0.0.0:53", "198.51.100.1:1", libc::EADDRNOTAVAIL),
            ("224.0.0.1:53", "198.51.100.1:1", libc::EADDRNOTAVAIL),
            ("192.0.2.1:53", "0.0.0.0:1", libc::EINVAL),
            ("[2001:db8::1]:53", "[2001:db8::2]:1", 0),
            ("[::]:53", "[2001:db8::2]:1", libc::EADDRNOTAVAIL),
            ("[ff02::1]:53", "[2001:db8::2]:1", libc::EADDRNOTAVAIL),
            ("[2001:db8::1]:53", "[::]:1", libc::EINVAL),
            ("[::ffff:192.0.2.1]:53", "[::ffff:0.0.0.0]:1", libc::EINVAL),
            ("[2001:db8::1]:53", "198.51.100.1:1", libc::EAFNOSUPPORT),
        ] {
            assert_eq!(added(from, to), errno, "{from} {to}");
        }
    }

    #[test]
    fn errors_of_segments_are_those_that_one_by_one_may_not_have() {
        for errno in [libc::EINVAL, libc::EMSGSIZE, libc::EIO, libc::EOPNOTSUPP] {
            assert!(refuses_segments(Errno(errno)));
        }
        for errno in [libc::EAGAIN, libc::EPERM, libc::ENETUNREACH, libc::ENOBUFS, libc::ECONNREFUSED] {
            assert!(!refuses_segments(Errno(errno)));
        }
    }

    #[test]
    fn replier_options_are_set_by_their_methods() {
        let options = ReplierOptions::new();
        assert_eq!(options.max_sockets(7), ReplierOptions { max_sockets: 7, ..options });
        let idle = Duration::from_millis(5);
        assert_eq!(options.idle(idle), ReplierOptions { idle, ..options });
        assert_eq!(options.nonblocking(true), ReplierOptions { nonblocking: true, ..options });
        assert_eq!(options.raw(true), ReplierOptions { raw: true, ..options });
    }

    proptest! {
        #[test]
        fn reply_batch_is_grouped_by_port_and_family_in_order(
            // Few ports, so that several datagrams have the same one.
            ports in prop_oneof![
                proptest::collection::vec((1u16..8, 0u8..4), 0..=SORTED),
                proptest::collection::vec((any::<u16>(), 0u8..4), 0..=SORTED),
            ]
        ) {
            let mut batch = Batch::new().unwrap();
            batch.clear(SORTED);
            let mut expected: Vec<(Key, Vec<usize>)> = Vec::new();
            for (number, (port, kind)) in ports.iter().enumerate() {
                let (from, to) = [
                    ("192.0.2.1", "198.51.100.1"),
                    ("::ffff:192.0.2.1", "198.51.100.1"),
                    ("2001:db8::1", "2001:db8::2"),
                    // These cannot be sent.
                    ("2001:db8::1", "198.51.100.1"),
                ][usize::from(*kind)];
                let mut datagram = Datagram::new(&mut []);
                datagram.set_orig_dst(SocketAddr::new(from.parse().unwrap(), *port));
                datagram.set_client(SocketAddr::new(to.parse().unwrap(), 1));
                let added = batch.add(&datagram, number);
                let errno = if *kind == 3 { libc::EAFNOSUPPORT } else if *port == 0 { libc::EINVAL } else { 0 };
                prop_assert_eq!(added, if errno == 0 { Ok(()) } else { Err(errno) });
                if errno != 0 {
                    continue;
                }
                let key = Key::new(*kind == 2, *port);
                match expected.iter_mut().find(|(found, _)| *found == key) {
                    Some((_, numbers)) => numbers.push(number),
                    None => expected.push((key, vec![number])),
                }
            }
            let numbers = |first| from_item(batch.items.get(), first).map(|item| usize::from(item.number)).collect();
            let found: Vec<(Key, Vec<usize>)> =
                batch.ports.get().iter().map(|(key, group)| (*key, numbers(group.first))).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
