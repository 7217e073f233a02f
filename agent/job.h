/* Work that may block: done by a forked copy of the agent, so that the loop goes on. */
#ifndef POSADA_JOB_H
#define POSADA_JOB_H

#include <stdbool.h>
#include <sys/types.h>

/*
 * In the child: do the work, return 0 or a positive errno. In the parent, later: how it ended (-errno if it could not even
 * start; then done has been called already). keep_fd (or -1) stays open in the child, everything else is closed.
 */
struct job {
	int (*work)(void *data);
	void (*done)(void *data, int error);
	void *data;
	int keep_fd;
};

pid_t job_start(const struct job *job);
bool job_reaped(pid_t pid, int status);
bool job_running(void);

#endif
