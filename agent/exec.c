#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "argv.h"
#include "fork.h"
#include "pty.h"
#include "spawn.h"
#include "util.h"

#define KILL_MS 2000  /* from SIGHUP to SIGKILL */
#define GRACE_MS 200  /* from the end of the process to EXIT, when a grandchild keeps the pipes open */
#define KEPT_ENDED 64 /* ended execs that wait for an attach; the oldest is forgotten */

static struct exec *execs;
static uint64_t last_id;
static const struct stream_kind exec_kind;

static void exec_free(struct exec *x)
{
	struct exec **p = &execs;
	while (*p != x)
		p = &(*p)->next;
	*p = x->next;
	timer_clear(&x->grace);
	timer_clear(&x->killer);
	source_free(&x->out);
	source_free(&x->err);
	sink_free(&x->in);
	if (x->pty >= 0)
		close(x->pty);
	cgroup_give(&x->cgroup);
	free(x);
}

static void exec_check(struct exec *x);
static void exec_pump(struct exec *x);

static void kill_now(struct timer *t)
{
	struct exec *x = (struct exec *)((char *)t - offsetof(struct exec, killer));
	kill(-x->pid, SIGKILL);
	exec_check(x);
}

/* Nobody will ever ask for it again. Its output is thrown away, not refused: it may want to write its last words. */
static void exec_hang_up(struct exec *x)
{
	x->keep = x->out.keep = x->err.keep = false;
	x->out.discard = x->err.discard = true;
	watch_close(&x->in.watch);
	if (!x->ended) {
		kill(-x->pid, SIGHUP);
		kill(-x->pid, SIGCONT);
		x->killer.fire = kill_now;
		timer_set(&x->killer, KILL_MS);
	}
	exec_pump(x);
}

static void send_exit(struct exec *x)
{
	struct stream *s = x->stream;
	struct cbor_out o;
	link_begin(s->link, &o);
	cbor_put_map(&o, 2);
	if (WIFSIGNALED(x->status))
		cbor_pair_uint(&o, "signal", (uint64_t)WTERMSIG(x->status));
	else
		cbor_pair_uint(&o, "code", (uint64_t)WEXITSTATUS(x->status));
	cbor_pair_uint(&o, "ms", (uint64_t)x->ms);
	link_send(s->link, &o, s->id, T_EXIT);
	stream_close(s, NULL, 0);
	x->stream = x->out.stream = x->err.stream = x->in.stream = NULL;
}

static void forget_oldest(void)
{
	struct exec *oldest = NULL;
	size_t n = 0;
	for (struct exec *x = execs; x; x = x->next) {
		if (!x->ended || x->stream || !x->keep)
			continue;
		n++;
		oldest = x; /* the list is newest first */
	}
	if (n > KEPT_ENDED)
		exec_free(oldest);
}

/* Ends what has come to its end. Called whenever a source ended or the process did; x may be gone afterwards. */
static void exec_check(struct exec *x)
{
	if (!x->ended || x->checking)
		return;
	if (x->stream && source_done(&x->out) && source_done(&x->err))
		send_exit(x);
	else if (x->stream || x->keep)
		return;
	if (x->killer.armed && kill(-x->pid, 0) < 0 && errno == ESRCH)
		timer_clear(&x->killer); /* nobody of its group is left */
	/* While a grandchild writes it is listened to, to no purpose: it must not die of SIGPIPE. A terminal hangs up. */
	bool drained = x->pty >= 0 || (x->out.watch.fd < 0 && x->err.watch.fd < 0);
	if (drained && !x->killer.armed)
		exec_free(x);
}

static void source_ended(struct source *src)
{
	exec_check(src->owner);
}

/* Pumps both sources; x may be gone afterwards. */
static void exec_pump(struct exec *x)
{
	x->checking = true;
	source_pump(&x->err);
	source_pump(&x->out);
	x->checking = false;
	exec_check(x);
}

static void grace_over(struct timer *t)
{
	struct exec *x = (struct exec *)((char *)t - offsetof(struct exec, grace));
	x->out.last = x->err.last = true;
	exec_pump(x);
}

bool exec_reaped(pid_t pid, int status)
{
	struct exec *x = execs;
	while (x && (x->pid != pid || x->ended))
		x = x->next;
	if (!x)
		return false;
	x->ended = true;
	x->status = status;
	x->ms = now_ms() - x->started;
	if (!x->out.eof || !x->err.eof) {
		x->grace.fire = grace_over;
		timer_set(&x->grace, GRACE_MS);
	}
	exec_pump(x);
	forget_oldest();
	return true;
}

static void exec_data(struct stream *s, const uint8_t *p, size_t n)
{
	struct exec *x = s->owner;
	sink_data(&x->in, p, n);
}

static void exec_eof(struct stream *s)
{
	struct exec *x = s->owner;
	sink_eof(&x->in);
}

static void exec_credit(struct stream *s, uint8_t flags, size_t n)
{
	struct exec *x = s->owner;
	source_credit(flags ? &x->err : &x->out, n);
}

static void exec_resume(struct stream *s)
{
	exec_pump(s->owner);
}

static void exec_drop(struct stream *s, bool asked)
{
	struct exec *x = s->owner;
	x->stream = x->out.stream = x->err.stream = x->in.stream = NULL;
	if (asked || (!x->keep && !fork_waiting())) {
		exec_hang_up(x);
	} else {
		x->orphaned = !x->keep;
		x->keep = x->out.keep = x->err.keep = true;
		exec_pump(x);
	}
}

static void exec_signal(struct stream *s, const struct cbor *args)
{
	struct exec *x = s->owner;
	uint64_t n = cbor_get_uint(args, "signal", 0);
	if (!x->ended && n > 0 && n < 65)
		kill(cbor_get_bool(args, "group", false) ? -x->pid : x->pid, (int)n);
}

static void exec_resize(struct stream *s, const struct cbor *args)
{
	struct exec *x = s->owner;
	if (x->pty >= 0)
		pty_resize(x->pty, args);
}

static const struct stream_kind exec_kind = {
	.data = exec_data, .eof = exec_eof, .credit = exec_credit, .resume = exec_resume, .drop = exec_drop,
	.signal = exec_signal, .resize = exec_resize,
};

static void send_opened(struct exec *x)
{
	struct cbor_out o;
	link_begin(x->stream->link, &o);
	cbor_put_map(&o, 2);
	cbor_pair_uint(&o, "pid", (uint64_t)x->pid);
	cbor_pair_uint(&o, "exec", x->id);
	stream_opened(x->stream, &o);
}

/* The child's three descriptors and ours: mine[0] writes to it, mine[1] and mine[2] (-1 on a terminal) read from it. */
static int make_pipes(bool with_stdin, int theirs[3], int mine[3])
{
	int p[2];
	if (with_stdin) {
		if (pipe2(p, O_CLOEXEC) < 0)
			return -errno;
		theirs[0] = p[0];
		mine[0] = p[1];
	} else {
		theirs[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
	}
	for (int i = 1; i < 3; i++) {
		if (pipe2(p, O_CLOEXEC) < 0)
			return -errno;
		theirs[i] = p[1];
		mine[i] = p[0];
	}
	/* Our ends only: O_NONBLOCK belongs to the open description, and the child must not find it on its own. */
	for (int i = 0; i < 3; i++)
		if (mine[i] >= 0)
			fcntl(mine[i], F_SETFL, O_NONBLOCK);
	return 0;
}

static int make_terminal(const struct cbor *pty, int theirs[3], int mine[3], int *master)
{
	int slave;
	*master = pty_open(pty, &slave);
	if (*master < 0)
		return *master;
	theirs[0] = theirs[1] = theirs[2] = slave;
	mine[0] = fcntl(*master, F_DUPFD_CLOEXEC, 3);
	mine[1] = fcntl(*master, F_DUPFD_CLOEXEC, 3);
	return mine[0] < 0 || mine[1] < 0 ? -errno : 0;
}

static void close_all(const int fds[3])
{
	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0 && (i == 0 || fds[i] != fds[i - 1]))
			close(fds[i]);
}

static void terminal_eof(struct sink *sink)
{
	pty_end_of_file(sink->watch.fd);
}

static struct exec *exec_new(struct stream *s, pid_t pid, const char *name, const int mine[3], int master)
{
	struct exec *x = xcalloc(1, sizeof *x);
	x->id = ++last_id;
	x->pid = pid;
	x->started = now_ms();
	x->pty = master;
	x->stream = s;
	size_t n = strnlen(name, sizeof x->name - 1);
	memcpy(x->name, name, n);
	x->out.owner = x->err.owner = x;
	x->out.ended = x->err.ended = source_ended;
	x->err.watch.fd = -1;
	sink_start(&x->in, mine[0], s); /* without stdin there is no descriptor: what comes is swallowed */
	if (master >= 0)
		x->in.finish = terminal_eof;
	source_start(&x->out, mine[1], s, 0);
	if (mine[2] >= 0)
		source_start(&x->err, mine[2], s, 1);
	else
		x->err.eof = x->err.eof_sent = true;
	x->next = execs;
	execs = x;
	return x;
}

void exec_open(struct stream *s, const struct cbor *args)
{
	struct argv a;
	struct user user;
	struct cbor pty = cbor_get(args, "pty");
	int theirs[3] = {-1, -1, -1}, mine[3] = {-1, -1, -1}, master = -1;
	const char *problem = NULL;
	int r = fork_waiting() ? -EBUSY : argv_read(&a, args, &user, pty.type == CBOR_MAP, &problem);
	if (r < 0) {
		stream_close(s, problem ? problem : "a fork is prepared: nothing can be started now", -r);
		return;
	}
	r = pty.type == CBOR_MAP ? make_terminal(&pty, theirs, mine, &master)
				 : make_pipes(cbor_get_bool(args, "stdin", true), theirs, mine);
	problem = "pipes";
	struct cgroup cgroup = {.fd = -1};
	if (r == 0) {
		cgroup = cgroup_take();
		struct spawn sp = {
			.argv = a.argv, .envp = a.envp, .path = a.path, .cwd = a.cwd, .user = &user,
			.fds = {theirs[0], theirs[1], theirs[2]}, .terminal = master >= 0, .cgroup = cgroup.fd,
		};
		r = spawn(&sp);
		problem = sp.failed;
	}
	close_all(theirs);
	if (r < 0) {
		cgroup_give(&cgroup);
		close_all(mine);
		if (master >= 0)
			close(master);
		char why[PATH_MAX + 64];
		snprintf(why, sizeof why, "%s: %s", problem ? problem : a.argv[0], strerror(-r));
		stream_close(s, why, -r);
		argv_free(&a);
		return;
	}
	struct exec *x = exec_new(s, r, a.argv[0], mine, master);
	x->cgroup = cgroup;
	x->keep = x->out.keep = x->err.keep = cbor_get_bool(args, "keep", false);
	s->kind = &exec_kind;
	s->owner = x;
	send_opened(x);
	argv_free(&a);
}

void attach_open(struct stream *s, const struct cbor *args)
{
	uint64_t id = cbor_get_uint(args, "exec", 0);
	struct exec *x = execs;
	while (x && x->id != id)
		x = x->next;
	if (!x || x->stream || !x->keep || x->in.waiting.len > WINDOW) {
		stream_close(s, !x || !x->keep ? "no such exec" : x->stream ? "it has a client" : "its input is full", x ? EBUSY : ESRCH);
		return;
	}
	x->stream = s;
	s->kind = &exec_kind;
	s->owner = x;
	source_attach(&x->out, s);
	source_attach(&x->err, s);
	sink_attach(&x->in, s);
	x->err.eof_sent = x->pty >= 0;
	send_opened(x);
	exec_pump(x);
}

void execs_list(struct cbor_out *o)
{
	size_t mark = cbor_begin_array(o), n = 0;
	for (struct exec *x = execs; x && o->cap - o->len > 256; x = x->next, n++) {
		cbor_put_map(o, 4);
		cbor_pair_uint(o, "exec", x->id);
		cbor_pair_uint(o, "pid", (uint64_t)x->pid);
		cbor_pair_text(o, "argv0", x->name);
		cbor_pair_bool(o, "running", !x->ended);
	}
	cbor_end_array(o, mark, n);
}

void execs_unfork(bool source)
{
	for (struct exec *x = execs, *next; x; x = next) {
		next = x->next;
		bool orphaned = x->orphaned;
		x->orphaned = false;
		if (orphaned && source)
			exec_hang_up(x);
	}
}

void execs_signal(int signal)
{
	for (struct exec *x = execs; x; x = x->next)
		if (!x->ended)
			kill(-x->pid, signal);
}
