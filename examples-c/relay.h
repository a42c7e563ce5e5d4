/*
 * The parts of relay share these types. relay.c describes how it works.
 *
 *   relay.c              options, limits, signals, statistics
 *   relay_worker.c       one thread: accepts connections, waits for events, ends idle connections
 *   relay_connection.c   memory of connections, their queues, and the pipes
 *   relay_stream.c       moves bytes between the two sockets of a connection
 */
#ifndef RELAY_H
#define RELAY_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "deny.h"

enum {
    BUFFER = 16 * 1024,      /* a read that does not fill the buffer is copied; otherwise the stream is spliced */
    PIPE = 1024 * 1024,      /* size of a pipe; /proc/sys/fs/pipe-max-size */
    TURNS = 64,              /* steps of one direction before other connections are served */
    PIPES = 256,             /* of all threads: up to PIPES * PIPE bytes of kernel memory */
    ACCEPTS = 8,             /* one connection is accepted per ACCEPTS events */
    EVENTS = 128,
    CHUNK = 64,              /* connections allocated at once */
    OWN_DESCRIPTORS = 64,    /* standard streams, epoll, listeners, netlink sockets */
    MAX_THREADS = 256,
    MAX_RANGES = 64,
    CONNECT_SECONDS = 20,    /* time limit for the server to accept */
    SILENT_FOR = 10,         /* seconds without a byte after which a connection may be ended for a new one */
};

struct pipe {
    int in, out;
    struct pipe *next;
};

/* One socket of a connection, and the direction that is read from it. */
struct end {
    int fd;
    bool is_server;
    bool readable, writable;    /* false after EAGAIN, until epoll reports the event */
    bool hung_up;               /* its end of stream has arrived, possibly after unread bytes */
    bool eof;                   /* its end of stream was read */
    bool eof_sent;              /* its end of stream was passed on to the other socket */
    bool stream;                /* the last read filled the buffer: splice */
    bool urgent;                /* a short read does not mean that the receive queue is empty */
    uint8_t writes;             /* number of writes to it, up to 2 */
    uint32_t queued;            /* bytes in its pipe */
    struct pipe *pipe;
};

struct connection {
    struct end client, server;
    bool silent;                              /* the client has sent nothing, and the ACK to the server is delayed */
    bool connecting, dead, scheduled;
    uint32_t active;                          /* time of the last event, in seconds */
    uint64_t accepted;                        /* time of accept, in microseconds */
    struct queue *queue;                      /* the worker's queue that it is in */
    struct connection *newer, *older;         /* neighbors in the queue */
    struct connection *next;                  /* next in the list free, dead or scheduled */
};

struct queue {
    struct connection *newest, *oldest;
};

/* Only the worker writes these. Any thread may read them. */
struct counters {
    _Atomic uint64_t accepted, live, refused, failed, reset, idle, copied, spliced, pipes, starved;
};

struct worker {
    pthread_t thread;
    int epoll_fd, listener, wake_fd;
    bool accepting;
    uint32_t now, stopped, complained, paused;    /* times in seconds */
    uint64_t max_live, max_pipes;
    struct queue silent;                          /* silent connections, by the time of accept */
    struct queue waiting;                         /* connections whose server has not accepted yet */
    struct queue others;                          /* all other connections, by their last event */
    struct connection *free, *dead, *scheduled;
    struct pipe *pipes;
    struct counters count;
    char buffer[BUFFER];
};

struct settings {
    uint32_t idle_limit, drain_limit;             /* in seconds */
    uint32_t wait_limit;                          /* in milliseconds */
    bool allow_own;                               /* connect to addresses of this host */
    struct deny_list deny;
    in_port_t listen_port;                        /* in network byte order */
};

extern struct settings settings;
extern atomic_int stopping;                       /* number of signals to stop */

#define ADD(counter, n)                                                                             \
    atomic_store_explicit(&(counter), atomic_load_explicit(&(counter), memory_order_relaxed) + (uint64_t)(n), \
                          memory_order_relaxed)
#define VALUE(counter) atomic_load_explicit(&(counter), memory_order_relaxed)

/* relay_worker.c */
void prepare_worker(struct worker *worker, uint16_t port);
void run_worker(struct worker *worker);

/* relay_connection.c */
struct connection *allocate(struct worker *worker);
struct connection *connection_of(struct end *end);
void enqueue(struct queue *queue, struct connection *connection);
void mark_active(struct worker *worker, struct connection *connection);
void schedule(struct worker *worker, struct connection *connection);
void finish(struct worker *worker, struct connection *connection, bool reset);
void finish_broken(struct worker *worker, struct connection *connection);
void free_later(struct worker *worker, struct connection *connection);
void reset_on_close(int fd);
void reserve_pipe(struct worker *worker);
void take_pipe(struct worker *worker, struct end *end);
void release_pipe(struct worker *worker, struct end *end);

/* relay_stream.c */
void move_bytes(struct worker *worker, struct connection *connection);

#endif
