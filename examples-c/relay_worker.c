/* One thread of the relay: accepts connections, waits for events, and ends idle connections. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <tproxy.h>

#include "relay.h"

static uint32_t seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint32_t)now.tv_sec;
}

static uint64_t microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Edge-triggered: epoll_ctl() is needed only once per descriptor. */
static bool watch(struct worker *worker, struct end *end)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET, .data.ptr = end };
    return epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, end->fd, &event) == 0;
}

static void set_accepting(struct worker *worker, bool wanted)
{
    struct epoll_event event = { .events = wanted ? EPOLLIN : 0, .data.ptr = NULL };
    if (wanted != worker->accepting && epoll_ctl(worker->epoll_fd, EPOLL_CTL_MOD, worker->listener, &event) == 0)
        worker->accepting = wanted;
    worker->paused = worker->now;
}

static void on_end(struct worker *worker, struct end *end, uint32_t events)
{
    struct connection *connection = connection_of(end);
    if (connection->dead)
        return;
    if (connection->silent ? !end->is_server && (events & EPOLLIN) != 0 : connection->active != worker->now)
        mark_active(worker, connection);
    end->readable |= (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    /* epoll reports EPOLLHUP for a reset too. */
    end->hung_up |= (events & (EPOLLRDHUP | EPOLLHUP)) != 0 && (events & EPOLLERR) == 0;
    end->urgent |= (events & EPOLLPRI) != 0;
    end->writable |= (events & EPOLLOUT) != 0;
    if (connection->connecting && end->is_server) {
        if (events & (EPOLLERR | EPOLLHUP)) {
            ADD(worker->count.refused, 1);
            finish(worker, connection, true);
            return;
        }
        connection->connecting = !(events & EPOLLOUT);
        if (connection->queue == &worker->waiting)
            mark_active(worker, connection);
    }
    if (!connection->connecting)
        move_bytes(worker, connection);
    /* The bytes before the reset have been passed on. */
    if (events & EPOLLERR)
        finish_broken(worker, connection);
}

/* Prints at most one message per second, because clients can cause any number of failures. */
static void complain(struct worker *worker, const char *message)
{
    if (worker->complained != worker->now)
        fprintf(stderr, "relay: %s\n", message);
    worker->complained = worker->now;
}

/*
 * Returns why connections to a destination are refused, or NULL. Services of this host may trust local
 * connections, and a connection to the relay's own port would make it connect to itself in an endless loop.
 */
static const char *refusal_of(const struct sockaddr_storage *to, socklen_t len)
{
    in_port_t port = to->ss_family == AF_INET ? ((const struct sockaddr_in *)to)->sin_port
                                              : ((const struct sockaddr_in6 *)to)->sin6_port;
    if (denied(&settings.deny, (const struct sockaddr *)to))
        return "refused: a denied destination";
    if ((!settings.allow_own || port == settings.listen_port) && is_own_address((const struct sockaddr *)to, len))
        return "refused: an address of this host";
    return NULL;
}

/* Returns the connection that has been silent for the longest time, if it may be ended for a new one; otherwise NULL. */
static struct connection *longest_idle(const struct worker *worker)
{
    struct connection *waiting = worker->waiting.oldest, *other = worker->others.oldest;
    struct connection *oldest = waiting != NULL && (other == NULL || waiting->active < other->active) ? waiting : other;
    return oldest != NULL && worker->now - oldest->active >= SILENT_FOR ? oldest : NULL;
}

/* Ends a silent connection, so that silent clients and servers do not block new connections. */
static bool make_room(struct worker *worker)
{
    struct connection *oldest = longest_idle(worker);
    if (oldest == NULL)
        return false;
    ADD(worker->count.idle, 1);
    finish(worker, oldest, true);
    return true;
}

static bool is_shortage(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

/*
 * Accepts a connection, and connects to its original destination from the client's address. False: no more
 * connections can be accepted now.
 */
static bool accept_one(struct worker *worker)
{
    struct sockaddr_storage from, to;
    socklen_t from_len = sizeof from, to_len = sizeof to;
    int client = tp_accept(worker->listener, (struct sockaddr *)&from, &from_len, (struct sockaddr *)&to, &to_len,
                           TP_ACCEPT_TPROXY | TP_NONBLOCK);
    if (client < 0) {
        int error = errno;
        if (error == EAGAIN || error == EINTR || error == ECONNABORTED)
            return error == ECONNABORTED;
        /* The error may persist, and epoll would report the listener again immediately: pause. */
        complain(worker, tp_last_error());
        if (!is_shortage(error) || !make_room(worker))
            set_accepting(worker, false);
        return false;
    }
    ADD(worker->count.accepted, 1);

    int server = -1;
    const char *refusal = refusal_of(&to, to_len);
    if (refusal == NULL)
        server = tp_connect_from((struct sockaddr *)&from, from_len, (struct sockaddr *)&to, to_len,
                                 TP_NONBLOCK | TP_CONNECT_DATA_FOLLOWS);
    struct connection *connection = server < 0 ? NULL : allocate(worker);
    if (connection != NULL) {
        connection->client = (struct end){ .fd = client, .writable = true, .writes = 2 };
        connection->server = (struct end){ .fd = server, .is_server = true };
        connection->connecting = connection->silent = true;
        connection->accepted = microseconds();
        enqueue(&worker->silent, connection);
        ADD(worker->count.live, 1);
        if (!watch(worker, &connection->client) || !watch(worker, &connection->server))
            finish_broken(worker, connection);
        return true;
    }
    complain(worker, refusal != NULL ? refusal : server < 0 ? tp_last_error() : "out of memory");
    ADD(worker->count.failed, 1);
    if (server >= 0)
        close(server);
    reset_on_close(client);
    close(client);
    return true;
}

/*
 * Accepts a number of connections in proportion to the events of this epoll_wait(). epoll reports the listener
 * again if more are waiting. An accept4() that finds no connection has allocated a socket in vain.
 */
static void accept_some(struct worker *worker, int events)
{
    for (int i = 0; i < events; i += ACCEPTS) {
        if (VALUE(worker->count.live) >= worker->max_live) {
            /* epoll has reported only one connection. */
            if (i > 0)
                return;
            if (!make_room(worker)) {
                set_accepting(worker, false);
                return;
            }
        }
        if (!accept_one(worker))
            return;
    }
}

/* Sends the delayed ACK of the handshake if the client has sent nothing: the server may be the first to send. */
static void end_silence(struct worker *worker)
{
    if (worker->silent.oldest == NULL)
        return;
    uint64_t now = microseconds();
    for (struct connection *oldest; (oldest = worker->silent.oldest) != NULL && now - oldest->accepted >= settings.wait_limit * 1000;) {
        setsockopt(oldest->server.fd, IPPROTO_TCP, TCP_QUICKACK, &(int){ 1 }, sizeof(int));
        mark_active(worker, oldest);
    }
}

static void end_idle(struct worker *worker)
{
    for (struct connection *oldest; (oldest = worker->others.oldest) != NULL && worker->now - oldest->active >= settings.idle_limit;) {
        ADD(worker->count.idle, 1);
        finish(worker, oldest, true);
    }
    for (struct connection *oldest; (oldest = worker->waiting.oldest) != NULL && worker->now - oldest->active >= CONNECT_SECONDS;) {
        ADD(worker->count.refused, 1);
        finish(worker, oldest, true);
    }
}

static void run_scheduled(struct worker *worker)
{
    struct connection *connection = worker->scheduled;
    worker->scheduled = NULL;
    while (connection != NULL) {
        struct connection *next = connection->next;
        connection->scheduled = false;
        if (connection->dead)
            free_later(worker, connection);
        else
            move_bytes(worker, connection);
        connection = next;
    }
}

static void free_dead(struct worker *worker)
{
    while (worker->dead != NULL) {
        struct connection *connection = worker->dead;
        worker->dead = connection->next;
        connection->next = worker->free;
        worker->free = connection;
    }
}

static int time_to_wait(const struct worker *worker)
{
    if (worker->scheduled != NULL)
        return 0;
    if (worker->silent.oldest != NULL)
        return 1;
    if (!worker->accepting || stopping)
        return 100;
    if (worker->waiting.oldest != NULL)
        return 1000;
    if (worker->others.oldest == NULL)
        return -1;
    /* The clock may have advanced since end_idle(). A negative timeout would be infinite. */
    uint32_t since = worker->now - worker->others.oldest->active;
    return since < settings.idle_limit ? (int)(settings.idle_limit - since) * 1000 : 0;
}

/* Whether the worker continues. After a signal it waits for its connections, and a second for handshakes in progress. */
static bool continues(struct worker *worker)
{
    if (!stopping)
        return true;
    if (worker->stopped == 0)
        worker->stopped = worker->now;
    uint32_t since = worker->now - worker->stopped;
    return stopping == 1 && since < settings.drain_limit && (VALUE(worker->count.live) > 0 || since < 2);
}

void run_worker(struct worker *worker)
{
    struct epoll_event events[EVENTS];
    if (deny_socket() < 0)
        err(1, "socket(AF_NETLINK)");
    for (worker->now = seconds(); continues(worker); worker->now = seconds()) {
        int n = epoll_wait(worker->epoll_fd, events, EVENTS, time_to_wait(worker));
        worker->now = seconds();
        for (int i = 0; i < n; i++) {
            void *ptr = events[i].data.ptr;
            if (ptr == NULL)
                accept_some(worker, n);
            else if (ptr != worker)
                on_end(worker, ptr, events[i].events);
        }
        run_scheduled(worker);
        end_silence(worker);
        end_idle(worker);
        /* Accepts again after a connection has ended or time has passed, if the limit of connections allows it. */
        if (!worker->accepting && (worker->dead != NULL || n == 0 || worker->now != worker->paused) &&
            (VALUE(worker->count.live) < worker->max_live || longest_idle(worker) != NULL))
            set_accepting(worker, true);
        reserve_pipe(worker);
        free_dead(worker);
    }
    while (worker->silent.oldest != NULL)
        finish(worker, worker->silent.oldest, true);
    while (worker->waiting.oldest != NULL)
        finish(worker, worker->waiting.oldest, true);
    while (worker->others.oldest != NULL)
        finish(worker, worker->others.oldest, true);
}

static int listen_on(uint16_t port)
{
    /* One listener for both families, or only for IPv4 if the kernel has no IPv6. */
    struct sockaddr_in6 any6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
    struct sockaddr_in any4 = { .sin_family = AF_INET, .sin_port = htons(port) };
    int fd = tp_listen((struct sockaddr *)&any6, sizeof any6, -1, TP_NONBLOCK | TP_LISTEN_REUSEPORT);
    if (fd < 0 && errno == EAFNOSUPPORT)
        fd = tp_listen((struct sockaddr *)&any4, sizeof any4, -1, TP_NONBLOCK | TP_LISTEN_REUSEPORT);
    if (fd < 0)
        errx(1, "%s", tp_last_error());
    /* Accepted sockets inherit these options. Without TCP_QUICKACK, a reply carries the ACK, which saves a packet. */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &(int){ 0 }, sizeof(int));
    return fd;
}

void prepare_worker(struct worker *worker, uint16_t port)
{
    worker->listener = listen_on(port);
    worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    worker->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    worker->accepting = true;
    struct epoll_event listener = { .events = EPOLLIN, .data.ptr = NULL };
    struct epoll_event wake = { .events = EPOLLIN | EPOLLET, .data.ptr = worker };
    if (worker->epoll_fd < 0 || worker->wake_fd < 0 ||
        epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->listener, &listener) != 0 ||
        epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->wake_fd, &wake) != 0)
        err(1, "epoll, eventfd");
    reserve_pipe(worker);
}
