#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define BATCH 32

/* systemd's way to ask PID 1 for a power-off and a reboot: SIGRTMIN+4 and +5, where glibc's SIGRTMIN is 34. */
static const int signals[] = {SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGPWR, 34 + 4, 34 + 5};

static int epoll_fd = -1;
static struct epoll_event batch[BATCH];
static int batch_size;
static struct timer *timers;
static struct watch signal_watch;

void (*loop_signal)(int);
void (*loop_child)(pid_t, int);
bool (*loop_idle)(void);

void watch_set(struct watch *w, uint32_t events)
{
	if (events == w->events)
		return;
	struct epoll_event e = {.events = events, .data.ptr = w};
	int op = !w->events ? EPOLL_CTL_ADD : events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL;
	epoll_ctl(epoll_fd, op, w->fd, &e);
	w->events = events;
	if (events)
		return;
	/* What was announced in this turn already must not reach a watch that has left. */
	for (int i = 0; i < batch_size; i++)
		if (batch[i].data.ptr == w)
			batch[i].data.ptr = NULL;
}

void watch_close(struct watch *w)
{
	if (w->fd < 0)
		return;
	watch_set(w, 0);
	close(w->fd);
	w->fd = -1;
}

void timer_set(struct timer *t, int64_t ms)
{
	timer_clear(t);
	t->at = now_ms() + ms;
	t->armed = true;
	t->next = timers;
	timers = t;
}

void timer_clear(struct timer *t)
{
	if (!t->armed)
		return;
	struct timer **p = &timers;
	while (*p != t)
		p = &(*p)->next;
	*p = t->next;
	t->armed = false;
}

/* Fires what is due. One at a time from the start again, since a timer may clear others. */
static void fire_timers(void)
{
	int64_t now = timers ? now_ms() : 0;
	for (struct timer *t = timers; t;) {
		if (t->at > now) {
			t = t->next;
			continue;
		}
		timer_clear(t);
		t->fire(t);
		t = timers;
	}
}

static int next_timeout(void)
{
	if (!timers)
		return -1;
	int64_t first = INT64_MAX;
	for (struct timer *t = timers; t; t = t->next)
		if (t->at < first)
			first = t->at;
	int64_t wait = first - now_ms();
	return wait < 0 ? 0 : wait > 60000 ? 60000 : (int)wait;
}

void loop_reap(void)
{
	for (;;) {
		int status;
		pid_t pid = waitpid(-1, &status, WNOHANG);
		if (pid > 0) {
			loop_child(pid, status);
			continue;
		}
		if (pid < 0 && errno == ECHILD)
			loop_child(0, 0);
		return;
	}
}

static void signals_ready(struct watch *w, uint32_t events)
{
	(void)events;
	struct signalfd_siginfo info[8];
	ssize_t n = read(w->fd, info, sizeof info);
	bool children = false;
	for (ssize_t i = 0; i < n / (ssize_t)sizeof info[0]; i++) {
		if (info[i].ssi_signo == SIGCHLD)
			children = true;
		else if (loop_signal)
			loop_signal((int)info[i].ssi_signo);
	}
	if (children)
		loop_reap();
}

static sigset_t wanted_signals(void)
{
	sigset_t set;
	sigemptyset(&set);
	for (size_t i = 0; i < COUNT(signals); i++)
		sigaddset(&set, signals[i]);
	return set;
}

/* A signalfd in an epoll set tells of the signals of the process that put it there: so a fork needs its own. */
void loop_forked(void)
{
	sigset_t set = wanted_signals();
	watch_close(&signal_watch);
	signal_watch = (struct watch){.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), .ready = signals_ready};
	watch_set(&signal_watch, EPOLLIN);
}

/* What the starter ignored would stay ignored in every program. By system call: libc keeps 32 to 34 for itself. */
static void heed_signals(void)
{
	for (int signo = 1; signo < 65; signo++) {
		unsigned long action[4] = {0}; /* the kernel's struct sigaction: handler, flags, restorer, mask */
		if (syscall(SYS_rt_sigaction, signo, NULL, action, sizeof action[3]) || action[0] != (unsigned long)SIG_IGN)
			continue;
		action[0] = (unsigned long)SIG_DFL;
		syscall(SYS_rt_sigaction, signo, action, NULL, sizeof action[3]);
	}
}

void loop_init(void)
{
	sigset_t set = wanted_signals();
	heed_signals();
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	/* SIGPIPE is blocked rather than ignored: an ignored signal would be inherited by what is executed. */
	sigaddset(&set, SIGPIPE);
	sigprocmask(SIG_SETMASK, &set, NULL);
	signal_watch.fd = -1;
	loop_forked();
}

void loop_unblock_signals(void)
{
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

void loop_run(void)
{
	for (;;) {
		bool more = loop_idle && loop_idle();
		int n = epoll_wait(epoll_fd, batch, BATCH, more ? 0 : next_timeout());
		batch_size = n < 0 ? 0 : n;
		for (int i = 0; i < batch_size; i++) {
			struct watch *w = batch[i].data.ptr;
			if (w)
				w->ready(w, batch[i].events);
		}
		batch_size = 0;
		fire_timers();
	}
}
