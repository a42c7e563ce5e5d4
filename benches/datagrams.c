/*
 * Compares the cost of datagrams with the library and with the usual C code, in
 * one run, on one pair of interfaces, in turns. benches/datagrams.sh runs it in
 * a network namespace of its own.
 *
 *     datagrams              prints the figures and whether targets are met; exit status 1: a target is missed
 *     datagrams WAY COUNT    does only one of these, for counting instructions: reply, many, sendto, segments, receive
 *
 * If QUICK is in the environment, it only tests that everything works.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <tproxy.h>

enum { BATCH = 64, MANY = 256, SOURCES = 50, PORTS = 20, SEGMENT = 1200, ROUNDS = 7 };

static const int on = 1;
static bool quick;
static int sink, sender, listener;
static struct sockaddr_in client = { .sin_family = AF_INET };
static struct sockaddr_in listens = { .sin_family = AF_INET };
static char *bytes;
static struct tp_datagram dgrams[MANY];

static struct sockaddr *sa(void *addr)
{
    return (struct sockaddr *)addr;
}

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void run(const char *command)
{
    if (system(command) != 0)
        errx(1, "%s", command);
}

/* Joins two network namespaces by a veth pair. This process stays in the proxy's; the other one is the client's. */
static void build(void)
{
    char command[400];
    int here = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    if (here < 0 || unshare(CLONE_NEWNET) != 0)
        err(1, "unshare(CLONE_NEWNET)");
    int there = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    setns(here, CLONE_NEWNET);
    snprintf(command, sizeof command,
             "ip link set lo up && ip link add eth0 type veth peer name eth0 netns /proc/%d/fd/%d && "
             "ip addr add 198.51.100.1/24 dev eth0 && ip link set eth0 up",
             getpid(), there);
    run(command);
    setns(there, CLONE_NEWNET);
    run("ip link set lo up && ip addr add 198.51.100.2/24 dev eth0 && ip link set eth0 up && "
        "ip route add default via 198.51.100.1");
    client.sin_addr.s_addr = htonl(0xc6336402);
    client.sin_port = htons(9000);
    sink = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sender = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    /* The sender is measured: the receiver drops datagrams at little cost, and takes GSO packets in one piece. */
    int little = 1;
    setsockopt(sink, SOL_UDP, UDP_GRO, &on, sizeof on);
    setsockopt(sink, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
    if (bind(sink, sa(&client), sizeof client) != 0)
        err(1, "bind");
    setns(here, CLONE_NEWNET);
}

/* Returns the n-th source of 50 addresses x 20 ports. Consecutive sources differ in address and port. */
static struct sockaddr_in source(unsigned n)
{
    struct sockaddr_in from = { .sin_family = AF_INET };
    from.sin_addr.s_addr = htonl(0xcb007100 + 1 + n * 7 % SOURCES);
    from.sin_port = htons((uint16_t)(5000 + n * 13 % PORTS));
    return from;
}

static void by_library(unsigned count, size_t len, bool one_flow, unsigned at_once)
{
    static struct tp_replier *replier;
    if (replier == NULL && tp_replier_open(NULL, 0, &replier) != 0)
        errx(1, "%s", tp_last_error());
    for (unsigned done = 0; done < count; done += at_once) {
        for (unsigned i = 0; i < at_once; i++) {
            struct sockaddr_in from = source(one_flow ? 0 : done + i);
            memcpy(&dgrams[i].client, &client, sizeof client);
            memcpy(&dgrams[i].orig_dst, &from, sizeof from);
            dgrams[i].data = bytes + i % BATCH * SEGMENT;
            dgrams[i].len = len;
            dgrams[i].segment_len = 0;
        }
        if (tp_reply(replier, dgrams, at_once) != (int)at_once)
            errx(1, "tp_reply: %s", strerror(dgrams[0].error));
    }
}

static void by_few(unsigned count, size_t len, bool one_flow)
{
    by_library(count, len, one_flow, BATCH);
}

static void by_many(unsigned count, size_t len, bool one_flow)
{
    by_library(count, len, one_flow, MANY);
}

/* The usual C code: one socket per reply, bound to the source. */
static void by_socket_each(unsigned count, size_t len, bool one_flow)
{
    for (unsigned i = 0; i < count; i++) {
        struct sockaddr_in from = source(one_flow ? 0 : i);
        int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_IP, IP_TRANSPARENT, &on, sizeof on);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, sa(&from), sizeof from) != 0 || sendto(fd, bytes, len, 0, sa(&client), sizeof client) < 0)
            err(1, "one socket per reply");
        close(fd);
    }
}

/* The upper limit of one system call per datagram: one source address, so this is no transparent proxy. */
static void by_sendto(unsigned count, size_t len, bool one_flow)
{
    static int fd = -1;
    (void)one_flow;
    if (fd < 0)
        fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    for (unsigned i = 0; i < count; i++)
        if (sendto(fd, bytes, len, 0, sa(&client), sizeof client) < 0)
            err(1, "sendto");
}

typedef void way(unsigned count, size_t len, bool one_flow);

static int ascending(const void *a, const void *b)
{
    double difference = *(const double *)a - *(const double *)b;
    return (difference > 0) - (difference < 0);
}

struct figure {
    double median, low, high;
};

static struct figure figure_of(double *values)
{
    qsort(values, ROUNDS, sizeof *values, ascending);
    return (struct figure){ values[ROUNDS / 2], values[0], values[ROUNDS - 1] };
}

/* Measures the datagrams per second of several ways, in turns. */
static void rates(way *const *ways, const unsigned *counts, unsigned n, size_t len, bool one_flow, struct figure *out)
{
    double values[4][ROUNDS];
    for (unsigned i = 0; i < n; i++)
        ways[i](MANY, len, one_flow);
    for (unsigned round = 0; round < ROUNDS; round++) {
        for (unsigned i = 0; i < n; i++) {
            unsigned count = quick ? counts[i] / 100 : counts[i];
            double start = seconds(CLOCK_MONOTONIC);
            ways[i](count, len, one_flow);
            values[i][round] = count / (seconds(CLOCK_MONOTONIC) - start);
        }
    }
    for (unsigned i = 0; i < n; i++)
        out[i] = figure_of(values[i]);
}

enum { TRAIN = 50, TRAINS = 64 };

/* Fills the listener's queue with UDP_SEGMENT trains of datagrams of one length, as a sender at full load does. */
static unsigned fill(void)
{
    uint16_t segment = SEGMENT;
    setsockopt(sender, SOL_UDP, UDP_SEGMENT, &(int){ segment }, sizeof(int));
    for (unsigned i = 0; i < TRAINS; i++)
        if (sendto(sender, bytes, (size_t)TRAIN * SEGMENT, 0, sa(&listens), sizeof listens) < 0)
            err(1, "sendto");
    return TRAIN * TRAINS;
}

/* One recvmsg(2) per datagram; the CMSG macros read its control data. */
static unsigned receive_one_by_one(void)
{
    static char buffer[65536];
    unsigned received = 0;
    for (;;) {
        struct sockaddr_storage from;
        struct sockaddr_in to = { 0 };
        union {
            char bytes[256];
            struct cmsghdr align;
        } control;
        struct iovec part = { buffer, sizeof buffer };
        struct msghdr msg = { .msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &part, .msg_iovlen = 1,
                              .msg_control = &control, .msg_controllen = sizeof control };
        if (recvmsg(listener, &msg, MSG_DONTWAIT) < 0)
            break;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c != NULL; c = CMSG_NXTHDR(&msg, c))
            if (c->cmsg_level == SOL_IP && c->cmsg_type == IP_ORIGDSTADDR)
                memcpy(&to, CMSG_DATA(c), sizeof to);
        if (to.sin_port != listens.sin_port)
            errx(1, "no original destination");
        received++;
    }
    return received;
}

static unsigned receive_by_library(void)
{
    static char *rooms;
    unsigned received = 0;
    int n;
    if (rooms == NULL)
        rooms = malloc((size_t)BATCH * 65536);
    for (unsigned i = 0; i < BATCH; i++) {
        dgrams[i].data = rooms + (size_t)i * 65536;
        dgrams[i].capacity = 65536;
    }
    while ((n = tp_recv_datagrams(listener, dgrams, BATCH, MSG_DONTWAIT)) > 0) {
        for (int i = 0; i < n; i++) {
            if (((struct sockaddr_in *)&dgrams[i].orig_dst)->sin_port != listens.sin_port)
                errx(1, "no original destination");
            unsigned each = dgrams[i].segment_len;
            received += each == 0 ? 1 : (unsigned)((dgrams[i].len + each - 1) / each);
        }
    }
    return received;
}

/* Measures the CPU time in microseconds per received datagram, while the listener's queue is filled this many times. */
static double cost(bool library, unsigned fills)
{
    setsockopt(listener, SOL_UDP, UDP_GRO, &(int){ library }, sizeof(int));
    double used = 0;
    unsigned received = 0;
    for (unsigned i = 0; i < fills; i++) {
        unsigned sent = fill();
        double start = seconds(CLOCK_THREAD_CPUTIME_ID);
        unsigned n = library ? receive_by_library() : receive_one_by_one();
        used += seconds(CLOCK_THREAD_CPUTIME_ID) - start;
        if (n != sent)
            errx(1, "%u datagrams sent, %u received", sent, n);
        received += n;
    }
    return used * 1e6 / received;
}

static int missed;

static void target(const char *what, double ratio, double wanted, bool at_least)
{
    bool met = at_least ? ratio >= wanted : ratio <= wanted;
    missed += !met;
    printf("  %-58s %7.2f x  (%s %.2f: %s)\n", what, ratio, at_least ? "at least" : "at most", wanted, met ? "met" : "missed");
}

static void print(const char *what, struct figure figure, double unit, const char *of)
{
    printf("  %-42s %9.1f %-8s (%.1f-%.1f)\n", what, figure.median / unit, of, figure.low / unit, figure.high / unit);
}

int main(int argc, char **argv)
{
    quick = getenv("QUICK") != NULL;
    bytes = calloc(BATCH, SEGMENT);
    build();
    listens.sin_addr.s_addr = htonl(0xc6336401);
    listens.sin_port = htons(7000);
    listener = tp_socket(AF_INET, SOCK_DGRAM, 0);
    int much = 64 << 20;
    setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, &much, sizeof much);
    setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &much, sizeof much);
    if (listener < 0 || tp_bind_nonlocal(listener, sa(&listens), sizeof listens) != 0)
        errx(1, "%s", tp_last_error());

    static way *const ways[] = { by_few, by_socket_each, by_sendto, by_many };
    if (argc == 3) {
        unsigned count = (unsigned)atoi(argv[2]);
        if (strcmp(argv[1], "reply") == 0)
            by_few(count, 100, false);
        else if (strcmp(argv[1], "many") == 0)
            by_many(count, 100, false);
        else if (strcmp(argv[1], "sendto") == 0)
            by_sendto(count, 100, false);
        else if (strcmp(argv[1], "segments") == 0)
            by_few(count, SEGMENT, true);
        else
            for (unsigned done = 0; done < count; done += TRAIN * TRAINS)
                cost(strcmp(argv[1], "receive") == 0, 1);
        return 0;
    }

    struct figure figures[4];
    printf("replies of 100 bytes from 50 addresses x 20 ports: median of %d (minimum-maximum)\n", ROUNDS);
    rates(ways, (unsigned[]){ 128000, 32000, 128000, 128000 }, 4, 100, false, figures);
    print("tp_reply, batch of 64", figures[0], 1e3, "k/s");
    print("tp_reply, batch of 256", figures[3], 1e3, "k/s");
    print("one socket per reply", figures[1], 1e3, "k/s");
    print("sendto(2), one source address", figures[2], 1e3, "k/s");
    target("batch of 64, relative to one socket per reply", figures[0].median / figures[1].median, 2.3, true);
    target("batch of 64, relative to sendto(2)", figures[0].median / figures[2].median, 1.0, true);
    target("batch of 256, relative to sendto(2)", figures[3].median / figures[2].median, 1.0, true);

    printf("replies of 1,200 bytes, batches of 64 of one flow (UDP_SEGMENT)\n");
    rates(ways, (unsigned[]){ 1280000, 32000 }, 2, SEGMENT, true, figures);
    print("tp_reply, batch of 64", figures[0], 1e3, "k/s");
    print("one socket per reply", figures[1], 1e3, "k/s");
    target("batch of 64, relative to one socket per reply", figures[0].median / figures[1].median, 20, true);

    printf("datagrams of 1,200 bytes received at full load, CPU time per datagram\n");
    double values[2][ROUNDS];
    for (unsigned round = 0; round < ROUNDS; round++)
        for (unsigned i = 0; i < 2; i++)
            values[i][round] = cost(i == 0, quick ? 2 : 20);
    figures[0] = figure_of(values[0]);
    figures[1] = figure_of(values[1]);
    print("tp_recv_datagrams with UDP_GRO", figures[0], 0.001, "ns");
    print("recvmsg(2), one per datagram", figures[1], 0.001, "ns");
    target("tp_recv_datagrams, relative to recvmsg(2)", figures[0].median / figures[1].median, 1.0 / 3, false);
    return missed != 0;
}
