/*
 * Binds an address that this host does not own, and shows that it works by
 * asking a peer whom the datagram came from.
 *
 * The address is that of the kernel's own example (Documentation/networking/
 * tproxy.rst): 0xDEADBEEF, port 0xCAFE.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <tproxy.h>

int main(void)
{
    /* The peer: an ordinary socket that knows nothing of this. */
    struct sockaddr_in peer_addr = { .sin_family = AF_INET };
    socklen_t len = sizeof peer_addr;
    peer_addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int peer = socket(AF_INET, SOCK_DGRAM, 0);
    struct timeval patience = { .tv_sec = 2 };
    if (peer < 0 || bind(peer, (struct sockaddr *)&peer_addr, sizeof peer_addr) != 0 ||
        getsockname(peer, (struct sockaddr *)&peer_addr, &len) != 0 ||
        setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) != 0)
        err(1, "the peer's socket");

    struct sockaddr_in foreign = { .sin_family = AF_INET, .sin_port = htons(0xCAFE) };
    foreign.sin_addr.s_addr = htonl(0xDEADBEEF);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0)
        err(1, "socket");

    /* The one call. It was setsockopt(fd, SOL_IP, IP_TRANSPARENT, ...), then bind. */
    if (tp_bind_nonlocal(fd, (struct sockaddr *)&foreign, sizeof foreign) != 0)
        errx(1, "%s", tp_last_error());

    if (sendto(fd, "hello", 5, 0, (struct sockaddr *)&peer_addr, sizeof peer_addr) != 5)
        err(1, "sendto (is lo up?)");
    struct sockaddr_in seen;
    char data[16];
    len = sizeof seen;
    if (recvfrom(peer, data, sizeof data, 0, (struct sockaddr *)&seen, &len) != 5)
        err(1, "the peer received nothing");

    char text[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, &seen.sin_addr, text, sizeof text);
    printf("the peer saw %s:%u\n", text, ntohs(seen.sin_port));
    return memcmp(&seen.sin_addr, &foreign.sin_addr, sizeof seen.sin_addr) != 0 || seen.sin_port != foreign.sin_port;
}
