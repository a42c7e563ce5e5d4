//! Every kind of finding: the source of the texts of `tp_check` and of `docs/troubleshooting.md`.

use std::fmt::{self, Write};

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// The check passed.
    Ok,
    /// Information.
    Note,
    /// Some traffic may be lost, or may not be intercepted.
    Warning,
    /// Interception cannot work.
    Failure,
}

/// Kind of a finding, without the values of one host.
#[derive(Debug)]
#[non_exhaustive]
pub struct Kind {
    /// Identifier. It is stable: programs may depend on it.
    pub id: &'static str,
    /// Effect on traffic.
    pub impact: &'static str,
    /// Usual command that fixes it, with names in braces for the values of the host. Empty: no command fixes it.
    pub fix: &'static str,
}

impl PartialEq for Kind {
    fn eq(&self, other: &Kind) -> bool {
        self.id == other.id
    }
}

impl Eq for Kind {}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// Kind of the finding.
    pub kind: &'static Kind,
    /// Severity on this host.
    pub severity: Severity,
    /// Text with the values of this host.
    pub message: String,
    /// Command for `sh` that fixes it. Empty: no command fixes it.
    pub fix: String,
}

impl Finding {
    /// Replaces one name in braces in the fix.
    pub(crate) fn with(&mut self, name: &str, value: &dyn fmt::Display) -> &mut Finding {
        let mut pieces = self.fix.split('{');
        let mut filled = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            // Writing to a String does not fail.
            let _ = match piece.strip_prefix(name).and_then(|rest| rest.strip_prefix('}')) {
                Some(rest) => write!(filled, "{value}{rest}"),
                None => write!(filled, "{{{piece}"),
            };
        }
        self.fix = filled;
        self
    }

    /// Replaces the usual command of the kind by one for this host.
    pub(crate) fn fix_with(&mut self, command: fmt::Arguments<'_>) -> &mut Finding {
        self.fix.clear();
        self.and(command)
    }

    /// Removes the fix: no command fixes it on this host.
    pub(crate) fn without_fix(&mut self) -> &mut Finding {
        self.fix_with(format_args!(""))
    }

    /// Appends a command that runs if the commands before it have succeeded. An empty command appends nothing.
    pub(crate) fn and(&mut self, command: fmt::Arguments<'_>) -> &mut Finding {
        let before = self.fix.len();
        let joint = if before == 0 { "" } else { " && " };
        let _ = write!(self.fix, "{joint}{command}");
        if self.fix.len() == before + joint.len() {
            self.fix.truncate(before);
        }
        self
    }
}

/// Findings, in the order in which they were reported.
#[derive(Debug, Default)]
pub(crate) struct Findings(pub Vec<Finding>);

impl Findings {
    /// Adds a finding with the fix of its kind, which the caller may complete or replace.
    #[inline(never)]
    pub(crate) fn push(
        &mut self,
        severity: Severity,
        kind: &'static Kind,
        message: fmt::Arguments<'_>,
    ) -> &mut Finding {
        let at = self.0.len();
        self.0.push(Finding { kind, severity, message: message.to_string(), fix: kind.fix.to_owned() });
        &mut self.0[at]
    }
}

macro_rules! kinds {
    ($($name:ident = $id:literal, $symptom:literal, $cause:literal, $impact:literal, $fix:literal;)*) => {
        $(pub(crate) const $name: &Kind = &Kind { id: $id, impact: $impact, fix: $fix };)*
        /// Every kind, in the order of the troubleshooting page.
        #[cfg(test)]
        pub(super) const ENTRIES: &[super::troubleshooting::Entry] = &[$(super::troubleshooting::Entry { kind: $name, symptom: $symptom, cause: $cause }),*];
    };
}

kinds! {
    // Capabilities of this process, and features of the kernel.
    NET_ADMIN = "privilege.net_admin",
        "tp_install_rules fails with EPERM",
        "The process has no CAP_NET_ADMIN in the user namespace that owns this network namespace. Root can start the \
         program with the capability by setpriv(1); --reuid, --regid and --clear-groups select another user. A systemd unit \
         grants it by AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW. Do not use file capabilities: every user who can execute \
         the file would have them.",
        "The process cannot install rules. No traffic is intercepted.",
        "setpriv --inh-caps=+net_admin,+net_raw --ambient-caps=+net_admin,+net_raw PROGRAM";
    BIND_SERVICE = "privilege.bind_service",
        "", "The process has no CAP_NET_BIND_SERVICE.",
        "Listeners cannot use ports below net.ipv4.ip_unprivileged_port_start, and TP_CONNECT_KEEP_PORT does not keep \
         such ports.", "";
    TRANSPARENT = "privilege.transparent",
        "tp_socket, tp_listen or tp_connect_from fail with EPERM",
        "The kernel refused to set IP_TRANSPARENT: the process has neither CAP_NET_RAW nor CAP_NET_ADMIN. \
         privilege.net_admin describes how to start a program with them.",
        "No socket can be transparent. Intercepted packets find no listener.",
        "setpriv --inh-caps=+net_admin,+net_raw --ambient-caps=+net_admin,+net_raw PROGRAM";
    FAMILY = "kernel.family",
        "Sockets of one address family fail with EAFNOSUPPORT",
        "This process cannot create sockets of this family: the kernel was built or booted without it, or a seccomp \
         filter (RestrictAddressFamilies= of systemd) refuses them.",
        "Connections of this family are not intercepted.",
        "";
    NF_TABLES = "kernel.nf_tables",
        "tp_install_rules fails with EOPNOTSUPP and names CONFIG_NF_TABLES",
        "The kernel refused a test transaction, which is never committed: it has no nf_tables for the inet family.",
        "Rules can be installed only with iptables, where they have no owner.",
        "modprobe nf_tables";
    NFT_SOCKET = "kernel.nft_socket",
        "tp_install_rules fails with EOPNOTSUPP and names `socket`",
        "The kernel refused a test transaction: it has no `socket` expression, or one without `wildcard` (Linux 5.10).",
        "Packets cannot be delivered to the transparent sockets that they belong to.",
        "modprobe nft_socket";
    NFT_TPROXY = "kernel.nft_tproxy",
        "tp_install_rules fails with EOPNOTSUPP and names `tproxy`",
        "The kernel refused a test transaction: it has no `tproxy` expression.",
        "TPROXY cannot be used. TP_RULES_REDIRECT may work.",
        "modprobe nft_tproxy";
    NFT_FIB = "kernel.nft_fib",
        "tp_install_rules fails with EOPNOTSUPP and names `fib`",
        "The kernel refused a test transaction: it has no `fib` expression for the inet family.",
        "Rules cannot distinguish this host's own addresses from other addresses.",
        "modprobe nft_fib_inet";
    OWNER = "kernel.owner_tables",
        "tp_install_rules fails with EOPNOTSUPP and names Linux 5.12",
        "The kernel refused a test transaction: tables cannot belong to a process.",
        "The kernel would not remove rules when their process ends.",
        "";
    PERSIST = "kernel.persistent_tables",
        "tp_install_rules with TP_RULES_PERSIST fails with EOPNOTSUPP",
        "The kernel refused a test transaction: tables that remain when their owner ends need Linux 6.9.",
        "TP_RULES_PERSIST does not work. Other rules are not affected.",
        "";
    RULE_TABLES = "kernel.policy_routing",
        "tp_install_rules fails with EOPNOTSUPP and names CONFIG_IP_MULTIPLE_TABLES",
        "The kernel has no routing policy rules for this family.",
        "Marked packets cannot be routed to local sockets.",
        "";
    VERSION = "kernel.version",
        "", "The release of the kernel.", "Linux 5.12 or newer is needed.", "";
    IPTABLES = "iptables.variants",
        "", "The installed variants of iptables, and the tables that each has.",
        "A firewall may have rules in either variant. Each program shows only its own rules.", "";
    UNSEEN = "check.unseen",
        "", "A part of the host could not be read, or a list is longer than the check reads.",
        "Faults in this part are not reported.", "";

    // Sockets and their owners.
    LISTENER_GONE = "listener.gone",
        "Connections time out, although the rules are installed",
        "Rules deliver packets to a port on which no socket listens.",
        "Packets that match the rules are dropped.",
        "kill {pid}";
    NOT_TRANSPARENT = "listener.not_transparent",
        "Connections time out, although a socket listens on the proxy's port",
        "The listener is not transparent. The kernel delivers intercepted packets only to transparent sockets.",
        "Packets that match the rules are dropped.",
        "kill {pid}";
    UNREACHABLE = "listener.unreachable",
        "Connections time out, although the proxy listens",
        "The listener's address is not the one that the rule delivers to. A rule without an address finds a \
         listener on the wildcard address or on an address of the interface on which the packet arrived, but not a listener on \
         loopback.",
        "Packets that match the rules are dropped.",
        "kill {pid}";
    BOUND = "listener.bound_to_interface",
        "Connections of some clients time out, and those of other clients work",
        "The listener is bound to an interface (SO_BINDTODEVICE), and the rule delivers packets from every interface.",
        "Packets that arrive on another interface are dropped.",
        "kill {pid}";
    LISTENER_FULL = "listener.full",
        "New connections take seconds or time out under load",
        "The listener's queue is full: the program does not accept as fast as clients connect.",
        "The kernel drops the first packet of further connections. The clients send it again a second later.",
        "";
    STOPPED = "owner.stopped",
        "Connections are established, but no data is received",
        "The process that owns the rules is stopped (SIGSTOP, or Ctrl-Z in a shell).",
        "The kernel establishes connections until the queue of the listener is full. The process serves none of them.",
        "kill -CONT {pid}";
    ORPHAN = "instance.orphaned",
        "Connections time out after the proxy has ended",
        "Rules installed with TP_RULES_PERSIST exist, and no process owns them.",
        "Packets that match the rules are dropped until the program runs again.",
        "nft delete table inet {table}";
    IPTABLES_ORPHAN = "instance.iptables_orphaned",
        "Connections time out after the proxy was killed",
        "iptables chains of this library exist, and the process that installed them has ended.",
        "Packets that match the rules are dropped until the program runs again.",
        "iptables -t mangle -D PREROUTING {number}";
    INSTANCE = "instance",
        "", "Rules of this library are installed.", "Traffic is intercepted.", "";

    // Routing.
    LO_DOWN = "route.loopback_down",
        "Connections time out since `lo` went down",
        "The loopback interface is down. The kernel then deletes the local route of IPv6.",
        "Intercepted packets do not reach the listener. IPv4 packets are dropped while lo is down. IPv6 packets are \
         dropped until the route is added again.",
        "ip link set lo up{routes}";
    ROUTE_MISSING = "route.missing",
        "Connections time out, although the rules count packets as intercepted",
        "The routing table for marked packets has no local default route.",
        "Marked packets are not delivered to the listener. The kernel drops a packet that was assigned to a listener \
         and is then forwarded.",
        "ip {flag} route add local default dev lo table {table}";
    ROUTE_FOREIGN = "route.foreign",
        "Connections to some destinations time out, although the rules count packets as intercepted",
        "The routing table that delivers packets to local sockets has routes that this library did not add.",
        "Packets to these destinations are not delivered to the listener. The kernel drops a packet that was assigned \
         to a listener and is then forwarded.",
        "ip {flag} route del {kind} {destination} table {table}";
    RULE_MISSING = "rule.missing",
        "Connections time out, although the rules count packets as intercepted",
        "The routing policy rule that routes marked packets to local sockets does not exist. Some network managers \
         delete rules \
         that they did not add (systemd-networkd: ManageForeignRoutingPolicyRules).",
        "Marked packets do not reach the listener. The kernel drops a packet that was assigned to a listener and is \
         then forwarded.",
        "ip {flag} rule add pref {pref} fwmark {mark} lookup {table}";
    GUARD_MISSING = "rule.guard_missing",
        "Packets are dropped as martians after src_valid_mark is set",
        "The routing policy rules that exempt the reverse-path check are incomplete.",
        "If src_valid_mark or tcp_fwmark_accept is set, intercepted packets or replies to them are dropped.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} goto {after}";
    RULE_SHADOWED = "rule.shadowed",
        "Connections time out, although the rules count packets as intercepted",
        "A routing policy rule of another program precedes the rules of this library and matches marked packets too.",
        "That rule sends marked packets elsewhere. The kernel drops a packet that was assigned to a listener and is \
         then forwarded.",
        "ip {flag} rule add pref {pref} fwmark {mark} lookup {table}";
    RULE_MARK = "rule.mark_collision",
        "Connections time out, although the rules count packets as intercepted",
        "A routing policy rule of another program matches bits of the mark of this library, and precedes its rules.",
        "That rule sends intercepted packets elsewhere. The kernel drops a packet that was assigned to a listener and \
         is then forwarded.",
        "ip {flag} rule add pref {pref} fwmark {mark} lookup {table}";
    TABLE_SHARED = "rule.table_shared",
        "Traffic that should not be intercepted is refused or lost",
        "A routing policy rule of another program selects the routing table that delivers packets to local sockets.",
        "Packets that match that rule are delivered to this host instead of being forwarded.",
        "ip {flag} rule del pref {pref}";
    RULE_DUPLICATE = "rule.duplicate",
        "`ip rule` shows the same rule several times",
        "The same routing policy rule exists more than once, usually because a script ran more than once.",
        "The kernel compares every packet with each of the rules. Deleting one rule does not delete the others.",
        "ip {flag} rule del pref {pref}";
    RULE_ORPHAN = "rule.orphaned",
        "`ip rule` shows rules of a proxy that has ended",
        "Routing policy rules of this library exist, and their instance has ended.",
        "None, unless another program sets the mark. The next tp_install_rules or tp_purge_rules removes them.",
        "ip {flag} rule del pref {pref} protocol 116";
    LOCAL_MISSING = "rule.local_missing",
        "The host does not reply on its own addresses",
        "No routing policy rule selects the local table.",
        "Packets to addresses of this host are forwarded or dropped, including replies to the proxy.",
        "ip {flag} rule add pref 0 lookup local";
    MAIN_MISSING = "rule.main_missing",
        "Intercepted connections time out, and the host cannot reach any other host",
        "No routing policy rule selects the main table.",
        "Replies to clients and connections to servers have no route.",
        "ip {flag} rule add pref 32766 lookup main";

    // Sysctls.
    SRC_VALID_MARK = "sysctl.src_valid_mark",
        "Packets are dropped as martians since WireGuard or Tailscale was installed",
        "src_valid_mark is set, and the routing rule of a TPROXY setup sends every marked packet to a local route. \
         The lookup of the reverse-path check matches that rule too.",
        "Every intercepted packet is dropped as a martian.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} lookup main";
    FWMARK_ACCEPT = "sysctl.tcp_fwmark_accept",
        "Connections time out: the listener never accepts",
        "tcp_fwmark_accept copies the packet's mark to the accepted socket, and the routing rule of a TPROXY setup \
         sends marked packets to a local route.",
        "Replies to clients are delivered to this host.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} lookup main";
    RP_FILTER = "sysctl.rp_filter",
        "Packets of some clients are lost, and those of other clients are not",
        "rp_filter is strict and has dropped packets: they arrive on an interface that is not the one of the route \
         back to the client.",
        "Packets of these clients are dropped before they are intercepted.",
        "sysctl -w net/ipv4/conf/{interface}/rp_filter=2";
    IP_FORWARD = "sysctl.ip_forward",
        "Intercepted traffic works, and all other traffic does not",
        "net.ipv4.ip_forward is 0: this host is not an IPv4 router.",
        "IPv4 packets that are not intercepted are dropped.",
        "sysctl -w net.ipv4.ip_forward=1";
    FORWARDING_V6 = "sysctl.forwarding_v6",
        "Intercepted IPv6 traffic works, and all other IPv6 traffic does not",
        "net.ipv6.conf.all.forwarding is 0: this host is not an IPv6 router. A router accepts no router \
         advertisements, \
         unless accept_ra is 2.",
        "IPv6 packets that are not intercepted are dropped.",
        "sysctl -w net/ipv6/conf/{interface}/accept_ra=2 && sysctl -w net.ipv6.conf.all.forwarding=1";
    FORWARDING_INTERFACE = "sysctl.forwarding_interface",
        "Intercepted traffic works, and all other traffic from one interface does not",
        "Forwarding is enabled for the host and disabled for an interface.",
        "Packets that arrive on this interface and are not intercepted are dropped.",
        "sysctl -w net/ipv4/conf/{interface}/forwarding=1";
    BRIDGE_V4 = "sysctl.bridge_nf_call_iptables",
        "Connections of hosts behind a bridge are refused or time out (containers, virtual machines)",
        "bridge-nf-call-iptables is 1, and a bridge exists: packets pass the rules in the bridge, and do not pass \
         them again as \
         IP packets. If another program has rules in the forward hook, they may be meant for bridged packets; the finding \
         then suggests no command.",
        "The kernel loses the assigned listener between the bridge and the IP layer.",
        "sysctl -w net.bridge.bridge-nf-call-iptables=0";
    BRIDGE_V6 = "sysctl.bridge_nf_call_ip6tables",
        "IPv6 connections of hosts behind a bridge are refused or time out",
        "bridge-nf-call-ip6tables is 1, and a bridge exists: packets pass the rules in the bridge, and do not pass \
         them again as \
         IP packets.",
        "The kernel loses the assigned listener between the bridge and the IP layer.",
        "sysctl -w net.bridge.bridge-nf-call-ip6tables=0";
    ROUTE_LOCALNET = "sysctl.route_localnet",
        "Redirected connections time out, and the listener is on 127.0.0.1",
        "A rule translates destinations to 127.0.0.1, and route_localnet is 0. If only route_localnet were set, \
         neighbors could reach every service that listens on 127.0.0.1: the command first adds a rule that drops such \
         packets.",
        "The translated packets are dropped as martians.",
        "nft 'table ip transparent-localnet { chain prerouting { type filter hook prerouting priority raw; iifname != \
         \"lo\" \
         ip daddr 127.0.0.0/8 drop; }; }' && sysctl -w net.ipv4.conf.all.route_localnet=1";
    DISABLE_IPV6 = "sysctl.disable_ipv6",
        "IPv6 is no longer intercepted since it was disabled on `lo`",
        "net.ipv6.conf.lo.disable_ipv6 is 1: the kernel has deleted the local route of IPv6.",
        "Intercepted IPv6 packets are routed as if they had not been intercepted.",
        "sysctl -w net.ipv6.conf.lo.disable_ipv6=0{routes}";
    PORT_RANGE = "sysctl.ip_local_port_range",
        "tp_connect_from fails with EADDRNOTAVAIL when there are many connections",
        "The range of local ports is narrow.",
        "The number of connections from one client address to one server is limited by the number of ports.",
        "sysctl -w net.ipv4.ip_local_port_range='32768 60999'";
    EARLY_DEMUX = "sysctl.ip_early_demux",
        "", "ip_early_demux is 0.", "Packets of established connections are processed more slowly. No packet is \
         lost.", "";
    ACCEPT_LOCAL = "sysctl.accept_local",
        "", "accept_local is 1.", "Packets that arrive from the network with a source address of this host are \
         accepted.", "";

    // Packet filters of other programs.
    PREROUTING_DROP = "filter.prerouting_drop",
        "Connections time out, and the rules count no packet or only the first one",
        "A chain of another program drops packets that should be intercepted in the prerouting hook. A rule in a \
         chain before the \
         rules of this library can recognize these packets by their ports (`tcp dport 80 fib daddr type != local`), a rule in \
         a chain after them by the mark.",
        "The packets never reach the listener.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    INPUT_DROP = "filter.input_drop",
        "Connections time out, although the rules count packets as intercepted",
        "The input chain of the host's firewall drops packets that no rule accepts. Intercepted packets pass this \
         chain with \
         the original destination port.",
        "The packets never reach the listener.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    OUTPUT_DROP = "filter.output_drop",
        "Connections time out, and no replies of the proxy are seen on the network",
        "The output chain of the host's firewall drops packets that no rule accepts. The packets of the proxy have \
         source addresses of other hosts.",
        "Replies to clients and connections to servers are dropped.",
        "nft 'insert rule {chain} socket transparent 1 accept'";
    MARK_OVERWRITTEN = "filter.mark_overwritten",
        "Connections time out, although the rules count packets as intercepted",
        "A chain of another program, after the chains of this library, sets the packet's mark and does not preserve \
         the bits of this library.",
        "Without the mark, the packets are not routed to the listener. The kernel drops a packet that was assigned to \
         a listener and is then forwarded.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    MARK_COLLISION = "filter.mark_collision",
        "Traffic that should not be intercepted is refused or lost",
        "A rule of another program sets the mark that routes packets to local sockets. Configure another mark (`mark` \
         in \
         struct tp_rules_config), or remove the rule.",
        "Packets that match that rule are delivered to this host instead of being forwarded.",
        "nft delete rule {chain} handle {handle}";
    TPROXY_ELSEWHERE = "filter.tproxy_elsewhere",
        "Connections reach another proxy",
        "A chain of another program, after the chains of this library, assigns the same packets to another listener.",
        "The other listener receives the packets.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    NAT = "filter.nat",
        "tp_orig_dst returns an address that the client did not connect to, or connections time out",
        "A chain of another program translates the destination of packets that should be intercepted.",
        "The original destination is lost, or the packets never reach the rules.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    RPFILTER = "filter.rpfilter",
        "Connections time out with firewalld or another rpfilter rule",
        "A reverse-path rule drops packets without a route back on the interface on which they arrived, and its \
         lookup uses the \
         mark. The routing rule of a TPROXY setup sends every marked packet to a local route, and the lookup matches that rule \
         too.",
        "Every intercepted packet is dropped.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} lookup main";
    MASQUERADE = "filter.masquerade",
        "Servers see the proxy's address, not the client's",
        "A chain translates the source addresses of packets that leave this host, including connections of \
         tp_connect_from.",
        "Servers see this host as the client.",
        "nft 'insert rule {chain} meta skuid >= 0 fib saddr type != local accept'";
    KEEP_PORT = "conntrack.keep_port",
        "Connections that keep the client's port (TP_CONNECT_KEEP_PORT) sometimes time out or are reset",
        "Connection tracking is active. Both halves of a proxied connection have the same addresses and ports, and \
         connection \
         tracking treats them as one connection. TP_RULES_NOTRACK exempts them. A firewall that accepts `ct state \
         established` would drop untracked packets; the finding then suggests no command.",
        "With TP_CONNECT_KEEP_PORT, packets may be classified as invalid or translated wrongly.",
        "nft add rule inet transparent-untracked output socket transparent 1 notrack";
    CONNTRACK_FULL = "conntrack.full",
        "New connections time out at random, established ones work, and the kernel's log has `nf_conntrack: table \
         full`",
        "The number of tracked connections has nearly reached its limit.",
        "Packets of new connections are dropped.",
        "sysctl -w net.netfilter.nf_conntrack_max={max}";
    DESCRIPTORS = "limit.descriptors",
        "accept fails with EMFILE, and clients wait",
        "The descriptor limit of the process is low, or the process has nearly reached it. A proxy needs two \
         descriptors per connection.",
        "Further connections wait in the listener's queue.",
        "prlimit --pid {pid} --nofile={limit}";

    // Findings of the self-test.
    SELF_CONNECTION = "self_test.connection",
        "`tproxyctl self-test` loses a connection",
        "In the temporary network namespace, the connection did not reach the listener with the expected addresses, \
         or the reply \
         did not reach the client. No other rules exist there: the cause is the configuration or the kernel.",
        "Such connections do not reach the listener.",
        "";
    SELF_DATAGRAM = "self_test.datagram",
        "`tproxyctl self-test` loses a datagram",
        "In the temporary network namespace, the datagram did not reach the listener with the expected addresses, or \
         the reply \
         did not reach the client. No other rules exist there: the cause is the configuration or the kernel.",
        "Such datagrams do not reach the listener.",
        "";
    SELF_SKIPPED = "self_test.skipped",
        "", "The configuration does not select this family or protocol.", "No probe was sent.", "";
}
