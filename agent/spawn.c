#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loop.h"

#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#define INTO_CGROUP 0x200000000ULL

/* struct clone_args of linux/sched.h (5.7): spelled out, since older headers lack it. */
struct clone_arguments {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

static _Noreturn void fail(struct spawn *s, const char *what)
{
	s->error = errno;
	s->failed = what;
	_exit(127);
}

/* As execvpe(3): the first that can be executed; EACCES is remembered over ENOENT. */
static void execute(struct spawn *s)
{
	static char candidate[PATH_MAX];
	const char *name = s->argv[0];
	if (strchr(name, '/')) {
		execve(name, s->argv, s->envp);
		return;
	}
	int error = ENOENT;
	for (const char *p = s->path; p && *name;) {
		size_t n = strcspn(p, ":");
		if (snprintf(candidate, sizeof candidate, "%.*s/%s", (int)n, n ? p : ".", name) < (int)sizeof candidate) {
			execve(candidate, s->argv, s->envp);
			if (errno != ENOENT && errno != ENOTDIR)
				error = errno;
			if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
				break;
		}
		p = p[n] ? p + n + 1 : NULL;
	}
	errno = error;
}

/*
 * Runs in the child, in the parent's memory and on the parent's stack below its frame, while the parent waits. System calls
 * only: raw ones for the ids, since libc's would try to tell other threads.
 */
static _Noreturn void __attribute__((noinline)) child(struct spawn *s, bool join)
{
	const struct user *u = s->user;
	setsid();
	if (join) {
		int fd = openat(s->cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
		if (fd < 0 || write(fd, "0", 1) < 0)
			fail(s, "cgroup");
	}
	for (int i = 0; i < 3; i++)
		if (dup2(s->fds[i], i) < 0)
			fail(s, "dup2");
	if (s->terminal && ioctl(0, TIOCSCTTY, 0) < 0)
		fail(s, "terminal");
	if (u->uid != geteuid() || u->gid != getegid() || u->group_count > 1) {
		if (syscall(SYS_setgroups, u->group_count, u->groups) < 0 || syscall(SYS_setgid, u->gid) < 0 ||
		    syscall(SYS_setuid, u->uid) < 0)
			fail(s, "user");
	}
	if (s->cwd ? chdir(s->cwd) < 0 : chdir(u->home) < 0 && chdir("/") < 0)
		fail(s, s->cwd);
	loop_unblock_signals();
	execute(s);
	fail(s, s->argv[0]);
}

#if defined(__x86_64__)
static inline long clone3_raw(struct clone_arguments *a)
{
	long r = SYS_clone3;
	__asm__ volatile("syscall" : "+a"(r) : "D"(a), "S"(sizeof *a) : "rcx", "r11", "memory");
	return r;
}
#elif defined(__aarch64__)
static inline long clone3_raw(struct clone_arguments *a)
{
	register long number __asm__("x8") = SYS_clone3;
	register long r __asm__("x0") = (long)a;
	register long size __asm__("x1") = sizeof *a;
	__asm__ volatile("svc 0" : "+r"(r) : "r"(number), "r"(size) : "memory");
	return r;
}
#else
#error "clone3_raw is missing for this architecture"
#endif

/*
 * vfork into a cgroup. Not a libc call: its return in the child would destroy the frame the parent returns through. Nothing
 * is live across the call but what the child only reads; the child's branch never comes back.
 */
static long __attribute__((noinline)) vfork_into(struct spawn *s, struct clone_arguments *a)
{
	long pid = clone3_raw(a);
	if (pid == 0)
		child(s, false);
	return pid;
}

static long __attribute__((noinline)) vfork_plain(struct spawn *s)
{
	pid_t pid = vfork();
	if (pid == 0)
		child(s, s->cgroup >= 0);
	return pid < 0 ? -errno : pid;
}

pid_t spawn(struct spawn *s)
{
	static bool no_clone3;
	long pid = -ENOSYS;
	s->error = 0;
	s->failed = "fork";
	if (s->cgroup >= 0 && !no_clone3) {
		struct clone_arguments a = {
			.flags = CLONE_VM | CLONE_VFORK | INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)s->cgroup,
		};
		pid = vfork_into(s, &a);
		no_clone3 = pid == -ENOSYS || pid == -EINVAL || pid == -E2BIG;
	}
	if (pid == -ENOSYS || pid == -EINVAL || pid == -E2BIG)
		pid = vfork_plain(s);
	if (pid < 0)
		return (pid_t)pid;
	if (!s->error)
		return (pid_t)pid;
	while (waitpid((pid_t)pid, NULL, 0) < 0 && errno == EINTR)
		;
	return -s->error;
}
