//! A configuration of rules with all that it points to, for every call that takes one.

use std::ffi::{CStr, CString, c_char};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use socket2::SockAddr;
use tproxy::ffi::*;

use super::{Failed, Rules, ip, render, try_render};

/// A configuration as a test says it. Each method sets one field and gives the configuration back. A list that is not set
/// is NULL, which means "not restricted".
#[derive(Clone, Default)]
pub struct RulesConfig {
    name: Option<CString>,
    listeners: Option<Vec<RawFd>>,
    listen_addr: Option<SockAddr>,
    flags: u32,
    backend: u32,
    protocols: u32,
    families: u32,
    mark: u32,
    mark_mask: u32,
    table: u32,
    priority: u32,
    ports: Option<Vec<tp_port_range>>,
    dst: Option<Vec<tp_prefix>>,
    src: Option<Vec<tp_prefix>>,
    bypass: Option<Vec<tp_prefix>>,
    interfaces: Option<Vec<CString>>,
    bypass_ports: Option<Vec<tp_port_range>>,
    bypass_src: Option<Vec<tp_prefix>>,
    bypass_interfaces: Option<Vec<CString>>,
    macs: Option<Vec<tp_mac>>,
    bypass_macs: Option<Vec<tp_mac>>,
    uids: Option<Vec<tp_id_range>>,
    bypass_uids: Option<Vec<tp_id_range>>,
    gids: Option<Vec<tp_id_range>>,
    bypass_gids: Option<Vec<tp_id_range>>,
    cgroups: Option<Vec<CString>>,
    bypass_cgroups: Option<Vec<CString>>,
    bypass_mark: u32,
    bypass_mark_mask: u32,
    reject_ports: Option<Vec<tp_port_range>>,
}

/// Methods that set a number.
macro_rules! numbers {
    ($($name:ident),*) => { $(
        pub fn $name(self, $name: u32) -> RulesConfig {
            RulesConfig { $name, ..self }
        }
    )* };
}

/// Methods that set a list of prefixes.
macro_rules! prefix_lists {
    ($($name:ident),*) => { $(
        pub fn $name(self, $name: impl Prefixes) -> RulesConfig {
            RulesConfig { $name: Some($name.prefixes()), ..self }
        }
    )* };
}

/// Methods that set a list of ports, each with its protocols (0: every protocol).
macro_rules! port_lists {
    ($($name:ident),*) => { $(
        pub fn $name(self, ports: &[(u16, u32)]) -> RulesConfig {
            RulesConfig { $name: Some(ports.iter().map(|(port, protocols)| port_of(*port, *protocols)).collect()), ..self }
        }
    )* };
}

/// Methods that set a list of names.
macro_rules! name_lists {
    ($($name:ident),*) => { $(
        pub fn $name<T: AsRef<str>>(self, names: &[T]) -> RulesConfig {
            let name = |name: &T| CString::new(name.as_ref()).unwrap();
            RulesConfig { $name: Some(names.iter().map(name).collect()), ..self }
        }
    )* };
}

/// Methods that set a list of numbers of users or groups.
macro_rules! id_lists {
    ($($name:ident),*) => { $(
        pub fn $name(self, ids: &[(u32, u32)]) -> RulesConfig {
            let range = |(first, last): &(u32, u32)| tp_id_range { first: *first, last: *last };
            RulesConfig { $name: Some(ids.iter().map(range).collect()), ..self }
        }
    )* };
}

/// Methods that set a list of Ethernet addresses.
macro_rules! mac_lists {
    ($($name:ident),*) => { $(
        pub fn $name(self, macs: &[[u8; 6]]) -> RulesConfig {
            RulesConfig { $name: Some(macs.iter().map(|addr| tp_mac { addr: *addr }).collect()), ..self }
        }
    )* };
}

fn port_of(port: u16, protocols: u32) -> tp_port_range {
    tp_port_range { first: port, last: port, protocols }
}

impl RulesConfig {
    pub fn new() -> RulesConfig {
        RulesConfig::default()
    }

    /// For a listener.
    pub fn of(listener: &impl AsRawFd) -> RulesConfig {
        RulesConfig::new().listeners(&[listener])
    }

    numbers!(flags, backend, protocols, families, mark, mark_mask, table, priority, bypass_mark, bypass_mark_mask);
    prefix_lists!(dst, src, bypass, bypass_src);
    port_lists!(bypass_ports, reject_ports);
    name_lists!(interfaces, bypass_interfaces, cgroups, bypass_cgroups);
    id_lists!(uids, bypass_uids, gids, bypass_gids);
    mac_lists!(macs, bypass_macs);

    pub fn name(self, name: &str) -> RulesConfig {
        RulesConfig { name: Some(CString::new(name).unwrap()), ..self }
    }

    pub fn listeners(self, listeners: &[&dyn AsRawFd]) -> RulesConfig {
        RulesConfig { listeners: Some(listeners.iter().map(|listener| listener.as_raw_fd()).collect()), ..self }
    }

    pub fn listen_addr(self, addr: SocketAddr) -> RulesConfig {
        RulesConfig { listen_addr: Some(addr.into()), ..self }
    }

    pub fn ports(self, ports: &[u16]) -> RulesConfig {
        self.port_ranges(ports.iter().map(|port| (*port, *port)))
    }

    pub fn port_ranges(self, ranges: impl IntoIterator<Item = (u16, u16)>) -> RulesConfig {
        let range = |(first, last)| tp_port_range { first, last, protocols: 0 };
        RulesConfig { ports: Some(ranges.into_iter().map(range).collect()), ..self }
    }

    pub fn ports_of(self, ports: &[(u16, u32)]) -> RulesConfig {
        RulesConfig { ports: Some(ports.iter().map(|(port, protocols)| port_of(*port, *protocols)).collect()), ..self }
    }

    /// The three lists of ports, with ranges.
    pub fn port_lists(
        self,
        ports: Option<Vec<tp_port_range>>,
        bypass_ports: Vec<tp_port_range>,
        reject_ports: Vec<tp_port_range>,
    ) -> RulesConfig {
        RulesConfig { ports, bypass_ports: Some(bypass_ports), reject_ports: Some(reject_ports), ..self }
    }

    pub fn install(&self) -> Result<Rules, Failed> {
        Rules::install(self)
    }

    pub fn render(&self, format: u32) -> String {
        render(self, format)
    }

    pub fn try_render(&self, format: u32) -> Result<String, Failed> {
        try_render(self, format)
    }
}

/// A configuration in the form that the C functions take: for the time of a call.
pub trait AsConfig {
    fn with<T>(&self, call: impl FnOnce(&tp_rules_config) -> T) -> T;
}

impl AsConfig for tp_rules_config {
    fn with<T>(&self, call: impl FnOnce(&tp_rules_config) -> T) -> T {
        call(self)
    }
}

/// A list as C has it: a pointer and a count. The pointer to an empty list is not NULL.
fn list<T>(items: Option<&Vec<T>>) -> (*const T, usize) {
    items.map_or((std::ptr::null(), 0), |items| (items.as_ptr(), items.len()))
}

impl AsConfig for RulesConfig {
    fn with<T>(&self, call: impl FnOnce(&tp_rules_config) -> T) -> T {
        let pointers = |names: &Option<Vec<CString>>| -> Option<Vec<*const c_char>> {
            names.as_ref().map(|names| names.iter().map(|name| name.as_ptr()).collect())
        };
        let (interfaces, bypass_interfaces) = (pointers(&self.interfaces), pointers(&self.bypass_interfaces));
        let (cgroups, bypass_cgroups) = (pointers(&self.cgroups), pointers(&self.bypass_cgroups));
        let mut raw = config();
        raw.name = self.name.as_deref().map_or(std::ptr::null(), CStr::as_ptr);
        (raw.listeners, raw.n_listeners) = list(self.listeners.as_ref());
        if let Some(addr) = &self.listen_addr {
            (raw.listen_addr, raw.listen_addrlen) = (addr.as_ptr().cast(), addr.len());
        }
        (raw.flags, raw.backend) = (self.flags, self.backend);
        (raw.protocols, raw.families) = (self.protocols, self.families);
        (raw.mark, raw.mark_mask) = (self.mark, self.mark_mask);
        (raw.table, raw.priority) = (self.table, self.priority);
        (raw.ports, raw.n_ports) = list(self.ports.as_ref());
        (raw.dst, raw.n_dst) = list(self.dst.as_ref());
        (raw.src, raw.n_src) = list(self.src.as_ref());
        (raw.bypass, raw.n_bypass) = list(self.bypass.as_ref());
        (raw.interfaces, raw.n_interfaces) = list(interfaces.as_ref());
        (raw.bypass_ports, raw.n_bypass_ports) = list(self.bypass_ports.as_ref());
        (raw.bypass_src, raw.n_bypass_src) = list(self.bypass_src.as_ref());
        (raw.bypass_interfaces, raw.n_bypass_interfaces) = list(bypass_interfaces.as_ref());
        (raw.macs, raw.n_macs) = list(self.macs.as_ref());
        (raw.bypass_macs, raw.n_bypass_macs) = list(self.bypass_macs.as_ref());
        (raw.uids, raw.n_uids) = list(self.uids.as_ref());
        (raw.bypass_uids, raw.n_bypass_uids) = list(self.bypass_uids.as_ref());
        (raw.gids, raw.n_gids) = list(self.gids.as_ref());
        (raw.bypass_gids, raw.n_bypass_gids) = list(self.bypass_gids.as_ref());
        (raw.cgroups, raw.n_cgroups) = list(cgroups.as_ref());
        (raw.bypass_cgroups, raw.n_bypass_cgroups) = list(bypass_cgroups.as_ref());
        (raw.bypass_mark, raw.bypass_mark_mask) = (self.bypass_mark, self.bypass_mark_mask);
        (raw.reject_ports, raw.n_reject_ports) = list(self.reject_ports.as_ref());
        call(&raw)
    }
}

/// A struct with nothing set, for tests of the struct itself. Other tests use [`RulesConfig`].
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

/// What becomes a list of prefixes: texts such as "192.0.2.0/24", or prefixes.
pub trait Prefixes {
    fn prefixes(self) -> Vec<tp_prefix>;
}

impl<T: AsRef<str>, const N: usize> Prefixes for [T; N] {
    fn prefixes(self) -> Vec<tp_prefix> {
        self.as_slice().prefixes()
    }
}

impl<T: AsRef<str>> Prefixes for &[T] {
    fn prefixes(self) -> Vec<tp_prefix> {
        prefixes(&self.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }
}

impl<T: AsRef<str>> Prefixes for &Vec<T> {
    fn prefixes(self) -> Vec<tp_prefix> {
        self.as_slice().prefixes()
    }
}

impl Prefixes for Vec<tp_prefix> {
    fn prefixes(self) -> Vec<tp_prefix> {
        self
    }
}
