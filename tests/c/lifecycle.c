/* A program that installs rules, and then forks, becomes a daemon, closes descriptors, drops privileges, or enters another
 * network namespace. tests/c/lifecycle.py runs it and tests the traffic.
 *
 *     lifecycle SCENARIO nft|iptables
 *
 * It prints "ready" when the traffic can be tested, reads a line of standard input, runs the second half of the scenario, and
 * prints "done". Then it waits for the end of its standard input. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "lifecycle.h"
#include "limit.h"

int listener, receiver;
in_port_t port = 3129;
uint32_t backend;
tp_rules *rules;
char **arguments;

void say(const char *word)
{
    puts(word);
    fflush(stdout);
}

void wait_for_line(void)
{
    char c;
    while (read(0, &c, 1) == 1 && c != '\n')
        ;
}

struct sockaddr_in6 any_address(void)
{
    return (struct sockaddr_in6){ .sin6_family = AF_INET6, .sin6_port = htons(port) };
}

void listen_on_port(void)
{
    struct sockaddr_in6 any = any_address();
    listener = tp_listen((struct sockaddr *)&any, sizeof any, -1, 0);
    receiver = tp_socket(AF_INET6, SOCK_DGRAM, 0);
    CHECK(listener >= 0 && receiver >= 0 && tp_bind_nonlocal(receiver, (struct sockaddr *)&any, sizeof any) == 0);
}

int stats(void)
{
    struct tp_rules_stats found;
    return tp_rules_stats(rules, &found, sizeof found);
}

int read_stats(void)
{
    struct tp_rules_stats found;
    return tp_read_stats(NULL, &found, sizeof found);
}

int replace(void)
{
    struct sockaddr_in6 any = any_address();
    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = { .backend = backend, .ports = &http, .n_ports = 1 };
    config.listen_addr = (struct sockaddr *)&any;
    config.listen_addrlen = sizeof any;
    config.protocols = TP_PROTO_TCP | TP_PROTO_UDP;
    return tp_replace_rules(rules, &config, sizeof config);
}

int update(void)
{
    struct tp_prefix prefix = { .family = AF_INET, .len = 32, .addr = { 192, 0, 2, 99 } };
    return tp_update_rules(rules, TP_SET_BYPASS, &prefix, 1, NULL, 0);
}

int learn(void)
{
    struct tp_prefix addr = { .family = AF_INET, .len = 32, .addr = { 192, 0, 2, 98 } };
    return tp_learn_addresses(rules, TP_SET_BYPASS, &addr, 1, 1000);
}

int install_again(void)
{
    struct tp_port_range http = { .first = 80, .last = 80 };
    int listeners[] = { listener, receiver };
    struct tp_rules_config config = { .listeners = listeners, .n_listeners = 2, .ports = &http, .n_ports = 1, .backend = backend };
    return tp_install_rules(&config, sizeof config, &rules);
}

void install(void)
{
    CHECK(install_again() == 0);
}

void all_calls_work(void)
{
    CHECK(stats() == 0);
    CHECK(update() == 0);
    CHECK(learn() == 0 || (errno == EOPNOTSUPP && backend != TP_BACKEND_NFT));
    CHECK(replace() == 0);
    CHECK(read_stats() == 0);
    CHECK(tp_remove_rules(rules) == 0);
}

static void *serve_tcp(void *unused)
{
    int fd;
    while ((fd = accept(listener, NULL, NULL)) >= 0) {
        CHECK(write(fd, "proxied", 7) == 7);
        close(fd);
    }
    return unused;
}

static volatile int stopped;

static void *serve_udp(void *unused)
{
    char buffer[100];
    struct tp_datagram datagram = { .data = buffer, .capacity = sizeof buffer };
    tp_replier *replier;
    CHECK(tp_replier_open(NULL, 0, &replier) == 0);
    while (tp_recv_datagrams(receiver, &datagram, 1, 0) == 1 && !stopped) {
        memcpy(buffer, "proxied", datagram.len = 7);
        CHECK(tp_reply(replier, &datagram, 1) == 1);
    }
    tp_replier_close(replier);
    return unused;
}

static pthread_t servers[2];

void serve_in_background(void)
{
    CHECK(pthread_create(&servers[0], NULL, serve_tcp, NULL) == 0 && pthread_create(&servers[1], NULL, serve_udp, NULL) == 0);
}

/* Ends the threads, so that none of their calls keeps the listeners open. */
void stop_serving(void)
{
    stopped = 1;
    shutdown(listener, SHUT_RD);
    shutdown(receiver, SHUT_RD);
    CHECK(pthread_join(servers[0], NULL) == 0 && pthread_join(servers[1], NULL) == 0);
}

/* Serves until the caller has tested the traffic. */
void serve_first(void)
{
    serve_in_background();
    say("ready");
    wait_for_line();
}

/* The caller tests the traffic again. */
void done(void)
{
    say("done");
    wait_for_line();
}

pid_t forked(void)
{
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    return pid;
}

/* Runs a function in a child, and checks that the child succeeds. */
void in_child(void (*body)(void))
{
    pid_t pid = forked();
    if (pid == 0) {
        alarm((unsigned)limit(60000) / 1000);
        body();
        exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Waits, in a child, until the installing process has ended. It ends a moment after its children have another parent. Returns
 * the result of the first call after that. */
int wait_for_end_of_installer(void)
{
    int found = -1;
    while (getppid() != 1)
        usleep(1000);
    for (int i = 0; i < 5000 && (found = stats()) == -1 && errno == EBUSY && strstr(tp_last_error(), "lives") != NULL; i++)
        usleep(1000);
    return found;
}

int descriptors(void)
{
    int open = 0;
    for (int fd = 0; fd < 300; fd++)
        open += fcntl(fd, F_GETFD) >= 0;
    return open;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    arguments = argv;
    backend = strcmp(argv[2], "iptables") == 0 ? TP_BACKEND_IPTABLES : TP_BACKEND_NFT;
    if (strcmp(argv[1], "wait") == 0)
        return pause();
    if (getenv("PORT") != NULL)
        port = (in_port_t)atoi(getenv("PORT"));
    const struct scenario *const all[] = { process_scenarios, namespace_scenarios, descriptor_scenarios };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (const struct scenario *scenario = all[i]; scenario->name != NULL; scenario++)
            if (strcmp(argv[1], scenario->name) == 0) {
                listen_on_port();
                install();
                scenario->run();
                return 0;
            }
    printf("no such scenario: %s\n", argv[1]);
    return 2;
}
