/* A program that installs rules and then does what programs do: forks, becomes a daemon, closes descriptors, drops
 * privileges, moves to another network namespace. tests/c/lifecycle.py runs it and looks what becomes of the traffic.
 *
 *     lifecycle SCENARIO nft|iptables
 *
 * It says "ready" when the traffic may be looked at, reads a line of standard input, does the second half, and says
 * "done"; then it waits for the end of its standard input. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <tproxy.h>
#include <unistd.h>

#include "limit.h"

/* TCP and UDP, on [::] and one port. */
static int listener, receiver;
static in_port_t port = 3129;
static uint32_t backend;
static tp_rules *rules;
static char **arguments;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            printf("line %d: %s; errno %d (%s), last error: %s\n", __LINE__, #condition, errno, strerror(errno), tp_last_error()); \
            fflush(stdout); \
            _exit(1); \
        } \
    } while (0)

/* The call fails with this errno, and its sentence has these words. */
#define FAILS_SAYING(expected, words, call) \
    do { \
        errno = 0; \
        CHECK((call) == -1 && errno == (expected) && strstr(tp_last_error(), (words)) != NULL); \
    } while (0)
#define FAILS(expected, call) FAILS_SAYING(expected, " ", call)

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

static struct sockaddr_in6 any_address(void)
{
    return (struct sockaddr_in6){ .sin6_family = AF_INET6, .sin6_port = htons(port) };
}

static void listen_on_port(void)
{
    struct sockaddr_in6 any = any_address();
    listener = tp_listen((struct sockaddr *)&any, sizeof any, -1, 0);
    receiver = tp_socket(AF_INET6, SOCK_DGRAM, 0);
    CHECK(listener >= 0 && receiver >= 0 && tp_bind_nonlocal(receiver, (struct sockaddr *)&any, sizeof any) == 0);
}

static int stats(void)
{
    struct tp_rules_stats found;
    return tp_rules_stats(rules, &found, sizeof found);
}

static int read_stats(void)
{
    struct tp_rules_stats found;
    return tp_read_stats(NULL, &found, sizeof found);
}

static int replace(void)
{
    struct sockaddr_in6 any = any_address();
    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = { .backend = backend, .ports = &http, .n_ports = 1 };
    config.listen_addr = (struct sockaddr *)&any;
    config.listen_addrlen = sizeof any;
    config.protocols = TP_PROTO_TCP | TP_PROTO_UDP;
    return tp_replace_rules(rules, &config, sizeof config);
}

static int update(void)
{
    struct tp_prefix prefix = { .family = AF_INET, .len = 32, .addr = { 192, 0, 2, 99 } };
    return tp_update_rules(rules, TP_SET_BYPASS, &prefix, 1, NULL, 0);
}

static int install_again(void)
{
    struct tp_port_range http = { .first = 80, .last = 80 };
    int listeners[] = { listener, receiver };
    struct tp_rules_config config = { .listeners = listeners, .n_listeners = 2, .ports = &http, .n_ports = 1, .backend = backend };
    return tp_install_rules(&config, sizeof config, &rules);
}

static void install(void)
{
    CHECK(install_again() == 0);
}

static void all_calls_work(void)
{
    CHECK(stats() == 0);
    CHECK(update() == 0);
    CHECK(replace() == 0);
    CHECK(read_stats() == 0);
    CHECK(tp_remove_rules(rules) == 0);
}

static void *serve_tcp(void *unused)
{
    int fd;
    while ((fd = accept(listener, NULL, NULL)) >= 0) {
        CHECK(write(fd, "proxied", 7) == 7);
        close(fd);
    }
    return unused;
}

static volatile int stopped;

static void *serve_udp(void *unused)
{
    char buffer[100];
    struct tp_datagram datagram = { .data = buffer, .capacity = sizeof buffer };
    tp_replier *replier;
    CHECK(tp_replier_open(NULL, 0, &replier) == 0);
    while (tp_recv_datagrams(receiver, &datagram, 1, 0) == 1 && !stopped) {
        memcpy(buffer, "proxied", datagram.len = 7);
        CHECK(tp_reply(replier, &datagram, 1) == 1);
    }
    tp_replier_close(replier);
    return unused;
}

static pthread_t servers[2];

static void serve_in_background(void)
{
    CHECK(pthread_create(&servers[0], NULL, serve_tcp, NULL) == 0 && pthread_create(&servers[1], NULL, serve_udp, NULL) == 0);
}

/* Ends the threads, so that no call of theirs keeps the listeners open. */
static void stop_serving(void)
{
    stopped = 1;
    shutdown(listener, SHUT_RD);
    shutdown(receiver, SHUT_RD);
    CHECK(pthread_join(servers[0], NULL) == 0 && pthread_join(servers[1], NULL) == 0);
}

/* Serves until the caller has looked at the traffic. */
static void serve_first(void)
{
    serve_in_background();
    say("ready");
    wait_for_line();
}

/* The caller looks again. */
static void done(void)
{
    say("done");
    wait_for_line();
}

static pid_t forked(void)
{
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    return pid;
}

/* Runs something in a child, and waits until it has ended well. */
static void in_child(void (*body)(void))
{
    pid_t pid = forked();
    if (pid == 0) {
        alarm((unsigned)limit(60000) / 1000);
        body();
        exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* In a child, until the installing process has ended: it has ended a moment after its children have another parent. Gives
 * what the first call after that gives. */
static int wait_for_end_of_installer(void)
{
    int found = -1;
    while (getppid() != 1)
        usleep(1000);
    for (int i = 0; i < 5000 && (found = stats()) == -1 && errno == EBUSY && strstr(tp_last_error(), "lives") != NULL; i++)
        usleep(1000);
    return found;
}

static int descriptors(void)
{
    int open = 0;
    for (int fd = 0; fd < 300; fd++)
        open += fcntl(fd, F_GETFD) >= 0;
    return open;
}

/* The process ends. */

static void sigkill(void)
{
    serve_first();
    raise(SIGKILL);
}

static void ordinary_exit(void)
{
    serve_first();
    exit(0);
}

static void remove_at_exit(void)
{
    CHECK(tp_remove_rules(rules) == 0);
}

/* The installer removes the rules when it exits; its worker lives on, and has a handle of rules that are gone. */
static void parent_exit_handler(void)
{
    if (forked() == 0) {
        serve_in_background();
        say("ready");
        wait_for_end_of_installer();
        FAILS_SAYING(ENOENT, "gone", stats());
        FAILS_SAYING(ENOENT, "gone", update());
        FAILS_SAYING(ENOENT, "gone", replace());
        CHECK(tp_remove_rules(rules) == 0);
        done();
        return;
    }
    atexit(remove_at_exit);
    wait_for_line();
    exit(0);
}

/* The handler is inherited by a worker, which exits first. */
static void worker_exit_handler(void)
{
    atexit(remove_at_exit);
    serve_first();
    pid_t pid = forked();
    if (pid == 0)
        exit(0);
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(stats() == 0 && update() == 0 && replace() == 0);
    say("done");
    wait_for_line();
}

/* The installer ends, and a child has the rules. */

static void become_daemon(void)
{
    CHECK(daemon(1, 1) == 0);
    while (getppid() != 1)
        usleep(1000);
    serve_first();
    all_calls_work();
    done();
}

static void double_fork(void)
{
    if (forked() > 0)
        _exit(0);
    setsid();
    if (forked() > 0)
        _exit(0);
    while (getppid() != 1)
        usleep(1000);
    serve_first();
    wait_for_end_of_installer();
    all_calls_work();
    done();
}

/* The master is killed, and its worker serves on. */
static void prefork(void)
{
    if (forked() == 0) {
        serve_in_background();
        say("ready");
        wait_for_end_of_installer();
        done();
        return;
    }
    wait_for_line();
    raise(SIGKILL);
}

/* Neither worker keeps the rules of the killed master: one forgets its copy, the other executes a program. */
static void prefork_forgets(void)
{
    if (forked() == 0) {
        /* The descriptor of the listener is the parent's too. */
        tp_forget_rules(rules);
        serve_in_background();
        if (forked() == 0) {
            execl("/proc/self/exe", arguments[0], "wait", arguments[2], NULL);
            CHECK(0);
        }
        say("ready");
        while (getppid() != 1)
            usleep(1000);
        usleep(10000);
        done();
        return;
    }
    wait_for_line();
    raise(SIGKILL);
}

/* The master changes the rules after the fork: its worker knows the sets of before only. */
static void prefork_master_changes(void)
{
    if (forked() == 0) {
        serve_in_background();
        say("ready");
        CHECK(wait_for_end_of_installer() == 0);
        FAILS_SAYING(ESTALE, "tp_replace_rules", update());
        CHECK(replace() == 0);
        all_calls_work();
        done();
        return;
    }
    wait_for_line();
    CHECK(update() == 0 && replace() == 0 && update() == 0);
    raise(SIGKILL);
}

/* Of two workers of a killed master, one removes the rules, and installs new ones of the same name. The other's handle is
 * one of rules that are gone, and does nothing to the new ones. */
static void siblings(void)
{
    int removed[2], tried[2];
    char byte = 0;
    CHECK(pipe(removed) == 0 && pipe(tried) == 0);
    if (forked() == 0) {
        alarm((unsigned)limit(60000) / 1000);
        CHECK(read(removed[0], &byte, 1) == 1);
        FAILS_SAYING(ENOENT, "gone", stats());
        FAILS_SAYING(ENOENT, "gone", update());
        FAILS_SAYING(ENOENT, "gone", replace());
        CHECK(tp_remove_rules(rules) == 0 && write(tried[1], &byte, 1) == 1);
        _exit(0);
    }
    if (forked() == 0) {
        close(tried[1]);
        serve_in_background();
        say("ready");
        CHECK(wait_for_end_of_installer() == 0 && tp_remove_rules(rules) == 0);
        install();
        CHECK(write(removed[1], &byte, 1) == 1 && read(tried[0], &byte, 1) == 1);
        CHECK(stats() == 0 && update() == 0 && replace() == 0);
        done();
        return;
    }
    wait_for_line();
    raise(SIGKILL);
}

static void *keep_asking(void *unused)
{
    for (;;)
        stats();
    return unused;
}

static void *keep_changing(void *unused)
{
    for (;;)
        if (update() == 0)
            replace();
    return unused;
}

/* A master is killed while it waits for answers, or has made half of a change. Its worker gets its own answers. */
static void killed_in_call(void)
{
    CHECK(tp_remove_rules(rules) == 0);
    say("ready");
    wait_for_line();
    for (int i = 0; i < (backend == TP_BACKEND_NFT ? 100 : 5); i++) {
        int well[2];
        char byte = 0;
        CHECK(pipe(well) == 0);
        pid_t master = forked();
        if (master == 0) {
            close(well[0]);
            install();
            if (forked() == 0) {
                alarm((unsigned)limit(60000) / 1000);
                CHECK(wait_for_end_of_installer() == 0);
                CHECK(update() == 0 || errno == ESTALE);
                CHECK(replace() == 0);
                all_calls_work();
                CHECK(write(well[1], &byte, 1) == 1);
                _exit(0);
            }
            pthread_t thread;
            /* A program of iptables would go on after its parent was killed. */
            int changing = i % 2 == 1 && backend == TP_BACKEND_NFT;
            CHECK(pthread_create(&thread, NULL, changing ? keep_changing : keep_asking, NULL) == 0);
            usleep(1000 + i * 100);
            raise(SIGKILL);
        }
        close(well[1]);
        CHECK(read(well[0], &byte, 1) == 1);
        close(well[0]);
        CHECK(waitpid(master, NULL, 0) == master);
        FAILS(ENOENT, read_stats());
    }
    done();
}

/* The installer lives on, and has the rules no more: it closes its descriptors. A restart names the worker. */
static void parent_closes(void)
{
    if (forked() == 0) {
        serve_in_background();
        say("ready");
        for (int i = 0; i < 5000 && stats() == -1 && errno == EBUSY; i++)
            usleep(1000);
        CHECK(update() == 0 && replace() == 0);
        done();
        CHECK(tp_remove_rules(rules) == 0);
        return;
    }
    wait_for_line();
    for (int fd = 3; fd < 200; fd++)
        close(fd);
    pause();
}

static void exec_itself(void)
{
    if (getenv("AGAIN") == NULL) {
        setenv("AGAIN", "1", 1);
        execv("/proc/self/exe", arguments);
        CHECK(0);
    }
    serve_first();
    all_calls_work();
    done();
}

/* A child while the installer lives. */

/* Nothing of its parent's may be removed or changed. */
static void child_may_not(void)
{
    FAILS_SAYING(EBUSY, "lives", stats());
    FAILS_SAYING(EBUSY, "lives", replace());
    FAILS_SAYING(EBUSY, "lives", update());
    CHECK(read_stats() == 0);
    CHECK(tp_remove_rules(rules) == 0);
}

static void shared(void)
{
    serve_first();
    in_child(child_may_not);
    CHECK(stats() == 0 && update() == 0 && replace() == 0);
    done();
}

/* Nor in another PID namespace, where the installer has no number. */
static void shared_across_pid_namespaces(void)
{
    serve_first();
    CHECK(unshare(CLONE_NEWPID) == 0);
    in_child(child_may_not);
    done();
}

/* Parent and children make calls at the same time: each gets its own answers. */
static void ask_often(void)
{
    for (int i = 0; i < 50; i++)
        FAILS(EBUSY, stats());
    for (int i = 0; i < 5; i++)
        CHECK(read_stats() == 0);
}

static void shared_at_once(void)
{
    serve_first();
    for (int i = 0; i < 4; i++)
        if (forked() == 0) {
            alarm((unsigned)limit(60000) / 1000);
            ask_often();
            _exit(0);
        }
    for (int i = 0; i < (backend == TP_BACKEND_NFT ? 200 : 10); i++)
        CHECK(stats() == 0 && update() == 0);
    int status;
    for (int i = 0; i < 4; i++)
        CHECK(wait(&status) > 0 && status == 0);
    done();
}

static void child_forgets(void)
{
    int before = descriptors();
    tp_forget_rules(rules);
    CHECK(before - descriptors() == 3);
}

static void worker_forgets(void)
{
    serve_first();
    in_child(child_forgets);
    CHECK(stats() == 0 && update() == 0 && replace() == 0);
    done();
}

/* Forked while other threads are in calls. */

static void report(const struct tp_finding *finding, void *context)
{
    (void)finding, (void)context;
}

/* Rules by a name, which are installed and removed. */
static void install_briefly(const char *name)
{
    struct sockaddr_in6 any = any_address();
    struct tp_rules_config config = { .name = name, .listen_addr = (struct sockaddr *)&any, .listen_addrlen = sizeof any };
    tp_rules *others;
    CHECK(tp_install_rules(&config, sizeof config, &others) == 0 && tp_remove_rules(others) == 0);
}

static void *keep_making_calls(void *name)
{
    for (;;) {
        tp_replier *replier;
        install_briefly(name);
        CHECK(tp_check(report, NULL) >= 0);
        CHECK(tp_purge_rules(name) == 0);
        CHECK(tp_replier_open(NULL, 0, &replier) == 0);
        tp_replier_close(replier);
    }
    return name;
}

/* The handle's lock may be held for ever here. */
static void forked_from_threads(void)
{
    FAILS(EBUSY, stats());
    tp_forget_rules(rules);
}

/* No call waits for a thread that was left behind. */
static void forked_from_threads_makes_calls(void)
{
    char name[20];
    snprintf(name, sizeof name, "child-%d", (int)getpid());
    install_briefly(name);
    CHECK(tp_check(report, NULL) >= 0);
    FAILS(EINVAL, tp_socket(AF_INET, SOCK_STREAM, 1U << 31));
}

/* One child at a time may use the rules of a parent that has ended. Several would read each other's answers. */
static void in_turn(const int *turns, void (*body)(void))
{
    char turn;
    CHECK(read(turns[0], &turn, 1) == 1);
    body();
    CHECK(write(turns[1], &turn, 1) == 1);
}

static void orphan_of_threads(void)
{
    if (stats() != 0)
        CHECK(errno == EDEADLK || errno == ENOENT);
    CHECK(tp_remove_rules(rules) == 0);
}

static void threads(void)
{
    pthread_t thread;
    int turns[2];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&thread, NULL, keep_asking, NULL) == 0);
    static char names[2][10] = { "thread-1", "thread-2" };
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&thread, NULL, keep_making_calls, names[i]) == 0);
    for (int i = 0; i < 100; i++)
        in_child(forked_from_threads);
    for (int i = 0; i < 20; i++)
        in_child(forked_from_threads_makes_calls);
    CHECK(pipe(turns) == 0);
    for (int i = 0; i < 10; i++)
        if (forked() == 0) {
            alarm((unsigned)limit(120000) / 1000);
            while (getppid() != 1)
                usleep(1000);
            usleep(10000);
            in_turn(turns, orphan_of_threads);
            say("orphan");
            _exit(0);
        }
    say("ready");
    wait_for_line();
    CHECK(write(turns[1], "1", 1) == 1);
    raise(SIGKILL);
}

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

/* The rules stay and work; the calls need what the user has not. */
static void user_without_capabilities(void)
{
    serve_first();
    become_another_user();
    FAILS(EPERM, stats());
    FAILS(EPERM, update());
    FAILS(EPERM, replace());
    done();
}

/* Programs of iptables get the capability from the ambient set. */
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

/* Directories and networks. */

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

/* This thread moves to another network namespace, which has rules of the same name; both stay what they are. */
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

/* The same without the capability to go back. */
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

/* The network namespace of the rules has no process, file or name any more: only the handle's sockets keep it. */
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

/* Descriptors that the program closes. */

static tp_replier *replier;

/* Those of a replier are among them. */
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

/* A child that was forked before has them still, and has nothing to say while its parent lives. */
static void closed_in_child(void)
{
    for (int fd = 3; fd < 200; fd++)
        close(fd);
    int reused[20];
    for (int i = 0; i < 20; i++)
        CHECK((reused[i] = dup(0)) >= 0);
    int before = descriptors();
    /* Which of the two it is does not matter. */
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

/* Other things get the numbers of all descriptors: they must neither be written to nor be closed. */
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

/* A netlink socket of the program's own: the kernel would answer there. */
static void reused_netlink(void)
{
    serve_first();
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, NETLINK_NETFILTER);
    CHECK(netlink >= 0);
    reused_by(netlink, netlink);
    done();
}

/* All of these have one inode on kernels before 6.9, which descriptors of processes have, too. */
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

/* Signals. */

static void sigchld_ignored(void)
{
    signal(SIGCHLD, SIG_IGN);
    serve_first();
    all_calls_work();
    install();
    done();
}

static const struct {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    { "sigkill", sigkill },
    { "exit", ordinary_exit },
    { "parent-exit-handler", parent_exit_handler },
    { "worker-exit-handler", worker_exit_handler },
    { "daemon", become_daemon },
    { "double-fork", double_fork },
    { "prefork", prefork },
    { "prefork-forgets", prefork_forgets },
    { "prefork-master-changes", prefork_master_changes },
    { "siblings", siblings },
    { "parent-closes", parent_closes },
    { "killed-in-call", killed_in_call },
    { "exec", exec_itself },
    { "shared", shared },
    { "shared-across-pid-namespaces", shared_across_pid_namespaces },
    { "shared-at-once", shared_at_once },
    { "worker-forgets", worker_forgets },
    { "worker-closes", worker_closes },
    { "threads", threads },
    { "capabilities", without_capabilities },
    { "user", user_without_capabilities },
    { "user-with-capabilities", user_with_capabilities },
    { "chroot", change_root },
    { "other-network", other_network },
    { "other-network-without-capability", other_network_without_capability },
    { "network-is-gone", network_is_gone },
    { "closefrom", closed },
    { "reused", reused },
    { "reused-blocking", reused_blocking },
    { "reused-netlink", reused_netlink },
    { "reused-anonymous", reused_anonymous },
    { "sigchld-ignored", sigchld_ignored },
};

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    arguments = argv;
    backend = strcmp(argv[2], "iptables") == 0 ? TP_BACKEND_IPTABLES : TP_BACKEND_NFT;
    if (strcmp(argv[1], "wait") == 0)
        return pause();
    if (getenv("PORT") != NULL)
        port = (in_port_t)atoi(getenv("PORT"));
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        if (strcmp(argv[1], scenarios[i].name) == 0) {
            listen_on_port();
            install();
            scenarios[i].run();
            return 0;
        }
    printf("no such scenario: %s\n", argv[1]);
    return 2;
}
