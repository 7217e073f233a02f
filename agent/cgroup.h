/* cgroup v2: every exec in a group of its own below /sys/fs/cgroup/posada, and the freezer. */
#ifndef POSADA_CGROUP_H
#define POSADA_CGROUP_H

#include <stdbool.h>

struct cgroup {
	int fd; /* its directory, or -1 where there are no cgroups */
	unsigned number;
};

/* Makes posada/, and the agent's own group. Does nothing without cgroup v2. */
void cgroups_init(void);
/* A group with nothing in it. */
struct cgroup cgroup_take(void);
/* Its first process has ended; the group is used again or removed once it is empty. */
void cgroup_give(struct cgroup *c);

/* Stops everything but the agent. 0: everything has stopped; -EAGAIN: ask again; else -errno and nothing is stopped. */
int cgroups_freeze(void);
int cgroups_frozen(void);
void cgroups_thaw(void);

#endif
