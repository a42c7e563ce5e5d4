/*
 * Addresses of this host. The proxy opens no session for them: a reply to such an address would be received as a
 * request, and its reply again, in an endless loop.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <linux/filter.h>
#include <string.h>
#include <sys/socket.h>

#include "udp_proxy.h"

/*
 * Whether an address of the session is this host's own, or one that no other host can have: the source
 * or destination of an IPv6 packet may be v4-mapped.
 */
bool is_own(const struct key *key)
{
    return IN6_IS_ADDR_UNSPECIFIED(&key->client.sin6_addr) ||
           IN6_IS_ADDR_V4MAPPED(&key->client.sin6_addr) != IN6_IS_ADDR_V4MAPPED(&key->orig_dst.sin6_addr) ||
           is_own_address((const struct sockaddr *)&key->client, sizeof key->client) ||
           is_own_address((const struct sockaddr *)&key->orig_dst, sizeof key->orig_dst);
}

/*
 * This host may get further addresses later. For each address the kernel adds a local route, and reports it to this
 * socket (rtnetlink(7)).
 */
int open_route_socket(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, NLMSG_HDRLEN + offsetof(struct rtmsg, rtm_type)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RTN_LOCAL, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    struct sock_fprog only_local = { .len = sizeof code / sizeof *code, .filter = code };
    struct sockaddr_nl groups = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &only_local, sizeof only_local) != 0 ||
        bind(fd, (struct sockaddr *)&groups, sizeof groups) != 0)
        err(1, "rtnetlink");
    return fd;
}

static bool is_within(const struct sockaddr_in6 *addr, const struct in6_addr *prefix, unsigned len)
{
    unsigned bytes = len / 8, bits = len % 8;
    return memcmp(&addr->sin6_addr, prefix, bytes) == 0 &&
           (bits == 0 || (addr->sin6_addr.s6_addr[bytes] ^ prefix->s6_addr[bytes]) >> (8 - bits) == 0);
}

/* Ends the sessions with an address in the prefix that is now an address of this host. */
static void end_own_sessions(const struct in6_addr *prefix, unsigned len)
{
    for (struct session *session = by_use.newer, *newer; session != &by_use; session = newer) {
        newer = session->newer;
        const struct key *key = &session->key;
        if ((is_within(&key->client, prefix, len) || is_within(&key->orig_dst, prefix, len)) && is_own(key)) {
            close_session(session);
            count.denied++;
        }
    }
}

void handle_route_messages(int route_fd)
{
    union {
        struct nlmsghdr header;
        char bytes[4096];
    } message;
    ssize_t len;
    while ((len = recv(route_fd, &message, sizeof message, MSG_DONTWAIT)) >= 0 || errno == ENOBUFS) {
        if (len < 0) {
            end_own_sessions(&in6addr_any, 0);    /* messages were lost: check every session */
            continue;
        }
        const struct rtmsg *route = NLMSG_DATA(&message.header);
        if ((size_t)len < NLMSG_LENGTH(sizeof *route) || message.header.nlmsg_type != RTM_NEWROUTE)
            continue;
        size_t rest = (size_t)len - NLMSG_LENGTH(sizeof *route), size = route->rtm_family == AF_INET ? 4 : 16;
        struct in6_addr prefix = size == 4 ? (struct in6_addr){ .s6_addr = { [10] = 0xff, [11] = 0xff } } : in6addr_any;
        for (const struct rtattr *attr = RTM_RTA(route); RTA_OK(attr, rest); attr = RTA_NEXT(attr, rest))
            if (attr->rta_type == RTA_DST && RTA_PAYLOAD(attr) == size)
                memcpy(&prefix.s6_addr[16 - size], RTA_DATA(attr), size);
        end_own_sessions(&prefix, route->rtm_dst_len + (size == 4 ? 96 : 0));
    }
}
