/*
 * A thousand clients, which send requests to fifty servers on twenty ports each, and the servers.
 *
 *     udp_load serve
 *     udp_load ask SECONDS WINDOW [CLIENTS]
 *
 * Every request contains its client and its service. The server adds the client
 * address that it saw and its own address. The client's socket that receives the
 * reply checks all of them, and the address that the reply came from. WINDOW
 * requests are in flight at a time, so that no buffer overflows; each is sent twice
 * to the same server. Half of the clients and servers use IPv4. With fewer clients,
 * each has several requests at a time. The last line has the counters. The exit
 * status is 1 if a check failed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include "limit.h"

enum { CLIENTS = 1000, HOSTS = 50, PORTS = 20, FIRST_PORT = 5301, CLIENT_PORT = 4000, MAX_WINDOW = 1024, EVENTS = 256 };

struct question {
    uint32_t client, service, slot, sequence;    /* service: the host and the port */
    struct sockaddr_in6 seen_client, seen_service;
};

static int epoll_fd;

/* IPv4 v4-mapped. Networks for benchmarks: RFC 2544, RFC 5180. */
static struct sockaddr_in6 address(const char *v4, const char *v6, bool is_v4, uint32_t host, uint16_t port)
{
    struct sockaddr_in6 addr = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
    if (inet_pton(AF_INET6, is_v4 ? v4 : v6, &addr.sin6_addr) != 1)
        errx(1, "inet_pton");
    addr.sin6_addr.s6_addr[14] = (uint8_t)(host >> 8);
    addr.sin6_addr.s6_addr[15] = (uint8_t)host;
    return addr;
}

static bool is_v4(uint32_t client)
{
    return client % 2 == 0;
}

static struct sockaddr_in6 client_address(uint32_t client)
{
    return address("::ffff:198.18.0.0", "2001:2:0:1::", is_v4(client), client + 1, CLIENT_PORT);
}

static struct sockaddr_in6 service_address(uint32_t service, bool v4)
{
    return address("::ffff:198.19.0.0", "2001:2:0:2::", v4, service % HOSTS + 1, (uint16_t)(FIRST_PORT + service / HOSTS));
}

static bool same(const struct sockaddr_in6 *a, const struct sockaddr_in6 *b)
{
    return a->sin6_port == b->sin6_port && memcmp(&a->sin6_addr, &b->sin6_addr, sizeof a->sin6_addr) == 0;
}

static uint64_t milliseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

/* Opens a dual-stack socket that epoll identifies by a number. No interface need have its address. */
static int open_socket(const struct sockaddr_in6 *addr, uint32_t number)
{
    int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0), one = 1;
    struct epoll_event event = { .events = EPOLLIN, .data.u64 = (uint64_t)number << 32 | (uint32_t)fd };
    if (fd < 0 || setsockopt(fd, SOL_IPV6, IPV6_FREEBIND, &one, sizeof one) != 0 ||
        setsockopt(fd, SOL_IPV6, IPV6_RECVPKTINFO, &one, sizeof one) != 0 ||
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){ 4 << 20 }, sizeof(int)) != 0 ||
        bind(fd, (const struct sockaddr *)addr, sizeof *addr) != 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        err(1, "a socket on port %d", ntohs(addr->sin6_port));
    return fd;
}

/* Replies to one request from its destination address, by packet information. */
static bool answer(int fd, uint16_t port)
{
    struct question question;
    struct iovec part = { &question, sizeof question };
    char control[CMSG_SPACE(sizeof(struct in6_pktinfo)) + CMSG_SPACE(sizeof(struct in_pktinfo))];
    struct sockaddr_in6 from;
    struct msghdr message = { .msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &part, .msg_iovlen = 1,
                              .msg_control = control, .msg_controllen = sizeof control };
    ssize_t len = recvmsg(fd, &message, 0);
    if (len < 0)
        return false;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    while (header != NULL && (header->cmsg_level != SOL_IPV6 || header->cmsg_type != IPV6_PKTINFO))
        header = CMSG_NXTHDR(&message, header);
    if (len != sizeof question || header == NULL)
        errx(1, "a datagram that nobody sent");
    struct in6_pktinfo info;
    memcpy(&info, CMSG_DATA(header), sizeof info);
    info.ipi6_ifindex = 0;
    question.seen_client = from;
    question.seen_service = (struct sockaddr_in6){ .sin6_port = htons(port), .sin6_addr = info.ipi6_addr };

    union {
        char room[CMSG_SPACE(sizeof info)];
        struct cmsghdr header;
    } reply = { .header = { .cmsg_level = SOL_IPV6, .cmsg_type = IPV6_PKTINFO, .cmsg_len = CMSG_LEN(sizeof info) } };
    memcpy(CMSG_DATA(&reply.header), &info, sizeof info);
    message.msg_control = &reply, message.msg_controllen = sizeof reply;
    if (sendmsg(fd, &message, 0) < 0)
        warn("answer");
    return true;
}

static _Noreturn void serve(void)
{
    for (uint16_t port = FIRST_PORT; port < FIRST_PORT + PORTS; port++) {
        struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
        open_socket(&any, port);
    }
    printf("listening\n");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++)
            while (answer((int)events[i].data.u64, (uint16_t)(events[i].data.u64 >> 32)))
                ;
    }
}

struct slot {
    uint32_t client, service, sequence;
    uint64_t asked;
    bool again;     /* to be sent a second time */
};

static struct slot slots[MAX_WINDOW];
static int sockets[CLIENTS];
static uint32_t n_clients = CLIENTS;
static uint64_t number, asked, answered, late, lost, wrong_client, wrong_source, wrong_service, wrong_origin;

static void ask(uint32_t at)
{
    struct slot *slot = &slots[at];
    if (!slot->again) {
        /* All pairs of client and service (a million), in an order in which neither repeats soon. */
        slot->client = (uint32_t)(number % n_clients);
        slot->service = (uint32_t)((number + number / n_clients * 7) % (HOSTS * PORTS));
        number++;
    }
    slot->again = !slot->again;
    slot->sequence++;
    slot->asked = milliseconds();
    struct question question = { slot->client, slot->service, at, slot->sequence, { 0 }, { 0 } };
    struct sockaddr_in6 to = service_address(slot->service, is_v4(slot->client));
    if (sendto(sockets[slot->client], &question, sizeof question, 0, (struct sockaddr *)&to, sizeof to) < 0)
        warn("ask");
    asked++;
}

static bool hear(uint32_t client)
{
    struct question answer;
    struct sockaddr_in6 from;
    socklen_t len = sizeof from;
    ssize_t n = recvfrom(sockets[client], &answer, sizeof answer, 0, (struct sockaddr *)&from, &len);
    if (n < 0)
        return false;
    if (n != sizeof answer || answer.client != client || answer.service >= HOSTS * PORTS || answer.slot >= MAX_WINDOW) {
        wrong_client++;
        return true;
    }
    struct sockaddr_in6 me = client_address(client), service = service_address(answer.service, is_v4(client));
    wrong_source += !same(&from, &service);
    wrong_service += !same(&answer.seen_service, &service);
    wrong_origin += !same(&answer.seen_client, &me);
    if (slots[answer.slot].sequence == answer.sequence) {
        answered++;
        ask(answer.slot);
    } else {
        late++;
    }
    return true;
}

static int load(unsigned seconds, uint32_t window)
{
    for (uint32_t client = 0; client < n_clients; client++) {
        struct sockaddr_in6 addr = client_address(client);
        sockets[client] = open_socket(&addr, client);
    }
    uint64_t end = milliseconds() + seconds * 1000, next = 0, patience = (uint64_t)limit(1000);
    for (uint32_t at = 0; at < window; at++)
        ask(at);
    for (uint64_t now; (now = milliseconds()) < end;) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll_fd, events, EVENTS, 50);
        for (int i = 0; i < n; i++)
            while (hear((uint32_t)(events[i].data.u64 >> 32)))
                ;
        if (now < next)
            continue;
        next = now + 50;
        for (uint32_t at = 0; at < window; at++)
            if (slots[at].asked + patience < now) {
                lost++;
                slots[at].again = false;
                ask(at);
            }
    }
    uint64_t wrong = wrong_client + wrong_source + wrong_service + wrong_origin;
    printf("asked %" PRIu64 " answered %" PRIu64 " lost %" PRIu64 " late %" PRIu64 " pairs %" PRIu64
           " wrong-client %" PRIu64 " wrong-source %" PRIu64 " wrong-service %" PRIu64 " wrong-origin %" PRIu64 "\n",
           asked, answered, lost, late, number, wrong_client, wrong_source, wrong_service, wrong_origin);
    return wrong == 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        err(1, "epoll_create1");
    if (argc == 2 && strcmp(argv[1], "serve") == 0)
        serve();
    if (argc == 5 && atoi(argv[4]) >= 1 && atoi(argv[4]) <= CLIENTS)
        n_clients = (uint32_t)atoi(argv[4]);
    if (argc >= 4 && strcmp(argv[1], "ask") == 0 && atoi(argv[3]) <= MAX_WINDOW)
        return load((unsigned)atoi(argv[2]), (uint32_t)atoi(argv[3]));
    errx(2, "usage: udp_load serve | udp_load ask SECONDS WINDOW [CLIENTS]");
}
