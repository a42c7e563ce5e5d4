//! Parsers for files in /proc. Missing or invalid values are `None` or omitted: they are unknown.

use std::collections::HashMap;

use crate::check::inspect::routing::Interface;

/// Whether a uid_map is that of the initial user namespace: it maps all IDs to themselves.
pub(super) fn is_initial_user_namespace(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Returns the state letter of /proc/PID/stat. The name in brackets may contain brackets and blanks.
pub(super) fn state_of(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Returns the soft and the hard descriptor limit of /proc/PID/limits.
pub(super) fn descriptors(limits: &str) -> Option<(u64, u64)> {
    let mut words = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace();
    let mut number = || match words.next()? {
        "unlimited" => Some(u64::MAX),
        word => word.parse().ok(),
    };
    Some((number()?, number()?))
}

/// Returns a counter of /proc/net/netstat, which has lines of names and lines of numbers.
pub(super) fn netstat(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
    let at = lines.next()?.split_whitespace().position(|word| word == name)?;
    lines.next()?.split_whitespace().nth(at)?.parse().ok()
}

/// Returns the major and the minor number of a kernel release.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Describes the availability of a kernel option and its module; `None`: unknown.
///
/// `config` is /boot/config-*; `dep` and `builtin` are modules.dep and modules.builtin of /lib/modules/*.
pub(super) fn availability(config: &str, dep: &str, builtin: &str, option: &str, module: &str) -> Option<&'static str> {
    let named = |line: &str| {
        let file = line.split(':').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        file.split_once(".ko").map_or(file, |(name, _)| name) == module
    };
    let set = |value: &str| config.lines().any(|line| line == format!("{option}={value}"));
    if set("y") || builtin.lines().any(named) {
        Some("it is built into this kernel")
    } else if dep.lines().any(named) {
        Some("its module is installed, and not loaded")
    } else if set("m") {
        Some("its module belongs to this kernel, and is not installed")
    } else if config.lines().any(|line| line == format!("# {option} is not set")) || !dep.is_empty() {
        Some("this kernel was built without it, or the package of its modules is missing")
    } else {
        None
    }
}

/// Sysctls below net, by path, of the network namespace of this thread. Unreadable ones are missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sysctls(HashMap<String, String>);

impl Sysctls {
    /// Creates sysctls from paths and values.
    pub fn of(found: impl IntoIterator<Item = (String, String)>) -> Sysctls {
        Sysctls(found.into_iter().collect())
    }

    /// Reads the required sysctls.
    pub fn read() -> Sysctls {
        const PATHS: [&str; 15] = [
            "ipv4/ip_forward",
            "ipv4/ip_early_demux",
            "ipv4/tcp_fwmark_accept",
            "ipv4/ip_local_port_range",
            "ipv4/conf/all/forwarding",
            "ipv4/conf/all/rp_filter",
            "ipv4/conf/all/accept_local",
            "ipv4/conf/all/src_valid_mark",
            "ipv4/conf/all/route_localnet",
            "ipv6/conf/all/forwarding",
            "ipv6/conf/lo/disable_ipv6",
            "bridge/bridge-nf-call-iptables",
            "bridge/bridge-nf-call-ip6tables",
            "netfilter/nf_conntrack_count",
            "netfilter/nf_conntrack_max",
        ];
        let read = |path: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok()?;
            Some((path.to_owned(), text.trim().to_owned()))
        };
        Sysctls::of(PATHS.into_iter().filter_map(read))
    }

    pub fn text(&self, path: &str) -> Option<&str> {
        self.0.get(path).map(String::as_str)
    }

    pub fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// Whether a sysctl is not 0.
    pub fn is_on(&self, path: &str) -> Option<bool> {
        self.number(path).map(|value| value != 0)
    }

    /// Returns an IPv4 sysctl of "all".
    pub fn of_all(&self, name: &str) -> Option<u64> {
        self.number(&format!("ipv4/conf/all/{name}"))
    }

    /// Whether a sysctl is on for an interface or for "all"; either suffices.
    pub fn is_on_any(&self, interface: &Interface, name: &str) -> Option<bool> {
        let on = |value: Option<u64>| value.map(|value| value != 0);
        match (on(self.of_all(name)), on(interface.switch(name))) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (Some(false), Some(false)) => Some(false),
            _ => None,
        }
    }

    /// Returns the lowest and the highest local port.
    pub fn port_range(&self) -> Option<(u32, u32)> {
        let mut words = self.text("ipv4/ip_local_port_range")?.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn procfs_files_are_parsed() {
        assert!(is_initial_user_namespace("         0          0 4294967295\n"));
        assert!(!is_initial_user_namespace("         0       1000          1\n"));
        assert_eq!(state_of("12 (a) b) T 1 2 3"), Some('T'));
        let limits = "Limit      Soft Limit  Hard Limit  Units\nMax open files      1024      unlimited      files\n";
        assert_eq!(descriptors(limits), Some((1024, u64::MAX)));
        let text = "TcpExt: A B IPReversePathFilter\nTcpExt: 1 2 37\nIpExt: A\nIpExt: 4\n";
        assert_eq!(netstat(text, "TcpExt", "IPReversePathFilter"), Some(37));
        assert_eq!(netstat(text, "TcpExt", "C"), None);
        assert_eq!(version("6.18.44-x"), Some((6, 18)));
    }

    #[test]
    fn procfs_missing_module_is_searched() {
        let of = |config, dep, builtin| availability(config, dep, builtin, "CONFIG_NFT_TPROXY", "nft_tproxy");
        let dep = "kernel/net/netfilter/nft_tproxy.ko.xz: kernel/net/netfilter/nf_tables.ko.xz\n";
        assert_eq!(of("", "", ""), None);
        assert_eq!(of("", dep, ""), Some("its module is installed, and not loaded"));
        assert_eq!(
            of("CONFIG_NFT_TPROXY=m\n", "", ""),
            Some("its module belongs to this kernel, and is not installed")
        );
        assert_eq!(of("", "", "kernel/net/netfilter/nft_tproxy.ko\n"), Some("it is built into this kernel"));
        let without = Some("this kernel was built without it, or the package of its modules is missing");
        assert_eq!(of("# CONFIG_NFT_TPROXY is not set\n", "", ""), without);
        assert_eq!(of("", "kernel/net/netfilter/nft_socket.ko: x/nft_tproxy.ko\n", ""), without);
    }

    proptest! {
        #[test]
        fn procfs_of_any_text_does_not_panic(text in "(?s).{0,200}", a in "[A-Z]{0,3}", b in "[a-z]{0,3}") {
            is_initial_user_namespace(&text);
            state_of(&text);
            descriptors(&format!("Max open files{text}"));
            netstat(&format!("{a}: {text}\n{a}: {text}"), &a, &b);
            version(&text);
            availability(&text, &text, &text, &a, &b);
            let sysctls = Sysctls::of(vec![("ipv4/ip_local_port_range".to_owned(), text)]);
            sysctls.port_range();
            sysctls.is_on("ipv4/ip_local_port_range");
        }
    }
}
