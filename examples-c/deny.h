/*
 * Which destinations a proxy does not call for its clients. A proxy connects from
 * inside: what only this host or this network may reach, its clients reach
 * through it, if it lets them.
 *
 * Refused unless the list is cleared (--deny none): loopback, link-local (cloud
 * metadata services are at 169.254.169.254), the unspecified and "this network",
 * multicast, reserved addresses, and the metadata address fd00:ec2::254. Add
 * management networks: --deny 10.9.0.0/16.
 *
 * A header to copy: three functions, no state of its own.
 */
#ifndef DENY_H
#define DENY_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_DENIED = 64 };

/* Prefixes of addresses as IPv6 has them, IPv4 v4-mapped. */
struct deny_list {
    struct { struct in6_addr addr; unsigned len; } prefixes[MAX_DENIED];
    size_t n;
};

/* An address as IPv6 has it; false: neither IPv4 nor IPv6. */
static inline bool deny_address(const struct sockaddr *addr, struct in6_addr *ip)
{
    if (addr->sa_family == AF_INET6) {
        *ip = ((const struct sockaddr_in6 *)addr)->sin6_addr;
    } else if (addr->sa_family == AF_INET) {
        *ip = (struct in6_addr){ .s6_addr = { [10] = 0xff, [11] = 0xff } };
        memcpy(&ip->s6_addr[12], &((const struct sockaddr_in *)addr)->sin_addr, 4);
    } else {
        return false;
    }
    return true;
}

/* Adds ADDR/LEN or ADDR, or clears the list: "none". False: not a prefix, or too many. */
static inline bool deny_add(struct deny_list *list, const char *text)
{
    if (strcmp(text, "none") == 0) {
        list->n = 0;
        return true;
    }
    char addr[INET6_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    size_t size = slash != NULL ? (size_t)(slash - text) : strlen(text);
    if (size >= sizeof addr || list->n == MAX_DENIED)
        return false;
    memcpy(addr, text, size);
    addr[size] = '\0';
    struct in6_addr ip = { .s6_addr = { [10] = 0xff, [11] = 0xff } };
    unsigned before = inet_pton(AF_INET, addr, &ip.s6_addr[12]) == 1 ? 96 : inet_pton(AF_INET6, addr, &ip) == 1 ? 0 : 128;
    char *end = "";
    unsigned long len = slash != NULL ? strtoul(slash + 1, &end, 10) : 128 - before;
    if (before == 128 || *end != '\0' || (slash != NULL && slash[1] == '\0') || len > 128 - before)
        return false;
    list->prefixes[list->n].addr = ip;
    list->prefixes[list->n++].len = before + (unsigned)len;
    return true;
}

static inline void deny_defaults(struct deny_list *list)
{
    static const char *const usual[] = {
        "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3",           /* RFC 6890; 224/4 multicast, 240/4 reserved */
        "::/96", "fe80::/10", "fec0::/10", "ff00::/8", "fd00:ec2::254/128",
    };
    list->n = 0;
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++)
        deny_add(list, usual[i]);
}

/* Whether a destination is not to be called. What is no address is not. */
static inline bool denied(const struct deny_list *list, const struct sockaddr *to)
{
    struct in6_addr ip;
    if (!deny_address(to, &ip))
        return true;
    for (size_t i = 0; i < list->n; i++) {
        unsigned bytes = list->prefixes[i].len / 8, bits = list->prefixes[i].len % 8;
        unsigned mask = 0xff00u >> bits & 0xff;
        if (memcmp(&ip, &list->prefixes[i].addr, bytes) == 0 &&
            (bits == 0 || ((ip.s6_addr[bytes] ^ list->prefixes[i].addr.s6_addr[bytes]) & mask) == 0))
            return true;
    }
    return false;
}

/*
 * Whether an address is this host's now: an ordinary socket can be bound to it. (Not with
 * net.ipv4.ip_nonlocal_bind.) A proxy that talks to itself does so without end. Three system
 * calls: for new clients, not for each datagram.
 */
static inline bool is_own_address(const struct sockaddr *addr, socklen_t len)
{
    struct in6_addr ip;
    if (!deny_address(addr, &ip))
        return false;
    struct sockaddr_in v4 = { .sin_family = AF_INET };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = ip };
    bool mapped = IN6_IS_ADDR_V4MAPPED(&ip);
    memcpy(&v4.sin_addr, &ip.s6_addr[12], 4);
    if (addr->sa_family == AF_INET6 && len >= sizeof v6)
        v6.sin6_scope_id = ((const struct sockaddr_in6 *)addr)->sin6_scope_id;
    int fd = socket(mapped ? AF_INET : AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool own = fd >= 0 && bind(fd, mapped ? (struct sockaddr *)&v4 : (struct sockaddr *)&v6, mapped ? sizeof v4 : sizeof v6) == 0;
    if (fd >= 0)
        close(fd);
    return own;
}

#endif
