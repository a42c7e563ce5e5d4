/* The parts of lifecycle share these functions and variables. */
#ifndef LIFECYCLE_H
#define LIFECYCLE_H

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <tproxy.h>
#include <unistd.h>

struct scenario {
    const char *name;
    void (*run)(void);
};

/* Each array ends with a NULL name. */
extern const struct scenario process_scenarios[], namespace_scenarios[], descriptor_scenarios[];

/* Sockets for TCP and UDP, on [::] and one port. */
extern int listener, receiver;
extern in_port_t port;
extern uint32_t backend;
extern tp_rules *rules;
extern char **arguments;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            printf("line %d: %s; errno %d (%s), last error: %s\n", __LINE__, #condition, errno, strerror(errno), tp_last_error()); \
            fflush(stdout); \
            _exit(1); \
        } \
    } while (0)

/* Checks that the call fails with this errno, and with a message that contains these words. */
#define FAILS_SAYING(expected, words, call) \
    do { \
        errno = 0; \
        CHECK((call) == -1 && errno == (expected) && strstr(tp_last_error(), (words)) != NULL); \
    } while (0)
#define FAILS(expected, call) FAILS_SAYING(expected, " ", call)

/* lifecycle.c */
void wait_for_line(void);
void listen_on_port(void);
int stats(void);
int read_stats(void);
int replace(void);
int update(void);
int learn(void);
void install(void);
int install_again(void);
void all_calls_work(void);
void serve_in_background(void);
void stop_serving(void);
void serve_first(void);
void done(void);
pid_t forked(void);
void in_child(void (*body)(void));
int wait_for_end_of_installer(void);
int descriptors(void);
void say(const char *word);
struct sockaddr_in6 any_address(void);

#endif
