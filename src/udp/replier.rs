//! Answers, from any source.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use super::BATCH;
use super::datagram::Datagram;
use super::message::{Flow, MAX_GSO, MAX_SEGMENTS, Message, Outbox};
use super::raw;
use super::source::{self, Key, Sources, Way};
use crate::address::canonical;
use crate::error::Result;
use crate::{sort, sys};

/// How a [`Replier`] works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How many sockets of source ports it has at most; at least 1.
    pub max_sockets: usize,
    /// How long a socket may be unused, in milliseconds.
    pub idle_ms: u64,
    /// A datagram for which there is no room at once is EAGAIN.
    pub nonblocking: bool,
    /// Never takes a port: all replies are sent by raw sockets.
    pub raw: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { max_sockets: 256, idle_ms: 60_000, nonblocking: false, raw: false }
    }
}

/// What a [`Replier`] has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sockets that are open now, raw ones among them.
    pub sockets: u64,
    /// Groups of datagrams of one source port for which there was a socket, or for which it was known that there is none.
    pub hits: u64,
    /// Those for which a socket was to be made.
    pub misses: u64,
    /// Datagrams that left by a raw socket.
    pub raw: u64,
    /// Sockets that were closed for another's sake.
    pub evictions: u64,
    /// Datagrams that were not sent.
    pub errors: u64,
    /// Datagrams that were sent.
    pub sent: u64,
}

/// Sends datagrams from any address and port. For one thread at a time.
pub struct Replier {
    sources: Sources,
    flags: i32,
    raw: u64,
    errors: u64,
    sent: u64,
}

/// From whom to whom a reply goes, or why it cannot.
fn flow(datagram: &Datagram<'_>) -> std::result::Result<Flow, i32> {
    let end = |addr: Option<SocketAddr>| addr.map(canonical).ok_or(libc::EAFNOSUPPORT);
    let flow = Flow { from: end(datagram.orig_dst())?, to: end(datagram.client())? };
    match flow {
        _ if flow.from.is_ipv4() != flow.to.is_ipv4() => Err(libc::EAFNOSUPPORT),
        _ if flow.from.port() == 0 || flow.to.port() == 0 => Err(libc::EINVAL),
        // The kernel would choose a source by itself.
        _ if flow.from.ip().is_unspecified() || flow.from.ip().is_multicast() => Err(libc::EADDRNOTAVAIL),
        _ if datagram.lacks_data() => Err(libc::EFAULT),
        _ => Ok(flow),
    }
}

/// At most [`BATCH`] datagrams under way, and where they go.
struct Batch<'a, 'b> {
    datagrams: &'a [Datagram<'b>],
    /// `None` for one that cannot go.
    flows: &'a [Option<Flow>; BATCH],
    flags: i32,
}

/// Some of a batch, in order.
#[derive(Clone, Copy)]
struct Group {
    numbers: [u8; BATCH],
    len: usize,
}

impl Group {
    const EMPTY: Group = Group { numbers: [0; BATCH], len: 0 };

    fn of(numbers: impl Iterator<Item = usize>) -> Group {
        let mut group = Group::EMPTY;
        numbers.for_each(|number| group.push(number));
        group
    }

    fn push(&mut self, number: usize) {
        self.numbers[self.len] = number as u8;
        self.len += 1;
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.numbers[..self.len].iter().map(|number| usize::from(*number))
    }
}

impl Replier {
    /// A replier without a socket yet. Says already whether the privilege is there.
    pub fn new(options: Options) -> Result<Replier> {
        source::check_privilege()?;
        Ok(Replier {
            sources: Sources::new(options.max_sockets, options.idle_ms, options.raw),
            flags: if options.nonblocking { libc::MSG_DONTWAIT } else { 0 },
            raw: 0,
            errors: 0,
            sent: 0,
        })
    }

    /// Sends each datagram from its `orig_dst` to its `client`, and gives how
    /// many were sent; the others have an error. Datagrams of one flow keep
    /// their order.
    pub fn reply(&mut self, datagrams: &mut [Datagram<'_>]) -> usize {
        let now = sys::coarse_ms();
        self.sources.sweep(now);
        let mut sent = 0;
        for batch in datagrams.chunks_mut(BATCH) {
            let errors = self.reply_batch(batch, now);
            for (datagram, error) in batch.iter_mut().zip(errors) {
                datagram.set_error(error);
                sent += usize::from(error == 0);
                self.errors += u64::from(error != 0);
            }
        }
        self.sent += sent as u64;
        sent
    }

    /// What has been done so far.
    pub fn stats(&self) -> Stats {
        let counts = self.sources.counts;
        Stats {
            sockets: self.sources.open() as u64,
            hits: counts.hits,
            misses: counts.misses,
            raw: self.raw,
            evictions: counts.evictions,
            errors: self.errors,
            sent: self.sent,
        }
    }

    /// One system call for each source port, and one for all that are raw.
    fn reply_batch(&mut self, datagrams: &[Datagram<'_>], now: u64) -> [i32; BATCH] {
        let mut errors = [0; BATCH];
        let mut flows = [None; BATCH];
        // Sorted by port, those of one port in the caller's order.
        let mut order = [0; BATCH];
        let mut len = 0;
        for (number, datagram) in datagrams.iter().enumerate() {
            match flow(datagram) {
                Ok(flow) => {
                    flows[number] = Some(flow);
                    order[len] = Key::of(flow.from).with_number(number);
                    len += 1;
                }
                Err(errno) => errors[number] = errno,
            }
        }
        sort::few(&mut order[..len]);
        let batch = Batch { datagrams, flows: &flows, flags: self.flags };
        let mut raw = [Group::EMPTY; 2];
        for group in order[..len].chunk_by(|a, b| Key::and_number(*a).0 == Key::and_number(*b).0) {
            let (key, _) = Key::and_number(group[0]);
            let numbers = group.iter().map(|item| Key::and_number(*item).1);
            match self.sources.way(key, now) {
                Ok(Way::Port(fd)) => batch.send(fd, &Group::of(numbers), false, &mut errors),
                Ok(Way::Raw) => numbers.for_each(|number| raw[usize::from(key.v6)].push(number)),
                Err(error) => numbers.for_each(|number| errors[number] = error.errno()),
            }
        }
        for (v6, group) in [false, true].into_iter().zip(&raw) {
            if group.len == 0 {
                continue;
            }
            match self.sources.raw(v6) {
                Ok(fd) => batch.send_raw(fd, group, &mut errors),
                Err(error) => group.iter().for_each(|number| errors[number] = error.errno()),
            }
            self.raw += group.iter().filter(|number| errors[*number] == 0).count() as u64;
        }
        errors
    }
}

impl Batch<'_, '_> {
    #[inline(never)]
    fn send_raw(&self, fd: BorrowedFd<'_>, group: &Group, errors: &mut [i32; BATCH]) {
        self.send(fd, group, true, errors);
    }

    /// Sends some datagrams by one socket.
    #[inline(always)]
    fn send(&self, fd: BorrowedFd<'_>, group: &Group, raw: bool, errors: &mut [i32; BATCH]) {
        let mut outbox = Outbox::new();
        for (place, number) in group.iter().enumerate() {
            let Some(flow) = &self.flows[number] else { continue };
            let data = self.datagrams[number].data();
            let unit = match self.datagrams[number].segment_len() as usize {
                0 => data.len(),
                unit => unit.min(data.len()),
            };
            if raw && unit > raw::LONGEST {
                errors[number] = libc::EMSGSIZE;
                continue;
            }
            // What goes into one message.
            let most = match unit {
                _ if raw => unit,
                _ if unit == data.len() => unit,
                _ => unit * (MAX_GSO / unit).clamp(1, MAX_SEGMENTS),
            };
            for data in pieces(data, most) {
                if outbox.is_full() {
                    self.flush_midway(&mut outbox, fd, group, errors);
                }
                if !raw && outbox.join(flow, data) {
                    continue;
                }
                let mut message = Message::new(flow, place, unit, data);
                message.header = raw.then(|| raw::header(flow.from, flow.to, data));
                outbox.push(message, data);
            }
        }
        self.flush(&mut outbox, fd, group, errors);
    }

    #[inline(never)]
    fn flush_midway(&self, outbox: &mut Outbox<'_>, fd: BorrowedFd<'_>, group: &Group, errors: &mut [i32; BATCH]) {
        self.flush(outbox, fd, group, errors);
    }

    #[inline(always)]
    fn flush(&self, outbox: &mut Outbox<'_>, fd: BorrowedFd<'_>, group: &Group, errors: &mut [i32; BATCH]) {
        outbox.send(fd, self.flags, |message, parts, error| {
            let numbers = group.iter().skip(message.first);
            if message.segments > 1 && refuses_segments(&error) {
                for (number, part) in numbers.zip(parts) {
                    if let Err(error) = send_one_by_one(message.flow, message.unit, part, fd, self.flags) {
                        errors[number] = errno(&error);
                    }
                }
            } else {
                numbers.zip(parts).for_each(|(number, _)| errors[number] = errno(&error));
            }
        });
    }
}

/// Whether the kernel may take the same bytes one by one: no segment offload
/// on the way out (EIO, and EINVAL before Linux 4.18), or a segment that only
/// fits in fragments (EINVAL, EMSGSIZE).
fn refuses_segments(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO | libc::EOPNOTSUPP))
}

/// Sends each segment as a datagram of its own.
fn send_one_by_one(flow: &Flow, unit: usize, data: &[u8], fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    let mut first_error = None;
    let mut outbox = Outbox::new();
    let mut send = |outbox: &mut Outbox<'_>| {
        outbox.send(fd, flags, |_, _, error| _ = first_error.get_or_insert(error));
    };
    for segment in pieces(data, unit) {
        if outbox.is_full() {
            send(&mut outbox);
        }
        outbox.push(Message::new(flow, 0, unit, segment), segment);
    }
    send(&mut outbox);
    first_error.map_or(Ok(()), Err)
}

/// Data in pieces of a length; no data are one piece.
#[inline(always)]
fn pieces(data: &[u8], len: usize) -> impl Iterator<Item = &[u8]> {
    let (first, rest) = data.split_at(len.min(data.len()));
    std::iter::once(first).chain(rest.chunks(len.max(1)))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
