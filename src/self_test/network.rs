//! Two new network namespaces, connected by a veth pair.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::check::inspect::routing::{self, Interface};
use crate::error::{Error, Result};
use crate::netlink::Channel;
use crate::netlink::rtnl::link::{LOOPBACK, Mac, VethEnd};
use crate::self_test::link;
use crate::sys;

const OUTSIDE_MAC: Mac = [2, 0, 0, 0, 0, 1];
const INSIDE_MAC: Mac = [2, 0, 0, 0, 0, 2];

/// The two namespaces. This thread is in the inner one. They end with their last descriptor and socket.
pub(super) struct Network {
    in_client_ns: OwnedFd,
    inside: OwnedFd,
    link: u32,
    outside_link: u32,
}

impl Network {
    /// Moves this thread to new namespaces, permanently.
    pub fn new(interface: &str) -> Result<Network> {
        let in_client_ns = unshared()?;
        // `lo` gets the addresses from which the probes are sent.
        let mut there = channel()?;
        link::set_up(&mut there, LOOPBACK)?;
        let inside = unshared()?;
        let mut here = channel()?;
        link::set_up(&mut here, LOOPBACK)?;
        let near = VethEnd { name: interface, mac: INSIDE_MAC };
        let far = VethEnd { name: "eth0", mac: OUTSIDE_MAC };
        link::add_pair(&mut here, near, far, in_client_ns.as_fd())?;
        let link = index(&mut here, interface)?;
        let outside_link = index(&mut there, "eth0")?;
        link::set_up(&mut here, link)?;
        link::set_up(&mut there, outside_link)?;
        Ok(Network { in_client_ns, inside, link, outside_link })
    }

    /// Adds an address to the client namespace, a default route there, and the route back.
    pub fn connect(&self, client: IpAddr, gateway: IpAddr) -> Result<()> {
        let mut there = self.in_client_ns(channel)??;
        link::add_address(&mut there, self.outside_link, client)?;
        link::add_neighbor(&mut there, self.outside_link, gateway, INSIDE_MAC)?;
        link::add_route(&mut there, self.outside_link, gateway, true)?;
        let mut here = channel()?;
        link::add_address(&mut here, self.link, gateway)?;
        link::add_neighbor(&mut here, self.link, client, OUTSIDE_MAC)?;
        link::add_route(&mut here, self.link, client, false)?;
        self.wait_for(client, gateway)
    }

    /// Waits until both ends of the veth pair have received a packet from each other. The kernel detects with a delay that the other
    /// end is up (`linkwatch_event`), and silently drops packets until then.
    fn wait_for(&self, client: IpAddr, gateway: IpAddr) -> Result<()> {
        // Longer than a second: `linkwatch_event` runs once a second at most, and later while another process holds the RTNL lock.
        const PATIENCE: u64 = 10_000; // ms
        let failed = |e: sys::Errno| {
            Error::io(format_args!("veth pair of the self-test: no packet arrived within 10 seconds"), e)
        };
        let open = |own: IpAddr| -> sys::Result<(UdpSocket, SocketAddr)> {
            let socket = UdpSocket::bind((own, 0))?;
            socket.set_nonblocking(true)?;
            let addr = socket.local_addr()?;
            Ok((socket, addr))
        };
        let (near, near_addr) = open(gateway).map_err(failed)?;
        let (far, far_addr) = self.in_client_ns(|| open(client))?.map_err(failed)?;
        let deadline = sys::coarse_ms() + PATIENCE;
        let (mut near_heard, mut far_heard) = (false, false);
        while !(near_heard && far_heard) {
            if sys::coarse_ms() > deadline {
                return Err(failed(sys::Errno(libc::ETIMEDOUT)));
            }
            // A failed packet is sent again in the next round.
            let _ = near.send_to(b"?", far_addr);
            let _ = far.send_to(b"?", near_addr);
            std::thread::sleep(Duration::from_micros(200));
            near_heard |= near.recv(&mut [0; 8]).is_ok();
            far_heard |= far.recv(&mut [0; 8]).is_ok();
        }
        Ok(())
    }

    /// Adds an address to the inner namespace.
    pub fn own(&self, addr: IpAddr) -> Result<()> {
        match link::add_address(&mut channel()?, LOOPBACK, addr) {
            Err(e) if e.errno() == libc::EEXIST => Ok(()),
            done => done,
        }
    }

    /// Runs a function in the client namespace.
    pub fn in_client_ns<T>(&self, body: impl FnOnce() -> T) -> Result<T> {
        let failed = |e: sys::Errno| Error::io(format_args!("setns(CLONE_NEWNET)"), e);
        sys::enter_network(self.in_client_ns.as_fd()).map_err(failed)?;
        let outcome = body();
        sys::enter_network(self.inside.as_fd()).map_err(failed)?;
        Ok(outcome)
    }
}

fn unshared() -> Result<OwnedFd> {
    let failed = |e: sys::Errno| {
        let errno = e.0;
        let fix = if errno == libc::EPERM {
            "; a network of its own takes CAP_SYS_ADMIN: run as root, or `unshare -r PROGRAM`"
        } else {
            ""
        };
        Error::with(errno, format_args!("unshare(CLONE_NEWNET): {e}{fix}"))
    };
    sys::unshare_network().map_err(failed)?;
    File::open("/proc/thread-self/ns/net").map(OwnedFd::from).map_err(|e| failed(e.into()))
}

fn channel() -> Result<Channel> {
    Channel::open(libc::NETLINK_ROUTE).map_err(|e| Error::io(format_args!("socket(NETLINK_ROUTE)"), e))
}

fn interfaces(channel: &mut Channel) -> Result<Vec<Interface>> {
    let read = routing::interfaces(channel);
    read.map(|read| read.found).map_err(|e| Error::io(format_args!("ip link show"), e))
}

fn index(channel: &mut Channel, name: &str) -> Result<u32> {
    let found = interfaces(channel)?.iter().find(|interface| interface.name == name).map(|interface| interface.index);
    found.ok_or_else(|| Error::with(libc::ENODEV, format_args!("ip link show {name}: the interface does not exist")))
}
