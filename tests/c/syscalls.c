/*
 * Makes the system calls of each call of the library, or those of equivalent C code.
 *
 *     syscalls NAME library|hand
 *
 * Performs one operation between two writes to descriptor -1, which mark it in
 * the output of strace. The network namespace must have lo up.
 */
#define _GNU_SOURCE
#include <err.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <tproxy.h>

static const int on = 1, off = 0;

static void mark(void)
{
    if (write(-1, "mark", 4) != -1)
        err(1, "write");
}

static struct sockaddr *sa(void *addr)
{
    return (struct sockaddr *)addr;
}

static int socket_by_hand(int domain, int type)
{
    int fd = socket(domain, type | SOCK_CLOEXEC, 0);
    bool six = domain == AF_INET6;
    if (six)
        setsockopt(fd, SOL_IPV6, IPV6_V6ONLY, &off, sizeof off);
    setsockopt(fd, six ? SOL_IPV6 : SOL_IP, six ? IPV6_TRANSPARENT : IP_TRANSPARENT, &on, sizeof on);
    if (type == SOCK_DGRAM) {
        if (six)
            setsockopt(fd, SOL_IPV6, IPV6_RECVORIGDSTADDR, &on, sizeof on);
        setsockopt(fd, SOL_IP, IP_RECVORIGDSTADDR, &on, sizeof on);
    }
    return fd;
}

/* Discards datagrams that came before connect(2), when the socket received from any sender. Here there are none. */
static void discard_datagrams(int fd)
{
    recv(fd, (void *)1, 0, MSG_DONTWAIT);
}

static int connect_by_hand(struct sockaddr *src, socklen_t src_len, struct sockaddr *dst, socklen_t dst_len, uint32_t flags)
{
    bool six = src->sa_family == AF_INET6, datagrams = (flags & TP_CONNECT_DGRAM) != 0;
    int fd = socket(src->sa_family, (datagrams ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    setsockopt(fd, six ? SOL_IPV6 : SOL_IP, six ? IPV6_TRANSPARENT : IP_TRANSPARENT, &on, sizeof on);
    if (flags & TP_CONNECT_DATA_FOLLOWS)
        setsockopt(fd, SOL_TCP, TCP_QUICKACK, &off, sizeof off);
    if (flags & (TP_CONNECT_KEEP_PORT | TP_CONNECT_SAME_PORT))
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    else if (!datagrams)
        setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    bind(fd, src, src_len);
    connect(fd, dst, dst_len);
    if (datagrams)
        discard_datagrams(fd);
    return fd;
}

/* Equivalent C code with the same checks: sets an option only if it is not set. */
static void set_option(int fd, int level, int name)
{
    int value = 0;
    socklen_t len = sizeof value;
    if (getsockopt(fd, level, name, &value, &len) == 0 && value == 0)
        setsockopt(fd, level, name, &on, sizeof on);
}

static int connect_socket_by_hand(int fd, struct sockaddr *src, socklen_t src_len, struct sockaddr *dst, socklen_t dst_len, uint32_t flags)
{
    bool six = src->sa_family == AF_INET6;
    struct sockaddr_in6 own;
    int type;
    socklen_t own_len = sizeof own, type_len = sizeof type;
    getsockname(fd, (struct sockaddr *)&own, &own_len);
    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_len);
    set_option(fd, six ? SOL_IPV6 : SOL_IP, six ? IPV6_TRANSPARENT : IP_TRANSPARENT);
    if (flags & (TP_CONNECT_KEEP_PORT | TP_CONNECT_SAME_PORT))
        set_option(fd, SOL_SOCKET, SO_REUSEADDR);
    else if (type == SOCK_STREAM)
        set_option(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT);
    bind(fd, src, src_len);
    int rc = connect(fd, dst, dst_len);
    if (type == SOCK_DGRAM)
        discard_datagrams(fd);
    return rc;
}

static int accept_by_hand(int listener, struct sockaddr *client, socklen_t *client_len, struct sockaddr *addr, socklen_t *len, uint32_t flags)
{
    int fd = accept4(listener, client, client_len, SOCK_CLOEXEC | (flags & TP_NONBLOCK ? SOCK_NONBLOCK : 0));
    int transparent = 0;
    socklen_t size = sizeof transparent;
    if ((flags & TP_ACCEPT_TPROXY) == 0)
        getsockopt(fd, SOL_IP, IP_TRANSPARENT, &transparent, &size);
    getsockname(fd, addr, len);
    return fd;
}

static int orig_dst_by_hand(int fd, struct sockaddr *addr, socklen_t *len)
{
    int transparent = 0;
    socklen_t size = sizeof transparent;
    getsockopt(fd, SOL_IP, IP_TRANSPARENT, &transparent, &size);
    return transparent ? getsockname(fd, addr, len) : -1;
}

/* Number of datagrams per batch, and number of source ports of the replies. */
enum { DATAGRAMS = 64, PORTS = 3 };

static int datagrams(const char *name, struct sockaddr *loopback, socklen_t len)
{
    static char bytes[DATAGRAMS][64];
    static struct tp_datagram dgrams[PORTS * DATAGRAMS];
    struct sockaddr_storage to;
    socklen_t to_len = sizeof to;
    int fd = tp_socket(loopback->sa_family, SOCK_DGRAM, 0);
    tp_bind_nonlocal(fd, loopback, len);
    getsockname(fd, sa(&to), &to_len);
    for (int i = 0; i < DATAGRAMS; i++) {
        dgrams[i] = (struct tp_datagram){ .data = bytes[i], .capacity = sizeof bytes[i] };
        sendto(fd, "question", 8, 0, sa(&to), to_len);
    }
    if (strncmp(name, "recvfrom", 8) == 0) {
        struct sockaddr_storage src, dst;
        socklen_t src_len = sizeof src, dst_len = sizeof dst;
        mark();
        ssize_t n = tp_recvfrom(fd, bytes[0], sizeof bytes[0], 0, sa(&src), &src_len, sa(&dst), &dst_len);
        mark();
        return n == 8 && memcmp(&dst, &to, to_len) == 0 ? fd : -1;
    }
    bool replies = strncmp(name, "reply", 5) == 0;
    if (!replies)
        mark();
    int n = tp_recv_datagrams(fd, dgrams, DATAGRAMS, 0);
    if (!replies) {
        mark();
        return n == DATAGRAMS ? fd : -1;
    }
    bool raw = strstr(name, "raw") != NULL;
    int answers = raw ? DATAGRAMS : PORTS * DATAGRAMS;
    struct tp_replier *replier;
    struct tp_replier_config config = { .flags = raw ? TP_REPLIER_RAW : 0 };
    if (n != DATAGRAMS || tp_replier_open(&config, sizeof config, &replier) != 0)
        return -1;
    /* The first round creates the sockets. The port has the same offset in both families. */
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < answers; i++) {
            dgrams[i] = dgrams[i % DATAGRAMS];
            ((struct sockaddr_in *)&dgrams[i].orig_dst)->sin_port = htons(4000 + i % PORTS);
        }
        if (round == 1)
            mark();
        if (tp_reply(replier, dgrams, answers) != answers)
            return -1;
        if (round == 1)
            mark();
    }
    tp_replier_close(replier);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        errx(2, "usage: syscalls NAME library|hand");
    const char *name = argv[1];
    bool library = strcmp(argv[2], "library") == 0;
    struct sockaddr_in v4 = { .sin_family = AF_INET };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };
    v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    bool six = strchr(name, '6') != NULL;
    struct sockaddr *loopback = six ? sa(&v6) : sa(&v4);
    socklen_t len = six ? sizeof v6 : sizeof v4;
    int domain = loopback->sa_family, fd = -1;

    if (strncmp(name, "socket", 6) == 0) {
        int type = strstr(name, "dgram") != NULL ? SOCK_DGRAM : SOCK_STREAM;
        mark();
        fd = library ? tp_socket(domain, type, 0) : socket_by_hand(domain, type);
        mark();
    } else if (strncmp(name, "rec", 3) == 0 || strncmp(name, "reply", 5) == 0) {
        fd = datagrams(name, loopback, len);
    } else {
        int listener = tp_listen(loopback, len, 1, 0);
        struct sockaddr_storage to, from = { 0 };
        socklen_t to_len = sizeof to;
        getsockname(listener, sa(&to), &to_len);
        uint32_t flags = strstr(name, "keep") != NULL ? TP_CONNECT_KEEP_PORT : strstr(name, "same") != NULL ? TP_CONNECT_SAME_PORT
                       : strstr(name, "data") != NULL ? TP_CONNECT_DATA_FOLLOWS : 0;
        bool dgram = strstr(name, "dgram") != NULL;
        memcpy(&from, loopback, len);
        if (flags & (TP_CONNECT_KEEP_PORT | TP_CONNECT_SAME_PORT))
            ((struct sockaddr_in *)&from)->sin_port = htons(4321); /* the same offset in both families */
        bool asks = strncmp(name, "orig_dst", 8) == 0, accepts = strncmp(name, "accept", 6) == 0;
        bool given = strstr(name, "given") != NULL;
        if (given)
            fd = socket(domain, dgram ? SOCK_DGRAM : SOCK_STREAM, 0);
        else if (dgram)
            flags |= TP_CONNECT_DGRAM;
        if (!asks && !accepts)
            mark();
        if (given) {
            int rc = library ? tp_connect_socket(fd, sa(&from), len, sa(&to), to_len, flags)
                             : connect_socket_by_hand(fd, sa(&from), len, sa(&to), to_len, flags);
            if (rc != 0)
                errx(1, "%s: %s", name, tp_last_error());
        } else
            fd = library ? tp_connect_from(sa(&from), len, sa(&to), to_len, TP_NONBLOCK | flags)
                         : connect_by_hand(sa(&from), len, sa(&to), to_len, flags);
        if (!asks && !accepts)
            mark();
        if (dgram)
            return fd < 0;
        struct sockaddr_storage found;
        socklen_t found_len = sizeof found;
        if (accepts) {
            struct sockaddr_storage client;
            socklen_t client_len = sizeof client;
            bool no_client = strstr(name, "null") != NULL;
            uint32_t how = TP_NONBLOCK | (strstr(name, "tproxy") != NULL ? TP_ACCEPT_TPROXY : 0);
            mark();
            int one = (library ? tp_accept : accept_by_hand)(listener, no_client ? NULL : sa(&client), no_client ? NULL : &client_len,
                                                             sa(&found), &found_len, how);
            mark();
            if (one < 0 || memcmp(&found, &to, to_len) != 0 || (!no_client && memcmp(&client, &from, 2) != 0))
                errx(1, "%s: not the addresses of the connection", name);
            return 0;
        }
        int accepted = accept(listener, NULL, NULL);
        if (asks)
            mark();
        int rc = library ? tp_orig_dst(accepted, sa(&found), &found_len) : orig_dst_by_hand(accepted, sa(&found), &found_len);
        if (asks)
            mark();
        if (rc != 0 || memcmp(&found, &to, to_len) != 0)
            errx(1, "%s: not the original destination", name);
    }
    if (fd < 0)
        errx(1, "%s", tp_last_error());
    return 0;
}
