/*
 * libtproxy: transparent proxying on Linux.
 *
 * Provides sockets that bind to, listen on and connect from addresses that this
 * host does not own, the original destinations of intercepted connections and
 * datagrams, replies from these destinations, and the kernel rules that deliver
 * the packets to the program. A transparent TCP proxy:
 *
 *     struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(3129) };
 *     int listener = tp_listen((struct sockaddr *)&any, sizeof any, -1, 0);
 *
 *     struct tp_port_range http = { .first = 80, .last = 80 };
 *     struct tp_rules_config config = { 0 };
 *     config.listeners = &listener, config.n_listeners = 1;
 *     config.ports = &http, config.n_ports = 1;
 *     tp_rules *rules;
 *     if (tp_install_rules(&config, sizeof config, &rules) != 0)
 *         errx(1, "%s", tp_last_error());
 *
 *     int client = tp_accept(listener, (struct sockaddr *)&from, &fromlen,
 *                            (struct sockaddr *)&to, &tolen, TP_ACCEPT_TPROXY);
 *     int server = tp_connect_from((struct sockaddr *)&from, fromlen,
 *                                  (struct sockaddr *)&to, tolen, 0);
 *     ... relay, then tp_remove_rules(rules) ...
 *
 * A transparent UDP proxy, whose replies come from the original destination:
 *
 *     int listener = tp_socket(AF_INET6, SOCK_DGRAM, 0);
 *     tp_bind_nonlocal(listener, (struct sockaddr *)&any, sizeof any);
 *     ... rules as above, with this listener ...
 *     tp_replier *replier;
 *     tp_replier_open(NULL, 0, &replier);
 *
 *     int n = tp_recv_datagrams(listener, dgrams, 64, 0);
 *     ... replace data and len of each element by the reply ...
 *     tp_reply(replier, dgrams, n);
 *
 * The following applies to every call.
 *
 * Results. A call that returns int returns -1 and sets errno on failure;
 * otherwise it returns 0 or the documented value. errno is unchanged on success.
 * After a failure tp_last_error() returns a human-readable message: the failed
 * operation, the equivalent command, the kernel's error text and a suggested
 * fix.
 *
 * Common errno values:
 *   EFAULT           a required pointer is NULL
 *   EINVAL           a value is invalid, or a flag is unknown
 *   EOPNOTSUPP       the kernel or this version does not support it
 *   EPERM            a capability is missing
 *   ENOTRECOVERABLE  internal error of the library
 *
 * Atomicity. Outputs are written only on success. A call that fails leaves no
 * descriptor, rule or route behind.
 *
 * Addresses are struct sockaddr_in or sockaddr_in6, in network byte order.
 * v4-mapped addresses (::ffff:a.b.c.d) are accepted, and are reported if the
 * caller's socket uses them. Ports and masks in other structs are in host byte
 * order.
 *
 * Ownership. The caller closes the descriptors that a call returns. They are
 * close-on-exec. Data that a pointer argument points to is read only during the
 * call.
 *
 * Threads. Every call may be made from any thread at any time, unless its
 * comment says otherwise. No call prints, exits or changes a signal handler.
 * Only tp_self_test() starts a thread.
 *
 * Environment. No call reads an environment variable.
 *
 * Programs. Only iptables rules (TP_BACKEND_IPTABLES) need programs:
 * iptables-save, iptables-restore, ip6tables-save and ip6tables-restore. No other
 * program is run. These calls run them:
 *   tp_install_rules(), if it installs iptables rules
 *   tp_replace_rules(), tp_update_rules(), tp_remove_rules(), tp_rules_stats(),
 *     tp_read_stats() and tp_verify_rules(), for iptables rules
 *   tp_purge_rules() and tp_list_rules(), if the kernel has iptables chains of
 *     this library
 *   tp_self_test(), if it tests iptables rules
 * Programs are searched for in /usr/sbin, /sbin, /usr/bin and /bin, never in
 * PATH. Their environment consists of PATH and LC_ALL, which the library sets.
 * They start with no signal blocked or ignored, and inherit the descriptors of
 * the process that are not close-on-exec. They are children of the process: its
 * SIGCHLD handler is called, and waitpid(-1) may return them. The process may
 * ignore SIGCHLD or wait for children elsewhere: the library then reads from the
 * kernel's tables whether a program succeeded. iptables does not run while the
 * real and the effective user ID differ (EPERM), as in a set-user-ID program. A
 * call that runs a program can fail with:
 *   ETIMEDOUT   a program did not end within 60 seconds and was killed
 *   EAGAIN      another program held the lock of legacy iptables
 *               (/run/xtables.lock) for 5 seconds
 *   EOPNOTSUPP  the programs are not installed, or the kernel lacks a match
 *   EIO         a program failed for another reason
 *
 * Capabilities are checked in the user namespace that owns the network
 * namespace. Root in `unshare -rn` has all of them there.
 *
 * Fork. Rules belong to the process that installed them. While it runs, calls on
 * a forked child's copy of the handle fail with EBUSY, and tp_remove_rules()
 * there frees the copy and removes nothing; tp_read_stats() reads the counters
 * from any process. After the installing process has ended, executed another
 * program or closed its descriptors, a child may use its copy, one child at a
 * time. The first child that calls tp_remove_rules() removes the rules for all.
 * Calls on the other copies then fail with ENOENT, and tp_remove_rules() there
 * removes nothing, even if new rules have the same name. A copy knows the sets as
 * they were when the process forked: if another process has changed the rules
 * since, tp_update_rules() and tp_learn_addresses() fail with ESTALE until
 * tp_replace_rules() is called.
 * The kernel keeps the table as long as any process
 * has the sockets. A worker process that should not keep it calls
 * tp_forget_rules() first, or executes another program (the sockets are
 * close-on-exec). A process may fork while another of its threads is in a call.
 * After vfork(2) only execve(2) and _exit(2) may be called. Parent and child may
 * both use a replier: each has its own copy, and the sockets are shared.
 *
 * Daemons. daemon(3) forks and its parent exits: rules that were installed before
 * remain and belong to the daemon. closefrom(3) and close_range(2) close the
 * descriptors of the library: install rules and open repliers after calling
 * them. A call on a rules handle whose descriptors were closed or replaced fails
 * with EBADF, and neither writes to them nor closes them. tp_reply() does not
 * check this: afterwards a replier may only be closed, which closes only its own
 * sockets. chroot(2) may be called at any time, except with the iptables
 * backend, whose programs must then be found in the new root.
 *
 * Privileges. After setuid(2), or after capabilities are dropped, existing rules
 * and transparent sockets keep working. Later calls need:
 *   tp_socket, tp_set_transparent, tp_bind_nonlocal, tp_listen,
 *   tp_connect_from, tp_connect_socket, tp_replier_open, tp_reply
 *                                                CAP_NET_RAW or CAP_NET_ADMIN
 *   tp_install_rules, tp_remove_rules, tp_replace_rules, tp_update_rules,
 *   tp_learn_addresses, tp_rules_stats, tp_read_stats, tp_verify_rules,
 *   tp_list_rules, tp_purge_rules                                CAP_NET_ADMIN
 *   tp_self_test                                    CAP_SYS_ADMIN and the above
 *   tp_accept, tp_orig_dst, tp_msg_orig_dst, tp_recvfrom, tp_recv_datagrams,
 *   tp_unmap_addr, tp_render_rules, tp_check, tp_forget_rules, tp_replier_close          none
 * Without CAP_NET_ADMIN tp_remove_rules() fails with EPERM, and the kernel
 * removes the table when the process ends. A set-user-ID program may use the
 * library: environment variables do not affect it, and programs are run by
 * absolute path in an environment that the library sets.
 *
 * Network namespaces. A network namespace belongs to a thread (setns(2)). A call
 * that creates something uses the namespace of the calling thread. A call on a
 * rules handle uses the namespace of the rules, whichever namespace the calling
 * thread is in. If the thread may not enter it (CAP_SYS_ADMIN, only with the
 * iptables backend), the call fails with EPERM.
 *
 * Cancellation. pthread_cancel(3) never interrupts a call: cancellation is
 * disabled during every call and acted on at the program's next cancellation
 * point. It does not end a wait for a datagram or a connection.
 *
 * Signals. A signal handler that interrupts a blocking call makes it fail with
 * EINTR, unless the handler was installed with SA_RESTART. Only tp_version() is
 * async-signal-safe.
 *
 * Stack. Calls on sockets and datagrams use at most 4 KB, including on failure;
 * tp_recv_datagrams() uses 3 KB plus 100 bytes per datagram that it may receive.
 * Calls on rules, tp_check() and tp_self_test() use at most 24 KB.
 *
 * Memory. tp_socket(), tp_connect_from(), tp_connect_socket(), tp_accept(),
 * tp_orig_dst(), tp_unmap_addr(), tp_msg_orig_dst(), tp_recvfrom(),
 * tp_recv_datagrams() and tp_reply() allocate nothing on success.
 * For memory whose size depends on input from the caller, the kernel or other
 * programs (arrays, sets, messages, scripts, listings), a failed allocation is
 * ENOMEM. In calls on rules, tp_check() and tp_self_test(), a failed allocation
 * of less than 16 KB (strings, list nodes, the standard library's own) can still
 * abort the program (abort(3)).
 *
 * Link with `pkg-config --cflags --libs tproxy`.
 */


#ifndef TPROXY_H
#define TPROXY_H

/* Generated from src/ffi by cbindgen; `UPDATE_HEADER=1 cargo test --test header` regenerates it. */

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

/* Version of this header. tp_version() returns the version of the library that the program runs with. */
#define TP_VERSION_MAJOR 0
#define TP_VERSION_MINOR 1
#define TP_VERSION_PATCH 0
/* Handles are opaque. */
typedef struct tp_rules tp_rules;
typedef struct tp_replier tp_replier;


/**
 * Makes the new socket non-blocking (O_NONBLOCK). Flag of tp_listen(), tp_connect_from() and tp_accept().
 */
#define TP_NONBLOCK 1

/**
 * Lets several listeners share the address and port; the kernel distributes connections among them
 * (SO_REUSEPORT). Flag of tp_listen().
 */
#define TP_LISTEN_REUSEPORT 2

/**
 * Connects from the port in src if it is available, otherwise from any port. Flag of tp_connect_from() and
 * tp_connect_socket().
 */
#define TP_CONNECT_KEEP_PORT 4

/**
 * Creates a UDP socket instead of a TCP socket. Flag of tp_connect_from().
 */
#define TP_CONNECT_DGRAM 8

/**
 * The caller will send data immediately: delays the final ACK of the handshake so that it carries the
 * data. Flag of tp_connect_from() and tp_connect_socket().
 */
#define TP_CONNECT_DATA_FOLLOWS 16

/**
 * The listener serves IPv6 only (IPV6_V6ONLY), so that another socket can serve IPv4 on the same port. Flag
 * of tp_listen().
 */
#define TP_LISTEN_V6ONLY 32

/**
 * Connects from the port in src, or fails with EADDRINUSE. Flag of tp_connect_from() and
 * tp_connect_socket().
 */
#define TP_CONNECT_SAME_PORT 64

/**
 * The listener is transparent: its connections were intercepted by TPROXY, and tp_accept() does not ask the
 * socket. Flag of tp_accept().
 */
#define TP_ACCEPT_TPROXY 128

/**
 * The datagram was truncated: len equals capacity and the rest was discarded. In tp_datagram.flags.
 */
#define TP_DGRAM_TRUNC 1

/**
 * The control data was truncated, because the socket reports more than fits the library's buffer: the
 * original destination or the segment size may be missing. In tp_datagram.flags.
 */
#define TP_DGRAM_CTRUNC 2

/**
 * The original destination is unknown. In tp_datagram.flags.
 *
 * Either the socket does not report original destinations (see tp_socket(), tp_set_transparent()), or an
 * IPv6 datagram was sent to the unspecified address or to a v4-mapped address. In a socket call these
 * would mean this host, or IPv4.
 */
#define TP_DGRAM_NO_ORIG_DST 4

/**
 * Maximum number of datagrams that one tp_recv_datagrams() call receives, and that tp_reply() passes to
 * the kernel in one system call.
 */
#define TP_BATCH_MAX 64

/**
 * Send only through raw sockets and bind no ports, so that services started later can bind theirs.
 *
 * Datagrams are then not sent as segments (UDP_SEGMENT), and a checksum is computed for each datagram.
 * In tp_replier_config.flags.
 */
#define TP_REPLIER_RAW 256

/**
 * Only deliver packets to existing transparent sockets: listeners on addresses that this host does not
 * own, and connections from such addresses. Nothing is intercepted; listeners may be empty.
 */
#define TP_RULES_DIVERT_ONLY 1

/**
 * Intercept by NAT redirection, for systems without TPROXY.
 *
 * The listener must then be an ordinary socket, not a transparent one, on a wildcard or specific address;
 * tp_orig_dst() queries connection tracking. Only TCP is supported. Marks and policy routing are not
 * used, and replies to connections from foreign addresses are not delivered.
 */
#define TP_RULES_REDIRECT 2

/**
 * Also intercept traffic that this host sends.
 *
 * Packets from transparent sockets are exempt: a proxy whose sockets towards servers are transparent
 * (tp_connect_from(), tp_set_transparent()) does not intercept its own connections.
 *
 * If instances overlap, the first installed sends the packet back through lo, and only that instance takes
 * it there.
 */
#define TP_RULES_LOCAL_OUTPUT 4

/**
 * Forward traffic normally while no listener exists; by default it is dropped. EOPNOTSUPP with
 * TP_RULES_LOCAL_OUTPUT or TP_RULES_REDIRECT.
 */
#define TP_RULES_FAIL_OPEN 8

/**
 * Accept connections and datagrams addressed directly to a listener's address and port.
 *
 * By default they are dropped, because a proxy that connects to the original destination would connect to
 * itself in an endless loop. Dropped are packets to an address of this host, including link-local
 * addresses, and to broadcast, anycast and multicast addresses. A listener on loopback cannot be reached
 * from other hosts and needs no such rule.
 */
#define TP_RULES_ALLOW_DIRECT 16

/**
 * Exempt intercepted packets, and packets from transparent sockets, from connection tracking.
 *
 * If the port selection includes ports above 1023, connection tracking has to see replies to recognize them.
 * Then only packets of transparent sockets and TCP packets that begin a connection are exempt; intercepted
 * datagrams are tracked.
 */
#define TP_RULES_NOTRACK 32

/**
 * Keep the rules when the process ends.
 *
 * The remaining rules drop the packets that they would intercept. An instance of the same name, also with
 * this flag, takes them over without a gap; tp_purge_rules() removes them. Needs Linux 6.9.
 */
#define TP_RULES_PERSIST 64

/**
 * Intercept only TCP packets that begin a connection.
 *
 * A TCP packet that begins nothing and belongs to no transparent socket is forwarded, not answered by a
 * reset. Existing connections continue when the rules are installed, and connections of another proxy host
 * are not broken. UDP is not affected. EOPNOTSUPP with TP_RULES_LOCAL_OUTPUT.
 *
 * @since 0.2.0
 */
#define TP_RULES_NEW_ONLY 128

/**
 * Deliver replies of servers on this host to the transparent sockets that connected to them.
 *
 * Needed when the proxy connects with the client's address (tp_connect_from()) to a server on its own host:
 * on 127.0.0.0/8, ::1 or another address of the host. Without it, the server sends its replies to the client.
 * Clients that connect directly to that server are not affected. Uses connection tracking, also with
 * TP_RULES_NOTRACK, and sets the bits of mark_mask in the connection's mark (ct mark). EOPNOTSUPP with
 * TP_RULES_REDIRECT, and with both TP_RULES_NOTRACK and TP_RULES_LOCAL_OUTPUT.
 *
 * @since 0.2.0
 */
#define TP_RULES_LOCAL_SERVERS 256

/**
 * Use nf_tables if the kernel has the required features, otherwise iptables.
 */
#define TP_BACKEND_AUTO 0

/**
 * Use nf_tables, over netlink.
 */
#define TP_BACKEND_NFT 1

/**
 * Use iptables-restore, in one transaction per family and in separate chains.
 *
 * Uses iptables-nft or iptables-legacy, whichever already has rules: the legacy variant if it has rules,
 * otherwise the nft variant if it has rules, otherwise the program called `iptables`. Runs programs: see
 * "Programs" in tproxy(7).
 *
 * TP_RULES_FAIL_OPEN, TP_RULES_NOTRACK, TP_RULES_PERSIST and more than 1000 prefixes are EOPNOTSUPP. So are
 * all rules if the library was built without feature `iptables`; TP_BACKEND_AUTO then uses only nf_tables, and
 * tp_purge_rules() leaves chains of iptables.
 * Chains have no owner: those of a killed process remain, and drop the packets that they intercept, until
 * the next tp_install_rules() of that name or tp_purge_rules(). With TP_RULES_LOCAL_OUTPUT, sockets are
 * exempt by SO_MARK (set it to the rules' mark), not by being transparent. Packets dropped because no
 * listener exists are counted as intercepted.
 */
#define TP_BACKEND_IPTABLES 2

/**
 * TCP.
 */
#define TP_PROTO_TCP 1

/**
 * UDP.
 */
#define TP_PROTO_UDP 2

/**
 * Destinations to intercept. For tp_update_rules() and tp_learn_addresses().
 */
#define TP_SET_DST 1

/**
 * Sources to intercept. For tp_update_rules().
 */
#define TP_SET_SRC 2

/**
 * Destinations that are never intercepted. For tp_update_rules() and tp_learn_addresses().
 */
#define TP_SET_BYPASS 3

/**
 * Puts missing or overtaken routing back. For tp_verify_rules().
 *
 * @since 0.2.0
 */
#define TP_VERIFY_REPAIR 1

/**
 * Script of `ip` and `nft` commands. For tp_render_rules().
 */
#define TP_FORMAT_NFT 1

/**
 * Script of `ip` and `iptables-restore` commands. For tp_render_rules().
 */
#define TP_FORMAT_IPTABLES 2

/**
 * IPv4.
 */
#define TP_FAMILY_IPV4 1

/**
 * IPv6.
 */
#define TP_FAMILY_IPV6 2

/**
 * The check passed.
 */
#define TP_SEVERITY_OK 0

/**
 * Information that needs no action.
 */
#define TP_SEVERITY_NOTE 1

/**
 * Some traffic may be lost, or may bypass the proxy.
 */
#define TP_SEVERITY_WARNING 2

/**
 * Interception cannot work.
 */
#define TP_SEVERITY_FAILURE 3

/**
 * Handle of a replier, from tp_replier_open().
 */
struct tp_replier;

/**
 * Handle of installed rules, from tp_install_rules().
 *
 * Calls on one handle may come from any thread of the process that installed the rules. A forked child may
 * use its copy only after that process has ended, and only one child at a time. Until then its calls fail
 * with EBUSY, and tp_remove_rules() frees the copy and removes nothing.
 */
struct tp_rules;

/**
 * Describes one datagram, or a GRO/GSO batch of equally sized datagrams of one flow.
 *
 * tp_recv_datagrams() fills it and tp_reply() sends it. 296 bytes on 64-bit machines. Addresses are in
 * network byte order, other fields in host byte order.
 */
struct tp_datagram {
    /**
     * Buffer of the caller. May be NULL if it holds no bytes.
     */
    void *data;
    /**
     * Size of the buffer. Read by tp_recv_datagrams(), ignored by tp_reply().
     */
    size_t capacity;
    /**
     * Number of bytes received or to send. Zero-length datagrams are valid.
     */
    size_t len;
    /**
     * Segment size. If non-zero and less than len, data holds consecutive datagrams of this size; the last
     * may be shorter (UDP_GRO, UDP_SEGMENT).
     */
    uint32_t segment_len;
    /**
     * TP_DGRAM_TRUNC, TP_DGRAM_CTRUNC and TP_DGRAM_NO_ORIG_DST. Ignored by tp_reply().
     */
    uint32_t flags;
    /**
     * errno of this datagram; 0 if it was received or sent.
     */
    int32_t error;
    /**
     * Sender of a received datagram; destination of tp_reply().
     */
    struct sockaddr_storage client;
    /**
     * Original destination of a received datagram; source address of tp_reply(). ss_family is AF_UNSPEC (0)
     * if the kernel did not report it.
     */
    struct sockaddr_storage orig_dst;
};

/**
 * Configuration of a replier. A field that is 0 selects its default.
 */
struct tp_replier_config {
    /**
     * TP_NONBLOCK and TP_REPLIER_RAW. With TP_NONBLOCK, a datagram that does not fit the send buffer is not
     * sent, and its error is EAGAIN.
     */
    uint32_t flags;
    /**
     * Maximum number of sockets for source ports; default 256. Up to two raw sockets are additional.
     */
    uint32_t max_sockets;
    /**
     * Idle time in milliseconds after which a later tp_reply() closes a socket; default 60,000.
     */
    uint32_t idle_ms;
    /**
     * Must be 0.
     */
    uint32_t reserved;
};

/**
 * Counters of a replier since it was opened.
 */
struct tp_replier_stats {
    /**
     * Sockets that are open now, including raw sockets.
     */
    uint64_t sockets;
    /**
     * Cache hits: lookups that found a socket for the source port, or a cached "port in use". There is one
     * lookup per source port in a batch.
     */
    uint64_t hits;
    /**
     * Cache misses: lookups that had to create a socket.
     */
    uint64_t misses;
    /**
     * Datagrams sent through a raw socket because another socket holds the source port.
     */
    uint64_t raw;
    /**
     * Sockets closed because max_sockets was reached.
     */
    uint64_t evictions;
    /**
     * Datagrams that were not sent.
     */
    uint64_t errors;
    /**
     * Datagrams that were sent, counted as elements of the arrays passed to tp_reply().
     */
    uint64_t sent;
};

/**
 * Range of ports in host byte order, including both ends.
 */
struct tp_port_range {
    /**
     * Lowest port, at least 1.
     */
    uint16_t first;
    /**
     * Highest port, at least first; equal to first for a single port.
     */
    uint16_t last;
    /**
     * TP_PROTO_TCP, TP_PROTO_UDP or both: the protocols whose ports these are. 0: every protocol.
     */
    uint32_t protocols;
};

/**
 * Address prefix: the first len bits of addr.
 */
struct tp_prefix {
    /**
     * AF_INET or AF_INET6.
     */
    uint8_t family;
    /**
     * Length in bits: 0 to 32 for AF_INET, 0 to 128 for AF_INET6.
     */
    uint8_t len;
    /**
     * Must be 0.
     */
    uint8_t reserved[2];
    /**
     * Address in network byte order; an IPv4 address is in the first four bytes.
     */
    uint8_t addr[16];
};

/**
 * Ethernet address.
 *
 * @since 0.2.0
 */
struct tp_mac {
    /**
     * The six bytes, in the order in which they are written.
     */
    uint8_t addr[6];
};

/**
 * Range of user or group numbers, including both ends.
 *
 * @since 0.2.0
 */
struct tp_id_range {
    /**
     * Lowest number.
     */
    uint32_t first;
    /**
     * Highest number, at least first; equal to first for a single number. Not 4294967295.
     */
    uint32_t last;
};

/**
 * Selects the traffic to intercept and the listeners that receive it.
 *
 * Set the struct to zero (`= {0}`), then set the fields that are needed. A field that is 0 or NULL selects
 * its default.
 *
 * A list that is NULL does not restrict the selection. A list that is not NULL and has 0 elements is an empty
 * set: with an empty ports, dst, src or interfaces nothing is intercepted, except that interfaces does not
 * restrict what this host sends (TP_RULES_LOCAL_OUTPUT). A NULL list with a number above 0 is EFAULT. Use
 * tp_update_rules() to add prefixes to an empty dst or src.
 *
 * The struct and all data it points to belong to the caller and are read only during the call.
 */
struct tp_rules_config {
    /**
     * Name of the instance: 1 to 20 letters, digits, '_', '.' and '-' ('-' not first). NULL or empty: "tproxy". A
     * network namespace can have several instances with different names.
     */
    const char *name;
    /**
     * Descriptors of the listening sockets that receive intercepted traffic.
     *
     * They determine protocol, family, address and port. Each socket must be transparent, bound and, for TCP,
     * listening (see tp_listen()). All sockets of one protocol and family must have the same address and port;
     * several sockets may share it with TP_LISTEN_REUSEPORT. The sockets are inspected during the call only. If
     * a listener is closed later, matching traffic is dropped.
     */
    const int *listeners;
    /**
     * Number of descriptors.
     */
    size_t n_listeners;
    /**
     * Address and port of a listener in another process, instead of listeners. The IPv6 wildcard address
     * serves both families.
     */
    const struct sockaddr *listen_addr;
    /**
     * Size of listen_addr in bytes.
     */
    socklen_t listen_addrlen;
    /**
     * TP_RULES_ flags, or 0.
     */
    uint32_t flags;
    /**
     * TP_BACKEND_AUTO, TP_BACKEND_NFT or TP_BACKEND_IPTABLES.
     */
    uint32_t backend;
    /**
     * TP_PROTO_TCP and TP_PROTO_UDP. 0: the protocols of the listeners, or TCP if there are none. With
     * listen_addr, the protocols that listen there.
     */
    uint32_t protocols;
    /**
     * TP_FAMILY_IPV4 and TP_FAMILY_IPV6. 0: the families of the listeners, or both if there are none; only IPv4
     * on a host that has no IPv6 address.
     */
    uint32_t families;
    /**
     * Packet mark that routes a packet to a local socket, in host byte order. 0: 0x2000, with mask 0x3000.
     * TP_RULES_LOCAL_OUTPUT uses a second mark for this host's own packets: the lowest other bit of the mask.
     */
    uint32_t mark;
    /**
     * Mask of mark bits that the rules use; other bits are preserved. 0: 0xffffffff if mark is set, else
     * 0x3000.
     */
    uint32_t mark_mask;
    /**
     * Number of the routing table that delivers packets to local sockets. 0: a free table, from 7470.
     */
    uint32_t table;
    /**
     * Priority of the first of four routing policy rules, at most 32762. 0: four free priorities, from 200.
     */
    uint32_t priority;
    /**
     * Destination ports to intercept, in any order; ranges may overlap. NULL: all ports.
     */
    const struct tp_port_range *ports;
    /**
     * Number of ranges.
     */
    size_t n_ports;
    /**
     * Destinations to intercept, in any order; prefixes may overlap. Listed destinations are intercepted even
     * if they are this host's own addresses. Traffic that this host sends to itself (interface "lo") is
     * intercepted only with TP_RULES_LOCAL_OUTPUT. NULL: all destinations except this host's own addresses,
     * loopback, broadcast and multicast.
     */
    const struct tp_prefix *dst;
    /**
     * Number of prefixes.
     */
    size_t n_dst;
    /**
     * Sources to intercept. NULL: all sources.
     */
    const struct tp_prefix *src;
    /**
     * Number of prefixes.
     */
    size_t n_src;
    /**
     * Destinations that are never intercepted; takes precedence over dst.
     *
     * Their replies are not intercepted either: see tp_install_rules().
     */
    const struct tp_prefix *bypass;
    /**
     * Number of prefixes.
     */
    size_t n_bypass;
    /**
     * Names of the interfaces on which forwarded traffic arrives. "lo" has no effect. NULL: all interfaces.
     *
     * They need not exist yet. With both backends, a trailing '*' makes a name a pattern: "ppp*" matches
     * "ppp", "ppp0" and "ppp10". A '*' elsewhere is EINVAL. A name that ends with '+' is EOPNOTSUPP with
     * iptables, where it would be a pattern.
     */
    const char *const *interfaces;
    /**
     * Number of names.
     */
    size_t n_interfaces;
    /**
     * Destination ports that are never intercepted or refused; takes precedence over ports and reject_ports.
     *
     * The fields from here on exist since 0.2.0.
     */
    const struct tp_port_range *bypass_ports;
    /**
     * Number of ranges.
     */
    size_t n_bypass_ports;
    /**
     * Sources that are never intercepted; takes precedence over src.
     */
    const struct tp_prefix *bypass_src;
    /**
     * Number of prefixes.
     */
    size_t n_bypass_src;
    /**
     * Names of interfaces; traffic that arrives on them is never intercepted. A trailing '*' makes a name a
     * pattern, as in interfaces.
     */
    const char *const *bypass_interfaces;
    /**
     * Number of names.
     */
    size_t n_bypass_interfaces;
    /**
     * Ethernet source addresses of forwarded traffic to intercept. NULL: all traffic, whether it arrived by
     * Ethernet or not. Does not restrict what this host sends.
     */
    const struct tp_mac *macs;
    /**
     * Number of addresses.
     */
    size_t n_macs;
    /**
     * Ethernet source addresses whose traffic is never intercepted.
     */
    const struct tp_mac *bypass_macs;
    /**
     * Number of addresses.
     */
    size_t n_bypass_macs;
    /**
     * Users whose traffic is intercepted, of the traffic that this host sends. NULL: all users, and packets
     * that belong to no socket.
     *
     * uids, gids and cgroups restrict TP_RULES_LOCAL_OUTPUT, and are EINVAL without it. A packet must match each
     * of the lists that are not NULL. A socket belongs to the process that created it. The first packet of a
     * connection or UDP flow decides: connection tracking keeps the decision in the bits of mark_mask of the
     * connection's mark (ct mark). EOPNOTSUPP with TP_RULES_NOTRACK.
     */
    const struct tp_id_range *uids;
    /**
     * Number of ranges.
     */
    size_t n_uids;
    /**
     * Users whose traffic is never intercepted.
     */
    const struct tp_id_range *bypass_uids;
    /**
     * Number of ranges.
     */
    size_t n_bypass_uids;
    /**
     * Groups whose traffic is intercepted: the group of the process that created the socket. NULL: all groups.
     */
    const struct tp_id_range *gids;
    /**
     * Number of ranges.
     */
    size_t n_gids;
    /**
     * Groups whose traffic is never intercepted.
     */
    const struct tp_id_range *bypass_gids;
    /**
     * Number of ranges.
     */
    size_t n_bypass_gids;
    /**
     * Control groups whose traffic is intercepted: paths of cgroup v2 below its root, such as
     * "system.slice/squid.service". Groups below them are included. They must exist (ENOENT); a group that is
     * removed and created again is another group. NULL: all. Needs Linux 5.13.
     */
    const char *const *cgroups;
    /**
     * Number of paths.
     */
    size_t n_cgroups;
    /**
     * Control groups whose traffic is never intercepted.
     */
    const char *const *bypass_cgroups;
    /**
     * Number of paths.
     */
    size_t n_bypass_cgroups;
    /**
     * Mark (SO_MARK) of packets that this host sends and that are never intercepted. 0, with a bypass_mark_mask
     * of 0: none.
     */
    uint32_t bypass_mark;
    /**
     * Mask of the bits of bypass_mark that count. 0: all bits.
     */
    uint32_t bypass_mark_mask;
    /**
     * Destination ports that are refused instead of intercepted: TCP with a reset, UDP with an ICMP error (port
     * unreachable).
     *
     * They need not be among ports, nor their protocol among those of the listeners: UDP port 443 makes
     * browsers fall back from QUIC to TCP at once. The other fields select as for intercepted packets.
     * Takes precedence over ports. The packets count as dropped.
     */
    const struct tp_port_range *reject_ports;
    /**
     * Number of ranges.
     */
    size_t n_reject_ports;
};

/**
 * Counters of the rules, in packets and in bytes. Bytes include the IP header.
 */
struct tp_rules_stats {
    /**
     * Delivered to a listener.
     */
    uint64_t intercepted_packets;
    /**
     * Bytes of these packets.
     */
    uint64_t intercepted_bytes;
    /**
     * Delivered to an existing transparent socket, including ICMP errors about packets it sent.
     */
    uint64_t diverted_packets;
    /**
     * Bytes of these packets.
     */
    uint64_t diverted_bytes;
    /**
     * Dropped because no listener existed.
     */
    uint64_t dropped_packets;
    /**
     * Bytes of these packets.
     */
    uint64_t dropped_bytes;
    /**
     * Dropped because they were addressed directly to a listener.
     */
    uint64_t direct_packets;
    /**
     * Bytes of these packets.
     */
    uint64_t direct_bytes;
};

/**
 * Instance of rules, as tp_list_rules() reports it.
 */
struct tp_instance {
    /**
     * Name of the instance.
     */
    const char *name;
    /**
     * TP_BACKEND_NFT or TP_BACKEND_IPTABLES.
     */
    uint32_t backend;
    /**
     * TP_RULES_ flags of its configuration.
     */
    uint32_t flags;
    /**
     * TP_FAMILY_ bits; 0 if unknown.
     */
    uint32_t families;
    /**
     * TP_PROTO_ bits; 0 if unknown.
     */
    uint32_t protocols;
    /**
     * Mark of packets for local sockets, and its mask; 0 if unknown.
     */
    uint32_t mark;
    /**
     * Mask of mark.
     */
    uint32_t mark_mask;
    /**
     * Routing table; 0 if unknown.
     */
    uint32_t table;
    /**
     * First routing rule priority; 0 if unknown.
     */
    uint32_t priority;
    /**
     * Process that owns the rules. 0: none, because they are persistent or their owner has ended. -1: a process in
     * another PID namespace, or one that cannot be seen from here.
     */
    int64_t owner_pid;
    /**
     * Address of its first listener, or NULL if it has none or it is unknown.
     */
    const struct sockaddr *listen_addr;
    /**
     * Size of listen_addr, or 0.
     */
    socklen_t listen_addrlen;
    /**
     * Counters since the rules were installed.
     */
    struct tp_rules_stats stats;
};

/**
 * Function that receives an instance. The struct and all data it points to are valid only during the call.
 */
typedef void (*tp_instance_fn)(const struct tp_instance *instance, void *context);

/**
 * Result of one check.
 *
 * It is valid only during the call of the tp_finding_fn. No pointer is NULL. Texts are UTF-8.
 */
struct tp_finding {
    /**
     * TP_SEVERITY_OK, TP_SEVERITY_NOTE, TP_SEVERITY_WARNING or TP_SEVERITY_FAILURE.
     */
    uint32_t severity;
    /**
     * Identifier for programs, such as "sysctl.src_valid_mark". It does not change in later versions.
     * docs/troubleshooting.md lists all identifiers.
     */
    const char *id;
    /**
     * What was found, as human-readable text.
     */
    const char *message;
    /**
     * Its effect on traffic, as human-readable text.
     */
    const char *impact;
    /**
     * Command for sh(1) that fixes it; empty if there is nothing to fix or no command fixes it. Names that
     * other programs chose are quoted in it. Read the command before you run it: some fixes end the process
     * that owns the rules, or delete a rule that another program made.
     */
    const char *fix;
};

/**
 * Callback for findings of tp_check() and tp_self_test().
 *
 * Called once per finding, in the thread that called tp_check() or tp_self_test(), with the context given
 * there. It must return (no longjmp, no C++ exception). It may call this library.
 */
typedef void (*tp_finding_fn)(const struct tp_finding *finding, void *context);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Creates a transparent socket.
 *
 * Works like socket(2) and sets IP_TRANSPARENT (ip(7)), so that the socket can bind to, listen on and
 * send from addresses that this host does not own. An AF_INET6 socket is dual-stack (IPV6_V6ONLY is
 * off): it also handles IPv4, as v4-mapped addresses. To serve IPv6 only, set IPV6_V6ONLY before bind(2),
 * or use tp_listen() with TP_LISTEN_V6ONLY. A SOCK_DGRAM socket also reports the original
 * destination of each datagram (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR). The descriptor is
 * close-on-exec.
 *
 * @param domain    AF_INET or AF_INET6.
 * @param type      SOCK_STREAM, SOCK_DGRAM or SOCK_RAW; SOCK_NONBLOCK may be added.
 * @param protocol  0, or a protocol as for socket(2).
 * @return descriptor, which the caller closes, or -1 with errno:
 *   EAFNOSUPPORT     domain is neither AF_INET nor AF_INET6, or the kernel has no IPv6
 *   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
 *   EINVAL           type is invalid, as for socket(2)
 *   EPROTONOSUPPORT  the protocol is not supported, as for socket(2)
 *   ESOCKTNOSUPPORT  the socket type is not supported, as for socket(2)
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * System calls: socket, and one setsockopt per option named above.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_socket(int domain,
              int type,
              int protocol);

/**
 * Makes an existing socket transparent.
 *
 * For sockets that come from socket activation, an event library or another language. As with
 * tp_socket(), a SOCK_DGRAM socket reports original destinations from then on. Other options are
 * unchanged: an AF_INET6 socket stays dual-stack or IPv6-only as it was. Call this before bind(2), and
 * for a listener before it is passed to tp_install_rules(). Connections accepted by a transparent
 * listener are transparent.
 *
 * @param fd  socket of family AF_INET or AF_INET6.
 * @return 0, or -1 with errno:
 *   EBADF         fd is not an open descriptor
 *   ENOTSOCK      fd is not a socket
 *   EAFNOSUPPORT  the socket's family is neither AF_INET nor AF_INET6
 *   EPERM         neither CAP_NET_RAW nor CAP_NET_ADMIN
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_set_transparent(int fd);

/**
 * Binds a socket to any address, including addresses that this host does not own.
 *
 * The socket is made transparent first; it need not come from tp_socket(). A stream socket bound to
 * port 0 gets its port when it connects or listens (IP_BIND_ADDRESS_NO_PORT); until then getsockname(2)
 * reports port 0. One address can therefore hold more connections, to several destinations, than there
 * are ephemeral ports.
 *
 * @param fd       socket of family AF_INET or AF_INET6.
 * @param addr     struct sockaddr_in or sockaddr_in6 of the socket's family, in network byte order. For
 *                 an AF_INET6 socket, IPv4 addresses are given v4-mapped.
 * @param addrlen  size of addr in bytes.
 * @return 0, or -1 with errno:
 *   EFAULT         addr is NULL
 *   EINVAL         addrlen does not fit the address family, or the socket is already bound
 *   EAFNOSUPPORT   addr is not of the socket's family, or a family is neither AF_INET nor AF_INET6
 *   EBADF          fd is not an open descriptor
 *   ENOTSOCK       fd is not a socket
 *   EPERM          neither CAP_NET_RAW nor CAP_NET_ADMIN
 *   EACCES         the port is below 1024, without CAP_NET_BIND_SERVICE
 *   EADDRINUSE     another socket has this address and port
 *   EADDRNOTAVAIL  as for bind(2); its other errors are possible too
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_bind_nonlocal(int fd,
                     const struct sockaddr *addr,
                     socklen_t addrlen);

/**
 * Creates a transparent TCP socket that listens on any address, including addresses that this host does
 * not own.
 *
 * The socket is meant to be passed to tp_install_rules(). A listener on 0.0.0.0 serves IPv4; one on ::
 * serves IPv6 and IPv4, or with TP_LISTEN_V6ONLY only IPv6; one on 127.0.0.1 or ::1 is reached only by interception. SO_REUSEADDR is set, so
 * that a program can be restarted at once.
 *
 * @param addr     struct sockaddr_in or sockaddr_in6, in network byte order. With port 0 the kernel
 *                 chooses a port, which getsockname(2) reports.
 * @param addrlen  size of addr in bytes.
 * @param backlog  as for listen(2); if negative, the system's maximum (net.core.somaxconn) is used.
 * @param flags    TP_NONBLOCK, TP_LISTEN_REUSEPORT and TP_LISTEN_V6ONLY, or 0.
 * @return descriptor, which the caller closes, or -1 with errno:
 *   EFAULT           addr is NULL
 *   EINVAL           addrlen does not fit the address family, or flags has an unknown bit
 *   EINVAL           TP_LISTEN_V6ONLY is given, and addr is an IPv4 address or v4-mapped
 *   EAFNOSUPPORT     the family is neither AF_INET nor AF_INET6, or the kernel lacks it
 *   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
 *   EACCES           the port is below 1024, without CAP_NET_BIND_SERVICE
 *   EADDRINUSE       another socket has this address and port
 *   EADDRNOTAVAIL    as for bind(2)
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_listen(const struct sockaddr *addr,
              socklen_t addrlen,
              int backlog,
              uint32_t flags);

/**
 * Connects to dst with src as the source address, which this host need not own.
 *
 * The server sees a connection from src. Replies return to this host if it is on their path, and reach
 * the socket through the divert rule of tp_install_rules() (not with TP_RULES_REDIRECT). The same applies
 * to ICMP errors about its packets (packet too big, port unreachable).
 *
 * Source port: without TP_CONNECT_KEEP_PORT and TP_CONNECT_SAME_PORT, any port that is free for this
 * destination; the port in src is ignored. With TP_CONNECT_KEEP_PORT, the port in src, unless it is 0, in
 * use (EADDRINUSE or EADDRNOTAVAIL) or not permitted (below 1024 without CAP_NET_BIND_SERVICE); then any
 * port. With TP_CONNECT_SAME_PORT, the port in src and no other.
 *
 * TP_NONBLOCK: the connection may still be in progress when the call returns. Wait until the socket is
 * writable, then read SO_ERROR. Without TP_NONBLOCK the call blocks, at most as long as the kernel
 * retries (net.ipv4.tcp_syn_retries).
 *
 * TP_CONNECT_DGRAM: the socket is a UDP socket connected to dst. send(2) sends from src, and recv(2)
 * receives what dst sends to src. A datagram from a third party that arrives at src during the call is
 * dropped. If one that slips through would matter, check the sender that recvfrom(2) reports.
 * Datagrams that the client sends still go to the listener. Several such sockets may share a port of
 * src if their destinations differ (SO_REUSEADDR). Do not create two with the same port and
 * destination: the kernel allows it and delivers replies to an arbitrary one.
 *
 * TP_CONNECT_DATA_FOLLOWS: the final ACK of the handshake is sent with the first data, and the ACK of
 * the first reply also waits for data if it can, which saves one or two packets on a short connection
 * (TCP_QUICKACK off, tcp(7)). It is meant for a program that has the client's first bytes before it
 * connects. If no data is sent, the ACK is sent after 200 ms (TCP_DELACK_MAX, include/net/tcp.h) or
 * after setsockopt(TCP_QUICKACK, 1); a server that sends first waits that long.
 *
 * @param src     struct sockaddr_in or sockaddr_in6, in network byte order. A v4-mapped address is
 *                treated as IPv4, so results of accept(2) and tp_orig_dst() can be passed unchanged.
 * @param srclen  size of src in bytes.
 * @param dst     address to connect to, of the same family as src, in the same form.
 * @param dstlen  size of dst in bytes.
 * @param flags   TP_CONNECT_KEEP_PORT or TP_CONNECT_SAME_PORT, TP_NONBLOCK, TP_CONNECT_DGRAM and
 *                TP_CONNECT_DATA_FOLLOWS, or 0.
 * @return connected socket, which the caller closes, or -1 with errno:
 *   EFAULT           src or dst is NULL
 *   EINVAL           srclen or dstlen does not fit its address family
 *   EINVAL           flags has an unknown bit
 *   EINVAL           TP_CONNECT_DATA_FOLLOWS is given together with TP_CONNECT_DGRAM
 *   EINVAL           TP_CONNECT_SAME_PORT is given together with TP_CONNECT_KEEP_PORT, or the port in src
 *                    is 0
 *   EINVAL           src is multicast or 255.255.255.255 (the broadcast address of a subnet is not refused)
 *   EINVAL           src or dst is unspecified (0.0.0.0, ::, ::ffff:0.0.0.0): the kernel would use an
 *                    address of this host, or connect to this host
 *   EAFNOSUPPORT     a family is neither AF_INET nor AF_INET6, or src and dst differ in family
 *   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
 *   EADDRINUSE       with TP_CONNECT_SAME_PORT: another socket has the address and port of src, or the
 *                    addresses and ports of src and dst have a connection (or one in TIME_WAIT)
 *   EACCES           with TP_CONNECT_SAME_PORT: the port is below 1024, without CAP_NET_BIND_SERVICE
 *   EADDRNOTAVAIL    no port of src is free for dst
 *   EINTR            a signal interrupted the wait
 *   ECONNREFUSED, ETIMEDOUT, ENETUNREACH, EHOSTUNREACH
 *                    as for connect(2); its other errors are possible too
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * On failure no descriptor is left open.
 *
 * System calls: socket, setsockopt(IP_TRANSPARENT), setsockopt(IP_BIND_ADDRESS_NO_PORT), bind, connect.
 * With TP_CONNECT_KEEP_PORT or TP_CONNECT_SAME_PORT, SO_REUSEADDR is set in place of IP_BIND_ADDRESS_NO_PORT. With
 * TP_CONNECT_DGRAM, IP_BIND_ADDRESS_NO_PORT is never set, and a recv at the end discards datagrams
 * that arrived from others before the connect. TP_CONNECT_DATA_FOLLOWS adds one setsockopt.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_connect_from(const struct sockaddr *src,
                    socklen_t srclen,
                    const struct sockaddr *dst,
                    socklen_t dstlen,
                    uint32_t flags);

/**
 * Connects a socket of the caller's to dst with src as the source address, which this host need not own.
 *
 * Does with an existing socket what tp_connect_from() does with a new one, so that options can be set
 * before: SO_MARK, SO_BINDTODEVICE, SO_RCVBUF, IP_TOS, TCP_FASTOPEN_CONNECT, TCP_CONGESTION, Multipath TCP
 * (IPPROTO_MPTCP). The socket is made transparent; it need not come from tp_socket(). It is a stream or
 * datagram socket on which bind(2), listen(2) and connect(2) were not called. An AF_INET socket takes IPv4
 * addresses, also v4-mapped. An AF_INET6 socket takes IPv6 addresses, and also IPv4 addresses unless it is
 * IPv6-only (IPV6_V6ONLY).
 *
 * Whether the call waits for the connection is decided by the socket (O_NONBLOCK). If the socket is
 * non-blocking, the connection may still be in progress when the call returns 0: wait until the socket is
 * writable, then read SO_ERROR. With TCP_FASTOPEN_CONNECT, the connection may begin with the first data.
 * Replies, ICMP errors and datagrams of third parties are as described in tp_connect_from(). With IP_TOS or
 * IPV6_TCLASS set before, the connection has the client's DSCP from the first packet on (docs/dscp.md in the
 * source).
 *
 * @param fd      the caller's socket, which stays the caller's, also if the call fails.
 * @param src     struct sockaddr_in or sockaddr_in6, in network byte order, as for tp_connect_from().
 * @param srclen  size of src in bytes.
 * @param dst     address to connect to, of the same family as src, in the same form.
 * @param dstlen  size of dst in bytes.
 * @param flags   TP_CONNECT_KEEP_PORT or TP_CONNECT_SAME_PORT, and TP_CONNECT_DATA_FOLLOWS (stream sockets
 *                only), or 0.
 * @return 0, or -1 with errno:
 *   EFAULT           src or dst is NULL
 *   EINVAL           srclen or dstlen does not fit its address family
 *   EINVAL           flags has an unknown bit, or TP_NONBLOCK or TP_CONNECT_DGRAM
 *   EINVAL           TP_CONNECT_DATA_FOLLOWS is given, and the socket is a datagram socket
 *   EINVAL           TP_CONNECT_SAME_PORT is given together with TP_CONNECT_KEEP_PORT, or the port in src
 *                    is 0
 *   EINVAL           src is multicast or 255.255.255.255, or src or dst is unspecified
 *   EINVAL           the socket is bound already, listens, or is connecting
 *   EISCONN          the socket is connected already
 *   EAFNOSUPPORT     a family is neither AF_INET nor AF_INET6, or src and dst differ in family
 *   EAFNOSUPPORT     the addresses are IPv6 and the socket is AF_INET, or they are IPv4 and the socket is
 *                    IPv6-only
 *   ESOCKTNOSUPPORT  the socket is neither a stream socket nor a datagram socket
 *   EBADF            fd is not an open descriptor
 *   ENOTSOCK         fd is not a socket
 *   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
 *   EADDRINUSE       with TP_CONNECT_SAME_PORT: another socket has the address and port of src
 *   EADDRINUSE       with TP_CONNECT_SAME_PORT or TP_CONNECT_KEEP_PORT: the addresses and ports of src and
 *                    dst have a connection (or one in TIME_WAIT)
 *   EACCES           with TP_CONNECT_SAME_PORT: the port is below 1024, without CAP_NET_BIND_SERVICE
 *   EADDRNOTAVAIL    no port of src is free for dst
 *   EINTR            a signal interrupted the wait; the kernel goes on connecting, as after connect(2)
 *   EINPROGRESS      the socket is blocking, and its SO_SNDTIMEO has passed; the kernel goes on connecting
 *   ECONNREFUSED, ETIMEDOUT, ENETUNREACH, EHOSTUNREACH
 *                    as for connect(2); its other errors, and those of bind(2), are possible too
 *
 * State after a failure: if the call fails before connect(2), the socket is as it was, including
 * IP_TRANSPARENT. After connect(2) has failed (EADDRNOTAVAIL, EADDRINUSE of a connection, EINTR,
 * EINPROGRESS, ECONNREFUSED and the errors named beside it), the socket stays transparent and bound to src.
 * A program may call connect(2) again, from the same source; tp_connect_socket() then fails with EINVAL. For
 * another source, close the socket and create another.
 *
 * TP_CONNECT_KEEP_PORT: a bound socket cannot change its port. Where tp_connect_from() connects from another
 * port because src and dst have a connection already, this call fails with EADDRINUSE. Call it again with a
 * new socket and without the flag.
 *
 * System calls: getsockname; getsockopt(SO_TYPE); getsockopt and setsockopt of IP_TRANSPARENT, of
 * IP_BIND_ADDRESS_NO_PORT (stream sockets; with a source port SO_REUSEADDR) and with
 * TP_CONNECT_DATA_FOLLOWS of TCP_QUICKACK, where setsockopt is left out if the option is set; bind; connect.
 * getsockopt(IPV6_V6ONLY) if an AF_INET6 socket connects to an IPv4 address; fcntl if the connection is in
 * progress; a recv for a datagram socket.
 *
 * Thread-safe.
 *
 * @since 0.2.0
 */
int tp_connect_socket(int fd,
                      const struct sockaddr *src,
                      socklen_t srclen,
                      const struct sockaddr *dst,
                      socklen_t dstlen,
                      uint32_t flags);

/**
 * Accepts a connection, and returns the client's address and the original destination.
 *
 * Does what accept4(2) and tp_orig_dst() do, in one call. Both addresses are of the listener's family: an
 * IPv4 connection of an AF_INET6 listener is reported v4-mapped (tp_unmap_addr() converts it).
 *
 * TP_ACCEPT_TPROXY: the listener is transparent (tp_listen(), tp_set_transparent()), so the accepted socket
 * has the original destination as its local address, and is not asked whether it is transparent. Do not use
 * this flag with TP_RULES_REDIRECT: the result would be the listener's own address.
 *
 * A connection that was accepted and whose original destination cannot be found is closed. A client can
 * cause this only with a listener that is not transparent, by connecting to it directly (ENOENT): a program
 * that gets ENOENT calls tp_accept() again.
 *
 * @param listener     listening stream socket of family AF_INET or AF_INET6.
 * @param client       buffer for the client's address, in network byte order, or NULL.
 * @param clientlen    size of client in bytes; on success the size of the address. Ignored if client is
 *                     NULL.
 * @param orig_dst     buffer for the original destination, in network byte order.
 * @param orig_dstlen  size of orig_dst in bytes; on success the size of the address. A short buffer is
 *                     EINVAL; an address is never truncated. A struct sockaddr_storage is always enough.
 * @param flags        TP_ACCEPT_TPROXY and TP_NONBLOCK, or 0.
 * @return descriptor of the connection, close-on-exec, which the caller closes, or -1 with errno and with
 *         the buffers and sizes unchanged:
 *   EFAULT        orig_dst or orig_dstlen is NULL, or clientlen is NULL and client is not
 *   EINVAL        flags has an unknown bit, or the socket does not listen
 *   EINVAL        a buffer is too small: a connection is accepted and closed, unless the buffer is too small
 *                 for an IPv4 address
 *   EBADF         listener is not an open descriptor
 *   ENOTSOCK      listener is not a socket
 *   EOPNOTSUPP    listener is not a stream socket
 *   EAGAIN        the listener is non-blocking, and no connection waits
 *   EINTR         a signal interrupted the wait
 *   ECONNABORTED  the connection ended before it was accepted
 *   EMFILE        the descriptor limit of the process is reached
 *   ENFILE        the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM
 *                 not enough memory
 *   ENOENT        the connection was not intercepted: its socket is not transparent, and connection
 *                 tracking has no REDIRECT or DNAT of it; the connection is closed
 *   EAFNOSUPPORT  the listener's family is neither AF_INET nor AF_INET6; the connection is closed
 *
 * Other errors of accept(2) are possible too.
 *
 * System calls: accept4 and getsockname with TP_ACCEPT_TPROXY; otherwise accept4, getsockopt and
 * getsockname, and one more getsockopt if the socket is not transparent.
 *
 * Thread-safe.
 *
 * @since 0.2.0
 */
int tp_accept(int listener,
              struct sockaddr *client,
              socklen_t *clientlen,
              struct sockaddr *orig_dst,
              socklen_t *orig_dstlen,
              uint32_t flags);

/**
 * Returns the destination that an accepted connection had before it was intercepted.
 *
 * Works for both kinds of interception. A transparent socket (TPROXY) has the original destination as
 * its local address. For any other socket, connection tracking is queried (SO_ORIGINAL_DST: REDIRECT,
 * DNAT). Connection tracking is never queried for a transparent socket, because it may hold the entry
 * of a different connection. For a connection made directly to a transparent listener, the result is
 * the listener's own address, to which the client connected.
 *
 * @param fd       stream socket from accept(2).
 * @param addr     buffer for the address, in network byte order and of the socket's family: an IPv4
 *                 connection of an AF_INET6 listener is reported v4-mapped.
 * @param addrlen  size of addr in bytes; on success the size of the address. A short buffer is
 *                 EINVAL; the address is never truncated. A struct sockaddr_storage is always enough.
 * @return 0, or -1 with errno and with addr and addrlen unchanged:
 *   EFAULT        addr or addrlen is NULL
 *   EINVAL        the buffer is too small
 *   ENOENT        the socket is not transparent, and connection tracking has no REDIRECT or DNAT of it
 *   ENOTCONN      the socket is bound to the wildcard address, or not bound: it was not accepted
 *   EBADF         fd is not an open descriptor
 *   ENOTSOCK      fd is not a socket
 *   EAFNOSUPPORT  the socket's family is neither AF_INET nor AF_INET6
 *
 * System calls: getsockopt and getsockname; one more getsockopt if the socket is not transparent.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_orig_dst(int fd,
                struct sockaddr *addr,
                socklen_t *addrlen);

/**
 * Converts a v4-mapped address to the IPv4 address that it stands for.
 *
 * ::ffff:a.b.c.d in a struct sockaddr_in6 becomes a.b.c.d in a struct sockaddr_in, in place, with the same
 * port. The bytes after it are set to zero, up to the size that the struct sockaddr_in6 had. Any other IPv4
 * or IPv6 address is unchanged. AF_INET6 sockets that also serve IPv4 report v4-mapped addresses
 * (tp_accept(), tp_orig_dst(), tp_recv_datagrams()); a program that compares or prints addresses converts
 * them first.
 *
 * @param addr     struct sockaddr_in or sockaddr_in6.
 * @param addrlen  size of addr in bytes; becomes sizeof(struct sockaddr_in) if the address is converted.
 * @return 0, or -1 with errno and with addr and addrlen unchanged:
 *   EFAULT  addr or addrlen is NULL
 *   EINVAL  addr is not an IPv4 or IPv6 address, or addrlen does not fit its family
 *
 * System calls: none.
 *
 * Thread-safe.
 *
 * @since 0.2.0
 */
int tp_unmap_addr(struct sockaddr *addr,
                  socklen_t *addrlen);

/**
 * Receives a datagram with its sender and original destination (one recvmsg(2)).
 *
 * The socket must come from tp_socket() or tp_set_transparent(); otherwise the kernel does not report
 * the original destination. For a socket with UDP_GRO use tp_recv_datagrams().
 *
 * @param fd      UDP socket.
 * @param buf     buffer for the data; bytes that do not fit are discarded.
 * @param len     size of buf in bytes.
 * @param flags   MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC and MSG_WAITALL, as for recvfrom(2), or 0.
 * @param src     buffer for the sender's address, or NULL.
 * @param srclen  size of src before the call, size of the address after it; an address that does not
 *                fit is truncated, as by recvfrom(2). A struct sockaddr_storage is always enough.
 * @param dst     buffer for the original destination, or NULL.
 * @param dstlen  as srclen, for dst. If the kernel does not report the original destination, *dstlen is
 *                set to 0 and the family of dst to AF_UNSPEC.
 * @return number of bytes received, which is 0 for an empty datagram, or -1 with errno:
 *   EAGAIN        nothing is queued and the call may not block
 *   EFAULT        buf is NULL while len is not 0
 *   EFAULT        src is not NULL while srclen is NULL, or dst is not NULL while dstlen is NULL
 *   EINVAL        flags has an unknown bit
 *   EINVAL        *srclen or *dstlen is less than sizeof(struct sockaddr_in)
 *   EBADF         fd is not an open descriptor
 *   ENOTSOCK      fd is not a socket
 *   EINTR         a signal interrupted the wait
 *   ECONNREFUSED  as for recvmsg(2); its other errors are possible too
 *
 * Addresses have the socket's family: an AF_INET6 socket reports IPv4 addresses v4-mapped. A call that
 * fails discards no datagram.
 *
 * System calls: recvmsg.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
ssize_t tp_recvfrom(int fd,
                    void *buf,
                    size_t len,
                    int flags,
                    struct sockaddr *src,
                    socklen_t *srclen,
                    struct sockaddr *dst,
                    socklen_t *dstlen);

/**
 * Extracts the original destination from a message that the caller received itself.
 *
 * For programs that use recvmsg(2), recvmmsg(2) or io_uring. Only the control data, msg_flags and the
 * family of msg_name are read. None of them is trusted, and msg is not changed.
 *
 * @param msg      message as filled in by the kernel, with a control buffer of at least CMSG_SPACE(28)
 *                 bytes, or more if the socket reports more.
 * @param addr     buffer for the address. An IPv4 address is v4-mapped if the family of msg_name is
 *                 AF_INET6; without msg_name it is unchanged.
 * @param addrlen  size of addr in bytes; on success the size of the address. A short buffer is
 *                 EINVAL; the address is never truncated.
 * @return 0, or -1 with errno and with addr and addrlen unchanged:
 *   ENOENT  the message has no original destination
 *   EFAULT  msg, addr or addrlen is NULL, or msg_control is NULL while msg_controllen is not 0
 *   EINVAL  the buffer is too small
 *
 * System calls: none.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_msg_orig_dst(const struct msghdr *msg,
                    struct sockaddr *addr,
                    socklen_t *addrlen);

/**
 * Receives a batch of datagrams with their senders and original destinations (one recvmmsg(2)).
 *
 * Blocks until one datagram arrives, unless fd is non-blocking or MSG_DONTWAIT is given, then returns
 * what is queued.
 *
 * Sets len, segment_len, flags, error, client and orig_dst of each received element; other elements are
 * unchanged. error is 0. Addresses have the socket's family: an AF_INET6 socket reports IPv4 addresses
 * v4-mapped. If the kernel does not report the original destination, TP_DGRAM_NO_ORIG_DST is set and
 * orig_dst.ss_family is AF_UNSPEC.
 *
 * If UDP_GRO is set on the socket (udp(7), Linux 5.0), equally sized datagrams of one flow are received
 * as one element of up to 64 KiB, and segment_len is their size. Provide buffers that are large enough:
 * an element longer than capacity is truncated.
 *
 * @param fd      UDP socket from tp_socket() or tp_set_transparent().
 * @param dgrams  array; data and capacity of each element name the receive buffer.
 * @param count   number of elements; at most TP_BATCH_MAX are used.
 * @param flags   0 or MSG_DONTWAIT.
 * @return number of datagrams received (0 only if count is 0), or -1 with errno:
 *   EAGAIN        nothing is queued and the call may not block
 *   EFAULT        dgrams is NULL, or an element has capacity > 0 and data == NULL
 *   EINVAL        flags has an unknown bit
 *   EBADF         fd is not an open descriptor
 *   ENOTSOCK      fd is not a socket
 *   EINTR         a signal interrupted the wait
 *   ECONNREFUSED  as for recvmmsg(2); its other errors are possible too
 *
 * System calls: recvmmsg.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_recv_datagrams(int fd,
                      struct tp_datagram *dgrams,
                      unsigned int count,
                      int flags);

/**
 * Opens a replier, which sends datagrams from any source address and port.
 *
 * A replier has one socket per source port and family, regardless of the number of source addresses and
 * clients. The socket cannot receive traffic meant for other sockets: it is bound to an address that is
 * not in use (192.0.0.8, RFC 7600; 100:0:0:1::1, RFC 9780), and drops packets sent to that address.
 * Servers on other sockets of the port, servers on specific addresses and the listeners of the program
 * are not disturbed. A server that starts later on the wildcard address needs SO_REUSEADDR (or set
 * TP_REPLIER_RAW here).
 *
 * If another socket holds the port on the wildcard address without SO_REUSEADDR (such as a DNS server on
 * 0.0.0.0:53), or if the port is below 1024 and CAP_NET_BIND_SERVICE is missing, datagrams are sent
 * through a raw socket, which needs CAP_NET_RAW. The port is tried again once per second.
 *
 * @param config   configuration, or NULL for the defaults.
 * @param size     sizeof(struct tp_replier_config), or 0 if config is NULL.
 * @param replier  receives the handle, only on success; tp_replier_close() frees it.
 * @return 0, or -1 with errno:
 *   EFAULT           replier is NULL, or config is NULL while size is not 0
 *   EINVAL           flags has an unknown bit, or reserved is not 0
 *   EINVAL           max_sockets is greater than 65,536
 *   EINVAL           size is less than the size of the first version of the struct
 *   E2BIG            config has fields that this version does not know, and they are not 0
 *   EPERM            neither CAP_NET_RAW nor CAP_NET_ADMIN
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * A replier may be used by only one thread at a time; open one per thread. tp_reply() creates sockets as
 * needed, in the network namespace of the thread that calls it.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_replier_open(const struct tp_replier_config *config,
                    size_t size,
                    struct tp_replier **replier);

/**
 * Sends a batch of datagrams, each from its orig_dst to its client.
 *
 * Elements that tp_recv_datagrams() filled can be passed unchanged, with new data. Reads data, len,
 * segment_len, client and orig_dst of each element, and sets error, to 0 if the element was sent. A
 * datagram that fails does not stop the others. Datagrams of one flow keep their order.
 *
 * orig_dst is an address and port, which this host need not own. client must be of the same family;
 * either may be v4-mapped. The route selects the outgoing interface; for a link-local client,
 * sin6_scope_id selects it.
 *
 * If segment_len is non-zero and less than len, the element is sent as several datagrams of segment_len
 * bytes. Consecutive, equally sized datagrams of one flow (the last may be shorter) are sent as one
 * message. Both use UDP_SEGMENT, one pass through the kernel; if that is not possible, the datagrams are
 * sent one by one.
 *
 * Datagrams that exceed the MTU of the outgoing interface are fragmented. IPv4 payloads above 524 bytes
 * are sent without DF, because ICMP "fragmentation needed" would go to the owner of the source address,
 * not to this host. (Linux assumes that no path has an MTU below 552 bytes: DEFAULT_MIN_PMTU,
 * net/ipv4/route.c.)
 *
 * @param replier  handle from tp_replier_open().
 * @param dgrams   array of datagrams.
 * @param count    number of elements; any number.
 * @return number of elements sent, which may be 0, or -1 with errno:
 *   EFAULT  replier or dgrams is NULL
 *
 * Errors of a single element, in its field error:
 *   EFAULT         data is NULL while len is not 0
 *   EAFNOSUPPORT   an address family is neither AF_INET nor AF_INET6, or the families differ
 *   EINVAL         a port is 0
 *   EINVAL         client is the unspecified address
 *   EADDRNOTAVAIL  orig_dst is the unspecified address or a multicast address
 *   EINVAL, ENETUNREACH
 *                  the kernel refuses this source (broadcast) or this client
 *   EMSGSIZE       the data is longer than a datagram can be
 *   EAGAIN         the send buffer is full, with TP_NONBLOCK
 *   EINTR          a signal interrupted the wait for send buffer space; the remaining elements were
 *                  not tried
 *   EPERM          a firewall rejected the datagram, or a raw socket is needed without CAP_NET_RAW
 *   ENOBUFS, EMFILE, ENFILE, ENOMEM
 *                  as for sendmsg(2) and socket(2); their other errors are possible too
 *
 * System calls, per 256 datagrams: one sendmmsg per source port, and one for all datagrams whose source
 * port another socket holds; one more per TP_BATCH_MAX datagrams of one port, and one more per failed
 * datagram. A new source port costs seven more system calls. The larger the batch, up to 256, the lower
 * the cost per datagram. Nothing is allocated.
 *
 * Use a replier from one thread at a time.
 *
 * @since 0.1.0
 */
int tp_reply(struct tp_replier *replier,
             struct tp_datagram *dgrams,
             unsigned int count);

/**
 * Reads the counters of a replier.
 *
 * Call it from the thread that uses the replier.
 *
 * @param replier  handle from tp_replier_open().
 * @param stats    receives the counters.
 * @param size     sizeof(struct tp_replier_stats).
 * @return 0, or -1 with errno:
 *   EFAULT  replier or stats is NULL
 *   EINVAL  size is less than the size of the first version of the struct
 *   E2BIG   size is greater than the size of the struct in this version
 *
 * @since 0.1.0
 */
int tp_replier_stats(const struct tp_replier *replier, struct tp_replier_stats *stats, size_t size);

/**
 * Closes a replier and its sockets.
 *
 * @param replier  handle from tp_replier_open(), or NULL, which does nothing.
 *
 * @since 0.1.0
 */
void tp_replier_close(struct tp_replier *replier);

/**
 * Installs the kernel rules that deliver matching traffic to the listeners: an nf_tables table owned by
 * this process, and policy routing.
 *
 * Intercepts forwarded traffic and, with TP_RULES_LOCAL_OUTPUT, locally generated traffic, as selected by
 * config; never traffic to this host's own addresses, loopback, broadcast or multicast, unless dst names
 * it. While no listener exists, matching traffic is dropped, so that no packet bypasses the proxy.
 *
 * Replies of connections that others began are never intercepted: those of port forwards, of inbound services
 * of a LAN, of this host's services and of this host's own connections. If the port selection could match
 * them (ports is NULL or includes one above 1023), connection tracking is used to recognize them, which
 * enables it on this host:
 *   - TCP: a packet that begins a connection is never a reply. Other packets are not intercepted if they are in
 *     the reply direction of a tracked connection.
 *   - UDP: a datagram in the reply direction of a tracked connection is not intercepted, unless a transparent
 *     socket of this host began that connection. A host that sends a datagram to a client first therefore
 *     receives the client's datagrams to that address and port directly.
 *
 * Ports below 1024 count as ports of services, not of clients: replies to such ports are not recognized.
 *
 * A listener that serves only one family leaves packets of the other family alone: with a listener on 0.0.0.0,
 * forwarded IPv6 packets bypass the proxy. A listener on the IPv6 wildcard address serves both, and rules for both
 * are installed whether this host has IPv6 or not. While IPv6 is disabled on lo, the kernel refuses the route that they need:
 * until tp_verify_rules() or tp_replace_rules() completes it, selected IPv6 packets are dropped.
 *
 * If the selections of several instances overlap, the first installed instance intercepts.
 *
 * Packets that no other host can legitimately send are never intercepted. If they match the selection,
 * they are dropped and counted as dropped:
 *   - packets with one of this host's own addresses, a broadcast or a multicast address as the source,
 *     unless they arrived on lo
 *   - packets to 127.0.0.0/8 or ::1, unless they arrived on lo
 *   - IPv4 packets from or to 0.0.0.0/8
 *   - IPv6 packets from or to the unspecified address (::), a v4-mapped address (::ffff:0:0/96) or another
 *     address in ::/80
 *
 * IPv6 packets with such an address are not diverted to transparent sockets either. With iptables and
 * TP_RULES_REDIRECT, all these packets are left unchanged, because the nat table cannot drop.
 *
 * The table belongs to the process: the kernel removes it when the process ends for any reason, and no
 * other program can change it (`nft flush ruleset` skips it). A forked child that has not called exec
 * keeps it. Routing has no owner: the routes and routing rules of a killed process affect no packet, and
 * the next tp_install_rules() or tp_purge_rules() removes them. After the rules are removed, traffic
 * flows as it did before they were installed. To restart without a gap, install rules under a second name
 * before the first process ends, or use TP_RULES_PERSIST.
 *
 * @param config  traffic to intercept.
 * @param size    sizeof(struct tp_rules_config).
 * @param rules   receives the handle, only on success; tp_remove_rules() frees it.
 * @return 0, or -1 with errno:
 *   EFAULT           config or rules is NULL, or an array is NULL while its count is not 0
 *   EINVAL           a value is out of range, or flags has an unknown bit
 *   EINVAL           a listener is not transparent, not bound or not listening
 *   EINVAL           size is less than the size of the first version of the struct
 *   E2BIG            config has fields that this version does not know, and they are not 0
 *   EOPNOTSUPP       this version cannot do it, or the kernel lacks an option, which tp_last_error() names
 *   EPERM            CAP_NET_ADMIN is missing in the owner of this network namespace
 *   EBUSY            a running process has rules of this name, or uses this table or priority
 *   EEXIST           another program uses the requested name, table or priority
 *   EEXIST           rules of this name persist without an owner, and TP_RULES_PERSIST is not set
 *   EBADF            a listener is not an open descriptor
 *   ENOTSOCK         a listener is not a socket
 *   ENETDOWN         the interface lo is down
 *   EACCES           IPv6 is requested and disabled on lo
 *   EAGAIN           other programs change nf_tables continuously
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * On failure no rule or route remains. Runs no program, except with TP_BACKEND_IPTABLES, and with
 * TP_BACKEND_AUTO if nf_tables is missing; see "Programs" in tproxy(7) for the errors of programs.
 *
 * Reverse-path filtering works as before, whether net.ipv4.conf.*.src_valid_mark is set or not. No sysctl
 * is changed. Forwarding (net.ipv4.ip_forward, net.ipv6.conf.all.forwarding) is not required for
 * intercepted traffic.
 *
 * Needs Linux 5.12.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_install_rules(const struct tp_rules_config *config,
                     size_t size,
                     struct tp_rules **rules);

/**
 * Removes the rules that tp_install_rules() installed and frees the handle.
 *
 * Established proxied connections break: their packets are no longer diverted.
 *
 * In a forked child of the process that installed the rules, while that process lives, it removes nothing
 * (like tp_forget_rules()) and returns 0. After that process has ended, the first child that calls it
 * removes the rules for all processes. If another process has already removed the rules, it removes nothing
 * and returns 0, even if another instance now has their name.
 *
 * @param rules  handle, or NULL, which does nothing. The handle is freed whatever is returned.
 * @return 0, or -1 with errno if something could not be removed, which tp_last_error() names:
 *   EBADF  the program closed the descriptors of the handle; nothing is written to them or closed, and
 *          tp_purge_rules() removes what remains
 *   EPERM  CAP_NET_ADMIN is missing; the kernel removes the table when the process ends
 *
 * Rules and routes that are already removed are not an error. No other call may use the handle at the same
 * time.
 *
 * @since 0.1.0
 */
int tp_remove_rules(struct tp_rules *rules);

/**
 * Frees a forked child's copy of a handle without removing the rules.
 *
 * Closes the child's copies of the descriptors and frees the handle. Call it once, first, in a worker
 * process that was forked by the process that installed the rules. The kernel keeps the table until every
 * process that has the descriptors has ended or has called this function. In the process that installed
 * the rules, call tp_remove_rules() instead: there this function leaves routing behind, which the next
 * tp_install_rules() or tp_purge_rules() removes.
 *
 * @param rules  handle, or NULL, which does nothing. The handle is freed.
 *
 * errno is unchanged. Not async-signal-safe.
 *
 * Thread-safe; no other call may use the handle at the same time.
 *
 * @since 0.2.0
 */
void tp_forget_rules(struct tp_rules *rules);

/**
 * Atomically replaces the configuration of installed rules.
 *
 * One transaction: each packet is processed by either the old or the new rules. Counters are preserved.
 * The name and TP_RULES_PERSIST cannot change. table and priority can: routing is added at its new place
 * before it is deleted at the old one. If they are 0, routing stays where it is, unless a routing rule of
 * another program takes intercepted packets first. On failure the old rules are unchanged.
 *
 * @param rules   handle from tp_install_rules().
 * @param config  new configuration.
 * @param size    sizeof(struct tp_rules_config).
 * @return 0, or -1 with errno:
 *   EFAULT   rules or config is NULL, or an array is NULL while its count is not 0
 *   ENOENT   the table was removed, or now belongs to another instance
 *   EBADF    the program closed the descriptors of the handle, or their numbers are now used otherwise
 *   EBUSY    this is a forked child, and the process that installed the rules is running
 *   EDEADLK  another thread was in a call on the handle when this process was forked
 *   EINVAL, E2BIG, EOPNOTSUPP, EPERM
 *            as for tp_install_rules(); its other errors are possible too
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_replace_rules(struct tp_rules *rules,
                     const struct tp_rules_config *config,
                     size_t size);

/**
 * Verifies that installed rules still work, and optionally repairs their routing.
 *
 * Other programs can delete routing rules and routes (`ip rule flush`), or add routing rules that take
 * intercepted packets first, as wg-quick does. Connections then time out. With TP_VERIFY_REPAIR, missing
 * routing is added again, and routing that another program has overtaken is moved ahead of that program's
 * rules. It is added at its new place before it is deleted at the old one. If the configuration has a
 * priority, routing is not moved: use tp_replace_rules(). Also completes rules that were installed while
 * IPv6 was disabled on lo.
 *
 * @param rules  handle from tp_install_rules().
 * @param flags  0 or TP_VERIFY_REPAIR.
 * @return 0 if the rules are as installed, or -1 with errno:
 *   ENOENT    the table was removed, or now belongs to another instance, or the chains of iptables were
 *             removed
 *   ESTALE    routing is missing, or a routing rule of another program may take intercepted packets first,
 *             or IPv6 was disabled on lo when the rules were installed
 *   ESTALE    another process has changed the rules since this process was forked
 *   ENOTCONN  no socket receives the packets that the rules intercept
 *   EFAULT    rules is NULL
 *   EINVAL    flags has an unknown bit
 *   EBADF     the program closed the descriptors of the handle, or their numbers are now used otherwise
 *   EBUSY     this is a forked child, and the process that installed the rules is running
 *   EDEADLK   another thread was in a call on the handle when this process was forked
 *   ENETDOWN  the interface lo is down, with TP_VERIFY_REPAIR
 *
 * With TP_VERIFY_REPAIR the other errors of tp_install_rules() are possible too. Reads the routing rules and
 * at most 10,000 sockets of each family and protocol. With TP_BACKEND_IPTABLES, runs iptables-save; see
 * "Programs" in tproxy(7).
 *
 * Thread-safe.
 *
 * @since 0.2.0
 */
int tp_verify_rules(struct tp_rules *rules,
                    uint32_t flags);

/**
 * Lists the instances of rules in this network namespace, whichever process installed them.
 *
 * Includes persistent instances, and chains of iptables whose process was killed.
 *
 * @param report   called once per instance, in the order of their names.
 * @param context  passed to report.
 * @return number of instances, or -1 with errno and report not called:
 *   EFAULT           report is NULL
 *   EPERM            CAP_NET_ADMIN is missing in the owner of this network namespace
 *   EAGAIN, ETIMEDOUT, EOPNOTSUPP, EIO
 *                    a program of iptables failed; see "Programs" in tproxy(7)
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * Runs iptables-save only if the kernel has chains of this library.
 *
 * Thread-safe.
 *
 * @since 0.2.0
 */
int tp_list_rules(tp_instance_fn report, void *context);

/**
 * Removes what a dead or persistent instance left behind: its rules, if they are persistent, and routing.
 *
 * Never removes the rules of a running process. An instance that left nothing is not an error. Success
 * means that nothing is left: if this cannot be determined, the call fails.
 *
 * @param name  name of the instance, or NULL for all instances.
 * @return 0, or -1 with errno:
 *   EBUSY            a running process has these rules
 *   EINVAL           name is not valid
 *   EPERM            CAP_NET_ADMIN is missing in the owner of this network namespace
 *   EAGAIN, ETIMEDOUT, EOPNOTSUPP, EIO
 *                    a program of iptables failed; see "Programs" in tproxy(7)
 *   EMFILE           the descriptor limit of the process is reached
 *   ENFILE           the descriptor limit of the system is reached
 *   ENOBUFS, ENOMEM  not enough memory
 *
 * Runs iptables only if the kernel has chains of this library there, which is read from the kernel.
 * Without /proc, or without permission to read /proc/net/ip_tables_names, the kernel is asked for the
 * legacy tables mangle and nat, and creates them, empty, if it can.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_purge_rules(const char *name);

/**
 * Adds prefixes to a set and removes prefixes from it, in one transaction, while the rules are active.
 *
 * Sends only the change to the kernel, so the cost does not depend on the size of the set; occasionally,
 * when a set has grown, it is rebuilt as by tp_replace_rules().
 *
 * Prefixes may overlap: an address is in the set as long as one prefix covers it. Adding a prefix that
 * is present is not an error. A prefix that is both added and removed is removed. A set may become empty:
 * with an empty dst or src, nothing is intercepted.
 *
 * @param rules     handle from tp_install_rules().
 * @param set       TP_SET_DST, TP_SET_SRC or TP_SET_BYPASS. dst and src can be changed only if they were
 *                  given to tp_install_rules(), because an omitted set matches all addresses; bypass can
 *                  be changed except with TP_RULES_DIVERT_ONLY.
 * @param add       prefixes to add.
 * @param n_add     number of prefixes to add.
 * @param remove    prefixes to remove.
 * @param n_remove  number of prefixes to remove.
 * @return 0, or -1 with errno and with nothing changed:
 *   EFAULT    rules is NULL, or an array is NULL while its count is not 0
 *   EINVAL    set is unknown, or cannot be changed with this configuration
 *   EINVAL    a prefix is not valid, or is of a family that the rules do not serve
 *   ENOENT    a prefix to remove is not in the set
 *   ENOENT    the table was removed, or now belongs to another instance
 *   EMSGSIZE  the change exceeds the size of one transaction (about 10,000 prefixes with the default
 *             net.core.wmem_max; no limit for root of the host)
 *   EBADF     the program closed the descriptors of the handle, or their numbers are now used otherwise
 *   EBUSY     this is a forked child, and the process that installed the rules is running
 *   EDEADLK   another thread was in a call on the handle when this process was forked
 *   ESTALE    another process has changed the rules since this process was forked, so the sets are not known
 *             here: call tp_replace_rules() first
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_update_rules(struct tp_rules *rules,
                    uint32_t set,
                    const struct tp_prefix *add,
                    size_t n_add,
                    const struct tp_prefix *remove,
                    size_t n_remove);

/**
 * Adds addresses to a set for a limited time, after which the kernel removes them, while the rules are active.
 *
 * For addresses that are known to be valid for a time, such as the answers of a DNS server. An address that is
 * already learned gets the new time, whether it is longer or shorter. Learned addresses add to the prefixes of
 * the configuration and of tp_update_rules(), which cannot remove them. They are kept by tp_replace_rules(),
 * and by TP_RULES_PERSIST when the rules are taken over.
 *
 * Sends only the addresses to the kernel, so the cost does not depend on the size of the set. The first call
 * for a set and family replaces the rules as tp_replace_rules() does; until then, packets are not compared
 * with learned addresses.
 *
 * @param rules        handle from tp_install_rules().
 * @param set          TP_SET_DST, which can be used only if dst was given to tp_install_rules(), empty or not,
 *                     or TP_SET_BYPASS.
 * @param addrs        addresses: prefixes with len 32 (IPv4) or 128 (IPv6).
 * @param n            number of addresses.
 * @param ttl_seconds  time in seconds, at least 1.
 * @return 0, or -1 with errno and with nothing changed:
 *   EFAULT      rules is NULL, or addrs is NULL while n is not 0
 *   EINVAL      set is unknown or TP_SET_SRC
 *   EINVAL      set is TP_SET_DST and dst is NULL: every destination is intercepted already
 *   EINVAL      the rules have TP_RULES_DIVERT_ONLY
 *   EINVAL      a prefix is not valid, is shorter than its address, or is of a family that the rules do not serve
 *   EINVAL      ttl_seconds is 0
 *   ENOSPC      the set would have more than 1,000,000 learned addresses of a family
 *   EOPNOTSUPP  the rules are iptables rules
 *   ENOENT      the table was removed, or now belongs to another instance
 *   EMSGSIZE    the addresses exceed the size of one transaction (some thousands with the default
 *               net.core.wmem_max; no limit for root of the host)
 *   EBADF       the program closed the descriptors of the handle, or their numbers are now used otherwise
 *   EBUSY       this is a forked child, and the process that installed the rules is running
 *   EDEADLK     another thread was in a call on the handle when this process was forked
 *   ESTALE      another process has changed the rules since this process was forked, so the sets are not known
 *               here: call tp_replace_rules() first
 *
 * When a bypassed address expires, its TCP connections are intercepted and reset, unless TP_RULES_NEW_ONLY is
 * set.
 *
 * Connections that a flow table has offloaded are not ended, unlike by tp_update_rules(): they continue as they
 * were, because ending them would discard the cached routes of this host at each call.
 *
 * The kernel frees the memory of expired addresses, and stops counting them, within ten seconds of their end.
 * Kernels before Linux 6.12 count an address of the call three times until it is learned, so that they report
 * ENOSPC earlier.
 *
 * Thread-safe.
 *
 * @since 0.2.0
 */
int tp_learn_addresses(struct tp_rules *rules,
                       uint32_t set,
                       const struct tp_prefix *addrs,
                       size_t n,
                       uint32_t ttl_seconds);

/**
 * Reads the counters of the rules since they were installed.
 *
 * @param rules  handle from tp_install_rules().
 * @param stats  receives the counters.
 * @param size   sizeof(struct tp_rules_stats).
 * @return 0, or -1 with errno:
 *   EFAULT   rules or stats is NULL
 *   EINVAL   size is less than the size of the first version of the struct
 *   E2BIG    size is greater than the size of the struct in this version
 *   ENOENT   the table was removed, or now belongs to another instance
 *   EBADF    the program closed the descriptors of the handle, or their numbers are now used otherwise
 *   EBUSY    this is a forked child, and the process that installed the rules is running; use
 *            tp_read_stats()
 *   EDEADLK  another thread was in a call on the handle when this process was forked
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_rules_stats(const struct tp_rules *rules,
                   struct tp_rules_stats *stats,
                   size_t size);

/**
 * Reads the counters of an instance by name, whichever process owns it.
 *
 * @param name   name of the instance. NULL or empty: "tproxy".
 * @param stats  receives the counters.
 * @param size   sizeof(struct tp_rules_stats).
 * @return 0, or -1 with errno:
 *   ENOENT  no rules of this name exist
 *   EPERM   CAP_NET_ADMIN is missing in the owner of this network namespace
 *   EFAULT  stats is NULL
 *   EINVAL  name is not valid, or size is less than the size of the first version of the struct
 *   E2BIG   size is greater than the size of the struct in this version
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_read_stats(const char *name, struct tp_rules_stats *stats, size_t size);

/**
 * Writes the shell script that is equivalent to tp_install_rules() on a host where all names, tables and
 * priorities are free.
 *
 * Has no other effect and needs no privilege. The script is for POSIX sh, NUL-terminated UTF-8, and exits
 * at the first command that fails. Rules that it installs belong to no process: they stay until they are
 * deleted.
 *
 * @param config  configuration, as for tp_install_rules().
 * @param size    sizeof(struct tp_rules_config).
 * @param format  TP_FORMAT_NFT or TP_FORMAT_IPTABLES.
 * @param buf     buffer for the script, or NULL to query its size.
 * @param len     size of buf in bytes; on success the size of the script including its NUL.
 * @return 0, or -1 with errno and with nothing written:
 *   EFAULT      config or len is NULL
 *   ERANGE      the buffer is too small
 *   EINVAL      format is unknown, or config is not valid, as for tp_install_rules()
 *   EOPNOTSUPP  iptables cannot do what config requests
 *   EOPNOTSUPP  format is TP_FORMAT_IPTABLES, and the library was built without feature `iptables`
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_render_rules(const struct tp_rules_config *config,
                    size_t size,
                    uint32_t format,
                    char *buf,
                    size_t *len);

/**
 * Diagnoses this host: reports what breaks or weakens transparent proxying, whoever configured it, with
 * the command that fixes it.
 *
 * Queries the kernel about this process, its network namespace, and all rules, routes, sysctls and
 * listeners there: capabilities; IP_TRANSPARENT, by setting it on a socket; the features of nf_tables, by a
 * transaction that is never committed; rules of this library without a listener or an owner; and the
 * effect of other programs' rules on intercepted packets.
 *
 * @param report   called once per finding, including passed checks.
 * @param context  passed to report.
 * @return number of failures (findings of TP_SEVERITY_FAILURE), or -1 with errno:
 *   EFAULT  report is NULL
 *   EOPNOTSUPP
 *           the library was built without feature `check`
 *
 * Changes nothing, except that the kernel may load a module that it is queried about. Runs no program.
 * Needs no privilege; what cannot be read without privilege is reported as the note "check.unseen".
 * Usually takes milliseconds, longer with thousands of rules.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_check(tp_finding_fn report,
             void *context);

/**
 * Tests the configuration on this kernel: in a temporary network namespace, sends one TCP connection and
 * one UDP datagram per selected family through the rules and reports the result.
 *
 * For a lost probe, reports the last netfilter hook that saw it. The rules are installed in the temporary
 * network namespace, with listeners created there as config describes them; descriptors in config are
 * inspected but not used. The call therefore tests config and the kernel. For the effect of other
 * programs' rules on this host use tp_check(). The host's configuration is not changed.
 *
 * @param config   configuration, as for tp_install_rules().
 * @param size     sizeof(struct tp_rules_config).
 * @param report   called once per finding, including passed checks.
 * @param context  passed to report.
 * @return number of failures (findings of TP_SEVERITY_FAILURE), or -1 with errno:
 *   EFAULT  config or report is NULL
 *   EPERM   CAP_SYS_ADMIN is missing, which is needed to create a network namespace (an unprivileged user
 *           has it in `unshare -r`)
 *   ETIMEDOUT
 *           the veth pair of the test carried no packet within 10 seconds
 *   EOPNOTSUPP
 *           the library was built without feature `self-test`
 *   EINVAL, E2BIG, EOPNOTSUPP
 *           as for tp_install_rules(); its other errors are possible too
 *
 * Usually takes milliseconds, up to six seconds if a probe is lost. Starts a thread, because a network
 * namespace belongs to a thread. The thread receives no signals and has ended when the call returns.
 *
 * Thread-safe.
 *
 * @since 0.1.0
 */
int tp_self_test(const struct tp_rules_config *config,
                 size_t size,
                 tp_finding_fn report,
                 void *context);

/**
 * Returns a message that describes the last failed call of this thread.
 *
 * The message names the failed operation, the reason and, if known, a suggested fix. It is UTF-8 and
 * human-readable; programs should use errno and not parse it.
 *
 * @return message, never NULL; empty before the first failure.
 *
 * The pointer is valid until the next failing call of this thread, or until the thread ends. A call that
 * succeeds does not change the message.
 *
 * @since 0.1.0
 */
const char *tp_last_error(void);

/**
 * Returns the version of the library.
 *
 * @return "MAJOR.MINOR.PATCH", a static string, never NULL.
 *
 * @since 0.1.0
 */
const char *tp_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TPROXY_H */
