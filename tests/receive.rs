//! Receiving: one datagram, a batch, and a message that the program received with recvmsg(2).

mod common;

use std::ffi::c_int;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{self as unix, UnixDatagram};
use std::ptr::null_mut;

use common::datagrams::*;
use common::*;
use tproxy::ffi::*;
use tproxy::udp::Datagram;

/// A listener and a sender on loopback, each in a family.
fn pair(v6: bool) -> (Net, OwnedFd, UdpSocket) {
    let net = Net::new();
    let loopback = if v6 { "::1" } else { "127.0.0.1" };
    let (listener, sender) = net.run(|| (receiver(at(ip(loopback), 0)), udp(at(ip(loopback), 0))));
    sender.connect(local_addr(&listener)).unwrap();
    (net, listener, sender)
}

fn flags_of(datagram: &Datagram<'_>) -> u32 {
    // SAFETY: the layout is that of the C struct: the flags follow two words, a length and the segment length.
    unsafe { std::ptr::from_ref(datagram).cast::<u8>().add(3 * size_of::<usize>() + 4).cast::<u32>().read() }
}

#[test]
fn recvfrom_gives_sender_and_original_destination() {
    for v6 in [false, true] {
        let (_net, listener, sender) = pair(v6);
        let (from, to) = (sender.local_addr().unwrap(), local_addr(&listener));
        sender.send(b"peeked at").unwrap();
        for (room, flags, len) in [(20, libc::MSG_PEEK, 9), (4, libc::MSG_PEEK, 4), (20, 0, 9)] {
            let (bytes, src, dst) = recvfrom(&listener, room, flags).unwrap();
            assert_eq!((bytes, src, dst), (b"peeked at"[..len].to_vec(), from, Some(to)));
        }
        sender.send(b"").unwrap();
        assert_eq!(recvfrom(&listener, 0, 0).unwrap(), (vec![], from, Some(to)));
        assert_eq!(recvfrom(&listener, 10, libc::MSG_DONTWAIT).unwrap_err().errno, libc::EAGAIN);
    }
}

#[test]
fn recvfrom_with_msg_trunc_gives_real_length() {
    let (_net, listener, sender) = pair(false);
    sender.send(&[1; 100]).unwrap();
    let mut bytes = [0u8; 10];
    // SAFETY: room for ten bytes, and no addresses.
    let len = unsafe {
        let (addr, len) = (null_mut, null_mut);
        tp_recvfrom(listener.as_raw_fd(), bytes.as_mut_ptr().cast(), 10, libc::MSG_TRUNC, addr(), len(), addr(), len())
    };
    assert_eq!((len, bytes), (100, [1; 10]));
}

#[test]
fn recvfrom_with_short_address_buffer_truncates_address_and_keeps_datagram() {
    let (_net, listener, sender) = pair(true);
    sender.send(b"kept").unwrap();
    let call = |room: u32| {
        let (mut bytes, mut dst, mut len) = ([0u8; 10], [0xaau8; 40], room);
        // SAFETY: room for the bytes, and for an address of that length.
        let rc = unsafe {
            let dst = dst.as_mut_ptr().cast();
            tp_recvfrom(
                listener.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                10,
                0,
                null_mut(),
                null_mut(),
                dst,
                &raw mut len,
            )
        };
        (checked(rc as c_int).map_err(|e| e.errno), len, dst)
    };
    assert_eq!(call(15).0, Err(libc::EINVAL));
    let (rc, len, dst) = call(20);
    assert_eq!((rc, len), (Ok(4), 28));
    assert_eq!(dst[20..], [0xaa; 20]);
    assert_ne!(dst[8..20], [0xaa; 12]);
}

#[test]
fn recvfrom_sender_of_unix_family_is_unspecified() {
    let path = std::env::temp_dir().join(format!("tproxy-sender-with-a-long-name-{}", std::process::id()));
    let sender = UnixDatagram::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let to = unix::SocketAddr::from_abstract_name(format!("tproxy-{}", std::process::id())).unwrap();
    let receiver = UnixDatagram::bind_addr(&to).unwrap();
    sender.send_to_addr(b"local", &to).unwrap();
    let (mut bytes, mut src, mut len) = ([0u8; 10], [0xaau8; 40], 40);
    // SAFETY: room for the bytes, and for an address of that length.
    let rc = unsafe {
        let (addr, src, none) = (bytes.as_mut_ptr().cast(), src.as_mut_ptr().cast(), null_mut());
        tp_recvfrom(receiver.as_raw_fd(), addr, 10, 0, src, &raw mut len, none, null_mut())
    };
    assert_eq!((rc, &bytes[..5]), (5, &b"local"[..]));
    assert_eq!((len, &src[..2], src[2]), (0, &[0; 2][..], 0xaa));
}

#[test]
fn recvfrom_on_plain_socket_has_no_original_destination() {
    let net = Net::new();
    let (plain, sender) = net.run(|| (udp(at(ip("127.0.0.1"), 0)), udp(at(ip("127.0.0.1"), 0))));
    let (from, to) = (sender.local_addr().unwrap(), plain.local_addr().unwrap());
    sender.send_to(b"one", to).unwrap();
    assert_eq!(recvfrom(&plain, 10, 0).unwrap(), (b"one".to_vec(), from, None));
    sender.send_to(b"two", to).unwrap();
    let mut rooms = rooms(2, 10);
    let mut batch = datagrams(&mut rooms);
    // An address from an earlier call must not remain.
    batch[0].set_orig_dst(at(ip("192.0.2.1"), 1));
    assert_eq!(recv_datagrams(&plain, &mut batch, 0).unwrap(), 1);
    assert_eq!((batch[0].data(), batch[0].client(), batch[0].orig_dst()), (&b"two"[..], Some(from), None));
    assert_eq!(flags_of(&batch[0]), TP_DGRAM_NO_ORIG_DST);
}

#[test]
fn recv_datagrams_gives_queue_in_order_and_marks_truncated() {
    let (_net, listener, sender) = pair(false);
    let (from, to) = (sender.local_addr().unwrap(), local_addr(&listener));
    for bytes in [&b"first"[..], b"", b"longer than its place", b"last"] {
        sender.send(bytes).unwrap();
    }
    let mut rooms = rooms(6, 8);
    let mut batch = datagrams(&mut rooms);
    assert_eq!(recv_datagrams(&listener, &mut batch, 0).unwrap(), 4);
    let got: Vec<_> = batch[..4].iter().map(|one| (one.data(), flags_of(one), one.client(), one.orig_dst())).collect();
    let expected = [(&b"first"[..], 0), (b"", 0), (b"longer t", TP_DGRAM_TRUNC), (b"last", 0)];
    assert_eq!(got, expected.map(|(bytes, flags)| (bytes, flags, Some(from), Some(to))));
    // The other elements are unchanged.
    assert_eq!((batch[4].client(), batch[4].orig_dst(), batch[4].data()), (None, None, &b""[..]));
    assert_eq!(recv_datagrams(&listener, &mut batch, libc::MSG_DONTWAIT).unwrap_err().errno, libc::EAGAIN);
    assert_eq!(recv_datagrams(&listener, &mut [], 0), Ok(0));
}

#[test]
fn recv_datagrams_receives_at_most_batch_max() {
    let (_net, listener, sender) = pair(true);
    for number in 0..TP_BATCH_MAX as u8 + 6 {
        sender.send(&[number]).unwrap();
    }
    let mut rooms = rooms(100, 8);
    let mut batch = datagrams(&mut rooms);
    assert_eq!(recv_datagrams(&listener, &mut batch, 0), Ok(TP_BATCH_MAX as usize));
    assert_eq!(recv_datagrams(&listener, &mut batch, 0), Ok(6));
    assert_eq!(batch[5].data(), [TP_BATCH_MAX as u8 + 5]);
}

#[test]
fn recv_datagrams_marks_truncated_control_data() {
    let (_net, listener, sender) = pair(false);
    // Each of these options adds control data; IP_OPTIONS adds all 40 bytes.
    let all = [libc::IP_PKTINFO, libc::IP_RECVTTL, libc::IP_RECVTOS, libc::IP_RECVOPTS, libc::IP_RETOPTS];
    all.iter().for_each(|name| set_option(&listener, libc::SOL_IP, *name, 1));
    let options = [libc::IPOPT_NOP; 40];
    // SAFETY: forty bytes.
    let rc =
        unsafe { libc::setsockopt(sender.as_raw_fd(), libc::SOL_IP, libc::IP_OPTIONS, options.as_ptr().cast(), 40) };
    assert_eq!(rc, 0);
    set_option(&listener, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1);
    sender.send(b"much about little").unwrap();
    let mut rooms = rooms(1, 100);
    let mut batch = datagrams(&mut rooms);
    assert_eq!(recv_datagrams(&listener, &mut batch, 0), Ok(1));
    let flags = flags_of(&batch[0]);
    assert_eq!(flags & TP_DGRAM_CTRUNC, TP_DGRAM_CTRUNC, "{flags:#x}");
    assert_eq!(flags & TP_DGRAM_NO_ORIG_DST != 0, batch[0].orig_dst().is_none());
    assert_eq!(batch[0].data(), b"much about little");
}

/// Receives with recvmsg(2) and a control buffer of a size, and gives what tp_msg_orig_dst finds.
fn own_message(fd: &OwnedFd, room: usize, with_name: bool) -> Result<std::net::SocketAddr, Failed> {
    let (mut name, mut control) = (socket2::SockAddrStorage::zeroed(), [0u64; 32]);
    let mut bytes = [0u8; 10];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    if with_name {
        message.msg_name = (&raw mut name).cast();
        message.msg_namelen = name.size_of();
    }
    (message.msg_iov, message.msg_iovlen) = (&raw mut iov, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), room);
    // SAFETY: everything that the message points to is alive and as long as it says.
    assert!(unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut message, 0) } >= 0);
    let (mut found, mut len) = (socket2::SockAddrStorage::zeroed(), name.size_of());
    // SAFETY: the message is as the kernel filled it; room for an address.
    checked(unsafe { tp_msg_orig_dst(&raw const message, (&raw mut found).cast(), &raw mut len) })?;
    // SAFETY: the call wrote an address of that length.
    Ok(unsafe { socket2::SockAddr::new(found, len) }.as_socket().unwrap())
}

#[test]
fn msg_orig_dst_gives_original_destination() {
    let net = Net::new();
    for (listen, send) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::ffff:127.0.0.1", "127.0.0.1")] {
        let (listener, sender) = net.run(|| (receiver(at(ip(listen), 0)), udp(at(ip(send), 0))));
        let to = local_addr(&listener);
        let say = || sender.send_to(b"hi", canonical(to)).unwrap();
        say();
        assert_eq!(own_message(&listener, 256, true), Ok(to));
        say();
        // Without the address of the sender the result has the kernel's form.
        assert_eq!(own_message(&listener, 256, false), Ok(canonical(to)));
        for room in [0, 8, 16, 24] {
            say();
            let failed = own_message(&listener, room, true).unwrap_err();
            assert_eq!(failed.errno, libc::ENOENT);
            assert!(failed.sentence.contains("MSG_CTRUNC"), "{failed}");
        }
    }
}
