/*
 * Destinations that a proxy must not connect to for its clients.
 *
 * A proxy connects from inside the network. Without this check, its clients can
 * reach every service that only this host or this network may reach.
 *
 * Refused, unless the list is cleared (--deny none): loopback, link-local, the
 * unspecified address and "this network", multicast, reserved addresses, and the
 * metadata services of clouds. Add management networks: --deny 10.9.0.0/16.
 *
 * Copy this header into your program.
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

/* Prefixes of IPv6 addresses. IPv4 prefixes are v4-mapped. */
struct deny_list {
    struct { struct in6_addr addr; unsigned len; } prefixes[MAX_DENIED];
    size_t n;
};

/* Converts an address to IPv6 (IPv4: v4-mapped). False: the family is neither IPv4 nor IPv6. */
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

/* Adds the prefix ADDR/LEN or the address ADDR; "none" clears the list. False: not a prefix, or the list is full. */
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
        /* RFC 6890. 224.0.0.0/3 is multicast (224.0.0.0/4) and reserved (240.0.0.0/4). */
        "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3",
        "::/96", "fe80::/10", "fec0::/10", "ff00::/8",
        /* Metadata services, by the documentation of the clouds. Most of them are at 169.254.169.254, which is link-local. */
        "fd00:ec2::254",      /* AWS EC2: Instance Metadata Service over IPv6 */
        "fd20:ce::254",       /* Google Compute Engine: metadata server over IPv6 */
        "100.100.100.200",    /* Alibaba Cloud ECS: instance metadata */
        "168.63.129.16",      /* Microsoft Azure: WireServer, the platform's virtual public address */
        "192.0.0.192",        /* Oracle Cloud Infrastructure Classic: instance metadata */
    };
    list->n = 0;
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++)
        deny_add(list, usual[i]);
}

/* Whether connections to a destination are refused. An address of another family is refused too. */
static inline bool denied(const struct deny_list *list, const struct sockaddr *to)
{
    struct in6_addr ip;
    if (!deny_address(to, &ip))
        return true;
    for (size_t i = 0; i < list->n; i++) {
        /* ::/0 matches every IPv6 address, and no IPv4 address. */
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
 * Returns the netlink socket of this thread for is_own_address(), or -1. A thread that can run out of descriptors
 * calls it once at its start.
 */
static inline int deny_socket(void)
{
    static _Thread_local int routes = -1;
    if (routes < 0)
        routes = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    return routes;
}

/*
 * Whether the kernel would deliver packets for this address to this host or to many hosts (broadcast,
 * multicast, anycast). A proxy that connects to itself does so in an endless loop.
 *
 * Each call queries the routing table (RTM_GETROUTE). The result therefore includes addresses that were
 * added later and prefixes with a local route, and does not depend on net.ipv4.ip_nonlocal_bind. If the
 * query fails, the result is true. A call makes two system calls: call it for new clients, not for each
 * datagram.
 */
static inline bool is_own_address(const struct sockaddr *addr, socklen_t len)
{
    static _Thread_local uint32_t seq;
    struct in6_addr ip;
    if (!deny_address(addr, &ip))
        return false;
    unsigned size = IN6_IS_ADDR_V4MAPPED(&ip) ? 4 : 16;
    struct {
        struct nlmsghdr header;
        struct rtmsg route;
        struct rtattr link_head;
        uint32_t link;              /* interface of a link-local address; 0: any */
        struct rtattr dst_head;
        uint8_t dst[16];
    } request = {
        .header = { .nlmsg_type = RTM_GETROUTE, .nlmsg_flags = NLM_F_REQUEST, .nlmsg_seq = ++seq },
        .route = { .rtm_family = size == 4 ? AF_INET : AF_INET6, .rtm_dst_len = (uint8_t)(8 * size) },
        .link_head = { .rta_len = RTA_LENGTH(4), .rta_type = RTA_OIF },
        .dst_head = { .rta_len = (uint16_t)RTA_LENGTH(size), .rta_type = RTA_DST },
    };
    struct {
        struct nlmsghdr header;
        union { struct rtmsg route; struct nlmsgerr error; } body;
    } reply;
    request.header.nlmsg_len = (uint32_t)(sizeof request - sizeof request.dst + size);
    memcpy(request.dst, &ip.s6_addr[16 - size], size);
    if (addr->sa_family == AF_INET6 && len >= sizeof(struct sockaddr_in6))
        request.link = ((const struct sockaddr_in6 *)addr)->sin6_scope_id;

    int routes = deny_socket();
    if (routes < 0 || send(routes, &request, request.header.nlmsg_len, 0) < 0)
        return true;
    do {
        /* Only the beginning of the reply is needed. The kernel discards the rest. */
        if (recv(routes, &reply, sizeof reply, MSG_DONTWAIT) < (ssize_t)sizeof reply)
            return true;
    } while (reply.header.nlmsg_seq != seq);
    if (reply.header.nlmsg_type == NLMSG_ERROR)    /* usually because no route exists */
        return reply.body.error.error == -ENOMEM || reply.body.error.error == -ENOBUFS;
    return reply.body.route.rtm_type == RTN_LOCAL || reply.body.route.rtm_type == RTN_BROADCAST ||
           reply.body.route.rtm_type == RTN_ANYCAST || reply.body.route.rtm_type == RTN_MULTICAST;
}

#endif
