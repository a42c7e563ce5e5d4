/* Tests each call with failed allocations. The size of an allocation larger than LARGE depends on input from the caller, the
 * kernel or other programs. Each of these allocations fails in turn, with all allocations after it. The call must then fail with
 * ENOMEM or succeed without the memory, leave nothing behind, and work again afterwards. In the error paths of the hot calls,
 * every allocation fails. Needs a network namespace. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "calls.h"

#define LARGE 16384

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

/* Number of allocations of at least `smallest` bytes that succeed before the first that fails. Negative: none fails. */
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

static int update(void)
{
    return tp_update_rules(rules, TP_SET_BYPASS, prefixes, PREFIXES / 2, NULL, 0);
}

static int learn(void)
{
    enum { ADDRESSES = 4000 };
    static struct tp_prefix addrs[ADDRESSES];
    for (unsigned i = 0; i < ADDRESSES; i++)
        addrs[i] = (struct tp_prefix){ .family = AF_INET, .len = 32, .addr = { 192, 0, (uint8_t)(i >> 8), (uint8_t)i } };
    return tp_learn_addresses(rules, TP_SET_BYPASS, addrs, ADDRESSES, 100);
}

/* The rules of a child have another name than those of its parent. */
static int replace_child(void)
{
    config.name = "child";
    return replace();
}

static int descriptors(void)
{
    int open = 0;
    for (int fd = 0; fd < 200; fd++)
        open += fcntl(fd, F_GETFD) >= 0;
    return open;
}

/* Makes the call in a child, because it may abort. Returns the number of failed allocations, or -1. */
static long attempt(const char *name, int (*call)(void), size_t size, long number)
{
    fflush(stdout);
    int result[2];
    if (pipe(result) != 0)
        exit(2);
    pid_t pid = fork();
    if (pid == 0) {
        /* A child cannot use the rules of its parent. */
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
        if (write(result[1], &failed, sizeof failed) != sizeof failed)
            _exit(2);
        tp_remove_rules(rules);
        _exit(wrong != 0);
    }
    int status;
    waitpid(pid, &status, 0);
    close(result[1]);
    long failed = -1;
    if (read(result[0], &failed, sizeof failed) != sizeof failed)
        failed = -1;
    close(result[0]);
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
    if (set_up(PREFIXES) != 0)
        return 1;
    int failed = each("tp_socket, an error", socket_error, 0) | each("tp_connect_from, an error", connect_error, 0);
    failed |= each("tp_replier_open", replier_open, 0);
    failed |= each("tp_install_rules", install, LARGE) | each("tp_replace_rules", replace_child, LARGE);
    failed |= each("tp_update_rules", update, LARGE) | each("tp_render_rules", render, LARGE);
    failed |= each("tp_learn_addresses", learn, LARGE);
    failed |= each("tp_check", check, LARGE) | each("tp_purge_rules", purge, LARGE);
    return failed;
}
