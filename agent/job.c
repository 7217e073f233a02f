#include "job.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loop.h"
#include "util.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

struct running {
	struct running *next;
	pid_t pid;
	struct job job;
};

static struct running *jobs;

static void close_between(unsigned first, unsigned last)
{
	if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
		return;
	for (unsigned fd = first; fd <= last && fd < 1024; fd++) /* before Linux 5.9 */
		close((int)fd);
}

pid_t job_start(const struct job *job)
{
	pid_t pid = fork();
	if (pid == 0) {
		unsigned kept = job->keep_fd < 3 ? 2 : (unsigned)job->keep_fd;
		close_between(3, kept - 1);
		close_between(kept + 1, ~0U);
		loop_unblock_signals();
		_exit(job->work(job->data) & 0xff);
	}
	if (pid < 0) {
		job->done(job->data, errno);
		return -1;
	}
	struct running *r = xcalloc(1, sizeof *r);
	*r = (struct running){.next = jobs, .pid = pid, .job = *job};
	jobs = r;
	return pid;
}

bool job_reaped(pid_t pid, int status)
{
	for (struct running **p = &jobs; *p; p = &(*p)->next) {
		struct running *r = *p;
		if (r->pid != pid)
			continue;
		*p = r->next;
		r->job.done(r->job.data, WIFEXITED(status) ? WEXITSTATUS(status) : EINTR);
		free(r);
		return true;
	}
	return false;
}

bool job_running(void)
{
	return jobs != NULL;
}
