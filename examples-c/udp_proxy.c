/*
 * A complete transparent UDP relay.
 *
 *     udp_proxy [OPTION]... LISTEN-PORT PORT[-PORT]...
 *
 * Intercepts every datagram that this host would forward to one of the PORTs of another host,
 * over IPv4 and IPv6, and sends it to the server: the client sees the server's address, and the
 * server sees the client's address. SIGINT or SIGTERM ends it and removes the rules. SIGUSR1
 * prints statistics.
 *
 *     --dst ADDR/LEN    intercept only this destination; may be repeated
 *     --to ADDR:PORT    send all datagrams to this server of another host, whatever their
 *                       destination; replies come from the original destination; may be given
 *                       for each family, and a family without it is not intercepted
 *     --sessions N      maximum number of sessions
 *     --idle SECONDS    ends a session without a datagram for SECONDS (30)
 *     --deny ADDR/LEN   opens no session to this prefix, in addition to the destinations listed in
 *                       deny.h; may be repeated; `--deny none` clears the list
 *     --verbose         prints one line per session
 *
 * A session is one client address and port with one destination, and has one socket towards the
 * server. At the limit of sessions, a new session replaces the one that has been silent for the
 * longest time; if its client continues, it gets a new session. This bounds memory and
 * descriptors. The program never uses more descriptors than
 *
 *     sessions + sources (256, or fewer with a low limit) + 16
 *
 * By default the number of sessions is as high as RLIMIT_NOFILE allows, and at most 65,536. A
 * session needs about 140 bytes and the kernel's socket. The buffers need up to 8 MiB.
 *
 * One thread runs one epoll loop. main(), open_session() and handle_replies() contain the code
 * specific to transparent proxying. The rest is an ordinary relay. An address of this host is
 * never a client or a destination (udp_proxy_own.c).
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "udp_proxy.h"

struct counters count;
struct settings settings = { .idle_ms = 30000 };
tp_replier *replier;
uint64_t now;
int epoll_fd;
static int signal_fd, listener, route_fd;

static void read_clock(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    now = (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

/* Prints at most one message per second, because clients can cause any number of failures. */
void complain(const char *message)
{
    static uint64_t next;
    if (now >= next)
        fprintf(stderr, "%s\n", message);
    next = now >= next ? now + 1000 : next;
}

struct sockaddr_in6 as_ipv6(const void *addr)
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

static void print_statistics(void)
{
    struct tp_replier_stats stats;
    if (tp_replier_stats(replier, &stats, sizeof stats) != 0)
        errx(1, "%s", tp_last_error());
    printf("sessions: %zu of %zu, opened %" PRIu64 ", idle %" PRIu64 ", evicted %" PRIu64 ", failed %" PRIu64
           ", denied %" PRIu64 "; requests: %" PRIu64 ", sent %" PRIu64 ", unsent %" PRIu64 ", refused %" PRIu64 "; replies: %" PRIu64
           ", sent %" PRIu64 ", raw %" PRIu64 ", unsent %" PRIu64 ", foreign %" PRIu64 "; sources: %" PRIu64 "\n",
           n_sessions, max_sessions, count.opened, count.idle, count.evicted, count.failed, count.denied, count.received,
           count.sent, count.unsent, count.refused, count.replies, stats.sent, stats.raw, stats.errors, count.foreign,
           stats.sockets);
}

/*
 * Sets the maximum number of sessions: --sessions, or as many as the descriptor limit allows. Returns the maximum number of
 * sockets of the replier.
 */
static uint32_t share_descriptors(void)
{
    size_t sessions = settings.sessions;
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        err(1, "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    size_t descriptors = limit.rlim_max;
    uint32_t sources = descriptors / 4 < MAX_SOURCES ? (uint32_t)(descriptors / 4) : MAX_SOURCES;
    size_t others = sources + OTHER_DESCRIPTORS;
    if (descriptors <= others + sessions)
        errx(1, "the limit of %zu descriptors (ulimit -n) is too low for %zu sessions", descriptors,
             sessions > 0 ? sessions : 1);
    size_t most = descriptors - others;
    max_sessions = sessions > 0 ? sessions : most < MAX_SESSIONS ? most : MAX_SESSIONS;
    return sources;
}

/* Opens one listener for both families, or only for IPv4 if the kernel has no IPv6. */
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
    /* Datagrams of one flow are received as one batch. The buffer holds a burst, up to net.core.rmem_max. */
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &(int){ 1 }, sizeof(int));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){ 4 << 20 }, sizeof(int));
    return fd;
}

/*
 * Exempts the packets from connection tracking, which would treat both halves of a session as one flow. The iptables
 * backend does not support that.
 */
static tp_rules *install(struct tp_rules_config *config)
{
    tp_rules *rules;
    config->flags = TP_RULES_NOTRACK;
    int rc = tp_install_rules(config, sizeof *config, &rules);
    if (rc != 0 && errno == EOPNOTSUPP) {
        config->flags = 0;
        rc = tp_install_rules(config, sizeof *config, &rules);
    }
    if (rc != 0)
        errx(1, "%s", tp_last_error());
    return rules;
}

static void watch(int fd, void *ptr)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = ptr };
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        err(1, "epoll_ctl");
}

/* Handles a signal. False: the program should end. */
static bool handle_signal(void)
{
    struct signalfd_siginfo info;
    if (read(signal_fd, &info, sizeof info) != sizeof info)
        return true;
    if (info.ssi_signo != SIGUSR1)
        return false;
    print_statistics();
    return true;
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

static void run(void)
{
    for (bool running = true; running;) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll_fd, events, EVENTS, timeout());
        bool requested = false, rerouted = false;
        read_clock();
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &listener)
                requested = true;
            else if (events[i].data.ptr == &signal_fd)
                running = handle_signal() && running;
            else if (events[i].data.ptr == &route_fd)
                rerouted = true;
            else
                handle_replies(events[i].data.ptr);
        }
        /* Replies first: a new session or a new address of this host may end a session that has unsent replies. */
        flush_replies();
        if (rerouted)
            handle_route_messages(route_fd);
        if (requested)
            handle_requests(listener);
        end_idle_sessions();
    }
}

int main(int argc, char **argv)
{
    struct tp_rules_config config = { .name = "udp_proxy", .listeners = &listener, .n_listeners = 1 };
    uint16_t port = parse_options(argc, argv, &config);
    setvbuf(stdout, NULL, _IOLBF, 0);

    struct tp_replier_config sources = { .flags = TP_NONBLOCK, .max_sockets = share_descriptors() };
    create_table();
    allocate_buffers();
    signal_fd = open_signals();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (signal_fd < 0 || epoll_fd < 0)
        err(1, "signalfd, epoll_create1");
    if (tp_replier_open(&sources, sizeof sources, &replier) != 0)
        errx(1, "%s", tp_last_error());
    listener = open_listener(port);
    watch(listener, &listener);
    watch(signal_fd, &signal_fd);
    route_fd = open_route_socket();
    watch(route_fd, &route_fd);
    tp_rules *rules = install(&config);
    printf("listening: at most %zu sessions, %zu descriptors\n", max_sessions,
           max_sessions + sources.max_sockets + OTHER_DESCRIPTORS);

    run();

    int rc = tp_remove_rules(rules);
    if (rc != 0)
        warnx("%s", tp_last_error());
    print_statistics();
    tp_replier_close(replier);
    return rc == 0 ? 0 : 1;
}
