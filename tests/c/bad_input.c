/*
 * Tests each call with bad input: the errno is that of the manual, outputs are
 * unchanged, and no descriptor is left open. Prints a line for each failure.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <tproxy.h>

static int checks, failures;

static int open_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;
    while (readdir(dir) != NULL)
        n++;
    closedir(dir);
    return n;
}

static int before;

/* Called before each expression of EXPECT. */
static void begin(void)
{
    before = open_descriptors();
    errno = ENOTTY;
}

static void end(int line, const char *what, long result, int wanted)
{
    int got = errno;
    checks++;
    bool right = wanted == 0 ? result >= 0 && got == ENOTTY : result == -1 && got == wanted && tp_last_error()[0] != '\0';
    if (wanted == 0 && result > 2)
        close((int)result);
    if (open_descriptors() != before)
        right = false;
    if (!right) {
        failures++;
        fprintf(stderr, "line %d: %s: %ld, errno %d (%s), wanted %d, descriptors %d -> %d\n  %s\n", line, what, result, got,
                strerror(got), wanted, before, open_descriptors(), tp_last_error());
    }
}

/* Checks that the call returns -1 with this errno. 0: it succeeds and does not change errno. */
#define EXPECT(wanted, call) (begin(), end(__LINE__, #call, (call), (wanted)))
#define CHECK(condition) \
    (checks++, (condition) ? 0 : (failures++, fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition)))

static struct sockaddr *sa(void *addr)
{
    return (struct sockaddr *)addr;
}

static void sockets(int closed, int file, int unix_fd)
{
    EXPECT(0, tp_socket(AF_INET, SOCK_STREAM, 0));
    EXPECT(0, tp_socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, IPPROTO_UDP));
    EXPECT(EAFNOSUPPORT, tp_socket(AF_UNIX, SOCK_STREAM, 0));
    EXPECT(EAFNOSUPPORT, tp_socket(-1, SOCK_STREAM, 0));
    EXPECT(EAFNOSUPPORT, tp_socket(9999, SOCK_STREAM, 0));
    EXPECT(EINVAL, tp_socket(AF_INET, -1, 0));
    EXPECT(EINVAL, tp_socket(AF_INET, SOCK_STREAM | 0x100, 0));
    EXPECT(EPROTONOSUPPORT, tp_socket(AF_INET, SOCK_STREAM, IPPROTO_UDP));
    EXPECT(EINVAL, tp_socket(AF_INET, SOCK_STREAM, -1));

    EXPECT(EBADF, tp_set_transparent(-1));
    EXPECT(EBADF, tp_set_transparent(closed));
    EXPECT(ENOTSOCK, tp_set_transparent(file));
    EXPECT(EAFNOSUPPORT, tp_set_transparent(unix_fd));
}

/* Calls with the same address arguments. */
static int bind_it(int fd, const struct sockaddr *addr, socklen_t len)
{
    return tp_bind_nonlocal(fd, addr, len);
}

static int listen_it(int fd, const struct sockaddr *addr, socklen_t len)
{
    (void)fd;
    return tp_listen(addr, len, 1, 0);
}

static struct sockaddr_in good = { .sin_family = AF_INET, .sin_port = 0 };

static int connect_from_it(int fd, const struct sockaddr *addr, socklen_t len)
{
    (void)fd;
    return tp_connect_from(addr, len, sa(&good), sizeof good, TP_NONBLOCK);
}

static int connect_to_it(int fd, const struct sockaddr *addr, socklen_t len)
{
    (void)fd;
    return tp_connect_from(sa(&good), sizeof good, addr, len, TP_NONBLOCK);
}

static void addresses(int fd, int (*call)(int, const struct sockaddr *, socklen_t))
{
    struct sockaddr_storage storage = { .ss_family = AF_INET };
    char large[sizeof storage + 1] = { 0 };
    EXPECT(EFAULT, call(fd, NULL, sizeof storage));
    EXPECT(EFAULT, call(fd, NULL, 0));
    EXPECT(EINVAL, call(fd, sa(&storage), 0));
    EXPECT(EINVAL, call(fd, sa(&storage), 1));
    EXPECT(EINVAL, call(fd, sa(&storage), sizeof(struct sockaddr_in) - 1));
    storage.ss_family = AF_INET6;
    EXPECT(EINVAL, call(fd, sa(&storage), sizeof(struct sockaddr_in)));
    EXPECT(EINVAL, call(fd, sa(&storage), sizeof(struct sockaddr_in6) - 1));
    storage.ss_family = AF_UNIX;
    EXPECT(EAFNOSUPPORT, call(fd, sa(&storage), sizeof storage));
    storage.ss_family = AF_UNSPEC;
    EXPECT(EAFNOSUPPORT, call(fd, sa(&storage), sizeof storage));
    memcpy(large, &(struct sockaddr_in){ .sin_family = AF_INET }, sizeof(struct sockaddr_in));
    EXPECT(EINVAL, call(fd, sa(large), sizeof large));
    EXPECT(EINVAL, call(fd, sa(large), (socklen_t)-1));
}

static void binds(int closed, int file, int unix_fd)
{
    struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(51966) };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6 };
    struct sockaddr_storage wide = { 0 };
    v4.sin_addr.s_addr = htonl(0xDEADBEEF);
    memcpy(&wide, &v4, sizeof v4);

    int fd = socket(AF_INET, SOCK_STREAM, 0);
    addresses(fd, bind_it);
    EXPECT(EBADF, tp_bind_nonlocal(-1, sa(&v4), sizeof v4));
    EXPECT(EBADF, tp_bind_nonlocal(closed, sa(&v4), sizeof v4));
    EXPECT(ENOTSOCK, tp_bind_nonlocal(file, sa(&v4), sizeof v4));
    EXPECT(EAFNOSUPPORT, tp_bind_nonlocal(unix_fd, sa(&v4), sizeof v4));
    EXPECT(EAFNOSUPPORT, tp_bind_nonlocal(fd, sa(&v6), sizeof v6));
    /* A longer buffer, and an unaligned address, are valid. */
    EXPECT(0, tp_bind_nonlocal(fd, sa(&wide), sizeof wide));
    EXPECT(EINVAL, tp_bind_nonlocal(fd, sa(&v4), sizeof v4));
    int other = socket(AF_INET, SOCK_STREAM, 0);
    EXPECT(EADDRINUSE, tp_bind_nonlocal(other, sa(&v4), sizeof v4));
    close(other);
    close(fd);
    fd = socket(AF_INET, SOCK_DGRAM, 0);
    char odd[sizeof v4 + 1];
    memcpy(odd + 1, &v4, sizeof v4);
    EXPECT(0, tp_bind_nonlocal(fd, sa(odd + 1), sizeof v4));
    close(fd);
}

static void streams(void)
{
    struct sockaddr_in v4 = { .sin_family = AF_INET };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6 };
    v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);

    addresses(-1, listen_it);
    EXPECT(EINVAL, tp_listen(sa(&v4), sizeof v4, 1, 0x80000000));
    EXPECT(EINVAL, tp_listen(sa(&v4), sizeof v4, 1, TP_CONNECT_KEEP_PORT));
    EXPECT(0, tp_listen(sa(&v4), sizeof v4, 0, 0));
    EXPECT(0, tp_listen(sa(&v6), sizeof v6, -1, TP_NONBLOCK | TP_LISTEN_REUSEPORT));

    addresses(-1, connect_from_it);
    addresses(-1, connect_to_it);
    v4.sin_port = htons(1);
    EXPECT(EINVAL, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, TP_LISTEN_REUSEPORT));
    EXPECT(EINVAL, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, 0x400));
    EXPECT(EINVAL, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, TP_CONNECT_DGRAM | TP_CONNECT_DATA_FOLLOWS));
    EXPECT(0, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, TP_CONNECT_DGRAM | TP_CONNECT_KEEP_PORT));
    EXPECT(EAFNOSUPPORT, tp_connect_from(sa(&v6), sizeof v6, sa(&v4), sizeof v4, 0));
    v4.sin_port = 0;
    struct sockaddr_in refused = v4;
    refused.sin_port = htons(1);
    EXPECT(ECONNREFUSED, tp_connect_from(sa(&v4), sizeof v4, sa(&refused), sizeof refused, 0));
    EXPECT(ECONNREFUSED, tp_connect_from(sa(&v4), sizeof v4, sa(&refused), sizeof refused, TP_CONNECT_KEEP_PORT));
    EXPECT(0, tp_connect_from(sa(&v4), sizeof v4, sa(&refused), sizeof refused, TP_NONBLOCK));
}

static int given_fd;

static int connect_given_from(int fd, const struct sockaddr *addr, socklen_t len)
{
    (void)fd;
    return tp_connect_socket(given_fd, addr, len, sa(&good), sizeof good, 0);
}

static int connect_given_to(int fd, const struct sockaddr *addr, socklen_t len)
{
    (void)fd;
    return tp_connect_socket(given_fd, sa(&good), sizeof good, addr, len, 0);
}

/* A refused socket is unchanged: not transparent, not bound. */
static bool is_fresh(int fd)
{
    int transparent = -1, reuse = -1;
    struct sockaddr_in own;
    socklen_t size = sizeof transparent, len = sizeof own;
    return getsockopt(fd, SOL_IP, IP_TRANSPARENT, &transparent, &size) == 0 && transparent == 0 &&
           getsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, &size) == 0 && reuse == 0 &&
           getsockname(fd, sa(&own), &len) == 0 && own.sin_port == 0 && own.sin_addr.s_addr == 0;
}

static void connects(int closed, int file, int unix_fd)
{
    struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(1) }, zero = v4;
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT, .sin6_port = htons(1) };
    v4.sin_addr.s_addr = zero.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    zero.sin_port = 0;

    EXPECT(EINVAL, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, TP_CONNECT_SAME_PORT | TP_CONNECT_KEEP_PORT));
    EXPECT(EINVAL, tp_connect_from(sa(&zero), sizeof zero, sa(&v4), sizeof v4, TP_CONNECT_SAME_PORT));
    EXPECT(EINVAL, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, TP_LISTEN_V6ONLY));
    EXPECT(EINVAL, tp_connect_from(sa(&v4), sizeof v4, sa(&v4), sizeof v4, TP_ACCEPT_TPROXY));
    EXPECT(EINVAL, tp_listen(sa(&v4), sizeof v4, 1, TP_LISTEN_V6ONLY));
    EXPECT(EINVAL, tp_listen(sa(&v4), sizeof v4, 1, TP_CONNECT_SAME_PORT));

    given_fd = socket(AF_INET, SOCK_STREAM, 0);
    addresses(-1, connect_given_from);
    addresses(-1, connect_given_to);
#define GIVEN(wanted, fd, src, dst, flags) EXPECT(wanted, tp_connect_socket(fd, sa(src), sizeof *(src), sa(dst), sizeof *(dst), flags))
    GIVEN(EBADF, -1, &v4, &v4, 0);
    GIVEN(EBADF, closed, &v4, &v4, 0);
    GIVEN(ENOTSOCK, file, &v4, &v4, 0);
    GIVEN(EAFNOSUPPORT, unix_fd, &v4, &v4, 0);
    GIVEN(EAFNOSUPPORT, given_fd, &v6, &v4, 0);
    GIVEN(EAFNOSUPPORT, given_fd, &v6, &v6, 0);
    GIVEN(EINVAL, given_fd, &good, &v4, 0);
    GIVEN(EINVAL, given_fd, &v4, &good, 0);
    GIVEN(EINVAL, given_fd, &zero, &v4, TP_CONNECT_SAME_PORT);
    GIVEN(EINVAL, given_fd, &v4, &v4, TP_CONNECT_SAME_PORT | TP_CONNECT_KEEP_PORT);
    GIVEN(EINVAL, given_fd, &v4, &v4, TP_NONBLOCK);
    GIVEN(EINVAL, given_fd, &v4, &v4, TP_CONNECT_DGRAM);
    GIVEN(EINVAL, given_fd, &v4, &v4, 0x80000000);
    CHECK(is_fresh(given_fd));
    int dgram = socket(AF_INET, SOCK_DGRAM, 0), raw = socket(AF_INET, SOCK_RAW, IPPROTO_TCP);
    GIVEN(EINVAL, dgram, &v4, &v4, TP_CONNECT_DATA_FOLLOWS);
    CHECK(is_fresh(dgram));
    GIVEN(ESOCKTNOSUPPORT, raw, &v4, &v4, 0);
    GIVEN(0, dgram, &v4, &v4, TP_CONNECT_SAME_PORT);
    GIVEN(EISCONN, dgram, &v4, &v4, 0);
    GIVEN(ECONNREFUSED, given_fd, &zero, &v4, 0);
    GIVEN(EINVAL, given_fd, &zero, &v4, 0);
    CHECK(fcntl(given_fd, F_GETFD) == 0);
    close(given_fd);
    close(dgram);
    close(raw);
}

/* Connects to the listener; the connection waits to be accepted. */
static int knock(int listener)
{
    struct sockaddr_in6 addr;
    socklen_t len = sizeof addr;
    int client = -1;
    if (getsockname(listener, sa(&addr), &len) == 0 && (client = socket(addr.sin6_family, SOCK_STREAM, 0)) >= 0)
        CHECK(connect(client, sa(&addr), len) == 0);
    return client;
}

static bool waits(int listener)
{
    struct pollfd ready = { .fd = listener, .events = POLLIN };
    return poll(&ready, 1, 0) == 1;
}

static void accepts(int closed, int file)
{
    struct sockaddr_storage client, to, untouched;
    memset(&untouched, 0xA5, sizeof untouched);
    client = to = untouched;
    socklen_t clientlen = sizeof client, tolen = sizeof to;
    struct sockaddr_in any = { .sin_family = AF_INET };
    struct sockaddr_in6 any6 = { .sin6_family = AF_INET6 };
    any.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    any6.sin6_addr = (struct in6_addr)IN6ADDR_LOOPBACK_INIT;
    int listener = tp_listen(sa(&any), sizeof any, 4, TP_NONBLOCK), listener6 = tp_listen(sa(&any6), sizeof any6, 4, TP_NONBLOCK);
#define ACCEPT(flags) tp_accept(listener, sa(&client), &clientlen, sa(&to), &tolen, flags)
    EXPECT(EAGAIN, ACCEPT(0));
    int one = knock(listener);
    EXPECT(EINVAL, ACCEPT(0x80000000));
    EXPECT(EINVAL, ACCEPT(TP_LISTEN_V6ONLY));
    EXPECT(EFAULT, tp_accept(listener, sa(&client), NULL, sa(&to), &tolen, 0));
    EXPECT(EFAULT, tp_accept(listener, sa(&client), &clientlen, NULL, &tolen, 0));
    EXPECT(EFAULT, tp_accept(listener, sa(&client), &clientlen, sa(&to), NULL, 0));
    EXPECT(EBADF, tp_accept(-1, sa(&client), &clientlen, sa(&to), &tolen, 0));
    EXPECT(EBADF, tp_accept(closed, sa(&client), &clientlen, sa(&to), &tolen, 0));
    EXPECT(ENOTSOCK, tp_accept(file, sa(&client), &clientlen, sa(&to), &tolen, 0));
    EXPECT(EINVAL, tp_accept(one, sa(&client), &clientlen, sa(&to), &tolen, 0));
    int dgram = tp_socket(AF_INET, SOCK_DGRAM, 0);
    EXPECT(EOPNOTSUPP, tp_accept(dgram, sa(&client), &clientlen, sa(&to), &tolen, 0));
    close(dgram);
    /* Too small for any address: the connection still waits. */
    for (socklen_t room = 0; room < sizeof any; room++) {
        clientlen = room, tolen = sizeof to;
        EXPECT(EINVAL, ACCEPT(0));
        CHECK(clientlen == room && tolen == sizeof to);
        clientlen = sizeof client, tolen = room;
        EXPECT(EINVAL, ACCEPT(TP_ACCEPT_TPROXY));
        CHECK(clientlen == sizeof client && tolen == room);
    }
    CHECK(waits(listener));
    CHECK(memcmp(&client, &untouched, sizeof client) == 0 && memcmp(&to, &untouched, sizeof to) == 0);
    /* Buffers of the exact size. */
    clientlen = tolen = sizeof any;
    EXPECT(0, ACCEPT(TP_ACCEPT_TPROXY));
    struct sockaddr_in own;
    socklen_t len = sizeof own;
    CHECK(getsockname(one, sa(&own), &len) == 0 && memcmp(&client, &own, sizeof own) == 0 && clientlen == sizeof own);
    CHECK(getsockname(listener, sa(&own), &len) == 0 && memcmp(&to, &own, sizeof own) == 0 && tolen == sizeof own);
    close(one);
    /* Without the client's address. */
    one = knock(listener);
    tolen = sizeof to;
    EXPECT(0, tp_accept(listener, NULL, NULL, sa(&to), &tolen, 0));
    CHECK(tolen == sizeof own && memcmp(&to, &own, sizeof own) == 0);
    close(one);
    /* Too small for this family: the connection is closed, and nothing is written. */
    client = to = untouched;
    for (int i = 0; i < 2; i++) {
        int two = knock(listener6);
        clientlen = i == 0 ? sizeof any : sizeof client;
        tolen = i == 0 ? sizeof to : sizeof any6 - 1;
        EXPECT(EINVAL, tp_accept(listener6, sa(&client), &clientlen, sa(&to), &tolen, TP_ACCEPT_TPROXY));
        CHECK(clientlen == (i == 0 ? sizeof any : sizeof client) && tolen == (i == 0 ? sizeof to : sizeof any6 - 1));
        CHECK(memcmp(&client, &untouched, sizeof client) == 0 && memcmp(&to, &untouched, sizeof to) == 0);
        char byte;
        CHECK(!waits(listener6) && recv(two, &byte, 1, 0) == 0);
        close(two);
    }
    /* At the limit of descriptors the connection still waits. */
    one = knock(listener);
    struct rlimit limit, none;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    none = limit, none.rlim_cur = 0;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    int refused = ACCEPT(TP_ACCEPT_TPROXY), error = errno;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(refused == -1 && error == EMFILE && strstr(tp_last_error(), "ulimit -n") != NULL);
    clientlen = sizeof client, tolen = sizeof to;
    EXPECT(0, ACCEPT(TP_ACCEPT_TPROXY));
    close(one);
    close(listener);
    close(listener6);
    /* An ordinary listener, to which a client has connected directly. */
    listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(bind(listener, sa(&any), sizeof any) == 0 && listen(listener, 1) == 0);
    one = knock(listener);
    client = to = untouched;
    EXPECT(ENOENT, ACCEPT(0));
    CHECK(memcmp(&client, &untouched, sizeof client) == 0 && memcmp(&to, &untouched, sizeof to) == 0);
    CHECK(clientlen != 0 && !waits(listener));
    close(one);
    close(listener);
    /* A listener of another family. */
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un name = { .sun_family = AF_UNIX, .sun_path = "\0a name that is longer than any address of IPv6 is" };
    CHECK(bind(listener, sa(&name), sizeof name) == 0 && listen(listener, 1) == 0);
    one = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connect(one, sa(&name), sizeof name) == 0);
    clientlen = sizeof client, tolen = sizeof to;
    EXPECT(EAFNOSUPPORT, ACCEPT(TP_ACCEPT_TPROXY));
    CHECK(!waits(listener));
    close(one);
    close(listener);
}

static void unmapping(void)
{
    struct sockaddr_storage addr = { 0 };
    socklen_t len;
    EXPECT(EFAULT, tp_unmap_addr(NULL, &len));
    EXPECT(EFAULT, tp_unmap_addr(sa(&addr), NULL));
    static const socklen_t sizes[] = { 0, 1, sizeof(struct sockaddr_in) - 1, sizeof addr, sizeof addr + 1, (socklen_t)-1 };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        len = sizes[i];
        addr.ss_family = len == sizeof addr ? AF_UNIX : AF_INET;
        EXPECT(EINVAL, tp_unmap_addr(sa(&addr), &len));
        CHECK(len == sizes[i]);
    }
    addr.ss_family = AF_INET6;
    len = sizeof(struct sockaddr_in6) - 1;
    EXPECT(EINVAL, tp_unmap_addr(sa(&addr), &len));
    addr.ss_family = AF_UNSPEC;
    len = sizeof addr;
    EXPECT(EINVAL, tp_unmap_addr(sa(&addr), &len));

    /* Unchanged, with the size that the caller gave; at an odd address. */
    char odd[sizeof(struct sockaddr_storage) + 1], before[sizeof odd];
    struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(80), .sin_zero = "fill" };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(80), .sin6_addr = IN6ADDR_LOOPBACK_INIT, .sin6_scope_id = 3 };
    v4.sin_addr.s_addr = htonl(0xC0000201);
    for (int i = 0; i < 2; i++) {
        memset(odd, 0xA5, sizeof odd);
        memcpy(odd + 1, i == 0 ? (void *)&v4 : (void *)&v6, i == 0 ? sizeof v4 : sizeof v6);
        memcpy(before, odd, sizeof odd);
        len = sizeof odd - 1;
        EXPECT(0, tp_unmap_addr(sa(odd + 1), &len));
        CHECK(len == sizeof odd - 1 && memcmp(odd, before, sizeof odd) == 0);
    }
    /* Converted; what follows the struct sockaddr_in6 is unchanged. */
    memset(&v4.sin_zero, 0, sizeof v4.sin_zero);
    v6.sin6_addr = (struct in6_addr){ .s6_addr = { [10] = 0xFF, 0xFF, 192, 0, 2, 1 } };
    memset(odd, 0xA5, sizeof odd);
    memcpy(before, odd, sizeof odd);
    memcpy(odd + 1, &v6, sizeof v6);
    len = sizeof v6;
    EXPECT(0, tp_unmap_addr(sa(odd + 1), &len));
    CHECK(len == sizeof v4 && memcmp(odd + 1, &v4, sizeof v4) == 0);
    for (size_t i = sizeof v4; i < sizeof v6; i++)
        CHECK(odd[1 + i] == 0);
    CHECK(memcmp(odd + 1 + sizeof v6, before + 1 + sizeof v6, sizeof odd - 1 - sizeof v6) == 0);
}

static void receiving(int closed, int file)
{
    struct sockaddr_in addr = { .sin_family = AF_INET };
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = tp_socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    CHECK(tp_bind_nonlocal(fd, sa(&addr), sizeof addr) == 0);
    socklen_t len = sizeof addr;
    getsockname(fd, sa(&addr), &len);
    CHECK(sendto(fd, "kept", 4, 0, sa(&addr), len) == 4);

    char buf[8] = "untouch";
    struct sockaddr_storage src, dst;
    socklen_t srclen = sizeof src, dstlen = sizeof dst, little = 15;
    EXPECT(EFAULT, tp_recvfrom(fd, NULL, 8, 0, NULL, NULL, NULL, NULL));
    EXPECT(EFAULT, tp_recvfrom(fd, buf, 8, 0, sa(&src), NULL, NULL, NULL));
    EXPECT(EFAULT, tp_recvfrom(fd, buf, 8, 0, sa(&src), &srclen, sa(&dst), NULL));
    EXPECT(EINVAL, tp_recvfrom(fd, buf, 8, 0, sa(&src), &srclen, sa(&dst), &little));
    EXPECT(EINVAL, tp_recvfrom(fd, buf, 8, MSG_OOB, NULL, NULL, NULL, NULL));
    EXPECT(EINVAL, tp_recvfrom(fd, buf, (size_t)-1, 0, NULL, NULL, NULL, NULL));
    EXPECT(EBADF, tp_recvfrom(-1, buf, 8, 0, NULL, NULL, NULL, NULL));
    EXPECT(EBADF, tp_recvfrom(closed, buf, 8, 0, NULL, NULL, NULL, NULL));
    EXPECT(ENOTSOCK, tp_recvfrom(file, buf, 8, 0, NULL, NULL, NULL, NULL));

    struct tp_datagram one = { .data = NULL, .capacity = 8 };
    struct tp_datagram two[2] = { { .data = buf, .capacity = 8 }, { .data = NULL, .capacity = 1 } };
    EXPECT(EFAULT, tp_recv_datagrams(fd, NULL, 1, 0));
    EXPECT(EFAULT, tp_recv_datagrams(fd, &one, 1, 0));
    EXPECT(EFAULT, tp_recv_datagrams(fd, two, 2, 0));
    EXPECT(EINVAL, tp_recv_datagrams(fd, two, 1, MSG_PEEK));
    EXPECT(EINVAL, tp_recv_datagrams(fd, (struct tp_datagram *)((char *)two + 1), 1, 0));
    EXPECT(EBADF, tp_recv_datagrams(closed, two, 1, 0));
    EXPECT(ENOTSOCK, tp_recv_datagrams(file, two, 1, 0));
    CHECK(tp_recv_datagrams(fd, NULL, 0, 0) == 0);

    /* The datagram is still queued, and nothing was written. */
    CHECK(strcmp(buf, "untouch") == 0 && srclen == sizeof src && dstlen == sizeof dst);
    CHECK(tp_recvfrom(fd, buf, 8, 0, sa(&src), &srclen, sa(&dst), &dstlen) == 4);
    CHECK(memcmp(&dst, &addr, sizeof addr) == 0 && memcmp(buf, "kept", 4) == 0);
    EXPECT(EAGAIN, tp_recvfrom(fd, buf, 8, 0, NULL, NULL, NULL, NULL));
    EXPECT(EAGAIN, tp_recv_datagrams(fd, two, 1, 0));
    close(fd);

    /* Control data of all kinds. */
    struct msghdr msg = { 0 };
    dstlen = sizeof dst;
    EXPECT(EFAULT, tp_msg_orig_dst(NULL, sa(&dst), &dstlen));
    EXPECT(EFAULT, tp_msg_orig_dst(&msg, NULL, &dstlen));
    EXPECT(EFAULT, tp_msg_orig_dst(&msg, sa(&dst), NULL));
    EXPECT(ENOENT, tp_msg_orig_dst(&msg, sa(&dst), &dstlen));
    msg.msg_controllen = 100;
    EXPECT(EFAULT, tp_msg_orig_dst(&msg, sa(&dst), &dstlen));
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof addr)];
    } control = { .header = { .cmsg_len = CMSG_LEN(sizeof addr), .cmsg_level = SOL_IP, .cmsg_type = IP_ORIGDSTADDR } };
    memcpy(CMSG_DATA(&control.header), &addr, sizeof addr);
    msg.msg_control = &control;
    msg.msg_controllen = sizeof control;
    EXPECT(0, tp_msg_orig_dst(&msg, sa(&dst), &dstlen));
    CHECK(dstlen == sizeof addr && memcmp(&dst, &addr, sizeof addr) == 0);
    EXPECT(EINVAL, tp_msg_orig_dst(&msg, sa(&dst), &little));
    CHECK(little == 15);
    static const size_t lengths[] = { 0, 1, 15, 17, CMSG_LEN(sizeof addr) - 1, (size_t)-1, (size_t)-7 };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        control.header.cmsg_len = lengths[i];
        EXPECT(ENOENT, tp_msg_orig_dst(&msg, sa(&dst), &dstlen));
    }
}

static void replying(void)
{
    struct tp_replier_config config[2] = { { 0 }, { 0 } };
    struct tp_replier *replier = NULL;
    EXPECT(EFAULT, tp_replier_open(config, sizeof *config, NULL));
    EXPECT(EFAULT, tp_replier_open(NULL, 1, &replier));
    EXPECT(EINVAL, tp_replier_open(config, sizeof *config - 1, &replier));
    EXPECT(EINVAL, tp_replier_open(config, 0, &replier));
    config[1].flags = 1;
    EXPECT(E2BIG, tp_replier_open(config, sizeof config, &replier));
    config[0].flags = TP_CONNECT_KEEP_PORT;
    EXPECT(EINVAL, tp_replier_open(config, sizeof *config, &replier));
    CHECK(replier == NULL);
    EXPECT(0, tp_replier_open(NULL, 0, &replier));
    CHECK(replier != NULL);

    struct tp_replier_stats stats[2];
    EXPECT(EFAULT, tp_replier_stats(NULL, stats, sizeof *stats));
    EXPECT(EFAULT, tp_replier_stats(replier, NULL, sizeof *stats));
    EXPECT(EINVAL, tp_replier_stats(replier, stats, 8));
    EXPECT(E2BIG, tp_replier_stats(replier, stats, sizeof stats));
    EXPECT(0, tp_replier_stats(replier, stats, sizeof *stats));
    CHECK(stats[0].sockets == 0 && stats[0].sent == 0);

    struct tp_datagram one = { 0 };
    EXPECT(EFAULT, tp_reply(NULL, &one, 1));
    EXPECT(EFAULT, tp_reply(replier, NULL, 1));
    EXPECT(EINVAL, tp_reply(replier, (struct tp_datagram *)((char *)&one + 1), 1));
    CHECK(tp_reply(replier, &one, 0) == 0);
    CHECK(tp_reply(replier, &one, 1) == 0 && one.error == EAFNOSUPPORT);
    struct sockaddr_in end = { .sin_family = AF_INET, .sin_port = htons(9) };
    end.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    memcpy(&one.client, &end, sizeof end);
    memcpy(&one.orig_dst, &end, sizeof end);
    one.len = 1;
    CHECK(tp_reply(replier, &one, 1) == 0 && one.error == EFAULT);
    one.len = 0;
    CHECK(tp_reply(replier, &one, 1) == 1 && one.error == 0);
    tp_replier_close(replier);
    errno = ENOTTY;
    tp_replier_close(NULL);
    CHECK(errno == ENOTTY);
}

static void original_destinations(int closed, int file, int unix_fd)
{
    struct sockaddr_storage out, untouched;
    memset(&out, 0xA5, sizeof out);
    untouched = out;
    socklen_t len = sizeof out;

    struct sockaddr_in addr = { .sin_family = AF_INET };
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = tp_listen(sa(&addr), sizeof addr, 1, 0);
    socklen_t addr_len = sizeof addr;
    getsockname(listener, sa(&addr), &addr_len);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(client, sa(&addr), sizeof addr) == 0);
    int accepted = accept(listener, NULL, NULL);

    EXPECT(EFAULT, tp_orig_dst(accepted, NULL, &len));
    EXPECT(EFAULT, tp_orig_dst(accepted, sa(&out), NULL));
    EXPECT(EBADF, tp_orig_dst(-1, sa(&out), &len));
    EXPECT(EBADF, tp_orig_dst(closed, sa(&out), &len));
    EXPECT(ENOTSOCK, tp_orig_dst(file, sa(&out), &len));
    EXPECT(EAFNOSUPPORT, tp_orig_dst(unix_fd, sa(&out), &len));
    EXPECT(ENOENT, tp_orig_dst(client, sa(&out), &len));
    int fresh = tp_socket(AF_INET6, SOCK_STREAM, 0);
    EXPECT(ENOTCONN, tp_orig_dst(fresh, sa(&out), &len));
    close(fresh);
    CHECK(len == sizeof out);
    for (socklen_t room = 0; room < sizeof addr; room++) {
        len = room;
        EXPECT(EINVAL, tp_orig_dst(accepted, sa(&out), &len));
        CHECK(len == room);
    }
    CHECK(memcmp(&out, &untouched, sizeof out) == 0);
    len = sizeof addr;
    EXPECT(0, tp_orig_dst(accepted, sa(&out), &len));
    CHECK(len == sizeof addr && memcmp(&out, &addr, 8) == 0);
    CHECK(memcmp((char *)&out + sizeof addr, (char *)&untouched + sizeof addr, sizeof out - sizeof addr) == 0);
    close(accepted);
    close(client);
    close(listener);
}

static void rules(int closed, int file, int unix_fd)
{
    struct sockaddr_in addr = { .sin_family = AF_INET };
    int listener = tp_listen(sa(&addr), sizeof addr, 1, 0);
    tp_rules *const untouched = (tp_rules *)(void *)&addr;
    tp_rules *out = untouched;
    const struct tp_port_range port = { .first = 80, .last = 80 };
    const struct tp_rules_config start = { .listeners = &listener, .n_listeners = 1, .ports = &port, .n_ports = 1 };
    struct tp_rules_config config = start;
#define INSTALL() tp_install_rules(&config, sizeof config, &out)
#define WITH(wanted, ...) (config = start, __VA_ARGS__, EXPECT(wanted, INSTALL()))

    EXPECT(EFAULT, tp_install_rules(NULL, sizeof config, &out));
    EXPECT(EFAULT, tp_install_rules(&config, sizeof config, NULL));
    EXPECT(EINVAL, tp_install_rules(&config, 0, &out));
    EXPECT(EINVAL, tp_install_rules(&config, sizeof config - 1, &out));
    EXPECT(E2BIG, tp_install_rules(&config, (size_t)-1, &out));
    struct {
        struct tp_rules_config config;
        char later[16];
    } newer = { start, { 0 } };
    newer.later[15] = 1;
    EXPECT(E2BIG, tp_install_rules(&newer.config, sizeof newer, &out));

    WITH(EFAULT, config.listeners = NULL);
    WITH(EFAULT, config.ports = NULL);
    WITH(EINVAL, config.n_listeners = (size_t)-1);
    WITH(EINVAL, config.n_ports = (size_t)-1);
    WITH(EINVAL, config.n_listeners = 0);
    WITH(EINVAL, config.name = "no spaces");
    WITH(EINVAL, config.name = "\xff");
    WITH(EINVAL, config.name = "more-than-twenty-letters");
    WITH(EINVAL, config.flags = 0x80000000);
    WITH(EINVAL, config.backend = 3);
    WITH(EINVAL, config.protocols = 4);
    WITH(EINVAL, config.families = 4);
    WITH(EINVAL, config.families = TP_FAMILY_IPV6);
    WITH(EINVAL, config.mark_mask = 1);
    WITH(EINVAL, config.mark = 2, config.mark_mask = 1);
    WITH(EINVAL, config.table = 255);
    WITH(EINVAL, config.priority = 40000);
    const struct tp_port_range backwards = { .first = 2, .last = 1 }, zero = { .first = 0 };
    WITH(EINVAL, config.ports = &backwards);
    WITH(EINVAL, config.ports = &zero);
    WITH(EINVAL, config.flags = TP_RULES_DIVERT_ONLY);

    const int descriptors[] = { -1, closed, file, unix_fd };
    WITH(EBADF, config.listeners = &descriptors[0]);
    WITH(EBADF, config.listeners = &descriptors[1]);
    WITH(ENOTSOCK, config.listeners = &descriptors[2]);
    WITH(EINVAL, config.listeners = &descriptors[3]);

    /* Contradictory configurations. */
    const struct tp_prefix prefixes[] = { { .family = AF_INET, .len = 33 }, { .family = AF_UNIX }, { .family = AF_INET6, .len = 129 },
                                          { .family = AF_INET, .reserved = { 1, 0 } }, { .family = AF_INET, .len = 8 } };
    for (int i = 0; i < 4; i++) {
        WITH(EINVAL, config.dst = &prefixes[i], config.n_dst = 1);
        WITH(EINVAL, config.src = &prefixes[i], config.n_src = 1);
        WITH(EINVAL, config.bypass = &prefixes[i], config.n_bypass = 1);
    }
    WITH(EFAULT, config.n_dst = 1);
    WITH(EFAULT, config.n_src = 1);
    WITH(EFAULT, config.n_bypass = 1);
    WITH(EFAULT, config.n_interfaces = 1);
    const char *const names[] = { NULL, "", "a/b", "sixteen-letters-" };
    WITH(EFAULT, config.interfaces = &names[0], config.n_interfaces = 1);
    for (int i = 1; i < 4; i++)
        WITH(EINVAL, config.interfaces = &names[i], config.n_interfaces = 1);
    WITH(EINVAL, config.protocols = TP_PROTO_UDP);
    WITH(EINVAL, config.listen_addr = sa(&addr), config.listen_addrlen = sizeof addr);
    WITH(EFAULT, config.n_listeners = 0, config.listen_addrlen = sizeof addr);
    WITH(EINVAL, config.n_listeners = 0, config.listen_addr = sa(&addr), config.listen_addrlen = 3);
    WITH(EINVAL, config.n_listeners = 0, config.listen_addr = sa(&addr), config.listen_addrlen = sizeof addr); /* port 0 */
    WITH(EINVAL, config.flags = TP_RULES_REDIRECT); /* the listener is transparent */
    WITH(EINVAL, config.flags = TP_RULES_REDIRECT | TP_RULES_DIVERT_ONLY);
    WITH(EOPNOTSUPP, config.flags = TP_RULES_LOCAL_OUTPUT | TP_RULES_FAIL_OPEN);
    WITH(EINVAL, config.flags = TP_RULES_LOCAL_OUTPUT, config.mark = 1, config.mark_mask = 1);
    /* A backend refuses unsupported options, and never ignores them. */
    WITH(EOPNOTSUPP, config.backend = TP_BACKEND_IPTABLES, config.flags = TP_RULES_FAIL_OPEN);
    WITH(EOPNOTSUPP, config.backend = TP_BACKEND_IPTABLES, config.flags = TP_RULES_NOTRACK);
    WITH(EOPNOTSUPP, config.backend = TP_BACKEND_IPTABLES, config.flags = TP_RULES_PERSIST);
    CHECK(out == untouched);

    EXPECT(0, tp_remove_rules(NULL));
    /* A valid configuration works, also from a newer program. */
    newer.later[15] = 0;
    CHECK(tp_install_rules(&newer.config, sizeof newer, &out) == 0);
    CHECK(out != untouched);

    EXPECT(EFAULT, tp_replace_rules(NULL, &start, sizeof start));
    EXPECT(EFAULT, tp_replace_rules(out, NULL, sizeof start));
    EXPECT(EINVAL, tp_replace_rules(out, &start, 1));
    config = start, config.name = "other";
    EXPECT(EINVAL, tp_replace_rules(out, &config, sizeof config));
    /* The table and the priority may change: the routing moves. */
    config = start, config.table = 99;
    EXPECT(0, tp_replace_rules(out, &config, sizeof config));
    config = start, config.flags = TP_RULES_PERSIST;
    EXPECT(EINVAL, tp_replace_rules(out, &config, sizeof config));
    EXPECT(0, tp_replace_rules(out, &start, sizeof start));

    const struct tp_prefix *eight = &prefixes[4], v6 = { .family = AF_INET6 };
    EXPECT(EFAULT, tp_update_rules(NULL, TP_SET_BYPASS, eight, 1, NULL, 0));
    EXPECT(EFAULT, tp_update_rules(out, TP_SET_BYPASS, NULL, 1, NULL, 0));
    EXPECT(EFAULT, tp_update_rules(out, TP_SET_BYPASS, NULL, 0, NULL, 1));
    EXPECT(EINVAL, tp_update_rules(out, 0, eight, 1, NULL, 0));
    EXPECT(EINVAL, tp_update_rules(out, TP_SET_DST, eight, 1, NULL, 0));
    EXPECT(EINVAL, tp_update_rules(out, TP_SET_SRC, eight, 1, NULL, 0));
    EXPECT(EINVAL, tp_update_rules(out, TP_SET_BYPASS, &prefixes[0], 1, NULL, 0));
    EXPECT(EINVAL, tp_update_rules(out, TP_SET_BYPASS, &v6, 1, NULL, 0));
    EXPECT(ENOENT, tp_update_rules(out, TP_SET_BYPASS, NULL, 0, eight, 1));
    EXPECT(0, tp_update_rules(out, TP_SET_BYPASS, eight, 1, NULL, 0));
    EXPECT(0, tp_update_rules(out, TP_SET_BYPASS, eight, 1, eight, 1));
    EXPECT(0, tp_update_rules(out, TP_SET_BYPASS, NULL, 0, NULL, 0));

    const struct tp_prefix one = { .family = AF_INET, .len = 32, .addr = { 192, 0, 2, 1 } };
    EXPECT(EFAULT, tp_learn_addresses(NULL, TP_SET_BYPASS, &one, 1, 1));
    EXPECT(EFAULT, tp_learn_addresses(out, TP_SET_BYPASS, NULL, 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, 0, &one, 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, TP_SET_DST, &one, 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, TP_SET_SRC, &one, 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, TP_SET_BYPASS, eight, 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, TP_SET_BYPASS, &prefixes[0], 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, TP_SET_BYPASS, &v6, 1, 1));
    EXPECT(EINVAL, tp_learn_addresses(out, TP_SET_BYPASS, &one, 1, 0));
    EXPECT(0, tp_learn_addresses(out, TP_SET_BYPASS, NULL, 0, 1));
    EXPECT(0, tp_learn_addresses(out, TP_SET_BYPASS, &one, 1, UINT32_MAX));
    EXPECT(0, tp_learn_addresses(out, TP_SET_BYPASS, &one, 1, 1));

    char script[8192];
    memset(script, 0x5A, sizeof script);
    size_t room = 10, needed = 0;
    EXPECT(EFAULT, tp_render_rules(NULL, sizeof start, TP_FORMAT_NFT, script, &room));
    EXPECT(EFAULT, tp_render_rules(&start, sizeof start, TP_FORMAT_NFT, script, NULL));
    EXPECT(EINVAL, tp_render_rules(&start, 1, TP_FORMAT_NFT, script, &room));
    EXPECT(EINVAL, tp_render_rules(&start, sizeof start, 0, script, &room));
    EXPECT(EINVAL, tp_render_rules(&start, sizeof start, 3, script, &room));
    EXPECT(ERANGE, tp_render_rules(&start, sizeof start, TP_FORMAT_NFT, script, &room));
    CHECK(room == 10 && script[0] == 0x5A);
    EXPECT(0, tp_render_rules(&start, sizeof start, TP_FORMAT_NFT, NULL, &needed));
    room = needed - 1;
    EXPECT(ERANGE, tp_render_rules(&start, sizeof start, TP_FORMAT_NFT, script, &room));
    room = needed;
    EXPECT(0, tp_render_rules(&start, sizeof start, TP_FORMAT_NFT, script, &room));
    CHECK(room == needed && strlen(script) == needed - 1 && script[needed] == 0x5A);

    struct {
        struct tp_rules_stats stats;
        char later;
    } stats;
    memset(&stats, 0xA5, sizeof stats);
    EXPECT(EFAULT, tp_rules_stats(NULL, &stats.stats, sizeof stats.stats));
    EXPECT(EFAULT, tp_rules_stats(out, NULL, sizeof stats.stats));
    EXPECT(EINVAL, tp_rules_stats(out, &stats.stats, sizeof stats.stats - 1));
    EXPECT(E2BIG, tp_rules_stats(out, &stats.stats, sizeof stats));
    CHECK(stats.stats.intercepted_packets == 0xA5A5A5A5A5A5A5A5);
    EXPECT(0, tp_rules_stats(out, &stats.stats, sizeof stats.stats));
    CHECK(stats.stats.intercepted_packets == 0 && stats.stats.direct_bytes == 0);

    EXPECT(EBUSY, tp_purge_rules(NULL) == 0 ? tp_purge_rules("tproxy") : 0);
    EXPECT(EFAULT, tp_read_stats("tproxy", NULL, sizeof stats.stats));
    EXPECT(EINVAL, tp_read_stats("tproxy", &stats.stats, 1));
    EXPECT(E2BIG, tp_read_stats("tproxy", &stats.stats, sizeof stats));
    EXPECT(EINVAL, tp_read_stats("no spaces", &stats.stats, sizeof stats.stats));
    EXPECT(ENOENT, tp_read_stats("nobody", &stats.stats, sizeof stats.stats));
    EXPECT(0, tp_read_stats(NULL, &stats.stats, sizeof stats.stats));
    EXPECT(EFAULT, tp_check(NULL, NULL));
    EXPECT(EFAULT, tp_self_test(NULL, sizeof(struct tp_rules_config), NULL, NULL));
    EXPECT(EINVAL, tp_purge_rules("no spaces"));
    EXPECT(0, tp_purge_rules("nobody"));
    CHECK(tp_remove_rules(out) == 0);
    close(listener);
}

int main(void)
{
    /* The number is within every limit, and not an open descriptor. */
    int closed = 900, file = open("/dev/null", O_RDWR), unix_fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockets(closed, file, unix_fd);
    binds(closed, file, unix_fd);
    streams();
    connects(closed, file, unix_fd);
    accepts(closed, file);
    unmapping();
    receiving(closed, file);
    replying();
    original_destinations(closed, file, unix_fd);
    rules(closed, file, unix_fd);
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
