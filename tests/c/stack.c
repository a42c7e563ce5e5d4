/* Measures the stack that each call needs, and compares it with the header: programs with coroutines have small stacks. Each
 * call runs in a thread whose stack was filled with a pattern before. The call has used the part of the stack that no longer has
 * the pattern. Needs a network namespace.
 *
 * The C library needs stack too (strerror_r, and the dynamic linker at the first call of a function). Therefore the program makes
 * each call once before it measures it. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "calls.h"

#define STACK (1 << 20)
#define DATAGRAMS 300

static int receiver, count, failed;
static struct tp_datagram datagrams[DATAGRAMS];
static char memory[DATAGRAMS][2000];
static tp_replier *replier;

static int open_socket(void)
{
    return close(tp_socket(AF_INET6, SOCK_DGRAM, 0));
}

static int open_listener(void)
{
    return close(tp_listen((const struct sockaddr *)address("192.0.2.1", 4001), sizeof(struct sockaddr_in), -1, 0));
}

static int bind_error(void)
{
    return tp_bind_nonlocal(receiver, (const struct sockaddr *)address("192.0.2.1", 4001), sizeof(struct sockaddr_in));
}

static int connect_from(void)
{
    const struct sockaddr *here = (const struct sockaddr *)address("127.0.0.1", 4000);
    return close(tp_connect_from(here, sizeof(struct sockaddr_in), here, sizeof(struct sockaddr_in), TP_NONBLOCK));
}

static int connect_socket(void)
{
    const struct sockaddr *here = (const struct sockaddr *)address("127.0.0.1", 4000);
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int rc = tp_connect_socket(fd, here, sizeof(struct sockaddr_in), here, sizeof(struct sockaddr_in), 0);
    close(fd);
    return rc;
}

static int connect_socket_error(void)
{
    return tp_connect_socket(listener, (const struct sockaddr *)address("127.0.0.1", 4000), sizeof(struct sockaddr_in),
                             (const struct sockaddr *)address("192.0.2.1", 4001), sizeof(struct sockaddr_in), 0);
}

static int accept_connection(void)
{
    struct sockaddr_storage client, orig_dst;
    socklen_t client_len = sizeof client, orig_dst_len = sizeof orig_dst;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    connect(fd, (const struct sockaddr *)address("127.0.0.1", 4000), sizeof(struct sockaddr_in));
    int accepted = tp_accept(listener, (struct sockaddr *)&client, &client_len, (struct sockaddr *)&orig_dst, &orig_dst_len, 0);
    close(fd);
    return close(accepted);
}

static int accept_error(void)
{
    struct sockaddr_storage addr;
    socklen_t len = sizeof addr;
    return tp_accept(receiver, NULL, NULL, (struct sockaddr *)&addr, &len, 0);
}

static int unmap_error(void)
{
    struct sockaddr_storage addr = { .ss_family = AF_UNSPEC };
    socklen_t len = sizeof addr;
    return tp_unmap_addr((struct sockaddr *)&addr, &len);
}

static int orig_dst(void)
{
    struct sockaddr_storage addr;
    socklen_t len = sizeof addr;
    return tp_orig_dst(listener, (struct sockaddr *)&addr, &len);
}

static int recvfrom_error(void)
{
    return (int)tp_recvfrom(receiver, memory[0], 10, MSG_DONTWAIT, NULL, NULL, NULL, NULL);
}

static int recv_datagrams(void)
{
    const struct sockaddr *here = (const struct sockaddr *)address("127.0.0.1", 4000);
    if (sendto(receiver, "x", 1, 0, here, sizeof(struct sockaddr_in)) != 1)
        return -1;
    return tp_recv_datagrams(receiver, datagrams, (unsigned)count, MSG_DONTWAIT);
}

static int reply(void)
{
    for (int i = 0; i < count; i++) {
        datagrams[i] = (struct tp_datagram){ .data = memory[i], .len = 1500, .segment_len = i % 2 ? 100 : 0 };
        memcpy(&datagrams[i].client, address("127.0.0.1", 4000), sizeof(struct sockaddr_in));
        memcpy(&datagrams[i].orig_dst, address("192.0.2.1", 5000 + i % 7), sizeof(struct sockaddr_in));
    }
    return tp_reply(replier, datagrams, (unsigned)count);
}

static int install_and_remove(void)
{
    tp_rules *other;
    config.name = "other";
    int rc = tp_install_rules(&config, sizeof config, &other);
    config.name = NULL;
    return rc == 0 ? tp_remove_rules(other) : -1;
}

static int install_error(void)
{
    tp_rules *other;
    return tp_install_rules(&config, sizeof config, &other);
}

static int update(void)
{
    return tp_update_rules(rules, TP_SET_BYPASS, prefixes, 500, NULL, 0);
}

static int learn(void)
{
    static struct tp_prefix addrs[500];
    for (unsigned i = 0; i < 500; i++)
        addrs[i] = (struct tp_prefix){ .family = AF_INET, .len = 32, .addr = { 192, 0, (uint8_t)(i >> 8), (uint8_t)i } };
    return tp_learn_addresses(rules, TP_SET_BYPASS, addrs, 500, 100);
}

static int rules_stats(void)
{
    struct tp_rules_stats stats;
    return tp_rules_stats(rules, &stats, sizeof stats);
}

static int read_stats(void)
{
    struct tp_rules_stats stats;
    return tp_read_stats(NULL, &stats, sizeof stats);
}

static int self_test(void)
{
    return tp_self_test(&config, sizeof config, report, NULL);
}

static int (*call)(void);
static int outcome;

static void *body(void *unused)
{
    outcome = call();
    return unused;
}

/* Returns the number of bytes of stack that a thread with this body uses. */
static size_t used(void *(*thread_body)(void *))
{
    unsigned char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(stack, 0xa5, STACK);
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    if (stack == MAP_FAILED || pthread_attr_setstack(&attributes, stack, STACK) != 0 ||
        pthread_create(&thread, &attributes, thread_body, NULL) != 0)
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

enum { SUCCEEDS, FAILS };

static void expect(const char *name, int (*measured)(void), int fails, size_t most)
{
    call = measured;
    body(NULL);
    size_t base = used(nothing), all = used(body);
    size_t bytes = all > base ? all - base : 0;
    int bad = bytes > most || (outcome < 0) != (fails == FAILS);
    printf("%s %-40s %6zu bytes, at most %zu%s%s\n", bad ? "FAILED" : "ok    ", name, bytes, most,
           outcome < 0 ? "; " : "", outcome < 0 ? tp_last_error() : "");
    failed |= bad;
}

int main(void)
{
    receiver = tp_socket(AF_INET, SOCK_DGRAM, 0);
    for (int i = 0; i < DATAGRAMS; i++)
        datagrams[i] = (struct tp_datagram){ .data = memory[i], .capacity = sizeof memory[i] };
    if (set_up(0) != 0 || tp_replier_open(NULL, 0, &replier) != 0 ||
        tp_bind_nonlocal(receiver, (const struct sockaddr *)address("127.0.0.1", 4000), sizeof(struct sockaddr_in)) != 0) {
        puts(tp_last_error());
        return 1;
    }
    /* The limits that the header states, under "Stack". */
    enum { SOCKETS = 4096, RULES = 24576 };
    expect("tp_socket", open_socket, SUCCEEDS, SOCKETS);
    expect("tp_socket, an error", socket_error, FAILS, SOCKETS);
    expect("tp_listen", open_listener, SUCCEEDS, SOCKETS);
    expect("tp_bind_nonlocal, an error", bind_error, FAILS, SOCKETS);
    expect("tp_connect_from", connect_from, SUCCEEDS, SOCKETS);
    expect("tp_connect_from, an error", connect_error, FAILS, SOCKETS);
    expect("tp_connect_socket", connect_socket, SUCCEEDS, SOCKETS);
    expect("tp_connect_socket, an error", connect_socket_error, FAILS, SOCKETS);
    expect("tp_accept", accept_connection, SUCCEEDS, SOCKETS);
    expect("tp_accept, an error", accept_error, FAILS, SOCKETS);
    expect("tp_unmap_addr, an error", unmap_error, FAILS, SOCKETS);
    expect("tp_orig_dst", orig_dst, SUCCEEDS, SOCKETS);
    expect("tp_recvfrom, an error", recvfrom_error, FAILS, SOCKETS);
    static const int received[] = { 1, 2, 5, 17, 33, 64 }, sent[] = { 1, 64, DATAGRAMS };
    char name[40];
    for (size_t i = 0; i < sizeof received / sizeof *received; i++) {
        count = received[i];
        snprintf(name, sizeof name, "tp_recv_datagrams of %d", count);
        expect(name, recv_datagrams, SUCCEEDS, 3072 + 100 * (size_t)count);
    }
    for (size_t i = 0; i < sizeof sent / sizeof *sent; i++) {
        count = sent[i];
        snprintf(name, sizeof name, "tp_reply of %d", count);
        expect(name, reply, SUCCEEDS, SOCKETS);
    }
    expect("tp_replier_open and tp_replier_close", replier_open, SUCCEEDS, SOCKETS);
    config.dst = config.src = prefixes, config.n_dst = config.n_src = PREFIXES;
    expect("tp_install_rules and tp_remove_rules", install_and_remove, SUCCEEDS, RULES);
    expect("tp_install_rules, an error", install_error, FAILS, RULES);
    expect("tp_replace_rules", replace, SUCCEEDS, RULES);
    expect("tp_update_rules", update, SUCCEEDS, RULES);
    expect("tp_learn_addresses", learn, SUCCEEDS, RULES);
    expect("tp_rules_stats", rules_stats, SUCCEEDS, RULES);
    expect("tp_read_stats", read_stats, SUCCEEDS, RULES);
    expect("tp_render_rules", render, SUCCEEDS, RULES);
    expect("tp_purge_rules", purge, SUCCEEDS, RULES);
    config.n_dst = config.n_src = 10;
    expect("tp_check", check, SUCCEEDS, RULES);
    expect("tp_self_test", self_test, SUCCEEDS, RULES);
    return failed;
}
