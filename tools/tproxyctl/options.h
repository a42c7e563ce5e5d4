/*
 * Converts the command line of tproxyctl to a struct tp_rules_config.
 */
#ifndef TPROXYCTL_OPTIONS_H
#define TPROXYCTL_OPTIONS_H

#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include <tproxy.h>

enum exit_code { FINE = 0, FOUND_FAILURES = 1, USAGE = 2, FAILED = 3 };

struct options {
    bool json, all, persist, watch;
    unsigned seconds;
    uint32_t format;
    int color;                                /* 1: on; 0: off; -1: on if standard output is a terminal */
    const char *argument;                     /* the word after the command, or NULL */
    struct tp_rules_config config;
    struct sockaddr_storage listen;
};

/* Values that getopt_long returns for options without a letter. */
enum { NAME = 256, LISTEN, PORT, DST, SRC, BYPASS, INTERFACE, BYPASS_PORT, REJECT_PORT,
       BYPASS_SRC, BYPASS_INTERFACE, MAC, BYPASS_MAC, UID, BYPASS_UID, GID, BYPASS_GID, CGROUP, BYPASS_CGROUP, BYPASS_MARK, MARK, TABLE, PRIORITY, TCP, UDP, BACKEND, REDIRECT,
       DIVERT_ONLY, LOCAL_OUTPUT, FAIL_OPEN, ALLOW_DIRECT, NOTRACK, PERSIST, NEW_ONLY, LOCAL_SERVERS, FORMAT, JSON, ALL, WATCH, COLOR, VERSION };

/* The options, for getopt_long. */
extern const struct option long_options[];

/* Applies one option. An invalid value ends the program. */
void set_option(struct options *options, int option, char *value);

__attribute__((noreturn, format(printf, 1, 2))) void usage_error(const char *format, ...);

#endif
