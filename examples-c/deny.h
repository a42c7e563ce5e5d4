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
 * A header to copy.
 */
#ifndef DENY_H
#define DENY_H

#include <arpa/inet.h>
#include <errno.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

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
        /* ::/0 means every IPv6 address, not also every IPv4 address. */
        if (list->prefixes[i].len < 96 && IN6_IS_ADDR_V4MAPPED(&ip))
            continue;
        unsigned bytes = list->prefixes[i].len / 8, bits = list->prefixes[i].len % 8;
        unsigned mask = 0xff00u >> bits & 0xff;
        if (memcmp(&ip, &list->prefixes[i].addr, bytes) == 0 &&
            (bits == 0 || ((ip.s6_addr[bytes] ^ list->prefixes[i].addr.s6_addr[bytes]) & mask) == 0))
            return true;
    }
    return false;
}

/*
 * Whether the kernel would deliver packets for this address to this host, or to many hosts (broadcast,
 * multicast, anycast). A proxy that talks to itself does so without end. Asks the routing table
 * (RTM_GETROUTE) each time, so it knows addresses that were added later and networks that are local by a
 * route, and does not depend on net.ipv4.ip_nonlocal_bind. True also if the kernel could not be asked. Two
 * system calls: for new clients, not for each datagram. Each thread keeps a socket for it.
 */
static inline bool is_own_address(const struct sockaddr *addr, socklen_t len)
{
    static _Thread_local int routes = -1;
    static _Thread_local uint32_t seq;
    struct in6_addr ip;
    if (!deny_address(addr, &ip))
        return false;
    unsigned size = IN6_IS_ADDR_V4MAPPED(&ip) ? 4 : 16;
    struct {
        struct nlmsghdr header;
        struct rtmsg route;
        struct rtattr link_head;
        uint32_t link;              /* a link-local address is looked up on its link; 0: on any */
        struct rtattr dst_head;
        uint8_t dst[16];
    } question = {
        .header = { .nlmsg_type = RTM_GETROUTE, .nlmsg_flags = NLM_F_REQUEST, .nlmsg_seq = ++seq },
        .route = { .rtm_family = size == 4 ? AF_INET : AF_INET6, .rtm_dst_len = (uint8_t)(8 * size) },
        .link_head = { .rta_len = RTA_LENGTH(4), .rta_type = RTA_OIF },
        .dst_head = { .rta_len = (uint16_t)RTA_LENGTH(size), .rta_type = RTA_DST },
    };
    struct {
        struct nlmsghdr header;
        union { struct rtmsg route; struct nlmsgerr error; } body;
    } answer;
    question.header.nlmsg_len = (uint32_t)(sizeof question - sizeof question.dst + size);
    memcpy(question.dst, &ip.s6_addr[16 - size], size);
    if (addr->sa_family == AF_INET6 && len >= sizeof(struct sockaddr_in6))
        question.link = ((const struct sockaddr_in6 *)addr)->sin6_scope_id;

    if (routes < 0)
        routes = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (routes < 0 || send(routes, &question, question.header.nlmsg_len, 0) < 0)
        return true;
    do {
        /* The rest of the answer is not needed, and is discarded. */
        if (recv(routes, &answer, sizeof answer, MSG_DONTWAIT) < (ssize_t)sizeof answer)
            return true;
    } while (answer.header.nlmsg_seq != seq);
    if (answer.header.nlmsg_type == NLMSG_ERROR)    /* usually, there is no route */
        return answer.body.error.error == -ENOMEM || answer.body.error.error == -ENOBUFS;
    return answer.body.route.rtm_type == RTN_LOCAL || answer.body.route.rtm_type == RTN_BROADCAST ||
           answer.body.route.rtm_type == RTN_ANYCAST || answer.body.route.rtm_type == RTN_MULTICAST;
}

#endif
