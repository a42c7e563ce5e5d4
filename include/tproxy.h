/*
 * libtproxy: transparent proxying on Linux.
 *
 * Sockets that bind to, listen on and connect from addresses that this host
 * does not own; where an intercepted connection or datagram was going, and
 * answers from there; and the kernel rules that bring the packets to the
 * program. A transparent TCP proxy is
 *
 *     struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(3129) };
 *     int listener = tp_listen((struct sockaddr *)&any, sizeof any, -1, 0);
 *
 *     struct tp_port_range http = { 80, 80 };
 *     struct tp_rules_config config = { 0 };
 *     config.listeners = &listener, config.n_listeners = 1;
 *     config.ports = &http, config.n_ports = 1;
 *     tp_rules *rules;
 *     if (tp_install_rules(&config, sizeof config, &rules) != 0)
 *         errx(1, "%s", tp_last_error());
 *
 *     int client = accept(listener, (struct sockaddr *)&from, &fromlen);
 *     tp_orig_dst(client, (struct sockaddr *)&to, &tolen);
 *     int server = tp_connect_from((struct sockaddr *)&from, fromlen,
 *                                  (struct sockaddr *)&to, tolen, 0);
 *     ... relay, then tp_remove_rules(rules) ...
 *
 * and one for UDP, where every answer comes from the address that was asked:
 *
 *     int listener = tp_socket(AF_INET6, SOCK_DGRAM, 0);
 *     tp_bind_nonlocal(listener, (struct sockaddr *)&any, sizeof any);
 *     ... rules as above, from the listener ...
 *     tp_replier *replier;
 *     tp_replier_open(NULL, 0, &replier);
 *
 *     int n = tp_recv_datagrams(listener, dgrams, 64, 0);
 *     ... put the answers where the questions were: data, len ...
 *     tp_reply(replier, dgrams, n);
 *
 * What holds for every call
 *
 * Results. A call that returns int gives -1 and sets errno when it fails; else
 * 0, or the value that is described. errno is not touched on success. After a
 * failure tp_last_error() has a sentence for people: the step, the command
 * that would do the same, the kernel's own words, and the cure.
 *
 * Common errno values. EFAULT: a pointer that is needed is NULL. EINVAL: a bad
 * value or an unknown flag. EOPNOTSUPP: the kernel, or this version, cannot do
 * it. EPERM: a capability is missing. ENOTRECOVERABLE: an error in the library
 * itself.
 *
 * Nothing by halves. Outputs are written on success only; a call that fails
 * leaves no descriptor, rule or route behind.
 *
 * Addresses are struct sockaddr_in or sockaddr_in6, in network byte order.
 * v4-mapped addresses (::ffff:a.b.c.d) are accepted, and reported where the
 * caller's socket has them. Other ports and masks, in the structs below, are
 * in host byte order.
 *
 * Ownership. Descriptors that a call returns are the caller's to close, and
 * close-on-exec. What a pointer points to is read during the call only.
 *
 * Threads. Every call may be made from any thread at any time, except where
 * its comment says otherwise. No call prints, exits or changes a signal
 * handler; none but tp_self_test starts a thread.
 *
 * Environment. No call reads an environment variable.
 *
 * Programs. Only rules by iptables (TP_BACKEND_IPTABLES) need programs:
 * iptables-save and iptables-restore, and those of ip6tables. No other program
 * is ever run. These calls run them:
 *   tp_install_rules, if it installs rules by iptables
 *   tp_replace_rules, tp_update_rules, tp_remove_rules, tp_rules_stats and
 *     tp_read_stats, for rules that are by iptables
 *   tp_purge_rules, if the kernel has chains of this library in iptables
 *   tp_self_test, if it tests rules by iptables
 * Programs are sought in /usr/sbin, /sbin, /usr/bin and /bin, never by PATH. Their
 * environment is PATH and LC_ALL, which the library sets. They start with no
 * signal blocked or ignored, and with descriptors of the process that are not
 * close-on-exec. They are children of the process: its SIGCHLD
 * handler is called, and waitpid(-1) may return them. SIGCHLD may be ignored,
 * and children may be waited for elsewhere: the library then sees from the
 * kernel's tables whether a program did its work. iptables does not run while
 * the real and the effective user differ (EPERM), as in a set-user-ID program.
 * A call fails with
 *   ETIMEDOUT  a program did not end within 60 seconds; it was killed
 *   EAGAIN     another program has held the lock of the legacy iptables
 *              (/run/xtables.lock) for 5 seconds
 *   EOPNOTSUPP the programs are not installed, or the kernel lacks a match
 *   EIO        a program failed for another reason
 *
 * Capabilities count in the user namespace that owns the network namespace;
 * root in `unshare -rn` has all of them there.
 *
 * Fork, daemons, privileges, threads, signals
 *
 * Fork. Rules belong to the process that installed them. While it lives, calls
 * on a forked child's copy of the handle fail with EBUSY, and tp_remove_rules
 * there frees the copy and removes nothing; tp_read_stats reads the counters
 * from any process. After the installer has ended, executed another program or
 * closed its descriptors, a child may use its copy, one child at a time. The
 * first child that calls tp_remove_rules removes the rules for all; calls on
 * the other copies then fail with ENOENT, and tp_remove_rules there does nothing,
 * also if there are new rules of the same name. A copy knows the sets as they
 * were at the fork: if another process has changed the rules since,
 * tp_update_rules fails with ESTALE until tp_replace_rules was called. The
 * kernel keeps the table as long as any process has the sockets:
 * a worker that shall not keep it calls tp_forget_rules first of all, or
 * executes another program (the sockets are close-on-exec). A child may be
 * forked while another thread is in a call. After vfork(2) only execve(2) and
 * _exit(2) may be called. A replier may be used by parent and child, each has
 * its own copy; the sockets are shared.
 *
 * Daemons. daemon(3) forks, and its parent ends: rules that were installed
 * before stay, and are the daemon's. Descriptors that are closed
 * (closefrom(3), close_range(2)) are lost: install rules and open repliers
 * after that. A call on a handle whose descriptors were closed, or have become
 * something else, fails with EBADF; it neither writes to them nor closes them.
 * tp_reply does not look: after that, a replier can only be closed, which
 * closes nothing but its own sockets. chroot(2) may come at any time,
 * except with the iptables backend, whose programs have to be found then too.
 *
 * Privileges. After setuid(2), or when capabilities are dropped, the rules and
 * transparent sockets that exist go on working. What is needed afterwards:
 *   tp_socket, tp_set_transparent, tp_bind_nonlocal, tp_listen,
 *   tp_connect_from, tp_replier_open, tp_reply   CAP_NET_RAW or CAP_NET_ADMIN
 *   tp_install_rules, tp_remove_rules, tp_replace_rules, tp_update_rules,
 *   tp_rules_stats, tp_read_stats, tp_purge_rules                CAP_NET_ADMIN
 *   tp_self_test                                    CAP_SYS_ADMIN and the above
 *   tp_orig_dst, tp_msg_orig_dst, tp_recvfrom, tp_recv_datagrams,
 *   tp_render_rules, tp_check, tp_forget_rules, tp_replier_close          none
 * Without CAP_NET_ADMIN tp_remove_rules is EPERM; the kernel removes the table
 * when the process ends. A set-user-ID program may use the library: no
 * environment variable decides what it does, and programs are run by absolute
 * paths in an environment of the library's own.
 *
 * Threads. A network namespace is a thread's (setns(2)). Calls that make
 * something work in the calling thread's; calls on a handle work where its
 * rules are, wherever the calling thread is, and if it may not go there
 * (CAP_SYS_ADMIN, iptables backend only) they fail with EPERM.
 * pthread_cancel(3) never ends a call in the middle: cancellation is disabled
 * during every call, and acted on at the program's next cancellation point. A
 * wait for a datagram or a connection is not ended by it.
 *
 * Signals. No call changes a signal handler. A handler that interrupts a call
 * which waits makes it fail with EINTR, unless it was installed with
 * SA_RESTART. No call is async-signal-safe, except tp_version.
 *
 * Stack. At most 4 KB for the calls about sockets and datagrams, errors
 * included; tp_recv_datagrams 3 KB and 100 bytes for each datagram that it may
 * receive; 16 KB for the calls about rules, tp_check and tp_self_test.
 *
 * Memory. tp_socket, tp_connect_from, tp_orig_dst, tp_msg_orig_dst,
 * tp_recvfrom, tp_recv_datagrams and tp_reply allocate nothing when they
 * succeed. Memory that grows with what the caller, the kernel or other programs
 * gave (arrays, sets, messages, scripts, listings) is asked for, and ENOMEM if
 * it is not to be had. What still ends the program, with abort(3), is a failing
 * allocation of less than 16 KB in the calls about rules, tp_check and
 * tp_self_test: strings, nodes of lists, the standard library's own.
 *
 * Link with `pkg-config --cflags --libs tproxy`.
 */


#ifndef TPROXY_H
#define TPROXY_H

/* Generated from src/ffi by cbindgen; `UPDATE_HEADER=1 cargo test --test header` writes it anew. */

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>
/* A handle is known by its pointer alone. */
typedef struct tp_rules tp_rules;
typedef struct tp_replier tp_replier;


/**
 * The new socket is non-blocking (O_NONBLOCK). tp_listen, tp_connect_from.
 */
#define TP_NONBLOCK 1

/**
 * Several listeners share the address and port, and the kernel spreads
 * the connections among them (SO_REUSEPORT). tp_listen.
 */
#define TP_LISTEN_REUSEPORT 2

/**
 * Connect from the source's own port if it can be had, else from any
 * other. tp_connect_from.
 */
#define TP_CONNECT_KEEP_PORT 4

/**
 * A datagram socket instead of a stream socket. tp_connect_from.
 */
#define TP_CONNECT_DGRAM 8

/**
 * What is to be sent on the connection is there already: the packet that ends
 * the handshake waits for it. tp_connect_from.
 */
#define TP_CONNECT_DATA_FOLLOWS 16

/**
 * In tp_datagram.flags: the datagram was longer than its place; len is what
 * there was room for, and the rest is lost.
 */
#define TP_DGRAM_TRUNC 1

/**
 * In tp_datagram.flags: the socket reports more than there was room for, so
 * that the original destination or the segment length may be missing.
 */
#define TP_DGRAM_CTRUNC 2

/**
 * In tp_datagram.flags: there is no original destination, because the socket
 * was not told to report it (tp_socket, tp_set_transparent), or because an
 * IPv6 datagram was sent to the unspecified or a v4-mapped address, which
 * would mean this host, or IPv4, to a socket call.
 */
#define TP_DGRAM_NO_ORIG_DST 4

/**
 * The most datagrams that one tp_recv_datagrams receives, and that tp_reply
 * hands to the kernel at once.
 */
#define TP_BATCH_MAX 64

/**
 * In tp_replier_config.flags: take no ports, reply by raw sockets alone. A
 * service that is started later then finds its port free; datagrams are not
 * sent in segments (UDP_SEGMENT), and each costs a checksum.
 */
#define TP_REPLIER_RAW 256

/**
 * Only bring packets to transparent sockets that they belong to: listeners
 * on addresses that this host does not own, and connections from such
 * addresses. Nothing is intercepted; listeners may be empty.
 */
#define TP_RULES_DIVERT_ONLY 1

/**
 * Intercept by NAT redirection, where TPROXY cannot be had. The listener is
 * then an ordinary socket, not a transparent one (tp_orig_dst asks connection
 * tracking), on a wildcard or specific address. TCP only; no marks, no policy
 * routing, and connections from foreign addresses do not get their answers.
 */
#define TP_RULES_REDIRECT 2

/**
 * Intercept the host's own traffic too. What comes from transparent sockets
 * is exempt: a proxy whose sockets towards servers are transparent
 * (tp_connect_from, tp_set_transparent) does not intercept itself.
 *
 * What the host's own TCP services answer is left alone: where ports would
 * choose it too (none are given, or some above 1023), connection tracking
 * tells it, and so is active. Not so UDP services, nor any with
 * TP_RULES_NOTRACK: choose ports, dst or src so that their answers are not
 * among what is intercepted.
 */
#define TP_RULES_LOCAL_OUTPUT 4

/**
 * Let traffic pass by while there is no listener; the default is to drop it.
 * Not with TP_RULES_LOCAL_OUTPUT or TP_RULES_REDIRECT, which cannot:
 * EOPNOTSUPP.
 */
#define TP_RULES_FAIL_OPEN 8

/**
 * Accept connections and datagrams that are sent straight to a listener's
 * own address and port. By default they are dropped, since a proxy that
 * connects to the original destination would connect to itself, without end.
 * Dropped is what goes to an address of this host, link-local ones included,
 * or to a broadcast, anycast or multicast address. (A listener on loopback
 * cannot be reached from outside, and needs no such rule.)
 */
#define TP_RULES_ALLOW_DIRECT 16

/**
 * Keep what is intercepted, and what transparent sockets send, out of
 * connection tracking.
 */
#define TP_RULES_NOTRACK 32

/**
 * The rules outlive the process, and drop what they would intercept until an
 * instance of the same name, with this flag too, takes them over without a
 * gap, or tp_purge_rules removes them. Needs Linux 6.9.
 */
#define TP_RULES_PERSIST 64

/**
 * nf_tables if the kernel has what is needed, else iptables.
 */
#define TP_BACKEND_AUTO 0

/**
 * nf_tables, over netlink.
 */
#define TP_BACKEND_NFT 1

/**
 * `iptables-restore`, one transaction for each family, in chains of our own;
 * in the legacy variant if that has rules already, else in the nft variant if
 * that has rules, else in the one that is called `iptables`. Refused with
 * EOPNOTSUPP: TP_RULES_FAIL_OPEN, TP_RULES_NOTRACK, TP_RULES_PERSIST, more than
 * 1000 prefixes. Chains have no owner: those of a killed process stay, and drop
 * what they intercept, until the next tp_install_rules of that name or
 * tp_purge_rules. With TP_RULES_LOCAL_OUTPUT what is exempt are not transparent
 * sockets but those whose SO_MARK is the mark of the rules. What is dropped for
 * want of a listener is counted as intercepted. Programs are run: see above.
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
 * The destinations to intercept. tp_update_rules.
 */
#define TP_SET_DST 1

/**
 * The sources to intercept. tp_update_rules.
 */
#define TP_SET_SRC 2

/**
 * The destinations never to intercept. tp_update_rules.
 */
#define TP_SET_BYPASS 3

/**
 * A script of `ip` and `nft` commands. tp_render_rules.
 */
#define TP_FORMAT_NFT 1

/**
 * A script of `ip` and `iptables-restore` commands. tp_render_rules.
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
 * As it should be.
 */
#define TP_SEVERITY_OK 0

/**
 * Good to know.
 */
#define TP_SEVERITY_NOTE 1

/**
 * Some traffic may be lost, or pass by the proxy.
 */
#define TP_SEVERITY_WARNING 2

/**
 * Interception cannot work.
 */
#define TP_SEVERITY_FAILURE 3

/**
 * A replier.
 */
struct tp_replier;

/**
 * Installed rules. Calls on one handle may come from any thread of the process
 * that installed them. A forked child may use its copy only after that process
 * has ended, and no two children at the same time; until then its calls fail
 * with EBUSY, and tp_remove_rules frees the copy and removes nothing.
 */
struct tp_rules;

/**
 * One datagram, or several of one flow and equal length: a place for what is
 * received, and what is to be sent. tp_recv_datagrams fills it, tp_reply
 * sends it back.
 *
 * 296 bytes on 64-bit machines. Addresses are in network byte order, all else
 * in host order.
 */
struct tp_datagram {
    /**
     * The caller's memory. NULL is fine where there are no bytes.
     */
    void *data;
    /**
     * How many bytes have room at data. tp_recv_datagrams reads it; tp_reply
     * does not.
     */
    size_t capacity;
    /**
     * How many bytes were received, or are to be sent. 0 is a datagram too.
     */
    size_t len;
    /**
     * If len is more than this: the length of each of the datagrams that data
     * has one after the other, but for the last, which may be shorter
     * (UDP_GRO, UDP_SEGMENT). 0: one datagram.
     */
    uint32_t segment_len;
    /**
     * TP_DGRAM_TRUNC, TP_DGRAM_CTRUNC, TP_DGRAM_NO_ORIG_DST. tp_reply does
     * not look at them.
     */
    uint32_t flags;
    /**
     * The errno value of this datagram, 0 if it was received or sent.
     */
    int32_t error;
    /**
     * Who sent it, and whom tp_reply sends to.
     */
    struct sockaddr_storage client;
    /**
     * Where it was going, and where tp_reply's datagram comes from. ss_family
     * is AF_UNSPEC (0) if the kernel did not tell.
     */
    struct sockaddr_storage orig_dst;
};

/**
 * How a replier works. Every field zero means its default.
 */
struct tp_replier_config {
    /**
     * TP_NONBLOCK: a datagram for which there is no room at once is not sent,
     * and its error is EAGAIN. TP_REPLIER_RAW.
     */
    uint32_t flags;
    /**
     * How many sockets of source ports there are at most; default 256. Two
     * raw sockets may come on top.
     */
    uint32_t max_sockets;
    /**
     * After how many milliseconds without use a socket is closed, by a later
     * tp_reply; default 60,000.
     */
    uint32_t idle_ms;
    /**
     * Zero.
     */
    uint32_t reserved;
};

/**
 * What a replier has done since it was opened.
 */
struct tp_replier_stats {
    /**
     * Sockets that are open now, raw ones among them.
     */
    uint64_t sockets;
    /**
     * How often a socket was there already for the datagrams of one source
     * port in a batch, or the port was known to be another's.
     */
    uint64_t hits;
    /**
     * How often one had to be made.
     */
    uint64_t misses;
    /**
     * Datagrams sent by a raw socket, since their source port is another's.
     */
    uint64_t raw;
    /**
     * Sockets closed because there were too many.
     */
    uint64_t evictions;
    /**
     * Datagrams that were not sent.
     */
    uint64_t errors;
    /**
     * Datagrams that were sent: elements of tp_reply's arrays.
     */
    uint64_t sent;
};

/**
 * A range of ports in host byte order, both ends included.
 */
struct tp_port_range {
    /**
     * The lowest, at least 1.
     */
    uint16_t first;
    /**
     * The highest, at least first. One port: the same.
     */
    uint16_t last;
};

/**
 * An address prefix: addr in network byte order, its first len bits.
 */
struct tp_prefix {
    /**
     * AF_INET or AF_INET6.
     */
    uint8_t family;
    /**
     * 0 to 32, or 0 to 128.
     */
    uint8_t len;
    /**
     * Zero.
     */
    uint8_t reserved[2];
    /**
     * IPv4 in the first four bytes.
     */
    uint8_t addr[16];
};

/**
 * What to intercept, for whom. Set it to zero (`= {0}`), then the fields
 * that matter: every field that is zero means its default. All of it is the
 * caller's and is read during the call only.
 */
struct tp_rules_config {
    /**
     * The instance's name: at most 20 letters, digits, '_', '.' and, not
     * first, '-'. NULL: "tproxy". One network namespace holds several instances, if
     * their names differ.
     */
    const char *name;
    /**
     * Descriptors of the listening sockets that get what is intercepted.
     * Protocol, family, address and port come from them. Each must be
     * transparent, bound and, for TCP, listening (tp_listen makes such), and
     * for each protocol and family there must be one address and port;
     * sockets that share it by TP_LISTEN_REUSEPORT are fine. They are read now; a
     * listener that ends later leaves no listener, and so no traffic.
     */
    const int *listeners;
    /**
     * How many descriptors.
     */
    size_t n_listeners;
    /**
     * In place of listeners, the address and port of one in another process.
     * The wildcard address of IPv6 serves both families.
     */
    const struct sockaddr *listen_addr;
    /**
     * The length of listen_addr.
     */
    socklen_t listen_addrlen;
    /**
     * TP_RULES_ flags, or 0.
     */
    uint32_t flags;
    /**
     * TP_BACKEND_AUTO, TP_BACKEND_NFT, TP_BACKEND_IPTABLES.
     */
    uint32_t backend;
    /**
     * TP_PROTO_TCP, TP_PROTO_UDP. 0: what the listeners are, else TCP. With listen_addr
     * it says what listens there.
     */
    uint32_t protocols;
    /**
     * TP_FAMILY_IPV4, TP_FAMILY_IPV6. 0: those that the listeners serve, else both; IPv4
     * alone on a host that has no IPv6 address.
     */
    uint32_t families;
    /**
     * The packet mark that means "for a local socket", in host byte order.
     * 0: 0x2000, with mask 0x3000. TP_RULES_LOCAL_OUTPUT needs another for
     * the host's own packets: the lowest other bit of the mask.
     */
    uint32_t mark;
    /**
     * The bits of the mark that are ours; the others are left as they are.
     * 0: all of them, if mark is given.
     */
    uint32_t mark_mask;
    /**
     * The routing table that delivers to local sockets. 0: one that is free,
     * from 7470.
     */
    uint32_t table;
    /**
     * The preference of the first of four routing policy rules, at most
     * 32762. 0: four that are free, from 200.
     */
    uint32_t priority;
    /**
     * Destination ports to intercept, in any order, overlaps welcome.
     */
    const struct tp_port_range *ports;
    /**
     * How many ranges. 0: every port.
     */
    size_t n_ports;
    /**
     * Destinations to intercept, in any order, overlaps welcome. What they
     * name is intercepted even if it is this host's own address. What this
     * host sends to itself (by the interface "lo") is intercepted with
     * TP_RULES_LOCAL_OUTPUT only.
     */
    const struct tp_prefix *dst;
    /**
     * How many prefixes. 0: every destination but this host's own addresses,
     * loopback, broadcast and multicast.
     */
    size_t n_dst;
    /**
     * Sources to intercept.
     */
    const struct tp_prefix *src;
    /**
     * How many prefixes. 0: every source.
     */
    size_t n_src;
    /**
     * Destinations never to intercept, whatever dst says. Nor are their
     * answers: where ports (none, or some above 1023) and interfaces (none)
     * would choose these too, connection tracking tells them from the rest,
     * and so is active, with TP_RULES_NOTRACK for what comes from there.
     */
    const struct tp_prefix *bypass;
    /**
     * How many prefixes.
     */
    size_t n_bypass;
    /**
     * Names of the interfaces by which forwarded traffic comes in: "lo" is
     * none of them, and adds nothing. They need
     * not exist yet. A trailing '*' makes a name a pattern, with both backends:
     * "ppp*" matches "ppp", "ppp0" and "ppp10". A '*' elsewhere is EINVAL. A
     * name that ends with '+' is EOPNOTSUPP with iptables, to which it would
     * be a pattern.
     */
    const char *const *interfaces;
    /**
     * How many names. 0: every interface.
     */
    size_t n_interfaces;
};

/**
 * What the rules have done: packets, and their bytes from the IP header on.
 */
struct tp_rules_stats {
    /**
     * Given to a listener.
     */
    uint64_t intercepted_packets;
    /**
     * Their bytes.
     */
    uint64_t intercepted_bytes;
    /**
     * Given to a transparent socket that they belong to; errors (ICMP) about
     * what it sent are among them.
     */
    uint64_t diverted_packets;
    /**
     * Their bytes.
     */
    uint64_t diverted_bytes;
    /**
     * Dropped, because there was no listener.
     */
    uint64_t dropped_packets;
    /**
     * Their bytes.
     */
    uint64_t dropped_bytes;
    /**
     * Dropped, because they were sent straight to a listener.
     */
    uint64_t direct_packets;
    /**
     * Their bytes.
     */
    uint64_t direct_bytes;
};

/**
 * Something that was found. All of it is valid during the call of a
 * tp_finding_fn alone; no pointer is NULL. Texts are UTF-8 without control
 * characters and others that mislead; names that other programs gave are
 * shown with escapes in place of these, as is what is no UTF-8 in them.
 */
struct tp_finding {
    /**
     * TP_SEVERITY_OK, TP_SEVERITY_NOTE, TP_SEVERITY_WARNING or TP_SEVERITY_FAILURE.
     */
    uint32_t severity;
    /**
     * What kind of finding it is, for programs: "sysctl.src_valid_mark". It
     * stays the same in later versions. docs/troubleshooting.md has them all.
     */
    const char *id;
    /**
     * What was found, for people.
     */
    const char *message;
    /**
     * What it does to traffic, for people.
     */
    const char *impact;
    /**
     * The command that fixes it, for root's sh(1) in this process's network
     * and PID namespace. Empty: nothing is to be fixed, or no command does so
     * without doing harm. Names that others gave are quoted in it, whatever is
     * in them; a word in capitals is for you to fill in. Read it before you run
     * it: some fixes end the process that the rules belong to (it was seen to
     * have them), or delete a rule that somebody else made.
     */
    const char *fix;
};

/**
 * Is told what was found: one call for each finding, from the thread that
 * called tp_check or tp_self_test, with the context that was given to it. It
 * must return (no longjmp, no C++ exception), and may call this library.
 */
typedef void (*tp_finding_fn)(const struct tp_finding *finding, void *context);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Makes a socket like socket(2) that is transparent: it can be bound to,
 * listen on and send from addresses that this host does not own
 * (IP_TRANSPARENT, ip(7)).
 *
 * An AF_INET6 socket is dual-stack (IPV6_V6ONLY off): it serves IPv4 too,
 * as v4-mapped addresses. A SOCK_DGRAM socket also reports the original
 * destination of every datagram (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR).
 * The descriptor is close-on-exec.
 *
 * domain: AF_INET or AF_INET6. type: SOCK_STREAM, SOCK_DGRAM or SOCK_RAW,
 * with SOCK_NONBLOCK if wished. protocol: 0, or as for socket(2).
 *
 * Returns a descriptor, which the caller closes, or -1 with errno:
 * EAFNOSUPPORT: domain is neither of the two, or the kernel has no IPv6.
 * EPERM: neither CAP_NET_RAW nor CAP_NET_ADMIN. EINVAL, EPROTONOSUPPORT,
 * ESOCKTNOSUPPORT: type or protocol, as socket(2). EMFILE, ENFILE: a
 * descriptor limit. ENOBUFS, ENOMEM: no memory.
 *
 * System calls: socket and one setsockopt for each option named above.
 * Thread-safe.
 */
int tp_socket(int domain, int type, int protocol);

/**
 * Makes a socket transparent that the program has already: from socket
 * activation, an event library, another language.
 *
 * As with tp_socket a SOCK_DGRAM socket reports original destinations from
 * then on. Nothing else changes: whether an AF_INET6 socket is dual-stack
 * stays as it is. Do it before bind, and on a listener before it is given to
 * tp_install_rules. Connections that a transparent listener accepts are
 * transparent.
 *
 * Returns 0, or -1 with errno: EBADF, ENOTSOCK: not a descriptor, not a
 * socket. EAFNOSUPPORT: not a socket of AF_INET or AF_INET6. EPERM: neither
 * CAP_NET_RAW nor CAP_NET_ADMIN.
 *
 * Thread-safe.
 */
int tp_set_transparent(int fd);

/**
 * Binds a socket to any address, whether this host owns it or not.
 *
 * The socket is made transparent first; it need not come from tp_socket.
 * addr is a struct sockaddr_in or sockaddr_in6 of the socket's family, in
 * network byte order; an AF_INET6 socket takes IPv4 addresses v4-mapped.
 *
 * A stream socket that is bound to port 0 gets its port when it connects or
 * listens (IP_BIND_ADDRESS_NO_PORT); until then getsockname(2) shows 0. So
 * one address can hold more connections, to several destinations, than there
 * are ephemeral ports.
 *
 * Returns 0, or -1 with errno: EFAULT: addr is NULL. EINVAL: addrlen does
 * not fit the family, or the socket is bound already. EAFNOSUPPORT: the
 * address is not of the socket's family, or neither is of AF_INET or
 * AF_INET6. EBADF, ENOTSOCK: not a descriptor, not a socket. EPERM: neither
 * CAP_NET_RAW nor CAP_NET_ADMIN. EACCES: a port below 1024 without
 * CAP_NET_BIND_SERVICE. EADDRINUSE: another socket has that address and
 * port. EADDRNOTAVAIL and the rest of bind(2).
 *
 * Thread-safe.
 */
int tp_bind_nonlocal(int fd, const struct sockaddr *addr, socklen_t addrlen);

/**
 * Makes a transparent stream socket that listens on an address, whether
 * this host owns it or not.
 *
 * This is the listener to give to tp_install_rules. 0.0.0.0 serves IPv4,
 * :: serves IPv6 and IPv4, 127.0.0.1 and ::1 are reached by interception
 * alone. SO_REUSEADDR is set, so that a program can be restarted at once.
 *
 * addr: a struct sockaddr_in or sockaddr_in6, in network byte order; with
 * port 0 the kernel chooses one (getsockname(2) tells). backlog: as
 * listen(2); negative asks for the most that the system allows
 * (net.core.somaxconn). flags: TP_NONBLOCK, TP_LISTEN_REUSEPORT, or 0.
 *
 * Returns a descriptor, which the caller closes, or -1 with errno: EFAULT:
 * addr is NULL. EINVAL: addrlen does not fit the family, or flags has an
 * unknown bit. EAFNOSUPPORT: the address family is neither AF_INET nor
 * AF_INET6, or the kernel lacks it. EPERM, EACCES, EADDRINUSE,
 * EADDRNOTAVAIL: as tp_bind_nonlocal. EMFILE, ENFILE, ENOBUFS, ENOMEM: as
 * tp_socket.
 *
 * Thread-safe.
 */
int tp_listen(const struct sockaddr *addr, socklen_t addrlen, int backlog, uint32_t flags);

/**
 * Connects to dst so that the server sees the connection come from src, an
 * address that this host need not own.
 *
 * src and dst: a struct sockaddr_in or sockaddr_in6 each, in network byte
 * order, of one family; v4-mapped addresses are taken as IPv4, so what
 * accept(2) and tp_orig_dst gave can be passed on as it is. The answers come
 * back to this host if it is on their way, and to the socket by the divert
 * rule that tp_install_rules installs (not with TP_RULES_REDIRECT). So does
 * what routers and hosts say of its packets (ICMP): that they are too big for
 * a link, or refused.
 *
 * The port: without TP_CONNECT_KEEP_PORT any that is free for this destination; the
 * port in src does not count. With TP_CONNECT_KEEP_PORT the one in src, unless it is
 * 0, in use (EADDRINUSE or EADDRNOTAVAIL within) or not permitted (below
 * 1024 without CAP_NET_BIND_SERVICE): then any, as without.
 *
 * flags: TP_CONNECT_KEEP_PORT, TP_NONBLOCK, TP_CONNECT_DGRAM, TP_CONNECT_DATA_FOLLOWS, or 0. With TP_NONBLOCK the connection
 * may still be under way when the descriptor is returned: wait until it is
 * writable, then SO_ERROR tells. Without, the call waits, at most as long as
 * the kernel tries (net.ipv4.tcp_syn_retries).
 *
 * With TP_CONNECT_DGRAM it is a UDP socket, connected to dst: send(2) sends from src,
 * and recv(2) receives what dst answers to it. (What others sent to src at the
 * very moment of the call is dropped; where a datagram of theirs that slips
 * through matters, look at the sender that recvfrom(2) gives.) What the
 * client sends goes to the listener as before. Several such sockets, to
 * different destinations, can have one port of src (SO_REUSEADDR). Let there
 * be no two with the same port and destination: the kernel does not refuse
 * that, and gives the answers to either.
 *
 * With TP_CONNECT_DATA_FOLLOWS the ACK that ends the handshake leaves with what is
 * sent first, and so does the one for the first answer, if it can: a packet or
 * two less for a short connection (TCP_QUICKACK off, tcp(7)). For a program
 * that has the client's first bytes before it connects. If nothing is sent,
 * the ACK leaves after 200 ms (TCP_DELACK_MAX, include/net/tcp.h), or when
 * setsockopt(TCP_QUICKACK, 1) lets it; a server that speaks first waits so long.
 *
 * Returns a connected socket, which the caller closes, or -1 with
 * errno: EFAULT: src or dst is NULL. EINVAL: a length that does not fit its
 * family, an unknown flag, TP_CONNECT_DATA_FOLLOWS with TP_CONNECT_DGRAM, src or dst is
 * unspecified (0.0.0.0, ::, ::ffff:0.0.0.0): the kernel would connect with an
 * address of this host, or to this host; or src is multicast or
 * 255.255.255.255. (The broadcast address of a subnet looks like any other,
 * and is not refused.) EAFNOSUPPORT: a family other than
 * AF_INET and AF_INET6, or two different ones. EPERM: neither CAP_NET_RAW nor
 * CAP_NET_ADMIN. EADDRNOTAVAIL: no port of src is left towards dst. EINTR: a
 * signal came while waiting. ECONNREFUSED, ETIMEDOUT, ENETUNREACH,
 * EHOSTUNREACH and the rest of connect(2). EMFILE, ENFILE, ENOBUFS, ENOMEM:
 * as tp_socket. On failure no descriptor is left open.
 *
 * System calls: socket, setsockopt(IP_TRANSPARENT),
 * setsockopt(IP_BIND_ADDRESS_NO_PORT), bind, connect; with TP_CONNECT_KEEP_PORT
 * SO_REUSEADDR in place of IP_BIND_ADDRESS_NO_PORT, and with TP_CONNECT_DGRAM neither
 * or SO_REUSEADDR, and a recv at the end, so that nothing is left that came
 * from others before the connect; with TP_CONNECT_DATA_FOLLOWS one setsockopt more.
 * Thread-safe.
 */
int tp_connect_from(const struct sockaddr *src,
                    socklen_t srclen,
                    const struct sockaddr *dst,
                    socklen_t dstlen,
                    uint32_t flags);

/**
 * Where an accepted connection was going before it was intercepted.
 *
 * Works for both ways of interception: a transparent socket (TPROXY) has
 * the original destination as its own address; any other asks connection
 * tracking (SO_ORIGINAL_DST: REDIRECT, DNAT). Connection tracking is never
 * asked about a transparent socket, since it may hold another connection's
 * entry.
 *
 * A connection that was made straight to a transparent listener gives the
 * listener's own address: the original destination is where the client
 * connected to.
 *
 * fd: a stream socket from accept(2). addr and addrlen: as getsockname(2),
 * a place and its size, which becomes the size of the address; but too
 * little room is EINVAL, not a cut address. A struct sockaddr_storage always
 * has enough. The address is in network byte order and of the socket's
 * family: an IPv4 connection of an AF_INET6 listener gives it v4-mapped.
 *
 * Returns 0, or -1 with errno, addr and addrlen untouched: EFAULT: addr or
 * addrlen is NULL. EINVAL: too little room. ENOENT: the socket is not
 * transparent, and no REDIRECT or DNAT of the connection is known. ENOTCONN:
 * a socket that is bound to every address, or to none: not an accepted one. EBADF, ENOTSOCK: not a descriptor, not a
 * socket. EAFNOSUPPORT: not a socket of AF_INET or AF_INET6.
 *
 * System calls: getsockopt and getsockname; one more getsockopt if the
 * socket is not transparent. Thread-safe.
 */
int tp_orig_dst(int fd,
                struct sockaddr *addr,
                socklen_t *addrlen);

/**
 * Receives a datagram like recvfrom(2), and where it was going.
 *
 * One system call does both. The socket is one of tp_socket or
 * tp_set_transparent (else the kernel does not report it); with UDP_GRO on it
 * use tp_recv_datagrams.
 *
 * buf, len: where its bytes go; what has no room is lost. flags:
 * MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC, MSG_WAITALL, or 0, as for recvfrom(2).
 * src, srclen: who sent it. dst, dstlen: its original destination. Each
 * address as for recvfrom(2): NULL if it is not wanted; the length is that of
 * the place before, and that of the address after, and an address that has
 * no room is cut. A struct sockaddr_storage has enough. Addresses are of the
 * socket's family: an AF_INET6 socket gives IPv4 ones v4-mapped. If the kernel
 * does not tell the original destination, *dstlen is 0 and dst's family
 * AF_UNSPEC.
 *
 * Returns how many bytes were received, 0 for an empty datagram too, or -1
 * with errno: EAGAIN: none is there, and the socket or the flags say not to
 * wait. EFAULT: buf is NULL and len is not 0, or the length of an address is
 * NULL. EINVAL: an unknown flag, or less room than a struct sockaddr_in has.
 * EBADF, ENOTSOCK: not a descriptor, not a socket. EINTR: a signal came.
 * ECONNREFUSED and the rest of recvmsg(2). Nothing is lost when it fails.
 *
 * System calls: recvmsg. Thread-safe.
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
 * Finds the original destination in a message that the program received by
 * itself: with recvmsg(2), recvmmsg(2) or io_uring.
 *
 * msg: as the kernel filled it, with room for control data (CMSG_SPACE(28)
 * and more if the socket reports more). Only the control data, msg_flags and
 * the family of msg_name are read, none of them is trusted, and msg is not
 * changed. addr and addrlen: as for tp_orig_dst; too little room is EINVAL.
 * The address is of the family of msg_name: IPv4 is v4-mapped where the
 * sender's address is of AF_INET6. Without msg_name it is as the kernel has
 * it.
 *
 * Returns 0, or -1 with errno, addr and addrlen untouched: ENOENT: the
 * message has none. EFAULT: msg, addr or addrlen is NULL, or msg_control is
 * where msg_controllen is not 0. EINVAL: too little room.
 *
 * System calls: none. Thread-safe.
 */
int tp_msg_orig_dst(const struct msghdr *msg, struct sockaddr *addr, socklen_t *addrlen);

/**
 * Receives as many datagrams as there are, with their senders and original
 * destinations: one system call.
 *
 * It waits for the first datagram, unless the socket is non-blocking, and
 * never for more. dgrams, count: an array whose data and capacity say where
 * the bytes go; no more than TP_BATCH_MAX are received in a call. flags:
 * MSG_DONTWAIT, or 0.
 *
 * In each that was received len, segment_len, flags, client and orig_dst are
 * set, and error is 0; the others are as they were. Addresses are of the
 * socket's family: an AF_INET6 socket gives IPv4 ones v4-mapped. A datagram
 * of no bytes is one too. One whose original destination the kernel does not
 * tell has TP_DGRAM_NO_ORIG_DST, and orig_dst.ss_family is AF_UNSPEC.
 *
 * Where the socket has UDP_GRO (setsockopt(fd, IPPROTO_UDP, UDP_GRO, ...),
 * udp(7), Linux 5.0), datagrams of one flow and equal length come as one, up
 * to 64 KiB: segment_len then says how long each is. Give them room: what is
 * longer than capacity is cut.
 *
 * Returns how many were received, at least 1 (0 if count is 0), or -1 with
 * errno: EAGAIN: none is there. EFAULT: dgrams is NULL, or data is where
 * capacity is not 0. EINVAL: an unknown flag. EBADF, ENOTSOCK: not a
 * descriptor, not a socket. EINTR: a signal came. ECONNREFUSED and the rest
 * of recvmmsg(2).
 *
 * System calls: recvmmsg. Thread-safe.
 */
int tp_recv_datagrams(int fd, struct tp_datagram *dgrams, unsigned int count, int flags);

/**
 * Opens a replier: it sends datagrams from any address and port.
 *
 * There is one socket for each source port and family, however many source
 * addresses and clients there are. Such a socket takes nothing that is meant
 * for others: it is bound to an address that nobody uses (192.0.0.8, RFC 7600;
 * 100:0:0:1::1, RFC 9780), so that no packet finds it, and drops what
 * is sent there nevertheless. Servers on other sockets of that port, and on
 * specific addresses, are not disturbed, nor are the listeners of the
 * program itself; to start later, a server on the wildcard address needs
 * SO_REUSEADDR (or TP_REPLIER_RAW here).
 *
 * Where another socket holds the port on the wildcard address without
 * SO_REUSEADDR (a DNS server on 0.0.0.0:53), or the port is below 1024 and
 * CAP_NET_BIND_SERVICE is missing, a raw socket sends the datagrams; that
 * needs CAP_NET_RAW. Whether the port is free is tried again once a second.
 *
 * config, size: NULL and 0 for the defaults, or the struct and
 * sizeof(struct tp_replier_config). replier: where the handle goes, on
 * success alone; tp_replier_close ends it.
 *
 * A replier is for one thread at a time; have one for each thread. Its
 * sockets are made by tp_reply as they are needed, in the network namespace
 * of the thread that calls it.
 *
 * Returns 0, or -1 with errno: EFAULT: replier is NULL, or config is and size
 * is not 0. EINVAL: an unknown flag, reserved is not zero, max_sockets above
 * 65,536, or a size less than the first version's. E2BIG: config is larger
 * than this library knows, and the rest is not zero. EPERM: neither
 * CAP_NET_RAW nor CAP_NET_ADMIN. EMFILE, ENFILE, ENOBUFS, ENOMEM: as
 * tp_socket.
 *
 * Thread-safe.
 */
int tp_replier_open(const struct tp_replier_config *config,
                    size_t size,
                    struct tp_replier **replier);

/**
 * Sends datagrams, each from its orig_dst to its client: what
 * tp_recv_datagrams filled can be passed on as it is, with other data in
 * it.
 *
 * Of each, data, len, segment_len, client and orig_dst are read, and error is
 * set: 0 if it was sent. One that cannot be sent does not keep the others
 * from it. Datagrams of one flow keep their order. orig_dst is an address and port, of
 * this host or not; client is of the same family, and either may be
 * v4-mapped. The interface is the route's; for a link-local client
 * sin6_scope_id says which.
 *
 * If len is more than segment_len, and that is not 0, then it is sent as
 * several datagrams of segment_len bytes; and consecutive datagrams of one
 * flow and equal length (the last may be shorter) leave as one message:
 * UDP_SEGMENT does either, in one pass through the kernel. Where it cannot,
 * they are sent one by one.
 *
 * What is longer than the way out allows is sent in fragments, and more than
 * 524 bytes without IPv4's DF flag: the news of a smaller MTU further on
 * would not come here, but to whom the source address belongs. (Linux takes
 * no path to be narrower than 552 bytes: DEFAULT_MIN_PMTU,
 * net/ipv4/route.c.)
 *
 * dgrams, count: an array of any length. Returns how many of it were sent;
 * 0 is no failure of the call. Or -1 with errno: EFAULT: replier or dgrams is
 * NULL.
 *
 * In error: EFAULT: data is NULL, and len is not 0. EAFNOSUPPORT: an
 * address that is neither of AF_INET nor of AF_INET6, or two of different
 * families. EINVAL: port 0, or to the unspecified address. EADDRNOTAVAIL: from
 * the unspecified address, or a multicast one. EINVAL, ENETUNREACH: the kernel
 * sends nothing from this source (broadcast), or not to this client. EMSGSIZE: longer than a datagram can be. EAGAIN: TP_NONBLOCK, and no
 * room. EINTR: a signal came while waiting for room; the rest was not tried.
 * EPERM: a firewall refuses it, or no CAP_NET_RAW for a raw socket. ENOBUFS,
 * EMFILE, ENFILE, ENOMEM, and the rest of sendmsg(2) and socket(2).
 *
 * System calls: for each 256 datagrams one sendmmsg for each source port among
 * them, and one for all whose source port is another's; one more for each
 * TP_BATCH_MAX that have a port in common, and for each that fails. A new
 * source port costs seven more. Nothing is allocated. The more datagrams, up
 * to 256, the less each of them costs.
 */
int tp_reply(struct tp_replier *replier,
             struct tp_datagram *dgrams,
             unsigned int count);

/**
 * Reads what a replier has done.
 *
 * stats, size: where it goes, and sizeof(struct tp_replier_stats). By the
 * thread that uses the replier.
 *
 * Returns 0, or -1 with errno: EFAULT: replier or stats is NULL. EINVAL: a
 * size less than the first version's. E2BIG: larger than this library knows.
 */
int tp_replier_stats(const struct tp_replier *replier, struct tp_replier_stats *stats, size_t size);

/**
 * Closes a replier and its sockets. NULL is fine.
 */
void tp_replier_close(struct tp_replier *replier);

/**
 * Makes the kernel bring connections to the listeners: an nf_tables table of
 * this process, and policy routing. It runs no program, except with
 * TP_BACKEND_IPTABLES, and with TP_BACKEND_AUTO where nf_tables is missing.
 *
 * What is intercepted is what comes in from the network for someone else, and
 * with TP_RULES_LOCAL_OUTPUT what this host sends: as config says, and never
 * what goes to this host's own addresses, to loopback, broadcast or
 * multicast, unless dst names it. While there is no listener, what would be
 * intercepted is dropped, so that nothing gets past the proxy.
 *
 * Packets that no other host can have sent are never intercepted; if they
 * match the selection, they are dropped and counted as dropped. These are
 * packets that did not come in by lo and have one of this host's own
 * addresses, a broadcast or a multicast address as their source; packets to
 * 127.0.0.0/8 or ::1 that did not come in by lo; IPv4 packets from or to
 * 0.0.0.0/8; and IPv6 packets from or to the unspecified address (::), a
 * v4-mapped one (::ffff:0:0/96) or another of ::/80. IPv6 packets with such an
 * address are not diverted to transparent sockets either. (With iptables and
 * TP_RULES_REDIRECT they are left alone: the nat table cannot drop.)
 *
 * The table belongs to the process: the kernel removes it when the process
 * ends, however it ends, and no other program can change it (`nft flush
 * ruleset` leaves it alone). A child that was forked and did not exec keeps
 * it alive. Routing has no owner: what a killed process leaves of it affects
 * no packet, and the next tp_install_rules or tp_purge_rules removes it. Once
 * the rules are gone, traffic flows as if they had never been. To restart
 * without a gap, install under a second name before the first ends, or use
 * TP_RULES_PERSIST.
 *
 * All or nothing: on failure nothing is left. Reverse-path filtering works
 * as before, with net.ipv4.conf.*.src_valid_mark set or not; no sysctl is
 * changed, and forwarding (net.ipv4.ip_forward,
 * net.ipv6.conf.all.forwarding) is not needed for what is intercepted.
 *
 * config: what to intercept. size: sizeof(struct tp_rules_config). rules:
 * where the handle goes, on success alone; tp_remove_rules ends it.
 *
 * Returns 0, or -1 with errno: EFAULT: config, rules or an array is NULL.
 * EINVAL: a value out of range, a listener that is not transparent, bound or
 * listening, an unknown flag, or a size less than the first version's.
 * E2BIG: config is larger than this library knows, and the rest is not zero.
 * EOPNOTSUPP: this version cannot do it, or the kernel lacks an option;
 * tp_last_error names it. EPERM: no CAP_NET_ADMIN over this network
 * namespace. EBUSY: a living process has rules of this name, or has this
 * table or priority. EEXIST: someone else has what was asked for. EBADF,
 * ENOTSOCK: a listener that is no descriptor, no socket. ENETDOWN: lo is
 * down. EACCES: IPv6 is asked for and disabled on lo. EAGAIN: others change
 * nf_tables without pause. EMFILE, ENFILE, ENOBUFS, ENOMEM: as tp_socket.
 *
 * Needs Linux 5.12. Thread-safe.
 */
int tp_install_rules(const struct tp_rules_config *config, size_t size, struct tp_rules **rules);

/**
 * Removes what tp_install_rules installed, and frees the handle.
 *
 * Established connections of the proxy lose their way: packets of theirs are
 * no longer diverted. rules may be NULL, which does nothing. The handle is
 * gone whatever is returned; no other call may use it at the same time.
 *
 * In a forked child of the process that installed the rules, while that
 * process lives, it removes nothing (as tp_forget_rules) and returns 0. After
 * that process has ended, the first child that calls it removes the rules for
 * all. If another process has removed the rules already, it does nothing and
 * returns 0; it does nothing to another instance that has their name now.
 *
 * Returns 0, or -1 with errno if something could not be removed, which
 * tp_last_error names. EBADF: the program has closed the descriptors of the
 * handle; nothing is written to them or closed, and tp_purge_rules removes
 * what is left. Rules and routes that were removed already are no error.
 */
int tp_remove_rules(struct tp_rules *rules);

/**
 * Gives up a forked child's copy of a handle: closes the child's copies of
 * the descriptors, frees the handle, and removes nothing.
 *
 * A worker process that was forked by the process which installed the rules
 * calls it once, first of all. Until every process that has the descriptors
 * has ended or called it, the kernel keeps the table. In the process that
 * installed the rules it leaves routing behind, which the next
 * tp_install_rules or tp_purge_rules removes; there, call tp_remove_rules.
 *
 * @param rules  handle, or NULL, which does nothing. The handle is freed.
 *
 * Async-signal-safe: no. Thread-safe; no other call may use the handle at the
 * same time. errno is unchanged.
 */
void tp_forget_rules(struct tp_rules *rules);

/**
 * Replaces what the rules ask for, in one transaction: every packet is treated
 * either by the old rules or by the new. Counters go on.
 *
 * config, size: as tp_install_rules. The name and TP_RULES_PERSIST stay as
 * they are, and so do table and priority (leave them zero, or say the same).
 * On failure the old rules are as they were.
 *
 * Returns 0, or -1 with errno as tp_install_rules; EFAULT also if rules is
 * NULL; EBADF, EBUSY, EDEADLK, ENOENT: as tp_rules_stats.
 */
int tp_replace_rules(struct tp_rules *rules, const struct tp_rules_config *config, size_t size);

/**
 * Removes what a dead or persistent instance left: its rules if they
 * persist, and routing. Never what a living process has.
 *
 * name: the instance's, or NULL for all of them. An instance that left
 * nothing is no error. On success nothing is left: if it cannot be known
 * whether something is left, the call fails.
 *
 * Runs iptables only if the kernel has chains of this library there. Which
 * chains it has is read from the kernel. (Without /proc, or without the right
 * to read /proc/net/ip_tables_names, the kernel is asked for the legacy tables
 * mangle and nat, and makes them, empty, if it can.)
 *
 * Returns 0, or -1 with errno:
 *   EBUSY       a living process has these rules
 *   EINVAL      no valid name
 *   EPERM       no CAP_NET_ADMIN over this network namespace
 *   EAGAIN, ETIMEDOUT, EOPNOTSUPP, EIO
 *               a program of iptables failed, see above
 *   EMFILE, ENFILE, ENOBUFS, ENOMEM
 *               as tp_socket
 */
int tp_purge_rules(const char *name);

/**
 * Adds prefixes to a set and removes others from it, in one transaction,
 * while the rules work. What is sent to the kernel is the change alone, and
 * what it costs does not grow with the set; but once in a while, as a set
 * grows, it is sent whole, as tp_replace_rules would.
 *
 * set: TP_SET_DST, TP_SET_SRC or TP_SET_BYPASS. dst and src can be changed if
 * they were given (none given means every address), bypass always. A set may
 * become empty: an empty dst or src intercepts nothing. Prefixes may
 * overlap: an address is in the set as long as one of them covers it. To add
 * one that is there is fine; what is both added and removed is removed.
 *
 * Returns 0, or -1 with errno and nothing changed: EFAULT: rules is NULL, or
 * an array with a count. EINVAL: no such set, no valid prefix, or of a family
 * that the rules do not serve. ENOENT: a prefix to be removed is not there.
 * EMSGSIZE: a larger change than one transaction may be here (some 10,000
 * prefixes with the default net.core.wmem_max, any number as root of the host).
 * EBADF, EBUSY, EDEADLK: as tp_rules_stats. ENOENT also if the table is gone.
 * ESTALE: another process has changed the rules since this one was forked, so
 * that the sets are not known here; call tp_replace_rules first.
 */
int tp_update_rules(struct tp_rules *rules,
                    uint32_t set,
                    const struct tp_prefix *add,
                    size_t n_add,
                    const struct tp_prefix *remove,
                    size_t n_remove);

/**
 * Reads what the rules have done since they were installed.
 *
 * stats, size: where it goes, and sizeof(struct tp_rules_stats).
 *
 * Returns 0, or -1 with errno: EFAULT: rules or stats is NULL. EINVAL: a size
 * less than the first version's. E2BIG: larger than this library knows.
 * ENOENT: the table is gone, or is another instance's by now. EBADF: the
 * program has closed the descriptors of the handle, or something else has
 * their numbers. EBUSY: this is a forked child, and the process that
 * installed the rules lives (tp_read_stats works). EDEADLK: another thread
 * was in a call on the handle when this process was forked.
 */
int tp_rules_stats(const struct tp_rules *rules, struct tp_rules_stats *stats, size_t size);

/**
 * Reads what the rules of an instance have done, whatever process they
 * belong to.
 *
 * name: the instance's; NULL: "tproxy". stats, size: as tp_rules_stats.
 *
 * Returns 0, or -1 with errno: ENOENT: there are no rules of this name.
 * EPERM: no CAP_NET_ADMIN over this network namespace. EFAULT, EINVAL, E2BIG:
 * as tp_rules_stats; EINVAL also if the name is not valid.
 */
int tp_read_stats(const char *name, struct tp_rules_stats *stats, size_t size);

/**
 * Writes the script that would do what tp_install_rules does on a host where
 * nothing is taken, and does nothing else. It needs no privilege.
 *
 * It is a POSIX shell script, NUL-terminated UTF-8, and it ends at the first
 * command that fails. Rules made by it belong to
 * no process: they stay until somebody deletes them.
 *
 * config, size: as tp_install_rules. format: TP_FORMAT_NFT or
 * TP_FORMAT_IPTABLES. buf, len: a place and its size, which becomes the size of the
 * script with its NUL; buf may be NULL to learn that size alone.
 *
 * Returns 0, or -1 with errno and nothing written: EFAULT: config or len is
 * NULL. ERANGE: too little room. EINVAL: as tp_install_rules, or no such
 * format. EOPNOTSUPP: what iptables cannot do.
 */
int tp_render_rules(const struct tp_rules_config *config,
                    size_t size,
                    uint32_t format,
                    char *buf,
                    size_t *len);

/**
 * Says what on this host breaks, or weakens, transparent proxying, and the
 * command that fixes it.
 *
 * It asks the kernel, about this process, its network namespace, and whatever
 * rules, routes, sysctls and listeners are there, by whomever: capabilities;
 * IP_TRANSPARENT, by setting it; what nf_tables can do, by a transaction
 * that is never committed; rules of this library without a listener or an
 * owner; and what other programs' rules do to packets that are intercepted.
 * It changes nothing (but the kernel may load a module that it is asked
 * about), runs no program, and needs no privilege and no /proc. What it
 * cannot see is not reported as missing; it says so by a note, "check.unseen".
 *
 * Other programs may have any number of rules, routes and sockets. Each list is
 * read up to a bound (some ten thousand rules, a thousand routes of a table),
 * and no more than 100 findings of a kind are told; there is such a note for
 * each bound that was reached.
 *
 * report: is told each finding, good ones too. context: is handed on to it.
 *
 * Returns the number of failures (findings of TP_SEVERITY_FAILURE), 0 if there are
 * none, or -1 with errno: EFAULT: report is NULL.
 *
 * Takes some milliseconds, with thousands of rules a tenth of a second.
 * Thread-safe.
 */
int tp_check(tp_finding_fn report, void *context);

/**
 * Tries whether rules work on this kernel: sends a connection and a datagram
 * of each family through them, as far as config asks for these, in a network
 * that exists only during the call, and says what became of each; of one that
 * was lost, at which hook it was last seen.
 *
 * The rules are installed in that network, not in the caller's, with
 * listeners made there as config describes them (the descriptors in it are
 * looked at, and not used). So it tests config and the kernel; what other
 * programs' rules do on this host is tp_check's. Nothing of the host is changed.
 *
 * config, size: as tp_install_rules. report, context: as tp_check.
 *
 * Returns the number of failures, or -1 with errno: as tp_install_rules, and
 * EPERM also without CAP_SYS_ADMIN, which it takes to make a network
 * (`unshare -r` gives it to anybody). EFAULT: config or report is NULL.
 *
 * Takes less than three seconds, mostly some milliseconds: longer if a probe is
 * lost. It starts a thread, because a network belongs to one; the thread
 * gets no signals, and has ended when the call returns. Thread-safe.
 */
int tp_self_test(const struct tp_rules_config *config,
                 size_t size,
                 tp_finding_fn report,
                 void *context);

/**
 * The sentence of this thread's last failing call: the step, why it failed,
 * and what cures it where that is known.
 *
 * Never NULL; empty before the first failure. UTF-8, for people, and not to
 * be parsed: errno is for programs. Valid until this thread's next failing
 * call, and until the thread ends. A call that succeeds does not change it.
 */
const char *tp_last_error(void);

/**
 * The version of the library, "MAJOR.MINOR.PATCH". Static, never NULL.
 */
const char *tp_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TPROXY_H */
