/*
 * Tests that no call reads the environment. The program replaces the functions of the C library that read it, and reports each
 * variable that is read during a call.
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <tproxy.h>

static bool inside;
static int asked, failures;

static char *note(const char *name)
{
    if (inside) {
        asked++;
        fprintf(stderr, "the library asks for %s\n", name);
    }
    return NULL;
}

char *getenv(const char *name)
{
    return note(name);
}

char *secure_getenv(const char *name)
{
    return note(name);
}

static long called(const char *what, long outcome, bool must_succeed)
{
    inside = false;
    if (outcome < 0 && must_succeed) {
        failures++;
        fprintf(stderr, "%s: %s\n", what, tp_last_error());
    }
    return outcome;
}

#define WORKS(call) (inside = true, called(#call, (call), true))
#define FAILS(call) (inside = true, called(#call, (call), false))

static void ignore(const struct tp_finding *finding, void *context)
{
    (void)finding;
    (void)context;
}

int main(void)
{
    struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(3129) }, there = any, addr;
    socklen_t len = sizeof addr;
    there.sin_addr.s_addr = htonl(0xc0000201);
    char byte;
    struct tp_datagram datagram = { .data = &byte, .capacity = 1 };

    int listener = (int)WORKS(tp_listen((struct sockaddr *)&any, sizeof any, -1, 0));
    int udp = (int)WORKS(tp_socket(AF_INET, SOCK_DGRAM, 0));
    WORKS(tp_bind_nonlocal(udp, (struct sockaddr *)&there, sizeof there));
    FAILS(tp_connect_from((struct sockaddr *)&there, sizeof there, (struct sockaddr *)&any, sizeof any, 0));
    FAILS(tp_connect_socket(udp, (struct sockaddr *)&there, sizeof there, (struct sockaddr *)&any, sizeof any, 0));
    FAILS(tp_accept(udp, NULL, NULL, (struct sockaddr *)&addr, &len, 0));
    FAILS(tp_unmap_addr((struct sockaddr *)&addr, NULL));
    FAILS(tp_orig_dst(udp, (struct sockaddr *)&addr, &len));
    FAILS(tp_recv_datagrams(udp, &datagram, 1, MSG_DONTWAIT));
    tp_replier *replier;
    WORKS(tp_replier_open(NULL, 0, &replier));
    FAILS(tp_reply(replier, &datagram, 1));
    tp_replier_close(replier);

    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = { .listeners = &listener, .n_listeners = 1, .ports = &http, .n_ports = 1 };
    struct tp_rules_stats stats;
    const uint32_t backends[] = { TP_BACKEND_NFT, TP_BACKEND_IPTABLES };
    for (int i = 0; i < 2; i++) {
        tp_rules *rules = NULL;
        config.backend = backends[i];
        config.flags = 0x80000000;
        FAILS(tp_install_rules(&config, sizeof config, &rules));
        config.flags = 0;
        if (WORKS(tp_install_rules(&config, sizeof config, &rules)) != 0)
            continue;
        WORKS(tp_rules_stats(rules, &stats, sizeof stats));
        WORKS(tp_read_stats(NULL, &stats, sizeof stats));
        WORKS(tp_replace_rules(rules, &config, sizeof config));
        FAILS(tp_purge_rules("tproxy"));
        FAILS(tp_check(ignore, NULL));
        FAILS(tp_self_test(&config, sizeof config, ignore, NULL));
        WORKS(tp_remove_rules(rules));
        WORKS(tp_purge_rules(NULL));
        size_t size = 0;
        WORKS(tp_render_rules(&config, sizeof config, TP_FORMAT_IPTABLES, NULL, &size));
    }
    FAILS(tp_purge_rules("no such name"));
    close(listener);
    close(udp);
    /* Checks that the replacement works. */
    inside = true;
    (void)getenv("PATH");
    if (asked != 1)
        fprintf(stderr, "%d variables, where this program asked for one\n", asked);
    return failures != 0 || asked != 1;
}
