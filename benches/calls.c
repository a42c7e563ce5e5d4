/*
 * One call again and again, for counting the instructions and system calls of
 * user space: built against the library, and against the same by hand (raw/).
 *
 *     calls socket|connect|orig_dst COUNT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <tproxy.h>

static struct sockaddr *sa(struct sockaddr_in *addr)
{
    return (struct sockaddr *)addr;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        errx(2, "usage: calls socket|connect|orig_dst COUNT");
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
        else
            result = tp_orig_dst(accepted, (struct sockaddr *)&place, &len);
        if (result < 0)
            errx(1, "%s", tp_last_error());
        if (fd >= 0)
            close(fd);
    }
    return 0;
}
