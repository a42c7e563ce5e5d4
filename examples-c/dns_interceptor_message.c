/* Reads DNS messages. Each read is preceded by a check that the message has these bytes. */
#include <string.h>
#include <sys/socket.h>

#include "dns_interceptor.h"

enum { HEADER = 12, LABEL = 63, POINTER = 0xc0, CLASS_IN = 1, TYPE_A = 1, TYPE_AAAA = 28 };

static uint16_t read16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t read32(const uint8_t *at)
{
    return (uint32_t)read16(at) << 16 | read16(at + 2);
}

/* Lower case of an ASCII letter, whatever the locale. */
static uint8_t lower(uint8_t letter)
{
    return letter >= 'A' && letter <= 'Z' ? (uint8_t)(letter + 32) : letter;
}

static bool is_of_host_name(uint8_t letter)
{
    return (letter >= 'a' && letter <= 'z') || (letter >= '0' && letter <= '9') || letter == '-' || letter == '_';
}

bool dns_question(const uint8_t *message, size_t len, bool response, struct dns_question *question)
{
    /* QR is the highest bit; then the opcode, which is 0 for a query. One question. */
    if (len < HEADER || (message[2] & 0xf8) != (response ? 0x80 : 0) || read16(message + 4) != 1)
        return false;
    size_t at = HEADER, text = 0;
    bool host = true;
    for (uint8_t label; at < len && (label = message[at++]) != 0;) {
        /* No pointer: there is no name before this one. The name and the dots between labels have at most 253 letters. */
        if (label > LABEL || label > len - at || text + label + 1 >= DNS_NAME)
            return false;
        if (text > 0)
            question->name[text++] = '.';
        for (; label > 0; label--) {
            uint8_t letter = lower(message[at++]);
            host = host && is_of_host_name(letter);
            question->name[text++] = (char)letter;
        }
    }
    if (message[at - 1] != 0 || len - at < 4)
        return false;
    question->name[host ? text : 0] = 0;
    question->id = read16(message);
    question->len = at + 4 - HEADER;
    memcpy(question->raw, message + HEADER, question->len);
    for (size_t i = 0; i < question->len - 4; i++)
        question->raw[i] = lower(question->raw[i]);
    return true;
}

bool dns_same(const struct dns_question *a, const struct dns_question *b)
{
    return a->id == b->id && a->len == b->len && memcmp(a->raw, b->raw, a->len) == 0;
}

bool dns_is_in(const char *name, const char *domain)
{
    size_t len = strlen(name), tail = strlen(domain);
    if (len < tail || strcmp(name + len - tail, domain) != 0)
        return false;
    return len == tail || name[len - tail - 1] == '.';
}

/* Returns the position after a name, or 0 if the name is malformed. */
static size_t skip_name(const uint8_t *message, size_t len, size_t at)
{
    while (at < len) {
        uint8_t label = message[at];
        if (label >= POINTER)
            return len - at >= 2 ? at + 2 : 0;
        if (label > LABEL || label >= len - at)
            return 0;
        at += 1 + (size_t)label;
        if (label == 0)
            return at;
    }
    return 0;
}

bool dns_addresses(const uint8_t *message, size_t len, dns_address_fn report, void *context)
{
    struct dns_question question;
    /* RCODE 0: no error. */
    if (!dns_question(message, len, true, &question) || (message[3] & 0x0f) != 0)
        return false;
    size_t at = HEADER + question.len;
    for (uint16_t left = read16(message + 6); left > 0; left--) {
        at = skip_name(message, len, at);
        if (at == 0 || len - at < 10)
            return false;
        uint16_t type = read16(message + at), class = read16(message + at + 2), size = read16(message + at + 8);
        uint32_t ttl = read32(message + at + 4);
        at += 10;
        if (size > len - at)
            return false;
        /* A TTL with its highest bit set counts as 0 (RFC 2181, 8). */
        ttl = ttl > INT32_MAX ? 0 : ttl;
        if (class == CLASS_IN && type == TYPE_A && size == 4)
            report(AF_INET, message + at, ttl, context);
        if (class == CLASS_IN && type == TYPE_AAAA && size == 16)
            report(AF_INET6, message + at, ttl, context);
        at += size;
    }
    return true;
}
