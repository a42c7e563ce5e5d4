//! Datagrams in, with their original destinations.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use super::datagram::Datagram;
use super::message;
use crate::address::KernelAddr;
use crate::error::{Ends, Error, Result, Step};

/// What [`receive_from`] says of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// The bytes received; with `MSG_TRUNC` asked for, the bytes that there were.
    pub len: usize,
    /// Who sent it. A socket that is connected to a stream gives `None`.
    pub source: Option<SocketAddr>,
    /// Where it was going; `None` if the socket does not report that.
    pub orig_dst: Option<SocketAddr>,
}

/// `recvfrom(2)` with the original destination, in one system call.
pub fn receive_from(fd: BorrowedFd<'_>, buffer: &mut [MaybeUninit<u8>], flags: i32) -> Result<Received> {
    let (mut source, mut orig_dst) = (KernelAddr::NONE, KernelAddr::NONE);
    let len = receive_one(fd, buffer, flags, &mut source, &mut orig_dst)?;
    Ok(Received { len, source: source.get(), orig_dst: orig_dst.get() })
}

/// As [`receive_from`], for the caller to whom its time matters: both addresses were none.
#[inline(always)]
pub(crate) fn receive_one(
    fd: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    flags: i32,
    source: &mut KernelAddr,
    orig_dst: &mut KernelAddr,
) -> Result<usize> {
    let (len, control) = message::receive_one(fd, buffer, flags, source)
        .map_err(|e| Error::socket(Step::Receive, Ends::default(), e))?;
    *orig_dst = control.orig_dst;
    orig_dst.take_family(source.family());
    Ok(len)
}

/// Receives as many datagrams as there are, up to [`BATCH`](super::BATCH): one
/// `recvmmsg(2)`, which waits for the first alone. Gives their number.
pub fn receive(fd: BorrowedFd<'_>, datagrams: &mut [Datagram<'_>], flags: i32) -> Result<usize> {
    message::receive(fd, datagrams, flags).map_err(|e| Error::socket(Step::Receive, Ends::default(), e))
}
