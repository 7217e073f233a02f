#include "calls.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "agent.h"
#include "exec.h"
#include "util.h"

static int call_ping(struct call *c)
{
	(void)c;
	return 0;
}

static int call_execs(struct call *c)
{
	cbor_put_map(c->ok, 1);
	cbor_put_text(c->ok, "execs");
	execs_list(c->ok);
	return 0;
}

int call_time_set(struct call *c)
{
	uint64_t ns = cbor_get_uint(&c->args, "ns", 0);
	struct timespec t = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
	if (!ns)
		return -EINVAL;
	return *test_root || clock_settime(CLOCK_REALTIME, &t) == 0 ? 0 : -errno;
}

/* `guest`: changes the machine, and so is refused where the agent runs on somebody's host. */
static const struct {
	const char *op;
	call_function *function;
	bool guest;
} calls[] = {
	{"ping", call_ping, false},         {"stat", call_stat, false},
	{"list", call_list, false},         {"mkdir", call_mkdir, false},
	{"remove", call_remove, false},     {"rename", call_rename, false},
	{"chmod", call_chmod, false},       {"chown", call_chown, false},
	{"symlink", call_symlink, false},   {"execs", call_execs, false},
	{"metrics", call_metrics, false},   {"time.set", call_time_set, true},
	{"sync", call_sync, false},         {"freeze", call_freeze, true},
	{"thaw", call_thaw, true},          {"fork.prepare", call_fork_prepare, true},
	{"fork.done", call_fork_done, true}, {"identity.reset", call_identity_reset, true},
	{"disk.grow", call_disk_grow, true}, {"poweroff", call_poweroff, true},
	{"reboot", call_reboot, true},
};

struct link *call_begin(struct reply_to to, struct cbor_out *o)
{
	struct link *l = link_by_session(to.session);
	if (!l || !to.session)
		return NULL;
	link_begin(l, o);
	cbor_put_map(o, 2);
	cbor_pair_uint(o, "id", to.id);
	cbor_put_text(o, "ok");
	return l;
}

void call_done(struct reply_to to)
{
	struct cbor_out o;
	struct link *l = call_begin(to, &o);
	if (!l)
		return;
	cbor_put_map(&o, 0);
	link_send(l, &o, 0, T_REPLY);
}

void call_failed(struct reply_to to, const char *problem, int error)
{
	struct cbor_out o;
	struct link *l = link_by_session(to.session);
	if (!l || !to.session)
		return;
	link_begin(l, &o);
	cbor_put_map(&o, error ? 3 : 2);
	cbor_pair_uint(&o, "id", to.id);
	cbor_pair_text(&o, "error", problem ? problem : strerror(error));
	if (error)
		cbor_pair_text(&o, "errno", errno_name(error));
	link_send(l, &o, 0, T_REPLY);
}

int call_path(struct call *c, const char *key, char *out, size_t cap)
{
	int n = cbor_get_string(&c->args, key, out, cap);
	if (n > 0)
		return 0;
	c->problem = "a path must be a text that is not empty, has no NUL and is shorter than 4096 bytes";
	return -EINVAL;
}

static void run(struct link *l, struct call *c, size_t i)
{
	struct cbor_out o;
	call_begin(c->to, &o);
	size_t start = o.len;
	c->ok = &o;
	int r = -EPERM;
	if (calls[i].guest && !in_guest)
		c->problem = "refused: this agent does not run in a guest (and has no --test-root)";
	else
		r = calls[i].function(c);
	if (r == CALL_LATER)
		return;
	if (r == 0 && o.full) {
		c->problem = "the answer does not fit a frame";
		r = -EMSGSIZE;
	}
	if (r < 0) {
		call_failed(c->to, c->problem, -r);
		return;
	}
	if (o.len == start)
		cbor_put_map(&o, 0);
	link_send(l, &o, 0, T_REPLY);
}

void call_frame(struct link *l, const uint8_t *body, size_t n)
{
	struct cbor message, op, id;
	if (!cbor_message(body, n, &message) || (id = cbor_get(&message, "id")).type != CBOR_UINT) {
		link_fail(l, "CALL is not a CBOR map with an id");
		return;
	}
	struct call c = {.to = {l->session, id.number}, .args = cbor_get(&message, "args")};
	op = cbor_get(&message, "op");
	for (size_t i = 0; i < COUNT(calls); i++)
		if (cbor_is(&op, calls[i].op)) {
			run(l, &c, i);
			return;
		}
	call_failed(c.to, "no such call", ENOSYS);
}
