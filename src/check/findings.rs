//! Everything that a check can find: the one source of what `tp_check` says and of `docs/troubleshooting.md`.

use std::fmt::{self, Write};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Some traffic may be lost, or pass by the proxy.
    Warning,
    /// Interception cannot work.
    Failure,
}

/// One thing that can be found, whatever the particulars.
#[derive(Debug)]
#[non_exhaustive]
pub struct Kind {
    /// Stable: programs may depend on it.
    pub id: &'static str,
    /// What it does to traffic.
    pub impact: &'static str,
    /// The usual command that cures it, with names in braces for the particulars; empty: there is none.
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
    /// What it is.
    pub kind: &'static Kind,
    /// How bad it is here.
    pub severity: Severity,
    /// What was found, with the particulars.
    pub message: String,
    /// The command that cures it, for `sh`; empty: there is none.
    pub fix: String,
}

impl Finding {
    /// Fills in one of the fix's particulars.
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

    /// Another command in place of the kind's: that is the usual one; here it takes another, or none is known.
    pub(crate) fn fix_with(&mut self, command: fmt::Arguments<'_>) -> &mut Finding {
        self.fix.clear();
        self.and(command)
    }

    /// No command cures it here.
    pub(crate) fn without_fix(&mut self) -> &mut Finding {
        self.fix_with(format_args!(""))
    }

    /// One more command, if it is any, to be run when those before it have succeeded.
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

/// What has been found, in that order.
#[derive(Debug, Default)]
pub(crate) struct Findings(pub Vec<Finding>);

impl Findings {
    /// Adds a finding, with the fix of its kind; the caller may fill that in, or know another.
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
    // What this process may do, and what the kernel can.
    NET_ADMIN = "privilege.net_admin",
        "tp_install_rules fails with EPERM",
        "The process has no CAP_NET_ADMIN in the user namespace that owns this network namespace. Root starts it with the \
         capability by setpriv(1), with --reuid, --regid and --clear-groups as another user; systemd by \
         AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW in its unit. A capability of the program's file would be everybody's \
         who can start it.",
        "It cannot install rules; nothing is intercepted.",
        "setpriv --inh-caps=+net_admin,+net_raw --ambient-caps=+net_admin,+net_raw PROGRAM";
    BIND_SERVICE = "privilege.bind_service",
        "", "The process has no CAP_NET_BIND_SERVICE.",
        "Listeners need ports from net.ipv4.ip_unprivileged_port_start on, and TP_CONNECT_KEEP_PORT keeps no lower one.", "";
    TRANSPARENT = "privilege.transparent",
        "tp_socket, tp_listen or tp_connect_from fail with EPERM",
        "IP_TRANSPARENT was tried, and refused: the process has neither CAP_NET_RAW nor CAP_NET_ADMIN. It is started with \
         them as privilege.net_admin says.",
        "No socket can be transparent: intercepted packets find no listener.",
        "setpriv --inh-caps=+net_admin,+net_raw --ambient-caps=+net_admin,+net_raw PROGRAM";
    FAMILY = "kernel.family",
        "Sockets of one address family fail with EAFNOSUPPORT",
        "This process can have no sockets of this family: the kernel was built or booted without, or a seccomp filter \
         (systemd's RestrictAddressFamilies=) refuses them.",
        "Connections of this family are not intercepted.",
        "";
    NF_TABLES = "kernel.nf_tables",
        "tp_install_rules fails with EOPNOTSUPP and speaks of CONFIG_NF_TABLES",
        "A trial transaction, which is never committed, was refused: the kernel has no nf_tables of the inet family.",
        "Rules can be installed by iptables alone, without an owner.",
        "modprobe nf_tables";
    NFT_SOCKET = "kernel.nft_socket",
        "tp_install_rules fails with EOPNOTSUPP and names `socket`",
        "A trial transaction was refused: the kernel has no `socket` expression, or none that knows `wildcard` (Linux 5.10).",
        "Packets cannot be given to the transparent sockets that they belong to.",
        "modprobe nft_socket";
    NFT_TPROXY = "kernel.nft_tproxy",
        "tp_install_rules fails with EOPNOTSUPP and names `tproxy`",
        "A trial transaction was refused: the kernel has no `tproxy` expression.",
        "Nothing can be intercepted by TPROXY; TP_RULES_REDIRECT may work.",
        "modprobe nft_tproxy";
    NFT_FIB = "kernel.nft_fib",
        "tp_install_rules fails with EOPNOTSUPP and names `fib`",
        "A trial transaction was refused: the kernel has no `fib` expression for the inet family.",
        "Rules cannot tell this host's own addresses from others'.",
        "modprobe nft_fib_inet";
    OWNER = "kernel.owner_tables",
        "tp_install_rules fails with EOPNOTSUPP and speaks of Linux 5.12",
        "A trial transaction was refused: tables cannot belong to a process.",
        "Rules would not die with their process.",
        "";
    PERSIST = "kernel.persistent_tables",
        "tp_install_rules with TP_RULES_PERSIST fails with EOPNOTSUPP",
        "A trial transaction was refused: tables that outlive their owner need Linux 6.9.",
        "TP_RULES_PERSIST does not work; all else does.",
        "";
    RULE_TABLES = "kernel.policy_routing",
        "tp_install_rules fails with EOPNOTSUPP and speaks of CONFIG_IP_MULTIPLE_TABLES",
        "The kernel has no routing policy rules for this family.",
        "Marked packets cannot be led to local sockets.",
        "";
    VERSION = "kernel.version",
        "", "Which kernel this is.", "Linux 5.12 or newer is needed.", "";
    IPTABLES = "iptables.variants",
        "", "Which variants of iptables are there, and which have tables.",
        "A firewall may have rules in either; each program shows its own.", "";
    UNSEEN = "check.unseen",
        "", "A part of the host could not be looked at, or there is more of something than is read.",
        "What is wrong there is not reported.", "";

    // Sockets and their owners.
    LISTENER_GONE = "listener.gone",
        "Connections time out, though the rules are there",
        "Rules give packets to a port where nothing listens.",
        "What would be intercepted is dropped.",
        "kill {pid}";
    NOT_TRANSPARENT = "listener.not_transparent",
        "Connections time out, though something listens on the proxy's port",
        "The listener is not transparent; the kernel gives intercepted packets to transparent sockets only.",
        "What would be intercepted is dropped.",
        "kill {pid}";
    UNREACHABLE = "listener.unreachable",
        "Connections time out, though the proxy listens",
        "The listener's address is not the one that the rule delivers to. A rule without an address finds listeners on \
         every address, or on the address of the interface that the packet came in by: never one on loopback.",
        "What would be intercepted is dropped.",
        "kill {pid}";
    BOUND = "listener.bound_to_interface",
        "Connections of some clients time out, and those of others do not",
        "The listener is bound to an interface (SO_BINDTODEVICE), and the rule gives it what comes in by any.",
        "What comes in by another interface is dropped.",
        "kill {pid}";
    LISTENER_FULL = "listener.full",
        "New connections take seconds, or time out, when there are many",
        "The listener's queue is full: the program does not accept as fast as clients connect.",
        "The first packet of further connections is dropped, and sent again a second later.",
        "";
    STOPPED = "owner.stopped",
        "Connections are made, and nothing ever comes back",
        "The process that the rules belong to is stopped (SIGSTOP, or Ctrl-Z in a shell).",
        "The kernel makes connections for it until its queue is full; none is served.",
        "kill -CONT {pid}";
    ORPHAN = "instance.orphaned",
        "Connections time out after the proxy has ended",
        "Rules made with TP_RULES_PERSIST are there, and no process that they belong to.",
        "What would be intercepted is dropped until the program is back.",
        "nft delete table inet {table}";
    IPTABLES_ORPHAN = "instance.iptables_orphaned",
        "Connections time out after the proxy was killed",
        "iptables chains of this library are there, and no process that they belong to.",
        "What would be intercepted is dropped until the program is back.",
        "iptables -t mangle -D PREROUTING {number}";
    INSTANCE = "instance",
        "", "Rules of this library are installed.", "Traffic is intercepted.", "";

    // Routing.
    LO_DOWN = "route.loopback_down",
        "Connections time out since `lo` went down",
        "The loopback device is down. The kernel has deleted the local route of IPv6 with it.",
        "Intercepted packets do not reach the listener: they are dropped, of IPv6 always, of IPv4 as long as lo is down.",
        "ip link set lo up{routes}";
    ROUTE_MISSING = "route.missing",
        "Connections time out, though the rules count packets as intercepted",
        "The routing table that marked packets are looked up in has no local default route.",
        "Marked packets find no way to the listener. The kernel does not forward a packet that has been given to a listener; it drops it.",
        "ip {flag} route add local default dev lo table {table}";
    ROUTE_FOREIGN = "route.foreign",
        "Connections to some destinations time out, though the rules count packets as intercepted",
        "The table that delivers to local sockets has routes that this library did not make.",
        "Packets to these destinations are not delivered to the listener. The kernel does not forward a packet that has been given to a listener; it drops it.",
        "ip {flag} route del {kind} {destination} table {table}";
    RULE_MISSING = "rule.missing",
        "Connections time out, though the rules count packets as intercepted",
        "The routing policy rule that sends marked packets to local sockets is gone. Network managers delete rules that they \
         did not make (systemd-networkd: ManageForeignRoutingPolicyRules).",
        "Marked packets do not reach the listener. The kernel does not forward a packet that has been given to a listener; it drops it.",
        "ip {flag} rule add pref {pref} fwmark {mark} lookup {table}";
    GUARD_MISSING = "rule.guard_missing",
        "Packets vanish as martians as soon as src_valid_mark is set",
        "The routing policy rule that spares the reverse-path check is gone.",
        "With src_valid_mark or tcp_fwmark_accept set, intercepted packets or the answers to them are dropped.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} goto {after}";
    RULE_SHADOWED = "rule.shadowed",
        "Connections time out, though the rules count packets as intercepted",
        "A routing policy rule of another program comes before ours and decides for marked packets too.",
        "That rule sends marked packets elsewhere. The kernel does not forward a packet that has been given to a listener; it drops it.",
        "ip {flag} rule add pref {pref} fwmark {mark} lookup {table}";
    RULE_MARK = "rule.mark_collision",
        "Connections time out, though the rules count packets as intercepted",
        "A routing policy rule of another program uses bits of our mark, and comes first.",
        "That rule sends intercepted packets elsewhere. The kernel does not forward a packet that has been given to a listener; it drops it.",
        "ip {flag} rule add pref {pref} fwmark {mark} lookup {table}";
    TABLE_SHARED = "rule.table_shared",
        "Traffic that is not to be intercepted is refused, or vanishes",
        "A routing policy rule of somebody else leads to the table that delivers to local sockets.",
        "Its packets end at this host.",
        "ip {flag} rule del pref {pref}";
    RULE_DUPLICATE = "rule.duplicate",
        "`ip rule` shows the same rule again and again",
        "The same routing policy rule is there more than once: a script was run again.",
        "Every packet is compared with each; deleting one leaves the others.",
        "ip {flag} rule del pref {pref}";
    RULE_ORPHAN = "rule.orphaned",
        "`ip rule` shows rules of a proxy that has ended",
        "Routing policy rules of this library are there, and no instance that they belong to: it was killed.",
        "None, until somebody sets the mark. The next start, or tp_purge_rules, removes them.",
        "ip {flag} rule del pref {pref} protocol 116";
    LOCAL_MISSING = "rule.local_missing",
        "The host does not answer to its own addresses",
        "The routing policy rule of the local table is gone.",
        "Packets for this host itself are forwarded or dropped; so are the answers to the proxy.",
        "ip {flag} rule add pref 0 lookup local";
    MAIN_MISSING = "rule.main_missing",
        "Intercepted connections time out; the host reaches nobody",
        "No routing policy rule leads to the main table.",
        "Answers to clients and connections to servers have no route.",
        "ip {flag} rule add pref 32766 lookup main";

    // Sysctls.
    SRC_VALID_MARK = "sysctl.src_valid_mark",
        "Packets vanish without a trace (as martians) since WireGuard or Tailscale was installed",
        "src_valid_mark is set, and a TPROXY recipe sends every marked packet to the local table, the reverse-path check's too.",
        "Every intercepted packet is dropped as a martian.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} lookup main";
    FWMARK_ACCEPT = "sysctl.tcp_fwmark_accept",
        "Connections time out: the listener never accepts",
        "tcp_fwmark_accept gives the packet's mark to the accepted socket, and a TPROXY recipe sends marked packets to the local table.",
        "The answers to clients go to this host itself.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} lookup main";
    RP_FILTER = "sysctl.rp_filter",
        "Packets of some clients vanish, and those of others do not",
        "rp_filter is strict, and has dropped packets: clients come in by another interface than the route back to them.",
        "Packets of such clients are dropped before they are intercepted.",
        "sysctl -w net/ipv4/conf/{interface}/rp_filter=2";
    IP_FORWARD = "sysctl.ip_forward",
        "What is intercepted works, everything else does not",
        "net.ipv4.ip_forward is 0: this host is no IPv4 router.",
        "IPv4 packets that are not intercepted are dropped.",
        "sysctl -w net.ipv4.ip_forward=1";
    FORWARDING_V6 = "sysctl.forwarding_v6",
        "What is intercepted works, everything else does not, over IPv6",
        "net.ipv6.conf.all.forwarding is 0: this host is no IPv6 router. A router takes no routes from other routers, unless \
         accept_ra is 2.",
        "IPv6 packets that are not intercepted are dropped.",
        "sysctl -w net/ipv6/conf/{interface}/accept_ra=2 && sysctl -w net.ipv6.conf.all.forwarding=1";
    FORWARDING_INTERFACE = "sysctl.forwarding_interface",
        "What is intercepted works, everything else that comes in by one interface does not",
        "Forwarding is on for the host, and off for an interface.",
        "Packets that come in by it and are not intercepted are dropped.",
        "sysctl -w net/ipv4/conf/{interface}/forwarding=1";
    BRIDGE_V4 = "sysctl.bridge_nf_call_iptables",
        "Connections of hosts behind a bridge are refused or time out (containers, virtual machines)",
        "bridge-nf-call-iptables is 1, and there is a bridge: packets meet the rules in the bridge, and not again as IP \
         packets. Where others have rules for what is forwarded, these may be meant for bridged packets, and no command is given.",
        "The listener that was found is forgotten on the way from the bridge to IP.",
        "sysctl -w net.bridge.bridge-nf-call-iptables=0";
    BRIDGE_V6 = "sysctl.bridge_nf_call_ip6tables",
        "IPv6 connections of hosts behind a bridge are refused or time out",
        "bridge-nf-call-ip6tables is 1, and there is a bridge: packets meet the rules in the bridge, and not again as IP packets.",
        "The listener that was found is forgotten on the way from the bridge to IP.",
        "sysctl -w net.bridge.bridge-nf-call-ip6tables=0";
    ROUTE_LOCALNET = "sysctl.route_localnet",
        "Redirected connections time out, and the listener is on 127.0.0.1",
        "A rule translates destinations to 127.0.0.1, and route_localnet is 0. With route_localnet alone, neighbors could \
         reach every service that listens on 127.0.0.1: the command first has packets dropped that they send there.",
        "The translated packets are dropped as martians.",
        "nft 'table ip transparent-localnet { chain prerouting { type filter hook prerouting priority raw; iifname != \"lo\" \
         ip daddr 127.0.0.0/8 drop; }; }' && sysctl -w net.ipv4.conf.all.route_localnet=1";
    DISABLE_IPV6 = "sysctl.disable_ipv6",
        "IPv6 is not intercepted any more since it was switched off on `lo`",
        "net.ipv6.conf.lo.disable_ipv6 is 1: IPv6's local route was lost.",
        "Intercepted IPv6 packets are routed as if they had not been intercepted.",
        "sysctl -w net.ipv6.conf.lo.disable_ipv6=0{routes}";
    PORT_RANGE = "sysctl.ip_local_port_range",
        "tp_connect_from fails with EADDRNOTAVAIL when there are many connections",
        "The range of local ports is narrow.",
        "Each client address can have no more connections to one server than there are ports.",
        "sysctl -w net.ipv4.ip_local_port_range='32768 60999'";
    EARLY_DEMUX = "sysctl.ip_early_demux",
        "", "ip_early_demux is 0.", "Packets of established connections take a longer way; nothing is lost.", "";
    ACCEPT_LOCAL = "sysctl.accept_local",
        "", "accept_local is 1.", "Packets from this host's own addresses are accepted from outside.", "";

    // Filters of others.
    PREROUTING_DROP = "filter.prerouting_drop",
        "Connections time out, and the rules count nothing, or no more than the first packet",
        "A chain of somebody else drops, before routing, what is to be intercepted. Before the rules that intercept, packets \
         are told by their ports (`tcp dport 80 fib daddr type != local`), behind them by the mark.",
        "The packets never reach the listener.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    INPUT_DROP = "filter.input_drop",
        "Connections time out, though the rules count packets as intercepted",
        "The host's firewall drops in its input chain what it does not know. What is intercepted comes by there, with the \
         port that the client asked for.",
        "The packets never reach the listener.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    OUTPUT_DROP = "filter.output_drop",
        "Connections time out, and the proxy's answers are not seen on the wire",
        "The host's firewall drops in its output chain what it does not know. The proxy's packets have other hosts' addresses.",
        "Answers to clients, and connections to servers, are dropped.",
        "nft 'insert rule {chain} socket transparent 1 accept'";
    MARK_OVERWRITTEN = "filter.mark_overwritten",
        "Connections time out, though the rules count packets as intercepted",
        "A chain of another program, after ours, sets the packet's mark and does not preserve our bits.",
        "Without the mark the packets are not routed to the listener. The kernel does not forward a packet that has been given to a listener; it drops it.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    MARK_COLLISION = "filter.mark_collision",
        "Traffic that is not to be intercepted is refused, or vanishes",
        "A rule of somebody else gives packets the mark that means \"for a local socket\". Give this library another one \
         (`mark`), or remove the rule.",
        "Its packets end at this host.",
        "nft delete rule {chain} handle {handle}";
    TPROXY_ELSEWHERE = "filter.tproxy_elsewhere",
        "Connections reach another proxy",
        "A chain of somebody else, after ours, gives the same packets to another listener.",
        "The other listener gets them.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    NAT = "filter.nat",
        "tp_orig_dst gives an address that the client did not ask for, or connections time out",
        "A chain of somebody else translates the destination of what is to be intercepted.",
        "The original destination is lost, or the packets never reach the rules.",
        "nft 'insert rule {chain} meta mark and {mask} == {value} accept'";
    RPFILTER = "filter.rpfilter",
        "Connections time out with firewalld or another rpfilter rule",
        "A rule drops packets that have no way back by the interface they came in by, and looks at the mark; a TPROXY \
         recipe sends every marked packet to the local table, the check's too.",
        "Every intercepted packet is dropped.",
        "ip {flag} rule add pref {pref} iif lo fwmark {mark} lookup main";
    MASQUERADE = "filter.masquerade",
        "Servers see the proxy's address, not the client's",
        "A chain translates the sources of what leaves this host, connections of tp_connect_from too.",
        "Servers see this host as the client.",
        "nft 'insert rule {chain} meta skuid >= 0 fib saddr type != local accept'";
    KEEP_PORT = "conntrack.keep_port",
        "Connections that keep the client's port (TP_CONNECT_KEEP_PORT) time out or are reset now and then",
        "Connection tracking is active: both halves of a proxied connection have the same addresses and ports, and are one \
         connection to it. TP_RULES_NOTRACK keeps them out of it. A firewall that accepts `ct state established` would drop \
         what is not tracked: there no command is given.",
        "With TP_CONNECT_KEEP_PORT packets may be taken for invalid, or be translated wrongly.",
        "nft add rule inet transparent-untracked output socket transparent 1 notrack";
    CONNTRACK_FULL = "conntrack.full",
        "New connections time out at random, old ones work; `nf_conntrack: table full` in the kernel's log",
        "Connection tracking has nearly as many connections as it may have.",
        "Packets of new connections are dropped.",
        "sysctl -w net.netfilter.nf_conntrack_max={max}";
    DESCRIPTORS = "limit.descriptors",
        "accept fails with EMFILE, and clients wait",
        "The process may have few descriptors, or has nearly all that it may; a proxy needs two for each connection.",
        "Further connections wait in the listener's queue.",
        "prlimit --pid {pid} --nofile={limit}";

    // What self-test says.
    SELF_CONNECTION = "self_test.connection",
        "`tproxyctl self-test` loses a connection",
        "A connection was sent through the rules in a network of their own, and did not come to the listener as it should, or \
         its answer did not come back. No other rules are there: the configuration or the kernel is at fault.",
        "Connections like it do not reach the listener.",
        "";
    SELF_DATAGRAM = "self_test.datagram",
        "`tproxyctl self-test` loses a datagram",
        "A datagram was sent through the rules in a network of their own, and did not come to the listener as it should, or \
         its answer did not come back. No other rules are there: the configuration or the kernel is at fault.",
        "Datagrams like it do not reach the listener.",
        "";
    SELF_SKIPPED = "self_test.skipped",
        "", "The configuration does not ask for this family or protocol.", "Nothing was sent.", "";
}
