//! The C functions for rules, with Rust's types.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use tproxy::ffi::*;

use super::{Failed, checked, ip};

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

pub fn divert_only() -> Result<Rules, Failed> {
    Rules::install(&tp_rules_config { flags: TP_RULES_DIVERT_ONLY, ..config() })
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
