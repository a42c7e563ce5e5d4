/* What each call does when memory is not to be had. An allocation that is larger than LARGE grows with what the caller, the
 * kernel or other programs gave; each of them fails in turn, and with it all that follow, and the call has to say ENOMEM
 * (or do without), to leave nothing behind, and to work again afterwards. On the error paths of the hot calls every
 * allocation fails. Run in a network namespace of its own. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <tproxy.h>
#include <unistd.h>

#define LARGE 16384
#define PREFIXES 20000

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

/* How many allocations of at least this size succeed before the first that fails. */
static long left = -1, failures;
static size_t smallest;

static int fails(size_t size)
{
    if (left < 0 || size < smallest)
        return 0;
    if (left > 0) {
        left--;
        return 0;
    }
    failures++;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size)
{
    return fails(size) ? NULL : __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    return fails(count * size) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size)
{
    return fails(size) ? NULL : __libc_realloc(memory, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    if (fails(size))
        return ENOMEM;
    *memory = __libc_memalign(alignment, size);
    return *memory == NULL ? ENOMEM : 0;
}

static int listener;
static tp_rules *rules;
static struct tp_prefix prefixes[PREFIXES];
static struct tp_rules_config config = { .listeners = &listener, .n_listeners = 1 };
static char script[4 << 20];

static void report(const struct tp_finding *finding, void *context)
{
    (void)finding, (void)context;
}

static int socket_error(void)
{
    return tp_socket(AF_UNIX, SOCK_STREAM, 0);
}

static int connect_error(void)
{
    struct sockaddr_in from = { .sin_family = AF_INET }, to = { .sin_family = AF_INET, .sin_port = 1 };
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_addr.s_addr = inet_addr("192.0.2.1");
    return tp_connect_from((struct sockaddr *)&from, sizeof from, (struct sockaddr *)&to, sizeof to, 0);
}

static int replier(void)
{
    tp_replier *opened;
    struct tp_replier_config many = { .max_sockets = 4096 };
    return tp_replier_open(&many, sizeof many, &opened) == 0 ? (tp_replier_close(opened), 0) : -1;
}

static int install(void)
{
    tp_rules *other;
    config.name = "other";
    int rc = tp_install_rules(&config, sizeof config, &other);
    config.name = NULL;
    if (rc != 0)
        return rc;
    left = -1;
    return tp_remove_rules(other);
}

static int replace(void)
{
    config.name = "child";
    return tp_replace_rules(rules, &config, sizeof config);
}

static int update(void)
{
    return tp_update_rules(rules, TP_SET_BYPASS, prefixes, PREFIXES / 2, NULL, 0);
}

static int render(void)
{
    size_t size = sizeof script;
    return tp_render_rules(&config, sizeof config, TP_FORMAT_NFT, script, &size);
}

static int check(void)
{
    return tp_check(report, NULL) < 0 ? -1 : 0;
}

static int purge(void)
{
    return tp_purge_rules("none");
}

static int descriptors(void)
{
    int open = 0;
    for (int fd = 0; fd < 200; fd++)
        open += fcntl(fd, F_GETFD) >= 0;
    return open;
}

/* In a child, since an abort would be the end of it. Gives how many allocations there were to fail, or -1. */
static long attempt(const char *name, int (*call)(void), size_t size, long number)
{
    fflush(stdout);
    int answer[2];
    if (pipe(answer) != 0)
        exit(2);
    pid_t pid = fork();
    if (pid == 0) {
        /* A handle is its installer's. */
        tp_forget_rules(rules);
        if (tp_install_rules(&(struct tp_rules_config){ .listeners = &listener, .n_listeners = 1, .name = "child" },
                             sizeof config, &rules) != 0)
            _exit(3);
        int before = descriptors();
        smallest = size, left = number;
        errno = 0;
        int rc = call(), error = errno;
        long failed = failures;
        left = -1;
        int wrong = failed == 0 ? 0 : rc != 0 && (error == 0 || *tp_last_error() == 0);
        if (size == LARGE && rc != 0 && failed != 0 && error != ENOMEM)
            wrong = 1;
        if (descriptors() != before)
            wrong = 2;
        if (wrong == 0 && size == LARGE && call() != 0)
            wrong = 3;
        if (wrong != 0)
            printf("%s, allocation %ld: wrong %d, rc %d, errno %d, %s\n", name, number, wrong, rc, error, tp_last_error());
        fflush(stdout);
        if (write(answer[1], &failed, sizeof failed) != sizeof failed)
            _exit(2);
        tp_remove_rules(rules);
        _exit(wrong != 0);
    }
    int status;
    waitpid(pid, &status, 0);
    close(answer[1]);
    long failed = -1;
    if (read(answer[0], &failed, sizeof failed) != sizeof failed)
        failed = -1;
    close(answer[0]);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        printf("%s, allocation %ld: %s %d\n", name, number, WIFSIGNALED(status) ? "signal" : "exit status",
               WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        return -1;
    }
    return failed;
}

static int each(const char *name, int (*call)(void), size_t size)
{
    for (long number = 0;; number++) {
        long failed = attempt(name, call, size, number);
        if (failed < 0)
            return 1;
        if (failed == 0) {
            printf("%s: %ld allocations of at least %zu bytes\n", name, number, size);
            return 0;
        }
    }
}

int main(void)
{
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(4000) };
    listener = tp_listen((struct sockaddr *)&here, sizeof here, -1, 0);
    for (int i = 0; i < PREFIXES; i++)
        prefixes[i] = (struct tp_prefix){ .family = AF_INET, .len = i % 3 == 0 ? 32 : 31, .addr = { 10, i >> 15, i >> 7, i << 1 } };
    config.dst = prefixes, config.n_dst = PREFIXES;
    if (listener < 0 || tp_install_rules(&config, sizeof config, &rules) != 0) {
        puts(tp_last_error());
        return 1;
    }
    int failed = each("tp_socket, an error", socket_error, 0) | each("tp_connect_from, an error", connect_error, 0);
    failed |= each("tp_replier_open", replier, 0);
    failed |= each("tp_install_rules", install, LARGE) | each("tp_replace_rules", replace, LARGE);
    failed |= each("tp_update_rules", update, LARGE) | each("tp_render_rules", render, LARGE);
    failed |= each("tp_check", check, LARGE) | each("tp_purge_rules", purge, LARGE);
    return failed;
}
