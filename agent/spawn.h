/* Starting a program, as cheaply as Linux can: the child borrows the agent's memory until it has executed. */
#ifndef POSADA_SPAWN_H
#define POSADA_SPAWN_H

#include <stdbool.h>
#include <sys/types.h>

#include "user.h"

struct spawn {
	char *const *argv;
	char *const *envp;
	const char *path;      /* where argv[0] is looked for, when it has no slash */
	const char *cwd;       /* NULL: the user's home, or / */
	const struct user *user;
	int fds[3];            /* become 0, 1, 2 */
	bool terminal;         /* fds[0] becomes the controlling terminal */
	int cgroup;            /* directory of the cgroup to be born in, or -1 */
	int error;             /* out: errno of what failed */
	const char *failed;    /* out: what failed */
};

/* Returns the pid, in a session and process group of its own; or -errno with ->failed set. Returns when exec has happened. */
pid_t spawn(struct spawn *s);

#endif
