//! The sockets that replies leave from: one for each source port.
//!
//! A transparent socket sends from any address (`IP_PKTINFO`,
//! `IPV6_PKTINFO`), but only from the port that it is bound to. So there is
//! one for each port and family, whatever the addresses and clients. It must
//! take nothing that is meant for others:
//!
//! * It is bound to a dummy address, which no datagram is sent to, rather than
//!   to the wildcard: no look-up of the kernel's finds it, neither for a
//!   packet nor for nf_tables' or iptables' socket match. What a client sends
//!   to the port goes where it always went.
//! * It shares the port (SO_REUSEADDR) with everyone who is willing to: other
//!   repliers, and services that set that option too. Bound to another
//!   address, it takes nothing from them.
//! * A filter drops what is sent to the dummy address nevertheless.
//!
//! Who holds the port on the wildcard address and does not share it keeps it:
//! then a raw socket sends, with a UDP header of our own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::process::Held;
use crate::socket::{bind, make_transparent, open};
use crate::sys;

/// Where a reply socket is bound to: addresses that are for nobody. The IPv4
/// dummy address (RFC 7600) and the dummy IPv6 prefix (RFC 9780).
const DUMMY_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
const DUMMY_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 1, 0, 0, 0, 1);

/// The longest data of an IPv4 datagram that no path cuts: Linux takes none to be narrower than 552 bytes
/// (`DEFAULT_MIN_PMTU`, net/ipv4/route.c), of which the headers are 28.
const MAX_WITHOUT_PMTUD: usize = 552 - 28;

/// How long a port counts as taken: one attempt a second costs nothing, and
/// nobody waits longer for a port that is free again.
const TAKEN_MS: u64 = 1000;

/// What a socket is for: a port and a family, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key(u32);

impl Key {
    #[inline(always)]
    pub(super) fn new(v6: bool, port: u16) -> Key {
        Key(u32::from(v6) << 16 | u32::from(port))
    }

    pub(super) fn is_v6(self) -> bool {
        self.0 >> 16 != 0
    }

    fn port(self) -> u16 {
        self.0 as u16
    }

    /// As a hash table needs it: the bits of each end are spread evenly. There are few keys at all, so nobody can choose
    /// many that collide.
    #[inline(always)]
    pub(super) fn spread(self) -> u64 {
        // Knuth's: the golden ratio's part of 2^64.
        u64::from(self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
    }
}

/// How a reply leaves.
pub(super) enum Egress<'a> {
    /// From a socket of its source port.
    Port(BorrowedFd<'a>),
    /// From the raw socket of its family.
    Raw,
}

/// What is known of a port.
struct PoolEntry {
    key: Key,
    /// `None`: it is taken.
    socket: Option<Held>,
    /// What it sends may be df_cleared on its way.
    df_cleared: bool,
    /// When this was found out.
    since: u64,
    used: u64,
    /// The number of the use, which tells two of one moment apart.
    turn: u64,
}

impl PoolEntry {
    /// What is known still holds.
    fn serves(&self, now: u64) -> bool {
        self.socket.is_some() || now < self.since + TAKEN_MS
    }
}

/// Counts of what was done.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
}

pub(super) struct SocketPool {
    /// In the order of their keys.
    ports: Vec<PoolEntry>,
    raw: [Option<Held>; 2],
    limit: usize,
    idle_ms: u64,
    /// Never a socket of a port.
    raw_only: bool,
    turn: u64,
    next_sweep: u64,
    pub counts: Counts,
}

impl SocketPool {
    pub(super) fn new(limit: usize, idle_ms: u64, raw_only: bool) -> Result<SocketPool> {
        // All the room that there will ever be: a reply allocates nothing.
        let mut ports = Vec::new();
        ports.try_reserve_exact(limit).map_err(|_| Error::no_memory())?;
        Ok(SocketPool {
            ports,
            raw: [None, None],
            limit,
            idle_ms,
            raw_only,
            turn: 0,
            next_sweep: 0,
            counts: Counts::default(),
        })
    }

    /// How many sockets are open.
    pub(super) fn open(&self) -> usize {
        self.ports.iter().filter(|source| source.socket.is_some()).count() + self.raw.iter().flatten().count()
    }

    /// Closes what was not used for long. Cheap enough for every call: it looks at most four times in that time.
    pub(super) fn sweep(&mut self, now: u64) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + (self.idle_ms / 4).max(1);
        let idle = self.idle_ms;
        self.ports.retain(|source| now < source.used.saturating_add(idle));
    }

    /// How datagrams leave from a port, none of which is longer than this.
    pub(super) fn egress(&mut self, key: Key, longest: usize, now: u64) -> Result<Egress<'_>> {
        if self.raw_only {
            return Ok(Egress::Raw);
        }
        self.turn += 1;
        let turn = self.turn;
        let source = match self.place(key) {
            Ok(place) if self.ports[place].serves(now) => {
                self.counts.hits += 1;
                &mut self.ports[place]
            }
            known => {
                self.counts.misses += 1;
                self.open_or_mark_taken(key, known.ok(), now)?
            }
        };
        (source.used, source.turn) = (now, turn);
        let Some(socket) = source.socket.as_ref().map(Held::get_unchecked) else { return Ok(Egress::Raw) };
        if longest > MAX_WITHOUT_PMTUD && !source.df_cleared {
            clear_df(socket)?;
            source.df_cleared = true;
        }
        Ok(Egress::Port(socket))
    }

    /// Where a port is, or would be.
    fn place(&self, key: Key) -> std::result::Result<usize, usize> {
        self.ports.binary_search_by_key(&key, |source| source.key)
    }

    /// Finds out about a port of which nothing is known, or nothing that still holds.
    #[cold]
    #[inline(never)]
    fn open_or_mark_taken(&mut self, key: Key, known: Option<usize>, now: u64) -> Result<&mut PoolEntry> {
        match known {
            Some(place) => drop(self.ports.remove(place)),
            // First, so that there is never one more than allowed.
            None if self.ports.len() >= self.limit => _ = self.evict(),
            None => {}
        }
        let socket = self.open_port(key)?;
        let (Ok(place) | Err(place)) = self.place(key);
        self.ports.insert(place, PoolEntry { key, socket, df_cleared: key.is_v6(), since: now, used: now, turn: 0 });
        Ok(&mut self.ports[place])
    }

    /// The raw socket of a family.
    pub(super) fn raw(&mut self, v6: bool) -> Result<BorrowedFd<'_>> {
        let place = &mut self.raw[usize::from(v6)];
        let socket: &Held = match place {
            Some(socket) => socket,
            None => place.insert(Held::new(raw_socket(v6)?)),
        };
        Ok(socket.get_unchecked())
    }

    /// A socket of a port, or `None` if it is another's.
    fn open_port(&mut self, key: Key) -> Result<Option<Held>> {
        let refused = match port_socket(key) {
            Ok(socket) => return Ok(Some(Held::new(socket))),
            Err(refused) => refused,
        };
        match refused.errno() {
            // Another's, or (below 1024) not permitted.
            libc::EADDRINUSE | libc::EACCES => Ok(None),
            // No descriptor left: one that we have not used for long is as good as new.
            libc::EMFILE | libc::ENFILE if self.evict() => port_socket(key).map(Held::new).map(Some),
            _ => Err(refused),
        }
    }

    /// Forgets what was not used for longest.
    fn evict(&mut self) -> bool {
        let oldest = (0..self.ports.len()).min_by_key(|place| self.ports[*place].turn);
        let evicted = oldest.map(|place| self.ports.remove(place)).is_some();
        self.counts.evictions += u64::from(evicted);
        evicted
    }
}

/// Whether this process may do at all what a replier does.
pub(super) fn check_privilege() -> Result<()> {
    make_transparent(&open(Domain::IPV4, Type::DGRAM, None)?, Domain::IPV4)
}

fn dummy(key: Key) -> SocketAddr {
    let ip = if key.is_v6() { IpAddr::V6(DUMMY_V6) } else { IpAddr::V4(DUMMY_V4) };
    SocketAddr::new(ip, key.port())
}

fn port_socket(key: Key) -> Result<Socket> {
    let addr = dummy(key);
    let socket = send_only_socket(key.is_v6(), Type::DGRAM, None)?;
    let set = |level, option, value| {
        sys::setsockopt_int(socket.as_fd(), level, option, value)
            .map_err(|e| Error::socket(SocketOp::Prepare, Endpoints { local: Some(addr.into()), remote: None }, e))
    };
    if key.is_v6() {
        // Or it would share the port with IPv4's sockets too.
        set(libc::SOL_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(&socket, &addr.into())?;
    if !key.is_v6() {
        // What nobody cuts needs no number to be put together by, which the kernel would have to find for each datagram.
        set(libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
    }
    Ok(socket)
}

/// What a router further on has to say of a packet's size goes to whom the source address belongs, never here. So IPv4's
/// routers shall fragment, rather than drop. (IPv6's cannot: there the path's MTU counts.)
///
/// A socket of IPv6's does not know the option.
#[cold]
pub(super) fn clear_df(fd: BorrowedFd<'_>) -> Result<()> {
    sys::setsockopt_int(fd, libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
        .map_err(|e| Error::socket(SocketOp::Prepare, Endpoints::default(), e))
}

/// A socket that is given UDP headers and sends them in packets of the kernel's making, fragments included.
fn raw_socket(v6: bool) -> Result<Socket> {
    let socket = send_only_socket(v6, Type::RAW, Some(Protocol::UDP))?;
    if !v6 {
        clear_df(socket.as_fd())?;
    }
    bind(&socket, &dummy(Key::new(v6, 0)).into())?;
    Ok(socket)
}

/// A transparent socket that receives nothing.
fn send_only_socket(v6: bool, kind: Type, protocol: Option<Protocol>) -> Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = open(domain, kind, protocol)?;
    make_transparent(&socket, domain)?;
    // BPF_RET 0: keep no byte of it.
    let nothing = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket.attach_filter(&[nothing]).map_err(|e| Error::socket(SocketOp::Prepare, Endpoints::default(), e))?;
    Ok(socket)
}
