/*
 * The calls of the relay by hand: what a program has in it that does not link
 * the library. The benchmark compiles the same relay with this header in place
 * of the library's; the rules it installs by itself, as the textbook says.
 */
#ifndef TPROXY_H
#define TPROXY_H

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef SO_ORIGINAL_DST
#define SO_ORIGINAL_DST 80
#endif
#ifndef IPV6_TRANSPARENT
#define IPV6_TRANSPARENT 75
#endif

enum { TP_NONBLOCK = 1, TP_REUSEPORT = 2, TP_DATA_FOLLOWS = 16, TP_RULES_DIVERT_ONLY = 1 };

typedef struct tp_rules tp_rules;

struct tp_port_range {
    uint16_t first, last;
};

struct tp_rules_config {
    const int *listeners;
    size_t n_listeners;
    uint32_t flags;
    const struct tp_port_range *ports;
    size_t n_ports;
};

static const int raw_on = 1, raw_off = 0;

static inline int raw_close(int fd)
{
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static inline int tp_listen(const struct sockaddr *addr, socklen_t addrlen, int backlog, uint32_t flags)
{
    int fd = socket(addr->sa_family, SOCK_STREAM | SOCK_CLOEXEC | (flags & TP_NONBLOCK ? SOCK_NONBLOCK : 0), 0);
    if (fd < 0)
        return -1;
    if (setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &raw_on, sizeof raw_on) != 0 ||
        (addr->sa_family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &raw_off, sizeof raw_off) != 0) ||
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &raw_on, sizeof raw_on) != 0 ||
        (flags & TP_REUSEPORT && setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &raw_on, sizeof raw_on) != 0) ||
        bind(fd, addr, addrlen) != 0 || listen(fd, backlog < 0 ? 1 << 30 : backlog) != 0)
        return raw_close(fd);
    return fd;
}

static inline int tp_socket(int domain, int type, int protocol)
{
    int fd = socket(domain, type | SOCK_CLOEXEC, protocol), v6 = domain == AF_INET6;
    if (fd < 0)
        return -1;
    if ((v6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &raw_off, sizeof raw_off) != 0) ||
        setsockopt(fd, v6 ? IPPROTO_IPV6 : IPPROTO_IP, v6 ? IPV6_TRANSPARENT : IP_TRANSPARENT, &raw_on, sizeof raw_on) != 0)
        return raw_close(fd);
    if ((type & ~(SOCK_CLOEXEC | SOCK_NONBLOCK)) != SOCK_DGRAM)
        return fd;
    if ((v6 && setsockopt(fd, IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, &raw_on, sizeof raw_on) != 0) ||
        setsockopt(fd, IPPROTO_IP, IP_RECVORIGDSTADDR, &raw_on, sizeof raw_on) != 0)
        return raw_close(fd);
    return fd;
}

/* Behind TPROXY or behind REDIRECT. The relay by hand does without: behind TPROXY alone getsockname() is enough. */
static inline int tp_orig_dst(int fd, struct sockaddr *addr, socklen_t *addrlen)
{
    int transparent = 0;
    socklen_t len = sizeof transparent;
#ifdef TPROXY_ALONE
    return getsockname(fd, addr, addrlen);
#endif
    if (getsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &transparent, &len) != 0)
        return -1;
    if (transparent)
        return getsockname(fd, addr, addrlen);
    if (getsockopt(fd, IPPROTO_IP, SO_ORIGINAL_DST, addr, addrlen) == 0)
        return 0;
    return getsockopt(fd, IPPROTO_IPV6, SO_ORIGINAL_DST, addr, addrlen);
}

/* What accept() of a dual-stack listener gives as v4-mapped is IPv4 on the way out. */
static inline void raw_address(const struct sockaddr *addr, uint16_t port, struct sockaddr_storage *place, socklen_t *len)
{
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)addr;
    if (addr->sa_family == AF_INET6 && !IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
        struct sockaddr_in6 *to = (struct sockaddr_in6 *)place;
        *to = *v6, to->sin6_port = port, *len = sizeof *to;
        return;
    }
    struct sockaddr_in *to = (struct sockaddr_in *)place;
    if (addr->sa_family == AF_INET)
        *to = *(const struct sockaddr_in *)addr;
    else
        *to = (struct sockaddr_in){ .sin_family = AF_INET }, memcpy(&to->sin_addr, v6->sin6_addr.s6_addr + 12, 4);
    to->sin_port = port, *len = sizeof *to;
}

static inline int tp_connect_from(const struct sockaddr *src, socklen_t srclen, const struct sockaddr *dst, socklen_t dstlen,
                                  uint32_t flags)
{
    struct sockaddr_storage from, to;
    raw_address(src, 0, &from, &srclen);
    raw_address(dst, ((const struct sockaddr_in *)dst)->sin_port, &to, &dstlen);
    int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC | (flags & TP_NONBLOCK ? SOCK_NONBLOCK : 0), 0);
    if (fd < 0)
        return -1;
    int level = to.ss_family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6;
    int option = to.ss_family == AF_INET ? IP_TRANSPARENT : IPV6_TRANSPARENT;
    if (setsockopt(fd, level, option, &raw_on, sizeof raw_on) != 0 ||
        (flags & TP_DATA_FOLLOWS && setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &raw_off, sizeof raw_off) != 0) ||
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &raw_on, sizeof raw_on) != 0 ||
        bind(fd, (struct sockaddr *)&from, srclen) != 0 ||
        (connect(fd, (struct sockaddr *)&to, dstlen) != 0 && errno != EINPROGRESS))
        return raw_close(fd);
    return fd;
}

static inline int tp_install_rules(const struct tp_rules_config *config, size_t size, tp_rules **rules)
{
    (void)config, (void)size;
    *rules = NULL;
    return 0;
}

static inline int tp_replace_rules(tp_rules *rules, const struct tp_rules_config *config, size_t size)
{
    (void)rules, (void)config, (void)size;
    return 0;
}

static inline int tp_remove_rules(tp_rules *rules)
{
    (void)rules;
    return 0;
}

static inline const char *tp_last_error(void)
{
    return strerror(errno);
}

#endif
