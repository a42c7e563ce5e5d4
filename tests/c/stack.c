/* How much stack each call needs, which the header states: programs with coroutines have small ones. Each call runs in a
 * thread whose stack was filled with a pattern before; what of the pattern is gone was used. Run in a network namespace.
 *
 * A call of the C library costs stack too (strerror_r, the dynamic linker's first look-up of a function); the program makes
 * each call once before it is measured. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tproxy.h>
#include <unistd.h>

#define STACK (1 << 20)
#define PREFIXES 20000

static const char *name;
static int listener, receiver, failed;
static struct sockaddr_in here = { .sin_family = AF_INET }, there = { .sin_family = AF_INET };
static struct tp_datagram datagrams[300];
static char memory[300][2000];
static tp_replier *replier;
static tp_rules *rules;
static struct tp_prefix prefixes[PREFIXES];
static struct tp_rules_config config = { .listeners = &listener, .n_listeners = 1 };
static char script[4 << 20];

static void report(const struct tp_finding *finding, void *context)
{
    (void)finding, (void)context;
}

static int calls(void)
{
    struct sockaddr_storage addr;
    socklen_t len = sizeof addr;
    struct tp_rules_stats stats;
    size_t size = sizeof script;
    int n;
    if (strcmp(name, "tp_socket") == 0)
        return close(tp_socket(AF_INET6, SOCK_DGRAM, 0));
    if (strcmp(name, "tp_socket, an error") == 0)
        return tp_socket(AF_UNIX, SOCK_STREAM, 0);
    if (strcmp(name, "tp_listen") == 0)
        return close(tp_listen((struct sockaddr *)&there, sizeof there, -1, 0));
    if (strcmp(name, "tp_bind_nonlocal, an error") == 0)
        return tp_bind_nonlocal(receiver, (struct sockaddr *)&there, sizeof there);
    if (strcmp(name, "tp_connect_from") == 0)
        return close(tp_connect_from((struct sockaddr *)&here, sizeof here, (struct sockaddr *)&here, sizeof here, TP_NONBLOCK));
    if (strcmp(name, "tp_connect_from, an error") == 0)
        return tp_connect_from((struct sockaddr *)&here, sizeof here, (struct sockaddr *)&there, sizeof there, 0);
    if (strcmp(name, "tp_connect_socket") == 0) {
        int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
        int rc = tp_connect_socket(fd, (struct sockaddr *)&here, sizeof here, (struct sockaddr *)&here, sizeof here, 0);
        close(fd);
        return rc;
    }
    if (strcmp(name, "tp_connect_socket, an error") == 0)
        return tp_connect_socket(listener, (struct sockaddr *)&here, sizeof here, (struct sockaddr *)&there, sizeof there, 0);
    if (strcmp(name, "tp_accept") == 0) {
        struct sockaddr_in own;
        socklen_t own_len = sizeof own, client_len = sizeof addr;
        struct sockaddr_storage client;
        getsockname(listener, (struct sockaddr *)&own, &own_len);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        connect(fd, (struct sockaddr *)&own, own_len);
        int accepted = tp_accept(listener, (struct sockaddr *)&client, &client_len, (struct sockaddr *)&addr, &len, 0);
        close(fd);
        return close(accepted);
    }
    if (strcmp(name, "tp_accept, an error") == 0)
        return tp_accept(receiver, NULL, NULL, (struct sockaddr *)&addr, &len, 0);
    if (strcmp(name, "tp_unmap_addr, an error") == 0)
        return tp_unmap_addr((struct sockaddr *)memset(&addr, 0, sizeof addr), &len);
    if (strcmp(name, "tp_orig_dst") == 0)
        return tp_orig_dst(listener, (struct sockaddr *)&addr, &len);
    if (strcmp(name, "tp_recvfrom, an error") == 0)
        return (int)tp_recvfrom(receiver, memory[0], 10, MSG_DONTWAIT, NULL, NULL, NULL, NULL);
    if (sscanf(name, "tp_recv_datagrams of %d", &n) == 1) {
        if (sendto(receiver, "x", 1, 0, (struct sockaddr *)&here, sizeof here) != 1)
            return -1;
        return tp_recv_datagrams(receiver, datagrams, n, MSG_DONTWAIT);
    }
    if (sscanf(name, "tp_reply of %d", &n) == 1) {
        for (int i = 0; i < n; i++) {
            datagrams[i] = (struct tp_datagram){ .data = memory[i], .len = 1500, .segment_len = i % 2 ? 100 : 0 };
            memcpy(&datagrams[i].client, &here, sizeof here);
            memcpy(&datagrams[i].orig_dst, &there, sizeof there);
            ((struct sockaddr_in *)&datagrams[i].orig_dst)->sin_port = htons(5000 + i % 7);
        }
        return tp_reply(replier, datagrams, n);
    }
    if (strcmp(name, "tp_replier_open and close") == 0) {
        tp_replier *other;
        return tp_replier_open(NULL, 0, &other) == 0 ? (tp_replier_close(other), 0) : -1;
    }
    if (strcmp(name, "tp_install_rules and tp_remove_rules") == 0) {
        tp_rules *other;
        config.name = "other";
        int rc = tp_install_rules(&config, sizeof config, &other);
        config.name = NULL;
        return rc == 0 ? tp_remove_rules(other) : -1;
    }
    if (strcmp(name, "tp_replace_rules") == 0)
        return tp_replace_rules(rules, &config, sizeof config);
    if (strcmp(name, "tp_update_rules") == 0)
        return tp_update_rules(rules, TP_SET_BYPASS, prefixes, 500, NULL, 0);
    if (strcmp(name, "tp_rules_stats") == 0)
        return tp_rules_stats(rules, &stats, sizeof stats);
    if (strcmp(name, "tp_read_stats") == 0)
        return tp_read_stats(NULL, &stats, sizeof stats);
    if (strcmp(name, "tp_install_rules, an error") == 0) {
        tp_rules *other;
        return tp_install_rules(&config, sizeof config, &other);
    }
    if (strcmp(name, "tp_render_rules") == 0)
        return tp_render_rules(&config, sizeof config, TP_FORMAT_NFT, script, &size);
    if (strcmp(name, "tp_purge_rules") == 0)
        return tp_purge_rules("none");
    if (strcmp(name, "tp_check") == 0)
        return tp_check(report, NULL);
    if (strcmp(name, "tp_self_test") == 0)
        return tp_self_test(&config, sizeof config, report, NULL);
    abort();
}

static int outcome, saved;

static void *body(void *unused)
{
    errno = 0;
    outcome = calls();
    saved = errno;
    return unused;
}

/* The bytes of stack that a thread with this body uses. */
static size_t used(void *(*what)(void *))
{
    unsigned char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(stack, 0xa5, STACK);
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    if (stack == MAP_FAILED || pthread_attr_setstack(&attributes, stack, STACK) != 0 ||
        pthread_create(&thread, &attributes, what, NULL) != 0)
        abort();
    pthread_join(thread, NULL);
    size_t untouched = 0;
    while (untouched < STACK && stack[untouched] == 0xa5)
        untouched++;
    munmap(stack, STACK);
    return STACK - untouched;
}

static void *nothing(void *unused)
{
    return unused;
}

static void expect(const char *call, size_t most)
{
    name = call;
    body(NULL);
    size_t base = used(nothing), all = used(body);
    size_t bytes = all > base ? all - base : 0;
    int bad = bytes > most || (outcome < 0) != (strstr(call, "error") != NULL);
    printf("%s %-40s %6zu bytes, at most %zu%s%s\n", bad ? "FAILED" : "ok    ", call, bytes, most,
           outcome < 0 ? "; " : "", outcome < 0 ? tp_last_error() : "");
    failed |= bad;
}

int main(void)
{
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    here.sin_port = htons(4000);
    there.sin_addr.s_addr = inet_addr("192.0.2.1");
    there.sin_port = htons(4001);
    listener = tp_listen((struct sockaddr *)&here, sizeof here, -1, 0);
    receiver = tp_socket(AF_INET, SOCK_DGRAM, 0);
    for (int i = 0; i < 300; i++)
        datagrams[i] = (struct tp_datagram){ .data = memory[i], .capacity = sizeof memory[i] };
    for (int i = 0; i < PREFIXES; i++)
        prefixes[i] = (struct tp_prefix){ .family = AF_INET, .len = 32, .addr = { 10, i >> 16, i >> 8, i } };
    if (listener < 0 || tp_bind_nonlocal(receiver, (struct sockaddr *)&here, sizeof here) != 0 ||
        tp_replier_open(NULL, 0, &replier) != 0 || tp_install_rules(&config, sizeof config, &rules) != 0) {
        puts(tp_last_error());
        return 1;
    }
    /* As the header has them: "Stack". */
    expect("tp_socket", 4096);
    expect("tp_socket, an error", 4096);
    expect("tp_listen", 4096);
    expect("tp_bind_nonlocal, an error", 4096);
    expect("tp_connect_from", 4096);
    expect("tp_connect_from, an error", 4096);
    expect("tp_connect_socket", 4096);
    expect("tp_connect_socket, an error", 4096);
    expect("tp_accept", 4096);
    expect("tp_accept, an error", 4096);
    expect("tp_unmap_addr, an error", 4096);
    expect("tp_orig_dst", 4096);
    expect("tp_recvfrom, an error", 4096);
    static const int counts[] = { 1, 2, 5, 17, 33, 64 };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        char call[40];
        snprintf(call, sizeof call, "tp_recv_datagrams of %d", counts[i]);
        expect(call, 3072 + 100 * counts[i]);
    }
    expect("tp_reply of 1", 4096);
    expect("tp_reply of 64", 4096);
    expect("tp_reply of 300", 4096);
    expect("tp_replier_open and close", 4096);
    config.dst = config.src = prefixes, config.n_dst = config.n_src = PREFIXES;
    expect("tp_install_rules and tp_remove_rules", 16384);
    expect("tp_install_rules, an error", 16384);
    expect("tp_replace_rules", 16384);
    expect("tp_update_rules", 16384);
    expect("tp_rules_stats", 16384);
    expect("tp_read_stats", 16384);
    expect("tp_render_rules", 16384);
    expect("tp_purge_rules", 16384);
    config.n_dst = config.n_src = 10;
    expect("tp_check", 16384);
    expect("tp_self_test", 16384);
    return failed;
}
