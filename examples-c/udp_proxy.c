/*
 * A transparent UDP relay, whole.
 *
 *     udp_proxy [OPTION]... LISTEN-PORT PORT[-PORT]...
 *
 * intercepts every datagram that this host would forward to one of the PORTs of
 * somebody else, over IPv4 and IPv6, and sends it on: the client believes that
 * it talks to the server, the server that it talks to the client. Until SIGINT
 * or SIGTERM, which leave nothing behind. SIGUSR1 prints what was done so far.
 *
 *     --dst ADDR/LEN    only what goes there; may be given again
 *     --to ADDR:PORT    send all to this server of another host, whatever was
 *                       asked; the answers come from what was asked. May be
 *                       given for each family; a family without is left alone
 *     --sessions N      how many conversations there are at most
 *     --idle SECONDS    how long one may be silent; 30
 *     --deny ADDR/LEN   call nobody there for a client; may be given again. See
 *                       deny.h for what is refused anyway; `--deny none` clears it
 *     --verbose         a line to standard output for each session
 *
 * A session is one client's address and port with one destination, and has a
 * socket of its own towards the server. When there are too many, the one that
 * was silent for longest ends; a client that goes on gets another. So memory and
 * descriptors are bounded: there are never more descriptors than
 *
 *     sessions + sources (256, or less where few are allowed) + 16
 *
 * by default as many as RLIMIT_NOFILE allows, and no more than 65,536 sessions.
 * A session is some 140 bytes here, besides the kernel's socket, and buffers
 * take 8 MiB at most.
 *
 * One thread, one epoll loop. What is specific to transparent proxying is in
 * main(), open_session() and take_answers(); the rest is any relay.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/filter.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <tproxy.h>

#include "deny.h"

enum {
    BUFFER = 64 * 1024,         /* a datagram, or what UDP_GRO makes of many */
    EVENTS = 256,
    AT_ONCE = 8,                /* answers of one session before the others have their turn */
    MAX_RANGES = 64,
    MAX_SESSIONS = 65536,
    MAX_SOURCES = 256,          /* the replier's sockets: ports that answers come from, for each family */
    OTHER_DESCRIPTORS = 16,     /* the standard three; listener, epoll, signals, routes; the rules'; the replier's raw ones */
};

/* Every address is kept as IPv6 has it, IPv4 v4-mapped: the library takes them so, and one can compare bytes. */
struct key {
    struct sockaddr_in6 client, orig_dst;
};

struct session {
    struct key key;
    struct sockaddr_in6 server;        /* orig_dst, or what --to says */
    int fd;                            /* the client's socket, as the server sees it */
    uint64_t used;                     /* when something was last heard, in milliseconds */
    struct session *newer, *older;     /* by that time */
    struct session *next;              /* in its bucket, or among the free */
};

static struct {
    uint64_t opened, idle, evicted, failed, denied;         /* sessions */
    uint64_t received, sent, unsent, answers, strangers;    /* datagrams; of UDP_GRO's many, one */
    uint64_t refused;                                       /* times that a server's host said so */
} count;

static int epoll_fd, signal_fd, listener, route_news;
static bool verbose;
static tp_replier *replier;
static struct deny_list deny;
static struct sockaddr_in6 to[2];                  /* --to, of IPv4 and of IPv6 */
static uint64_t now, idle_ms = 30000, seed;
static size_t max_sessions, n_sessions, n_buckets;
static struct session **buckets, *free_sessions;
static struct session by_use = { .newer = &by_use, .older = &by_use };
static struct tp_datagram requests[TP_BATCH_MAX], answers[TP_BATCH_MAX];
static unsigned n_answers;

static void read_clock(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    now = (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

/* What goes wrong with one datagram may go wrong with a million: one sentence a second. */
static void complain(const char *sentence)
{
    static uint64_t next;
    if (now >= next)
        fprintf(stderr, "%s\n", sentence);
    next = now >= next ? now + 1000 : next;
}

/* An address for people; IPv4 as IPv4. */
static const char *show(const struct sockaddr_in6 *addr, char text[static 80])
{
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (getnameinfo((const struct sockaddr *)addr, sizeof *addr, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return "?";
    bool mapped = IN6_IS_ADDR_V4MAPPED(&addr->sin6_addr);
    snprintf(text, 80, mapped ? "%.60s:%.8s" : "[%.60s]:%.8s", mapped ? host + strlen("::ffff:") : host, port);
    return text;
}

static struct sockaddr_in6 as_ipv6(const void *addr)
{
    struct sockaddr_in6 in6 = { .sin6_family = AF_INET6 };
    if (((const struct sockaddr *)addr)->sa_family == AF_INET) {
        const struct sockaddr_in *in = addr;
        in6.sin6_port = in->sin_port;
        in6.sin6_addr.s6_addr[10] = in6.sin6_addr.s6_addr[11] = 0xff;
        memcpy(&in6.sin6_addr.s6_addr[12], &in->sin_addr, 4);
    } else {
        const struct sockaddr_in6 *from = addr;
        in6.sin6_port = from->sin6_port;
        in6.sin6_addr = from->sin6_addr;
        in6.sin6_scope_id = from->sin6_scope_id;
    }
    return in6;
}

/* ---- Sessions: a hash table, and a list by use ---- */

/* The clients choose the keys: without the seed they could choose one bucket for all. */
static struct session **bucket_of(const struct key *key)
{
    uint64_t words[sizeof *key / 8], hash = seed;
    memcpy(words, key, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        hash = (hash ^ words[i]) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    return &buckets[hash & (n_buckets - 1)];
}

static void make_table(void)
{
    for (n_buckets = 64; n_buckets < max_sessions; n_buckets *= 2)
        ;
    buckets = calloc(n_buckets, sizeof *buckets);
    struct session *sessions = calloc(max_sessions, sizeof *sessions);
    if (buckets == NULL || sessions == NULL || getrandom(&seed, sizeof seed, 0) != sizeof seed)
        err(1, "the table of sessions");
    for (size_t i = 0; i < max_sessions; i++) {
        sessions[i].next = free_sessions;
        free_sessions = &sessions[i];
    }
}

static void unlink_by_use(struct session *session)
{
    session->newer->older = session->older;
    session->older->newer = session->newer;
}

static void use(struct session *session)
{
    session->used = now;
    session->newer = &by_use;
    session->older = by_use.older;
    session->older->newer = by_use.older = session;
}

static void close_session(struct session *session)
{
    struct session **link = bucket_of(&session->key);
    while (*link != session)
        link = &(*link)->next;
    *link = session->next;
    unlink_by_use(session);
    close(session->fd);
    session->next = free_sessions;
    free_sessions = session;
    n_sessions--;
}

/* The one that was silent for longest: it is the sentinel's neighbour on the other side. */
static bool evict(void)
{
    if (n_sessions == 0)
        return false;
    close_session(by_use.newer);
    count.evicted++;
    return true;
}

static void end_idle_sessions(void)
{
    while (n_sessions > 0 && now - by_use.newer->used >= idle_ms) {
        close_session(by_use.newer);
        count.idle++;
    }
}

/* How long epoll may wait until the next session is idle. */
static int patience(void)
{
    if (n_sessions == 0)
        return -1;
    uint64_t end = by_use.newer->used + idle_ms;
    return end > now ? (int)(end - now) : 0;
}

/* ---- This host's own addresses: replies to one would come back as answers, to be replied to, without end ---- */

/* Of an IPv6 packet the addresses may be v4-mapped, both or one: that is none that another host has. */
static bool is_own(const struct key *key)
{
    return IN6_IS_ADDR_UNSPECIFIED(&key->client.sin6_addr) ||
           IN6_IS_ADDR_V4MAPPED(&key->client.sin6_addr) != IN6_IS_ADDR_V4MAPPED(&key->orig_dst.sin6_addr) ||
           is_own_address((const struct sockaddr *)&key->client, sizeof key->client) ||
           is_own_address((const struct sockaddr *)&key->orig_dst, sizeof key->orig_dst);
}

/* Addresses may come to this host later. For each there is a local route, of which the kernel tells (rtnetlink(7)). */
static int open_route_news(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, NLMSG_HDRLEN + offsetof(struct rtmsg, rtm_type)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RTN_LOCAL, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    struct sock_fprog only_local = { .len = sizeof code / sizeof *code, .filter = code };
    struct sockaddr_nl groups = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &only_local, sizeof only_local) != 0 ||
        bind(fd, (struct sockaddr *)&groups, sizeof groups) != 0)
        err(1, "rtnetlink");
    return fd;
}

static bool is_within(const struct sockaddr_in6 *addr, const struct in6_addr *prefix, unsigned len)
{
    unsigned bytes = len / 8, bits = len % 8;
    return memcmp(&addr->sin6_addr, prefix, bytes) == 0 &&
           (bits == 0 || (addr->sin6_addr.s6_addr[bytes] ^ prefix->s6_addr[bytes]) >> (8 - bits) == 0);
}

/* Ends the sessions with an address in the prefix that is this host's now. */
static void end_own_sessions(const struct in6_addr *prefix, unsigned len)
{
    for (struct session *session = by_use.newer, *newer; session != &by_use; session = newer) {
        newer = session->newer;
        const struct key *key = &session->key;
        if ((is_within(&key->client, prefix, len) || is_within(&key->orig_dst, prefix, len)) && is_own(key)) {
            close_session(session);
            count.denied++;
        }
    }
}

static void take_route_news(void)
{
    union {
        struct nlmsghdr header;
        char bytes[4096];
    } news;
    ssize_t len;
    while ((len = recv(route_news, &news, sizeof news, MSG_DONTWAIT)) >= 0 || errno == ENOBUFS) {
        if (len < 0) {
            end_own_sessions(&in6addr_any, 0);    /* some news were lost: ask about every session */
            continue;
        }
        const struct rtmsg *route = NLMSG_DATA(&news.header);
        if ((size_t)len < NLMSG_LENGTH(sizeof *route) || news.header.nlmsg_type != RTM_NEWROUTE)
            continue;
        size_t rest = (size_t)len - NLMSG_LENGTH(sizeof *route), size = route->rtm_family == AF_INET ? 4 : 16;
        struct in6_addr prefix = size == 4 ? (struct in6_addr){ .s6_addr = { [10] = 0xff, [11] = 0xff } } : in6addr_any;
        for (const struct rtattr *attr = RTM_RTA(route); RTA_OK(attr, rest); attr = RTA_NEXT(attr, rest))
            if (attr->rta_type == RTA_DST && RTA_PAYLOAD(attr) == size)
                memcpy(&prefix.s6_addr[16 - size], RTA_DATA(attr), size);
        end_own_sessions(&prefix, route->rtm_dst_len + (size == 4 ? 96 : 0));
    }
}

/* ---- The life of a session ---- */

/*
 * The heart of it, towards the server: call it in the client's name. With --to
 * several sessions of a client have one server, so each needs a port of its own
 * to tell their answers apart.
 */
static struct session *open_session(const struct key *key)
{
    const struct sockaddr_in6 *server = &to[!IN6_IS_ADDR_V4MAPPED(&key->client.sin6_addr)];
    uint32_t flags = TP_CONNECT_DGRAM | TP_NONBLOCK;
    if (server->sin6_family == AF_UNSPEC) {
        server = &key->orig_dst;
        flags |= TP_CONNECT_KEEP_PORT;
    }
    /* Clients choose where to without --to alone. A session that goes on is not asked again. */
    if ((server == &key->orig_dst && denied(&deny, (const struct sockaddr *)server)) || is_own(key)) {
        complain("refused: a client or destination with an address of this host, or a destination that is denied");
        count.denied++;
        return NULL;
    }
    if (free_sessions == NULL)
        evict();
    int fd;
    do {
        fd = tp_connect_from((const struct sockaddr *)&key->client, sizeof key->client,
                             (const struct sockaddr *)server, sizeof *server, flags);
    } while (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) && evict());
    if (fd < 0) {
        complain(tp_last_error());
        count.failed++;
        return NULL;
    }
    /* Answers in trains, where the server sends such; without it they come one by one. */
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &(int){ 1 }, sizeof(int));

    struct session *session = free_sessions, **bucket = bucket_of(key);
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = session };
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        complain(strerror(errno));
        count.failed++;
        close(fd);
        evict();    /* epoll may have no room for more: then the next one finds some */
        return NULL;
    }
    free_sessions = session->next;
    *session = (struct session){ .key = *key, .server = *server, .fd = fd, .next = *bucket };
    *bucket = session;
    use(session);
    n_sessions++;
    count.opened++;
    if (verbose) {
        char a[80], b[80];
        printf("intercepted %s -> %s\n", show(&key->client, a), show(&key->orig_dst, b));
    }
    return session;
}

static struct session *session_of(const struct tp_datagram *request)
{
    struct key key = { as_ipv6(&request->client), as_ipv6(&request->orig_dst) };
    for (struct session *session = *bucket_of(&key); session != NULL; session = session->next)
        if (memcmp(&session->key, &key, sizeof key) == 0) {
            unlink_by_use(session);
            use(session);
            return session;
        }
    return open_session(&key);
}

/* ---- Datagrams ---- */

/* An error may be an earlier datagram's, that the server's host refused; asking for it has cleared it. */
static bool send_message(int fd, const struct msghdr *message)
{
    for (int attempt = 0; attempt < 2; attempt++) {
        if (sendmsg(fd, message, 0) >= 0)
            return true;
        count.refused += errno == ECONNREFUSED;
        if (errno == EAGAIN || errno == EMSGSIZE || errno == EINVAL)
            break;
    }
    return false;
}

static bool send_on(int fd, const struct tp_datagram *request)
{
    struct iovec part = { request->data, request->len };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
    if (request->segment_len == 0 || request->segment_len >= request->len)
        return send_message(fd, &message);

    /* Several that came as one leave as one (UDP_SEGMENT). */
    uint16_t segment_len = (uint16_t)request->segment_len;
    union {
        char room[CMSG_SPACE(sizeof segment_len)];
        struct cmsghdr header;
    } control = { .header = { .cmsg_level = IPPROTO_UDP, .cmsg_type = UDP_SEGMENT } };
    control.header.cmsg_len = CMSG_LEN(sizeof segment_len);
    memcpy(CMSG_DATA(&control.header), &segment_len, sizeof segment_len);
    message.msg_control = &control, message.msg_controllen = sizeof control;
    if (send_message(fd, &message))
        return true;

    /* Or one by one: there is no such offload on this way, or they have to be fragments. */
    message.msg_control = NULL, message.msg_controllen = 0;
    bool all = true;
    for (size_t at = 0; at < request->len; at += segment_len) {
        size_t rest = request->len - at;
        part = (struct iovec){ (char *)request->data + at, rest < segment_len ? rest : segment_len };
        all = send_message(fd, &message) && all;
    }
    return all;
}

/* One batch of what clients sent, to the servers. */
static void take_requests(void)
{
    int n = tp_recv_datagrams(listener, requests, TP_BATCH_MAX, 0);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        complain(tp_last_error());
    for (int i = 0; i < n; i++) {
        count.received++;
        struct session *session = requests[i].flags & TP_DGRAM_NO_ORIG_DST ? NULL : session_of(&requests[i]);
        if (session != NULL && send_on(session->fd, &requests[i]))
            count.sent++;
        else
            count.unsent++;
    }
}

static void flush_answers(void)
{
    if (n_answers > 0 && tp_reply(replier, answers, n_answers) < (int)n_answers)
        for (unsigned i = 0; i < n_answers; i++)
            if (answers[i].error != 0 && answers[i].error != EAGAIN)
                complain(strerror(answers[i].error));
    n_answers = 0;
}

/* The heart of it, towards the client: what the server said, from the address that was asked. */
static void take_answers(struct session *session)
{
    unsigned room = TP_BATCH_MAX - n_answers;
    struct tp_datagram *batch = answers + n_answers;
    int n = tp_recv_datagrams(session->fd, batch, room < AT_ONCE ? room : AT_ONCE, 0);
    /* A server that refuses (ICMP) today may listen tomorrow: no reason to end the session. */
    if (n < 0)
        count.refused += errno == ECONNREFUSED;
    for (int i = 0; i < n; i++) {
        /* In the moment between bind and connect a socket takes what anybody sends: not an answer to this. */
        struct sockaddr_in6 sender = as_ipv6(&batch[i].client);
        if (sender.sin6_port != session->server.sin6_port ||
            memcmp(&sender.sin6_addr, &session->server.sin6_addr, sizeof sender.sin6_addr) != 0) {
            count.strangers++;
            continue;
        }
        struct tp_datagram *place = &answers[n_answers++];
        if (place != &batch[i]) {
            /* A stranger left a gap: the two change places, with their memory. */
            struct tp_datagram answer = batch[i];
            batch[i] = *place;
            *place = answer;
        }
        memcpy(&place->client, &session->key.client, sizeof session->key.client);
        memcpy(&place->orig_dst, &session->key.orig_dst, sizeof session->key.orig_dst);
        count.answers++;
        unlink_by_use(session);
        use(session);
    }
    if (n_answers == TP_BATCH_MAX)
        flush_answers();
}

static void print_statistics(void)
{
    struct tp_replier_stats replies;
    if (tp_replier_stats(replier, &replies, sizeof replies) != 0)
        errx(1, "%s", tp_last_error());
    printf("sessions: %zu of %zu, opened %" PRIu64 ", idle %" PRIu64 ", evicted %" PRIu64 ", failed %" PRIu64
           ", denied %" PRIu64 "; requests: %" PRIu64 ", sent %" PRIu64 ", unsent %" PRIu64 ", refused %" PRIu64 "; answers: %" PRIu64
           ", sent %" PRIu64 ", raw %" PRIu64 ", unsent %" PRIu64 ", strangers %" PRIu64 "; sources: %" PRIu64 "\n",
           n_sessions, max_sessions, count.opened, count.idle, count.evicted, count.failed, count.denied, count.received,
           count.sent, count.unsent, count.refused, count.answers, replies.sent, replies.raw, replies.errors, count.strangers,
           replies.sockets);
}

/* ---- The command line ---- */

static unsigned long parse_number(const char *text, unsigned long least, unsigned long most, char end, const char **rest)
{
    char *stop;
    errno = 0;
    unsigned long number = strtoul(text, &stop, 10);
    if (errno != 0 || *text < '0' || *text > '9' || number < least || number > most || (*stop != '\0' && *stop != end))
        errx(2, "%s: not a number from %lu to %lu, or not what belongs here", text, least, most);
    if (rest != NULL)
        *rest = stop;
    return number;
}

static size_t parse_ports(char **args, struct tp_port_range *ranges)
{
    size_t n = 0;
    for (; args[n] != NULL; n++) {
        const char *rest;
        if (n == MAX_RANGES)
            errx(2, "more than %d ranges of ports", MAX_RANGES);
        ranges[n].first = ranges[n].last = (uint16_t)parse_number(args[n], 1, 65535, '-', &rest);
        if (*rest == '-')
            ranges[n].last = (uint16_t)parse_number(rest + 1, 1, 65535, '\0', NULL);
    }
    return n;
}

/* ADDR, a separator, a number; ADDR may be in brackets. What is before the separator is cut off. */
static struct sockaddr_in6 parse_address(char *text, char separator, const char **number)
{
    char *end = strrchr(text, separator);
    if (end == NULL)
        errx(2, "%s: has no '%c'", text, separator);
    *end = '\0';
    *number = end + 1;
    size_t len = strlen(text);
    if (*text == '[' && text[len - 1] == ']')
        text[len - 1] = '\0', text++;
    struct addrinfo hints = { .ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_DGRAM }, *found;
    int error = getaddrinfo(text, NULL, &hints, &found);
    if (error != 0)
        errx(2, "%s: %s", text, gai_strerror(error));
    struct sockaddr_in6 addr = as_ipv6(found->ai_addr);
    freeaddrinfo(found);
    return addr;
}

static void parse_to(char *text)
{
    const char *port;
    struct sockaddr_in6 addr = parse_address(text, ':', &port);
    addr.sin6_port = htons((uint16_t)parse_number(port, 1, 65535, '\0', NULL));
    to[!IN6_IS_ADDR_V4MAPPED(&addr.sin6_addr)] = addr;
}

static struct tp_prefix parse_prefix(char *text)
{
    const char *len;
    struct sockaddr_in6 addr = parse_address(text, '/', &len);
    bool v4 = IN6_IS_ADDR_V4MAPPED(&addr.sin6_addr);
    struct tp_prefix prefix = { .family = v4 ? AF_INET : AF_INET6 };
    prefix.len = (uint8_t)parse_number(len, 0, v4 ? 32 : 128, '\0', NULL);
    memcpy(prefix.addr, &addr.sin6_addr.s6_addr[v4 ? 12 : 0], v4 ? 4 : 16);
    return prefix;
}

/* As many sessions as descriptors are left for, unless somebody chose. Gives how many sources the replier may have. */
static uint32_t share_descriptors(size_t sessions)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        err(1, "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    size_t descriptors = limit.rlim_max;
    uint32_t sources = descriptors / 4 < MAX_SOURCES ? (uint32_t)(descriptors / 4) : MAX_SOURCES;
    size_t others = sources + OTHER_DESCRIPTORS;
    if (descriptors <= others + sessions)
        errx(1, "%zu descriptors are allowed (ulimit -n): too few for %zu sessions", descriptors,
             sessions > 0 ? sessions : 1);
    size_t most = descriptors - others;
    max_sessions = sessions > 0 ? sessions : most < MAX_SESSIONS ? most : MAX_SESSIONS;
    return sources;
}

/* One listener for both families; for IPv4 alone where the kernel has no IPv6. */
static int open_listener(uint16_t port)
{
    struct sockaddr_in6 any6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
    struct sockaddr_in any4 = { .sin_family = AF_INET, .sin_port = htons(port) };
    int fd = tp_socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    struct sockaddr *any = (struct sockaddr *)&any6;
    socklen_t len = sizeof any6;
    if (fd < 0 && errno == EAFNOSUPPORT) {
        fd = tp_socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        any = (struct sockaddr *)&any4, len = sizeof any4;
    }
    if (fd < 0 || tp_bind_nonlocal(fd, any, len) != 0)
        errx(1, "%s", tp_last_error());
    /* Datagrams of one flow come as one; and there is room for a burst (as net.core.rmem_max allows). */
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &(int){ 1 }, sizeof(int));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){ 4 << 20 }, sizeof(int));
    return fd;
}

/* Untracked, if it can be had: connection tracking would take both halves of a session for one flow. */
static tp_rules *install(struct tp_rules_config *config)
{
    tp_rules *rules;
    config->flags = TP_RULES_NOTRACK;
    int rc = tp_install_rules(config, sizeof *config, &rules);
    if (rc != 0 && errno == EOPNOTSUPP) {
        /* By iptables, which cannot leave it out. */
        config->flags = 0;
        rc = tp_install_rules(config, sizeof *config, &rules);
    }
    if (rc != 0)
        errx(1, "%s", tp_last_error());
    return rules;
}

static void give_memory(struct tp_datagram *datagrams)
{
    char *memory = malloc((size_t)TP_BATCH_MAX * BUFFER);
    if (memory == NULL)
        err(1, "buffers");
    for (size_t i = 0; i < TP_BATCH_MAX; i++)
        datagrams[i].data = memory + i * BUFFER, datagrams[i].capacity = BUFFER;
}

static void watch(int fd, void *ptr)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = ptr };
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        err(1, "epoll_ctl");
}

/* False: it is time to end. */
static bool take_signal(void)
{
    struct signalfd_siginfo info;
    if (read(signal_fd, &info, sizeof info) != sizeof info)
        return true;
    if (info.ssi_signo != SIGUSR1)
        return false;
    print_statistics();
    return true;
}

/* Fills config, and what the options say elsewhere; gives the listener's port. */
static uint16_t parse_options(int argc, char **argv, struct tp_rules_config *config, size_t *sessions)
{
    static struct tp_port_range ports[MAX_RANGES];
    static struct tp_prefix dst[MAX_RANGES];
    static const struct option options[] = {
        { "dst", required_argument, NULL, 'd' },      { "to", required_argument, NULL, 't' },
        { "sessions", required_argument, NULL, 's' }, { "idle", required_argument, NULL, 'i' },
        { "deny", required_argument, NULL, 'x' },     { "verbose", no_argument, NULL, 'v' },
        { 0 },
    };
    deny_defaults(&deny);
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case 'd':
            if (config->n_dst == MAX_RANGES)
                errx(2, "more than %d destinations", MAX_RANGES);
            dst[config->n_dst++] = parse_prefix(optarg);
            config->dst = dst;
            break;
        case 't': parse_to(optarg); break;
        case 'x':
            if (!deny_add(&deny, optarg))
                errx(2, "%s: not a prefix to deny (ADDR/LEN), or there are more than %d", optarg, MAX_DENIED);
            break;
        case 's': *sessions = parse_number(optarg, 1, 1 << 20, '\0', NULL); break;
        case 'i': idle_ms = 1000 * parse_number(optarg, 1, 1 << 20, '\0', NULL); break;
        case 'v': verbose = true; break;
        default: exit(2);
        }
    if (argc - optind < 2)
        errx(2, "usage: udp_proxy [--dst ADDR/LEN]... [--to ADDR:PORT]... [--sessions N] [--idle SECONDS] [--deny ADDR/LEN]... "
                "[--verbose] "
                "LISTEN-PORT PORT[-PORT]...");
    config->ports = ports, config->n_ports = parse_ports(argv + optind + 1, ports);
    if (to[0].sin6_family != AF_UNSPEC)
        config->families |= TP_FAMILY_IPV4;
    if (to[1].sin6_family != AF_UNSPEC)
        config->families |= TP_FAMILY_IPV6;
    return (uint16_t)parse_number(argv[optind], 1, 65535, '\0', NULL);
}

static int open_signals(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    return signalfd(-1, &signals, SFD_CLOEXEC);
}

static void relay(void)
{
    for (bool running = true; running;) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll_fd, events, EVENTS, patience());
        bool requested = false, rerouted = false;
        read_clock();
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &listener)
                requested = true;
            else if (events[i].data.ptr == &signal_fd)
                running = take_signal() && running;
            else if (events[i].data.ptr == &route_news)
                rerouted = true;
            else
                take_answers(events[i].data.ptr);
        }
        /* Answers first: a new session or a new address may be the end of one whose answer has just come. */
        flush_answers();
        if (rerouted)
            take_route_news();
        if (requested)
            take_requests();
        end_idle_sessions();
    }
}

int main(int argc, char **argv)
{
    struct tp_rules_config config = { .name = "udp_proxy", .listeners = &listener, .n_listeners = 1 };
    size_t sessions = 0;
    uint16_t port = parse_options(argc, argv, &config, &sessions);
    setvbuf(stdout, NULL, _IOLBF, 0);

    struct tp_replier_config sources = { .flags = TP_NONBLOCK, .max_sockets = share_descriptors(sessions) };
    make_table();
    give_memory(requests);
    give_memory(answers);
    signal_fd = open_signals();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (signal_fd < 0 || epoll_fd < 0)
        err(1, "signalfd, epoll_create1");
    if (tp_replier_open(&sources, sizeof sources, &replier) != 0)
        errx(1, "%s", tp_last_error());
    listener = open_listener(port);
    watch(listener, &listener);
    watch(signal_fd, &signal_fd);
    route_news = open_route_news();
    watch(route_news, &route_news);
    tp_rules *rules = install(&config);
    printf("listening: at most %zu sessions, %zu descriptors\n", max_sessions,
           max_sessions + sources.max_sockets + OTHER_DESCRIPTORS);

    relay();

    int rc = tp_remove_rules(rules);
    if (rc != 0)
        warnx("%s", tp_last_error());
    print_statistics();
    tp_replier_close(replier);
    return rc == 0 ? 0 : 1;
}
