/*
 * Intercepts connections by the names of their servers.
 *
 *     dns_interceptor DNS-PORT TCP-PORT PORT DOMAIN...
 *
 * Intercepts the DNS queries (UDP port 53, IPv4 and IPv6) that this host would forward, and forwards each to its original
 * server from the client's address. If the query is about one of the DOMAINs or a subdomain, the addresses in the response
 * are added to the destinations of a second instance of rules before the client gets the response, for the time that the
 * response is valid (its TTL, from 1 second to 1 hour). The second instance intercepts TCP connections to PORT of these
 * addresses, and of no others. Their listener relays them to the server from the client's address. Prints one line per
 * learned address and per connection. SIGINT or SIGTERM ends the program and removes the rules.
 *
 *     dns_interceptor 3053 3129 443 example.com example.org
 *
 * DNS-PORT and TCP-PORT are those of the two listeners. Not seen are DNS over TCP, TLS and HTTPS, and addresses in other
 * records than A and AAAA (such as the hints of HTTPS records). Addresses that deny.h lists and addresses of this host
 * are never learned.
 *
 * One thread serves DNS; each connection has its own thread. At most PENDING queries wait for a response: a new one
 * replaces the oldest. At most CONNECTIONS connections are relayed: further ones are closed.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <err.h>
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include <tproxy.h>

#include "deny.h"
#include "dns_interceptor.h"

enum { PENDING = 512, CONNECTIONS = 256, MESSAGE = 65535, ADDRESSES = 64, ANSWER_SECONDS = 5, MAX_TTL = 3600 };
enum { IDLE_SECONDS = 300, STACK = 256 * 1024 };

/* A query that waits for its response on a socket of its own: no other host can know the socket's port. */
static struct query {
    int fd;                                        /* -1: unused */
    time_t since;
    bool listed;                                   /* the name is in one of the domains */
    struct dns_question question;
    struct sockaddr_storage client, server;
} queries[PENDING];

/* The addresses of one response. */
struct learned {
    size_t n;
    uint32_t ttl;
    struct tp_prefix addrs[ADDRESSES];
    const char *name;
};

static int epoll_fd, dns_listener, tcp_listener, signal_fd;
static tp_rules *dns_rules, *tcp_rules;
static tp_replier *replier;
static char **domains;
static struct deny_list deny;
static atomic_int connections;

static time_t seconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return time.tv_sec;
}

static socklen_t length_of(const struct sockaddr_storage *addr)
{
    return addr->ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}

static void print_address(const struct sockaddr_storage *addr)
{
    struct sockaddr_storage plain = *addr;
    socklen_t len = length_of(addr);
    char host[NI_MAXHOST] = "?", port[NI_MAXSERV] = "?";
    tp_unmap_addr((struct sockaddr *)&plain, &len);
    getnameinfo((struct sockaddr *)&plain, len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    printf(plain.ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
}

static void watch(int fd, void *ptr)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = ptr };
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        err(1, "epoll_ctl");
}

static void end_query(struct query *query)
{
    close(query->fd);
    query->fd = -1;
}

/* Returns an unused entry, or the oldest one. */
static struct query *new_query(void)
{
    struct query *oldest = &queries[0];
    for (size_t i = 0; i < PENDING; i++) {
        if (queries[i].fd < 0)
            return &queries[i];
        if (queries[i].since < oldest->since)
            oldest = &queries[i];
    }
    end_query(oldest);
    return oldest;
}

/* Forwards a query to its original server. A client repeats a query that is lost. */
static void forward_query(const struct tp_datagram *datagram)
{
    struct dns_question question;
    const struct sockaddr *client = (const struct sockaddr *)&datagram->client;
    const struct sockaddr *server = (const struct sockaddr *)&datagram->orig_dst;
    socklen_t len = length_of(&datagram->orig_dst);
    if (datagram->error != 0 || datagram->flags != 0 || datagram->len == 0)
        return;
    bool known = dns_question(datagram->data, datagram->len, false, &question);
    if (!known || denied(&deny, server) || is_own_address(server, len))
        return;
    int fd = tp_connect_from(client, length_of(&datagram->client), server, len, TP_CONNECT_DGRAM | TP_NONBLOCK);
    if (fd < 0 || send(fd, datagram->data, datagram->len, 0) < 0) {
        if (fd >= 0)
            close(fd);
        return;
    }
    struct query *query = new_query();
    *query = (struct query){ .fd = fd, .since = seconds(), .question = question, .client = datagram->client,
                             .server = datagram->orig_dst };
    for (char **domain = domains; *domain != NULL; domain++)
        query->listed = query->listed || dns_is_in(question.name, *domain);
    watch(fd, query);
}

static void forward_queries(void)
{
    static uint8_t data[MESSAGE];
    for (int turn = 0; turn < 64; turn++) {
        struct tp_datagram datagram = { .data = data, .capacity = sizeof data };
        if (tp_recv_datagrams(dns_listener, &datagram, 1, MSG_DONTWAIT) != 1)
            return;
        forward_query(&datagram);
    }
}

static void note_address(int family, const uint8_t *addr, uint32_t ttl, void *context)
{
    struct learned *learned = context;
    struct sockaddr_storage sockaddr = { .ss_family = (sa_family_t)family };
    size_t size = family == AF_INET ? 4 : 16;
    memcpy(family == AF_INET ? (void *)&((struct sockaddr_in *)&sockaddr)->sin_addr
                             : (void *)&((struct sockaddr_in6 *)&sockaddr)->sin6_addr, addr, size);
    const struct sockaddr *plain = (const struct sockaddr *)&sockaddr;
    if (learned->n == ADDRESSES || denied(&deny, plain) || is_own_address(plain, length_of(&sockaddr)))
        return;
    struct tp_prefix *prefix = &learned->addrs[learned->n++];
    *prefix = (struct tp_prefix){ .family = (uint8_t)family, .len = (uint8_t)(size * 8) };
    memcpy(prefix->addr, addr, size);
    /* One time for all addresses of a response: the shortest. */
    ttl = ttl < 1 ? 1 : ttl > MAX_TTL ? MAX_TTL : ttl;
    if (learned->n == 1 || ttl < learned->ttl)
        learned->ttl = ttl;
}

/* Adds the addresses of a response to the destinations of the second instance. */
static void learn(const uint8_t *message, size_t len, const char *name)
{
    struct learned learned = { .n = 0 };
    dns_addresses(message, len, note_address, &learned);
    if (learned.n == 0)
        return;
    if (tp_learn_addresses(tcp_rules, TP_SET_DST, learned.addrs, learned.n, learned.ttl) != 0) {
        warnx("%s", tp_last_error());
        return;
    }
    for (size_t i = 0; i < learned.n; i++) {
        char text[INET6_ADDRSTRLEN] = "?";
        inet_ntop(learned.addrs[i].family, learned.addrs[i].addr, text, sizeof text);
        printf("learned %s of %s for %u seconds\n", text, name, learned.ttl);
    }
}

/* Passes a response on to the client, from the address of the server. The addresses are learned first. */
static void handle_response(struct query *query)
{
    static uint8_t data[MESSAGE];
    struct dns_question question;
    ssize_t len = recv(query->fd, data, sizeof data, MSG_DONTWAIT);
    if (len < 0 && errno == EAGAIN)
        return;
    if (len >= 0 && (!dns_question(data, (size_t)len, true, &question) || !dns_same(&question, &query->question)))
        return;     /* not the response: it may still come */
    if (len >= 0) {
        if (query->listed)
            learn(data, (size_t)len, query->question.name);
        struct tp_datagram reply = { .data = data, .len = (size_t)len, .client = query->client, .orig_dst = query->server };
        if (tp_reply(replier, &reply, 1) != 1)
            warnx("%s", tp_last_error());
    }
    end_query(query);
}

static void end_old_queries(void)
{
    time_t now = seconds();
    for (size_t i = 0; i < PENDING; i++)
        if (queries[i].fd >= 0 && now - queries[i].since > ANSWER_SECONDS)
            end_query(&queries[i]);
}

/* Copies what one socket has to the other. False: the connection is over. */
static bool copy(int from, int to, bool *ended)
{
    char data[16 * 1024];
    ssize_t len = recv(from, data, sizeof data, 0);
    if (len == 0) {
        *ended = true;
        return shutdown(to, SHUT_WR) == 0;
    }
    for (ssize_t sent = 0, n; sent < len; sent += n)
        if ((n = send(to, data + sent, (size_t)(len - sent), MSG_NOSIGNAL)) < 0)
            return false;
    return len > 0;
}

/* Relays one connection, in its own thread. */
static void *relay(void *argument)
{
    int client = (int)(intptr_t)argument, server = -1;
    struct sockaddr_storage from, to;
    socklen_t fromlen = sizeof from, tolen = sizeof to;
    bool asked = getpeername(client, (struct sockaddr *)&from, &fromlen) == 0 &&
                 tp_orig_dst(client, (struct sockaddr *)&to, &tolen) == 0;
    if (asked && !denied(&deny, (struct sockaddr *)&to) && !is_own_address((struct sockaddr *)&to, tolen))
        server = tp_connect_from((struct sockaddr *)&from, fromlen, (struct sockaddr *)&to, tolen, 0);
    if (server >= 0) {
        flockfile(stdout);
        printf("intercepted ");
        print_address(&from);
        printf(" -> ");
        print_address(&to);
        printf("\n");
        funlockfile(stdout);
        /* A side that does not read holds its connection for at most this time. */
        struct timeval limit = { .tv_sec = IDLE_SECONDS };
        setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        setsockopt(server, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        bool ended[2] = { false, false };
        for (bool open = true; open && !(ended[0] && ended[1]);) {
            struct pollfd ends[2] = { { ended[0] ? -1 : client, POLLIN, 0 }, { ended[1] ? -1 : server, POLLIN, 0 } };
            open = poll(ends, 2, IDLE_SECONDS * 1000) > 0;
            if (open && ends[0].revents != 0)
                open = copy(client, server, &ended[0]);
            if (open && ends[1].revents != 0)
                open = copy(server, client, &ended[1]);
        }
        close(server);
    }
    close(client);
    atomic_fetch_sub(&connections, 1);
    return NULL;
}

static void accept_one(void)
{
    int client = accept4(tcp_listener, NULL, NULL, SOCK_CLOEXEC);
    if (client < 0)
        return;
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&detached, STACK);
    bool room = atomic_fetch_add(&connections, 1) < CONNECTIONS;
    if (!room || pthread_create(&thread, &detached, relay, (void *)(intptr_t)client) != 0) {
        atomic_fetch_sub(&connections, 1);
        close(client);
    }
    pthread_attr_destroy(&detached);
}

static tp_rules *install(const char *name, int *listener, uint16_t port, const struct tp_prefix *dst)
{
    struct tp_port_range range = { .first = port, .last = port };
    struct tp_rules_config config = { .name = name, .listeners = listener, .n_listeners = 1, .ports = &range, .n_ports = 1 };
    /* dst is an empty list: no destination is intercepted until one is learned. NULL would mean every destination. */
    config.dst = dst;
    tp_rules *rules;
    if (tp_install_rules(&config, sizeof config, &rules) != 0)
        errx(1, "%s", tp_last_error());
    return rules;
}

static uint16_t port_of(const char *text)
{
    char *end;
    errno = 0;
    unsigned long port = strtoul(text, &end, 10);
    if (!isdigit((unsigned char)*text) || *end != 0 || errno != 0 || port == 0 || port > UINT16_MAX)
        errx(2, "%s: not a port", text);
    return (uint16_t)port;
}

static int open_signals(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    return signalfd(-1, &signals, SFD_CLOEXEC);
}

int main(int argc, char **argv)
{
    if (argc < 5)
        errx(2, "usage: dns_interceptor DNS-PORT TCP-PORT PORT DOMAIN...");
    struct sockaddr_in6 dns = { .sin6_family = AF_INET6, .sin6_port = htons(port_of(argv[1])) };
    struct sockaddr_in6 tcp = { .sin6_family = AF_INET6, .sin6_port = htons(port_of(argv[2])) };
    uint16_t port = port_of(argv[3]);
    domains = argv + 4;
    for (char **domain = domains; *domain != NULL; domain++) {
        if (**domain == 0 || **domain == '.' || (*domain)[strlen(*domain) - 1] == '.')
            errx(2, "%s: not a domain, such as example.com", *domain);
        for (char *letter = *domain; *letter != 0; letter++)
            *letter = (char)tolower((unsigned char)*letter);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    deny_defaults(&deny);
    for (size_t i = 0; i < PENDING; i++)
        queries[i].fd = -1;

    signal_fd = open_signals();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (signal_fd < 0 || epoll_fd < 0 || deny_socket() < 0)
        err(1, "signalfd, epoll_create1, socket");
    dns_listener = tp_socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    if (dns_listener < 0 || tp_bind_nonlocal(dns_listener, (struct sockaddr *)&dns, sizeof dns) != 0)
        errx(1, "%s", tp_last_error());
    tcp_listener = tp_listen((struct sockaddr *)&tcp, sizeof tcp, -1, TP_NONBLOCK);
    if (tcp_listener < 0 || tp_replier_open(NULL, 0, &replier) != 0)
        errx(1, "%s", tp_last_error());
    watch(dns_listener, &dns_listener);
    watch(tcp_listener, &tcp_listener);
    watch(signal_fd, &signal_fd);
    dns_rules = install("dns", &dns_listener, 53, NULL);
    tcp_rules = install("dns-tcp", &tcp_listener, port, &(struct tp_prefix){ .family = 0 });
    printf("listening\n");

    for (bool running = true; running;) {
        /* One event: handling it may end another query, and reuse its entry. */
        struct epoll_event event;
        if (epoll_wait(epoll_fd, &event, 1, ANSWER_SECONDS * 1000) == 1) {
            if (event.data.ptr == &signal_fd)
                running = false;
            else if (event.data.ptr == &dns_listener)
                forward_queries();
            else if (event.data.ptr == &tcp_listener)
                accept_one();
            else
                handle_response(event.data.ptr);
        }
        end_old_queries();
    }

    int failed = (tp_remove_rules(tcp_rules) != 0) | (tp_remove_rules(dns_rules) != 0);
    if (failed)
        warnx("%s", tp_last_error());
    return failed;
}
