/* Passes requests on to servers, and replies on to clients. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>

#include "udp_proxy.h"

static struct tp_datagram requests[TP_BATCH_MAX], replies[TP_BATCH_MAX];
static unsigned n_replies;

static void give_memory(struct tp_datagram *datagrams)
{
    char *memory = malloc((size_t)TP_BATCH_MAX * BUFFER);
    if (memory == NULL)
        err(1, "buffers");
    for (size_t i = 0; i < TP_BATCH_MAX; i++)
        datagrams[i].data = memory + i * BUFFER, datagrams[i].capacity = BUFFER;
}

void allocate_buffers(void)
{
    give_memory(requests);
    give_memory(replies);
}

/* The error may belong to an earlier datagram that the server's host refused. Reporting it has cleared it: try again. */
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

static bool send_request(int fd, const struct tp_datagram *request)
{
    struct iovec part = { request->data, request->len };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
    if (request->segment_len == 0 || request->segment_len >= request->len)
        return send_message(fd, &message);

    /* Datagrams that were received as one batch are sent as one batch (UDP_SEGMENT). */
    uint16_t segment_len = (uint16_t)request->segment_len;
    union {
        char space[CMSG_SPACE(sizeof segment_len)];
        struct cmsghdr header;
    } control = { .header = { .cmsg_level = IPPROTO_UDP, .cmsg_type = UDP_SEGMENT } };
    control.header.cmsg_len = CMSG_LEN(sizeof segment_len);
    memcpy(CMSG_DATA(&control.header), &segment_len, sizeof segment_len);
    message.msg_control = &control, message.msg_controllen = sizeof control;
    if (send_message(fd, &message))
        return true;

    /* One by one: the route does not support segmentation, or the datagrams must be fragmented. */
    message.msg_control = NULL, message.msg_controllen = 0;
    bool all = true;
    for (size_t at = 0; at < request->len; at += segment_len) {
        size_t rest = request->len - at;
        part = (struct iovec){ (char *)request->data + at, rest < segment_len ? rest : segment_len };
        all = send_message(fd, &message) && all;
    }
    return all;
}

/* Passes a batch of requests on to the servers. */
void handle_requests(int listener)
{
    int n = tp_recv_datagrams(listener, requests, TP_BATCH_MAX, 0);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        complain(tp_last_error());
    for (int i = 0; i < n; i++) {
        count.received++;
        struct session *session = requests[i].flags & TP_DGRAM_NO_ORIG_DST ? NULL : session_of(&requests[i]);
        if (session != NULL && send_request(session->fd, &requests[i]))
            count.sent++;
        else
            count.unsent++;
    }
}

void flush_replies(void)
{
    if (n_replies > 0 && tp_reply(replier, replies, n_replies) < (int)n_replies)
        for (unsigned i = 0; i < n_replies; i++)
            if (replies[i].error != 0 && replies[i].error != EAGAIN)
                complain(strerror(replies[i].error));
    n_replies = 0;
}

/* Receives replies of a server. They are sent to the client from the original destination of its request. */
void handle_replies(struct session *session)
{
    unsigned left = TP_BATCH_MAX - n_replies;
    struct tp_datagram *batch = replies + n_replies;
    int n = tp_recv_datagrams(session->fd, batch, left < AT_ONCE ? left : AT_ONCE, 0);
    /* A server that refuses a datagram (ICMP) may listen later: the session continues. */
    if (n < 0)
        count.refused += errno == ECONNREFUSED;
    for (int i = 0; i < n; i++) {
        /* Between bind and connect, the socket receives datagrams of other senders, which are not replies. */
        struct sockaddr_in6 sender = as_ipv6(&batch[i].client);
        if (sender.sin6_port != session->server.sin6_port ||
            memcmp(&sender.sin6_addr, &session->server.sin6_addr, sizeof sender.sin6_addr) != 0) {
            count.foreign++;
            continue;
        }
        struct tp_datagram *next = &replies[n_replies++];
        if (next != &batch[i]) {
            /* A datagram of another sender was skipped: swap the two elements, so that each keeps one buffer. */
            struct tp_datagram reply = batch[i];
            batch[i] = *next;
            *next = reply;
        }
        memcpy(&next->client, &session->key.client, sizeof session->key.client);
        memcpy(&next->orig_dst, &session->key.orig_dst, sizeof session->key.orig_dst);
        count.replies++;
        mark_used(session);
    }
    if (n_replies == TP_BATCH_MAX)
        flush_replies();
}
