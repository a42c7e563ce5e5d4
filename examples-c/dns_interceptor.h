/*
 * DNS messages (RFC 1035), as far as dns_interceptor needs them. Every byte of a message may come from an attacker.
 */
#ifndef DNS_INTERCEPTOR_H
#define DNS_INTERCEPTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Maximum length of a name as text, with its NUL (RFC 1035, 2.3.4), and of a question: name, type and class. */
enum { DNS_NAME = 254, DNS_QUESTION = 255 + 4 };

struct dns_question {
    uint16_t id;
    size_t len;                    /* of raw */
    uint8_t raw[DNS_QUESTION];     /* the question as it is in the message, in lower case */
    char name[DNS_NAME];           /* in lower case, without a dot at its end; "" if it is not the name of a host */
};

/*
 * Reads the question of a query or of a response. False: the message is malformed, or does not have exactly one
 * question. Names of hosts consist of letters, digits, '-' and '_': a dot within a label would make a name look like one
 * of another domain.
 */
bool dns_question(const uint8_t *message, size_t len, bool response, struct dns_question *question);

/* Whether a response belongs to a query: the same ID and the same question. */
bool dns_same(const struct dns_question *a, const struct dns_question *b);

/* Whether a name is a domain or a subdomain of it. */
bool dns_is_in(const char *name, const char *domain);

/* Called for each address in the answer of a response: family is AF_INET or AF_INET6, ttl in seconds. */
typedef void (*dns_address_fn)(int family, const uint8_t *addr, uint32_t ttl, void *context);

/*
 * Reads the A and AAAA records in the answer of a successful response. False: the message is malformed; the addresses
 * before that place were reported.
 *
 * The owners of records are not compared with the question: they may be aliases (CNAME), and the server that answers for
 * a domain chooses its addresses in any case. Pointers in names are therefore skipped and never followed.
 */
bool dns_addresses(const uint8_t *message, size_t len, dns_address_fn report, void *context);

#endif
