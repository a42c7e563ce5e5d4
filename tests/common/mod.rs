//! Networks for tests: namespaces joined by veth pairs, and the C functions
//! with Rust's types.
//!
//! The tests run in a user namespace (`.cargo/config.toml`). A network
//! namespace here is a descriptor; it ends when the last one is closed.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::ffi::{CStr, c_int};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::{SockAddr, SockAddrStorage, SockRef};
use tproxy::ffi::*;

pub mod datagrams;

pub const PATIENCE: Duration = Duration::from_secs(5);
/// Long enough for a connection that would come about.
pub const NEVER: Duration = Duration::from_millis(400);

/// A network namespace.
pub struct Net(File);

impl Net {
    pub fn new() -> Net {
        let file = std::thread::spawn(|| {
            // SAFETY: plain system call; it changes this new thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let net = Net(file.join().unwrap());
        let_iptables_lock();
        // An address is to be had at once, not after a second of asking who else has it.
        net.sysctl("ipv6/conf/default/accept_dad", "0");
        net.ip("link set lo up");
        net
    }

    /// Runs something in this namespace, in a thread of its own.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: plain system call; it changes this new thread alone.
                let rc = unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a command here; gives what it printed.
    pub fn command(&self, program: &str, args: &[&str]) -> String {
        let output =
            self.run(|| Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}")));
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn ip(&self, args: &str) -> String {
        self.command("ip", &args.split_whitespace().collect::<Vec<_>>())
    }

    pub fn nft(&self, script: &str) -> String {
        self.nft_with(&[script])
    }

    pub fn nft_with(&self, args: &[&str]) -> String {
        self.command("nft", args)
    }

    /// Sets a sysctl of this namespace, named by its path below /proc/sys/net.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.run(|| std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap_or_else(|e| panic!("{name}: {e}")));
    }

    /// A path by which `ip link ... netns` finds this namespace.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Joins two namespaces by a veth pair; each end is an interface's name and its addresses.
    pub fn link(a: (&Net, &str, &[&str]), b: (&Net, &str, &[&str])) {
        const MACS: [&str; 2] = ["02:00:00:00:00:0a", "02:00:00:00:00:0b"];
        let [mac_a, mac_b] = MACS;
        let peer = format!("peer name {} address {mac_b} netns {}", b.1, b.0.path());
        a.0.ip(&format!("link add {} address {mac_a} type veth {peer}", a.1));
        for ((net, name, addrs), (_, _, neighbours), mac) in [(a, b, mac_b), (b, a, mac_a)] {
            for addr in addrs {
                net.ip(&format!("addr add {addr} dev {name}"));
            }
            net.ip(&format!("link set {name} up"));
            // The first question for a neighbour may take a second to be answered.
            for neighbour in neighbours {
                let (neighbour, _) = neighbour.split_once('/').unwrap();
                net.ip(&format!("neigh add {neighbour} lladdr {mac} dev {name}"));
            }
        }
    }

    /// Until then an interface with a fresh carrier answers to none of its IPv6 addresses.
    fn wait_for_ipv6(&self, interface: &str) {
        const TENTATIVE: u32 = 0x40;
        let ready = || {
            let text = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
            let mut flags = text.lines().filter(|line| line.ends_with(&format!(" {interface}"))).map(|line| {
                let field = line.split_whitespace().nth(4).unwrap();
                u32::from_str_radix(field, 16).unwrap()
            });
            // The link-local address comes with the carrier.
            text.lines().any(|line| line.starts_with("fe80") && line.ends_with(&format!(" {interface}")))
                && flags.all(|flags| flags & TENTATIVE == 0)
        };
        let deadline = Instant::now() + PATIENCE;
        while !self.run(ready) {
            assert!(Instant::now() < deadline, "{interface} has no IPv6");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it answers to its addresses on these interfaces.
    pub fn ready(&self, interfaces: &[&str]) {
        interfaces.iter().for_each(|interface| self.wait_for_ipv6(interface));
    }

    /// Makes this host a router.
    pub fn forward(&self) {
        self.sysctl("ipv4/ip_forward", "1");
        self.sysctl("ipv6/conf/all/forwarding", "1");
    }

    /// Everything that rules could have changed here, as text: but for routes that the kernel makes by itself, when it
    /// gets round to it.
    pub fn state(&self) -> String {
        let routes = ["-4 route show table all", "-6 route show table all"].map(|args| {
            let others = |line: &&str| !line.contains("proto kernel");
            self.ip(args).lines().filter(others).collect::<Vec<_>>().join("\n")
        });
        let rules = ["-4 rule", "-6 rule"].map(|args| self.ip(args));
        [&[self.nft("list tables")], &rules[..], &routes[..]].concat().join("--\n")
    }
}

/// The legacy iptables locks a file in /run, which only root of the host may open. The mount namespace of the tests
/// (`.cargo/config.toml`) gets an empty /run.
fn let_iptables_lock() {
    static SET: std::sync::Once = std::sync::Once::new();
    SET.call_once(|| {
        // Root without a mount namespace of the tests has the true /run, and may lock the file there.
        let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        if mounts("1").is_none_or(|host| Some(host) != mounts("self")) {
            mount_tmpfs("/run");
        }
    });
}

/// Puts an empty directory in the place of one, in this process's mount namespace.
pub fn mount_tmpfs(directory: &str) {
    let directory = std::ffi::CString::new(directory).unwrap();
    // SAFETY: NUL-terminated texts, and no options.
    let rc = unsafe { libc::mount(c"tmpfs".as_ptr(), directory.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    assert_eq!(
        rc,
        0,
        "mount {directory:?}: {}; `unshare --map-root-user --net --mount PROGRAM`",
        std::io::Error::last_os_error()
    );
}

/// client --- proxy --- server; the proxy's host is a router, so that what it does not intercept goes through.
pub struct Lab {
    pub client: Net,
    pub proxy: Net,
    pub server: Net,
}

/// One address of each host, of one family.
#[derive(Clone, Copy)]
pub struct Hosts {
    pub client: IpAddr,
    pub proxy: IpAddr,
    pub server: IpAddr,
}

pub fn v4() -> Hosts {
    Hosts { client: ip("198.51.100.2"), proxy: ip("198.51.100.1"), server: ip("203.0.113.2") }
}

pub fn v6() -> Hosts {
    Hosts { client: ip("2001:db8:1::2"), proxy: ip("2001:db8:1::1"), server: ip("2001:db8:2::2") }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

impl Lab {
    pub fn new() -> Lab {
        let lab = Lab { client: Net::new(), proxy: Net::new(), server: Net::new() };
        Net::link(
            (&lab.client, "eth0", &["198.51.100.2/24", "198.51.100.9/24", "2001:db8:1::9/64", "2001:db8:1::2/64"]),
            (&lab.proxy, "eth0", &["198.51.100.1/24", "2001:db8:1::1/64"]),
        );
        Net::link(
            (&lab.proxy, "eth1", &["203.0.113.1/24", "2001:db8:2::1/64"]),
            (
                &lab.server,
                "eth0",
                &[
                    "203.0.113.2/24",
                    "203.0.113.3/24",
                    "203.0.113.4/24",
                    "2001:db8:2::2/64",
                    "2001:db8:2::3/64",
                    "2001:db8:2::4/64",
                ],
            ),
        );
        for (net, v4, v6) in
            [(&lab.client, "198.51.100.1", "2001:db8:1::1"), (&lab.server, "203.0.113.1", "2001:db8:2::1")]
        {
            net.ip(&format!("route add default via {v4}"));
            net.ip(&format!("route add default via {v6}"));
        }
        for (net, name) in [(&lab.client, "eth0"), (&lab.proxy, "eth0"), (&lab.proxy, "eth1"), (&lab.server, "eth0")] {
            net.wait_for_ipv6(name);
        }
        lab.proxy.sysctl("ipv4/ip_forward", "1");
        lab.proxy.sysctl("ipv6/conf/all/forwarding", "1");
        lab
    }

    /// The server's listener for a port, both families. One before it may live on for a moment, in a child of another
    /// test that has not come to its exec.
    pub fn serve(&self, port: u16) -> TcpListener {
        let until = Instant::now() + PATIENCE;
        self.server.run(|| {
            loop {
                match TcpListener::bind(at(ip("::"), port)) {
                    Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < until => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    listener => return listener.unwrap(),
                }
            }
        })
    }

    /// The client connects, says something, and hears what the server makes of it.
    pub fn ask(&self, to: SocketAddr) -> std::io::Result<Heard> {
        self.client.run(|| ask(to))
    }
}

/// Numbers that look random, the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        // Knuth's MMIX; the upper bits are the better ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What the client heard, and from where it asked.
#[derive(Debug)]
pub struct Heard {
    pub from: SocketAddr,
    pub answer: String,
}

pub fn ask(to: SocketAddr) -> std::io::Result<Heard> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"who am I?")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(Heard { from: stream.local_addr()?, answer })
}

/// Accepts one connection, or panics when none comes.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    accept_within(listener, PATIENCE).expect("no connection came")
}

pub fn accept_within(listener: &TcpListener, patience: Duration) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return Some((stream, canonical(peer)));
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => panic!("accept: {e}"),
        }
    }
    None
}

/// Serves one connection: reads all, answers "seen ADDRESS, heard WORDS". Gives whom it saw.
pub fn answer_one(listener: &TcpListener) -> SocketAddr {
    let (mut stream, peer) = accept(listener);
    let mut words = String::new();
    stream.read_to_string(&mut words).unwrap();
    write!(stream, "seen {}, heard {words}", peer.ip()).unwrap();
    peer
}

/// What a proxy saw of one connection.
pub struct Seen {
    pub peer: SocketAddr,
    pub orig_dst: SocketAddr,
}

/// Answers every connection with some words, until that is enough.
pub fn answer_all(listener: &TcpListener, words: &str, enough: &AtomicBool) {
    while !enough.load(Ordering::Relaxed) {
        if let Some((mut stream, _)) = accept_within(listener, Duration::from_millis(50)) {
            // A client that has gone is its own affair.
            let _ = stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(words.as_bytes()));
        }
    }
}

/// Proxies one connection from accept to both ends of stream, with the C functions.
pub fn proxy_one(listener: &TcpListener, flags: u32) -> Seen {
    let (client, _) = accept(listener);
    let peer = client.peer_addr().unwrap();
    let orig_dst = orig_dst(&client).unwrap();
    let server = connect_from(peer, orig_dst, flags).unwrap_or_else(|e| panic!("{peer} to {orig_dst}: {e}"));
    let server = TcpStream::from(server);
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server.set_write_timeout(Some(PATIENCE)).unwrap();
    std::thread::scope(|scope| {
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            scope.spawn(move || {
                std::io::copy(&mut from, &mut to).unwrap();
                to.shutdown(std::net::Shutdown::Write).unwrap();
            });
        }
    });
    Seen { peer: canonical(peer), orig_dst: canonical(orig_dst) }
}

pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => at(addr.ip().to_canonical(), addr.port()),
        _ => addr,
    }
}

// The C functions, with Rust's types. A failure is errno and the sentence.

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

pub fn orig_dst(fd: &impl AsRawFd) -> Result<SocketAddr, Failed> {
    let mut storage = SockAddrStorage::zeroed();
    let mut len = storage.size_of();
    // SAFETY: room for len bytes.
    checked(unsafe { tp_orig_dst(fd.as_raw_fd(), (&raw mut storage).cast(), &raw mut len) })?;
    // SAFETY: the call wrote an address of that length.
    Ok(unsafe { SockAddr::new(storage, len) }.as_socket().unwrap())
}

/// A config with nothing set.
pub fn config() -> tp_rules_config {
    // SAFETY: integers and pointers, for which all zero is the documented default.
    unsafe { std::mem::zeroed() }
}

/// Prefixes as C has them.
pub fn prefixes(texts: &[&str]) -> Vec<tp_prefix> {
    let prefix = |text: &&str| {
        let (addr, len) = text.split_once('/').unwrap();
        let mut prefix = tp_prefix { family: 0, len: len.parse().unwrap(), reserved: [0; 2], addr: [0; 16] };
        match ip(addr) {
            IpAddr::V4(v4) => {
                prefix.family = libc::AF_INET as u8;
                prefix.addr[..4].copy_from_slice(&v4.octets());
            }
            IpAddr::V6(v6) => {
                prefix.family = libc::AF_INET6 as u8;
                prefix.addr = v6.octets();
            }
        }
        prefix
    };
    texts.iter().map(prefix).collect()
}

/// Installed rules, removed at the end of the scope.
#[derive(Debug)]
pub struct Rules(*mut tp_rules);

// SAFETY: the header says that any thread may use the handle, and several at a time.
unsafe impl Send for Rules {}
// SAFETY: as above.
unsafe impl Sync for Rules {}

impl Rules {
    pub fn install(config: &tp_rules_config) -> Result<Rules, Failed> {
        let mut rules = std::ptr::null_mut();
        // SAFETY: the config's pointers are the caller's, alive.
        checked(unsafe { tp_install_rules(config, size_of::<tp_rules_config>(), &raw mut rules) })?;
        Ok(Rules(rules))
    }

    pub fn replace(&self, config: &tp_rules_config) -> Result<(), Failed> {
        // SAFETY: a handle that was not removed; the config's pointers are the caller's, alive.
        checked(unsafe { tp_replace_rules(self.0, config, size_of::<tp_rules_config>()) }).map(drop)
    }

    pub fn update(&self, set: u32, add: &[tp_prefix], remove: &[tp_prefix]) -> Result<(), Failed> {
        // SAFETY: a handle that was not removed, and arrays of these lengths.
        let rc = unsafe { tp_update_rules(self.0, set, add.as_ptr(), add.len(), remove.as_ptr(), remove.len()) };
        checked(rc).map(drop)
    }

    pub fn stats(&self) -> tp_rules_stats {
        // SAFETY: integers, for which all zero is valid.
        let mut stats: tp_rules_stats = unsafe { std::mem::zeroed() };
        // SAFETY: a handle that was not removed, and room for the struct.
        checked(unsafe { tp_rules_stats(self.0, &raw mut stats, size_of::<tp_rules_stats>()) }).unwrap();
        stats
    }

    /// Lets go of rules that persist, as a process does that ends.
    pub fn abandon(mut self) {
        // SAFETY: a handle that was not removed, and is not used again.
        drop(unsafe { Box::from_raw(std::mem::replace(&mut self.0, std::ptr::null_mut())) });
    }

    pub fn remove(mut self) -> Result<(), Failed> {
        // SAFETY: a handle that was not removed.
        checked(unsafe { tp_remove_rules(std::mem::replace(&mut self.0, std::ptr::null_mut())) }).map(drop)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        // SAFETY: NULL, or a handle that was not removed.
        unsafe { tp_remove_rules(self.0) };
    }
}

/// Intercepts a port for a listener, in this thread's namespace.
pub fn intercept(listener: &impl AsRawFd, port: u16) -> Result<Rules, Failed> {
    intercept_ports(listener, &[tp_port_range { first: port, last: port }])
}

pub fn intercept_ports(listener: &impl AsRawFd, ports: &[tp_port_range]) -> Result<Rules, Failed> {
    let listeners = [listener.as_raw_fd()];
    Rules::install(&tp_rules_config {
        listeners: listeners.as_ptr(),
        n_listeners: 1,
        ports: ports.as_ptr(),
        n_ports: ports.len(),
        ..config()
    })
}

pub fn purge(name: Option<&str>) -> Result<(), Failed> {
    let name = name.map(|name| std::ffi::CString::new(name).unwrap());
    // SAFETY: NULL or NUL-terminated.
    checked(unsafe { tp_purge_rules(name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr())) }).map(drop)
}

pub fn render(config: &tp_rules_config, format: u32) -> String {
    let mut len = 0;
    let size = size_of::<tp_rules_config>();
    let mut call = |buffer: *mut std::ffi::c_char| {
        // SAFETY: NULL, or room for len bytes; the config's pointers are the caller's, alive.
        checked(unsafe { tp_render_rules(config, size, format, buffer, &raw mut len) }).unwrap();
        len
    };
    let mut script = vec![0u8; call(std::ptr::null_mut())];
    call(script.as_mut_ptr().cast());
    assert_eq!(script.pop(), Some(0));
    String::from_utf8(script).unwrap()
}

pub fn divert_only() -> Result<Rules, Failed> {
    Rules::install(&tp_rules_config { flags: TP_RULES_DIVERT_ONLY, ..config() })
}

/// One datagram: its words, where it came from and where it was going; `None` if none comes in time.
pub fn receive_datagram(fd: &OwnedFd, patience: Duration) -> Option<(String, SocketAddr, SocketAddr)> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    if unsafe { libc::poll(&raw mut poll, 1, patience.as_millis() as c_int) } != 1 {
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

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub severity: u32,
    pub id: String,
    pub message: String,
    pub impact: String,
    pub fix: String,
}

/// Takes findings into a `Vec<Found>`, the context.
pub unsafe extern "C" fn take(finding: *const tp_finding, context: *mut std::ffi::c_void) {
    // SAFETY: a finding whose texts are valid during the call, and the context that the caller gave.
    unsafe {
        let text = |text| CStr::from_ptr(text).to_str().unwrap().to_owned();
        let tp_finding { severity, id, message, impact, fix } = *finding;
        let found = Found { severity, id: text(id), message: text(message), impact: text(impact), fix: text(fix) };
        (*context.cast::<Vec<Found>>()).push(found);
    }
}

/// `tp_check`, in this thread's namespace.
pub fn check() -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    // SAFETY: the function that takes such a context.
    let failures = checked(unsafe { tp_check(Some(take), (&raw mut found).cast()) }).unwrap();
    assert_eq!(failures as usize, found.iter().filter(|f| f.severity == TP_SEVERITY_FAILURE).count());
    found
}

/// The warnings and failures among findings.
pub fn troubles(found: &[Found]) -> Vec<&Found> {
    found.iter().filter(|finding| finding.severity >= TP_SEVERITY_WARNING).collect()
}

impl Net {
    /// Runs a shell command here, as a person would who was told to.
    pub fn sh(&self, command: &str) {
        self.command("sh", &["-ec", command]);
    }
}

/// Long enough for what works, on a busy machine; what is broken takes all of it.
pub const SOON: Duration = Duration::from_millis(900);

/// What a server says, if it does so soon.
pub fn said(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"?")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Finds it, runs its fix, and finds it no more.
pub fn cured(net: &Net, id: &str, severity: u32) {
    let found = net.run(check);
    let one = found.iter().find(|finding| finding.id == id && finding.severity == severity);
    let one = one.unwrap_or_else(|| panic!("{id} not found among {found:#?}"));
    net.sh(&one.fix);
    // A process that was told to end needs a moment.
    let deadline = Instant::now() + PATIENCE;
    let left = || net.run(check).into_iter().find(|finding| finding.id == id && finding.severity != TP_SEVERITY_OK);
    while let Some(finding) = left() {
        assert!(Instant::now() < deadline, "{finding:#?} is found still");
        std::thread::sleep(Duration::from_millis(10));
    }
}
