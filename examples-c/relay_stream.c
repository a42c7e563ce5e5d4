/* Moves bytes between the two sockets of a connection. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "relay.h"

/* Result of one step. */
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

/* TCP sends the first message immediately. TCP_NODELAY lets the second not wait for the ACK of the first. */
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
 * A read that does not fill the buffer empties the receive queue. If the end of stream had arrived before
 * the read, it follows these bytes, and no further read is needed.
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
    /* MSG_MORE: the last message and the end of stream, which pump() sends next, leave in one packet. */
    ssize_t sent = send(to->fd, worker->buffer, (size_t)n, MSG_NOSIGNAL | (from->eof ? MSG_MORE : 0));
    if (sent == n)
        return MOVED;
    if (sent < 0 && after_error(&to->writable) == BROKEN)
        return BROKEN;
    /* Unsent bytes wait in a pipe, which holds a whole buffer. */
    size_t done = sent < 0 ? 0 : (size_t)sent;
    take_pipe(worker, from);
    from->queued = (uint32_t)((size_t)n - done);
    return write(from->pipe->in, worker->buffer + done, from->queued) == (ssize_t)from->queued ? MOVED : BROKEN;
}

/* Without a pipe, only bytes that the other socket accepts may be read. */
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

/* Moves bytes in one direction until a socket has to wait, or for TURNS steps. False: the connection is broken. */
static bool pump(struct worker *worker, struct end *from, struct end *to)
{
    enum step step = MOVED;
    for (int turns = 0; step == MOVED && (from->queued > 0 || may_read(from, to)); turns++) {
        if (turns == TURNS) {
            schedule(worker, connection_of(from));
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
    release_pipe(worker, from);
    if (from->eof && !from->eof_sent) {
        from->eof_sent = true;
        /* If the other direction has ended too, close() sends the end of stream. */
        if (!to->eof_sent)
            shutdown(to->fd, SHUT_WR);
    }
    return true;
}

void move_bytes(struct worker *worker, struct connection *connection)
{
    struct end *client = &connection->client, *server = &connection->server;
    if (!pump(worker, client, server) || !pump(worker, server, client))
        finish_broken(worker, connection);
    else if (client->eof_sent && server->eof_sent)
        finish(worker, connection, false);
}
