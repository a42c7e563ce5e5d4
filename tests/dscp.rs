//! docs/dscp.md: its C functions, and a proxy that uses them as the page says. The packets that arrive have the DSCP of the
//! client.

mod common;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use common::*;
use libc::{AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM, SOL_IP, SOL_IPV6, msghdr};
use socket2::{SockAddr, SockAddrStorage};
use tproxy::ffi::*;

/// DSCP EF and AF41, as a TOS byte.
const CLIENT: c_int = 46 << 2;
const SERVER: c_int = 34 << 2;

/// The C functions of the page.
struct Page {
    message_dscp: unsafe extern "C" fn(*mut msghdr) -> c_int,
    report_dscp: unsafe extern "C" fn(c_int, c_int) -> c_int,
    stream_dscp: unsafe extern "C" fn(c_int, *const libc::sockaddr) -> c_int,
    set_dscp: unsafe extern "C" fn(c_int, *const libc::sockaddr, c_int) -> c_int,
}

static PAGE: LazyLock<Page> = LazyLock::new(|| {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/dscp.md")).unwrap();
    let code = page.split_once("```c\n").unwrap().1.split_once("```").unwrap().0;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (directory.join("dscp.c"), directory.join("libdscp.so"));
    std::fs::write(&source, code).unwrap();
    let arguments = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"];
    let output = Command::new("cc").args(arguments).arg(&library).arg(&source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = std::ffi::CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: a NUL-terminated path.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null());
    let symbol = |name: &CStr| -> *mut c_void {
        // SAFETY: a library that was loaded, and a NUL-terminated name.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr().cast::<c_char>()) };
        assert!(!symbol.is_null(), "the page has no {name:?}");
        symbol
    };
    // SAFETY: the types of the C functions.
    unsafe {
        Page {
            message_dscp: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut msghdr) -> c_int>(symbol(
                c"message_dscp",
            )),
            report_dscp: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int, c_int) -> c_int>(symbol(
                c"report_dscp",
            )),
            stream_dscp: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int, *const libc::sockaddr) -> c_int>(
                symbol(c"stream_dscp"),
            ),
            set_dscp: std::mem::transmute::<
                *mut c_void,
                unsafe extern "C" fn(c_int, *const libc::sockaddr, c_int) -> c_int,
            >(symbol(c"set_dscp")),
        }
    }
});

fn stream_dscp(fd: &impl AsRawFd, peer: SocketAddr) -> c_int {
    // SAFETY: an address.
    unsafe { (PAGE.stream_dscp)(fd.as_raw_fd(), SockAddr::from(peer).as_ptr().cast()) }
}

fn set_dscp(fd: &impl AsRawFd, to: SocketAddr, dscp: c_int) {
    // SAFETY: an address.
    assert_eq!(unsafe { (PAGE.set_dscp)(fd.as_raw_fd(), SockAddr::from(to).as_ptr().cast(), dscp) }, 0);
}

fn report_dscp(fd: &impl AsRawFd, family: c_int) {
    // SAFETY: plain system calls.
    assert_eq!(unsafe { (PAGE.report_dscp)(fd.as_raw_fd(), family) }, 0);
}

fn socket_of(addr: SocketAddr, kind: c_int) -> OwnedFd {
    let domain = if addr.is_ipv4() { AF_INET } else { AF_INET6 };
    socket2::Socket::new(domain.into(), kind.into(), None).unwrap().into()
}

/// Sets the byte of a socket, as an ordinary client or server does.
fn mark(fd: &impl AsRawFd, to: SocketAddr, value: c_int) {
    let (level, name) = if to.is_ipv4() { (SOL_IP, libc::IP_TOS) } else { (SOL_IPV6, libc::IPV6_TCLASS) };
    // SAFETY: an int.
    let rc = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), 4) };
    assert_eq!(rc, 0);
}

/// Counts the packets that arrive at a host for one protocol, by their DSCP.
fn count(net: &Net, protocol: &str) {
    let rule =
        |family: &str, dscp: &str| format!("meta l4proto {protocol} {family} dscp {dscp} counter name seen_{dscp}\n");
    let names = ["ef", "af41", "cs0"];
    let counters: String = names.iter().map(|name| format!("counter seen_{name} {{\n}}\n")).collect();
    let rules: String = ["ip", "ip6"].iter().flat_map(|family| names.map(|name| rule(family, name))).collect();
    net.nft(&format!("table inet seen {{\n{counters} chain in {{ type filter hook input priority 0\n {rules} }}\n}}"));
}

/// The packets since the last call: those of EF, AF41 and of no class.
fn counted(net: &Net) -> [u64; 3] {
    ["ef", "af41", "cs0"].map(|name| {
        let text = net.command("nft", &["reset", "counter", "inet", "seen", &format!("seen_{name}")]);
        text.split_once("packets ").unwrap().1.split_whitespace().next().unwrap().parse().unwrap()
    })
}

/// Forgets the packets so far.
fn reset(lab: &Lab) {
    counted(&lab.server);
    counted(&lab.client);
}

/// A message with its sender and its control data; gives the bytes, the sender, the original destination if the socket reports
/// it, and the DSCP.
fn receive(fd: &impl AsRawFd) -> (Vec<u8>, SocketAddr, Option<SocketAddr>, c_int) {
    let (mut bytes, mut control) = ([0u8; 100], [0u64; 32]);
    let (mut from, mut to) = (SockAddrStorage::zeroed(), SockAddrStorage::zeroed());
    let mut to_len = to.size_of();
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers, for which all zero is valid.
    let mut msg: msghdr = unsafe { std::mem::zeroed() };
    (msg.msg_name, msg.msg_namelen) = ((&raw mut from).cast(), from.size_of());
    (msg.msg_iov, msg.msg_iovlen) = (&raw mut part, 1);
    (msg.msg_control, msg.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: buffers of these lengths.
    unsafe {
        let len = libc::recvmsg(fd.as_raw_fd(), &raw mut msg, 0);
        assert!(len >= 0, "{}", std::io::Error::last_os_error());
        let dscp = (PAGE.message_dscp)(&raw mut msg);
        let known = tp_msg_orig_dst(&raw const msg, (&raw mut to).cast(), &raw mut to_len) == 0;
        (
            bytes[..len as usize].to_vec(),
            SockAddr::new(from, msg.msg_namelen).as_socket().unwrap(),
            known.then(|| SockAddr::new(to, to_len).as_socket().unwrap()),
            dscp,
        )
    }
}

/// A listener of each kind, and the hosts whose connections it gets.
fn cases() -> [(&'static str, Hosts); 3] {
    [("[::]:3129", v4()), ("[::]:3129", v6()), ("0.0.0.0:3129", v4())]
}

#[test]
fn dscp_of_tcp_client_reaches_server_and_client() {
    for (addr, hosts) in cases() {
        let lab = Lab::new();
        let server = lab.serve(80);
        let listener = lab.proxy.run(|| listen(addr.parse().unwrap(), 0)).unwrap();
        let _rules = lab.proxy.run(|| intercept(&listener, 80)).unwrap();
        [&lab.server, &lab.client].iter().for_each(|net| count(net, "tcp"));
        for (dscp, expected) in [(CLIENT, 0), (0, 2)] {
            let to = at(hosts.server, 80);
            let client = lab.client.run(|| {
                let asked = socket_of(to, SOCK_STREAM);
                mark(&asked, to, dscp);
                socket2::SockRef::from(&asked).connect(&to.into()).unwrap();
                TcpStream::from(asked)
            });
            let [to_server, to_client] = relay_with_dscp(&lab, &listener, &server, client, dscp);
            // Every packet, from the first of the handshake on, has that DSCP and no other.
            for (index, count) in to_server.into_iter().enumerate() {
                assert!(if index == expected { count >= 3 } else { count == 0 }, "{addr} {dscp}: {to_server:?}");
            }
            for (index, count) in to_client.into_iter().enumerate() {
                assert!(if index == expected { count >= 1 } else { count == 0 }, "{addr} {dscp}: {to_client:?}");
            }
        }
    }
}

/// What the page says for TCP. Gives the packets that came to the server, and those that came to the client after its
/// connection was accepted.
fn relay_with_dscp(
    lab: &Lab,
    listener: &TcpListener,
    server: &TcpListener,
    client: TcpStream,
    sent: c_int,
) -> [[u64; 3]; 2] {
    let (accepted, from, to) = accept_intercepted(listener, TP_ACCEPT_TPROXY).unwrap();
    reset(lab);
    let dscp = stream_dscp(&accepted, from);
    assert_eq!(dscp, sent);
    let towards_server = lab.proxy.run(|| {
        let fd = socket_of(from, SOCK_STREAM);
        if dscp > 0 {
            set_dscp(&fd, to, dscp);
        }
        connect_socket(&fd, from, to, 0).unwrap();
        fd
    });
    if dscp > 0 {
        set_dscp(&accepted, from, dscp);
    }
    let (at_server, peer) = accept(server);
    assert_eq!(peer.ip(), unmap_addr(from).ip());
    let mut streams = [client, TcpStream::from(towards_server), at_server, accepted];
    streams.iter().for_each(|stream| stream.set_read_timeout(Some(patience())).unwrap());
    let mut bytes = [0; 8];
    let [client, towards_server, at_server, accepted] = &mut streams;
    for (one, other) in [(&mut *client, &mut *accepted), (&mut *towards_server, &mut *at_server)] {
        one.write_all(b"question").unwrap();
        other.read_exact(&mut bytes).unwrap();
        other.write_all(b"answered").unwrap();
        one.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"answered");
    }
    [&lab.server, &lab.client].map(counted)
}

/// On a connection that the proxy has made, the kernel knows the DSCP of the server only over IPv6, from the first packet after
/// it was asked.
#[test]
fn dscp_of_tcp_server_is_known_over_ipv6_only() {
    let lab = Lab::new();
    let server = lab.serve(80);
    let _rules = lab.proxy.run(divert_only).unwrap();
    for (hosts, expected) in [(v4(), 0), (v6(), SERVER)] {
        let to = at(hosts.server, 80);
        let fd = lab.proxy.run(|| connect_from(at(hosts.client, 0), to, 0)).unwrap();
        let (mut at_server, _) = accept(&server);
        let local = at_server.local_addr().unwrap();
        set_dscp(&at_server, local, SERVER);
        stream_dscp(&fd, to);
        at_server.write_all(b"answered").unwrap();
        let mut stream = TcpStream::from(fd);
        stream.read_exact(&mut [0; 8]).unwrap();
        assert_eq!(stream_dscp(&stream, to), expected);
    }
}

#[test]
fn dscp_of_udp_client_and_server_reach_both() {
    for (addr, hosts) in cases() {
        let lab = Lab::new();
        let addr: SocketAddr = addr.parse().unwrap();
        let listener = lab.proxy.run(|| {
            let fd = socket(if addr.is_ipv4() { AF_INET } else { AF_INET6 }, SOCK_DGRAM).unwrap();
            bind_nonlocal(&fd, addr).unwrap();
            report_dscp(&fd, if addr.is_ipv4() { AF_INET } else { AF_INET6 });
            fd
        });
        let config = RulesConfig::of(&listener).protocols(TP_PROTO_UDP).ports(&[53]);
        let _rules = lab.proxy.run(|| config.install()).unwrap();
        [&lab.server, &lab.client].iter().for_each(|net| count(net, "udp"));
        let to = at(hosts.server, 53);
        let server = lab.server.run(|| UdpSocket::bind(to).unwrap());
        let client = lab.client.run(|| UdpSocket::bind(at(hosts.client, 0)).unwrap());
        [&server, &client].iter().for_each(|socket| socket.set_read_timeout(Some(patience())).unwrap());
        for (question, answer, expected) in [(CLIENT, SERVER, [0, 1]), (0, CLIENT, [2, 0])] {
            mark(&client, to, question);
            client.send_to(b"question", to).unwrap();
            assert!(datagrams::readable(&listener, patience()));
            let (words, from, asked, dscp) = receive(&listener);
            let asked = asked.unwrap();
            assert_eq!((words, unmap_addr(asked), dscp), (b"question".to_vec(), to, question));
            assert_eq!(unmap_addr(from), client.local_addr().unwrap());
            let towards_server = lab.proxy.run(|| {
                let fd = socket_of(from, SOCK_DGRAM);
                set_dscp(&fd, asked, dscp);
                report_dscp(&fd, if from.is_ipv4() { AF_INET } else { AF_INET6 });
                connect_socket(&fd, from, asked, TP_CONNECT_KEEP_PORT).unwrap();
                UdpSocket::from(fd)
            });
            towards_server.send(b"question").unwrap();
            let peer = server.recv_from(&mut [0; 8]).unwrap().1;
            assert_eq!(peer, client.local_addr().unwrap());
            mark(&server, peer, answer);
            server.send_to(b"answered", peer).unwrap();
            assert!(datagrams::readable(&towards_server, patience()));
            let (words, _, _, dscp) = receive(&towards_server);
            assert_eq!((words, dscp), (b"answered".to_vec(), answer));
            let back = lab.proxy.run(|| {
                let fd = socket_of(from, SOCK_DGRAM);
                set_dscp(&fd, from, dscp);
                connect_socket(&fd, asked, from, TP_CONNECT_SAME_PORT).unwrap();
                UdpSocket::from(fd)
            });
            back.send(b"answered").unwrap();
            assert_eq!(client.recv_from(&mut [0; 8]).unwrap(), (8, to));
            for (net, index) in [(&lab.server, expected[0]), (&lab.client, expected[1])] {
                let mut only = [0; 3];
                only[index] = 1;
                assert_eq!(counted(net), only, "{addr}");
            }
            // As the page says: the client's datagrams now come to that socket.
            back.set_read_timeout(Some(patience())).unwrap();
            client.send_to(b"again", to).unwrap();
            assert_eq!(back.recv(&mut [0; 8]).unwrap(), 5);
            drop(back);
            reset(&lab);
        }
    }
}
