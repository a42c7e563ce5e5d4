//! The hot paths allocate nothing.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::datagrams::*;
use common::*;
use socket2::{Domain, SockAddr, SockAddrStorage, Type};
use tproxy::ffi::*;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the methods call the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of the method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of the method.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The number of allocations that this thread makes while a function runs.
fn allocations(what: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    what();
    ALLOCATIONS.get() - before
}

#[test]
fn recv_datagrams_and_reply_allocate_nothing() {
    let net = Net::new();
    net.run(|| {
        assert_ne!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))), 0);
        let listener = receiver(at(ip("127.0.0.1"), 0));
        let client = udp(at(ip("127.0.0.1"), 0));
        let to = local_addr(&listener);
        let mut replier = Replier::open(&replier_config()).unwrap();
        let mut rooms = rooms(TP_BATCH_MAX as usize, 2000);
        let mut batch = datagrams(&mut rooms);
        // Ports that are in the pool, new ports, and a port that another socket holds.
        let taken = udp(at(ip("0.0.0.0"), 0)).local_addr().unwrap().port();
        let mut port = 1000;
        let mut round = |new: bool| {
            (0..TP_BATCH_MAX).for_each(|_| assert_eq!(client.send_to(b"question", to).unwrap(), 8));
            let (mut received, mut sent) = (0, 0);
            let count = allocations(|| {
                received = recv_datagrams(&listener, &mut batch, 0).unwrap();
                for (number, one) in (0u16..).zip(&mut batch[..received]) {
                    let from = if number == 0 { taken } else { port + number % 3 };
                    one.set_orig_dst(at(ip("127.0.0.2"), from));
                }
                sent = replier.reply(&mut batch[..received]);
            });
            assert_eq!((received, sent), (TP_BATCH_MAX as usize, TP_BATCH_MAX as usize));
            port += if new { 3 } else { 0 };
            count
        };
        // The first call of a process allocates what a panic needs.
        round(false);
        let count: usize = (0..100).map(|_| round(false)).sum();
        assert_eq!(count, 0, "known ports");
        let count: usize = (0..100).map(|_| round(true)).sum();
        assert_eq!(count, 0, "new ports, and evictions");
        assert!(replier.stats().evictions > 0);
    });
}

#[test]
fn recvfrom_and_recv_datagrams_that_fail_allocate_nothing() {
    let net = Net::new();
    net.run(|| {
        let listener = receiver(at(ip("127.0.0.1"), 0));
        let mut rooms = rooms(4, 100);
        let mut batch = datagrams(&mut rooms);
        let mut bytes = [0u8; 100];
        let mut fail = || {
            // SAFETY: room for the bytes, an array of that length, and no addresses.
            unsafe {
                let (addr, len) = (std::ptr::null_mut, std::ptr::null_mut);
                let fd = listener.as_raw_fd();
                let (room, flags) = (bytes.as_mut_ptr().cast(), libc::MSG_DONTWAIT);
                assert_eq!(tp_recvfrom(fd, room, 100, flags, addr(), len(), addr(), len()), -1);
                assert_eq!(tp_recv_datagrams(fd, batch.as_mut_ptr(), 4, flags), -1);
            }
        };
        fail();
        assert_eq!(allocations(|| (0..1000).for_each(|_| fail())), 0);
    });
}

#[test]
fn accept_connect_socket_and_unmap_addr_allocate_nothing() {
    let net = Net::new();
    net.run(|| {
        let listener = listen("[::]:3129".parse().unwrap(), 0).unwrap();
        let (src, dst): (SocketAddr, SocketAddr) =
            ("[::ffff:127.0.0.5]:0".parse().unwrap(), "[::ffff:127.0.0.6]:3129".parse().unwrap());
        let (src, dst) = (SockAddr::from(src), SockAddr::from(dst));
        let call = || {
            let client = OwnedFd::from(socket2::Socket::new(Domain::IPV6, Type::STREAM, None).unwrap());
            let (mut from, mut to) = (SockAddrStorage::zeroed(), SockAddrStorage::zeroed());
            let (mut from_len, mut to_len) = (from.size_of(), to.size_of());
            allocations(|| {
                // SAFETY: addresses of these lengths, and room for others.
                unsafe {
                    let (src, src_len, to_server, dst_len) = (src.as_ptr(), src.len(), dst.as_ptr(), dst.len());
                    let fd = client.as_raw_fd();
                    assert_eq!(tp_connect_socket(fd, src.cast(), src_len, to_server.cast(), dst_len, 0), 0);
                    let (from, to) = ((&raw mut from).cast(), (&raw mut to).cast());
                    let fd = tp_accept(listener.as_raw_fd(), from, &raw mut from_len, to, &raw mut to_len, 0);
                    assert!(fd >= 0);
                    drop(OwnedFd::from_raw_fd(fd));
                    assert_eq!(tp_unmap_addr(to, &raw mut to_len), 0);
                }
            })
        };
        // The first call of a process allocates what a panic needs.
        call();
        assert_eq!((0..100).map(|_| call()).sum::<usize>(), 0);
    });
}
