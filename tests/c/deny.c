/* Tests examples-c/deny.h: the destinations that the examples refuse, and the addresses that they classify as this host's
 * own. Needs a network namespace with lo up. */
#include <stdio.h>

#include "../../examples-c/deny.h"

static int failed;
static struct sockaddr_storage addr;

static socklen_t parse(const char *text)
{
    struct sockaddr_in *in = (struct sockaddr_in *)&addr;
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&addr;
    memset(&addr, 0, sizeof addr);
    if (inet_pton(AF_INET, text, &in->sin_addr) == 1)
        return in->sin_family = AF_INET, (socklen_t)sizeof *in;
    inet_pton(AF_INET6, text, &in6->sin6_addr);
    in6->sin6_family = AF_INET6;
    return sizeof *in6;
}

static void expect(const struct deny_list *list, int wanted, const char *text)
{
    parse(text);
    if (denied(list, (struct sockaddr *)&addr) != (wanted != 0))
        printf("%s: %s\n", text, wanted ? "is not refused" : "is refused"), failed = 1;
}

int main(void)
{
    struct deny_list list;
    deny_defaults(&list);
    static const char *const refused[] = {
        "127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "::ffff:0.0.0.0", "0.1.2.3", "169.254.169.254",
        "::ffff:169.254.169.254", "fe80::1", "febf::1", "224.0.0.1", "255.255.255.255", "ff02::1", "fd00:ec2::254", "::7f00:1",
        "240.0.0.1", "fd20:ce::254", "100.100.100.200", "::ffff:100.100.100.200", "168.63.129.16", "192.0.0.192",
    };
    static const char *const called[] = { "192.0.2.1", "10.0.0.1", "::ffff:192.0.2.1", "2001:db8::1", "fd00:ec2::253", "223.255.255.255",
                                          "64:ff9b::7f00:1", "169.253.255.255", "169.255.0.0", "fe00::1", "fd20:ce::253", "100.100.100.201", "168.63.129.17", "192.0.0.193" };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        expect(&list, 1, refused[i]);
    for (size_t i = 0; i < sizeof called / sizeof *called; i++)
        expect(&list, 0, called[i]);
    if (!deny_add(&list, "10.9.0.0/15") || !deny_add(&list, "2001:db8:9::/45") || !deny_add(&list, "192.0.2.9"))
        failed = 1;
    expect(&list, 1, "10.8.255.255");
    expect(&list, 1, "::ffff:10.9.0.1");
    expect(&list, 0, "10.10.0.0");
    expect(&list, 1, "2001:db8:f::1");
    expect(&list, 0, "2001:db8:10::1");
    expect(&list, 1, "192.0.2.9");
    expect(&list, 0, "192.0.2.8");
    static const char *const bad[] = { "", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/8x", "10.0.0", "a", "10.0.0.0/-1", "::1/1/1" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (deny_add(&list, bad[i]))
            printf("%s was accepted as a prefix\n", bad[i]), failed = 1;
    if (!deny_add(&list, "none") || list.n != 0)
        failed = 1;
    expect(&list, 0, "127.0.0.1");
    if (!deny_add(&list, "::/0"))
        failed = 1;
    expect(&list, 1, "2001:db8::1");
    expect(&list, 0, "192.0.2.1");
    expect(&list, 0, "::ffff:192.0.2.1");
    static const char *const own[] = { "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1" }, *const others[] = { "192.0.2.1", "2001:db8::1" };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (!is_own_address((struct sockaddr *)&addr, parse(own[i])))
            printf("%s is not this host's own\n", own[i]), failed = 1;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (is_own_address((struct sockaddr *)&addr, parse(others[i])))
            printf("%s is this host's own\n", others[i]), failed = 1;
    return failed;
}
