/* Scenarios: the program closes or reuses descriptors, or ignores SIGCHLD. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/epoll.h>
#include <linux/netlink.h>

#include "lifecycle.h"
#include "limit.h"

/* The program closes descriptors. */

static tp_replier *replier;

/* Closes all descriptors, including those of a replier. */
static void close_descriptors(void)
{
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(9) };
    struct tp_datagram datagram = { .data = "", .len = 1 };
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(tp_replier_open(NULL, 0, &replier) == 0);
    memcpy(&datagram.client, &here, sizeof here);
    memcpy(&datagram.orig_dst, &here, sizeof here);
    CHECK(tp_reply(replier, &datagram, 1) == 1);
    stop_serving();
    for (int fd = 3; fd < 200; fd++)
        close(fd);
}

static void calls_fail_with_ebadf(void)
{
    alarm((unsigned)limit(60000) / 1000);
    FAILS_SAYING(EBADF, "closed", stats());
    FAILS_SAYING(EBADF, "closed", replace());
    FAILS_SAYING(EBADF, "closed", update());
    FAILS_SAYING(EBADF, "closed", learn());
    FAILS_SAYING(EBADF, "closed", tp_remove_rules(rules));
    tp_replier_close(replier);
    alarm(0);
}

static void closed(void)
{
    serve_first();
    close_descriptors();
    calls_fail_with_ebadf();
    done();
}

/* A child closes its copies of the descriptors, while its parent runs. */
static void closed_in_child(void)
{
    for (int fd = 3; fd < 200; fd++)
        close(fd);
    int reused[20];
    for (int i = 0; i < 20; i++)
        CHECK((reused[i] = dup(0)) >= 0);
    int before = descriptors();
    /* Either error is correct. */
    CHECK(stats() == -1 && (errno == EBUSY || errno == EBADF));
    CHECK(tp_remove_rules(rules) == 0);
    CHECK(descriptors() == before);
}

static void worker_closes(void)
{
    serve_first();
    in_child(closed_in_child);
    CHECK(stats() == 0 && update() == 0 && replace() == 0);
    done();
}

/* Other files get the numbers of all descriptors. The library must neither write to them nor close them. */
static void reused_by(int replacement, int other_end)
{
    CHECK(dup2(replacement, 200) == 200 && (other_end < 0 || dup2(other_end, 201) == 201));
    close_descriptors();
    for (int fd = 3; fd < 50; fd++)
        CHECK(dup2(200, fd) == fd);
    int before = descriptors();
    calls_fail_with_ebadf();
    CHECK(descriptors() == before);
    char byte;
    if (other_end >= 0)
        CHECK(recv(201, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
}

static void reused_by_socket(int flags)
{
    int pair[2];
    serve_first();
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | flags, 0, pair) == 0);
    reused_by(pair[0], pair[1]);
    done();
}

static void reused(void)
{
    reused_by_socket(SOCK_NONBLOCK);
}

static void reused_blocking(void)
{
    reused_by_socket(0);
}

/* The files are a netlink socket of the program. The kernel would reply to a request that is written to it. */
static void reused_netlink(void)
{
    serve_first();
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, NETLINK_NETFILTER);
    CHECK(netlink >= 0);
    reused_by(netlink, netlink);
    done();
}

/* On kernels before 6.9, all epoll instances have the same inode, and pidfds have it too. */
static void reused_anonymous(void)
{
    serve_first();
    close_descriptors();
    for (int fd = 3; fd < 50; fd++)
        CHECK(epoll_create1(0) == fd);
    int before = descriptors();
    calls_fail_with_ebadf();
    CHECK(descriptors() == before);
    done();
}

/* The program ignores SIGCHLD. */

static void sigchld_ignored(void)
{
    signal(SIGCHLD, SIG_IGN);
    serve_first();
    all_calls_work();
    install();
    done();
}

const struct scenario descriptor_scenarios[] = {
    { "worker-closes", worker_closes },
    { "closefrom", closed },
    { "reused", reused },
    { "reused-blocking", reused_blocking },
    { "reused-netlink", reused_netlink },
    { "reused-anonymous", reused_anonymous },
    { "sigchld-ignored", sigchld_ignored },
    { NULL, NULL },
};
