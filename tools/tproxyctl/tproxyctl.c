/*
 * tproxyctl: libtproxy for the shell.
 *
 *     tproxyctl check                                  reports causes that break transparent proxying, with fixes
 *     tproxyctl install --listen [::]:3129 --port 80   installs rules for a listener in another process
 *
 * tproxyctl(8) documents all commands. The program uses only the public calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "options.h"

static const char help[] =
    "usage: tproxyctl COMMAND [OPTION]...\n"
    "\n"
    "  check                 report causes that break transparent proxying, and the commands that fix them\n"
    "  self-test RULES       send probes through the rules, in a temporary network namespace\n"
    "  install RULES         install rules, and keep them until SIGINT, SIGTERM or SIGHUP\n"
    "  render RULES          print the equivalent script\n"
    "  purge [NAME]          remove the rules of a dead or persistent instance; without NAME, of all of them\n"
    "  stats [NAME]          print the packets and bytes that the rules of an instance counted\n"
    "\n"
    "RULES:\n"
    "  --listen ADDR:PORT    address and port of the listener: [::]:3129, 127.0.0.1:3129; a port alone means [::]\n"
    "  --port PORTS          destination ports to intercept (default: all): 80, 8000-8010, 80,443, udp:53\n"
    "  --bypass-port PORTS   destination ports that are never intercepted\n"
    "  --reject-port PORTS   destination ports that are refused: with a reset, or an ICMP error\n"
    "  --dst, --src PREFIX   destinations and sources to intercept (default: all); may be repeated\n"
    "  --bypass PREFIX       destinations that are never intercepted; may be repeated\n"
    "  --bypass-src PREFIX   sources that are never intercepted; may be repeated\n"
    "  --interface NAME      interface on which forwarded traffic arrives (default: all); a name that ends in\n"
    "                        '*' is a pattern; may be repeated\n"
    "  --bypass-interface NAME  interface whose traffic is never intercepted; may be repeated\n"
    "  --mac, --bypass-mac ADDRESS  Ethernet sources to intercept, or never; may be repeated\n"
    "  --uid, --gid, --cgroup, --bypass-uid, --bypass-gid, --bypass-cgroup\n"
    "                        with --local-output, whose traffic is intercepted, or never: 1000, 1000-1999, PATH\n"
    "  --bypass-mark MARK[/MASK]  SO_MARK of packets of this host that are never intercepted\n"
    "  --tcp --udp           protocols (default: those of the listener, or TCP)\n"
    "  -4 -6                 families (default: those of the listener)\n"
    "  --redirect            intercept by NAT redirection\n"
    "  --divert-only         only deliver packets to existing transparent sockets\n"
    "  --local-output        also intercept traffic that this host sends\n"
    "  --fail-open           forward traffic normally while no listener exists\n"
    "  --allow-direct        accept packets addressed directly to the listener\n"
    "  --notrack             exempt the packets from connection tracking\n"
    "  --persist             keep the rules when tproxyctl ends\n"
    "  --new-only            intercept only TCP packets that begin a connection\n"
    "  --local-servers       deliver replies of servers on this host to the proxy that connected to them\n"
    "  --name NAME --mark MARK[/MASK] --table N --priority N --backend auto|nft|iptables\n"
    "\n"
    "  --json                print JSON\n"
    "  --all                 check, self-test: also print the checks that passed\n"
    "  --format nft|iptables render: the programs that the script calls (default: nft)\n"
    "  --watch[=SECONDS]     stats: repeat (default: every second)\n"
    "  --color WHEN          auto (a terminal, and NO_COLOR is not set), always, never\n"
    "  --help, --version\n"
    "\n"
    "exit status: 0 success, 1 failures were found, 2 invalid command line, 3 a call failed\n";

static struct options options = { .format = TP_FORMAT_NFT, .color = -1 };

/* Prints a JSON string. The library's texts are UTF-8. */
static void print_json(const char *text)
{
    putchar('"');
    for (; *text; ++text) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

/* Prints "key": "text", followed by `suffix`. */
static void print_field(const char *key, const char *text, const char *suffix)
{
    printf("\"%s\": ", key);
    print_json(text);
    fputs(suffix, stdout);
}

/* Prints why the last call failed. */
static int failed(const char *command)
{
    if (options.json) {
        printf("{\"errno\": %d, ", errno);
        print_field("message", tp_last_error(), "}\n");
    } else {
        fprintf(stderr, "tproxyctl %s: %s\n", command, tp_last_error());
    }
    return FAILED;
}

static bool use_color(void)
{
    const char *no_color = secure_getenv("NO_COLOR");
    if (options.color >= 0)
        return options.color;
    return isatty(STDOUT_FILENO) && !(no_color && *no_color);
}

struct report {
    unsigned printed, warnings;
};

/* The names of severities, and their colors (ECMA-48). */
static const char *const severities[] = { "ok", "note", "warning", "failure" };
static const char *const colors[] = { "32", "36", "33", "31" };

static void print_finding(const struct tp_finding *finding, void *context)
{
    struct report *report = context;
    uint32_t severity = finding->severity <= TP_SEVERITY_FAILURE ? finding->severity : TP_SEVERITY_FAILURE;
    report->warnings += severity == TP_SEVERITY_WARNING;
    if (severity == TP_SEVERITY_OK && !options.all)
        return;
    if (options.json) {
        fputs(report->printed++ ? ",\n  {" : "[\n  {", stdout);
        print_field("severity", severities[severity], ", ");
        print_field("id", finding->id, ", ");
        print_field("message", finding->message, ", ");
        print_field("impact", finding->impact, ", ");
        print_field("fix", finding->fix, "}");
        return;
    }
    ++report->printed;
    if (use_color())
        printf("\033[%sm%-7s\033[0m  ", colors[severity], severities[severity]);
    else
        printf("%-7s  ", severities[severity]);
    printf("%s: %s\n", finding->id, finding->message);
    if (severity >= TP_SEVERITY_WARNING)
        printf("         %s\n", finding->impact);
    if (*finding->fix)
        printf("         fix: %s\n", finding->fix);
}

static int end_report(const char *command, const struct report *report, int failures)
{
    if (failures < 0)
        return failed(command);
    if (options.json)
        puts(report->printed ? "\n]" : "[]");
    else
        printf("%d failure%s, %u warning%s\n", failures, failures == 1 ? "" : "s", report->warnings,
               report->warnings == 1 ? "" : "s");
    return failures ? FOUND_FAILURES : FINE;
}

static int check(void)
{
    struct report report = { 0, 0 };
    int failures = tp_check(print_finding, &report);
    return end_report("check", &report, failures);
}

static int self_test(void)
{
    struct report report = { 0, 0 };
    int failures = tp_self_test(&options.config, sizeof options.config, print_finding, &report);
    return end_report("self-test", &report, failures);
}

/* Blocks the signals that end a command, so that the command can wait for them. */
static sigset_t block_end_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return set;
}

static void print_state(const char *state, const char *text)
{
    const char *name = options.config.name ? options.config.name : "tproxy";
    if (options.json) {
        printf("{");
        print_field("name", name, ", ");
        print_field("state", state, "}\n");
    } else {
        printf("%s: %s\n", name, text);
    }
    fflush(stdout);
}

static int install(void)
{
    tp_rules *rules;
    sigset_t set = block_end_signals();
    if (tp_install_rules(&options.config, sizeof options.config, &rules) != 0)
        return failed("install");
    print_state("installed", options.persist ? "installed; the rules remain after this program ends"
                                     : "installed until a signal");
    int signal_number;
    sigwait(&set, &signal_number);
    if (options.persist) {
        /* At the end of the process the kernel keeps the table, without an owner. */
        print_state("persists", "the rules remain; tproxyctl purge removes them");
        return FINE;
    }
    if (tp_remove_rules(rules) != 0)
        return failed("install");
    print_state("removed", "removed");
    return FINE;
}

static int render(void)
{
    size_t len = 0;
    if (tp_render_rules(&options.config, sizeof options.config, options.format, NULL, &len) != 0)
        return failed("render");
    char *script = malloc(len);
    if (!script) {
        fputs("tproxyctl render: out of memory\n", stderr);
        return FAILED;
    }
    int rc = tp_render_rules(&options.config, sizeof options.config, options.format, script, &len);
    if (rc == 0 && options.json) {
        printf("{");
        print_field("script", script, "}\n");
    } else if (rc == 0) {
        fputs(script, stdout);
    }
    free(script);
    return rc == 0 ? FINE : failed("render");
}

static int purge(void)
{
    if (tp_purge_rules(options.argument) != 0)
        return failed("purge");
    if (options.json)
        puts("{\"state\": \"purged\"}");
    return FINE;
}

static void print_stats(const struct tp_rules_stats *stats)
{
    const struct { const char *name; uint64_t packets, bytes; } counts[] = {
        { "intercepted", stats->intercepted_packets, stats->intercepted_bytes },
        { "diverted", stats->diverted_packets, stats->diverted_bytes },
        { "dropped", stats->dropped_packets, stats->dropped_bytes },
        { "direct", stats->direct_packets, stats->direct_bytes },
    };
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; ++i) {
        const char *form = options.json ? "%s\"%s\": {\"packets\": %llu, \"bytes\": %llu}%s" : "%s%-12s %12llu packets %15llu bytes%s";
        printf(form, options.json ? i ? ", " : "{" : "", counts[i].name, (unsigned long long)counts[i].packets,
               (unsigned long long)counts[i].bytes, options.json ? i == 3 ? "}\n" : "" : "\n");
    }
    fflush(stdout);
}

static int stats(void)
{
    sigset_t set = block_end_signals();
    struct timespec pause = { .tv_sec = options.seconds };
    struct tp_rules_stats counted;
    do {
        if (tp_read_stats(options.argument, &counted, sizeof counted) != 0)
            return failed("stats");
        print_stats(&counted);
        if (options.watch && !options.json)
            puts("");
    } while (options.watch && sigtimedwait(&set, NULL, &pause) < 0 && errno == EAGAIN);
    return FINE;
}

/* The commands, and whether they take the name of an instance. */
static const struct command {
    const char *name;
    int (*run)(void);
    bool named;
} commands[] = {
    { "check", check, false }, { "self-test", self_test, false }, { "install", install, false }, { "render", render, false },
    { "purge", purge, true },    { "stats", stats, true },
};

int main(int argc, char **argv)
{
    int option;
    while ((option = getopt_long(argc, argv, "46h", long_options, NULL)) != -1) {
        if (option == 'h') {
            fputs(help, stdout);
            return FINE;
        }
        if (option == VERSION) {
            printf("tproxyctl %s\n", tp_version());
            return FINE;
        }
        set_option(&options, option, optarg);
    }
    if (optind == argc)
        usage_error("no command given");
    const char *name = argv[optind++];
    options.argument = optind < argc ? argv[optind++] : options.config.name;
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; ++i) {
        if (strcmp(commands[i].name, name) != 0)
            continue;
        if (optind < argc || (!commands[i].named && options.argument != options.config.name))
            usage_error("%s: too many arguments", name);
        return commands[i].run();
    }
    usage_error("%s is not a command", name);
}
