/*
 * A library without the features check, self-test and iptables: what is left out fails with EOPNOTSUPP and a sentence, and
 * the rest works.
 *
 * The network has lo up and a route to 192.0.2.0/24.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <tproxy.h>

static int failures;

static void expect(int right, const char *what)
{
    if (!right) {
        printf("%s: errno %d, \"%s\"\n", what, errno, tp_last_error());
        failures++;
    }
}

/* The call has returned rc. */
static void lacks(const char *feature, int rc, const char *call)
{
    char sentence[128];
    snprintf(sentence, sizeof sentence, "this build of libtproxy lacks feature `%s`: ", feature);
    expect(rc == -1 && errno == EOPNOTSUPP && strstr(tp_last_error(), sentence) != NULL, call);
}

static void found(const struct tp_finding *finding, void *context)
{
    (void)finding;
    ++*(int *)context;
}

static void left_out_calls_are_eopnotsupp(const struct tp_rules_config *config)
{
    struct tp_rules_config by_iptables = *config;
    int findings = 0;
    char script[16] = "unchanged";
    size_t size = sizeof script;
    tp_rules *rules = NULL;
    by_iptables.backend = TP_BACKEND_IPTABLES;
    lacks("check", tp_check(found, &findings), "tp_check");
    lacks("self-test", tp_self_test(config, sizeof *config, found, &findings), "tp_self_test");
    expect(findings == 0, "no finding is reported");
    lacks("iptables", tp_install_rules(&by_iptables, sizeof by_iptables, &rules), "tp_install_rules");
    lacks("iptables", tp_render_rules(config, sizeof *config, TP_FORMAT_IPTABLES, script, &size), "tp_render_rules");
    expect(rules == NULL && size == sizeof script && strcmp(script, "unchanged") == 0, "outputs are unchanged");
}

static void rest_works(const struct tp_rules_config *config)
{
    char script[8192];
    size_t size = sizeof script;
    expect(tp_render_rules(config, sizeof *config, TP_FORMAT_NFT, script, &size) == 0 && strstr(script, "nft -f") != NULL,
           "tp_render_rules");

    tp_rules *rules = NULL;
    expect(tp_install_rules(config, sizeof *config, &rules) == 0, "tp_install_rules");
    int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(80) }, wanted;
    socklen_t len = sizeof wanted;
    inet_pton(AF_INET, "192.0.2.1", &server.sin_addr);
    expect(connect(client, (struct sockaddr *)&server, sizeof server) == 0, "connect");
    int accepted = accept(config->listeners[0], NULL, NULL);
    expect(tp_orig_dst(accepted, (struct sockaddr *)&wanted, &len) == 0 && wanted.sin_port == server.sin_port &&
               wanted.sin_addr.s_addr == server.sin_addr.s_addr,
           "tp_orig_dst");

    struct tp_rules_stats stats = { 0 }, read = { 0 };
    expect(tp_rules_stats(rules, &stats, sizeof stats) == 0 && stats.intercepted_packets > 0, "tp_rules_stats");
    expect(tp_read_stats(NULL, &read, sizeof read) == 0 && read.intercepted_packets > 0, "tp_read_stats");
    struct tp_rules_config replaced = *config;
    const struct tp_port_range ports[] = { { .first = 81, .last = 82 } };
    replaced.ports = ports, replaced.n_ports = 1;
    expect(tp_replace_rules(rules, &replaced, sizeof replaced) == 0, "tp_replace_rules");
    expect(tp_purge_rules("another") == 0, "tp_purge_rules");
    expect(tp_remove_rules(rules) == 0, "tp_remove_rules");
    expect(tp_purge_rules(NULL) == 0, "tp_purge_rules of all");
    close(accepted);
    close(client);
}

/* Without nf_tables TP_BACKEND_AUTO would install rules by iptables. */
static void auto_without_nf_tables_does_not_try_iptables(const struct tp_rules_config *config)
{
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_execve, 6, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_socket, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ, AF_NETLINK, 0, 2),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | BPF_JEQ, NETLINK_NETFILTER, 2, 0),
        BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET, SECCOMP_RET_ERRNO | EPROTONOSUPPORT),
    };
    struct sock_fprog filter = { .len = sizeof program / sizeof program[0], .filter = program };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0)
        err(1, "seccomp");
    tp_rules *rules = NULL;
    expect(tp_install_rules(config, sizeof *config, &rules) == -1 && errno == EOPNOTSUPP && rules == NULL &&
               strstr(tp_last_error(), "CONFIG_NF_TABLES") != NULL && strstr(tp_last_error(), "iptables") == NULL,
           "tp_install_rules without nf_tables");
}

int main(void)
{
    struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(3129) };
    int listener = tp_listen((struct sockaddr *)&any, sizeof any, -1, 0);
    if (listener < 0)
        errx(1, "%s", tp_last_error());
    const struct tp_port_range http[] = { { .first = 80, .last = 80 } };
    struct tp_rules_config config = {
        .listeners = &listener, .n_listeners = 1, .ports = http, .n_ports = 1, .flags = TP_RULES_LOCAL_OUTPUT,
    };
    left_out_calls_are_eopnotsupp(&config);
    rest_works(&config);
    auto_without_nf_tables_does_not_try_iptables(&config);
    return failures != 0;
}
