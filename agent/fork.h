/*
 * Everything but the agent stopped, for a fork.
 *
 *   IDLE ──fork.prepare──▶ STOPPING ──all stopped──▶ STOPPED ──fork.done, 30 s, identity.reset──▶ IDLE
 *    ▲                         │ 5 s, error
 *    └─────────────────────────┘
 */
#ifndef POSADA_FORK_H
#define POSADA_FORK_H

#include <stdbool.h>

#include "cbor.h"

/* Processes are stopped or stopping: links that are lost now hang nothing up, and nothing may be started. */
bool fork_waiting(void);

/* For identity.reset. Stops everything if it is not stopped yet (a fork of a snapshot), and forgets the 30 seconds. */
void fork_hold(void (*then)(int error));
/* The token given (or none) is that of the prepared fork (or none is prepared). */
bool fork_token_is(const struct cbor *token);
/* Goes on. source: it is the one that was forked, and not the fork. */
void fork_release(bool source);

#endif
