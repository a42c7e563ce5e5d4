/* Tests pthread_cancel of a thread in a call of the library: the call ends as without it, the thread ends at its next
 * cancellation point, and the program continues. Needs a network namespace.
 *
 *     cancel CALL...   cancels a thread during each of the calls
 *     cancel           makes every call in a thread that was cancelled before, and prints the names of the calls */
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
static int cleaned, calls, accepted = -1;
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

/* Makes one call. main() sends the datagram or connection that recvfrom, recv_datagrams and accept wait for. */
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
    } else if (strcmp(call, "accept") == 0) {
        struct sockaddr_storage addr;
        socklen_t len = sizeof addr;
        /* close() would be a cancellation point here. */
        CHECK((accepted = tp_accept(fd, NULL, NULL, (struct sockaddr *)&addr, &len, TP_ACCEPT_TPROXY)) >= 0);
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
        /* A cancellation point of the program. */
        pthread_testcancel();
    }
    pthread_cleanup_pop(1);
    return NULL;
}

/* Names of the calls that were made. Printing them immediately would be a cancellation point. */
static const char *made[64];
static int n_made;

/* The thread was cancelled before: any cancellation point in a call would end it. Each call is made so that it succeeds, and so
 * that it fails, which formats a message. */
static void make_each_call(const int *stream)
{
    struct sockaddr *sa = (struct sockaddr *)&here, *bad = (struct sockaddr *)&(struct sockaddr){ .sa_family = AF_UNIX };
    struct sockaddr_storage addr;
    socklen_t len = sizeof addr;
    char buffer[100];
    struct msghdr msg = { 0 };
    struct tp_datagram datagram = { .data = buffer, .capacity = sizeof buffer };
    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = { .listen_addr = sa, .listen_addrlen = sizeof here, .ports = &http, .n_ports = 1 };
    struct tp_prefix prefix = { .family = AF_INET, .len = 32, .addr = { 192, 0, 2, 99 } };
    struct tp_rules_stats counted;
    struct tp_replier_stats replied;
    tp_rules *rules;
    tp_replier *replier;
    size_t size = 0;
    int fd, listener;
#define WORKS(name, condition) \
    do { \
        call = name; \
        CHECK(condition); \
        made[n_made++] = name; \
    } while (0)
    WORKS("tp_version", tp_version() != NULL);
    WORKS("tp_socket", (fd = tp_socket(AF_INET, SOCK_DGRAM, 0)) >= 0 && tp_socket(AF_INET, SOCK_DGRAM, 1U << 31) == -1);
    WORKS("tp_last_error", *tp_last_error() != 0);
    WORKS("tp_set_transparent", tp_set_transparent(fd) == 0 && tp_set_transparent(-1) == -1);
    WORKS("tp_bind_nonlocal", tp_bind_nonlocal(fd, sa, sizeof here) == 0 && tp_bind_nonlocal(fd, sa, sizeof here) == -1);
    WORKS("tp_recvfrom", tp_recvfrom(fd, buffer, sizeof buffer, MSG_DONTWAIT, NULL, NULL, NULL, NULL) == -1);
    WORKS("tp_recv_datagrams", tp_recv_datagrams(fd, &datagram, 1, MSG_DONTWAIT) == -1 && tp_recv_datagrams(-1, &datagram, 1, 0) == -1);
    WORKS("tp_msg_orig_dst", tp_msg_orig_dst(&msg, (struct sockaddr *)&addr, &len) == -1 && tp_msg_orig_dst(NULL, NULL, NULL) == -1);
    WORKS("tp_listen", (listener = tp_listen(sa, sizeof here, -1, 0)) >= 0 && tp_listen(sa, sizeof here, -1, 0) == -1 && tp_listen(bad, sizeof *bad, -1, 0) == -1);
    WORKS("tp_connect_from", tp_connect_from(sa, sizeof here, sa, sizeof here, 0) >= 0 && tp_connect_from(bad, sizeof *bad, sa, sizeof here, 0) == -1);
    CHECK((fd = socket(AF_INET, SOCK_STREAM, 0)) >= 0);
    WORKS("tp_connect_socket", tp_connect_socket(fd, sa, sizeof here, sa, sizeof here, 0) == 0 && tp_connect_socket(fd, sa, sizeof here, sa, sizeof here, 0) == -1);
    WORKS("tp_accept", tp_accept(listener, NULL, NULL, (struct sockaddr *)&addr, &len, TP_ACCEPT_TPROXY) >= 0 && tp_accept(fd, NULL, NULL, (struct sockaddr *)&addr, &len, 0) == -1);
    WORKS("tp_unmap_addr", tp_unmap_addr((struct sockaddr *)&addr, &len) == 0 && tp_unmap_addr(bad, &len) == -1);
    len = sizeof addr;
    WORKS("tp_orig_dst", tp_orig_dst(*stream, (struct sockaddr *)&addr, &len) == -1 && tp_orig_dst(-1, (struct sockaddr *)&addr, &len) == -1);
    WORKS("tp_replier_open", tp_replier_open(NULL, 0, &replier) == 0 && tp_replier_open(NULL, 0, NULL) == -1);
    memcpy(&datagram.client, &here, sizeof here);
    memcpy(&datagram.orig_dst, &here, sizeof here);
    datagram.len = 4;
    WORKS("tp_reply", tp_reply(replier, &datagram, 1) == 1 && tp_reply(NULL, &datagram, 1) == -1);
    WORKS("tp_replier_stats", tp_replier_stats(replier, &replied, sizeof replied) == 0 && replied.sent == 1);
    WORKS("tp_replier_close", (tp_replier_close(replier), 1));
    for (int i = 0; i < 2; i++) {
        config.backend = i == 0 ? TP_BACKEND_NFT : TP_BACKEND_IPTABLES;
        WORKS("tp_install_rules", tp_install_rules(&config, sizeof config, &rules) == 0 && tp_install_rules(&config, sizeof config, &rules) == -1);
        WORKS("tp_update_rules", tp_update_rules(rules, TP_SET_BYPASS, &prefix, 1, NULL, 0) == 0 && tp_update_rules(rules, 99, NULL, 0, NULL, 0) == -1);
        WORKS("tp_verify_rules", tp_verify_rules(rules, 99) == -1);
        WORKS("tp_list_rules", tp_list_rules(NULL, NULL) == -1);
        WORKS("tp_learn_addresses", tp_learn_addresses(rules, TP_SET_BYPASS, &prefix, 1, 9) == -i && tp_learn_addresses(rules, 99, NULL, 0, 9) == -1);
        WORKS("tp_replace_rules", tp_replace_rules(rules, &config, sizeof config) == 0 && tp_replace_rules(rules, &config, 1) == -1);
        WORKS("tp_rules_stats", tp_rules_stats(rules, &counted, sizeof counted) == 0 && tp_rules_stats(NULL, NULL, 0) == -1);
        WORKS("tp_read_stats", tp_read_stats(NULL, &counted, sizeof counted) == 0 && tp_read_stats("none", &counted, sizeof counted) == -1);
        WORKS("tp_purge_rules", tp_purge_rules(NULL) == 0 && tp_purge_rules("tproxy") == -1);
        WORKS("tp_self_test", tp_self_test(&config, sizeof config, report, NULL) >= 0 && tp_self_test(NULL, 0, report, NULL) == -1);
        WORKS("tp_remove_rules", tp_remove_rules(rules) == 0);
    }
    config.backend = TP_BACKEND_NFT;
    CHECK(tp_install_rules(&config, sizeof config, &rules) == 0);
    WORKS("tp_forget_rules", (tp_forget_rules(rules), 1));
    WORKS("tp_purge_rules", tp_purge_rules(NULL) == 0);
    WORKS("tp_check", tp_check(report, NULL) >= 0 && tp_check(NULL, NULL) == -1);
    WORKS("tp_render_rules", tp_render_rules(&config, sizeof config, TP_FORMAT_NFT, NULL, &size) == 0 && tp_render_rules(NULL, 0, 0, NULL, NULL) == -1);
}

static void *cancelled_before(void *stream)
{
    pthread_cleanup_push(clean_up, NULL);
    CHECK(pthread_cancel(pthread_self()) == 0);
    make_each_call(stream);
    calls = 1;
    pthread_testcancel();
    pthread_cleanup_pop(1);
    return NULL;
}

static void each_call_after_cancellation(void)
{
    int stream = socket(AF_INET, SOCK_STREAM, 0);
    pthread_t thread;
    void *result;
    here.sin_port = htons(4000);
    CHECK(stream >= 0 && pthread_create(&thread, NULL, cancelled_before, &stream) == 0);
    CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED && cleaned && calls == 1);
    for (int i = 0; i < n_made; i++)
        puts(made[i]);
}

int main(int argc, char **argv)
{
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (argc == 1)
        each_call_after_cancellation();
    for (int i = 1; i < argc; i++) {
        call = argv[i];
        cleaned = calls = 0;
        here.sin_port = htons(4000 + i);
        int accepts = strcmp(call, "accept") == 0, waits = accepts || strncmp(call, "recv", 4) == 0;
        int fd = accepts ? tp_listen((struct sockaddr *)&here, sizeof here, -1, 0) : tp_socket(AF_INET, SOCK_DGRAM, 0);
        CHECK(fd >= 0 && (accepts || tp_bind_nonlocal(fd, (struct sockaddr *)&here, sizeof here) == 0));
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, body, &fd) == 0);
        /* The thread is now in the call, or in one of the next calls. */
        while (!waits && __atomic_load_n(&calls, __ATOMIC_SEQ_CST) == 0)
            usleep(1000);
        usleep(50000);
        CHECK(pthread_cancel(thread) == 0);
        void *result;
        if (waits) {
            /* Cancellation does not end the wait; a datagram or a connection does. */
            struct timespec until;
            clock_gettime(CLOCK_REALTIME, &until);
            until.tv_nsec += limit(100) * 1000000LL;
            until.tv_sec += until.tv_nsec / 1000000000, until.tv_nsec %= 1000000000;
            CHECK(pthread_timedjoin_np(thread, &result, &until) == ETIMEDOUT);
            if (accepts) {
                int client = socket(AF_INET, SOCK_STREAM, 0);
                CHECK(connect(client, (struct sockaddr *)&here, sizeof here) == 0 && close(client) == 0);
            } else
                CHECK(sendto(fd, "wake", 4, 0, (struct sockaddr *)&here, sizeof here) == 4);
        }
        CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED && cleaned && calls >= 1);
        close(fd);
        if (accepts)
            CHECK(close(accepted) == 0);
    }
    return 0;
}
