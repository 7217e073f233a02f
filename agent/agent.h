/* What the agent knows about itself, and the few doors between its parts. */
#ifndef POSADA_AGENT_H
#define POSADA_AGENT_H

#include "link.h"

#ifndef AGENT_VERSION
#define AGENT_VERSION "0"
#endif

extern bool is_init;            /* PID 1 */
extern bool is_init;          /* fast mode: nobody else will be PID 1 */
extern uint64_t generation;     /* of identity.reset; 0: never forked */
extern uint64_t fork_epoch;     /* raised by every fork.prepare and identity.reset */
extern const char *boot_failed; /* why the root or a folder is not there, or NULL */

void hello_send(struct link *l);
void call_frame(struct link *l, const uint8_t *body, size_t n);

#endif
