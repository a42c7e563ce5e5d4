/*
 * A transparent TCP relay that is optimized for speed.
 *
 *     relay [-t THREADS] [-w WAIT] [-i IDLE] [-d DRAIN] [-c CONNECTIONS] [-p PREFIXES] [-x PREFIX]... [-o]
 *           LISTEN-PORT PORT[-PORT]...
 *
 * Intercepts every connection that this host would forward to one of the PORTs of
 * another host, over IPv4 and IPv6, and connects to the server from the client's
 * own address.
 *
 *   -t THREADS       number of threads (default: one per core)
 *   -w WAIT          milliseconds that the handshake with the server waits for the
 *                    client's first bytes (1)
 *   -i IDLE          seconds without a byte after which a connection is reset (600);
 *                    20 seconds while its server has not accepted
 *   -d DRAIN         seconds that connections may continue after a signal to stop (30)
 *   -c CONNECTIONS   maximum number of connections (default: as the descriptor limit
 *                    allows)
 *   -p PREFIXES      file of destinations to intercept, one prefix a line (all)
 *   -x PREFIX        refuse connections to PREFIX, in addition to the destinations
 *                    listed in deny.h; -x none clears the list
 *   -o               allow connections to addresses of this host, which are refused by
 *                    default; the relay's own port is refused in any case
 *
 * Signals. SIGTERM, SIGINT: new connections are no longer intercepted, and existing
 * connections continue. The relay ends after the last of them, or at a second signal.
 * SIGUSR1: prints the counters as a line of JSON. SIGHUP has its default action.
 *
 * How it works. Each thread has its own listener (TP_LISTEN_REUSEPORT: the kernel
 * distributes the connections), edge-triggered epoll instance and memory, and never
 * waits for another thread. A read that does not fill the thread's small buffer is
 * copied through it, which is cheapest for short messages. A stream that fills the
 * buffer is spliced: its pages move from socket to pipe to socket without a copy. A
 * pipe is assigned to a direction only while it holds bytes. An idle connection
 * therefore needs two descriptors and a struct of some hundred bytes.
 *
 *   First bytes: most clients send immediately. The final ACK of the handshake with
 *     the server carries their bytes (TP_CONNECT_DATA_FOLLOWS), which saves packets.
 *     If the client sends nothing, the ACK is sent after WAIT.
 *   Back-pressure: bytes that one socket does not accept stay in the pipe. Nothing
 *     more is read for it, the other socket's window fills, and its sender waits.
 *   Half-close: an end of stream is passed on after all bytes before it.
 *   Resets: a reset, or a refusal by the server, is passed on as a reset.
 *   Limits: at the limit of connections, a new connection replaces the one that has
 *     been silent for the longest time, if that is at least ten seconds. Otherwise new
 *     connections wait in the kernel's queue. Without a free pipe, a stream is copied:
 *     the relay peeks (MSG_PEEK) and consumes as many bytes as the other socket accepted.
 *
 * Urgent data is not passed on (RFC 6093 recommends not to use it).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <tproxy.h>

#include "relay.h"

struct settings settings = { .idle_limit = 600, .drain_limit = 30, .wait_limit = 1 };
atomic_int stopping;
static atomic_uint ended;    /* number of workers that have ended */

/* Divides the descriptors among the workers: some for pipes, and two per connection. */
static void set_limits(struct worker *workers, unsigned n, uint64_t connections)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        err(1, "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        err(1, "setrlimit");
    uint64_t own = OWN_DESCRIPTORS + 4 * (uint64_t)n;    /* per thread: listener, epoll, eventfd, the socket of deny.h */
    uint64_t descriptors = limit.rlim_cur == RLIM_INFINITY ? 1 << 20 : limit.rlim_cur;
    if (descriptors < own + 8 * (uint64_t)n)
        errx(1, "a limit of %" PRIu64 " descriptors is not enough for %u threads", descriptors, n);
    uint64_t pipes = (descriptors - own) / 16 < PIPES ? (descriptors - own) / 16 : PIPES;
    if (pipes < n)
        pipes = n;
    uint64_t available = (descriptors - own - 2 * pipes) / 2;
    if (connections == 0 || connections > available)
        connections = available;
    for (unsigned i = 0; i < n; i++) {
        workers[i].max_live = connections / n + (i < connections % n);
        workers[i].max_pipes = pipes / n + (i < pipes % n);
    }
}

static void print_counters(const struct worker *workers, unsigned n)
{
    static const char *const names[] = { "accepted", "live",   "refused", "failed", "reset",
                                         "idle",     "copied", "spliced", "pipes",  "starved" };
    enum { NAMES = sizeof names / sizeof *names };
    uint64_t sums[NAMES] = { 0 };
    for (unsigned i = 0; i < n; i++) {
        const struct counters *count = &workers[i].count;
        const uint64_t values[NAMES] = { VALUE(count->accepted), VALUE(count->live),   VALUE(count->refused),
                                         VALUE(count->failed),   VALUE(count->reset),  VALUE(count->idle),
                                         VALUE(count->copied),   VALUE(count->spliced), VALUE(count->pipes),
                                         VALUE(count->starved) };
        for (int k = 0; k < NAMES; k++)
            sums[k] += values[k];
    }
    for (int k = 0; k < NAMES; k++)
        printf("%s\"%s\":%" PRIu64, k == 0 ? "{" : ",", names[k], sums[k]);
    printf("}\n");
}

static unsigned long parse_number(const char *text, char end, unsigned long least, unsigned long most, const char **rest)
{
    char *stop;
    errno = 0;
    unsigned long number = strtoul(text, &stop, 10);
    if (errno != 0 || stop == text || number < least || number > most || (*stop != '\0' && *stop != end))
        errx(2, "%s: not a number from %lu to %lu", text, least, most);
    if (rest != NULL)
        *rest = stop;
    return number;
}

static size_t parse_ports(char **args, struct tp_port_range *ranges)
{
    size_t n = 0;
    for (; args[n] != NULL; n++) {
        const char *rest;
        if (n == MAX_RANGES)
            errx(2, "more than %d ranges of ports", MAX_RANGES);
        ranges[n].first = ranges[n].last = (uint16_t)parse_number(args[n], '-', 1, 65535, &rest);
        if (*rest == '-')
            ranges[n].last = (uint16_t)parse_number(rest + 1, '\0', 1, 65535, NULL);
    }
    return n;
}

/* Parses 192.0.2.0/24, 2001:db8::/32, or an address. */
static struct tp_prefix parse_prefix(char *text)
{
    char *len = strchr(text, '/');
    if (len != NULL)
        *len++ = '\0';
    struct tp_prefix prefix = { .family = strchr(text, ':') != NULL ? AF_INET6 : AF_INET };
    unsigned long most = prefix.family == AF_INET6 ? 128 : 32;
    if (inet_pton(prefix.family, text, prefix.addr) != 1)
        errx(2, "%s: not an address", text);
    prefix.len = (uint8_t)(len == NULL ? most : parse_number(len, '\0', 0, most, NULL));
    return prefix;
}

static struct tp_prefix *read_prefixes(const char *path, size_t *n)
{
    char line[128];
    struct tp_prefix *prefixes = NULL;
    FILE *file = fopen(path, "r");
    if (file == NULL)
        err(2, "%s", path);
    for (size_t capacity = 0; fgets(line, sizeof line, file) != NULL; (*n)++) {
        line[strcspn(line, "\n")] = '\0';
        if (*n == capacity && (prefixes = realloc(prefixes, (capacity = capacity * 2 + 64) * sizeof *prefixes)) == NULL)
            err(1, "realloc");
        prefixes[*n] = parse_prefix(line);
    }
    fclose(file);
    if (*n == 0)
        errx(2, "%s: the file has no prefix", path);
    return prefixes;
}

static void stop_workers(struct worker *workers, unsigned n, tp_rules *rules)
{
    /* Existing connections still need their packets diverted. New connections are no longer intercepted. */
    struct tp_rules_config divert = { .flags = TP_RULES_DIVERT_ONLY };
    if (stopping == 0 && tp_replace_rules(rules, &divert, sizeof divert) != 0)
        warnx("%s", tp_last_error());
    stopping++;
    for (unsigned i = 0; i < n; i++)
        eventfd_write(workers[i].wake_fd, 1);
}

static void *worker_thread(void *argument)
{
    run_worker(argument);
    ended++;
    kill(getpid(), SIGUSR2);    /* wakes the main thread, which waits for signals */
    return NULL;
}

int main(int argc, char **argv)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned n = cores < 1 ? 1 : cores > MAX_THREADS ? MAX_THREADS : (unsigned)cores;
    uint64_t connections = 0;
    const char *prefixes = NULL;
    deny_defaults(&settings.deny);
    for (int option; (option = getopt(argc, argv, "t:w:i:d:c:p:x:o")) != -1;) {
        switch (option) {
        case 't': n = (unsigned)parse_number(optarg, '\0', 1, MAX_THREADS, NULL); break;
        case 'w': settings.wait_limit = (uint32_t)parse_number(optarg, '\0', 0, 10000, NULL); break;
        case 'i': settings.idle_limit = (uint32_t)parse_number(optarg, '\0', 1, 2000000, NULL); break;
        case 'd': settings.drain_limit = (uint32_t)parse_number(optarg, '\0', 0, 2000000, NULL); break;
        case 'c': connections = parse_number(optarg, '\0', 1, 1000000000, NULL); break;
        case 'p': prefixes = optarg; break;
        case 'o': settings.allow_own = true; break;
        case 'x':
            if (!deny_add(&settings.deny, optarg))
                errx(2, "%s: not a prefix to deny (ADDR/LEN), or there are more than %d", optarg, MAX_DENIED);
            break;
        default: argc = 0;
        }
    }
    if (argc - optind < 2)
        errx(2, "usage: relay [-t THREADS] [-w WAIT] [-i IDLE] [-d DRAIN] [-c CONNECTIONS] [-p PREFIXES] [-x PREFIX]... [-o] "
                "LISTEN-PORT PORT[-PORT]...");
    setvbuf(stdout, NULL, _IOLBF, 0);

    signal(SIGPIPE, SIG_IGN);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGUSR1);
    sigaddset(&signals, SIGUSR2);
    sigprocmask(SIG_BLOCK, &signals, NULL);

    struct worker *workers = calloc(n, sizeof *workers);
    int *listeners = calloc(n, sizeof *listeners);
    if (workers == NULL || listeners == NULL)
        err(1, "calloc");
    set_limits(workers, n, connections);
    settings.listen_port = htons((uint16_t)parse_number(argv[optind], '\0', 1, 65535, NULL));
    for (unsigned i = 0; i < n; i++) {
        prepare_worker(&workers[i], (uint16_t)parse_number(argv[optind], '\0', 1, 65535, NULL));
        listeners[i] = workers[i].listener;
    }

    struct tp_port_range ports[MAX_RANGES] = { 0 };
    struct tp_rules_config config = { 0 };
    config.listeners = listeners, config.n_listeners = n;
    config.ports = ports, config.n_ports = parse_ports(argv + optind + 1, ports);
    struct tp_prefix *dst = NULL;
    if (prefixes != NULL)
        config.dst = dst = read_prefixes(prefixes, &config.n_dst);
    tp_rules *rules;
    if (tp_install_rules(&config, sizeof config, &rules) != 0)
        errx(1, "%s", tp_last_error());
    free(listeners);
    free(dst);
    for (unsigned i = 0; i < n; i++)
        if ((errno = pthread_create(&workers[i].thread, NULL, worker_thread, &workers[i])) != 0)
            err(1, "pthread_create");
    printf("listening\n");

    while (ended < n) {
        int signal = sigwaitinfo(&signals, NULL);
        if (signal == SIGUSR1)
            print_counters(workers, n);
        else if (signal == SIGINT || signal == SIGTERM)
            stop_workers(workers, n, rules);
    }
    for (unsigned i = 0; i < n; i++)
        pthread_join(workers[i].thread, NULL);
    print_counters(workers, n);
    if (tp_remove_rules(rules) != 0)
        errx(1, "%s", tp_last_error());
    return 0;
}
