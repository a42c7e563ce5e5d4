/*
 * A transparent TCP relay, for speed: what the library can do on every core.
 *
 *     relay [-t THREADS] [-w WAIT] [-i IDLE] [-d DRAIN] [-c CONNECTIONS] [-p PREFIXES] [-x PREFIX]... LISTEN-PORT PORT[-PORT]...
 *
 * intercepts every connection that this host would forward to one of the PORTs
 * of somebody else, over IPv4 and IPv6, and connects onward from the client's
 * own address. THREADS: as many as there are cores. IDLE: after how many seconds
 * without a byte a connection is reset (600); 20 if its server does not accept. DRAIN: how many seconds the
 * connections that there are may take to end after a signal to stop (30).
 * CONNECTIONS: the most at a time (what the descriptor limit lets). WAIT: how many
 * milliseconds the server's handshake may wait for the client's first bytes (1).
 * PREFIXES: a file of destinations to intercept, a line each (all). -x: call nobody
 * there for a client; see deny.h for what is refused anyway, `-x none` clears it.
 *
 * Signals. SIGTERM, SIGINT: new connections pass the relay by, those that there
 * are go on; it ends when they have, or at the second signal. SIGUSR1: a line of
 * JSON with what it has done. SIGHUP keeps its usual meaning.
 *
 * How it works. Each thread has a listener (TP_LISTEN_REUSEPORT: the kernel
 * spreads the connections), its own edge-triggered epoll and its own memory, and
 * never waits for another. What is read in one piece is copied through one small
 * buffer a thread, since that is cheapest for short messages; a stream that
 * fills the buffer is spliced: its pages go from socket to pipe to socket and
 * are not copied. A pipe belongs to a direction only while bytes are in it. So an
 * idle connection costs two descriptors and a struct of some hundred bytes.
 *
 *   the first bytes: most clients speak at once, and the handshake with the server
 *     ends with what they say (TP_CONNECT_DATA_FOLLOWS), which saves packets. For one that
 *     does not it ends a millisecond later.
 *   back-pressure: what one end does not take stays where it is; nothing more is
 *     read for it, the other end's window fills, and its sender waits.
 *   half-close: an end of stream is passed on when all that came before it has been.
 *   resets: a reset, or a refusal by the server, is passed on as a reset.
 *   limits: at the limit of connections the one that was silent for longest makes
 *     room, if that is ten seconds; else none is accepted: they wait in the kernel's
 *     queue. Without a free pipe a stream is copied, by looking at what there is
 *     (MSG_PEEK) and taking as much as the other end took.
 *
 * Urgent data (RFC 6093 says not to use it) is not passed on.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <tproxy.h>

#include "deny.h"

enum {
    BUFFER = 16 * 1024,      /* a message that is shorter is copied, a stream is spliced */
    PIPE = 1024 * 1024,      /* of a pipe; /proc/sys/fs/pipe-max-size */
    TURNS = 64,              /* steps of one direction before the others have their turn */
    PIPES = 256,             /* of all threads: up to PIPES * PIPE bytes of kernel memory */
    ACCEPTS = 8,             /* one connection is accepted for so many events */
    EVENTS = 128,
    CHUNK = 64,              /* connections allocated at once */
    OWN_DESCRIPTORS = 64,    /* standard streams, epoll, listeners, the rules' socket */
    MAX_THREADS = 256,
    MAX_RANGES = 64,
    CONNECT_SECONDS = 20,    /* for the server to accept */
    SILENT_FOR = 10,         /* seconds after which a connection makes room for another, at the limit */
};

struct pipe {
    int in, out;
    struct pipe *next;
};

/* One end of a connection, and the direction that is read from it. */
struct end {
    int fd;
    bool is_server;
    bool readable, writable;    /* as far as is known; false until epoll says otherwise */
    bool hung_up;               /* its end of stream has arrived, maybe behind bytes */
    bool eof;                   /* it has no more to say */
    bool told;                  /* and the other end was told so */
    bool stream;                /* it says much: splice */
    bool urgent;                /* a short read need not mean that there is no more */
    uint8_t writes;             /* to it, up to 2 */
    uint32_t queued;            /* bytes in its pipe */
    struct pipe *pipe;
};

struct connection {
    struct end client, server;
    bool silent;                              /* the client has not spoken, and the server's handshake waits for it */
    bool connecting, dead, again;
    uint32_t active;                          /* the second of the last event */
    uint64_t since;                           /* when it was accepted, in microseconds */
    struct queue *queue;                      /* of the silent ones, of those that wait for the server, or of all others */
    struct connection *newer, *older;         /* in it */
    struct connection *next;                  /* in one of the worker's lists */
};

struct queue {
    struct connection *newest, *oldest;
};

/* Written by the worker alone, read by anybody. */
struct counters {
    _Atomic uint64_t accepted, live, refused, failed, reset, idle, copied, spliced, pipes, starved;
};

struct worker {
    pthread_t thread;
    int epoll_fd, listener, wake_fd;
    bool accepting;
    uint32_t now, stopped, complained, paused;
    uint64_t max_live, max_pipes;
    struct queue silent, waiting, others;     /* by age; by the end of their silence; by their last activity */
    struct connection *free, *dead, *again;
    struct pipe *pipes;
    struct counters count;
    char buffer[BUFFER];
};

static atomic_int stopping;               /* how often it was asked to */
static atomic_uint ended;                 /* workers */
static uint32_t idle_limit = 600, drain_limit = 30, wait_limit = 1;
static struct deny_list deny;
static in_port_t listen_port;

#define ADD(counter, n)                                                                             \
    atomic_store_explicit(&(counter), atomic_load_explicit(&(counter), memory_order_relaxed) + (uint64_t)(n), \
                          memory_order_relaxed)
#define VALUE(counter) atomic_load_explicit(&(counter), memory_order_relaxed)

static struct connection *connection_of(struct end *end)
{
    size_t offset = end->is_server ? offsetof(struct connection, server) : offsetof(struct connection, client);
    return (struct connection *)((char *)end - offset);
}

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

/* Edge-triggered and for good: no other call is needed until the descriptor is closed. */
static bool watch(struct worker *worker, struct end *end)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET, .data.ptr = end };
    return epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, end->fd, &event) == 0;
}

/* ---- Pipes: one is always in reserve, so that whatever was read has a place. ---- */

static void reserve_pipe(struct worker *worker)
{
    int ends[2];
    if (worker->pipes != NULL || VALUE(worker->count.pipes) >= worker->max_pipes)
        return;
    struct pipe *pipe = malloc(sizeof *pipe);
    if (pipe == NULL || pipe2(ends, O_NONBLOCK | O_CLOEXEC) != 0) {
        free(pipe);
        return;
    }
    /* Refused to those with many pipes already (pipe-user-pages-soft): but what was read must have room. */
    if (fcntl(ends[1], F_SETPIPE_SZ, PIPE) < BUFFER && fcntl(ends[1], F_GETPIPE_SZ) < BUFFER) {
        close(ends[0]), close(ends[1]);
        free(pipe);
        return;
    }
    *pipe = (struct pipe){ .in = ends[1], .out = ends[0] };
    worker->pipes = pipe;
    ADD(worker->count.pipes, 1);
}

static void take_pipe(struct worker *worker, struct end *end)
{
    if (end->pipe != NULL)
        return;
    end->pipe = worker->pipes;
    worker->pipes = end->pipe->next;
    reserve_pipe(worker);
}

static void give_back(struct worker *worker, struct end *end)
{
    if (end->pipe == NULL)
        return;
    if (end->queued == 0) {
        end->pipe->next = worker->pipes;
        worker->pipes = end->pipe;
    } else {
        /* Whose bytes are in it is gone. */
        close(end->pipe->in), close(end->pipe->out);
        free(end->pipe);
        ADD(worker->count.pipes, -1);
        reserve_pipe(worker);
    }
    end->pipe = NULL, end->queued = 0;
}

/* ---- Connections. ---- */

static struct connection *allocate(struct worker *worker)
{
    if (worker->free == NULL) {
        struct connection *chunk = calloc(CHUNK, sizeof *chunk);
        for (int i = 0; chunk != NULL && i < CHUNK; i++)
            chunk[i].next = worker->free, worker->free = &chunk[i];
    }
    struct connection *connection = worker->free;
    if (connection != NULL) {
        worker->free = connection->next;
        memset(connection, 0, sizeof *connection);
    }
    return connection;
}

static void leave(struct connection *connection)
{
    struct queue *queue = connection->queue;
    *(connection->newer ? &connection->newer->older : &queue->newest) = connection->older;
    *(connection->older ? &connection->older->newer : &queue->oldest) = connection->newer;
}

static void join(struct queue *queue, struct connection *connection)
{
    connection->queue = queue;
    connection->newer = NULL, connection->older = queue->newest;
    *(queue->newest ? &queue->newest->newer : &queue->oldest) = connection;
    queue->newest = connection;
}

/* It is the last to have done something. While its server has not accepted, nothing that it does gives it more time. */
static void is_active(struct worker *worker, struct connection *connection)
{
    connection->silent = false;
    if (connection->connecting && connection->queue == &worker->waiting)
        return;
    leave(connection);
    join(connection->connecting ? &worker->waiting : &worker->others, connection);
    connection->active = worker->now;
}

static void accept_more(struct worker *worker, bool wanted)
{
    struct epoll_event event = { .events = wanted ? EPOLLIN : 0, .data.ptr = NULL };
    if (wanted != worker->accepting && epoll_ctl(worker->epoll_fd, EPOLL_CTL_MOD, worker->listener, &event) == 0)
        worker->accepting = wanted;
    worker->paused = worker->now;
}

static void set_reset(int fd)
{
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ .l_onoff = 1, .l_linger = 0 }, sizeof(struct linger));
}

static void bury(struct worker *worker, struct connection *connection)
{
    connection->next = worker->dead;
    worker->dead = connection;
}

/* A direction has had its turn, and is not at an edge: nobody will wake it. */
static void run_again(struct worker *worker, struct connection *connection)
{
    if (connection->again)
        return;
    connection->again = true;
    connection->next = worker->again;
    worker->again = connection;
}

/* Other events of this round may still name it: it is freed after them. */
static void finish(struct worker *worker, struct connection *connection, bool reset)
{
    if (connection->dead)
        return;
    struct end *client = &connection->client, *server = &connection->server;
    give_back(worker, client);
    give_back(worker, server);
    if (reset)
        set_reset(client->fd), set_reset(server->fd);
    close(client->fd);
    close(server->fd);
    leave(connection);
    connection->dead = true;
    if (!connection->again)
        bury(worker, connection);
    ADD(worker->count.live, -1);
}

static void broken(struct worker *worker, struct connection *connection)
{
    if (!connection->dead)
        ADD(worker->count.reset, 1);
    finish(worker, connection, true);
}

/* ---- Bytes. What a step came to: ---- */

enum step { MOVED, WAIT, BROKEN };

static enum step after_error(bool *ready)
{
    if (errno == EINTR)
        return MOVED;
    if (errno != EAGAIN)
        return BROKEN;
    *ready = false;
    return WAIT;
}

/* The first message goes at once in any case; the next is not to wait until that is acknowledged. */
static void before_writing(struct end *to)
{
    if (to->writes < 2 && ++to->writes == 2)
        setsockopt(to->fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
}

static enum step write_queued(struct end *from, struct end *to)
{
    before_writing(to);
    ssize_t n = splice(from->pipe->out, NULL, to->fd, NULL, from->queued, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (n < 0)
        return after_error(&to->writable);
    from->queued -= (uint32_t)n;
    return MOVED;
}

static enum step splice_stream(struct worker *worker, struct end *from)
{
    take_pipe(worker, from);
    ssize_t n = splice(from->fd, NULL, from->pipe->in, NULL, PIPE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (n < 0)
        return after_error(&from->readable);
    from->eof = n == 0;
    from->stream = n >= BUFFER / 4;
    from->queued = (uint32_t)n;
    ADD(worker->count.spliced, n);
    return MOVED;
}

/*
 * A read that did not fill the buffer took all that there was. If the end of stream had
 * arrived by then, that was behind it, and takes no read of its own.
 */
static enum step copy_message(struct worker *worker, struct end *from, struct end *to)
{
    ssize_t n = recv(from->fd, worker->buffer, BUFFER, 0);
    if (n < 0)
        return after_error(&from->readable);
    from->stream = n == BUFFER;
    from->eof = n == 0;
    if (n < BUFFER && !from->urgent)
        from->readable = false, from->eof |= from->hung_up;
    if (n == 0)
        return MOVED;
    ADD(worker->count.copied, n);
    before_writing(to);
    /* The last message and the end of stream, which pump() tells next, leave in one packet. */
    ssize_t sent = send(to->fd, worker->buffer, (size_t)n, MSG_NOSIGNAL | (from->eof ? MSG_MORE : 0));
    if (sent == n)
        return MOVED;
    if (sent < 0 && after_error(&to->writable) == BROKEN)
        return BROKEN;
    /* What was not taken waits in a pipe, which has room for a whole buffer. */
    size_t taken = sent < 0 ? 0 : (size_t)sent;
    take_pipe(worker, from);
    from->queued = (uint32_t)((size_t)n - taken);
    return write(from->pipe->in, worker->buffer + taken, from->queued) == (ssize_t)from->queued ? MOVED : BROKEN;
}

/* Without a pipe nothing may be read that the other end does not take. */
static enum step copy_what_fits(struct worker *worker, struct end *from, struct end *to)
{
    ssize_t n = recv(from->fd, worker->buffer, BUFFER, MSG_PEEK);
    if (n < 0)
        return after_error(&from->readable);
    from->eof = n == 0;
    if (n == 0)
        return MOVED;
    before_writing(to);
    ssize_t sent = send(to->fd, worker->buffer, (size_t)n, MSG_NOSIGNAL);
    if (sent < 0)
        return after_error(&to->writable);
    ADD(worker->count.starved, sent);
    return recv(from->fd, worker->buffer, (size_t)sent, MSG_TRUNC) == sent ? MOVED : BROKEN;
}

static bool may_read(const struct end *from, const struct end *to)
{
    return from->readable && to->writable && !from->eof;
}

/* Moves bytes one way until either end has to wait, or for a turn. False: the connection broke. */
static bool pump(struct worker *worker, struct end *from, struct end *to)
{
    enum step step = MOVED;
    for (int turns = 0; step == MOVED && (from->queued > 0 || may_read(from, to)); turns++) {
        if (turns == TURNS) {
            run_again(worker, connection_of(from));
            return true;
        }
        if (from->queued > 0)
            step = to->writable ? write_queued(from, to) : WAIT;
        else if (from->pipe == NULL && worker->pipes == NULL)
            step = copy_what_fits(worker, from, to);
        else if (from->stream)
            step = splice_stream(worker, from);
        else
            step = copy_message(worker, from, to);
    }
    if (step == BROKEN)
        return false;
    if (from->queued > 0)
        return true;
    give_back(worker, from);
    if (from->eof && !from->told) {
        from->told = true;
        /* If that was the last there was to say, close() tells it. */
        if (!to->told)
            shutdown(to->fd, SHUT_WR);
    }
    return true;
}

static void run(struct worker *worker, struct connection *connection)
{
    struct end *client = &connection->client, *server = &connection->server;
    if (!pump(worker, client, server) || !pump(worker, server, client))
        broken(worker, connection);
    else if (client->told && server->told)
        finish(worker, connection, false);
}

static void on_end(struct worker *worker, struct end *end, uint32_t events)
{
    struct connection *connection = connection_of(end);
    if (connection->dead)
        return;
    if (connection->silent ? !end->is_server && (events & EPOLLIN) != 0 : connection->active != worker->now)
        is_active(worker, connection);
    end->readable |= (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    /* A reset looks like an end of stream, too. */
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
            is_active(worker, connection);
    }
    if (!connection->connecting)
        run(worker, connection);
    /* What came before the reset has been passed on. */
    if (events & EPOLLERR)
        broken(worker, connection);
}

/* One line a second at most: a flood of failures is not to become a flood of lines. */
static void complain(struct worker *worker, const char *what)
{
    if (worker->complained != worker->now)
        fprintf(stderr, "relay: %s\n", what);
    worker->complained = worker->now;
}

/* The relay is not to be a way to what only this host reaches, nor to call itself. */
static bool refused(const struct sockaddr_storage *to, socklen_t len)
{
    in_port_t port = to->ss_family == AF_INET ? ((const struct sockaddr_in *)to)->sin_port
                                              : ((const struct sockaddr_in6 *)to)->sin6_port;
    return denied(&deny, (const struct sockaddr *)to) ||
           (port == listen_port && is_own_address((const struct sockaddr *)to, len));
}

/* Clients that say nothing, and servers that do not answer, are not to keep others out. */
static struct connection *longest_silent(const struct worker *worker)
{
    struct connection *waiting = worker->waiting.oldest, *other = worker->others.oldest;
    struct connection *oldest = waiting != NULL && (other == NULL || waiting->active < other->active) ? waiting : other;
    return oldest != NULL && worker->now - oldest->active >= SILENT_FOR ? oldest : NULL;
}

static bool make_room(struct worker *worker)
{
    struct connection *oldest = longest_silent(worker);
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

/* The heart of it: who calls, whom do they want, call them in the caller's name. */
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
        /* Whatever it is, it may last, and the listener stays ready. */
        complain(worker, tp_last_error());
        if (!is_shortage(error) || !make_room(worker))
            accept_more(worker, false);
        return false;
    }
    ADD(worker->count.accepted, 1);

    int server = -1;
    const char *refusal = NULL;
    if (refused(&to, to_len))
        refusal = "refused: a destination that is denied, or the relay itself";
    else
        server = tp_connect_from((struct sockaddr *)&from, from_len, (struct sockaddr *)&to, to_len,
                                 TP_NONBLOCK | TP_CONNECT_DATA_FOLLOWS);
    struct connection *connection = server < 0 ? NULL : allocate(worker);
    if (connection != NULL) {
        connection->client = (struct end){ .fd = client, .writable = true, .writes = 2 };
        connection->server = (struct end){ .fd = server, .is_server = true };
        connection->connecting = connection->silent = true;
        connection->since = microseconds();
        join(&worker->silent, connection);
        ADD(worker->count.live, 1);
        if (!watch(worker, &connection->client) || !watch(worker, &connection->server))
            broken(worker, connection);
        return true;
    }
    complain(worker, refusal != NULL ? refusal : server < 0 ? tp_last_error() : "out of memory");
    ADD(worker->count.failed, 1);
    if (server >= 0)
        close(server);
    set_reset(client);
    close(client);
    return true;
}

/* A share of a round's events. More will be told again; to try and find none costs the kernel a socket. */
static void accept_some(struct worker *worker, int events)
{
    for (int i = 0; i < events; i += ACCEPTS) {
        if (VALUE(worker->count.live) >= worker->max_live) {
            /* Only the first is known to be there. */
            if (i > 0)
                return;
            if (!make_room(worker)) {
                accept_more(worker, false);
                return;
            }
        }
        if (!accept_one(worker))
            return;
    }
}

/* ---- A worker's life. ---- */

/* The server may be the one to speak first: it is not to wait for the end of its handshake. */
static void end_silence(struct worker *worker)
{
    if (worker->silent.oldest == NULL)
        return;
    uint64_t now = microseconds();
    for (struct connection *oldest; (oldest = worker->silent.oldest) != NULL && now - oldest->since >= wait_limit * 1000;) {
        setsockopt(oldest->server.fd, IPPROTO_TCP, TCP_QUICKACK, &(int){ 1 }, sizeof(int));
        is_active(worker, oldest);
    }
}

static void end_idle(struct worker *worker)
{
    for (struct connection *oldest; (oldest = worker->others.oldest) != NULL && worker->now - oldest->active >= idle_limit;) {
        ADD(worker->count.idle, 1);
        finish(worker, oldest, true);
    }
    for (struct connection *oldest; (oldest = worker->waiting.oldest) != NULL && worker->now - oldest->active >= CONNECT_SECONDS;) {
        ADD(worker->count.refused, 1);
        finish(worker, oldest, true);
    }
}

static void run_those_again(struct worker *worker)
{
    struct connection *connection = worker->again;
    worker->again = NULL;
    while (connection != NULL) {
        struct connection *next = connection->next;
        connection->again = false;
        if (connection->dead)
            bury(worker, connection);
        else
            run(worker, connection);
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
    if (worker->again != NULL)
        return 0;
    if (worker->silent.oldest != NULL)
        return 1;
    if (!worker->accepting || stopping)
        return 100;
    if (worker->waiting.oldest != NULL)
        return 1000;
    if (worker->others.oldest == NULL)
        return -1;
    /* A clock that went on since end_idle() must not make it negative, which is for ever. */
    uint32_t since = worker->now - worker->others.oldest->active;
    return since < idle_limit ? (int)(idle_limit - since) * 1000 : 0;
}

/* Asked to stop, a worker goes on until nothing is left; the last handshakes have a second. */
static bool goes_on(struct worker *worker)
{
    if (!stopping)
        return true;
    if (worker->stopped == 0)
        worker->stopped = worker->now;
    uint32_t since = worker->now - worker->stopped;
    return stopping == 1 && since < drain_limit && (VALUE(worker->count.live) > 0 || since < 2);
}

static void work(struct worker *worker)
{
    struct epoll_event events[EVENTS];
    for (worker->now = seconds(); goes_on(worker); worker->now = seconds()) {
        int n = epoll_wait(worker->epoll_fd, events, EVENTS, time_to_wait(worker));
        worker->now = seconds();
        for (int i = 0; i < n; i++) {
            void *what = events[i].data.ptr;
            if (what == NULL)
                accept_some(worker, n);
            else if (what != worker)
                on_end(worker, what, events[i].events);
        }
        run_those_again(worker);
        end_silence(worker);
        end_idle(worker);
        /* With room again, or after a while, look whether there are descriptors. */
        if (!worker->accepting && (worker->dead != NULL || n == 0 || worker->now != worker->paused) && (VALUE(worker->count.live) < worker->max_live || longest_silent(worker) != NULL))
            accept_more(worker, true);
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
    /* For both families; for IPv4 alone where the kernel has no IPv6. */
    struct sockaddr_in6 any6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
    struct sockaddr_in any4 = { .sin_family = AF_INET, .sin_port = htons(port) };
    int fd = tp_listen((struct sockaddr *)&any6, sizeof any6, -1, TP_NONBLOCK | TP_LISTEN_REUSEPORT);
    if (fd < 0 && errno == EAFNOSUPPORT)
        fd = tp_listen((struct sockaddr *)&any4, sizeof any4, -1, TP_NONBLOCK | TP_LISTEN_REUSEPORT);
    if (fd < 0)
        errx(1, "%s", tp_last_error());
    /* What it accepts has these from the start. An answer acknowledges the question: that saves a packet. */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &(int){ 0 }, sizeof(int));
    return fd;
}

static void prepare(struct worker *worker, uint16_t port)
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

/* ---- The whole. ---- */

/* Shares the descriptors out: some pipes, and two for each connection. */
static void set_limits(struct worker *workers, unsigned n, uint64_t connections)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        err(1, "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        err(1, "setrlimit");
    uint64_t own = OWN_DESCRIPTORS + 3 * (uint64_t)n;
    uint64_t descriptors = limit.rlim_cur == RLIM_INFINITY ? 1 << 20 : limit.rlim_cur;
    if (descriptors < own + 8 * (uint64_t)n)
        errx(1, "a limit of %" PRIu64 " descriptors is not enough for %u threads", descriptors, n);
    uint64_t pipes = (descriptors - own) / 16 < PIPES ? (descriptors - own) / 16 : PIPES;
    if (pipes < n)
        pipes = n;
    uint64_t room = (descriptors - own - 2 * pipes) / 2;
    if (connections == 0 || connections > room)
        connections = room;
    for (unsigned i = 0; i < n; i++) {
        workers[i].max_live = connections / n + (i < connections % n);
        workers[i].max_pipes = pipes / n + (i < pipes % n);
    }
}

static void show(const struct worker *workers, unsigned n)
{
    static const char *const names[] = { "accepted", "live",   "refused", "failed", "reset",
                                         "idle",     "copied", "spliced", "pipes",  "starved" };
    enum { NAMES = sizeof names / sizeof *names };
    uint64_t sums[NAMES] = { 0 };
    for (unsigned i = 0; i < n; i++) {
        const struct counters *count = &workers[i].count;
        const uint64_t values[NAMES] = { VALUE(count->accepted), VALUE(count->live),   VALUE(count->refused),
                                         VALUE(count->failed),   VALUE(count->reset),  VALUE(count->idle),
                                         VALUE(count->copied),   VALUE(count->spliced), VALUE(count->pipes),
                                         VALUE(count->starved) };
        for (int k = 0; k < NAMES; k++)
            sums[k] += values[k];
    }
    for (int k = 0; k < NAMES; k++)
        printf("%s\"%s\":%" PRIu64, k == 0 ? "{" : ",", names[k], sums[k]);
    printf("}\n");
}

static unsigned long parse_number(const char *text, char end, unsigned long least, unsigned long most, const char **rest)
{
    char *stop;
    errno = 0;
    unsigned long number = strtoul(text, &stop, 10);
    if (errno != 0 || stop == text || number < least || number > most || (*stop != '\0' && *stop != end))
        errx(2, "%s: not a number from %lu to %lu", text, least, most);
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
        ranges[n].first = ranges[n].last = (uint16_t)parse_number(args[n], '-', 1, 65535, &rest);
        if (*rest == '-')
            ranges[n].last = (uint16_t)parse_number(rest + 1, '\0', 1, 65535, NULL);
    }
    return n;
}

/* 192.0.2.0/24, 2001:db8::/32, or an address. */
static struct tp_prefix parse_prefix(char *text)
{
    char *len = strchr(text, '/');
    if (len != NULL)
        *len++ = '\0';
    struct tp_prefix prefix = { .family = strchr(text, ':') != NULL ? AF_INET6 : AF_INET };
    unsigned long most = prefix.family == AF_INET6 ? 128 : 32;
    if (inet_pton(prefix.family, text, prefix.addr) != 1)
        errx(2, "%s: not an address", text);
    prefix.len = (uint8_t)(len == NULL ? most : parse_number(len, '\0', 0, most, NULL));
    return prefix;
}

static struct tp_prefix *read_prefixes(const char *path, size_t *n)
{
    char line[128];
    struct tp_prefix *prefixes = NULL;
    FILE *file = fopen(path, "r");
    if (file == NULL)
        err(2, "%s", path);
    for (size_t room = 0; fgets(line, sizeof line, file) != NULL; (*n)++) {
        line[strcspn(line, "\n")] = '\0';
        if (*n == room && (prefixes = realloc(prefixes, (room = room * 2 + 64) * sizeof *prefixes)) == NULL)
            err(1, "realloc");
        prefixes[*n] = parse_prefix(line);
    }
    fclose(file);
    if (*n == 0)
        errx(2, "%s: no prefix there", path);
    return prefixes;
}

static void stop_workers(struct worker *workers, unsigned n, tp_rules *rules)
{
    /* The connections that there are still need their packets; new ones do not come here any more. */
    struct tp_rules_config divert = { .flags = TP_RULES_DIVERT_ONLY };
    if (stopping == 0 && tp_replace_rules(rules, &divert, sizeof divert) != 0)
        warnx("%s", tp_last_error());
    stopping++;
    for (unsigned i = 0; i < n; i++)
        eventfd_write(workers[i].wake_fd, 1);
}

static void *live(void *argument)
{
    work(argument);
    ended++;
    kill(getpid(), SIGUSR2);    /* for the main thread, which waits for signals */
    return NULL;
}

int main(int argc, char **argv)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned n = cores < 1 ? 1 : cores > MAX_THREADS ? MAX_THREADS : (unsigned)cores;
    uint64_t connections = 0;
    const char *prefixes = NULL;
    deny_defaults(&deny);
    for (int option; (option = getopt(argc, argv, "t:w:i:d:c:p:x:")) != -1;) {
        switch (option) {
        case 't': n = (unsigned)parse_number(optarg, '\0', 1, MAX_THREADS, NULL); break;
        case 'w': wait_limit = (uint32_t)parse_number(optarg, '\0', 0, 10000, NULL); break;
        case 'i': idle_limit = (uint32_t)parse_number(optarg, '\0', 1, 2000000, NULL); break;
        case 'd': drain_limit = (uint32_t)parse_number(optarg, '\0', 0, 2000000, NULL); break;
        case 'c': connections = parse_number(optarg, '\0', 1, 1000000000, NULL); break;
        case 'p': prefixes = optarg; break;
        case 'x':
            if (!deny_add(&deny, optarg))
                errx(2, "%s: not a prefix to deny (ADDR/LEN), or there are more than %d", optarg, MAX_DENIED);
            break;
        default: argc = 0;
        }
    }
    if (argc - optind < 2)
        errx(2, "usage: relay [-t THREADS] [-w WAIT] [-i IDLE] [-d DRAIN] [-c CONNECTIONS] [-p PREFIXES] [-x PREFIX]... "
                "LISTEN-PORT PORT[-PORT]...");
    setvbuf(stdout, NULL, _IOLBF, 0);

    signal(SIGPIPE, SIG_IGN);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGUSR1);
    sigaddset(&signals, SIGUSR2);
    sigprocmask(SIG_BLOCK, &signals, NULL);

    struct worker *workers = calloc(n, sizeof *workers);
    int *listeners = calloc(n, sizeof *listeners);
    if (workers == NULL || listeners == NULL)
        err(1, "calloc");
    set_limits(workers, n, connections);
    listen_port = htons((uint16_t)parse_number(argv[optind], '\0', 1, 65535, NULL));
    for (unsigned i = 0; i < n; i++) {
        prepare(&workers[i], (uint16_t)parse_number(argv[optind], '\0', 1, 65535, NULL));
        listeners[i] = workers[i].listener;
    }

    struct tp_port_range ports[MAX_RANGES];
    struct tp_rules_config config = { 0 };
    config.listeners = listeners, config.n_listeners = n;
    config.ports = ports, config.n_ports = parse_ports(argv + optind + 1, ports);
    struct tp_prefix *dst = NULL;
    if (prefixes != NULL)
        config.dst = dst = read_prefixes(prefixes, &config.n_dst);
    tp_rules *rules;
    if (tp_install_rules(&config, sizeof config, &rules) != 0)
        errx(1, "%s", tp_last_error());
    free(listeners);
    free(dst);
    for (unsigned i = 0; i < n; i++)
        if ((errno = pthread_create(&workers[i].thread, NULL, live, &workers[i])) != 0)
            err(1, "pthread_create");
    printf("listening\n");

    while (ended < n) {
        int signal = sigwaitinfo(&signals, NULL);
        if (signal == SIGUSR1)
            show(workers, n);
        else if (signal == SIGINT || signal == SIGTERM)
            stop_workers(workers, n, rules);
    }
    for (unsigned i = 0; i < n; i++)
        pthread_join(workers[i].thread, NULL);
    show(workers, n);
    if (tp_remove_rules(rules) != 0)
        errx(1, "%s", tp_last_error());
    return 0;
}
