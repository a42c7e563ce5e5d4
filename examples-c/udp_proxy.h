/*
 * The parts of udp_proxy share these types and variables. udp_proxy.c describes the program.
 *
 *   udp_proxy.c            sets up sockets and rules, runs the event loop, prints statistics
 *   udp_proxy_options.c    the command line
 *   udp_proxy_sessions.c   the table of sessions; opens and ends them
 *   udp_proxy_own.c        ends sessions whose addresses became addresses of this host
 *   udp_proxy_data.c       passes on requests and replies
 */
#ifndef UDP_PROXY_H
#define UDP_PROXY_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <tproxy.h>

#include "deny.h"

enum {
    BUFFER = 64 * 1024,         /* a datagram, or a batch that UDP_GRO joined */
    EVENTS = 256,
    AT_ONCE = 8,                /* replies of one session that are read before other sessions are served */
    MAX_RANGES = 64,
    MAX_SESSIONS = 65536,
    MAX_SOURCES = 256,          /* sockets of the replier: source ports of replies, per family */
    OTHER_DESCRIPTORS = 16,     /* standard streams, listener, epoll, signals, routes, rules, raw sockets of the replier */
};

/* Addresses are stored as IPv6, IPv4 v4-mapped: the library accepts them, and they can be compared by bytes. */
struct key {
    struct sockaddr_in6 client, orig_dst;
};

struct session {
    struct key key;
    struct sockaddr_in6 server;        /* orig_dst, or the address given by --to */
    int fd;                            /* socket towards the server, with the client's address */
    uint64_t used;                     /* time of the last datagram, in milliseconds */
    struct session *newer, *older;     /* neighbors by that time */
    struct session *next;              /* next in the bucket, or in the free list */
};

struct counters {
    uint64_t opened, idle, evicted, failed, denied;       /* sessions */
    uint64_t received, sent, unsent, replies, foreign;    /* datagrams; a UDP_GRO batch counts as one */
    uint64_t refused;                                     /* ICMP errors of servers' hosts */
};

struct settings {
    struct deny_list deny;
    struct sockaddr_in6 to[2];                            /* --to, for IPv4 and for IPv6 */
    uint64_t idle_ms;
    size_t sessions;                                      /* --sessions, or 0 */
    bool verbose;
};

extern struct counters count;
extern struct settings settings;
extern tp_replier *replier;
extern uint64_t now;                                      /* in milliseconds */
extern int epoll_fd;
extern size_t max_sessions, n_sessions;
extern struct session by_use;                             /* sentinel of the list by use; .newer is the oldest session */

/* udp_proxy.c */
void complain(const char *message);
struct sockaddr_in6 as_ipv6(const void *addr);

/* udp_proxy_options.c: fills config and settings; returns the listener's port */
uint16_t parse_options(int argc, char **argv, struct tp_rules_config *config);

/* udp_proxy_sessions.c */
void create_table(void);
struct session *session_of(const struct tp_datagram *request);
void mark_used(struct session *session);
void close_session(struct session *session);
void end_idle_sessions(void);
int timeout(void);

/* udp_proxy_own.c */
bool is_own(const struct key *key);
int open_route_socket(void);
void handle_route_messages(int route_fd);

/* udp_proxy_data.c */
void allocate_buffers(void);
void handle_requests(int listener);
void handle_replies(struct session *session);
void flush_replies(void);

#endif
