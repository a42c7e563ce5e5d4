//! The C functions for sockets, with Rust's types.

use std::ffi::{CStr, c_int};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use socket2::{SockAddr, SockAddrStorage, SockRef};
use tproxy::ffi::*;

#[derive(Debug, PartialEq, Eq, Clone)]
pub struct Failed {
    pub errno: i32,
    pub sentence: String,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (errno {})", self.sentence, self.errno)
    }
}

pub fn checked(rc: c_int) -> Result<c_int, Failed> {
    if rc >= 0 {
        return Ok(rc);
    }
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap();
    // SAFETY: tp_last_error gives a NUL-terminated text, valid until the next failure.
    let sentence = unsafe { CStr::from_ptr(tp_last_error()) }.to_str().unwrap().to_owned();
    assert!(!sentence.is_empty());
    Err(Failed { errno, sentence })
}

fn owned(rc: c_int) -> Result<OwnedFd, Failed> {
    // SAFETY: the call gave it to us.
    checked(rc).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn socket(domain: c_int, kind: c_int) -> Result<OwnedFd, Failed> {
    owned(tp_socket(domain, kind, 0))
}

pub fn bind_nonlocal(fd: &impl AsRawFd, addr: SocketAddr) -> Result<(), Failed> {
    let addr = SockAddr::from(addr);
    // SAFETY: a valid address of that length.
    checked(unsafe { tp_bind_nonlocal(fd.as_raw_fd(), addr.as_ptr().cast(), addr.len()) }).map(drop)
}

pub fn listen(addr: SocketAddr, flags: u32) -> Result<TcpListener, Failed> {
    let addr = SockAddr::from(addr);
    // SAFETY: a valid address of that length.
    owned(unsafe { tp_listen(addr.as_ptr().cast(), addr.len(), -1, flags) }).map(TcpListener::from)
}

pub fn connect_from(src: SocketAddr, dst: SocketAddr, flags: u32) -> Result<OwnedFd, Failed> {
    let (src, dst) = (SockAddr::from(src), SockAddr::from(dst));
    // SAFETY: valid addresses of these lengths.
    owned(unsafe { tp_connect_from(src.as_ptr().cast(), src.len(), dst.as_ptr().cast(), dst.len(), flags) })
}

pub fn connect_socket(fd: &impl AsRawFd, src: SocketAddr, dst: SocketAddr, flags: u32) -> Result<(), Failed> {
    let (src, dst) = (SockAddr::from(src), SockAddr::from(dst));
    // SAFETY: valid addresses of these lengths.
    let rc = unsafe {
        tp_connect_socket(fd.as_raw_fd(), src.as_ptr().cast(), src.len(), dst.as_ptr().cast(), dst.len(), flags)
    };
    checked(rc).map(|rc| assert_eq!(rc, 0))
}

/// The accepted connection, the client's address and the original destination.
pub fn accept_intercepted(
    listener: &impl AsRawFd,
    flags: u32,
) -> Result<(std::net::TcpStream, SocketAddr, SocketAddr), Failed> {
    let (mut client, mut to) = (SockAddrStorage::zeroed(), SockAddrStorage::zeroed());
    let (mut client_len, mut to_len) = (client.size_of(), to.size_of());
    // SAFETY: room for addresses of these lengths.
    let stream = owned(unsafe {
        tp_accept(
            listener.as_raw_fd(),
            (&raw mut client).cast(),
            &raw mut client_len,
            (&raw mut to).cast(),
            &raw mut to_len,
            flags,
        )
    })?;
    // SAFETY: the call wrote addresses of these lengths.
    let (client, to) = unsafe { (SockAddr::new(client, client_len), SockAddr::new(to, to_len)) };
    Ok((stream.into(), client.as_socket().unwrap(), to.as_socket().unwrap()))
}

pub fn orig_dst(fd: &impl AsRawFd) -> Result<SocketAddr, Failed> {
    let mut storage = SockAddrStorage::zeroed();
    let mut len = storage.size_of();
    // SAFETY: room for len bytes.
    checked(unsafe { tp_orig_dst(fd.as_raw_fd(), (&raw mut storage).cast(), &raw mut len) })?;
    // SAFETY: the call wrote an address of that length.
    Ok(unsafe { SockAddr::new(storage, len) }.as_socket().unwrap())
}
pub fn option(fd: &OwnedFd, level: c_int, name: c_int) -> c_int {
    let mut value: c_int = -1;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: room for an int.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    value
}

pub fn local_addr(fd: &OwnedFd) -> SocketAddr {
    SockRef::from(fd).local_addr().unwrap().as_socket().unwrap()
}

pub fn unmap_addr(addr: SocketAddr) -> SocketAddr {
    let addr = SockAddr::from(addr);
    let mut len = addr.len();
    let mut storage = addr.as_storage();
    // SAFETY: an address of that length, with room for it.
    checked(unsafe { tp_unmap_addr((&raw mut storage).cast(), &raw mut len) }).unwrap();
    // SAFETY: the call left an address of that length.
    unsafe { SockAddr::new(storage, len) }.as_socket().unwrap()
}
