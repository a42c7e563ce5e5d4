//! Counters of the kernel.

use super::Net;

impl Net {
    /// A counter of this namespace in /proc/net/snmp or /proc/net/netstat, such as ("Tcp", "OutSegs").
    pub fn counter(&self, group: &str, name: &str) -> u64 {
        self.run(|| counter(group, name))
    }

    /// How many first packets of TCP connections this host has sent, each repetition counted.
    pub fn syns_sent(&self) -> u64 {
        self.counter("Tcp", "ActiveOpens") + self.syns_repeated()
    }

    /// How many first packets of TCP connections this host has sent again, since no reply came.
    pub fn syns_repeated(&self) -> u64 {
        self.counter("TcpExt", "TCPSynRetrans")
    }
}

/// The same counter of this thread's namespace.
pub fn counter(group: &str, name: &str) -> u64 {
    let text: String = ["snmp", "netstat"]
        .map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap())
        .concat();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let found = names.split(' ').zip(values.split(' ')).find(|(found, _)| *found == name);
    found.unwrap_or_else(|| panic!("no counter {group} {name}")).1.parse().unwrap()
}
