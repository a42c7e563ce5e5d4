/*
 * Binds a socket to an address that this host does not own, sends a datagram to
 * a peer, and prints the source address that the peer received.
 *
 * The address is that of the kernel's example (Documentation/networking/
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
    /* The peer is an ordinary socket. */
    struct sockaddr_in peer_addr = { .sin_family = AF_INET };
    socklen_t len = sizeof peer_addr;
    peer_addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int peer = socket(AF_INET, SOCK_DGRAM, 0);
    struct timeval timeout = { .tv_sec = 2 };
    if (peer < 0 || bind(peer, (struct sockaddr *)&peer_addr, sizeof peer_addr) != 0 ||
        getsockname(peer, (struct sockaddr *)&peer_addr, &len) != 0 ||
        setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) != 0)
        err(1, "socket of the peer");

    struct sockaddr_in foreign = { .sin_family = AF_INET, .sin_port = htons(0xCAFE) };
    foreign.sin_addr.s_addr = htonl(0xDEADBEEF);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0)
        err(1, "socket");

    /* Replaces setsockopt(fd, SOL_IP, IP_TRANSPARENT, ...) and bind(). */
    if (tp_bind_nonlocal(fd, (struct sockaddr *)&foreign, sizeof foreign) != 0)
        errx(1, "%s", tp_last_error());

    if (sendto(fd, "hello", 5, 0, (struct sockaddr *)&peer_addr, sizeof peer_addr) != 5)
        err(1, "sendto (lo may be down)");
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
