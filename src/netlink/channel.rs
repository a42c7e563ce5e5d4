//! An exchange of messages with the kernel: send, and collect the answers.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::uapi::*;
use super::wire::{self, Attrs, Buffer};
use crate::memory;
use crate::process::Held;
use crate::sys;

const SOCKET_OPTIONS: [i32; 3] = [NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK];
/// The kernel fills no more with one part of a dump than the buffer that it was given before, and the first with at most
/// 8 KiB (`netlink_dump`, NLMSG_GOODSIZE).
pub(crate) const RECEIVE_BUFFER: usize = 8 << 10;
/// The most that the kernel fills with one part of a dump (`netlink_recvmsg`). Each part makes it look for where the last
/// ended, from the beginning of the list: large parts make long lists short.
const WIDE_BUFFER: usize = 32 << 10;
/// A dump that is interrupted this often is given up.
const DUMP_TRIES: usize = 16;
/// `struct nlmsghdr`, before each payload.
const MESSAGE_HEADER: usize = 16;
/// A dump of more than this is given up (EFBIG): a list that others add to as fast as it is read has no end.
const DUMP_MAX: usize = 256 << 20;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const DUMP: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;

/// What carries the bytes: the kernel's socket, or a test's stand-in.
pub(crate) trait Transport: Send {
    /// Sends messages as one datagram; the kernel has acted on them when it returns.
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()>;
    /// Receives one datagram in place of what is in the buffer, as much of it as there is room for, or fails with
    /// `WouldBlock` when there is none.
    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()>;
    /// The kernel's socket, as long as it is the one that was opened.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Transport for Socket {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        send_to(self, bytes)
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        sys::receive(self.as_fd(), buffer)
    }
}

/// A socket of ours that a program may have closed along with its own descriptors. Who keeps it from one call of the
/// program to the next asks [`Channel::descriptor`] first whether it is still there.
impl Transport for Held {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        send_to(&SockRef::from(&self.get_unchecked()), bytes)
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        sys::receive(self.get_unchecked(), buffer)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.get()
    }
}

fn send_to(socket: &Socket, bytes: &[u8]) -> sys::Result<()> {
    let sent = match socket.send(bytes).map_err(sys::Errno::from) {
        Err(sys::Errno(libc::EMSGSIZE)) => {
            enlarge_send_buffer(socket, bytes.len());
            socket.send(bytes)?
        }
        sent => sent?,
    };
    if sent == bytes.len() { Ok(()) } else { Err(sys::Errno(libc::EMSGSIZE)) }
}

/// A datagram has to fit into the send buffer (`netlink_sendmsg`). Beyond
/// net.core.wmem_max that takes CAP_NET_ADMIN over the host, not just over the namespace.
fn enlarge_send_buffer(socket: &Socket, len: usize) {
    // The kernel doubles the number, and wants some bytes to spare.
    let size = i32::try_from(len / 2 + 4096).unwrap_or(i32::MAX);
    for option in [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF] {
        if sys::setsockopt_int(socket.as_fd(), libc::SOL_SOCKET, option, size).is_ok() {
            return;
        }
    }
}

/// The kernel's answer to one message that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub seq: u32,
    pub errno: i32,
    /// The extended acknowledgement: the kernel's own words,
    pub text: Option<String>,
    /// and where in our message the offending attribute is.
    pub offset: Option<usize>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", sys::Errno(self.errno))?;
        match &self.text {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

/// Of each object in a dump its payload behind the message header.
pub(crate) type Dumped = Vec<Vec<u8>>;

/// The beginning of a list that may be very long.
#[derive(Debug)]
pub(crate) struct FirstRead<T> {
    pub found: Vec<T>,
    /// How many objects the kernel sent.
    pub objects: usize,
    /// These are all.
    pub all: bool,
}

/// What the kernel answered to an exchange.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// The last message was good.
    pub acked: bool,
    pub failures: Vec<Failure>,
}

/// A netlink socket and its sequence numbers.
pub(crate) struct Channel {
    transport: Box<dyn Transport>,
    /// The socket's own address. 0: it is not the kernel's socket.
    port: u32,
    seq: u32,
    received: Vec<u8>,
}

impl Channel {
    /// A channel to the kernel.
    pub fn open(family: i32) -> sys::Result<Channel> {
        let socket = Channel::socket(family)?;
        let port = sys::netlink_port(socket.as_fd())?;
        Ok(Channel { port, ..Channel::over(Box::new(Held::new(socket))) })
    }

    /// The socket, as long as the program has not closed it.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.transport.descriptor()
    }

    pub fn port(&self) -> u32 {
        self.port
    }

    /// A channel on which long lists are to be read.
    pub fn open_wide(family: i32) -> sys::Result<Channel> {
        let mut channel = Channel::open(family)?;
        channel.received.try_reserve_exact(WIDE_BUFFER).map_err(|_| sys::Errno(libc::ENOMEM))?;
        Ok(channel)
    }

    /// Opens a socket of a netlink family (`NETLINK_ROUTE`, `NETLINK_NETFILTER`).
    pub fn socket(family: i32) -> sys::Result<Socket> {
        let kind = Type::RAW.cloexec().nonblocking();
        let socket = Socket::new_raw(Domain::from(libc::AF_NETLINK), kind, Some(Protocol::from(family)))?;
        for option in SOCKET_OPTIONS {
            // Each came with another kernel (4.2 to 4.20); without one, errors say less.
            let _ = sys::setsockopt_int(socket.as_fd(), libc::SOL_NETLINK, option, 1);
        }
        bind_to_fresh_port(&socket)?;
        Ok(socket)
    }

    /// A channel over any transport.
    pub fn over(transport: Box<dyn Transport>) -> Channel {
        Channel { transport, port: 0, seq: 0, received: Vec::with_capacity(RECEIVE_BUFFER) }
    }

    pub fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }

    /// Sends messages, of which the last wants an acknowledgement, and collects every error.
    ///
    /// The kernel answers in the order of the messages, and before all others if a transaction cannot be committed
    /// (`nfnetlink_rcv_batch`): after the answer to the last nothing comes.
    pub fn exchange(&mut self, messages: &Buffer, last: u32) -> sys::Result<Answers> {
        self.send(messages)?;
        let mut answers = Answers::default();
        self.drain(&mut |message| {
            if message.kind == NLMSG_ERROR {
                match parse_error(message) {
                    Some(failure) if failure.errno != 0 => answers.failures.push(failure),
                    _ => answers.acked |= message.seq == last,
                }
            }
            message.kind == NLMSG_ERROR && message.seq == last
        })?;
        Ok(answers)
    }

    /// Asks for one object; gives its payload behind the message header.
    pub fn get(&mut self, kind: u16, header: &[u8]) -> sys::Result<Option<Vec<u8>>> {
        self.get_with(kind, header, &|_| {})
    }

    /// Asks for one object, which attributes name; gives its payload behind the message header.
    pub fn get_with(
        &mut self,
        kind: u16,
        header: &[u8],
        attrs: &dyn Fn(&mut Attrs<'_>),
    ) -> sys::Result<Option<Vec<u8>>> {
        let seq = self.next_seq();
        let mut request = Buffer::default();
        request.message(kind, REQUEST, seq, header, attrs);
        self.send(&request)?;
        let mut found = Ok(None);
        self.drain(&mut |message| {
            if message.seq == seq {
                found = object(message);
            }
            message.seq == seq
        })?;
        found
    }

    /// Asks for one object, and then for all of a kind, in one go.
    pub fn get_then_dump(&mut self, one: u16, all: u16, header: &[u8]) -> sys::Result<(Option<Vec<u8>>, Dumped)> {
        for _ in 0..DUMP_TRIES {
            let (first, second) = (self.next_seq(), self.next_seq());
            let mut request = Buffer::default();
            request.message(one, REQUEST, first, header, |_| {});
            request.message(all, DUMP, second, header, |_| {});
            let (mut found, mut dumped) = (Ok(None), Dumped::new());
            let listed =
                self.listed(&request, second, usize::MAX, &mut |payload| keep(&mut dumped, payload), &mut |message| {
                    if message.seq == first {
                        found = object(message);
                    }
                });
            // Who may not ask gets one answer to both.
            let found = found?;
            if listed?.is_some() {
                return Ok((found, dumped));
            }
        }
        Err(sys::Errno(libc::EAGAIN))
    }

    /// Asks for all objects of a kind that match some attributes; gives each one's payload behind the message header.
    pub fn dump(&mut self, kind: u16, header: &[u8], filter: &dyn Fn(&mut Attrs<'_>)) -> sys::Result<Dumped> {
        for _ in 0..DUMP_TRIES {
            let mut found = Dumped::new();
            let each = &mut |payload: &[u8]| keep(&mut found, payload);
            if self.dump_once(kind, header, filter, usize::MAX, each)?.is_some() {
                return Ok(found);
            }
        }
        Err(sys::Errno(libc::EAGAIN))
    }

    /// Reads the first `most` objects of a kind, or a few more, as far as `parse` makes something of each. If these are not
    /// all, the kernel goes on with the others on this channel, which is of no use any more.
    pub fn read_first<T>(
        &mut self,
        kind: u16,
        header: &[u8],
        filter: &dyn Fn(&mut Attrs<'_>),
        most: usize,
        parse: &dyn Fn(&[u8]) -> Option<T>,
    ) -> sys::Result<FirstRead<T>> {
        for _ in 0..DUMP_TRIES {
            let mut found = Vec::new();
            let each = &mut |payload: &[u8]| {
                found.try_reserve(1).map_err(|_| sys::Errno(libc::ENOMEM))?;
                found.extend(parse(payload));
                Ok(())
            };
            if let Some((objects, all)) = self.dump_once(kind, header, filter, most, each)? {
                return Ok(FirstRead { found, objects, all });
            }
        }
        Err(sys::Errno(libc::EAGAIN))
    }

    /// The number of objects, and whether they are all; `None`: the list changed while it was read.
    fn dump_once(
        &mut self,
        kind: u16,
        header: &[u8],
        filter: &dyn Fn(&mut Attrs<'_>),
        most: usize,
        each: &mut dyn FnMut(&[u8]) -> sys::Result<()>,
    ) -> sys::Result<Option<(usize, bool)>> {
        let seq = self.next_seq();
        let mut request = Buffer::default();
        request.message(kind, DUMP, seq, header, filter);
        self.listed(&request, seq, most, each, &mut |_| {})
    }

    /// Sends a request, and gives away the answers to the dump in it, and the others. Gives what [`Self::dump_once`] does.
    fn listed(
        &mut self,
        request: &Buffer,
        seq: u32,
        most: usize,
        each: &mut dyn FnMut(&[u8]) -> sys::Result<()>,
        others: &mut dyn FnMut(&wire::Message<'_>),
    ) -> sys::Result<Option<(usize, bool)>> {
        self.send(request)?;
        let (mut objects, mut interrupted, mut done, mut bytes) = (0, false, None, 0);
        self.drain(&mut |message| {
            if message.seq != seq {
                others(message);
                return false;
            }
            interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
            match message.kind {
                NLMSG_DONE => done = Some(wire::u32_at(message.payload, 0).map_or(0, |e| (e as i32).wrapping_neg())),
                NLMSG_ERROR => done = Some(parse_error(message).map_or(libc::EPROTO, |failure| failure.errno)),
                kind if kind >= NLMSG_MIN_TYPE => {
                    objects += 1;
                    bytes += MESSAGE_HEADER + message.payload.len();
                    if let Err(sys::Errno(errno)) = each(message.payload) {
                        done = Some(errno);
                    }
                }
                _ => {}
            }
            done.is_some() || objects >= most || bytes > DUMP_MAX
        })?;
        match done {
            _ if bytes > DUMP_MAX => Err(sys::Errno(libc::EFBIG)),
            _ if interrupted => Ok(None),
            None if objects >= most => Ok(Some((objects, false))),
            Some(0) => Ok(Some((objects, true))),
            Some(errno) => Err(sys::Errno(errno)),
            None => Err(sys::Errno(libc::EPROTO)),
        }
    }

    /// Drops what there is to be received: answers to a process that was ended while it asked. Until they are read, the
    /// kernel begins no other dump on the socket (EBUSY, `__netlink_dump_start`).
    pub fn discard(&mut self) {
        const PARTS_MAX: usize = DUMP_MAX / RECEIVE_BUFFER;
        for _ in 0..PARTS_MAX {
            match self.transport.receive(&mut self.received) {
                // What was lost for want of room (ENOBUFS) is of no interest either.
                Ok(()) | Err(sys::Errno(libc::EINTR | libc::ENOBUFS)) => {}
                Err(_) => return,
            }
        }
    }

    fn send(&mut self, messages: &Buffer) -> sys::Result<()> {
        let bytes = messages.bytes()?;
        self.transport.send(bytes)
    }

    /// Receives until `each` says that a message was the last, or nothing is left: the answers are there when `send`
    /// returns.
    fn drain(&mut self, each: &mut dyn FnMut(&wire::Message<'_>) -> bool) -> sys::Result<()> {
        loop {
            match self.transport.receive(&mut self.received) {
                // All that came together is looked at.
                Ok(()) => {
                    let messages = wire::messages(&self.received);
                    if messages.fold(false, |last, message| each(&message) | last) {
                        return Ok(());
                    }
                }
                Err(sys::Errno(libc::EAGAIN)) => return Ok(()),
                Err(sys::Errno(libc::EINTR)) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Adds a copy to a list, if there is memory.
fn keep(list: &mut Dumped, payload: &[u8]) -> sys::Result<()> {
    let copy = memory::copy(payload).filter(|_| list.try_reserve(1).is_ok()).ok_or(sys::Errno(libc::ENOMEM))?;
    list.push(copy);
    Ok(())
}

/// The payload of the answer to a question for one object.
fn object(message: &wire::Message<'_>) -> sys::Result<Option<Vec<u8>>> {
    if message.kind >= NLMSG_MIN_TYPE {
        return Ok(Some(message.payload.to_vec()));
    }
    match parse_error(message) {
        Some(failure) => Err(sys::Errno(failure.errno)),
        None => Ok(None),
    }
}

/// Our ports are a process id and a counter. Process ids have at most 22 bits (PID_MAX_LIMIT).
const COUNTER_BITS: u32 = 10;

/// The process that opened the channel of a port.
pub(crate) fn process_of_port(port: u32) -> u32 {
    port >> COUNTER_BITS
}

/// Binds a netlink socket to a port that no other had a moment ago.
///
/// Left to itself the kernel gives the process id whenever it is free, and it is
/// free again before the release of what a closing socket owned has run: that
/// release, which goes by the port, would take the tables of the next socket
/// with it (`netlink_release`, `nft_rcv_nl_event`).
///
/// The port also says whose it is: [`process_of_port`].
fn bind_to_fresh_port(socket: &Socket) -> sys::Result<()> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let mut outcome = Ok(());
    for _ in 0..1 << COUNTER_BITS {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed) % (1 << COUNTER_BITS);
        let address = sys::netlink_address(std::process::id() << COUNTER_BITS | count)?;
        outcome = socket.bind(&address).map_err(sys::Errno::from);
        if outcome != Err(sys::Errno(libc::EADDRINUSE)) {
            break;
        }
    }
    outcome
}

/// Takes an NLMSG_ERROR message apart; errno 0 is an acknowledgement.
fn parse_error(message: &wire::Message<'_>) -> Option<Failure> {
    /// The error code, then the header of the message that it answers.
    const EXTENSION_AT: usize = 4 + 16;
    let errno = (wire::u32_at(message.payload, 0)? as i32).wrapping_neg();
    let extension = match message.flags & NLM_F_ACK_TLVS {
        0 => &[],
        _ => message.payload.get(EXTENSION_AT..).unwrap_or_default(),
    };
    Some(Failure {
        seq: message.seq,
        errno,
        text: wire::string_of(extension, NLMSGERR_ATTR_MSG).map(str::to_owned),
        offset: wire::u32_of(extension, NLMSGERR_ATTR_OFFS).map(|v| v as usize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// Answers with the datagrams that it was given.
    struct Canned(VecDeque<Vec<u8>>);

    impl Transport for Canned {
        fn send(&mut self, _: &[u8]) -> sys::Result<()> {
            Ok(())
        }

        fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
            *buffer = self.0.pop_front().ok_or(sys::Errno(libc::EAGAIN))?;
            Ok(())
        }
    }

    fn channel(datagrams: Vec<Vec<u8>>) -> Channel {
        Channel::over(Box::new(Canned(datagrams.into())))
    }

    fn error(seq: u32, errno: i32, text: &str) -> Vec<u8> {
        let mut buffer = Buffer::default();
        let mut header = (-errno).to_ne_bytes().to_vec();
        header.extend_from_slice(&[0; 16]);
        buffer.message(NLMSG_ERROR, NLM_F_ACK_TLVS, seq, &header, |a| {
            a.string(NLMSGERR_ATTR_MSG, text);
            a.u32(NLMSGERR_ATTR_OFFS, 28);
        });
        buffer.bytes().unwrap().to_vec()
    }

    #[test]
    fn exchange_distinguishes_acknowledgement_from_error_with_message() {
        let answers = channel(vec![error(1, libc::EBUSY, "it is in use"), error(2, 0, "")])
            .exchange(&Buffer::default(), 2)
            .unwrap();
        assert!(answers.acked);
        let expected = Failure { seq: 1, errno: libc::EBUSY, text: Some("it is in use".to_owned()), offset: Some(28) };
        assert_eq!(answers.failures, [expected]);
    }

    #[test]
    fn dump_interrupted_forever_is_an_error() {
        assert_eq!(channel(vec![]).dump(1, &[], &|_| {}).unwrap_err(), sys::Errno(libc::EPROTO));
    }

    /// Whatever is asked, the answer goes on.
    struct Endless(Vec<u8>);

    impl Transport for Endless {
        fn send(&mut self, _: &[u8]) -> sys::Result<()> {
            Ok(())
        }

        fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
            buffer.clone_from(&self.0);
            Ok(())
        }
    }

    #[test]
    fn dump_without_end_is_given_up() {
        let mut buffer = Buffer::default();
        buffer.message(NLMSG_MIN_TYPE, 0, 1, &[0; 1 << 20], |_| {});
        let mut channel = Channel::over(Box::new(Endless(buffer.bytes().unwrap().to_vec())));
        assert_eq!(channel.dump(1, &[], &|_| {}).unwrap_err(), sys::Errno(libc::EFBIG));
    }

    #[test]
    fn exchange_of_two_requests_with_one_reply_ends() {
        let refused = channel(vec![error(1, libc::EPERM, "")]).get_then_dump(1, 1, &[]).unwrap_err();
        assert_eq!(refused, sys::Errno(libc::EPERM));
        let message = |kind, seq, payload: &[u8]| {
            let mut buffer = Buffer::default();
            buffer.message(kind, 0, seq, payload, |_| {});
            buffer.bytes().unwrap().to_vec()
        };
        let answers = [message(0x10, 1, b"one."), message(0x10, 2, b"all."), message(NLMSG_DONE, 2, &[0; 4])];
        let (one, all) = channel(answers.to_vec()).get_then_dump(1, 1, &[]).unwrap();
        assert_eq!((one.unwrap().as_slice(), all), (&b"one."[..], vec![b"all.".to_vec()]));
        let [one, all, done] = answers;
        let together = [all, done].concat();
        assert!(channel(vec![one, together]).get_then_dump(1, 1, &[]).is_ok());
        let cut = channel(vec![message(0x10, 1, b"one.")]).get_then_dump(1, 1, &[]).unwrap_err();
        assert_eq!(cut, sys::Errno(libc::EPROTO));
    }

    #[test]
    fn dump_refused_gives_errno() {
        let error = channel(vec![error(1, libc::EPERM, "")]).dump(1, &[], &|_| {}).unwrap_err();
        assert_eq!(error, sys::Errno(libc::EPERM));
    }

    proptest! {
        #[test]
        fn exchange_with_any_reply_does_not_panic(datagrams in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8)) {
            let _ = channel(datagrams.clone()).exchange(&Buffer::default(), 1);
            let _ = channel(datagrams.clone()).get(1, &[]);
            let _ = channel(datagrams.clone()).get_then_dump(1, 1, &[]);
            let _ = channel(datagrams).dump(1, &[], &|_| {});
        }
    }
}
