//! PrefixList processes hold a netlink socket, as far as /proc shows: the kernel names the owner of a table by the socket's
//! port only (NFTA_TABLE_OWNER), and the process in that number may have ended while a forked child of it still has the
//! socket, or be one of another PID namespace.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::Path;

use crate::name::Name;
use crate::netlink::channel::process_of_port;

/// More descriptors than this are not looked at, to bound the time: each takes a system call.
const DESCRIPTORS_MAX: usize = 30_000;
/// To look at a process takes as long as to look at so many descriptors.
const DESCRIPTORS_A_PROCESS: usize = 5;
/// More processes than this are not named.
const NAMED_MAX: usize = 16;

/// A process that has a descriptor of the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub pid: u32,
    /// The program's name, as the process may choose it: at most 15 bytes of anything.
    pub name: Name,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// Who has a netlink socket open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Holder {
    /// These processes of this PID namespace, by their ids: each was seen to have it open.
    Processes(Vec<Process>),
    /// No process that /proc shows, and it shows all of this PID namespace.
    Elsewhere,
    /// /proc does not tell, or does not show every process.
    Unknown,
}

impl Holder {
    /// The processes that were seen to have it open.
    pub fn processes(&self) -> &[Process] {
        match self {
            Holder::Processes(processes) => processes,
            Holder::Elsewhere | Holder::Unknown => &[],
        }
    }
}

impl Holder {
    /// The same in words, with the numbers of processes only.
    pub fn by_number(&self) -> String {
        let pids: Vec<String> = self.processes().iter().map(|process| process.pid.to_string()).collect();
        match pids.as_slice() {
            [] => self.to_string(),
            [pid] => format!("process {pid}"),
            pids => format!("processes {}", pids.join(", ")),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Elsewhere => f.write_str("a process in another PID namespace"),
            Holder::Unknown => {
                f.write_str("a process that cannot be seen from here (of another user, or without /proc)")
            }
            Holder::Processes(processes) => {
                for (number, process) in processes.iter().enumerate() {
                    let joint = if number == 0 { "" } else { ", " };
                    write!(f, "{joint}{process}")?;
                }
                Ok(())
            }
        }
    }
}

/// Who has the table of a port, in words; `opener` is the process that its number names.
pub(crate) fn described(port: u32, opener: u32) -> String {
    let holder = holders(&[port]).pop().unwrap_or(Holder::Unknown);
    let processes = holder.processes();
    if processes.is_empty() || processes.iter().any(|process| process.pid == opener) {
        return holder.to_string();
    }
    format!(
        "{holder}, forked from process {opener}, which installed them and has ended or closed its descriptors (a forked child keeps the rules of its \
         parent until it calls tp_forget_rules, executes a program or ends),"
    )
}

/// Who has each of these sockets of NETLINK_NETFILTER open, by their ports.
pub(crate) fn holders(ports: &[u32]) -> Vec<Holder> {
    if ports.is_empty() || !proc_is_of_this_namespace() {
        return vec![Holder::Unknown; ports.len()];
    }
    // A file that is not UTF-8, or not there, names no socket.
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap_or_default();
    let inodes = inodes_of(&sockets);
    let sockets = ports.iter().map(|port| (inodes.get(port).copied(), Vec::new())).collect();
    let mut search = Search { sockets, left: DESCRIPTORS_MAX, incomplete: false };
    // Mostly it is the process that opened the socket, or a child of it that has a copy.
    for (number, port) in ports.iter().enumerate() {
        search.look_at_family(number, process_of_port(*port));
    }
    if search.sockets.iter().any(|(inode, pids)| inode.is_some() && pids.is_empty()) {
        search.look_at_all();
    }
    let complete = !search.incomplete;
    let holder = |(inode, mut pids): (Option<u64>, Vec<u32>)| {
        pids.sort_unstable();
        pids.dedup();
        pids.truncate(NAMED_MAX);
        match inode {
            _ if !pids.is_empty() => Holder::Processes(pids.into_iter().map(named).collect()),
            Some(_) if complete => Holder::Elsewhere,
            _ => Holder::Unknown,
        }
    };
    search.sockets.into_iter().map(holder).collect()
}

fn named(pid: u32) -> Process {
    let name = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    Process { pid, name: Name::new(name.strip_suffix(b"\n").unwrap_or(&name)) }
}

/// A process id from /proc means the same to kill(2): /proc may have been mounted for another PID namespace.
fn proc_is_of_this_namespace() -> bool {
    let own = std::fs::read_link("/proc/self").ok();
    own.and_then(|pid| pid.to_str()?.parse().ok()) == Some(std::process::id())
}

/// The inodes of the netlink sockets of nf_tables in /proc/net/netlink, by their ports: columns sk, Eth (the protocol),
/// Pid (the port), Groups, Rmem, Wmem, Dump, Locks, Drops, Inode (`netlink_native_seq_show`).
fn inodes_of(sockets: &str) -> HashMap<u32, u64> {
    let socket = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let protocol: i32 = words.next()?.parse().ok()?;
        let port = words.next()?.parse().ok()?;
        let inode = words.nth(6)?.parse().ok()?;
        (protocol == libc::NETLINK_NETFILTER).then_some((port, inode))
    };
    sockets.lines().filter_map(socket).collect()
}

struct Search {
    /// The inode of each socket, if it is known, and the processes that have it open.
    sockets: Vec<(Option<u64>, Vec<u32>)>,
    /// So many descriptors may still be looked at.
    left: usize,
    /// Some process or descriptor could not be looked at.
    incomplete: bool,
}

impl Search {
    /// Looks at a process and, if it has the socket, at its children, and theirs.
    fn look_at_family(&mut self, number: usize, pid: u32) {
        let Some((Some(inode), _)) = self.sockets.get(number) else { return };
        let inode = *inode;
        let (mut next, mut known) = (vec![pid], vec![pid]);
        while let Some(pid) = next.pop() {
            if !self.look_at(pid, Some(inode)) || known.len() > NAMED_MAX {
                continue;
            }
            for child in children(pid) {
                if !known.contains(&child) {
                    known.push(child);
                    next.push(child);
                }
            }
        }
    }

    fn look_at_all(&mut self) {
        let mut init = false;
        match std::fs::read_dir("/proc") {
            Ok(entries) => {
                for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
                    init |= pid == 1;
                    self.look_at(pid, None);
                }
            }
            Err(_) => self.incomplete = true,
        }
        // Mounted with hidepid, /proc does not even list the processes of others.
        self.incomplete |= !init;
    }

    /// Notes which of the sockets a process has open, as far as the one that is wanted, if it is any; gives whether it has
    /// that one.
    fn look_at(&mut self, pid: u32, wanted: Option<u64>) -> bool {
        self.left = self.left.saturating_sub(DESCRIPTORS_A_PROCESS);
        let entries = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(entries) => entries,
            Err(error) => {
                // A process that has ended has nothing open.
                self.incomplete |= !has_ended(&error);
                return false;
            }
        };
        for entry in entries {
            if self.left == 0 {
                self.incomplete = true;
                break;
            }
            self.left -= 1;
            let held = match entry.and_then(|entry| std::fs::read_link(entry.path())) {
                Ok(target) => inode_in(&target),
                Err(error) => {
                    self.incomplete |= !has_ended(&error);
                    continue;
                }
            };
            let Some(held) = held else { continue };
            for (inode, pids) in &mut self.sockets {
                if *inode == Some(held) && !pids.contains(&pid) {
                    pids.push(pid);
                }
            }
            if wanted == Some(held) {
                return true;
            }
        }
        false
    }
}

/// A process, or a descriptor, that is there no more.
fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// The inode of a socket, by what its descriptor links to.
fn inode_in(target: &Path) -> Option<u64> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The children of a process, as far as the kernel tells (CONFIG_PROC_CHILDREN).
fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().take(NAMED_MAX) {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(children.split_ascii_whitespace().filter_map(|child| child.parse::<u32>().ok()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Channel;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    #[test]
    fn inode_is_found_by_protocol_and_port() {
        let text = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
                    0000000000000000 0   4711       00000000 0        0        0     2        0        10001\n\
                    0000000000000000 12  4711       00000000 0        0        0     2        0        10002\n";
        assert_eq!(inodes_of(text), [(4711, 10002)].into());
    }

    #[test]
    fn holder_of_open_socket_is_this_process() {
        let socket = Channel::socket(libc::NETLINK_NETFILTER).unwrap();
        let port = crate::sys::netlink_port(socket.as_fd()).unwrap();
        // A child of a parallel test may have a copy for a moment, until it executes its program.
        let [holder, other] = holders(&[port, 1]).try_into().unwrap();
        assert!(holder.processes().iter().any(|process| process.pid == std::process::id()), "{holder:?}");
        assert_eq!(other, Holder::Unknown);
        drop(socket);
        assert_eq!(holders(&[port]), [Holder::Unknown]);
    }

    #[test]
    fn holder_name_is_shown_with_escapes() {
        let process = |pid, name: &str| Process { pid, name: name.into() };
        let holder = Holder::Processes(vec![process(7, "a\u{202e}\n"), process(8, "b")]);
        assert_eq!(holder.by_number(), "processes 7, 8");
        assert_eq!(holder.to_string(), "process 7 (a\\u{202e}\\u{a}), process 8 (b)");
    }

    proptest! {
        #[test]
        fn inodes_of_any_text_do_not_panic(text in "(?s)[ 0-9a-f\n]{0,200}") {
            inodes_of(&text);
        }
    }
}
