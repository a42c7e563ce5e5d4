/* Tests that a panic in each call becomes -1 and ENOTRECOVERABLE, and that nothing is printed. The library must be built with
 * --cfg=tproxy_panics: a call then panics if errno is MAGIC. Prints the names of the calls. */
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <tproxy.h>

#define MAGIC 0x7470

#define PANICS(name, call) \
    do { \
        errno = MAGIC; \
        long rc = (long)(call); \
        if (rc != -1 || errno != ENOTRECOVERABLE || strstr(tp_last_error(), "panic") == NULL) { \
            printf("%s: %ld, errno %d, %s\n", name, rc, errno, tp_last_error()); \
            return 1; \
        } \
        puts(name); \
    } while (0)

static void report(const struct tp_finding *finding, void *context)
{
    (void)finding, (void)context;
}

int main(void)
{
    struct sockaddr_in addr = { .sin_family = AF_INET };
    struct sockaddr *sa = (struct sockaddr *)&addr;
    socklen_t len = sizeof addr;
    struct msghdr msg = { 0 };
    struct tp_datagram datagram = { 0 };
    struct tp_rules_config config = { 0 };
    struct tp_rules_stats stats;
    struct tp_replier_stats counts;
    tp_rules *rules;
    tp_replier *replier, *real;
    size_t size = 0;
    PANICS("tp_socket", tp_socket(AF_INET, SOCK_STREAM, 0));
    PANICS("tp_set_transparent", tp_set_transparent(0));
    PANICS("tp_bind_nonlocal", tp_bind_nonlocal(0, sa, len));
    PANICS("tp_listen", tp_listen(sa, len, 1, 0));
    PANICS("tp_connect_from", tp_connect_from(sa, len, sa, len, 0));
    PANICS("tp_connect_socket", tp_connect_socket(0, sa, len, sa, len, 0));
    PANICS("tp_accept", tp_accept(0, sa, &len, sa, &len, 0));
    PANICS("tp_unmap_addr", tp_unmap_addr(sa, &len));
    PANICS("tp_orig_dst", tp_orig_dst(0, sa, &len));
    PANICS("tp_recvfrom", tp_recvfrom(0, &size, 1, 0, NULL, NULL, NULL, NULL));
    PANICS("tp_msg_orig_dst", tp_msg_orig_dst(&msg, sa, &len));
    PANICS("tp_recv_datagrams", tp_recv_datagrams(0, &datagram, 1, 0));
    PANICS("tp_replier_open", tp_replier_open(NULL, 0, &replier));
    errno = 0;
    if (tp_replier_open(NULL, 0, &real) != 0)
        return 1;
    PANICS("tp_reply", tp_reply(real, &datagram, 1));
    PANICS("tp_replier_stats", tp_replier_stats(real, &counts, sizeof counts));
    PANICS("tp_install_rules", tp_install_rules(&config, sizeof config, &rules));
    PANICS("tp_remove_rules", tp_remove_rules(NULL));
    PANICS("tp_replace_rules", tp_replace_rules(NULL, &config, sizeof config));
    PANICS("tp_purge_rules", tp_purge_rules(NULL));
    PANICS("tp_update_rules", tp_update_rules(NULL, TP_SET_DST, NULL, 0, NULL, 0));
    PANICS("tp_list_rules", tp_list_rules(NULL, NULL));
    PANICS("tp_verify_rules", tp_verify_rules(NULL, 0));
    PANICS("tp_learn_addresses", tp_learn_addresses(NULL, TP_SET_DST, NULL, 0, 1));
    PANICS("tp_rules_stats", tp_rules_stats(NULL, &stats, sizeof stats));
    PANICS("tp_read_stats", tp_read_stats(NULL, &stats, sizeof stats));
    PANICS("tp_render_rules", tp_render_rules(&config, sizeof config, TP_FORMAT_NFT, NULL, &size));
    PANICS("tp_check", tp_check(report, NULL));
    PANICS("tp_self_test", tp_self_test(&config, sizeof config, report, NULL));
    /* These calls return no value, and must not end the program. */
    errno = MAGIC;
    tp_forget_rules(NULL);
    puts("tp_forget_rules");
    errno = MAGIC;
    tp_replier_close(NULL);
    puts("tp_replier_close");
    /* These calls run no code that could panic. */
    puts(tp_version() != NULL ? "tp_version" : "");
    puts(tp_last_error() != NULL ? "tp_last_error" : "");
    return 0;
}
