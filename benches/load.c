/*
 * The server of the relay benchmark, and the clients that measure. Both share
 * the CPUs with the relay, so they use little: one thread each, except for
 * streams, which have one thread per connection.
 *
 *     load serve
 *     load short CLIENTS SECONDS ADDRESS [NETNS]   connect, send a request, read the response to its end, close
 *     load kept CLIENTS SECONDS ADDRESS [NETNS]    send requests on one connection per client
 *     load bulk CLIENTS SECONDS ADDRESS            read one stream per client
 *     load z CLIENTS SECONDS ADDRESS               the same, with sendfile(2) and MSG_TRUNC: neither end copies
 *     load idle COUNT ADDRESS                      make connections, and hold them until standard input ends
 *
 * NETNS is the path of the server's network namespace. If it is given, client
 * and server are one thread that never sleeps, and no `load serve` is needed.
 *
 * A client prints one line of JSON: the number of connections or requests, the
 * number that failed, bytes, seconds, and the latency in microseconds at
 * percentiles 50, 99 and 99.9.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 80, REQUEST = 100, ANSWER = 1000, CHUNK = 256 * 1024, EVENTS = 64, MAX_CLIENTS = 128, PATIENCE = 10 };

static struct sockaddr_storage server_addr;
static socklen_t server_len;
static double until;

/* A client makes short connections one after the other, or keeps one connection. */
struct client {
    pthread_t thread;
    char mode;
    int fd;
    size_t got;             /* bytes of the current response */
    bool asked;
    double start;
    uint64_t failed, bytes;
    size_t n, room;
    float *times;           /* latencies in microseconds */
};

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void set(int fd, int level, int option)
{
    if (setsockopt(fd, level, option, &(int){ 1 }, sizeof(int)) != 0)
        err(1, "setsockopt");
}

/* Adds a descriptor to epoll. Its events carry the client, or the descriptor with bit 0 set if it is the server's. */
static void watch(int epoll_fd, int fd, uint32_t events, struct client *client)
{
    struct epoll_event event = { .events = events, .data.ptr = client };
    if (client == NULL)
        event.data.u64 = (uint64_t)fd << 1 | 1;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        err(1, "epoll_ctl");
}

/* ---- The server. The first byte of a request is the mode. ---- */

struct stream {
    int fd;
    char mode;
};

static char chunk[CHUNK];
static int pages;

static void *serve_stream(void *argument)
{
    struct stream stream = *(struct stream *)argument;
    free(argument);
    fcntl(stream.fd, F_SETFL, 0);
    if (stream.mode == 'b')
        while (send(stream.fd, chunk, CHUNK, MSG_NOSIGNAL) > 0)
            ;
    else
        for (off_t at = 0; sendfile(stream.fd, pages, &at, CHUNK) > 0; at = 0)
            ;
    close(stream.fd);
    return NULL;
}

static void start_stream(int fd, char mode)
{
    pthread_t thread;
    struct stream *stream = malloc(sizeof *stream);
    if (stream == NULL)
        err(1, "malloc");
    *stream = (struct stream){ .fd = fd, .mode = mode };
    if (pthread_create(&thread, NULL, serve_stream, stream) != 0)
        errx(1, "pthread_create");
    pthread_detach(thread);
}

/* A request arrives in one piece: it is short, and the client sends it with one call. */
static void serve(int epoll_fd, int fd)
{
    char request[REQUEST];
    ssize_t n;
    while ((n = recv(fd, request, REQUEST, 0)) == REQUEST) {
        if (request[0] == 'b' || request[0] == 'z') {
            epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
            start_stream(fd, request[0]);
            return;
        }
        if (send(fd, chunk, ANSWER, MSG_NOSIGNAL) != ANSWER || request[0] == 's') {
            close(fd);
            return;
        }
    }
    if (n >= 0 || errno != EAGAIN)
        close(fd);
}

static int listener = -1;

static void listen_on(int epoll_fd)
{
    listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(PORT) };
    set(listener, SOL_SOCKET, SO_REUSEADDR);
    set(listener, IPPROTO_TCP, TCP_NODELAY);
    if (bind(listener, (struct sockaddr *)&any, sizeof any) != 0 || listen(listener, 65535) != 0)
        err(1, "listen");
    pages = memfd_create("pages", MFD_CLOEXEC);
    if (write(pages, chunk, CHUNK) != CHUNK)
        err(1, "memfd");
    watch(epoll_fd, listener, EPOLLIN, NULL);
}

static void on_server(int epoll_fd, int fd)
{
    if (fd != listener) {
        serve(epoll_fd, fd);
        return;
    }
    fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0)
        watch(epoll_fd, fd, EPOLLIN | EPOLLRDHUP | EPOLLET, NULL);
}

static void serve_all(void)
{
    int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    listen_on(epoll_fd);
    printf("listening\n");
    for (struct epoll_event events[EVENTS];;) {
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++)
            on_server(epoll_fd, (int)(events[i].data.u64 >> 1));
    }
}

/* ---- Clients. ---- */

static int dial(int flags)
{
    int fd = socket(server_addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0)
        err(1, "socket");
    set(fd, IPPROTO_TCP, TCP_NODELAY);
    /* If the relay is stuck, the measurement fails instead of hanging. */
    struct timeval patience = { .tv_sec = PATIENCE };
    if (flags == 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&server_addr, server_len) != 0 && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

static void note(struct client *client)
{
    if (client->n == client->room) {
        client->room = client->room * 2 + 4096;
        client->times = realloc(client->times, client->room * sizeof *client->times);
        if (client->times == NULL)
            err(1, "realloc");
    }
    client->times[client->n++] = (float)((now() - client->start) * 1e6);
    client->bytes += ANSWER;
}

static void ask(struct client *client)
{
    char request[REQUEST] = { client->mode };
    client->got = 0;
    client->asked = send(client->fd, request, REQUEST, MSG_NOSIGNAL) == REQUEST;
}

/* Starts the next connection. The request is sent once it is established. */
static bool begin(int epoll_fd, struct client *client)
{
    client->start = now();
    client->asked = false;
    client->fd = dial(SOCK_NONBLOCK);
    if (client->fd >= 0)
        watch(epoll_fd, client->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, client);
    else
        client->failed++;
    return client->fd >= 0;
}

/* Handles an event of a client. Returns whether the client continues. */
static bool next(int epoll_fd, struct client *client)
{
    static char answer[2 * ANSWER];
    if (!client->asked)
        ask(client);
    ssize_t n;
    while ((n = recv(client->fd, answer, sizeof answer, 0)) > 0) {
        client->got += (size_t)n;
        if (client->mode == 'k' && client->got == ANSWER) {
            note(client);
            client->start = now();
            if (client->start >= until)
                break;
            ask(client);
        }
    }
    if (n < 0 && errno == EAGAIN)
        return true;
    close(client->fd);
    bool good = client->mode == 's' ? n == 0 && client->got == ANSWER : n > 0;
    if (good && client->mode == 's')
        note(client);
    client->failed += !good;
    return client->mode == 's' && now() < until && begin(epoll_fd, client);
}

/*
 * Runs all clients of modes "short" and "kept" in this thread. If the server's
 * network namespace is given, the server runs in this thread too, and the
 * thread polls instead of sleeping: the relay then spends no time on waking it.
 */
static void ask_all(struct client *clients, int count, const char *network)
{
    int epoll_fd = epoll_create1(EPOLL_CLOEXEC), going = 0;
    struct epoll_event events[EVENTS];
    if (network != NULL) {
        int ours = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), other = open(network, O_RDONLY | O_CLOEXEC);
        if (ours < 0 || other < 0 || setns(other, CLONE_NEWNET) != 0)
            err(1, "%s", network);
        listen_on(epoll_fd);
        if (setns(ours, CLONE_NEWNET) != 0)
            err(1, "setns");
    }
    for (int i = 0; i < count; i++)
        going += begin(epoll_fd, &clients[i]);
    for (double quiet = now(); going > 0;) {
        int n = epoll_wait(epoll_fd, events, EVENTS, network != NULL ? 0 : PATIENCE * 1000);
        if (n > 0)
            quiet = now();
        /* If the relay is stuck, the measurement fails instead of hanging. */
        if (n < 0 || (n == 0 && now() - quiet >= PATIENCE)) {
            for (int i = 0; i < count; i++)
                clients[i].failed++;
            break;
        }
        for (int i = 0; i < n; i++) {
            if ((events[i].data.u64 & 1) != 0)
                on_server(epoll_fd, (int)(events[i].data.u64 >> 1));
            else
                going -= !next(epoll_fd, events[i].data.ptr);
        }
    }
    close(epoll_fd);
}

static void *stream(void *argument)
{
    struct client *client = argument;
    char request[REQUEST] = { client->mode }, *place = malloc(CHUNK);
    int flags = client->mode == 'z' ? MSG_TRUNC : 0;
    int fd = dial(0);
    if (fd < 0 || send(fd, request, REQUEST, MSG_NOSIGNAL) != REQUEST)
        client->failed++;
    while (client->failed == 0 && now() < until) {
        ssize_t n = recv(fd, place, CHUNK, flags);
        if (n <= 0)
            client->failed++;
        else
            client->bytes += (uint64_t)n;
    }
    close(fd);
    free(place);
    return NULL;
}

static int by_time(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void measure(char mode, int n, double seconds, const char *network)
{
    struct client clients[MAX_CLIENTS] = { 0 };
    double start = now();
    until = start + seconds;
    bool streams = mode == 'b' || mode == 'z';
    for (int i = 0; i < n; i++) {
        clients[i].mode = mode;
        if (streams && pthread_create(&clients[i].thread, NULL, stream, &clients[i]) != 0)
            errx(1, "pthread_create");
    }
    if (!streams)
        ask_all(clients, n, network);
    struct client sum = { 0 };
    for (int i = 0; i < n; i++) {
        if (streams)
            pthread_join(clients[i].thread, NULL);
        sum.failed += clients[i].failed, sum.bytes += clients[i].bytes, sum.n += clients[i].n;
    }
    double end = now();
    sum.times = malloc((sum.n + 1) * sizeof *sum.times);
    for (size_t i = 0, at = 0; i < (size_t)n; at += clients[i++].n)
        if (clients[i].n != 0)
            memcpy(sum.times + at, clients[i].times, clients[i].n * sizeof *sum.times);
    qsort(sum.times, sum.n, sizeof *sum.times, by_time);
    double at[3] = { 0.5, 0.99, 0.999 };
    for (int i = 0; i < 3; i++)
        at[i] = sum.n == 0 ? 0 : sum.times[(size_t)(at[i] * (double)(sum.n - 1))];
    printf("{\"n\": %zu, \"failed\": %lu, \"bytes\": %lu, \"seconds\": %.4f, \"p50\": %.1f, \"p99\": %.1f, \"p999\": %.1f}\n",
           sum.n, (unsigned long)sum.failed, (unsigned long)sum.bytes, end - start, at[0], at[1], at[2]);
}

static void idle(long count)
{
    char request[REQUEST] = "i", answer[ANSWER];
    long good = 0;
    for (; good < count; good++) {
        int fd = dial(0);
        if (fd < 0 || send(fd, request, REQUEST, MSG_NOSIGNAL) != REQUEST ||
            recv(fd, answer, ANSWER, MSG_WAITALL) != ANSWER)
            break;
    }
    printf("{\"n\": %ld}\n", good);
    while (getchar() != EOF)
        ;
}

static void set_server(const char *text)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)&server_addr;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&server_addr;
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET, v4->sin_port = htons(PORT), server_len = sizeof *v4;
    } else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6, v6->sin6_port = htons(PORT), server_len = sizeof *v6;
    } else {
        errx(2, "%s: not an address", text);
    }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    /* sendfile(2) has no equivalent of MSG_NOSIGNAL. */
    signal(SIGPIPE, SIG_IGN);
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (argc == 2 && strcmp(argv[1], "serve") == 0) {
        serve_all();
    } else if (argc == 4 && strcmp(argv[1], "idle") == 0) {
        set_server(argv[3]);
        idle(atol(argv[2]));
    } else if ((argc == 5 || argc == 6) && strchr("skbz", argv[1][0]) != NULL && atoi(argv[2]) > 0 && atoi(argv[2]) <= MAX_CLIENTS) {
        set_server(argv[4]);
        measure(argv[1][0], atoi(argv[2]), atof(argv[3]), argv[5]);
    } else {
        errx(2, "usage: see the head of the source");
    }
    return 0;
}
