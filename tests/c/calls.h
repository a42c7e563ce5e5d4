/* Calls of the library, for the tests that measure or disturb them one by one (memory.c, stack.c). Each function returns -1 if
 * its call failed. The functions whose names end with _error make a call that fails. */
#ifndef CALLS_H
#define CALLS_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/socket.h>
#include <tproxy.h>

#define PREFIXES 20000

static int listener;
static tp_rules *rules;
static struct tp_prefix prefixes[PREFIXES];
static struct tp_rules_config config = { .listeners = &listener, .n_listeners = 1 };
static char script[4 << 20];

static const struct sockaddr_in *address(const char *addr, in_port_t port)
{
    static struct sockaddr_in addresses[4];
    static unsigned next;
    struct sockaddr_in *place = &addresses[next++ % 4];
    *place = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = inet_addr(addr) };
    return place;
}

/* Opens the listener, and installs rules with these prefixes as destinations (n: 0 for all destinations). */
static int set_up(size_t n)
{
    listener = tp_listen((const struct sockaddr *)address("127.0.0.1", 4000), sizeof(struct sockaddr_in), -1, 0);
    for (int i = 0; i < PREFIXES; i++)
        prefixes[i] = (struct tp_prefix){ .family = AF_INET, .len = i % 3 == 0 ? 32 : 31, .addr = { 10, i >> 15, i >> 7, i << 1 } };
    config.dst = n > 0 ? prefixes : NULL, config.n_dst = n;
    if (listener >= 0 && tp_install_rules(&config, sizeof config, &rules) == 0)
        return 0;
    puts(tp_last_error());
    return -1;
}

static void report(const struct tp_finding *finding, void *context)
{
    (void)finding, (void)context;
}

static int socket_error(void)
{
    return tp_socket(AF_UNIX, SOCK_STREAM, 0);
}

static int connect_error(void)
{
    socklen_t len = sizeof(struct sockaddr_in);
    return tp_connect_from((const struct sockaddr *)address("127.0.0.1", 4000), len,
                           (const struct sockaddr *)address("192.0.2.1", 4001), len, 0);
}

static int replier_open(void)
{
    tp_replier *opened;
    struct tp_replier_config many = { .max_sockets = 4096 };
    return tp_replier_open(&many, sizeof many, &opened) == 0 ? (tp_replier_close(opened), 0) : -1;
}

static int replace(void)
{
    return tp_replace_rules(rules, &config, sizeof config);
}

static int render(void)
{
    size_t size = sizeof script;
    return tp_render_rules(&config, sizeof config, TP_FORMAT_NFT, script, &size);
}

static int check(void)
{
    return tp_check(report, NULL) < 0 ? -1 : 0;
}

static int purge(void)
{
    return tp_purge_rules("none");
}

#endif
