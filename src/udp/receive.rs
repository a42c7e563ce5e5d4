//! Receives datagrams with their original destinations.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use super::control;
use super::datagram::Datagram;
use super::message::{self, ControlBuffer};
use crate::address::{AddrRef, KernelAddr};
use crate::error::{Endpoints, Error, Result, SocketOp};

/// Result of [`receive_from`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// Number of bytes received; with the flag `MSG_TRUNC`, the length of the datagram.
    pub len: usize,
    /// Sender. `None` for a stream socket.
    pub source: Option<SocketAddr>,
    /// Original destination; `None` if the socket does not report it.
    pub orig_dst: Option<SocketAddr>,
}

/// Receives a datagram like `recvfrom(2)`, with its original destination, in one system call.
///
/// ```no_run
/// use std::mem::MaybeUninit;
/// # let socket = std::net::UdpSocket::bind("[::]:3053")?;
/// tproxy::socket::set_transparent(&socket)?;
/// let mut buffer = [MaybeUninit::uninit(); 2048];
/// let received = tproxy::udp::receive_from(&socket, &mut buffer, 0)?;
/// println!("{:?} sent {} bytes to {:?}", received.source, received.len, received.orig_dst);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn receive_from(fd: impl AsFd, buffer: &mut [MaybeUninit<u8>], flags: i32) -> Result<Received> {
    let (mut source, mut control) = (KernelAddr::NONE, ControlBuffer::EMPTY);
    let (len, orig_dst) = receive_one(fd.as_fd(), buffer, flags, &mut source, &mut control)?;
    let orig_dst = orig_dst.map(|found| found.of_family(source.family(), |addr| KernelAddr::from(addr).into()));
    Ok(Received { len, source: source.get(), orig_dst })
}

/// Like [`receive_from`], without copies: `source` must be empty, and the original destination refers to the buffer that the
/// kernel wrote.
#[inline(always)]
pub(crate) fn receive_one<'c>(
    fd: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    flags: i32,
    source: &mut KernelAddr,
    control: &'c mut ControlBuffer,
) -> Result<(usize, Option<AddrRef<'c>>)> {
    let (len, control) = message::receive_one(fd, buffer, flags, source, control)
        .map_err(|e| Error::socket(SocketOp::Receive, Endpoints::default(), e))?;
    Ok((len, control::orig_dst(control)))
}

/// Receives all queued datagrams, up to [`BATCH`](super::BATCH), by one
/// `recvmmsg(2)`, which waits only for the first. Returns their number.
///
/// ```no_run
/// use tproxy::udp::{Datagram, Replier, ReplierOptions, receive};
/// # let socket = std::net::UdpSocket::bind("[::]:3053")?;
/// let mut memory = vec![[0; 2048]; 64];
/// let mut datagrams: Vec<Datagram<'_>> = memory.iter_mut().map(|bytes| Datagram::new(bytes)).collect();
/// let mut replier = Replier::new(ReplierOptions::new())?;
/// loop {
///     let received = receive(&socket, &mut datagrams, 0)?;
///     // Sends each back to its client, from its original destination.
///     replier.reply(&mut datagrams[..received]);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn receive(fd: impl AsFd, datagrams: &mut [Datagram<'_>], flags: i32) -> Result<usize> {
    message::receive(fd.as_fd(), datagrams, flags)
        .map_err(|e| Error::socket(SocketOp::Receive, Endpoints::default(), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_time::limit;
    use socket2::{Domain, Socket, Type};
    use std::time::Instant;

    /// Whether the caller asks for that or not.
    #[test]
    fn receive_waits_for_the_first_datagram_alone() {
        let (here, there) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
        here.set_read_timeout(Some(limit(2000))).unwrap();
        for (flags, sent) in [(0, 1), (libc::MSG_WAITFORONE, 1), (0, 2), (0, 3)] {
            for _ in 0..sent {
                there.send(b"some words").unwrap();
            }
            let mut memory = [[0; 10]; 3];
            let mut datagrams: Vec<Datagram<'_>> = memory.iter_mut().map(|bytes| Datagram::new(bytes)).collect();
            let begin = Instant::now();
            assert_eq!(receive(&here, &mut datagrams, flags).unwrap(), sent);
            assert!(begin.elapsed() < limit(1000), "it has waited for more");
            let lens: Vec<usize> = datagrams.iter().map(|datagram| datagram.data().len()).collect();
            assert_eq!(lens.iter().filter(|len| **len == 10).count(), sent, "{lens:?}");
        }
    }

    /// However many there is room for, up to as many as a system call takes.
    #[test]
    fn receive_fills_as_many_datagrams_as_there_are() {
        for room in [1, 2, 4, 5, 16, 17, 32, 33, super::super::BATCH, super::super::BATCH + 1] {
            let (here, there) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
            there.set_nonblocking(true).unwrap();
            let sent = (0..room + 1).take_while(|n| there.send(&n.to_ne_bytes()).is_ok()).count();
            let mut memory = vec![[0; 8]; room];
            let mut datagrams: Vec<Datagram<'_>> = memory.iter_mut().map(|bytes| Datagram::new(bytes)).collect();
            let received = receive(&here, &mut datagrams, 0).unwrap();
            assert_eq!(received, room.min(sent).min(super::super::BATCH));
            for (n, datagram) in datagrams[..received].iter().enumerate() {
                assert_eq!(datagram.data(), n.to_ne_bytes());
            }
        }
    }
}
