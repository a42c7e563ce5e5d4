/* pthread_cancel of a thread that is in a call of the library: the call ends as it would have, the thread at its next
 * cancellation point, and the program lives. Run in a network namespace of its own.
 *
 *     cancel CALL...: each in a thread that is cancelled while it is in the call */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <tproxy.h>
#include <unistd.h>

#include "limit.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            printf("%s, line %d: %s; %s; %s\n", call, __LINE__, #condition, strerror(errno), tp_last_error()); \
            exit(1); \
        } \
    } while (0)

static const char *call;
static int cleaned, calls;
static struct sockaddr_in here = { .sin_family = AF_INET };

static void clean_up(void *unused)
{
    (void)unused;
    cleaned = 1;
}

static void report(const struct tp_finding *finding, void *context)
{
    (void)finding, (void)context;
}

/* One call; those that wait for a datagram get it from wake(). */
static void make_call(int fd)
{
    char buffer[100];
    struct tp_datagram datagram = { .data = buffer, .capacity = sizeof buffer };
    struct tp_rules_config config = { .listen_addr = (struct sockaddr *)&here, .listen_addrlen = sizeof here };
    tp_rules *rules;
    if (strcmp(call, "recvfrom") == 0)
        CHECK(tp_recvfrom(fd, buffer, sizeof buffer, 0, NULL, NULL, NULL, NULL) == 4);
    else if (strcmp(call, "recv_datagrams") == 0)
        CHECK(tp_recv_datagrams(fd, &datagram, 1, 0) == 1);
    else if (strcmp(call, "connect") == 0) {
        struct sockaddr_in closed = here;
        closed.sin_port = htons(1);
        CHECK(tp_connect_from((struct sockaddr *)&here, sizeof here, (struct sockaddr *)&closed, sizeof closed, 0) == -1);
    } else if (strcmp(call, "socket-error") == 0)
        CHECK(tp_listen((struct sockaddr *)&here, 3, -1, 0) == -1);
    else if (strcmp(call, "self_test") == 0)
        CHECK(tp_self_test(&config, sizeof config, report, NULL) >= 0);
    else if (strcmp(call, "check") == 0)
        CHECK(tp_check(report, NULL) >= 0);
    else if (strcmp(call, "purge") == 0)
        CHECK(tp_purge_rules("none") == 0);
    else if (strcmp(call, "install") == 0 || strcmp(call, "iptables") == 0) {
        config.backend = strcmp(call, "iptables") == 0 ? TP_BACKEND_IPTABLES : TP_BACKEND_NFT;
        CHECK(tp_install_rules(&config, sizeof config, &rules) == 0 && tp_remove_rules(rules) == 0);
    } else if (strcmp(call, "reply") == 0) {
        tp_replier *replier;
        CHECK(tp_replier_open(NULL, 0, &replier) == 0);
        memcpy(&datagram.client, &here, sizeof here);
        memcpy(&datagram.orig_dst, &here, sizeof here);
        CHECK(tp_reply(replier, &datagram, 1) == 1);
        tp_replier_close(replier);
    } else {
        printf("no such call: %s\n", call);
        exit(2);
    }
    __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
}

static void *body(void *fd)
{
    pthread_cleanup_push(clean_up, NULL);
    for (;;) {
        make_call(*(int *)fd);
        /* The program's own cancellation point. */
        pthread_testcancel();
    }
    pthread_cleanup_pop(1);
    return NULL;
}

int main(int argc, char **argv)
{
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 1; i < argc; i++) {
        call = argv[i];
        cleaned = calls = 0;
        here.sin_port = htons(4000 + i);
        int fd = tp_socket(AF_INET, SOCK_DGRAM, 0);
        CHECK(fd >= 0 && tp_bind_nonlocal(fd, (struct sockaddr *)&here, sizeof here) == 0);
        int waits = strncmp(call, "recv", 4) == 0;
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, body, &fd) == 0);
        /* It is in the call by then, or in one of the next. */
        while (!waits && __atomic_load_n(&calls, __ATOMIC_SEQ_CST) == 0)
            usleep(1000);
        usleep(50000);
        CHECK(pthread_cancel(thread) == 0);
        void *result;
        if (waits) {
            /* Cancellation does not end the wait; a datagram does. */
            struct timespec until;
            clock_gettime(CLOCK_REALTIME, &until);
            until.tv_nsec += limit(100) * 1000000LL;
            until.tv_sec += until.tv_nsec / 1000000000, until.tv_nsec %= 1000000000;
            CHECK(pthread_timedjoin_np(thread, &result, &until) == ETIMEDOUT);
            CHECK(sendto(fd, "wake", 4, 0, (struct sockaddr *)&here, sizeof here) == 4);
        }
        CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED && cleaned && calls >= 1);
        close(fd);
    }
    return 0;
}
