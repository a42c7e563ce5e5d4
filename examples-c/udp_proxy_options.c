/* The command line of udp_proxy. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>

#include "udp_proxy.h"

static unsigned long parse_number(const char *text, unsigned long least, unsigned long most, char end, const char **rest)
{
    char *stop;
    errno = 0;
    unsigned long number = strtoul(text, &stop, 10);
    if (errno != 0 || *text < '0' || *text > '9' || number < least || number > most || (*stop != '\0' && *stop != end))
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
        ranges[n].first = ranges[n].last = (uint16_t)parse_number(args[n], 1, 65535, '-', &rest);
        if (*rest == '-')
            ranges[n].last = (uint16_t)parse_number(rest + 1, 1, 65535, '\0', NULL);
    }
    return n;
}

/* Parses ADDR, a separator, and a number; ADDR may be in brackets. Ends the text at the separator. */
static struct sockaddr_in6 parse_address(char *text, char separator, const char **number)
{
    char *end = strrchr(text, separator);
    if (end == NULL)
        errx(2, "%s: has no '%c'", text, separator);
    *end = '\0';
    *number = end + 1;
    size_t len = strlen(text);
    if (*text == '[' && text[len - 1] == ']')
        text[len - 1] = '\0', text++;
    struct addrinfo hints = { .ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_DGRAM }, *found;
    int error = getaddrinfo(text, NULL, &hints, &found);
    if (error != 0)
        errx(2, "%s: %s", text, gai_strerror(error));
    struct sockaddr_in6 addr = as_ipv6(found->ai_addr);
    freeaddrinfo(found);
    return addr;
}

static void parse_to(char *text)
{
    const char *port;
    struct sockaddr_in6 addr = parse_address(text, ':', &port);
    addr.sin6_port = htons((uint16_t)parse_number(port, 1, 65535, '\0', NULL));
    settings.to[!IN6_IS_ADDR_V4MAPPED(&addr.sin6_addr)] = addr;
}

static struct tp_prefix parse_prefix(char *text)
{
    const char *len;
    struct sockaddr_in6 addr = parse_address(text, '/', &len);
    bool v4 = IN6_IS_ADDR_V4MAPPED(&addr.sin6_addr);
    struct tp_prefix prefix = { .family = v4 ? AF_INET : AF_INET6 };
    prefix.len = (uint8_t)parse_number(len, 0, v4 ? 32 : 128, '\0', NULL);
    memcpy(prefix.addr, &addr.sin6_addr.s6_addr[v4 ? 12 : 0], v4 ? 4 : 16);
    return prefix;
}

uint16_t parse_options(int argc, char **argv, struct tp_rules_config *config)
{
    static struct tp_port_range ports[MAX_RANGES];
    static struct tp_prefix dst[MAX_RANGES];
    static const struct option options[] = {
        { "dst", required_argument, NULL, 'd' },      { "to", required_argument, NULL, 't' },
        { "sessions", required_argument, NULL, 's' }, { "idle", required_argument, NULL, 'i' },
        { "deny", required_argument, NULL, 'x' },     { "verbose", no_argument, NULL, 'v' },
        { 0 },
    };
    deny_defaults(&settings.deny);
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case 'd':
            if (config->n_dst == MAX_RANGES)
                errx(2, "more than %d destinations", MAX_RANGES);
            dst[config->n_dst++] = parse_prefix(optarg);
            config->dst = dst;
            break;
        case 't': parse_to(optarg); break;
        case 'x':
            if (!deny_add(&settings.deny, optarg))
                errx(2, "%s: not a prefix to deny (ADDR/LEN), or there are more than %d", optarg, MAX_DENIED);
            break;
        case 's': settings.sessions = parse_number(optarg, 1, 1 << 20, '\0', NULL); break;
        case 'i': settings.idle_ms = 1000 * parse_number(optarg, 1, 1 << 20, '\0', NULL); break;
        case 'v': settings.verbose = true; break;
        default: exit(2);
        }
    if (argc - optind < 2)
        errx(2, "usage: udp_proxy [--dst ADDR/LEN]... [--to ADDR:PORT]... [--sessions N] [--idle SECONDS] [--deny ADDR/LEN]... "
                "[--verbose] LISTEN-PORT PORT[-PORT]...");
    config->ports = ports, config->n_ports = parse_ports(argv + optind + 1, ports);
    if (settings.to[0].sin6_family != AF_UNSPEC)
        config->families |= TP_FAMILY_IPV4;
    if (settings.to[1].sin6_family != AF_UNSPEC)
        config->families |= TP_FAMILY_IPV6;
    return (uint16_t)parse_number(argv[optind], 1, 65535, '\0', NULL);
}
