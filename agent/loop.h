/* The one loop: file descriptors (epoll), timers, and children that have ended. */
#ifndef POSADA_LOOP_H
#define POSADA_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/types.h>

struct watch {
	int fd;
	uint32_t events; /* what is asked for now; 0: not in the epoll set */
	void (*ready)(struct watch *w, uint32_t events);
};

struct timer {
	int64_t at; /* now_ms() */
	bool armed;
	void (*fire)(struct timer *t);
	struct timer *next;
};

void loop_init(void);
void loop_run(void);
/* In a child that goes on with the parent's loop. */
void loop_forked(void);

void watch_set(struct watch *w, uint32_t events);
/* Takes it out of the set and closes the descriptor. */
void watch_close(struct watch *w);

void timer_set(struct timer *t, int64_t ms);
void timer_clear(struct timer *t);

/* Called with every signal of the loop but SIGCHLD. */
extern void (*loop_signal)(int signal);
/* Called with every child that has ended (status as of waitpid), and, when no child is left at all, with pid 0. */
extern void (*loop_child)(pid_t pid, int status);
/* Called after every turn, before the loop waits. Returns true when there is work that no descriptor will announce. */
extern bool (*loop_idle)(void);

/* Puts signals as a program expects to find them. For children, before exec. */
void loop_unblock_signals(void);
/* Takes in a child that ends now rather than when its signal is read. Used after something that must not wait. */
void loop_reap(void);

#endif
