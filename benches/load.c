/*
 * Both ends of the relay benchmark: the server, and the clients that measure.
 *
 *     load serve
 *     load short CLIENTS SECONDS ADDRESS    connect, ask, read the answer to its end
 *     load kept CLIENTS SECONDS ADDRESS     ask again and again, on one connection each
 *     load bulk CLIENTS SECONDS ADDRESS     read as much as there is
 *     load idle COUNT ADDRESS               connect, get an answer, and hold it until standard input ends
 *
 * A client prints a line of JSON: how many, how many failed, bytes, seconds, and
 * microseconds at which 50, 99 and 99.9 in a hundred were done.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
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

enum { PORT = 80, REQUEST = 100, ANSWER = 1000, CHUNK = 256 * 1024, SERVERS = 160, MAX_CLIENTS = 128 };

static struct sockaddr_storage server_addr;
static socklen_t server_len;
static double until;

struct client {
    pthread_t thread;
    char mode;
    uint64_t failed, bytes;
    size_t n, room;
    float *times;    /* microseconds */
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

static bool read_all(int fd, char *place, size_t len)
{
    for (size_t got = 0; got < len;) {
        ssize_t n = recv(fd, place + got, len - got, 0);
        if (n <= 0)
            return false;
        got += (size_t)n;
    }
    return true;
}

/* ---- The server: what the first byte of a request asks for. ---- */

static void *serve(void *argument)
{
    int listener = *(int *)argument;
    char *chunk = calloc(1, CHUNK), request[REQUEST];
    int pages = memfd_create("pages", MFD_CLOEXEC);
    if (write(pages, chunk, CHUNK) != CHUNK)
        err(1, "memfd");
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        while (read_all(fd, request, REQUEST)) {
            if (request[0] == 'b')
                while (send(fd, chunk, CHUNK, MSG_NOSIGNAL) > 0)
                    ;
            if (request[0] == 'z')
                for (off_t at = 0; sendfile(fd, pages, &at, CHUNK) > 0; at = 0)
                    ;
            if (send(fd, chunk, ANSWER, MSG_NOSIGNAL) != ANSWER || request[0] == 's')
                break;
            /* Another thread holds what is idle. */
            if (request[0] == 'i')
                goto held;
        }
        close(fd);
    held:;
    }
    return NULL;
}

static void serve_all(void)
{
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(PORT) };
    set(listener, SOL_SOCKET, SO_REUSEADDR);
    set(listener, IPPROTO_TCP, TCP_NODELAY);
    if (bind(listener, (struct sockaddr *)&any, sizeof any) != 0 || listen(listener, 65535) != 0)
        err(1, "listen");
    pthread_t thread;
    for (int i = 0; i < SERVERS; i++)
        if (pthread_create(&thread, NULL, serve, &listener) != 0)
            errx(1, "pthread_create");
    printf("listening\n");
    pause();
}

/* ---- Clients. ---- */

static int dial(void)
{
    int fd = socket(server_addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        err(1, "socket");
    set(fd, IPPROTO_TCP, TCP_NODELAY);
    /* A relay that is stuck is to be seen as a failure, and not to hang the measurement. */
    struct timeval patience = { .tv_sec = 10 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&server_addr, server_len) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void note(struct client *client, double start)
{
    if (client->n == client->room) {
        client->room = client->room * 2 + 4096;
        client->times = realloc(client->times, client->room * sizeof *client->times);
        if (client->times == NULL)
            err(1, "realloc");
    }
    client->times[client->n++] = (float)((now() - start) * 1e6);
}

static void short_ones(struct client *client)
{
    char request[REQUEST] = "s", answer[ANSWER + 1];
    while (now() < until) {
        double start = now();
        int fd = dial();
        bool good = fd >= 0 && send(fd, request, REQUEST, MSG_NOSIGNAL) == REQUEST && read_all(fd, answer, ANSWER) &&
                    recv(fd, answer, 1, 0) == 0;
        if (fd >= 0)
            close(fd);
        if (good)
            note(client, start);
        else
            client->failed++;
        client->bytes += good ? ANSWER : 0;
    }
}

static void kept(struct client *client)
{
    char request[REQUEST] = "k", answer[ANSWER];
    int fd = dial();
    while (now() < until) {
        double start = now();
        if (fd < 0 || send(fd, request, REQUEST, MSG_NOSIGNAL) != REQUEST || !read_all(fd, answer, ANSWER)) {
            client->failed++;
            break;
        }
        note(client, start);
        client->bytes += ANSWER;
    }
    close(fd);
}

static void bulk(struct client *client)
{
    char request[REQUEST] = { client->mode }, *chunk = malloc(CHUNK);
    int flags = client->mode == 'z' ? MSG_TRUNC : 0;
    int fd = dial();
    if (fd < 0 || send(fd, request, REQUEST, MSG_NOSIGNAL) != REQUEST)
        client->failed++;
    while (client->failed == 0 && now() < until) {
        ssize_t n = recv(fd, chunk, CHUNK, flags);
        if (n <= 0)
            client->failed++;
        else
            client->bytes += (uint64_t)n;
    }
    close(fd);
    free(chunk);
}

static void *run(void *argument)
{
    struct client *client = argument;
    if (client->mode == 's')
        short_ones(client);
    else if (client->mode == 'k')
        kept(client);
    else
        bulk(client);
    return NULL;
}

static int by_time(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void measure(char mode, int n, double seconds)
{
    struct client clients[MAX_CLIENTS] = { 0 };
    double start = now();
    until = start + seconds;
    for (int i = 0; i < n; i++) {
        clients[i].mode = mode;
        if (pthread_create(&clients[i].thread, NULL, run, &clients[i]) != 0)
            errx(1, "pthread_create");
    }
    struct client sum = { 0 };
    for (int i = 0; i < n; i++) {
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
        int fd = dial();
        if (fd < 0 || send(fd, request, REQUEST, MSG_NOSIGNAL) != REQUEST || !read_all(fd, answer, ANSWER))
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
    } else if (argc == 5 && strchr("skbz", argv[1][0]) != NULL && atoi(argv[2]) > 0 && atoi(argv[2]) <= MAX_CLIENTS) {
        set_server(argv[4]);
        measure(argv[1][0], atoi(argv[2]), atof(argv[3]));
    } else {
        errx(2, "usage: see the head of the source");
    }
    return 0;
}
