//! Network namespaces joined by veth pairs.
//!
//! The tests run in a user namespace (`.cargo/config.toml`). A [`Net`] is a descriptor of a network namespace, which ends
//! when its last descriptor is closed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::PATIENCE;

/// A network namespace.
pub struct Net(File);

impl Net {
    pub fn new() -> Net {
        let file = std::thread::spawn(|| {
            // SAFETY: plain system call; it changes this new thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let net = Net(file.join().unwrap());
        let_iptables_lock();
        // An address is to be had at once, not after a second of asking who else has it.
        net.sysctl("ipv6/conf/default/accept_dad", "0");
        net.ip("link set lo up");
        net
    }

    /// Runs something in this namespace, in a thread of its own.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: plain system call; it changes this new thread alone.
                let rc = unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a command here; gives what it printed.
    pub fn command(&self, program: &str, args: &[&str]) -> String {
        let output =
            self.run(|| Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}")));
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn ip(&self, args: &str) -> String {
        self.command("ip", &args.split_whitespace().collect::<Vec<_>>())
    }

    pub fn nft(&self, script: &str) -> String {
        self.nft_with(&[script])
    }

    pub fn nft_with(&self, args: &[&str]) -> String {
        self.command("nft", args)
    }

    /// Runs a shell command here, as a person would who was told to.
    pub fn sh(&self, command: &str) {
        self.command("sh", &["-ec", command]);
    }

    /// Sets a sysctl of this namespace, named by its path below /proc/sys/net.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.run(|| std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap_or_else(|e| panic!("{name}: {e}")));
    }

    /// A path by which `ip link ... netns` finds this namespace.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Joins two namespaces by a veth pair; each end is an interface's name and its addresses.
    pub fn link(a: (&Net, &str, &[&str]), b: (&Net, &str, &[&str])) {
        const MACS: [&str; 2] = ["02:00:00:00:00:0a", "02:00:00:00:00:0b"];
        let [mac_a, mac_b] = MACS;
        let peer = format!("peer name {} address {mac_b} netns {}", b.1, b.0.path());
        a.0.ip(&format!("link add {} address {mac_a} type veth {peer}", a.1));
        for ((net, name, addrs), (_, _, neighbours), mac) in [(a, b, mac_b), (b, a, mac_a)] {
            for addr in addrs {
                net.ip(&format!("addr add {addr} dev {name}"));
            }
            net.ip(&format!("link set {name} up"));
            // The first question for a neighbour may take a second to be answered.
            for neighbour in neighbours {
                let (neighbour, _) = neighbour.split_once('/').unwrap();
                net.ip(&format!("neigh add {neighbour} lladdr {mac} dev {name}"));
            }
        }
    }

    /// Until then an interface with a fresh carrier answers to none of its IPv6 addresses.
    fn wait_for_ipv6(&self, interface: &str) {
        const TENTATIVE: u32 = 0x40;
        let ready = || {
            let text = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
            let mut flags = text.lines().filter(|line| line.ends_with(&format!(" {interface}"))).map(|line| {
                let field = line.split_whitespace().nth(4).unwrap();
                u32::from_str_radix(field, 16).unwrap()
            });
            // The link-local address comes with the carrier.
            text.lines().any(|line| line.starts_with("fe80") && line.ends_with(&format!(" {interface}")))
                && flags.all(|flags| flags & TENTATIVE == 0)
        };
        let deadline = Instant::now() + PATIENCE;
        while !self.run(ready) {
            assert!(Instant::now() < deadline, "{interface} has no IPv6");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it answers to its addresses on these interfaces.
    pub fn ready(&self, interfaces: &[&str]) {
        interfaces.iter().for_each(|interface| self.wait_for_ipv6(interface));
    }

    /// Makes this host a router.
    pub fn forward(&self) {
        self.sysctl("ipv4/ip_forward", "1");
        self.sysctl("ipv6/conf/all/forwarding", "1");
    }

    /// Everything that rules could have changed here, as text: but for routes that the kernel makes by itself, when it
    /// gets round to it.
    pub fn state(&self) -> String {
        let routes = ["-4 route show table all", "-6 route show table all"].map(|args| {
            let others = |line: &&str| !line.contains("proto kernel");
            self.ip(args).lines().filter(others).collect::<Vec<_>>().join("\n")
        });
        let rules = ["-4 rule", "-6 rule"].map(|args| self.ip(args));
        [&[self.nft("list tables")], &rules[..], &routes[..]].concat().join("--\n")
    }
}

/// The legacy iptables locks a file in /run, which only root of the host may open. The mount namespace of the tests
/// (`.cargo/config.toml`) gets an empty /run.
fn let_iptables_lock() {
    static SET: std::sync::Once = std::sync::Once::new();
    SET.call_once(|| {
        // Root without a mount namespace of the tests has the true /run, and may lock the file there.
        let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        if mounts("1").is_none_or(|host| Some(host) != mounts("self")) {
            mount_tmpfs("/run");
        }
    });
}

/// Puts an empty directory in the place of one, in this process's mount namespace.
pub fn mount_tmpfs(directory: &str) {
    let directory = std::ffi::CString::new(directory).unwrap();
    // SAFETY: NUL-terminated texts, and no options.
    let rc = unsafe { libc::mount(c"tmpfs".as_ptr(), directory.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    assert_eq!(
        rc,
        0,
        "mount {directory:?}: {}; `unshare --map-root-user --net --mount PROGRAM`",
        std::io::Error::last_os_error()
    );
}
