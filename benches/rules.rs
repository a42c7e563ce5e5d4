//! Compares the cost of rules with that of scripts for `iptables`, `nft` and `ip`.
//!
//! It prints one table from one run. The contenders take turns, so that other
//! load on the machine affects all of them alike. A figure is the median, with
//! the quartiles in brackets. A ratio is the median of the ratios of all turns.
//! The networks are those of the tests: network namespaces without names.
//!
//! If `QUICK` is in the environment, it only tests that everything works.

#[path = "../tests/common/mod.rs"]
mod common;

use std::ffi::{c_int, c_void};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use socket2::{Domain, SockRef, Socket, Type};
use tproxy::ffi::*;

/// The argument with which the benchmark runs itself, to measure memory in a new process.
const MEMORY: &str = "--memory-of-one-install";

/// The argument that selects only the comparison of the default rules for one port.
const ONE_PORT: &str = "--one-port";

/// The commands of the textbooks, and the commands that undo them.
const SCRIPT: &str = "iptables -t mangle -N DIVERT
    iptables -t mangle -A PREROUTING -p tcp -m socket -j DIVERT
    iptables -t mangle -A DIVERT -j MARK --set-mark 1
    iptables -t mangle -A DIVERT -j ACCEPT
    iptables -t mangle -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 3129 --tproxy-mark 1
    ip rule add fwmark 1 lookup 100
    ip route add local 0.0.0.0/0 dev lo table 100";
const SCRIPT_BACK: &str = "ip route del local 0.0.0.0/0 dev lo table 100
    ip rule del fwmark 1 lookup 100
    iptables -t mangle -D PREROUTING -p tcp --dport 80 -j TPROXY --on-port 3129 --tproxy-mark 1
    iptables -t mangle -D PREROUTING -p tcp -m socket -j DIVERT
    iptables -t mangle -F DIVERT
    iptables -t mangle -X DIVERT";

/// The rules that the library installs, as scripts for `nft` and `ip`.
const NFT: &str = include_str!("../tests/golden/dual.nft");
const NFT_BACK: &str = "nft delete table inet libtproxy-tproxy";
const ROUTING: &str = include_str!("../tests/golden/default.ip");

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, MEMORY, nft] = arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return memory_of_one_install(nft);
    }
    println!("{:21} {:27} {:29} {:27} {:>7}  {:>7}", "libtproxy", "", "compared with", "", "ratio", "target");
    // For the machine's first hook of a kind the kernel patches its own code (nf_static_key_inc() in
    // net/netfilter/core.c). On a machine with a firewall that has happened before.
    one_port("first rules on the machine");
    let firewall = Net::new();
    let listener = wildcard_listener(&firewall);
    let _rules = firewall.run(|| install(&[listener.as_raw_fd()], &[]));
    one_port("other rules exist");
    if arguments.iter().any(|argument| argument == ONE_PORT) {
        return;
    }
    many_prefixes();
    traffic();
}

/// Whether this run only tests that everything works.
fn quick() -> bool {
    std::env::var_os("QUICK").is_some()
}

/// The number of destinations of a large set.
fn many() -> u32 {
    if quick() { 2_000 } else { 100_000 }
}

/// A number with a comma after the thousands.
fn grouped(number: u32) -> String {
    format!("{},{:03}", number / 1000, number % 1000)
}

/// The default rules for one port, compared with a script, and with one file each for `nft` and `ip`.
fn one_port(when: &str) {
    let nets = [(); 3].map(|()| Net::new());
    let listener = wildcard_listener(&nets[0]);
    // `ip -batch` takes the address family from its command line, for all lines of a file.
    let batches = |name: &str, lines: Vec<String>| {
        let of_family = |family: &str| lines.iter().filter_map(|line| line.strip_prefix(family)).collect::<String>();
        ["-4 ", "-6 "]
            .map(|f| format!("ip {f}-batch {}\n", file(&format!("{name}{}.ip", f.trim()), &of_family(f))))
            .concat()
    };
    let adding = ROUTING.lines().map(|line| format!("{line}\n"));
    let deleting = ROUTING.lines().rev().map(|line| line.replacen(" add ", " del ", 1) + "\n");
    let rules = file("one.nft", &nft_of_one_port());
    let files = format!("nft -f {rules}\n{}", batches("add", adding.collect()));
    let files_back = format!("{}{NFT_BACK}", batches("del", deleting.collect()));
    let [ours, script, files] = nets[0].run(|| {
        let ours = &mut || Ok(install_and_remove(&listener, &[]));
        let script = &mut || Ok(vec![commands(&nets[1], SCRIPT)?, commands(&nets[1], SCRIPT_BACK)?]);
        let files = &mut || Ok(vec![commands(&nets[2], &files)?, commands(&nets[2], &files_back)?]);
        in_turns(40, Duration::ZERO, [ours, script, files])
    });
    println!("One port, IPv4 and IPv6, {when}");
    row("install", &ours.of(0), "iptables and ip, only IPv4", &script.of(0), Target::TimesFaster(50.0));
    row("install", &ours.of(0), "nft -f and ip -batch", &files.of(0), Target::TimesFaster(25.0));
    row("install", &ours.of(0), "its time in the kernel", &ours.of(1), Target::None);
    // close(2) of a netlink socket that owns a table waits until the kernel has freed all deleted objects.
    row("remove", &ours.of(2), "iptables and ip, only IPv4", &script.of(1), Target::None);
    row("remove", &ours.of(2), "nft -f and ip -batch", &files.of(1), Target::None);
}

/// Many destinations: installing all, the memory for that, and adding and removing one.
fn many_prefixes() {
    let nets = [(); 4].map(|()| Net::new());
    let [listener, other] = [&nets[0], &nets[1]].map(wildcard_listener);
    let destinations = scattered(many());
    let path = file("many.nft", &nft_of_many());
    let load = format!("nft -f {path}");
    let installed = nets[1].run(|| install(&[other.as_raw_fd()], &destinations));
    let loaded = commands(&nets[3], &load);
    let one = [prefix(many() / 2, 1)];
    let element = format!("element inet libtproxy-tproxy dst4 {{ {}/24 }}", address(many() / 2, 1));
    let change = |verb| commands(&nets[3], &format!("nft {verb} {element}"));
    let updating = |add: &[_], remove: &[_]| timed_with_kernel(|| installed.update(TP_SET_DST, add, remove).unwrap());
    let [ours, theirs, update, changed, memory] = {
        let install = &mut || Ok(nets[0].run(|| install_and_remove(&listener, &destinations)));
        let nft = &mut || Ok(vec![commands(&nets[2], &load)?, commands(&nets[2], NFT_BACK)?]);
        let update = &mut || Ok([updating(&one, &[]), updating(&[], &one)].concat());
        let change = &mut || loaded.clone().and_then(|_| Ok(vec![change("add")?, change("delete")?]));
        let memory = &mut || {
            let output = Command::new(std::env::current_exe().unwrap()).args([MEMORY, &path]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout).unwrap().split(' ').map(|figure| figure.parse().unwrap()).collect())
        };
        // The kernel frees deleted objects asynchronously: the pause keeps that out of the next measurement.
        in_turns(10, Duration::from_millis(100), [install, nft, update, change, memory])
    };
    println!("{} destinations, no two adjacent", grouped(many()));
    row("install", &ours.of(0), "nft -f", &theirs.of(0), Target::TimesFaster(2.3));
    row("install", &ours.of(0), "its time in the kernel", &ours.of(1), Target::TimesAtMost(1.25));
    row("memory", &memory.of(0), "nft -f", &theirs.of(0).and(memory.of(1)), Target::Megabytes(16.0));
    for (number, what) in ["add one", "remove one"].into_iter().enumerate() {
        let time = update.of(2 * number);
        row(what, &time, "install of all", &ours.of(0), Target::TimesFaster(100.0));
        row(what, &time, "its time in the kernel", &update.of(2 * number + 1), Target::None);
        row(what, &time, "nft add, nft delete", &changed.of(number), Target::None);
    }
}

/// An intercepted connection, and a datagram that is not intercepted, with sets of several sizes.
fn traffic() {
    let large = grouped(many());
    let [every, hundred, many, empty] = [0, 100, many(), 1].map(|count| Router::new(&scattered(count)));
    empty.rules.update(TP_SET_DST, &[], &scattered(1)).unwrap();
    println!(
        "Traffic, by size of the set of destinations; packets go to {} addresses in turn, or to one",
        Router::ADDRESSES
    );
    let routers: [Turn<'_>; 3] =
        [&mut || every.connections(), &mut || hundred.connections(), &mut || many.connections()];
    let measured = in_turns(100, Duration::ZERO, routers);
    for (size, ours) in ["100", &large].into_iter().zip(&measured[1..]) {
        row(&format!("connection, {size}"), &ours.of(0), "no set", &measured[0].of(0), Target::TimesAtMost(1.1));
    }
    let routers: [Turn<'_>; 3] = [&mut || empty.datagrams(), &mut || hundred.datagrams(), &mut || many.datagrams()];
    let measured = in_turns(100, Duration::ZERO, routers);
    for (column, beside) in ["empty set, one address", "empty set"].into_iter().enumerate() {
        for (size, ours) in ["100", &large].into_iter().zip(&measured[1..]) {
            let what = format!("datagram, {size}");
            row(&what, &ours.of(column), beside, &measured[0].of(column), Target::TimesAtMost(1.1));
        }
    }
}

/// A client, a router that intercepts some destinations, and a server to which all addresses of 8.0.0.0/5 are local.
struct Router {
    lab: Lab,
    listener: TcpListener,
    _udp: OwnedFd,
    rules: Rules,
    sender: UdpSocket,
    sink: UdpSocket,
    /// Addresses spread over the whole set, and addresses in the gaps between its prefixes.
    members: Vec<SocketAddr>,
    others: Vec<SocketAddr>,
}

impl Router {
    const ADDRESSES: u32 = 200;

    fn new(destinations: &[tp_prefix]) -> Router {
        let lab = Lab::new();
        lab.proxy.ip("route add 8.0.0.0/5 via 203.0.113.2");
        lab.server.ip("route add local 8.0.0.0/5 dev lo");
        let listener = wildcard_listener(&lab.proxy);
        let udp = lab.proxy.run(|| receiver(at(ip("::"), 3129)));
        let rules = lab.proxy.run(|| install(&[listener.as_raw_fd(), udp.as_raw_fd()], destinations));
        let [sender, sink] = [(&lab.client, 0), (&lab.server, 80)]
            .map(|(net, port)| net.run(|| UdpSocket::bind(at(ip("0.0.0.0"), port)).unwrap()));
        // The smallest buffer: it is full soon, and dropping further datagrams costs little.
        SockRef::from(&sink).set_recv_buffer_size(0).unwrap();
        sink.set_read_timeout(Some(patience())).unwrap();
        let size = if destinations.is_empty() { many() } else { destinations.len() as u32 };
        let all_over = |odd| {
            let spread = |n| (u64::from(n) * u64::from(size) / u64::from(Router::ADDRESSES)) as u32;
            (0..Router::ADDRESSES).map(|n| at(address(spread(n), odd).into(), 80)).collect()
        };
        Router { lab, listener, _udp: udp, rules, sender, sink, members: all_over(0), others: all_over(1) }
    }

    /// The time of one connection: connect, accept, get the original destination, close both ends.
    fn connections(&self) -> Samples {
        let client = |_| {
            let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            client.set_linger(Some(Duration::ZERO)).unwrap();
            client
        };
        let clients: Vec<Socket> = self.lab.client.run(|| (0..Router::ADDRESSES).map(client).collect());
        let time = timed(|| {
            for (client, to) in clients.into_iter().zip(&self.members) {
                client.connect(&(*to).into()).unwrap();
                let (accepted, _) = self.listener.accept().unwrap();
                assert_eq!(canonical(orig_dst(&accepted).unwrap()), *to);
            }
        });
        Ok(vec![time / f64::from(Router::ADDRESSES)])
    }

    /// The time of one datagram from the client to the server: to one address, and to many in turn.
    fn datagrams(&self) -> Samples {
        const DATAGRAMS: usize = 2000;
        let send = |to: &[SocketAddr]| {
            let to = to.iter().cycle().take(DATAGRAMS);
            let time = timed(|| to.for_each(|to| assert_eq!(self.sender.send_to(b"?", to).unwrap(), 1)));
            self.sink.recv(&mut [0]).expect("the router forwarded no datagram");
            time / DATAGRAMS as f64
        };
        Ok(vec![send(&self.others[..1]), send(&self.others)])
    }
}

/// Prints the peak memory of one install of many prefixes and that of `nft`, in megabytes.
fn memory_of_one_install(nft: &str) {
    let nets = [(); 2].map(|()| Net::new());
    let listener = wildcard_listener(&nets[0]);
    let destinations = scattered(many());
    let megabytes = |kibibytes: f64| kibibytes * 1024.0 / 1e6;
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        megabytes(line.trim_end_matches("kB").trim().parse().unwrap())
    };
    // Writing 5 resets VmHWM to the current size (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak();
    let _rules = nets[0].run(|| install(&[listener.as_raw_fd()], &destinations));
    let growth = peak() - before;
    // A failure is ignored here: the timed run of the same command reports it.
    let _ = commands(&nets[1], &format!("nft -f {nft}"));
    // SAFETY: integers, for which all zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: valid for writes.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) }, 0);
    print!("{growth} {}", megabytes(usage.ru_maxrss as f64));
}

/// The time that this process has spent in send(2), in nanoseconds.
static SENDING: AtomicU64 = AtomicU64::new(0);

/// Replaces the C library's `send`, which the library uses for netlink, and measures its time. The kernel processes a
/// whole transaction before send(2) returns.
///
/// # Safety
/// The same as for send(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn send(fd: c_int, bytes: *const c_void, len: usize, flags: c_int) -> isize {
    let start = Instant::now();
    // SAFETY: the caller keeps the contract of send(2).
    let sent = unsafe { libc::sendto(fd, bytes, len, flags, std::ptr::null(), 0) };
    SENDING.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    sent
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// The time of some work, and its time in the kernel.
fn timed_with_kernel(work: impl FnOnce()) -> [f64; 2] {
    let before = SENDING.load(Ordering::Relaxed);
    let time = timed(work);
    [time, (SENDING.load(Ordering::Relaxed) - before) as f64 / 1e9]
}

/// The time of an install, its time in the kernel, and the time of the removal.
fn install_and_remove(listener: &TcpListener, destinations: &[tp_prefix]) -> Vec<f64> {
    let mut rules = None;
    let [time, kernel] = timed_with_kernel(|| rules = Some(install(&[listener.as_raw_fd()], destinations)));
    vec![time, kernel, timed(|| rules.unwrap().remove().unwrap())]
}

/// Rules for these destinations; for every destination if there are none.
fn install(listeners: &[c_int], destinations: &[tp_prefix]) -> Rules {
    let http = tp_port_range { first: 80, last: 80, protocols: 0 };
    Rules::install(&tp_rules_config {
        listeners: listeners.as_ptr(),
        n_listeners: listeners.len(),
        ports: &raw const http,
        n_ports: 1,
        dst: if destinations.is_empty() { std::ptr::null() } else { destinations.as_ptr() },
        n_dst: destinations.len(),
        ..config()
    })
    .unwrap()
}

fn wildcard_listener(net: &Net) -> TcpListener {
    net.run(|| listen(at(ip("::"), 3129), 0)).unwrap()
}

/// The time of commands, one per line, each run as a process.
fn commands(net: &Net, lines: &str) -> Result<f64, String> {
    net.run(|| {
        let start = Instant::now();
        for line in lines.lines() {
            let mut words = line.split_whitespace();
            let program = words.next().unwrap();
            let output = Command::new(program).args(words).output().map_err(|e| format!("{program}: {e}"))?;
            if !output.status.success() {
                return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
            }
        }
        Ok(start.elapsed().as_secs_f64())
    })
}

/// Writes a file for a command, and returns its path.
fn file(name: &str, text: &str) -> String {
    let path = format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(&path, text).unwrap();
    path
}

/// The address of the n-th scattered prefix, or with `odd` = 1 of the gap behind it.
fn address(n: u32, odd: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits((10 << 24) + ((2 * n + odd) << 8))
}

fn prefix(n: u32, odd: u32) -> tp_prefix {
    let mut prefix = tp_prefix { family: libc::AF_INET as u8, len: 24, reserved: [0; 2], addr: [0; 16] };
    prefix.addr[..4].copy_from_slice(&address(n, odd).octets());
    prefix
}

/// Prefixes of which no two are adjacent.
fn scattered(count: u32) -> Vec<tp_prefix> {
    (0..count).map(|n| prefix(n, 0)).collect()
}

/// The default rules for one port, without a set of ports.
fn nft_of_one_port() -> String {
    let ports = |line: &&str| !line.trim().starts_with("set ports");
    let lines: Vec<&str> = NFT.lines().filter(ports).collect();
    lines.join("\n").replace("th dport @ports", "th dport 80")
}

/// The default rules with a set of many destinations.
fn nft_of_many() -> String {
    let elements: Vec<String> = (0..many()).map(|n| format!("{}/24", address(n, 0))).collect();
    let dst4 = format!("set dst4 {{ type ipv4_addr; flags interval; elements = {{ {} }} }}", elements.join(", "));
    let select = "chain select {\nip daddr @dst4 goto intercept\nip6 daddr @dst6 goto intercept\n}";
    nft_of_one_port()
        .replace("chain divert", &format!("{dst4}\nset dst6 {{ type ipv6_addr; flags interval; }}\nchain divert"))
        .replace("chain prerouting", &format!("{select}\nchain prerouting"))
        .replace("fib daddr type != 2-5 goto intercept", "goto select")
}

/// Figures, or the reason why there are none.
type Samples = Result<Vec<f64>, String>;
/// Takes one sample of each of several figures.
type Turn<'a> = &'a mut dyn FnMut() -> Samples;

/// The figures of all turns.
struct Measured(Vec<Samples>);

impl Measured {
    /// All samples of one figure.
    fn of(&self, thing: usize) -> Samples {
        self.0.iter().map(|turn| turn.as_ref().map(|figures| figures[thing]).map_err(String::clone)).collect()
    }
}

/// Measures the contenders in turns. Each turn starts with a different one; the first turn is discarded.
fn in_turns<const N: usize>(turns: usize, pause: Duration, contenders: [Turn<'_>; N]) -> [Measured; N] {
    let turns = if quick() { 1 } else { turns };
    let mut measured = [(); N].map(|()| Measured(Vec::new()));
    for turn in 0..=turns {
        for index in (0..N).map(|place| (turn + place) % N) {
            std::thread::sleep(pause);
            let figures = contenders[index]();
            if turn > 0 {
                measured[index].0.push(figures);
            }
        }
    }
    measured
}

enum Target {
    /// At least this many times faster than the other contender.
    TimesFaster(f64),
    /// At most this many times the other contender's figure.
    TimesAtMost(f64),
    /// Less than this many megabytes.
    Megabytes(f64),
    None,
}

/// Prints a row of the table.
fn row(what: &str, ours: &Samples, beside: &str, theirs: &Samples, target: Target) {
    let ours = ours.as_ref().unwrap();
    let show = |samples: &[f64]| match target {
        Target::Megabytes(_) => figure(samples, 1.0, "MB"),
        _ if quantile(samples, 0.5) < 1e-3 => figure(samples, 1e6, "us"),
        _ => figure(samples, 1e3, "ms"),
    };
    print!("{what:21} {:27} {beside:29} ", show(ours));
    let theirs = match theirs {
        Ok(theirs) => theirs,
        Err(reason) => return println!("{reason}"),
    };
    let times = |a: &[f64], b: &[f64]| quantile(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>(), 0.5);
    let (faster, slower) = (times(theirs, ours), times(ours, theirs));
    let (ratio, target, met) = match target {
        Target::TimesFaster(least) => (faster, format!(">= {least}"), faster >= least),
        Target::TimesAtMost(most) => (slower, format!("<= {most}"), slower <= most),
        Target::Megabytes(most) => (faster, format!("< {most} MB"), quantile(ours, 0.5) < most),
        Target::None => return println!("{:27} {faster:7.2}", show(theirs)),
    };
    println!("{:27} {ratio:7.2}  {target:>7}  {}", show(theirs), if met { "met" } else { "missed" });
}

/// The median, with the quartiles in brackets.
fn figure(samples: &[f64], scale: f64, unit: &str) -> String {
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|part| quantile(samples, part) * scale);
    format!("{middle:.2} {unit} ({low:.2}-{high:.2})")
}

fn quantile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}
