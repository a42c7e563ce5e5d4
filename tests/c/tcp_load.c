/*
 * A mixed load over TCP that checks every byte.
 *
 *     tcp_load serve
 *     tcp_load ask CLIENTS SECONDS ADDRESS SEED
 *
 * A connection begins with a header: the number of bytes in each direction, and
 * the side that resets the connection and at which byte, if any. Both sides send a
 * stream that is derived from the header, end it (half-close), and compare the
 * received stream. The client prints a line of JSON at the end:
 *
 *     whole     both streams were complete and correct
 *     cut       reset as the header specifies
 *     broken    ended early, and not as the header specifies: a process was killed
 *     refused   no connection
 *     wrong     an unexpected byte, or too many bytes
 *     stuck     no byte for 20 seconds (limit.h)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "limit.h"

enum { PORT = 80, CHUNK = 64 * 1024, MAX_CLIENTS = 512 };
enum { NOBODY, CLIENT, SERVER };    /* the side that resets the connection */

struct header {
    uint64_t seed;
    uint32_t length[3];    /* number of bytes that CLIENT and SERVER send */
    uint32_t cutter, after;
    uint32_t slow;         /* number of reads after which server and client pause */
};

enum end { WHOLE, CUT, BROKEN, WRONG, STUCK, REFUSED, ENDS };
static const char *const ends[] = { "whole", "cut", "broken", "wrong", "stuck", "refused" };

static struct sockaddr_storage server_addr;
static socklen_t server_len;
static double until;
static _Atomic uint64_t count[ENDS], bytes;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

/* Writes the bytes of a stream from an offset, a multiple of 8. */
static void stream(uint64_t seed, uint64_t from, char *place, size_t len)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = mixed(seed + (from + i) / 8);
        memcpy(place + i, &word, 8);
    }
}

static void reset(int fd)
{
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ .l_onoff = 1, .l_linger = 0 }, sizeof(struct linger));
}

/* Runs one side of a connection, and closes the descriptor. */
static enum end converse(int fd, const struct header *header, uint32_t me)
{
    uint32_t other = me == CLIENT ? SERVER : CLIENT;
    uint64_t mine = header->seed ^ me, theirs = header->seed ^ other;
    uint32_t sent = 0, got = 0, reads = 0;
    bool told = false, ended = false;
    static _Thread_local char out[CHUNK], in[CHUNK], expected[CHUNK + 8];
    uint32_t out_at = UINT32_MAX;

    while (!told || !ended) {
        if (header->cutter == me && sent + got >= header->after) {
            reset(fd);
            return CUT;
        }
        if (sent == header->length[me] && !told) {
            shutdown(fd, SHUT_WR);
            told = true;
        }
        struct pollfd poll_fd = { .fd = fd, .events = (short)((ended ? 0 : POLLIN) | (told ? 0 : POLLOUT)) };
        int n = poll(&poll_fd, 1, told && ended ? 0 : limit(20000));
        if (n == 0 && !(told && ended))
            return STUCK;
        if (poll_fd.revents & (POLLIN | POLLHUP | POLLERR) && !ended) {
            ssize_t len = recv(fd, in, CHUNK, MSG_DONTWAIT);
            if (len < 0 && errno != EAGAIN)
                return header->cutter == other ? CUT : BROKEN;
            if (len == 0) {
                ended = true;
                /* A side that breaks the connection resets it, and a killed process may do so too. */
                if (got != header->length[other])
                    return BROKEN;
            }
            if (len > 0) {
                uint32_t begin = got & ~7u;
                stream(theirs, begin, expected, (got - begin + (size_t)len + 7) & ~(size_t)7);
                if ((uint64_t)got + (size_t)len > header->length[other] || memcmp(expected + (got - begin), in, (size_t)len) != 0)
                    return WRONG;
                got += (uint32_t)len;
                atomic_fetch_add(&bytes, (uint64_t)len);
                if (header->slow != 0 && ++reads % header->slow == 0)
                    usleep(3000);
            }
        }
        if (poll_fd.revents & POLLOUT && !told) {
            uint32_t chunk = sent & ~(uint32_t)(CHUNK - 1);
            if (chunk != out_at)
                stream(mine, out_at = chunk, out, CHUNK);
            uint32_t len = header->length[me] - sent < CHUNK - (sent - chunk) ? header->length[me] - sent : CHUNK - (sent - chunk);
            ssize_t n_sent = send(fd, out + (sent - chunk), len, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n_sent < 0 && errno != EAGAIN)
                return header->cutter == other ? CUT : BROKEN;
            sent += n_sent > 0 ? (uint32_t)n_sent : 0;
        }
    }
    return WHOLE;
}

/* ---- The server. ---- */

static void *serve_one(void *argument)
{
    int fd = (int)(intptr_t)argument;
    struct header header;
    struct timeval patience = { .tv_sec = limit(20000) / 1000 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (recv(fd, &header, sizeof header, MSG_WAITALL) == sizeof header) {
        enum end end = converse(fd, &header, SERVER);
        if (end == WRONG || end == STUCK)
            fprintf(stderr, "server: %s\n", ends[end]);
    }
    close(fd);
    return NULL;
}

static void serve(void)
{
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(PORT) };
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int));
    if (bind(listener, (struct sockaddr *)&any, sizeof any) != 0 || listen(listener, 4096) != 0)
        err(1, "listen");
    printf("listening\n");
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 512 * 1024);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        pthread_t thread;
        if (fd >= 0 && pthread_create(&thread, &attr, serve_one, (void *)(intptr_t)fd) != 0)
            close(fd);
    }
}

/* ---- The clients. ---- */

/* Mostly small, sometimes megabytes. */
static uint32_t some_length(uint64_t random)
{
    uint32_t most = 1u << (random % 23);
    return (uint32_t)(mixed(random) % most);
}

static void *ask(void *argument)
{
    uint64_t random = *(uint64_t *)argument;
    while (now() < until) {
        struct header header = { .seed = random = mixed(random) };
        header.length[CLIENT] = some_length(random = mixed(random));
        header.length[SERVER] = some_length(random = mixed(random));
        random = mixed(random);
        header.cutter = random % 10 < 7 ? NOBODY : random % 2 ? CLIENT : SERVER;
        header.slow = random % 16 == 0 ? 4 : 0;
        header.after = (uint32_t)(mixed(random) % (header.length[CLIENT] + header.length[SERVER] + 1));
        int fd = socket(server_addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        struct timeval patience = { .tv_sec = limit(20000) / 1000 };
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        enum end end;
        if (fd < 0)
            err(1, "socket");
        if (connect(fd, (struct sockaddr *)&server_addr, server_len) != 0)
            end = errno == EINPROGRESS ? STUCK : REFUSED;
        else if (send(fd, &header, sizeof header, MSG_NOSIGNAL) != sizeof header)
            end = BROKEN;
        else
            end = converse(fd, &header, CLIENT);
        close(fd);
        count[end]++;
        if (end == REFUSED || end == BROKEN)
            usleep(10000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && strcmp(argv[1], "serve") == 0)
        serve();
    if (argc != 6 || strcmp(argv[1], "ask") != 0 || atoi(argv[2]) < 1 || atoi(argv[2]) > MAX_CLIENTS)
        errx(2, "usage: see the head of the source");
    struct sockaddr_in *v4 = (struct sockaddr_in *)&server_addr;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&server_addr;
    if (inet_pton(AF_INET, argv[4], &v4->sin_addr) == 1)
        v4->sin_family = AF_INET, v4->sin_port = htons(PORT), server_len = sizeof *v4;
    else if (inet_pton(AF_INET6, argv[4], &v6->sin6_addr) == 1)
        v6->sin6_family = AF_INET6, v6->sin6_port = htons(PORT), server_len = sizeof *v6;
    else
        errx(2, "%s: not an address", argv[4]);

    int n = atoi(argv[2]);
    until = now() + atof(argv[3]);
    pthread_t threads[MAX_CLIENTS];
    uint64_t seeds[MAX_CLIENTS];
    for (int i = 0; i < n; i++) {
        seeds[i] = mixed(strtoull(argv[5], NULL, 10) * MAX_CLIENTS + (uint64_t)i);
        if (pthread_create(&threads[i], NULL, ask, &seeds[i]) != 0)
            errx(1, "pthread_create");
    }
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    printf("{\"bytes\": %lu", (unsigned long)bytes);
    for (int i = 0; i < ENDS; i++)
        printf(", \"%s\": %lu", ends[i], (unsigned long)count[i]);
    printf("}\n");
    return 0;
}
