/* CALLs: short requests, each a function in a table. */
#ifndef POSADA_CALLS_H
#define POSADA_CALLS_H

#include "cbor.h"
#include "link.h"

/* Where an answer goes. It outlives the link: call_done finds out whether anybody still waits. */
struct reply_to {
	uint64_t session, id;
};

struct call {
	struct reply_to to;
	struct cbor args;
	struct cbor_out *ok; /* for one map; nothing written stands for {} */
	const char *problem; /* out: text of an error; NULL: that of errno */
};

#define CALL_LATER 1 /* the answer comes by call_done or call_failed */

/* Returns 0, -errno or CALL_LATER. */
typedef int call_function(struct call *c);

call_function call_stat, call_list, call_mkdir, call_remove, call_rename, call_chmod, call_chown, call_symlink; /* fscalls.c */
call_function call_metrics;                                                                                      /* metrics.c */
call_function call_sync, call_freeze, call_thaw, call_disk_grow;                                                 /* disks.c */
call_function call_fork_prepare, call_fork_done;                                                                 /* fork.c */
call_function call_identity_reset;                                                                               /* identity.c */
call_function call_poweroff, call_reboot;                                                                        /* power.c */
call_function call_time_set;                                                                                     /* calls.c */

void call_done(struct reply_to to);
/* error: positive errno or 0. */
void call_failed(struct reply_to to, const char *problem, int error);
/* An answer with a map: begin gives the writer behind {"id", "ok"}, send ends it. Returns NULL if nobody waits. */
struct link *call_begin(struct reply_to to, struct cbor_out *o);

/* A path argument: non-empty, no NUL. Returns 0 or -EINVAL with problem set. */
int call_path(struct call *c, const char *key, char *out, size_t cap);

#endif
