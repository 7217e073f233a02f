#include "fork.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

#include "agent.h"
#include "calls.h"
#include "cgroup.h"
#include "exec.h"
#include "loop.h"
#include "util.h"

#define UNDO_MS 30000
#define STOP_MS 5000 /* a process that is stuck in the kernel for longer cannot be forked with */

static enum { IDLE, STOPPING, STOPPED } state;
static uint8_t token[64];
static size_t token_size;
static struct timer retry, undo;
static int64_t stop_until, pause_ms;
static void (*after_stop)(int error);
static struct reply_to waiting;

bool fork_waiting(void)
{
	return state != IDLE;
}

/* Off a guest there is no group to freeze: what the agent has started itself stands for everything. */
static int stop_all(void)
{
	if (!*test_root)
		return cgroups_freeze();
	execs_signal(SIGSTOP);
	return 0;
}

static void go_on_all(void)
{
	if (*test_root)
		execs_signal(SIGCONT);
	else
		cgroups_thaw();
}

static void stopped(int error)
{
	timer_clear(&retry);
	if (error) {
		go_on_all();
		state = IDLE;
		execs_unfork(true);
	} else {
		state = STOPPED;
	}
	after_stop(error);
}

/* The kernel says `frozen` within a millisecond or two; its notification may be ten milliseconds late, so it is asked. */
static void look_again(struct timer *t)
{
	int r = cgroups_frozen();
	if (r != -EAGAIN) {
		stopped(-r);
	} else if (now_ms() > stop_until) {
		stopped(EBUSY);
	} else {
		pause_ms = pause_ms < 16 ? pause_ms * 2 : 16;
		timer_set(t, pause_ms);
	}
}

static void stop(void (*then)(int error))
{
	after_stop = then;
	state = STOPPING;
	int r = stop_all();
	if (r != -EAGAIN) {
		stopped(-r);
		return;
	}
	stop_until = now_ms() + STOP_MS;
	pause_ms = 1;
	retry.fire = look_again;
	timer_set(&retry, pause_ms);
}

void fork_release(bool source)
{
	timer_clear(&undo);
	state = IDLE;
	token_size = 0;
	execs_unfork(source);
	go_on_all();
}

static void undo_now(struct timer *t)
{
	(void)t;
	fork_release(true);
}

static void prepared(int error)
{
	if (error) {
		token_size = 0;
		call_failed(waiting, error == EBUSY ? "a process could not be stopped within 5 s" : NULL, error);
		return;
	}
	fork_epoch++;
	undo.fire = undo_now;
	timer_set(&undo, UNDO_MS);
	call_done(waiting);
}

bool fork_token_is(const struct cbor *given)
{
	if (given->type == CBOR_NONE || given->type == CBOR_NULL || !token_size)
		return true;
	return given->size == token_size && memcmp(given->data, token, token_size) == 0;
}

int call_fork_prepare(struct call *c)
{
	struct cbor given = cbor_get(&c->args, "token");
	if (state != IDLE) {
		c->problem = "a fork is prepared already";
		return -EBUSY;
	}
	if (given.type != CBOR_BYTES || given.size == 0 || given.size > sizeof token) {
		c->problem = "token must be 1 to 64 bytes";
		return -EINVAL;
	}
	memcpy(token, given.data, given.size);
	token_size = given.size;
	waiting = c->to;
	stop(prepared);
	return CALL_LATER;
}

int call_fork_done(struct call *c)
{
	struct cbor given = cbor_get(&c->args, "token");
	if (state != STOPPED) {
		c->problem = "no fork is prepared (one is undone after 30 s)";
		return -ESRCH;
	}
	if (given.type != CBOR_BYTES || !fork_token_is(&given)) {
		c->problem = "the prepared fork has another token";
		return -EINVAL;
	}
	fork_release(true);
	return 0;
}

void fork_hold(void (*then)(int error))
{
	timer_clear(&undo);
	if (state == STOPPED)
		then(0);
	else if (state == IDLE)
		stop(then);
	else
		then(EBUSY);
}
