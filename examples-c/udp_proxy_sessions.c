/* The table of sessions. A session is one client address and port with one destination. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <unistd.h>

#include "udp_proxy.h"

size_t max_sessions, n_sessions;
struct session by_use = { .newer = &by_use, .older = &by_use };
static uint64_t seed;
static size_t n_buckets;
static struct session **buckets, *free_sessions;

/* Formats an address; a v4-mapped address as IPv4. */
static const char *format_address(const struct sockaddr_in6 *addr, char text[static 80])
{
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (getnameinfo((const struct sockaddr *)addr, sizeof *addr, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return "?";
    bool mapped = IN6_IS_ADDR_V4MAPPED(&addr->sin6_addr);
    snprintf(text, 80, mapped ? "%.60s:%.8s" : "[%.60s]:%.8s", mapped ? host + strlen("::ffff:") : host, port);
    return text;
}

/* Clients choose the keys. The random seed prevents them from choosing keys of one bucket. */
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

void create_table(void)
{
    for (n_buckets = 64; n_buckets < max_sessions; n_buckets *= 2)
        ;
    buckets = calloc(n_buckets, sizeof *buckets);
    struct session *sessions = calloc(max_sessions, sizeof *sessions);
    if (buckets == NULL || sessions == NULL || getrandom(&seed, sizeof seed, 0) != sizeof seed)
        err(1, "table of sessions");
    for (size_t i = 0; i < max_sessions; i++) {
        sessions[i].next = free_sessions;
        free_sessions = &sessions[i];
    }
}

static void remove_by_use(struct session *session)
{
    session->newer->older = session->older;
    session->older->newer = session->newer;
}

static void append_by_use(struct session *session)
{
    session->used = now;
    session->newer = &by_use;
    session->older = by_use.older;
    session->older->newer = by_use.older = session;
}

/* Makes it the most recently used session. */
void mark_used(struct session *session)
{
    remove_by_use(session);
    append_by_use(session);
}

void close_session(struct session *session)
{
    struct session **link = bucket_of(&session->key);
    while (*link != session)
        link = &(*link)->next;
    *link = session->next;
    remove_by_use(session);
    close(session->fd);
    session->next = free_sessions;
    free_sessions = session;
    n_sessions--;
}

/* Ends the session that has been silent for the longest time. False: there is none. */
static bool evict(void)
{
    if (n_sessions == 0)
        return false;
    close_session(by_use.newer);
    count.evicted++;
    return true;
}

void end_idle_sessions(void)
{
    while (n_sessions > 0 && now - by_use.newer->used >= settings.idle_ms) {
        close_session(by_use.newer);
        count.idle++;
    }
}

/* Returns the milliseconds until the next session is idle, for epoll_wait(). */
int timeout(void)
{
    if (n_sessions == 0)
        return -1;
    uint64_t end = by_use.newer->used + settings.idle_ms;
    return end > now ? (int)(end - now) : 0;
}

/*
 * Opens a socket towards the server with the client's address. With --to, several sessions of
 * a client have the same server, so each needs its own port to distinguish their replies.
 */
static struct session *open_session(const struct key *key)
{
    const struct sockaddr_in6 *server = &settings.to[!IN6_IS_ADDR_V4MAPPED(&key->client.sin6_addr)];
    uint32_t flags = TP_CONNECT_DGRAM | TP_NONBLOCK;
    if (server->sin6_family == AF_UNSPEC) {
        server = &key->orig_dst;
        flags |= TP_CONNECT_KEEP_PORT;
    }
    /* Clients choose the destination only without --to. An existing session is not checked again. */
    if ((server == &key->orig_dst && denied(&settings.deny, (const struct sockaddr *)server)) || is_own(key)) {
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
    /* Receives several replies at once, if the server sends a batch. */
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &(int){ 1 }, sizeof(int));

    struct session *session = free_sessions, **bucket = bucket_of(key);
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = session };
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        complain(strerror(errno));
        count.failed++;
        close(fd);
        evict();    /* epoll may be at its limit: the next session then finds room */
        return NULL;
    }
    free_sessions = session->next;
    *session = (struct session){ .key = *key, .server = *server, .fd = fd, .next = *bucket };
    *bucket = session;
    append_by_use(session);
    n_sessions++;
    count.opened++;
    if (settings.verbose) {
        char a[80], b[80];
        printf("intercepted %s -> %s\n", format_address(&key->client, a), format_address(&key->orig_dst, b));
    }
    return session;
}

/* Returns the session of a request; opens one if there is none. NULL: it could not be opened. */
struct session *session_of(const struct tp_datagram *request)
{
    struct key key = { as_ipv6(&request->client), as_ipv6(&request->orig_dst) };
    for (struct session *session = *bucket_of(&key); session != NULL; session = session->next)
        if (memcmp(&session->key, &key, sizeof key) == 0) {
            mark_used(session);
            return session;
        }
    return open_session(&key);
}
