/* Scenarios: the process drops privileges, or enters another root directory or network namespace. */
#define _GNU_SOURCE
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "lifecycle.h"

/* Privileges. */

static void set_capabilities(uint32_t capabilities)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct sets[2] = { { capabilities, capabilities, capabilities }, { 0, 0, 0 } };
    CHECK(syscall(SYS_capset, &header, sets) == 0);
}

static void without_capabilities(void)
{
    serve_first();
    set_capabilities(0);
    FAILS(EPERM, stats());
    FAILS(EPERM, update());
    FAILS(EPERM, replace());
    FAILS(EPERM, read_stats());
    done();
}

static void become_another_user(void)
{
    CHECK(setresgid(1, 1, 1) == 0 && setresuid(1, 1, 1) == 0);
}

/* The rules remain and work. The calls need capabilities that the user does not have. */
static void user_without_capabilities(void)
{
    serve_first();
    become_another_user();
    FAILS(EPERM, stats());
    FAILS(EPERM, update());
    FAILS(EPERM, replace());
    done();
}

/* iptables programs get the capability from the ambient set. */
static void user_with_capabilities(void)
{
    serve_first();
    CHECK(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0);
    become_another_user();
    set_capabilities(1U << CAP_NET_ADMIN | 1U << CAP_NET_RAW);
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_ADMIN, 0, 0) == 0);
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0) == 0);
    all_calls_work();
    done();
}

/* Root directory and network namespaces. */

static void change_root(void)
{
    serve_first();
    char directory[] = "/tmp/lifecycle-XXXXXX";
    CHECK(mkdtemp(directory) != NULL && chdir(directory) == 0 && rmdir(directory) == 0 && chroot(".") == 0);
    if (backend == TP_BACKEND_NFT)
        all_calls_work();
    else {
        FAILS_SAYING(EOPNOTSUPP, "iptables", stats());
        FAILS_SAYING(EOPNOTSUPP, "iptables", update());
        FAILS_SAYING(EOPNOTSUPP, "iptables", replace());
    }
    done();
}

/* This thread enters another network namespace, which has rules of the same name. The rules of both are independent. */
static void other_network(void)
{
    serve_first();
    tp_rules *first = rules;
    CHECK(unshare(CLONE_NEWNET) == 0 && system("ip link set lo up") == 0);
    FAILS(ENOENT, read_stats());
    listen_on_port();
    install();
    tp_rules *second = rules;
    rules = first;
    all_calls_work();
    CHECK(read_stats() == 0);
    rules = second;
    CHECK(stats() == 0);
    all_calls_work();
    FAILS(ENOENT, read_stats());
    done();
}

/* The same, without the capability to return. */
static void other_network_without_capability(void)
{
    serve_first();
    CHECK(unshare(CLONE_NEWNET) == 0);
    set_capabilities(1U << CAP_NET_ADMIN | 1U << CAP_NET_RAW);
    if (backend == TP_BACKEND_NFT) {
        CHECK(stats() == 0 && update() == 0 && replace() == 0);
        CHECK(tp_remove_rules(rules) == 0);
    } else {
        FAILS_SAYING(EPERM, "network namespace", stats());
        FAILS_SAYING(EPERM, "network namespace", update());
        FAILS_SAYING(EPERM, "network namespace", replace());
    }
    done();
}

static void *install_in_own_network(void *unused)
{
    CHECK(unshare(CLONE_NEWNET) == 0 && system("ip link set lo up") == 0);
    listen_on_port();
    install();
    close(listener);
    close(receiver);
    return unused;
}

/* No process, file or name refers to the network namespace of the rules: only the sockets of the handle keep it. */
static void network_is_gone(void)
{
    CHECK(tp_remove_rules(rules) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, install_in_own_network, NULL) == 0 && pthread_join(thread, NULL) == 0);
    say("ready");
    wait_for_line();
    CHECK(stats() == 0 && update() == 0 && replace() == 0);
    FAILS(ENOENT, read_stats());
    CHECK(tp_remove_rules(rules) == 0);
    done();
}

const struct scenario namespace_scenarios[] = {
    { "capabilities", without_capabilities },
    { "user", user_without_capabilities },
    { "user-with-capabilities", user_with_capabilities },
    { "chroot", change_root },
    { "other-network", other_network },
    { "other-network-without-capability", other_network_without_capability },
    { "network-is-gone", network_is_gone },
    { NULL, NULL },
};
