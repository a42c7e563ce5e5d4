/* Scenarios: the process ends, becomes a daemon, forks, or executes a program. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "lifecycle.h"
#include "limit.h"

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

/* The installer removes the rules when it exits. Its worker continues, with a handle of removed rules. */
static void parent_exit_handler(void)
{
    if (forked() == 0) {
        serve_in_background();
        say("ready");
        wait_for_end_of_installer();
        FAILS_SAYING(ENOENT, "gone", stats());
        FAILS_SAYING(ENOENT, "gone", update());
        FAILS_SAYING(ENOENT, "gone", learn());
        FAILS_SAYING(ENOENT, "gone", replace());
        CHECK(tp_remove_rules(rules) == 0);
        done();
        return;
    }
    atexit(remove_at_exit);
    wait_for_line();
    exit(0);
}

/* A worker inherits the exit handler, and exits first. */
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

/* The installer ends, and a child uses the rules. */

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

/* The master is killed, and its worker continues to serve. */
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
        /* The parent has the descriptor of the listener too. */
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

/* The master changes the rules after the fork: its worker knows only the sets before the fork. */
static void prefork_master_changes(void)
{
    if (forked() == 0) {
        serve_in_background();
        say("ready");
        CHECK(wait_for_end_of_installer() == 0);
        FAILS_SAYING(ESTALE, "tp_replace_rules", update());
        FAILS_SAYING(ESTALE, "tp_replace_rules", learn());
        CHECK(replace() == 0);
        all_calls_work();
        done();
        return;
    }
    wait_for_line();
    CHECK(update() == 0 && replace() == 0 && update() == 0);
    raise(SIGKILL);
}

/* Of two workers of a killed master, one removes the rules and installs new ones of the same name. The handle of the other
 * worker refers to the removed rules, and does not affect the new ones. */
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
        FAILS_SAYING(ENOENT, "gone", learn());
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

/* A master is killed while it waits for replies of the kernel, or in the middle of a change. Its worker gets its own replies. */
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
            /* An iptables program would continue after its parent was killed. */
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

/* The installer closes its descriptors and continues without the rules. An error message at a restart names the worker. */
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

/* A child, while the installer runs. */

/* The child must not remove or change the rules of its parent. */
static void child_may_not(void)
{
    FAILS_SAYING(EBUSY, "lives", stats());
    FAILS_SAYING(EBUSY, "lives", replace());
    FAILS_SAYING(EBUSY, "lives", update());
    FAILS_SAYING(EBUSY, "lives", learn());
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

/* The same in another PID namespace, where the installer has no PID. */
static void shared_across_pid_namespaces(void)
{
    serve_first();
    CHECK(unshare(CLONE_NEWPID) == 0);
    in_child(child_may_not);
    done();
}

/* Parent and children make calls at the same time: each gets its own replies of the kernel. */
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

/* Installs and removes rules with a name. */
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

/* In this child, the lock of the handle may be held forever. */
static void forked_from_threads(void)
{
    FAILS(EBUSY, stats());
    tp_forget_rules(rules);
}

/* No call waits for a thread that exists only in the parent. */
static void forked_from_threads_makes_calls(void)
{
    char name[20];
    snprintf(name, sizeof name, "child-%d", (int)getpid());
    install_briefly(name);
    CHECK(tp_check(report, NULL) >= 0);
    FAILS(EINVAL, tp_socket(AF_INET, SOCK_STREAM, 1U << 31));
}

/* Only one child at a time may use the rules of a parent that has ended. */
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

const struct scenario process_scenarios[] = {
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
    { "threads", threads },
    { NULL, NULL },
};
