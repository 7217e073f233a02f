/* Programs the client runs. An exec outlives its stream where `keep` or a fork says so. */
#ifndef POSADA_EXEC_H
#define POSADA_EXEC_H

#include "cgroup.h"
#include "flow.h"

struct exec {
	struct exec *next;
	uint64_t id;
	pid_t pid;
	char name[64]; /* argv[0], cut */
	struct stream *stream;
	struct source out, err;
	struct sink in;
	int pty; /* master, or -1 */
	bool keep;
	bool orphaned; /* lost its link while a fork was prepared: to be hung up if it turns out that this is the source */
	bool ended;
	bool checking; /* exec_check is to wait until both sources were pumped */
	int status; /* of waitpid */
	int64_t started, ms;
	struct timer killer; /* from SIGHUP to SIGKILL */
	struct timer grace;  /* it has ended, and a grandchild holds its pipes */
	struct cgroup cgroup;
};

/* loop_child's part: true when the pid was an exec's. */
bool exec_reaped(pid_t pid, int status);
void execs_list(struct cbor_out *o);
/* The fork is over: on the source what lost its link meanwhile is hung up; in a child it is kept. */
void execs_unfork(bool source);
/* Sends a signal to every exec's group that is not ended. */
void execs_signal(int signal);

#endif
