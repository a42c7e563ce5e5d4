/*
 * Makes one call COUNT times, so that its instructions and system calls can be
 * counted. It is built twice: against the library, and against equivalent C
 * code (raw/tproxy.h).
 *
 *     calls socket|connect|accept|orig_dst|recvfrom|msg_orig_dst|datagrams COUNT
 *
 * With "accept" each connection is made before it is accepted.
 * With "datagrams" each call receives DATAGRAMS datagrams.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <tproxy.h>

static struct sockaddr *sa(void *addr)
{
    return addr;
}

enum { DATAGRAMS = 32, BYTES = 64 };

static char data[DATAGRAMS][BYTES];

/* Receives datagrams that the same socket sent, or reads the original destination of one message again and again. */
static void datagrams(const char *what, int count)
{
    static struct tp_datagram dgrams[DATAGRAMS];
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(3130) };
    struct sockaddr_storage src, dst;
    char control[256], last[256];
    struct iovec part = { .iov_base = data, .iov_len = sizeof data };
    struct msghdr msg = { .msg_name = &src, .msg_namelen = sizeof src, .msg_iov = &part, .msg_iovlen = 1,
                          .msg_control = control, .msg_controllen = sizeof control };
    int many = what[0] == 'd' ? DATAGRAMS : 1, fd = tp_socket(AF_INET, SOCK_DGRAM, 0);
    to.sin_addr.s_addr = htonl(0x7f000006);
    if (fd < 0 || bind(fd, sa(&to), sizeof to) != 0)
        err(1, "bind");
    for (int i = 0; i < DATAGRAMS; i++)
        dgrams[i].data = data[i], dgrams[i].capacity = BYTES;
    if (what[0] == 'm' && (sendto(fd, last, BYTES, 0, sa(&to), sizeof to) != BYTES || recvmsg(fd, &msg, 0) != BYTES))
        err(1, "recvmsg");
    for (int i = 0; i < count; i++) {
        socklen_t src_len = sizeof src, dst_len = sizeof dst;
        for (int k = 0; what[0] != 'm' && k < many; k++)
            if (sendto(fd, data[0], BYTES, 0, sa(&to), sizeof to) != BYTES)
                err(1, "sendto");
        bool good = what[0] == 'm'   ? tp_msg_orig_dst(&msg, sa(&dst), &dst_len) == 0
                    : what[0] == 'd' ? tp_recv_datagrams(fd, dgrams, DATAGRAMS, 0) == DATAGRAMS
                                     : tp_recvfrom(fd, data, BYTES, 0, sa(&src), &src_len, sa(&dst), &dst_len) == BYTES;
        if (!good || memcmp(what[0] == 'd' ? &dgrams[DATAGRAMS - 1].orig_dst : &dst, &to, 8) != 0)
            errx(1, "%s: %s", what, tp_last_error());
    }
}

int main(int argc, char **argv)
{
    if (argc != 3)
        errx(2, "usage: see the head of the source");
    if (strchr("rmd", argv[1][0]) != NULL) {
        datagrams(argv[1], atoi(argv[2]));
        return 0;
    }
    struct sockaddr_in listens = { .sin_family = AF_INET, .sin_port = htons(3129) };
    struct sockaddr_in from = { .sin_family = AF_INET }, to = listens;
    from.sin_addr.s_addr = htonl(0x7f000005), to.sin_addr.s_addr = htonl(0x7f000006);
    int listener = tp_listen(sa(&listens), sizeof listens, -1, TP_NONBLOCK);
    int client = tp_connect_from(sa(&from), sizeof from, sa(&to), sizeof to, 0);
    int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (listener < 0 || client < 0 || accepted < 0)
        errx(1, "%s", tp_last_error());
    for (int i = 0, n = atoi(argv[2]); i < n; i++) {
        struct sockaddr_storage place;
        socklen_t len = sizeof place;
        int fd = -1, result = 0;
        if (argv[1][0] == 's')
            result = fd = tp_socket(AF_INET, SOCK_STREAM, 0);
        else if (argv[1][0] == 'c')
            result = fd = tp_connect_from(sa(&from), sizeof from, sa(&to), sizeof to, TP_NONBLOCK);
        else if (argv[1][0] == 'a') {
            struct sockaddr_storage peer;
            socklen_t peer_len = sizeof peer;
            int one = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (connect(one, sa(&to), sizeof to) != 0)
                err(1, "connect");
            result = fd = tp_accept(listener, sa(&peer), &peer_len, sa(&place), &len, TP_ACCEPT_TPROXY | TP_NONBLOCK);
            close(one);
        } else
            result = tp_orig_dst(accepted, (struct sockaddr *)&place, &len);
        if (result < 0)
            errx(1, "%s", tp_last_error());
        if (fd >= 0)
            close(fd);
    }
    return 0;
}
