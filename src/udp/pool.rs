//! The sockets that send replies: one for each source port.
//!
//! A transparent socket sends from any address (`IP_PKTINFO`,
//! `IPV6_PKTINFO`), but only from the port that it is bound to. The pool
//! therefore has one socket for each port and family. A socket must not
//! receive datagrams that are meant for other sockets:
//!
//! * It is bound to a dummy address, to which no datagram is sent, and not to
//!   the wildcard address: no lookup of the kernel finds it, neither for a
//!   packet nor for the socket match of nf_tables or iptables. Datagrams that
//!   clients send to the port are delivered as without the socket.
//! * It shares the port (SO_REUSEADDR) with other sockets that set this option:
//!   those of other repliers, and services. It is bound to another address and
//!   receives none of their datagrams.
//! * A filter drops datagrams that are sent to the dummy address.
//!
//! If a socket without SO_REUSEADDR has the port on the wildcard address, a raw
//! socket sends the replies, with a UDP header that this module computes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::error::{Endpoints, Error, Result, SocketOp};
use crate::process::Held;
use crate::socket::{bind, make_transparent, open};
use crate::sys;

/// Addresses to which reply sockets are bound. No host has them: the IPv4 dummy
/// address (RFC 7600) and an address in the dummy IPv6 prefix (RFC 9780).
const DUMMY_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
const DUMMY_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 1, 0, 0, 0, 1);

/// Maximum payload of an IPv4 datagram that fits every path MTU: Linux assumes at least 552 bytes
/// (`DEFAULT_MIN_PMTU`, net/ipv4/route.c), of which the headers take 28.
const MAX_WITHOUT_PMTUD: usize = 552 - 28;

/// Time for which a port counts as in use. One attempt per second costs little,
/// and a port that becomes free is used within a second.
const TAKEN_MS: u64 = 1000;

/// Key of a socket: port and family in one word.
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

    /// Returns a hash whose lowest and highest bits are evenly distributed. Only 131,072 keys exist, so a sender cannot choose
    /// many that collide.
    #[inline(always)]
    pub(super) fn spread(self) -> u64 {
        // Fibonacci hashing (Knuth): 2^64 divided by the golden ratio.
        u64::from(self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
    }
}

/// The socket that sends a reply.
pub(super) enum Egress<'a> {
    /// The socket of its source port.
    Port(BorrowedFd<'a>),
    /// The raw socket of its family.
    Raw,
}

/// A port, and its socket.
struct PoolEntry {
    key: Key,
    /// `None`: the port is in use by another socket.
    socket: Option<Held>,
    /// Routers may fragment the datagrams that the socket sends.
    df_cleared: bool,
    /// Time at which the entry was created.
    since: u64,
    used: u64,
    /// Number of the last use. It orders uses within one millisecond.
    turn: u64,
}

impl PoolEntry {
    /// Whether the entry is still valid.
    fn serves(&self, now: u64) -> bool {
        self.socket.is_some() || now < self.since + TAKEN_MS
    }
}

/// Counters of the pool.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
}

pub(super) struct SocketPool {
    /// Sorted by key.
    ports: Vec<PoolEntry>,
    raw: [Option<Held>; 2],
    limit: usize,
    idle_ms: u64,
    /// Use only raw sockets.
    raw_only: bool,
    turn: u64,
    next_sweep: u64,
    pub counts: Counts,
}

impl SocketPool {
    pub(super) fn new(limit: usize, idle_ms: u64, raw_only: bool) -> Result<SocketPool> {
        // The final capacity: replies allocate nothing.
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

    /// Returns the number of open sockets.
    pub(super) fn open(&self) -> usize {
        self.ports.iter().filter(|source| source.socket.is_some()).count() + self.raw.iter().flatten().count()
    }

    /// Closes sockets that have been idle for `idle_ms`. Every call of a replier calls it; it searches at most four times in that
    /// period.
    pub(super) fn sweep(&mut self, now: u64) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + (self.idle_ms / 4).max(1);
        let idle = self.idle_ms;
        self.ports.retain(|source| now < source.used.saturating_add(idle));
    }

    /// Returns the socket for datagrams from a port with at most `longest` bytes.
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

    /// Returns the index of a port, or the index at which to insert it.
    fn place(&self, key: Key) -> std::result::Result<usize, usize> {
        self.ports.binary_search_by_key(&key, |source| source.key)
    }

    /// Creates the entry of a port that has none, or replaces an entry that is no longer valid.
    #[cold]
    #[inline(never)]
    fn open_or_mark_taken(&mut self, key: Key, known: Option<usize>, now: u64) -> Result<&mut PoolEntry> {
        match known {
            Some(place) => drop(self.ports.remove(place)),
            // Evicts before it opens, so that the limit is never exceeded.
            None if self.ports.len() >= self.limit => _ = self.evict(),
            None => {}
        }
        let socket = self.open_port(key)?;
        let (Ok(place) | Err(place)) = self.place(key);
        self.ports.insert(place, PoolEntry { key, socket, df_cleared: key.is_v6(), since: now, used: now, turn: 0 });
        Ok(&mut self.ports[place])
    }

    /// Returns the raw socket of a family, and opens it at the first call.
    pub(super) fn raw(&mut self, v6: bool) -> Result<BorrowedFd<'_>> {
        let place = &mut self.raw[usize::from(v6)];
        let socket: &Held = match place {
            Some(socket) => socket,
            None => place.insert(Held::new(raw_socket(v6)?)),
        };
        Ok(socket.get_unchecked())
    }

    /// Opens a socket for a port; `None`: another socket uses the port.
    fn open_port(&mut self, key: Key) -> Result<Option<Held>> {
        let refused = match port_socket(key) {
            Ok(socket) => return Ok(Some(Held::new(socket))),
            Err(refused) => refused,
        };
        match refused.errno() {
            // In use by another socket, or (below 1024) not permitted.
            libc::EADDRINUSE | libc::EACCES => Ok(None),
            // No descriptor is left: close the least recently used socket.
            libc::EMFILE | libc::ENFILE if self.evict() => port_socket(key).map(Held::new).map(Some),
            _ => Err(refused),
        }
    }

    /// Removes the least recently used entry.
    fn evict(&mut self) -> bool {
        let oldest = (0..self.ports.len()).min_by_key(|place| self.ports[*place].turn);
        let evicted = oldest.map(|place| self.ports.remove(place)).is_some();
        self.counts.evictions += u64::from(evicted);
        evicted
    }
}

/// Checks that this process may create transparent sockets.
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
        // Otherwise the socket would use the port of IPv4 too.
        set(libc::SOL_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(&socket, &addr.into())?;
    if !key.is_v6() {
        // With DF set, the kernel need not allocate an IP ID per datagram.
        set(libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
    }
    Ok(socket)
}

/// Clears DF, so that IPv4 routers fragment datagrams that exceed the MTU of a link. With DF they would drop them and send the
/// ICMP error to the owner of the source address, not to this host. IPv6 routers never fragment, and an IPv6 socket does not
/// support the option.
#[cold]
pub(super) fn clear_df(fd: BorrowedFd<'_>) -> Result<()> {
    sys::setsockopt_int(fd, libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
        .map_err(|e| Error::socket(SocketOp::Prepare, Endpoints::default(), e))
}

/// Opens a raw socket: the caller writes the UDP header, and the kernel adds the IP header and fragments.
fn raw_socket(v6: bool) -> Result<Socket> {
    let socket = send_only_socket(v6, Type::RAW, Some(Protocol::UDP))?;
    if !v6 {
        clear_df(socket.as_fd())?;
    }
    bind(&socket, &dummy(Key::new(v6, 0)).into())?;
    Ok(socket)
}

/// Opens a transparent socket that receives nothing.
fn send_only_socket(v6: bool, kind: Type, protocol: Option<Protocol>) -> Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = open(domain, kind, protocol)?;
    make_transparent(&socket, domain)?;
    // BPF_RET 0 drops every packet.
    let nothing = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket.attach_filter(&[nothing]).map_err(|e| Error::socket(SocketOp::Prepare, Endpoints::default(), e))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(port: u16, since: u64) -> PoolEntry {
        PoolEntry { key: Key::new(false, port), socket: None, df_cleared: false, since, used: since, turn: 0 }
    }

    #[test]
    fn port_of_another_counts_as_taken_for_a_second() {
        let entry = taken(53, 5000);
        assert!(entry.serves(5000) && entry.serves(5999));
        assert!(!entry.serves(6000) && !entry.serves(7000));
    }

    #[test]
    fn sweep_forgets_what_was_unused_for_long_and_looks_four_times_in_that_time() {
        let mut pool = SocketPool::new(8, 1000, false).unwrap();
        pool.ports.push(taken(53, 0));
        pool.sweep(999);
        assert_eq!(pool.ports.len(), 1);
        // It is looked at after a quarter of the time.
        pool.sweep(1248);
        assert_eq!(pool.ports.len(), 1);
        pool.sweep(1249);
        assert_eq!(pool.ports.len(), 0);
        pool.ports.extend([taken(53, 2000), taken(54, 2001)]);
        pool.sweep(3000);
        assert_eq!(pool.ports.iter().map(|entry| entry.key.port()).collect::<Vec<_>>(), [54]);
    }

    #[test]
    fn evict_forgets_what_was_unused_for_longest() {
        let mut pool = SocketPool::new(8, 1000, false).unwrap();
        assert!(!pool.evict());
        pool.ports.extend([taken(53, 0), taken(54, 0), taken(55, 0)]);
        for (entry, turn) in pool.ports.iter_mut().zip([7, 5, 6]) {
            entry.turn = turn;
        }
        for left in [vec![53, 55], vec![53], vec![]] {
            assert!(pool.evict());
            assert_eq!(pool.ports.iter().map(|entry| entry.key.port()).collect::<Vec<_>>(), left);
        }
        assert_eq!(pool.counts.evictions, 3);
    }
}
