/* The kernel's command line: posada.* and a few others. */
#ifndef POSADA_CMDLINE_H
#define POSADA_CMDLINE_H

#include <stdbool.h>
#include <stddef.h>

void cmdline_read(void);
/* The value of key= (the last one wins), or `otherwise`. It stays valid. */
const char *cmdline_get(const char *key, const char *otherwise);

#endif
