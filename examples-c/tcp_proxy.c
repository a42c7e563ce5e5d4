/*
 * A complete transparent TCP proxy.
 *
 *     tcp_proxy [--idle SECONDS] [--deny ADDR/LEN]... [--allow-own] LISTEN-PORT PORT[-PORT]...
 *
 * Intercepts every connection that this host would forward to one of the PORTs of
 * another host, over IPv4 and IPv6, and connects to the server: the client sees a
 * connection to the server, and the server sees a connection from the client. Prints
 * one line per connection. SIGINT or SIGTERM ends it and removes the rules.
 *
 *     --idle SECONDS    resets a connection without a byte for SECONDS (300)
 *     --deny ADDR/LEN   refuses connections to this prefix, in addition to the
 *                       destinations listed in deny.h; may be repeated; `--deny none`
 *                       clears the list
 *     --allow-own       allows connections to addresses of this host, which are refused
 *                       by default; the proxy's own port is refused in any case
 *
 * A connection is also reset if its server does not accept within 10 seconds. If
 * descriptors run out, a new connection replaces the one that has been silent for the
 * longest time, if that is at least a second; otherwise new connections wait in the
 * listener's queue. A connection needs two descriptors and up to 128 KiB.
 *
 * One thread runs one epoll loop. main() and accept_one() contain the code specific to
 * transparent proxying. The rest is an ordinary relay: bytes are passed in both
 * directions, an end of stream as a half-close, and a reset as a reset.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <tproxy.h>

#include "deny.h"

enum { BUFFER = 64 * 1024, EVENTS = 256, MAX_RANGES = 64, CONNECT_SECONDS = 10, SILENT_FOR = 1 };
/* Limits per event: reads and writes of one direction, and connections accepted. */
enum { TURNS = 16, ACCEPTS = 64 };

/* One socket of a connection, and the bytes that were read from it but not yet written to the other one. */
struct end {
    int fd;
    struct end *other;
    uint32_t interest;     /* events that epoll watches */
    bool eof;              /* its end of stream was read */
    bool eof_sent;         /* its end of stream was passed on */
    size_t start, stop;    /* the part of buffer that is not yet written */
    char buffer[BUFFER];
};

struct connection {
    struct end client, server;
    bool connecting;               /* the server has not accepted yet */
    bool dead;                     /* it is freed after the current events */
    time_t active;                 /* time of the last byte, or of accept */
    struct connection *newer, *older, *next_dead;
};

/* Connections by the time of their last byte: those whose server has not accepted yet, and the others. */
static struct list {
    struct connection *newest, *oldest;
} waiting, open_list;

static int epoll_fd, listener, spare_fd = -1;
static bool accepting = true;
static time_t now, idle_seconds = 300, paused_at;
static struct connection *dead_list;
static struct deny_list deny;
static bool allow_own;
static in_port_t listen_port;

static void dequeue(struct connection *connection)
{
    struct list *list = connection->connecting ? &waiting : &open_list;
    *(connection->newer != NULL ? &connection->newer->older : &list->newest) = connection->older;
    *(connection->older != NULL ? &connection->older->newer : &list->oldest) = connection->newer;
}

static void enqueue(struct connection *connection)
{
    struct list *list = connection->connecting ? &waiting : &open_list;
    connection->active = now;
    connection->newer = NULL, connection->older = list->newest;
    *(list->newest != NULL ? &list->newest->newer : &list->oldest) = connection;
    list->newest = connection;
}

static time_t seconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return time.tv_sec;
}

static struct connection *connection_of(struct end *end)
{
    size_t offset = end < end->other ? offsetof(struct connection, client) : offsetof(struct connection, server);
    return (struct connection *)((char *)end - offset);
}

/* Prints at most one message per second, because clients can cause any number of failures. */
static void complain(const char *message)
{
    static time_t last = -1;
    if (now != last)
        fprintf(stderr, "%s\n", message);
    last = now;
}

static bool watch(int fd, uint32_t events, void *ptr, int op)
{
    struct epoll_event event = { .events = events, .data.ptr = ptr };
    return epoll_ctl(epoll_fd, op, fd, &event) == 0;
}

/* A socket without an interest is not watched: epoll would report a hang-up again and again. */
static bool set_interest(struct end *end, uint32_t interest)
{
    int op = interest == 0 ? EPOLL_CTL_DEL : end->interest == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
    if (interest != end->interest && !watch(end->fd, interest, end, op))
        return false;
    end->interest = interest;
    return true;
}

/*
 * A connection needs two descriptors. One is kept in reserve, so that every accepted
 * connection can be served. Without it, no connection is accepted.
 */
static void reserve_descriptor(void)
{
    if (spare_fd < 0)
        spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    /* After a failure, accepting pauses for a second: epoll would report the listener again immediately. */
    bool wanted = spare_fd >= 0 && now != paused_at;
    if (wanted != accepting && watch(listener, wanted ? EPOLLIN : 0, NULL, EPOLL_CTL_MOD))
        accepting = wanted;
}

static void finish(struct connection *connection, bool reset)
{
    if (connection->dead)
        return;
    if (reset) {
        struct linger linger = { .l_onoff = 1, .l_linger = 0 };
        setsockopt(connection->client.fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
        setsockopt(connection->server.fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    close(connection->client.fd);
    close(connection->server.fd);
    dequeue(connection);
    connection->dead = true;
    connection->next_dead = dead_list;
    dead_list = connection;
}

/* Ends the connection that has been silent for the longest time, for a new one. False: none has been silent long enough. */
static bool make_room(void)
{
    struct connection *oldest = open_list.oldest;
    if (waiting.oldest != NULL && (oldest == NULL || waiting.oldest->active < oldest->active))
        oldest = waiting.oldest;
    if (oldest == NULL || now - oldest->active < SILENT_FOR)
        return false;
    finish(oldest, true);
    return true;
}

static void end_idle(void)
{
    while (waiting.oldest != NULL && now - waiting.oldest->active >= CONNECT_SECONDS)
        finish(waiting.oldest, true);
    while (open_list.oldest != NULL && now - open_list.oldest->active >= idle_seconds)
        finish(open_list.oldest, true);
}

/* Moves bytes in one direction until a socket has to wait, or for TURNS steps. False: the connection is broken. */
static bool pump(struct end *from)
{
    struct end *to = from->other;
    for (int turn = 0; !from->eof_sent && (turn < TURNS || from->eof); turn++) {
        if (from->start < from->stop) {
            ssize_t n = send(to->fd, from->buffer + from->start, from->stop - from->start, MSG_NOSIGNAL);
            if (n < 0)
                return errno == EAGAIN || errno == EINTR;
            from->start += (size_t)n;
        } else if (from->eof) {
            shutdown(to->fd, SHUT_WR);
            from->eof_sent = true;
        } else {
            ssize_t n = read(from->fd, from->buffer, BUFFER);
            if (n < 0)
                return errno == EAGAIN || errno == EINTR;
            from->eof = n == 0;
            from->start = 0, from->stop = (size_t)n;
        }
    }
    return true;
}

static uint32_t wanted(const struct end *end)
{
    bool can_read = !end->eof && end->start == end->stop;
    bool can_write = end->other->start != end->other->stop;
    return (can_read ? EPOLLIN : 0) | (can_write ? EPOLLOUT : 0);
}

static void on_end(struct end *end, uint32_t events)
{
    struct connection *connection = connection_of(end);
    if (connection->dead)
        return;
    if (connection->connecting && end == &connection->server) {
        int error = 0;
        socklen_t len = sizeof error;
        getsockopt(end->fd, SOL_SOCKET, SO_ERROR, &error, &len);
        if (error != 0) {
            complain("a server did not accept");
            finish(connection, true);
            return;
        }
        dequeue(connection);
        connection->connecting = false;
        enqueue(connection);
    } else if (events & EPOLLERR) {
        finish(connection, true);
        return;
    }
    if (!connection->connecting && connection->active != now)
        dequeue(connection), enqueue(connection);
    if (!pump(&connection->client) || !pump(&connection->server)) {
        finish(connection, true);
    } else if (connection->client.eof_sent && connection->server.eof_sent) {
        finish(connection, false);
    } else if (!set_interest(&connection->client, wanted(&connection->client)) ||
               !set_interest(&connection->server, wanted(&connection->server))) {
        finish(connection, true);
    }
}

/* Formats an address; a v4-mapped address as IPv4. */
static const char *format_address(const struct sockaddr_storage *addr, char text[static 80])
{
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (getnameinfo((const struct sockaddr *)addr, sizeof *addr, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return "?";
    bool mapped = strncmp(host, "::ffff:", 7) == 0;
    bool brackets = !mapped && strchr(host, ':') != NULL;
    snprintf(text, 80, brackets ? "[%.60s]:%.8s" : "%.60s:%.8s", mapped ? host + 7 : host, port);
    return text;
}

/*
 * Returns why connections to a destination are refused, or NULL. Services of this host may trust local
 * connections, and a connection to the proxy's own port would make it connect to itself in an endless loop.
 */
static const char *refusal_of(const struct sockaddr_storage *to, socklen_t len)
{
    in_port_t port = to->ss_family == AF_INET ? ((const struct sockaddr_in *)to)->sin_port
                                              : ((const struct sockaddr_in6 *)to)->sin6_port;
    if (denied(&deny, (const struct sockaddr *)to))
        return "refused: a denied destination";
    if ((!allow_own || port == listen_port) && is_own_address((const struct sockaddr *)to, len))
        return "refused: an address of this host";
    return NULL;
}

static bool is_shortage(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

/*
 * Accepts a connection, and connects to its original destination from the client's address. False: no more
 * connections can be accepted now.
 */
static bool accept_one(void)
{
    struct sockaddr_storage from, to;
    socklen_t from_len = sizeof from, to_len = sizeof to;
    int client = tp_accept(listener, (struct sockaddr *)&from, &from_len, (struct sockaddr *)&to, &to_len,
                           TP_ACCEPT_TPROXY | TP_NONBLOCK);
    if (client < 0) {
        int error = errno;
        if (error == EAGAIN || error == EINTR || error == ECONNABORTED)
            return error != EAGAIN;
        /* The error may persist, and epoll would report the listener again immediately: pause. */
        complain(tp_last_error());
        if (!is_shortage(error) || !make_room())
            paused_at = now;
        reserve_descriptor();
        return accepting;
    }

    close(spare_fd);
    spare_fd = -1;
    int server = -1;
    const char *refusal = refusal_of(&to, to_len);
    if (refusal == NULL)
        do {
            server = tp_connect_from((struct sockaddr *)&from, from_len, (struct sockaddr *)&to, to_len, TP_NONBLOCK);
        } while (server < 0 && is_shortage(errno) && make_room());
    struct connection *connection = server < 0 ? NULL : malloc(sizeof *connection);
    if (connection == NULL) {
        complain(refusal != NULL ? refusal : server < 0 ? tp_last_error() : "out of memory");
        struct linger linger = { .l_onoff = 1, .l_linger = 0 };
        setsockopt(client, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
        close(client);
        if (server >= 0)
            close(server);
        reserve_descriptor();
        return accepting;
    }

    char a[80], b[80];
    printf("intercepted %s -> %s\n", format_address(&from, a), format_address(&to, b));
    memset(connection, 0, offsetof(struct connection, client.buffer));
    memset(&connection->server, 0, offsetof(struct end, buffer));
    connection->client.fd = client, connection->client.other = &connection->server;
    connection->server.fd = server, connection->server.other = &connection->client;
    connection->connecting = true, connection->dead = false;
    enqueue(connection);
    if (!set_interest(&connection->server, EPOLLOUT))
        finish(connection, true);
    reserve_descriptor();
    return accepting;
}

/* Parses a port that ends at the given character or at the end of the text. */
static uint16_t parse_port(const char *text, char end, const char **rest)
{
    char *stop;
    errno = 0;
    unsigned long port = strtoul(text, &stop, 10);
    if (errno != 0 || stop == text || port < 1 || port > 65535 || (*stop != '\0' && *stop != end))
        errx(2, "%s: not a port or a range of ports", text);
    *rest = stop;
    return (uint16_t)port;
}

static size_t parse_ports(char **args, struct tp_port_range *ranges)
{
    size_t n = 0;
    for (; args[n] != NULL; n++) {
        const char *rest;
        if (n == MAX_RANGES)
            errx(2, "more than %d ranges of ports", MAX_RANGES);
        ranges[n].first = ranges[n].last = parse_port(args[n], '-', &rest);
        if (*rest == '-')
            ranges[n].last = parse_port(rest + 1, '\0', &rest);
    }
    return n;
}

int main(int argc, char **argv)
{
    static const struct option options[] = { { "idle", required_argument, NULL, 'i' },
                                             { "deny", required_argument, NULL, 'x' },
                                             { "allow-own", no_argument, NULL, 'o' },
                                             { 0 } };
    deny_defaults(&deny);
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        char *end = "";
        if (option == 'x' && !deny_add(&deny, optarg))
            errx(2, "%s: not a prefix to deny (ADDR/LEN), or there are more than %d", optarg, MAX_DENIED);
        if (option == 'i' && ((idle_seconds = strtol(optarg, &end, 10)) < 1 || *end != '\0'))
            errx(2, "%s: not a number of seconds", optarg);
        if (option == 'o')
            allow_own = true;
        if (option == '?')
            argc = 0;
    }
    if (argc - optind < 2)
        errx(2, "usage: tcp_proxy [--idle SECONDS] [--deny ADDR/LEN]... [--allow-own] LISTEN-PORT PORT[-PORT]...");
    argv += optind - 1;
    setvbuf(stdout, NULL, _IOLBF, 0);

    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (signal_fd < 0 || epoll_fd < 0 || deny_socket() < 0)
        err(1, "signalfd, epoll_create1, socket(AF_NETLINK)");

    /* One listener for both families, or only for IPv4 if the kernel has no IPv6. */
    const char *rest;
    uint16_t port = htons(parse_port(argv[1], '\0', &rest));
    listen_port = port;
    struct sockaddr_in6 any6 = { .sin6_family = AF_INET6, .sin6_port = port };
    struct sockaddr_in any4 = { .sin_family = AF_INET, .sin_port = port };
    listener = tp_listen((struct sockaddr *)&any6, sizeof any6, -1, TP_NONBLOCK);
    if (listener < 0 && errno == EAFNOSUPPORT)
        listener = tp_listen((struct sockaddr *)&any4, sizeof any4, -1, TP_NONBLOCK);
    if (listener < 0)
        errx(1, "%s", tp_last_error());

    struct tp_port_range ports[MAX_RANGES] = { 0 };
    struct tp_rules_config config = { 0 };
    config.listeners = &listener, config.n_listeners = 1;
    config.ports = ports, config.n_ports = parse_ports(argv + 2, ports);
    tp_rules *rules;
    if (tp_install_rules(&config, sizeof config, &rules) != 0)
        errx(1, "%s", tp_last_error());
    printf("listening\n");

    if (!watch(listener, EPOLLIN, NULL, EPOLL_CTL_ADD) || !watch(signal_fd, EPOLLIN, &signal_fd, EPOLL_CTL_ADD))
        err(1, "epoll_ctl");
    now = seconds(), paused_at = -1;
    reserve_descriptor();
    for (bool running = true; running;) {
        struct epoll_event events[EVENTS];
        /* The timeouts: retry to accept while paused, and find silent connections. */
        bool idle = waiting.oldest == NULL && open_list.oldest == NULL;
        int n = epoll_wait(epoll_fd, events, EVENTS, !accepting ? 100 : idle ? -1 : 1000);
        now = seconds();
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == NULL)
                for (int turn = 0; turn < ACCEPTS && accepting && accept_one(); turn++)
                    ;
            else if (events[i].data.ptr == &signal_fd)
                running = false;
            else
                on_end(events[i].data.ptr, events[i].events);
        }
        end_idle();
        if (spare_fd < 0 && dead_list == NULL)
            make_room();
        reserve_descriptor();
        while (dead_list != NULL) {
            struct connection *next = dead_list->next_dead;
            free(dead_list);
            dead_list = next;
        }
    }

    if (tp_remove_rules(rules) != 0)
        errx(1, "%s", tp_last_error());
    return 0;
}
