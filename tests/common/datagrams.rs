//! The C functions for datagrams, with Rust's types.

use std::ffi::c_int;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use socket2::{SockAddr, SockAddrStorage, SockRef};
use tproxy::ffi::*;
use tproxy::udp::Datagram;

pub use super::eventually;
use super::{Failed, Lab, Rules, at, bind_nonlocal, canonical, checked, intercept, ip, patience, socket};

/// include/uapi/linux/udp.h
pub const UDP_SEGMENT: c_int = 103;
pub const UDP_GRO: c_int = 104;

/// A replier, closed at the end of the scope.
pub struct Replier(*mut tp_replier);

// SAFETY: the header says that any thread may use it, one at a time.
unsafe impl Send for Replier {}

pub fn replier_config() -> tp_replier_config {
    tp_replier_config { flags: 0, max_sockets: 0, idle_ms: 0, reserved: 0 }
}

impl Replier {
    pub fn open(config: &tp_replier_config) -> Result<Replier, Failed> {
        let mut replier = std::ptr::null_mut();
        // SAFETY: a config, and room for a pointer.
        checked(unsafe { tp_replier_open(config, size_of::<tp_replier_config>(), &raw mut replier) })?;
        Ok(Replier(replier))
    }

    pub fn reply(&mut self, datagrams: &mut [Datagram<'_>]) -> usize {
        // SAFETY: an open replier, and an array of that length.
        checked(unsafe { tp_reply(self.0, datagrams.as_mut_ptr(), datagrams.len() as u32) }).unwrap() as usize
    }

    pub fn stats(&self) -> tp_replier_stats {
        // SAFETY: integers, for which all zero is valid.
        let mut stats: tp_replier_stats = unsafe { std::mem::zeroed() };
        // SAFETY: an open replier, and room for the struct.
        checked(unsafe { tp_replier_stats(self.0, &raw mut stats, size_of::<tp_replier_stats>()) }).unwrap();
        stats
    }
}

impl Drop for Replier {
    fn drop(&mut self) {
        // SAFETY: an open replier.
        unsafe { tp_replier_close(self.0) };
    }
}

/// Buffers for datagrams.
pub fn rooms(count: usize, len: usize) -> Vec<Vec<u8>> {
    vec![vec![0; len]; count]
}

pub fn datagrams(rooms: &mut [Vec<u8>]) -> Vec<Datagram<'_>> {
    rooms.iter_mut().map(|room| Datagram::new(room)).collect()
}

/// A reply of a program that has not received anything.
pub fn reply_of(bytes: &mut [u8], from: SocketAddr, to: SocketAddr) -> Datagram<'_> {
    let len = bytes.len();
    let mut datagram = Datagram::new(bytes);
    datagram.set_len(len);
    datagram.set_orig_dst(from);
    datagram.set_client(to);
    datagram
}

pub fn recv_datagrams(fd: &impl AsRawFd, datagrams: &mut [Datagram<'_>], flags: c_int) -> Result<usize, Failed> {
    // SAFETY: an array of that length.
    let rc = unsafe { tp_recv_datagrams(fd.as_raw_fd(), datagrams.as_mut_ptr(), datagrams.len() as u32, flags) };
    checked(rc).map(|count| count as usize)
}

/// Waits until a socket is readable; gives whether it is.
pub fn readable(fd: &impl AsRawFd, limit: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as c_int) == 1 }
}

/// The results of tp_recvfrom: the bytes, the sender, the original destination.
pub type Received = (Vec<u8>, SocketAddr, Option<SocketAddr>);

pub fn recvfrom(fd: &impl AsRawFd, room: usize, flags: c_int) -> Result<Received, Failed> {
    let (mut src, mut dst) = (SockAddrStorage::zeroed(), SockAddrStorage::zeroed());
    let (mut src_len, mut dst_len) = (src.size_of(), dst.size_of());
    let mut bytes = vec![0u8; room];
    // SAFETY: room for the bytes and the addresses.
    let len = unsafe {
        tp_recvfrom(
            fd.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            flags,
            (&raw mut src).cast(),
            &raw mut src_len,
            (&raw mut dst).cast(),
            &raw mut dst_len,
        )
    };
    checked(len as c_int)?;
    bytes.truncate(len as usize);
    // SAFETY: the call wrote addresses of these lengths.
    let (src, dst) = unsafe { (SockAddr::new(src, src_len), SockAddr::new(dst, dst_len)) };
    assert!(dst_len != 0 || dst.family() == libc::AF_UNSPEC as libc::sa_family_t);
    Ok((bytes, src.as_socket().unwrap(), dst.as_socket()))
}

/// Sends bytes as datagrams of a length, in one call (UDP_SEGMENT).
pub fn send_segments(socket: &UdpSocket, bytes: &[u8], len: u16, to: SocketAddr) {
    let len = c_int::from(len);
    // SAFETY: an int of that length.
    let set = |len: c_int| unsafe {
        let value = (&raw const len).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, UDP_SEGMENT, value, size_of::<c_int>() as u32)
    };
    assert_eq!(set(len), 0, "{}", io::Error::last_os_error());
    assert_eq!(socket.send_to(bytes, to).unwrap(), bytes.len());
    assert_eq!(set(0), 0);
}

pub fn set_option(fd: &impl AsRawFd, level: c_int, name: c_int, value: c_int) {
    // SAFETY: an int of that length.
    let rc = unsafe {
        let place = (&raw const value).cast();
        libc::setsockopt(fd.as_raw_fd(), level, name, place, size_of::<c_int>() as u32)
    };
    assert_eq!(rc, 0, "{}", io::Error::last_os_error());
}

/// A socket of a client or server, with a time limit for receiving.
pub fn udp(addr: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(addr).unwrap_or_else(|e| panic!("{addr}: {e}"));
    socket.set_read_timeout(Some(patience())).unwrap();
    SockRef::from(&socket).set_recv_buffer_size(4 << 20).unwrap();
    socket
}

/// Receives so many datagrams: bytes and senders.
pub fn hear(socket: &UdpSocket, count: usize) -> Vec<(Vec<u8>, SocketAddr)> {
    let mut bytes = vec![0; 65536];
    (0..count)
        .map(|number| {
            let (len, from) = socket.recv_from(&mut bytes).unwrap_or_else(|e| panic!("datagram {number}: {e}"));
            (bytes[..len].to_vec(), from)
        })
        .collect()
}

/// Asserts that nothing comes in that time.
pub fn hears_nothing(socket: &UdpSocket, limit: Duration) {
    socket.set_read_timeout(Some(limit)).unwrap();
    assert_eq!(socket.recv_from(&mut [0; 10]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    socket.set_read_timeout(Some(patience())).unwrap();
}

/// A UDP socket as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpSocketState {
    pub addr: SocketAddr,
    /// Bytes in its receive queue.
    pub queued: usize,
    /// Datagrams that it has dropped.
    pub dropped: usize,
}

/// All UDP sockets of this thread's namespace.
pub fn udp_socket_states() -> Vec<UdpSocketState> {
    let mut found = Vec::new();
    for (file, v6) in [("udp", false), ("udp6", true)] {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (addr, port) = fields[1].split_once(':').unwrap();
            let words = (0..addr.len()).step_by(8).map(|at| u32::from_str_radix(&addr[at..at + 8], 16).unwrap());
            let bytes: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
            let addr = if v6 {
                std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap())
            } else {
                std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap())
            };
            let queued = usize::from_str_radix(fields[4].split_once(':').unwrap().1, 16).unwrap();
            let dropped = fields.last().unwrap().parse().unwrap();
            found.push(UdpSocketState { addr: at(addr, u16::from_str_radix(port, 16).unwrap()), queued, dropped });
        }
    }
    found
}

/// The local addresses of all UDP sockets of this thread's namespace, and how many bytes wait in each.
pub fn udp_sockets() -> Vec<(SocketAddr, usize)> {
    udp_socket_states().into_iter().map(|socket| (socket.addr, socket.queued)).collect()
}

/// An address of a family that no host has, in the network of the server.
pub fn nobody(v6: bool, number: u8) -> std::net::IpAddr {
    if v6 { ip(&format!("2001:db8:2::f:{number:x}")) } else { ip(&format!("203.0.113.{}", 100 + number)) }
}

/// Receives one datagram with recvmsg(2): its text, its sender and its original destination. `None` if none comes in time.
pub fn receive_datagram(fd: &OwnedFd, limit: Duration) -> Option<(String, SocketAddr, SocketAddr)> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    if unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as c_int) } != 1 {
        return None;
    }
    let (mut words, mut control, mut from) = ([0u8; 100], [0u64; 32], SockAddrStorage::zeroed());
    let mut iov = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: words.len() };
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = from.size_of();
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: everything that the message points to is alive and as long as it says.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, 0) };
    assert!(len >= 0, "{}", std::io::Error::last_os_error());
    let mut to = None;
    // SAFETY: the kernel filled the message; the macros stay within its control data.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let kind = ((*header).cmsg_level, (*header).cmsg_type);
            if kind == (libc::SOL_IP, libc::IP_ORIGDSTADDR) || kind == (libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR) {
                let mut addr = SockAddrStorage::zeroed();
                let size = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                std::ptr::copy_nonoverlapping(libc::CMSG_DATA(header), (&raw mut addr).cast(), size);
                to = SockAddr::new(addr, size as libc::socklen_t).as_socket();
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    // SAFETY: the kernel wrote an address of that length.
    let from = unsafe { SockAddr::new(from, message.msg_namelen) }.as_socket().unwrap();
    let words = String::from_utf8_lossy(&words[..len as usize]).into_owned();
    Some((words, canonical(from), canonical(to.expect("no original destination"))))
}

/// A transparent datagram socket that is bound.
pub fn receiver(addr: SocketAddr) -> OwnedFd {
    let domain = if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let fd = socket(domain, libc::SOCK_DGRAM).unwrap();
    bind_nonlocal(&fd, addr).unwrap();
    fd
}

/// Sends one reply, and returns its error.
pub fn send_reply(replier: &mut Replier, from: SocketAddr, to: SocketAddr, bytes: &[u8]) -> Option<i32> {
    let mut bytes = bytes.to_vec();
    let mut one = [reply_of(&mut bytes, from, to)];
    let sent = replier.reply(&mut one);
    assert_eq!(sent == 0, one[0].error().is_some());
    one[0].error()
}

/// Opens a replier.
pub fn open_replier(config: &tp_replier_config) -> Replier {
    Replier::open(config).unwrap()
}

/// Opens a transparent socket, and installs rules that deliver the datagrams to a port to it.
pub fn intercept_udp(lab: &Lab, port: u16) -> (OwnedFd, Rules) {
    lab.proxy.run(|| {
        let listener = receiver(at(ip("::"), 3129));
        let rules = intercept(&listener, port).unwrap();
        (listener, rules)
    })
}
