/*
 * A program that has more rights than its user: purges all rules, then installs some by iptables and removes them.
 * Prints errno and the sentence of each, "0" on success.
 *
 *     set_user_id [become-root]
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <tproxy.h>

static void report(const char *what, int outcome)
{
    if (outcome == 0)
        printf("%s: 0\n", what);
    else
        printf("%s: %s: %s\n", what, strerrorname_np(errno), tp_last_error());
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "become-root") == 0 && setresuid(0, 0, 0) != 0)
        err(1, "setresuid");
    report("purge", tp_purge_rules(NULL));

    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(3129) };
    struct tp_port_range http = { .first = 80, .last = 80 };
    struct tp_rules_config config = {
        .backend = TP_BACKEND_IPTABLES,
        .listen_addr = (struct sockaddr *)&address,
        .listen_addrlen = sizeof address,
        .ports = &http,
        .n_ports = 1,
    };
    tp_rules *rules;
    int outcome = tp_install_rules(&config, sizeof config, &rules);
    report("install", outcome);
    if (outcome == 0)
        report("remove", tp_remove_rules(rules));
    return 0;
}
