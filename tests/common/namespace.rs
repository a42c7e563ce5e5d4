//! Network namespaces joined by veth pairs.
//!
//! The tests run in a user namespace (`.cargo/config.toml`). A [`Net`] is a descriptor of a network namespace, which ends
//! when its last descriptor is closed.

use super::eventually;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

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
        // Without duplicate address detection an address is usable at once.
        net.sysctl("ipv6/conf/default/accept_dad", "0");
        net.ip("link set lo up");
        net
    }

    /// Runs a function in this namespace, in a thread of its own.
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

    /// Runs a program here, which must succeed; gives its standard output.
    pub fn command(&self, program: &str, args: &[&str]) -> String {
        let mut command = Command::new(program);
        command.args(args);
        self.output(command)
    }

    /// The same for a command that is prepared.
    pub fn output(&self, mut command: Command) -> String {
        let output = self.run(|| command.output().unwrap_or_else(|e| panic!("{command:?}: {e}")));
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
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

    /// Runs a shell command here.
    pub fn sh(&self, command: &str) {
        self.command("sh", &["-ec", command]);
    }

    /// Sets a sysctl of this namespace, named by its path below /proc/sys/net.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.run(|| std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap_or_else(|e| panic!("{name}: {e}")));
    }

    /// A path by which `ip link ... netns` finds this namespace.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Joins two namespaces by a veth pair; each end is an interface's name and its addresses.
    pub fn link(a: (&Net, &str, &[&str]), b: (&Net, &str, &[&str])) {
        const MACS: [&str; 2] = ["02:00:00:00:00:0a", "02:00:00:00:00:0b"];
        let [mac_a, mac_b] = MACS;
        let peer = format!("peer name {} address {mac_b} netns {}", b.1, b.0.path());
        a.0.ip(&format!("link add {} address {mac_a} type veth {peer}", a.1));
        for ((net, name, addrs), (_, _, neighbors), mac) in [(a, b, mac_b), (b, a, mac_a)] {
            for addr in addrs {
                net.ip(&format!("addr add {addr} dev {name}"));
            }
            net.ip(&format!("link set {name} up"));
            // Neighbor discovery may take a second.
            for neighbor in neighbors {
                let (neighbor, _) = neighbor.split_once('/').unwrap();
                net.ip(&format!("neigh add {neighbor} lladdr {mac} dev {name}"));
            }
        }
    }

    /// Waits until an interface with a fresh carrier answers to its IPv6 addresses.
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
        eventually(&format!("IPv6 on {interface}"), || self.run(ready));
    }

    /// Waits until this host answers to its addresses on these interfaces.
    pub fn ready(&self, interfaces: &[&str]) {
        interfaces.iter().for_each(|interface| self.wait_for_ipv6(interface));
    }

    /// Makes this host a router.
    pub fn forward(&self) {
        self.sysctl("ipv4/ip_forward", "1");
        self.sysctl("ipv6/conf/all/forwarding", "1");
    }

    /// Everything that rules could have changed here, as text, except routes that the kernel adds by itself, sooner or
    /// later.
    pub fn state(&self) -> String {
        let routes = ["-4 route show table all", "-6 route show table all"].map(|args| {
            let others = |line: &&str| !line.contains("proto kernel");
            self.ip(args).lines().filter(others).collect::<Vec<_>>().join("\n")
        });
        let rules = ["-4 rule", "-6 rule"].map(|args| self.ip(args));
        [&[self.nft("list tables")], &rules[..], &routes[..]].concat().join("--\n")
    }
}

/// Lets the legacy iptables lock its file in /run, which only root of the host may open: the mount namespace of the tests
/// (`.cargo/config.toml`) gets an empty /run.
fn let_iptables_lock() {
    static SET: std::sync::Once = std::sync::Once::new();
    SET.call_once(|| {
        // Root who runs the tests in the mount namespace of the host can lock the file in the host's /run.
        let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        if mounts("1").is_none_or(|host| Some(host) != mounts("self")) {
            mount_tmpfs("/run");
        }
    });
}

/// Mounts an empty directory over a directory, in this process's mount namespace.
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
