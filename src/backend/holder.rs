//! Which processes hold a netlink socket, as far as /proc shows: the kernel names the owner of a table by the socket's
//! port only, and the process in that number may have ended while a forked child of it still has the socket.

use std::fmt;
use std::fs;

/// NETLINK_NETFILTER, `linux/netlink.h`.
const NETFILTER: &str = "12";
/// More processes and descriptors than this are not looked at, for want of time.
const MOST_LINKS: usize = 200_000;

/// A process that has a descriptor of the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    pub pid: u32,
    /// The program's name, as the process may choose it: at most 15 bytes of anything.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name.escape_debug())
    }
}

/// The processes of this PID namespace that hold the nf_tables socket of a port in this network namespace, by their ids.
/// None: nothing is known, because they are in another PID namespace, belong to another user, or there is no /proc.
pub(crate) fn holders_of(port: u32) -> Vec<Holder> {
    let sockets = fs::read_to_string("/proc/thread-self/net/netlink").unwrap_or_default();
    let Some(inode) = inode_of(&sockets, port) else { return Vec::new() };
    let wanted = format!("socket:[{inode}]");
    let mut left = MOST_LINKS;
    let mut found: Vec<Holder> = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let holds = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten().any(|link| {
            left = left.saturating_sub(1);
            left > 0 && fs::read_link(link.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str())
        });
        if holds {
            let name = fs::read(entry.path().join("comm")).unwrap_or_default();
            found.push(Holder { pid, name: String::from_utf8_lossy(name.trim_ascii_end()).into_owned() });
        }
        if left == 0 {
            break;
        }
    }
    found.sort_by_key(|holder| holder.pid);
    found
}

/// The inode of a netlink socket of nf_tables in /proc/net/netlink: columns sk, Eth (the protocol), Pid (the port),
/// Groups, Rmem, Wmem, Dump, Locks, Drops, Inode (`netlink_native_seq_show`).
fn inode_of(sockets: &str, port: u32) -> Option<u64> {
    sockets.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let is_it = words.next() == Some(NETFILTER) && words.next()?.parse() == Ok(port);
        is_it.then(|| words.nth(6)?.parse().ok()).flatten()
    })
}

/// Who has the table of a port, in words; `opener` is the process that its number names.
pub(crate) fn described(port: u32, opener: u32) -> String {
    let holders = holders_of(port);
    let all = holders.iter().map(Holder::to_string).collect::<Vec<_>>().join(", ");
    if holders.is_empty() {
        return "a process that cannot be seen from here (of another user, or in another PID namespace)".to_owned();
    }
    if holders.iter().any(|holder| holder.pid == opener) {
        return all;
    }
    format!(
        "{all}, forked from process {opener}, which installed them and has ended (a forked child keeps the rules of its \
         parent until it calls tp_forget_rules, executes a program or ends),"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn inode_of_port_is_that_of_the_nf_tables_socket() {
        let listing = "\
sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode
0000000000000000 0   4711       00000000 0        0        0     2        0        11
0000000000000000 12  4711       00000000 0        0        0     2        0        12
0000000000000000 12  4712       00000000 0        0        0     2        0        13
";
        assert_eq!(inode_of(listing, 4711), Some(12));
        assert_eq!(inode_of(listing, 4712), Some(13));
        assert_eq!(inode_of(listing, 1), None);
    }

    proptest! {
        #[test]
        fn inode_of_any_text_does_not_panic(text: String, port: u32) {
            inode_of(&text, port);
        }
    }
}
