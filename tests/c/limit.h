/* Time limits of the C tests. */
#ifndef LIMIT_H
#define LIMIT_H

#include <err.h>
#include <stdlib.h>

/* Returns a time limit in milliseconds, multiplied by the environment variable TPROXY_TEST_TIME_FACTOR (default: 1). */
static inline int limit(int milliseconds)
{
    const char *text = getenv("TPROXY_TEST_TIME_FACTOR");
    double factor = text != NULL ? atof(text) : 1;
    if (factor < 0.1 || factor > 1000)
        errx(2, "TPROXY_TEST_TIME_FACTOR is %s; it must be a number from 0.1 to 1000", text);
    return (int)(milliseconds * factor);
}

#endif
