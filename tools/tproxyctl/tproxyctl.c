/*
 * tproxyctl: what libtproxy does, from a shell.
 *
 *     tproxyctl check                                  what breaks transparent proxying here, and what fixes it
 *     tproxyctl install --listen [::]:3129 --port 80   rules for a listener in another process, until a signal
 *
 * tproxyctl(8) has the rest. It uses the public calls alone.
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
    "  check                 what on this host breaks transparent proxying, and what fixes it\n"
    "  self-test RULES       send probes through rules, in a network that exists meanwhile\n"
    "  install RULES         install rules, and hold them until SIGINT, SIGTERM or SIGHUP\n"
    "  render RULES          show the script that would do the same\n"
    "  purge [NAME]          remove what a dead or persistent instance left; all of them without a name\n"
    "  stats [NAME]          what the rules of an instance have done\n"
    "\n"
    "RULES:\n"
    "  --listen ADDR:PORT    where the packets go: [::]:3129, 127.0.0.1:3129; a port alone is [::]\n"
    "  --port PORT[-PORT]    destination ports to intercept (all); again, or with commas, for more\n"
    "  --dst, --src PREFIX   destinations and sources to intercept (all); again for more\n"
    "  --bypass PREFIX       destinations never to intercept; again for more\n"
    "  --interface NAME      where forwarded traffic comes in (everywhere); again for more\n"
    "  --tcp --udp -4 -6     protocols (TCP) and families (the listener's)\n"
    "  --redirect --divert-only --local-output --fail-open --allow-direct --notrack --persist\n"
    "                        as the flags TP_RULES_... of tproxy.h\n"
    "  --name NAME --mark MARK[/MASK] --table N --priority N --backend auto|nft|iptables\n"
    "\n"
    "  --json                output for programs: JSON, an object or a list a line\n"
    "  --all                 check, self-test: what is as it should be, too\n"
    "  --format nft|iptables render: the script's commands (nft)\n"
    "  --watch[=SECONDS]     stats: again and again (every second)\n"
    "  --color WHEN          auto (a terminal, and NO_COLOR is not set), always, never\n"
    "  --help, --version\n"
    "\n"
    "exit status: 0 fine, 1 failures were found, 2 usage, 3 a call failed\n";

static struct options options = { .format = TP_FORMAT_NFT, .colour = -1 };

/* A JSON string. The library's texts are UTF-8. */
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

/* "key": "text", and what comes behind. */
static void print_field(const char *key, const char *text, const char *behind)
{
    printf("\"%s\": ", key);
    print_json(text);
    fputs(behind, stdout);
}

/* Says why the last call failed. */
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

static bool coloured(void)
{
    const char *no_color = secure_getenv("NO_COLOR");
    if (options.colour >= 0)
        return options.colour;
    return isatty(STDOUT_FILENO) && !(no_color && *no_color);
}

struct report {
    unsigned printed, warnings;
};

/* The names of severities, and their colours (ECMA-48). */
static const char *const severities[] = { "ok", "note", "warning", "failure" };
static const char *const colours[] = { "32", "36", "33", "31" };

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
    if (coloured())
        printf("\033[%sm%-7s\033[0m  ", colours[severity], severities[severity]);
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

/* Signals that end what goes on until then: blocked, to be waited for. */
static sigset_t ends(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return set;
}

static void say(const char *state, const char *words)
{
    const char *name = options.config.name ? options.config.name : "tproxy";
    if (options.json) {
        printf("{");
        print_field("name", name, ", ");
        print_field("state", state, "}\n");
    } else {
        printf("%s: %s\n", name, words);
    }
    fflush(stdout);
}

static int install(void)
{
    tp_rules *rules;
    sigset_t set = ends();
    if (tp_install_rules(&options.config, sizeof options.config, &rules) != 0)
        return failed("install");
    say("installed", options.persist ? "installed; a signal ends this program, and the rules stay"
                                     : "installed, until a signal");
    int signal_number;
    sigwait(&set, &signal_number);
    if (options.persist) {
        /* The end of the process leaves them without an owner, in force. */
        say("persists", "the rules stay; tproxyctl purge removes them");
        return FINE;
    }
    if (tp_remove_rules(rules) != 0)
        return failed("install");
    say("removed", "removed");
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
    sigset_t set = ends();
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

/* The commands, and whether they take a name. */
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
        usage_error("which command?");
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
