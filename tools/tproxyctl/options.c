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

/* Adds ports such as 80, 8000-8010 or 80,443. */
static void add_ports(struct options *options, char *text)
{
    size_t before = options->config.n_ports;
    for (char *one = strtok(text, ","); one; one = strtok(NULL, ",")) {
        char *dash = strchr(one, '-');
        if (dash)
            *dash++ = 0;
        if (options->config.n_ports == MANY)
            usage_error("--port: more than %d", MANY);
        uint16_t first = (uint16_t)number("--port", one, 65535);
        uint16_t last = dash ? (uint16_t)number("--port", dash, 65535) : first;
        options->ports[options->config.n_ports++] = (struct tp_port_range){ first, last };
    }
    if (options->config.n_ports == before)
        usage_error("--port: no port given");
    options->config.ports = options->ports;
}

/* Adds a prefix such as 192.0.2.0/24 or 2001:db8::/32. An address without a length is a full-length prefix. */
static void add_prefix(const char *what, struct tp_prefix *prefixes, size_t *n, char *text)
{
    char *slash = strchr(text, '/');
    if (slash)
        *slash++ = 0;
    if (*n == MANY)
        usage_error("%s: more than %d", what, MANY);
    struct tp_prefix *prefix = &prefixes[*n];
    if (inet_pton(AF_INET, text, prefix->addr) == 1)
        prefix->family = AF_INET;
    else if (inet_pton(AF_INET6, text, prefix->addr) == 1)
        prefix->family = AF_INET6;
    else
        usage_error("%s: %s is not an address", what, text);
    unsigned long bits = prefix->family == AF_INET ? 32 : 128;
    prefix->len = (uint8_t)(slash ? number(what, slash, bits) : bits);
    ++*n;
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

static void set_mark(struct options *options, char *text)
{
    char *slash = strchr(text, '/');
    if (slash)
        *slash++ = 0;
    options->config.mark = (uint32_t)number("--mark", text, UINT32_MAX);
    if (slash)
        options->config.mark_mask = (uint32_t)number("--mark", slash, UINT32_MAX);
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
    case PORT: add_ports(options, value); break;
    case DST: add_prefix("--dst", options->dst, &config->n_dst, value); config->dst = options->dst; break;
    case SRC: add_prefix("--src", options->src, &config->n_src, value); config->src = options->src; break;
    case BYPASS: add_prefix("--bypass", options->bypass, &config->n_bypass, value); config->bypass = options->bypass; break;
    case INTERFACE:
        if (config->n_interfaces == MANY)
            usage_error("--interface: more than %d", MANY);
        options->interfaces[config->n_interfaces++] = value;
        config->interfaces = options->interfaces;
        break;
    case MARK: set_mark(options, value); break;
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
