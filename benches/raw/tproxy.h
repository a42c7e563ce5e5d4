/*
 * C code equivalent to the library's calls, as a program without the library
 * has it. The benchmark compiles the same programs with this header instead of
 * the library's header, and installs the textbook rules itself.
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

enum { TP_NONBLOCK = 1, TP_LISTEN_REUSEPORT = 2, TP_CONNECT_DATA_FOLLOWS = 16, TP_ACCEPT_TPROXY = 128, TP_RULES_DIVERT_ONLY = 1 };

typedef struct tp_rules tp_rules;

struct tp_port_range {
    uint16_t first, last;
    uint32_t protocols;
};

struct tp_prefix {
    uint8_t family, len, reserved[2], addr[16];
};

struct tp_rules_config {
    const int *listeners;
    size_t n_listeners;
    uint32_t flags;
    const struct tp_port_range *ports;
    size_t n_ports;
    const struct tp_prefix *dst;
    size_t n_dst;
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
        (flags & TP_LISTEN_REUSEPORT && setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &raw_on, sizeof raw_on) != 0) ||
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

/* For TPROXY and REDIRECT. */
static inline int tp_orig_dst(int fd, struct sockaddr *addr, socklen_t *addrlen)
{
    int transparent = 0;
    socklen_t len = sizeof transparent;
    if (getsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &transparent, &len) != 0)
        return -1;
    if (transparent)
        return getsockname(fd, addr, addrlen);
    if (getsockopt(fd, IPPROTO_IP, SO_ORIGINAL_DST, addr, addrlen) == 0)
        return 0;
    return getsockopt(fd, IPPROTO_IPV6, SO_ORIGINAL_DST, addr, addrlen);
}

static inline int tp_accept(int listener, struct sockaddr *client, socklen_t *clientlen, struct sockaddr *addr,
                            socklen_t *addrlen, uint32_t flags)
{
    int fd = accept4(listener, client, clientlen, SOCK_CLOEXEC | (flags & TP_NONBLOCK ? SOCK_NONBLOCK : 0));
    if (fd < 0)
        return -1;
    if ((flags & TP_ACCEPT_TPROXY ? getsockname(fd, addr, addrlen) : tp_orig_dst(fd, addr, addrlen)) != 0)
        return raw_close(fd);
    return fd;
}

/* accept() of a dual-stack listener gives IPv4 addresses as v4-mapped IPv6. The outgoing socket needs AF_INET. */
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
        (flags & TP_CONNECT_DATA_FOLLOWS && setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &raw_off, sizeof raw_off) != 0) ||
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &raw_on, sizeof raw_on) != 0 ||
        bind(fd, (struct sockaddr *)&from, srclen) != 0 ||
        (connect(fd, (struct sockaddr *)&to, dstlen) != 0 && errno != EINPROGRESS))
        return raw_close(fd);
    return fd;
}

/* ---- Datagrams. ---- */

struct tp_datagram {
    void *data;
    size_t capacity, len;
    uint32_t segment_len, flags;
    int32_t error;
    struct sockaddr_storage client, orig_dst;
};

enum { TP_BATCH_MAX = 64 };

/* Finds the original destination, in the address family of the sender's address. */
static inline int raw_find(struct msghdr *msg, struct sockaddr *addr, socklen_t *addrlen)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c != NULL; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_ORIGDSTADDR) {
            memcpy(addr, CMSG_DATA(c), sizeof(struct sockaddr_in6)), *addrlen = sizeof(struct sockaddr_in6);
            return 0;
        }
        if (c->cmsg_level != IPPROTO_IP || c->cmsg_type != IP_ORIGDSTADDR)
            continue;
        struct sockaddr_in v4;
        memcpy(&v4, CMSG_DATA(c), sizeof v4);
        if (msg->msg_namelen == 0 || ((struct sockaddr *)msg->msg_name)->sa_family == AF_INET) {
            memcpy(addr, &v4, sizeof v4), *addrlen = sizeof v4;
            return 0;
        }
        struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = v4.sin_port };
        v6.sin6_addr.s6_addr[10] = v6.sin6_addr.s6_addr[11] = 0xff;
        memcpy(v6.sin6_addr.s6_addr + 12, &v4.sin_addr, 4);
        memcpy(addr, &v6, sizeof v6), *addrlen = sizeof v6;
        return 0;
    }
    errno = ENOENT;
    return -1;
}

static inline int tp_msg_orig_dst(const struct msghdr *msg, struct sockaddr *addr, socklen_t *addrlen)
{
    return raw_find((struct msghdr *)msg, addr, addrlen);
}

static inline ssize_t tp_recvfrom(int fd, void *buf, size_t len, int flags, struct sockaddr *src, socklen_t *srclen,
                                  struct sockaddr *dst, socklen_t *dstlen)
{
    char control[CMSG_SPACE(sizeof(struct sockaddr_in6)) + CMSG_SPACE(64)];
    struct iovec part = { .iov_base = buf, .iov_len = len };
    struct msghdr msg = { .msg_name = src, .msg_namelen = *srclen, .msg_iov = &part, .msg_iovlen = 1,
                          .msg_control = control, .msg_controllen = sizeof control };
    ssize_t n = recvmsg(fd, &msg, flags);
    if (n < 0)
        return -1;
    *srclen = msg.msg_namelen;
    if (raw_find(&msg, dst, dstlen) != 0)
        *dstlen = 0;
    return n;
}

static inline int tp_recv_datagrams(int fd, struct tp_datagram *dgrams, unsigned count, int flags)
{
    static _Thread_local struct mmsghdr messages[TP_BATCH_MAX];
    static _Thread_local struct iovec parts[TP_BATCH_MAX];
    static _Thread_local char controls[TP_BATCH_MAX][CMSG_SPACE(sizeof(struct sockaddr_in6)) + CMSG_SPACE(64)];
    if (count > TP_BATCH_MAX)
        count = TP_BATCH_MAX;
    for (unsigned i = 0; i < count; i++) {
        parts[i] = (struct iovec){ .iov_base = dgrams[i].data, .iov_len = dgrams[i].capacity };
        messages[i].msg_hdr = (struct msghdr){ .msg_name = &dgrams[i].client, .msg_namelen = sizeof dgrams[i].client,
                                               .msg_iov = &parts[i], .msg_iovlen = 1,
                                               .msg_control = controls[i], .msg_controllen = sizeof controls[i] };
    }
    int n = recvmmsg(fd, messages, count, flags | MSG_WAITFORONE, NULL);
    for (int i = 0; i < n; i++) {
        struct msghdr *msg = &messages[i].msg_hdr;
        socklen_t len = sizeof dgrams[i].orig_dst;
        dgrams[i].len = messages[i].msg_len;
        dgrams[i].flags = (uint32_t)msg->msg_flags & (MSG_TRUNC | MSG_CTRUNC);
        dgrams[i].segment_len = 0, dgrams[i].error = 0;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c != NULL; c = CMSG_NXTHDR(msg, c))
            if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == 104 /* UDP_GRO */)
                memcpy(&dgrams[i].segment_len, CMSG_DATA(c), sizeof(int));
        if (raw_find(msg, (struct sockaddr *)&dgrams[i].orig_dst, &len) != 0)
            dgrams[i].orig_dst.ss_family = AF_UNSPEC;
    }
    return n;
}

/* ---- Rules. The benchmark installs the textbook rules, so these calls do nothing. ---- */

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
