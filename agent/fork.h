/* fork.prepare, fork.done, and what identity.reset needs of them. */
#ifndef POSADA_FORK_H
#define POSADA_FORK_H

#include <stdbool.h>

/* Everything is stopped (or stopping) for a fork. */
bool fork_waiting(void);

#endif
