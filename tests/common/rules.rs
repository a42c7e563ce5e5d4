//! The C functions for rules, with Rust's types.

use std::os::fd::AsRawFd;

use tproxy::ffi::*;

use super::{AsConfig, Failed, RulesConfig, checked};

/// Installed rules, removed at the end of the scope.
#[derive(Debug)]
pub struct Rules(*mut tp_rules);

// SAFETY: the header says that any thread may use the handle, and several at a time.
unsafe impl Send for Rules {}

// SAFETY: as above.
unsafe impl Sync for Rules {}

impl Rules {
    pub fn install(config: &impl AsConfig) -> Result<Rules, Failed> {
        let mut rules = std::ptr::null_mut();
        config.with(|config| {
            // SAFETY: what the config points to is alive during the call.
            checked(unsafe { tp_install_rules(config, size_of::<tp_rules_config>(), &raw mut rules) })
        })?;
        Ok(Rules(rules))
    }

    pub fn replace(&self, config: &impl AsConfig) -> Result<(), Failed> {
        config.with(|config| {
            // SAFETY: a handle that was not removed; what the config points to is alive during the call.
            checked(unsafe { tp_replace_rules(self.0, config, size_of::<tp_rules_config>()) }).map(drop)
        })
    }

    pub fn update(&self, set: u32, add: &[tp_prefix], remove: &[tp_prefix]) -> Result<(), Failed> {
        // SAFETY: a handle that was not removed, and arrays of these lengths.
        let rc = unsafe { tp_update_rules(self.0, set, add.as_ptr(), add.len(), remove.as_ptr(), remove.len()) };
        checked(rc).map(drop)
    }

    pub fn learn(&self, set: u32, addrs: &[tp_prefix], ttl_seconds: u32) -> Result<(), Failed> {
        // SAFETY: a handle that was not removed, and an array of this length.
        checked(unsafe { tp_learn_addresses(self.0, set, addrs.as_ptr(), addrs.len(), ttl_seconds) }).map(drop)
    }

    pub fn verify(&self, flags: u32) -> Result<(), Failed> {
        // SAFETY: a handle that was not removed.
        checked(unsafe { tp_verify_rules(self.0, flags) }).map(drop)
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
    RulesConfig::of(listener).ports(&[port]).install()
}

pub fn intercept_ports(listener: &impl AsRawFd, ports: &[tp_port_range]) -> Result<Rules, Failed> {
    RulesConfig::of(listener).port_ranges(ports.iter().map(|range| (range.first, range.last))).install()
}

pub fn purge(name: Option<&str>) -> Result<(), Failed> {
    let name = name.map(|name| std::ffi::CString::new(name).unwrap());
    // SAFETY: NULL or NUL-terminated.
    checked(unsafe { tp_purge_rules(name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr())) }).map(drop)
}

/// An instance as `tp_list_rules` reports it.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    pub name: String,
    pub backend: u32,
    pub flags: u32,
    pub families: u32,
    pub protocols: u32,
    pub mark: (u32, u32),
    pub table: u32,
    pub priority: u32,
    pub owner_pid: i64,
    pub listen_addr: Option<std::net::SocketAddr>,
    pub intercepted: u64,
}

/// The instances in this thread's network namespace.
pub fn list_rules() -> Result<Vec<Listed>, Failed> {
    unsafe extern "C" fn report(instance: *const tp_instance, found: *mut std::ffi::c_void) {
        // SAFETY: valid during the call, and the vector below.
        let (it, found) = unsafe { (&*instance, &mut *found.cast::<Vec<Listed>>()) };
        let listen_addr = (!it.listen_addr.is_null()).then(|| {
            // SAFETY: as many bytes as it says, which fit an address of IPv4 or IPv6.
            let storage = unsafe {
                let mut storage: libc::sockaddr_storage = std::mem::zeroed();
                let bytes = (&raw mut storage).cast::<u8>();
                bytes.copy_from_nonoverlapping(it.listen_addr.cast(), it.listen_addrlen as usize);
                socket2::SockAddr::new(
                    std::mem::transmute::<libc::sockaddr_storage, socket2::SockAddrStorage>(storage),
                    it.listen_addrlen,
                )
            };
            storage.as_socket().unwrap()
        });
        found.push(Listed {
            // SAFETY: NUL-terminated.
            name: unsafe { std::ffi::CStr::from_ptr(it.name) }.to_str().unwrap().to_owned(),
            backend: it.backend,
            flags: it.flags,
            families: it.families,
            protocols: it.protocols,
            mark: (it.mark, it.mark_mask),
            table: it.table,
            priority: it.priority,
            owner_pid: it.owner_pid,
            listen_addr,
            intercepted: it.stats.intercepted_packets,
        });
    }
    let mut found: Vec<Listed> = Vec::new();
    // SAFETY: a function, and the vector that it fills.
    let number = checked(unsafe { tp_list_rules(Some(report), (&raw mut found).cast()) })?;
    assert_eq!(number as usize, found.len());
    Ok(found)
}

/// The script of `tp_render_rules`.
pub fn render(config: &impl AsConfig, format: u32) -> String {
    try_render(config, format).unwrap()
}

/// The same, or its error.
pub fn try_render(config: &impl AsConfig, format: u32) -> Result<String, Failed> {
    let call = |buffer: *mut std::ffi::c_char, len: &mut usize| {
        config.with(|config| {
            // SAFETY: NULL, or room for len bytes; what the config points to is alive during the call.
            checked(unsafe { tp_render_rules(config, size_of::<tp_rules_config>(), format, buffer, len) })
        })
    };
    let mut len = 0;
    call(std::ptr::null_mut(), &mut len)?;
    let mut script = vec![0u8; len];
    call(script.as_mut_ptr().cast(), &mut len)?;
    assert_eq!(script.pop(), Some(0));
    Ok(String::from_utf8(script).unwrap())
}

/// Rules that only divert: nothing is intercepted.
pub fn divert_only() -> Result<Rules, Failed> {
    RulesConfig::new().flags(TP_RULES_DIVERT_ONLY).install()
}
