/* Links and runs as C and as C++, against the shared and the static library. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <tproxy.h>

int main(void)
{
    struct tp_rules_config config;
    memset(&config, 0, sizeof config);
    tp_rules *rules = NULL;
    if (tp_version()[0] == '\0' || tp_last_error()[0] != '\0')
        return 1;
    /* No listeners: refused before anything is touched. */
    if (tp_install_rules(&config, sizeof config, &rules) != -1 || errno != EINVAL || rules != NULL)
        return 2;
    if (strstr(tp_last_error(), "no listeners") == NULL)
        return 3;
    char version[40];
    snprintf(version, sizeof version, "%d.%d.%d", TP_VERSION_MAJOR, TP_VERSION_MINOR, TP_VERSION_PATCH);
    if (strcmp(version, tp_version()) != 0)
        return 4;
    puts(tp_version());
    return 0;
}
