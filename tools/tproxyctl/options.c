#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "options.h"

void usage_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("tproxyctl: ", stderr);
    vfprintf(stderr, format, args);
    fputs("; see tproxyctl --help\n", stderr);
    exit(USAGE);
}

static unsigned long number(const char *what, const char *text, unsigned long most)
{
    char *end;
    unsigned long value = strtoul(text, &end, 0);
    if (*text < '0' || *text > '9' || *end || value > most)
        usage_error("%s: %s is not a number from 0 to %lu", what, text, most);
    return value;
}

/* A list with place for one item more; the program ends if there is no memory. */
static void *grown(const void *items, size_t n, size_t size)
{
    void *place = realloc((void *)(uintptr_t)items, (n + 1) * size);
    if (!place) {
        perror("tproxyctl");
        exit(FAILED);
    }
    return place;
}

#define APPEND(list, n, item) do { \
        (list) = grown((list), (n), sizeof *(list)); \
        memcpy((void *)(uintptr_t)&(list)[(n)++], &(item), sizeof *(list)); \
    } while (0)

/* Splits a range such as 80 or 8000-8010. */
static void range(const char *what, char *text, unsigned long most, unsigned long *first, unsigned long *last)
{
    char *dash = strchr(text, '-');
    if (dash)
        *dash++ = 0;
    *first = number(what, text, most);
    *last = dash ? number(what, dash, most) : *first;
}

/* Adds ports such as 80, 8000-8010, 80,443 or udp:443. */
static void add_ports(const char *what, const struct tp_port_range **ports, size_t *n, char *text)
{
    size_t before = *n;
    for (char *one = strtok(text, ","); one; one = strtok(NULL, ",")) {
        struct tp_port_range added = { 0 };
        if (strncmp(one, "tcp:", 4) == 0 || strncmp(one, "udp:", 4) == 0) {
            added.protocols = *one == 't' ? TP_PROTO_TCP : TP_PROTO_UDP;
            one += 4;
        }
        unsigned long first, last;
        range(what, one, 65535, &first, &last);
        added.first = (uint16_t)first;
        added.last = (uint16_t)last;
        APPEND(*ports, *n, added);
    }
    if (*n == before)
        usage_error("%s: no port given", what);
}

/* Adds numbers such as 1000, 1000-1999 or 33,1000. */
static void add_ids(const char *what, const struct tp_id_range **ids, size_t *n, char *text)
{
    size_t before = *n;
    for (char *one = strtok(text, ","); one; one = strtok(NULL, ",")) {
        unsigned long first, last;
        range(what, one, UINT32_MAX - 1UL, &first, &last);
        struct tp_id_range added = { (uint32_t)first, (uint32_t)last };
        APPEND(*ids, *n, added);
    }
    if (*n == before)
        usage_error("%s: no number given", what);
}

static void add_name(const char *const **names, size_t *n, const char *name)
{
    APPEND(*names, *n, name);
}

/* Adds an Ethernet address such as 02:00:00:00:00:01. */
static void add_mac(const char *what, const struct tp_mac **macs, size_t *n, const char *text)
{
    struct tp_mac added;
    unsigned byte[6];
    int end = 0;
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%n", &byte[0], &byte[1], &byte[2], &byte[3], &byte[4], &byte[5], &end) != 6 ||
        text[end])
        usage_error("%s: %s is not an Ethernet address such as 02:00:00:00:00:01", what, text);
    for (int i = 0; i < 6; ++i)
        added.addr[i] = (uint8_t)byte[i];
    APPEND(*macs, *n, added);
}

/* Adds a prefix such as 192.0.2.0/24 or 2001:db8::/32. An address without a length is a full-length prefix. */
static void add_prefix(const char *what, const struct tp_prefix **prefixes, size_t *n, char *text)
{
    char *slash = strchr(text, '/');
    if (slash)
        *slash++ = 0;
    struct tp_prefix added = { 0 };
    if (inet_pton(AF_INET, text, added.addr) == 1)
        added.family = AF_INET;
    else if (inet_pton(AF_INET6, text, added.addr) == 1)
        added.family = AF_INET6;
    else
        usage_error("%s: %s is not an address", what, text);
    unsigned long bits = added.family == AF_INET ? 32 : 128;
    added.len = (uint8_t)(slash ? number(what, slash, bits) : bits);
    APPEND(*prefixes, *n, added);
}

/* Sets the listener to an address such as 127.0.0.1:3129 or [::]:3129. A port alone means [::]. */
static void set_listener(struct options *options, char *text)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)&options->listen;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&options->listen;
    char *colon = strrchr(text, ':'), *port = colon ? colon + 1 : text;
    size_t len = colon ? (size_t)(colon - text) : 0;
    in_port_t number_of = htons((uint16_t)number("--listen", port, 65535));
    if (colon)
        *colon = 0;
    if (len > 2 && text[0] == '[' && text[len - 1] == ']') {
        text[len - 1] = 0;
        ++text;
    }
    options->config.listen_addr = (struct sockaddr *)&options->listen;
    if (colon && inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = number_of;
        options->config.listen_addrlen = sizeof *v4;
    } else if (!colon || inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = number_of;
        options->config.listen_addrlen = sizeof *v6;
    } else {
        usage_error("--listen: %s is not an address", text);
    }
}

/* Sets a mark such as 0x2000 or 0x2000/0x3000. */
static void set_mark(const char *what, char *text, uint32_t *mark, uint32_t *mask)
{
    char *slash = strchr(text, '/');
    if (slash)
        *slash++ = 0;
    *mark = (uint32_t)number(what, text, UINT32_MAX);
    if (slash)
        *mask = (uint32_t)number(what, slash, UINT32_MAX);
}

static uint32_t one_of(const char *what, const char *text, const char *const names[], size_t n)
{
    for (size_t i = 0; i < n; ++i)
        if (strcmp(names[i], text) == 0)
            return (uint32_t)i;
    usage_error("%s: %s is not a known value", what, text);
}

const struct option long_options[] = {
    { "name", required_argument, NULL, NAME },
    { "listen", required_argument, NULL, LISTEN },
    { "port", required_argument, NULL, PORT },
    { "dst", required_argument, NULL, DST },
    { "src", required_argument, NULL, SRC },
    { "bypass", required_argument, NULL, BYPASS },
    { "interface", required_argument, NULL, INTERFACE },
    { "bypass-port", required_argument, NULL, BYPASS_PORT },
    { "reject-port", required_argument, NULL, REJECT_PORT },
    { "bypass-src", required_argument, NULL, BYPASS_SRC },
    { "bypass-interface", required_argument, NULL, BYPASS_INTERFACE },
    { "mac", required_argument, NULL, MAC },
    { "bypass-mac", required_argument, NULL, BYPASS_MAC },
    { "uid", required_argument, NULL, UID },
    { "bypass-uid", required_argument, NULL, BYPASS_UID },
    { "gid", required_argument, NULL, GID },
    { "bypass-gid", required_argument, NULL, BYPASS_GID },
    { "cgroup", required_argument, NULL, CGROUP },
    { "bypass-cgroup", required_argument, NULL, BYPASS_CGROUP },
    { "bypass-mark", required_argument, NULL, BYPASS_MARK },
    { "mark", required_argument, NULL, MARK },
    { "table", required_argument, NULL, TABLE },
    { "priority", required_argument, NULL, PRIORITY },
    { "tcp", no_argument, NULL, TCP },
    { "udp", no_argument, NULL, UDP },
    { "ipv4", no_argument, NULL, '4' },
    { "ipv6", no_argument, NULL, '6' },
    { "backend", required_argument, NULL, BACKEND },
    { "redirect", no_argument, NULL, REDIRECT },
    { "divert-only", no_argument, NULL, DIVERT_ONLY },
    { "local-output", no_argument, NULL, LOCAL_OUTPUT },
    { "fail-open", no_argument, NULL, FAIL_OPEN },
    { "allow-direct", no_argument, NULL, ALLOW_DIRECT },
    { "notrack", no_argument, NULL, NOTRACK },
    { "persist", no_argument, NULL, PERSIST },
    { "new-only", no_argument, NULL, NEW_ONLY },
    { "local-servers", no_argument, NULL, LOCAL_SERVERS },
    { "format", required_argument, NULL, FORMAT },
    { "json", no_argument, NULL, JSON },
    { "all", no_argument, NULL, ALL },
    { "watch", optional_argument, NULL, WATCH },
    { "color", required_argument, NULL, COLOR },
    { "help", no_argument, NULL, 'h' },
    { "version", no_argument, NULL, VERSION },
    { NULL, 0, NULL, 0 },
};

void set_option(struct options *options, int option, char *value)
{
    static const char *const backends[] = { "auto", "nft", "iptables" }, *const formats[] = { "nft", "iptables" },
                      *const colors[] = { "never", "always", "auto" };
    struct tp_rules_config *config = &options->config;
    switch (option) {
    case NAME: config->name = value; break;
    case LISTEN: set_listener(options, value); break;
    case PORT: add_ports("--port", &config->ports, &config->n_ports, value); break;
    case BYPASS_PORT: add_ports("--bypass-port", &config->bypass_ports, &config->n_bypass_ports, value); break;
    case REJECT_PORT: add_ports("--reject-port", &config->reject_ports, &config->n_reject_ports, value); break;
    case DST: add_prefix("--dst", &config->dst, &config->n_dst, value); break;
    case SRC: add_prefix("--src", &config->src, &config->n_src, value); break;
    case BYPASS: add_prefix("--bypass", &config->bypass, &config->n_bypass, value); break;
    case BYPASS_SRC: add_prefix("--bypass-src", &config->bypass_src, &config->n_bypass_src, value); break;
    case INTERFACE: add_name(&config->interfaces, &config->n_interfaces, value); break;
    case BYPASS_INTERFACE: add_name(&config->bypass_interfaces, &config->n_bypass_interfaces, value); break;
    case MAC: add_mac("--mac", &config->macs, &config->n_macs, value); break;
    case BYPASS_MAC: add_mac("--bypass-mac", &config->bypass_macs, &config->n_bypass_macs, value); break;
    case UID: add_ids("--uid", &config->uids, &config->n_uids, value); break;
    case BYPASS_UID: add_ids("--bypass-uid", &config->bypass_uids, &config->n_bypass_uids, value); break;
    case GID: add_ids("--gid", &config->gids, &config->n_gids, value); break;
    case BYPASS_GID: add_ids("--bypass-gid", &config->bypass_gids, &config->n_bypass_gids, value); break;
    case CGROUP: add_name(&config->cgroups, &config->n_cgroups, value); break;
    case BYPASS_CGROUP: add_name(&config->bypass_cgroups, &config->n_bypass_cgroups, value); break;
    case BYPASS_MARK: set_mark("--bypass-mark", value, &config->bypass_mark, &config->bypass_mark_mask); break;
    case MARK: set_mark("--mark", value, &config->mark, &config->mark_mask); break;
    case TABLE: config->table = (uint32_t)number("--table", value, UINT32_MAX); break;
    case PRIORITY: config->priority = (uint32_t)number("--priority", value, UINT32_MAX); break;
    case TCP: config->protocols |= TP_PROTO_TCP; break;
    case UDP: config->protocols |= TP_PROTO_UDP; break;
    case '4': config->families |= TP_FAMILY_IPV4; break;
    case '6': config->families |= TP_FAMILY_IPV6; break;
    case BACKEND: config->backend = one_of("--backend", value, backends, 3); break;
    case REDIRECT: config->flags |= TP_RULES_REDIRECT; break;
    case DIVERT_ONLY: config->flags |= TP_RULES_DIVERT_ONLY; break;
    case LOCAL_OUTPUT: config->flags |= TP_RULES_LOCAL_OUTPUT; break;
    case FAIL_OPEN: config->flags |= TP_RULES_FAIL_OPEN; break;
    case ALLOW_DIRECT: config->flags |= TP_RULES_ALLOW_DIRECT; break;
    case NOTRACK: config->flags |= TP_RULES_NOTRACK; break;
    case NEW_ONLY: config->flags |= TP_RULES_NEW_ONLY; break;
    case LOCAL_SERVERS: config->flags |= TP_RULES_LOCAL_SERVERS; break;
    case PERSIST: config->flags |= TP_RULES_PERSIST; options->persist = true; break;
    case FORMAT: options->format = one_of("--format", value, formats, 2) + TP_FORMAT_NFT; break;
    case JSON: options->json = true; break;
    case ALL: options->all = true; break;
    case WATCH:
        options->watch = true;
        options->seconds = value ? (unsigned)number("--watch", value, 86400) : 1;
        if (options->seconds == 0)
            usage_error("--watch: at least one second");
        break;
    case COLOR: {
        uint32_t color = one_of("--color", value, colors, 3);
        options->color = color == 2 ? -1 : (int)color;
        break;
    }
    default: exit(USAGE); /* getopt_long has printed the cause */
    }
}
