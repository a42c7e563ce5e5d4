/* A program that installs rules and then does what programs do: forks, becomes a daemon, closes descriptors, drops
 * privileges. tests/c/lifecycle.py runs it and looks what becomes of the traffic.
 *
 *     lifecycle SCENARIO nft|iptables
 *
 * It says "ready" when the traffic may be looked at, reads a line of standard input, does the second half, and says
 * "done"; then it waits for the end of its standard input. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <tproxy.h>
#include <unistd.h>

#include "limit.h"

static int listener;
static uint32_t backend;
static tp_rules *rules;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            printf("line %d: %s; errno %d (%s), last error: %s\n", __LINE__, #condition, errno, strerror(errno), tp_last_error()); \
            fflush(stdout); \
            _exit(1); \
        } \
    } while (0)

/* The call fails with this errno, and says why. */
#define FAILS(expected, call) \
    do { \
        errno = 0; \
        CHECK((call) == -1 && errno == (expected) && *tp_last_error() != 0); \
    } while (0)

static void say(const char *word)
{
    puts(word);
    fflush(stdout);
}

static void wait_for_line(void)
{
    char c;
    while (read(0, &c, 1) == 1 && c != '\n')
        ;
}

static int stats(void)
{
    struct tp_rules_stats found;
    return tp_rules_stats(rules, &found, sizeof found);
}

static int replace(void)
{
    struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(3129) };
    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = { .backend = backend, .ports = &http, .n_ports = 1 };
    config.listen_addr = (struct sockaddr *)&any;
    config.listen_addrlen = sizeof any;
    return tp_replace_rules(rules, &config, sizeof config);
}

static int update(void)
{
    struct tp_prefix prefix = { .family = AF_INET, .len = 32, .addr = { 192, 0, 2, 99 } };
    return tp_update_rules(rules, TP_SET_BYPASS, &prefix, 1, NULL, 0);
}

static void *serve(void *unused)
{
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            return unused;
        CHECK(write(fd, "proxied", 7) == 7);
        close(fd);
    }

}

static void serve_in_background(void)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
}

static void install(void)
{
    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = { .listeners = &listener, .n_listeners = 1, .ports = &http, .n_ports = 1, .backend = backend };
    CHECK(tp_install_rules(&config, sizeof config, &rules) == 0);
}

/* Runs something in a child, and waits until it has ended well. */
static void in_child(void (*body)(void))
{
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm((unsigned)limit(20000) / 1000);
        body();
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void drop_capabilities(void)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct none[2] = { 0 };
    CHECK(syscall(SYS_capset, &header, none) == 0);
}

/* A child of the installer: nothing of its may be removed or changed. */
static void child_may_not(void)
{
    FAILS(EBUSY, stats());
    FAILS(EBUSY, replace());
    FAILS(EBUSY, update());
    struct tp_rules_stats found;
    CHECK(tp_read_stats(NULL, &found, sizeof found) == 0);
    CHECK(tp_remove_rules(rules) == 0);
}

static void child_forgets(void)
{
    int before = 0, after = 0;
    for (int fd = 0; fd < 100; fd++)
        before += fcntl(fd, F_GETFD) >= 0;
    tp_forget_rules(rules);
    for (int fd = 0; fd < 100; fd++)
        after += fcntl(fd, F_GETFD) >= 0;
    CHECK(before - after == 3);
}

static void remove_at_exit(void)
{
    CHECK(tp_remove_rules(rules) == 0);
}

/* Other things get the numbers of all descriptors; they must neither be written to nor be closed. */
static void closed_and_reused(int flags)
{
    int reserve[2];
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | flags, 0, reserve) == 0);
    CHECK(dup2(reserve[0], 200) == 200 && dup2(reserve[1], 201) == 201);
    for (int fd = 3; fd < 200; fd++)
        close(fd);
    int waiting = -1;
    for (int fd = 3; fd < 50; fd++)
        if (dup2(200, fd) != fd) {
            /* The thread that waits in accept has reserved one. */
            CHECK(errno == EBUSY && waiting == -1);
            waiting = fd;
        }
    alarm((unsigned)limit(20000) / 1000);
    FAILS(EBADF, stats());
    FAILS(EBADF, replace());
    FAILS(EBADF, update());
    FAILS(EBADF, tp_remove_rules(rules));
    alarm(0);
    for (int fd = 3; fd < 50; fd++)
        CHECK(fd == waiting || fcntl(fd, F_GETFD) >= 0);
    char byte;
    CHECK(recv(201, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
}

static void *keep_asking(void *unused)
{
    for (;;)
        stats();
    return unused;
}

/* Forked while other threads are in calls on the handle. The lock may be held for ever here. */
static void forked_from_threads(void)
{
    FAILS(EBUSY, stats());
    tp_forget_rules(rules);
}

static void forked_from_threads_that_ended(void)
{
    while (getppid() != 1)
        usleep(1000);
    usleep(10000);
    if (stats() != 0)
        CHECK(errno == EDEADLK);
    CHECK(tp_remove_rules(rules) == 0);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const char *scenario = argv[1];
    backend = strcmp(argv[2], "iptables") == 0 ? TP_BACKEND_IPTABLES : TP_BACKEND_NFT;
    const char *port = getenv("PORT");
    struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port != NULL ? atoi(port) : 3129) };
    listener = tp_listen((struct sockaddr *)&any, sizeof any, -1, 0);
    CHECK(listener >= 0);
    if (strcmp(scenario, "sigchld-ignored") == 0)
        signal(SIGCHLD, SIG_IGN);
    install();
#define IS(name) (strcmp(scenario, name) == 0)
    if (IS("threads")) {
        pthread_t thread;
        for (int i = 0; i < 4; i++)
            CHECK(pthread_create(&thread, NULL, keep_asking, NULL) == 0);
        for (int i = 0; i < 200; i++)
            in_child(forked_from_threads);
        for (int i = 0; i < 20; i++) {
            pid_t pid = fork();
            if (pid == 0) {
                forked_from_threads_that_ended();
                say("orphan");
                _exit(0);
            }
        }
        say("ready");
        wait_for_line();
        raise(SIGKILL);
    }
    if (IS("daemon") || IS("double-fork")) {
        pid_t pid = fork();
        if (pid > 0)
            _exit(0);
        setsid();
        if (IS("double-fork") && fork() > 0)
            _exit(0);
        while (getppid() != 1)
            usleep(1000);
        serve_in_background();
        CHECK(stats() == 0 && update() == 0 && replace() == 0);
        install_again:
        say("ready");
        wait_for_line();
        CHECK(tp_remove_rules(rules) == 0);
        say("done");
        wait_for_line();
        return 0;
    }
    if (IS("exec")) {
        if (getenv("AGAIN") == NULL) {
            setenv("AGAIN", "1", 1);
            execv("/proc/self/exe", argv);
            CHECK(0);
        }
        serve_in_background();
        goto install_again;
    }
    if (IS("prefork")) {
        /* The master dies, and its worker serves on. */
        if (fork() == 0) {
            serve_in_background();
            say("ready");
            while (getppid() != 1)
                usleep(1000);
            say("done");
            wait_for_line();
            _exit(0);
        }
        wait_for_line();
        raise(SIGKILL);
    }
    if (IS("parent-exit-handler")) {
        /* The parent removes the rules when it exits; its worker lives on, and has a handle of what is gone. */
        if (fork() == 0) {
            serve_in_background();
            say("ready");
            while (getppid() != 1)
                usleep(1000);
            usleep(10000);
            FAILS(ENOENT, stats());
            if (backend == TP_BACKEND_NFT) {
                FAILS(ENOENT, update());
                FAILS(ENOENT, replace());
            }
            say("done");
            wait_for_line();
            _exit(0);
        }
        atexit(remove_at_exit);
        wait_for_line();
        return 0;
    }
    serve_in_background();
    say("ready");
    wait_for_line();
    if (IS("sigkill"))
        raise(SIGKILL);
    if (IS("exit"))
        return 0;
    if (IS("shared"))
        in_child(child_may_not);
    else if (IS("worker-forgets"))
        in_child(child_forgets);
    else if (IS("capabilities")) {
        drop_capabilities();
        FAILS(EPERM, stats());
        FAILS(EPERM, replace());
    } else if (IS("chroot")) {
        char directory[] = "/tmp/lifecycle-XXXXXX";
        CHECK(mkdtemp(directory) != NULL && chroot(directory) == 0 && chdir("/") == 0);
        CHECK(stats() == 0 && update() == 0 && replace() == 0);
        CHECK(tp_remove_rules(rules) == 0);
    } else if (IS("other-network")) {
        /* This thread moves to another network namespace; the rules stay where they are. */
        CHECK(unshare(CLONE_NEWNET) == 0);
        CHECK(stats() == 0 && update() == 0 && replace() == 0);
        CHECK(tp_remove_rules(rules) == 0);
    } else if (IS("closefrom")) {
        for (int fd = 3; fd < 200; fd++)
            close(fd);
        FAILS(EBADF, stats());
        FAILS(EBADF, update());
        FAILS(EBADF, replace());
        FAILS(EBADF, tp_remove_rules(rules));
    } else if (IS("reused"))
        closed_and_reused(SOCK_NONBLOCK);
    else if (IS("reused-blocking"))
        closed_and_reused(0);
    else if (IS("sigchld-ignored")) {
        CHECK(stats() == 0 && replace() == 0);
        CHECK(tp_remove_rules(rules) == 0);
    } else {
        printf("no such scenario: %s\n", scenario);
        return 2;
    }
    say("done");
    wait_for_line();
    return 0;
}
