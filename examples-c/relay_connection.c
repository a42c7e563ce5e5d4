/* Memory of connections, their queues, and the pipes of a worker. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "relay.h"

/* ---- Pipes: a worker keeps one in reserve, so that bytes that were read can always be stored. ---- */

void reserve_pipe(struct worker *worker)
{
    int ends[2];
    if (worker->pipes != NULL || VALUE(worker->count.pipes) >= worker->max_pipes)
        return;
    struct pipe *pipe = malloc(sizeof *pipe);
    if (pipe == NULL || pipe2(ends, O_NONBLOCK | O_CLOEXEC) != 0) {
        free(pipe);
        return;
    }
    /* The kernel refuses a larger size to a user with many pipes (pipe-user-pages-soft). A pipe must hold a whole buffer. */
    if (fcntl(ends[1], F_SETPIPE_SZ, PIPE) < BUFFER && fcntl(ends[1], F_GETPIPE_SZ) < BUFFER) {
        close(ends[0]), close(ends[1]);
        free(pipe);
        return;
    }
    *pipe = (struct pipe){ .in = ends[1], .out = ends[0] };
    worker->pipes = pipe;
    ADD(worker->count.pipes, 1);
}

void take_pipe(struct worker *worker, struct end *end)
{
    if (end->pipe != NULL)
        return;
    end->pipe = worker->pipes;
    worker->pipes = end->pipe->next;
    reserve_pipe(worker);
}

void release_pipe(struct worker *worker, struct end *end)
{
    if (end->pipe == NULL)
        return;
    if (end->queued == 0) {
        end->pipe->next = worker->pipes;
        worker->pipes = end->pipe;
    } else {
        /* The pipe holds bytes of a connection that has ended. */
        close(end->pipe->in), close(end->pipe->out);
        free(end->pipe);
        ADD(worker->count.pipes, -1);
        reserve_pipe(worker);
    }
    end->pipe = NULL, end->queued = 0;
}

/* ---- Connections. ---- */

struct connection *connection_of(struct end *end)
{
    size_t offset = end->is_server ? offsetof(struct connection, server) : offsetof(struct connection, client);
    return (struct connection *)((char *)end - offset);
}

struct connection *allocate(struct worker *worker)
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

static void dequeue(struct connection *connection)
{
    struct queue *queue = connection->queue;
    *(connection->newer ? &connection->newer->older : &queue->newest) = connection->older;
    *(connection->older ? &connection->older->newer : &queue->oldest) = connection->newer;
}

void enqueue(struct queue *queue, struct connection *connection)
{
    connection->queue = queue;
    connection->newer = NULL, connection->older = queue->newest;
    *(queue->newest ? &queue->newest->newer : &queue->oldest) = connection;
    queue->newest = connection;
}

/* Makes it the newest of its queue. While its server has not accepted, no event extends its time limit. */
void mark_active(struct worker *worker, struct connection *connection)
{
    connection->silent = false;
    if (connection->connecting && connection->queue == &worker->waiting)
        return;
    dequeue(connection);
    enqueue(connection->connecting ? &worker->waiting : &worker->others, connection);
    connection->active = worker->now;
}

void reset_on_close(int fd)
{
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ .l_onoff = 1, .l_linger = 0 }, sizeof(struct linger));
}

/* Later events of the same epoll_wait() may refer to a connection, so it is freed after them. */
void free_later(struct worker *worker, struct connection *connection)
{
    connection->next = worker->dead;
    worker->dead = connection;
}

/* Continues a direction that has used its turns. Edge-triggered epoll reports no further event for it. */
void schedule(struct worker *worker, struct connection *connection)
{
    if (connection->scheduled)
        return;
    connection->scheduled = true;
    connection->next = worker->scheduled;
    worker->scheduled = connection;
}

void finish(struct worker *worker, struct connection *connection, bool reset)
{
    if (connection->dead)
        return;
    struct end *client = &connection->client, *server = &connection->server;
    release_pipe(worker, client);
    release_pipe(worker, server);
    if (reset)
        reset_on_close(client->fd), reset_on_close(server->fd);
    close(client->fd);
    close(server->fd);
    dequeue(connection);
    connection->dead = true;
    if (!connection->scheduled)
        free_later(worker, connection);
    ADD(worker->count.live, -1);
}

void finish_broken(struct worker *worker, struct connection *connection)
{
    if (!connection->dead)
        ADD(worker->count.reset, 1);
    finish(worker, connection, true);
}
