/* identity.reset: makes a fork another machine before its processes go on. Each hazard is one step. */
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "calls.h"
#include "disks.h"
#include "exec.h"
#include "fork.h"
#include "netconf.h"
#include "sockets.h"
#include "sshkeys.h"
#include "util.h"

#define ENTROPY 64
#define MAX_MACS 8

static struct {
	bool running;
	struct reply_to to;
	uint64_t generation, time_ns, epoch;
	char hostname[65], machine_id[33];
	uint8_t macs[MAX_MACS][6];
	size_t mac_count;
	uint8_t entropy[ENTROPY];
	bool ssh_host_keys;
} id;

/* Kept below the root they belong to: the machine is not the agent's own in --listen mode. */
static bool only_files(void)
{
	return *test_root != 0;
}

static int step_links(const char **note)
{
	(void)note;
	links_reset_older(link_by_session(id.to.session), id.epoch);
	return 0;
}

static int step_entropy(const char **note)
{
	struct {
		int bits, size;
		uint8_t bytes[ENTROPY];
	} pool = {.bits = ENTROPY * 8, .size = ENTROPY};
	memcpy(pool.bytes, id.entropy, ENTROPY);
	if (only_files()) {
		*note = "skipped";
		return 0;
	}
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	int r = ioctl(fd, (int)RNDADDENTROPY, &pool) < 0 ? -errno : 0;
	/* Linux before 4.14 has no RNDRESEEDCRNG, and reseeds by itself when entropy is added to an initialised pool. */
	if (r == 0 && ioctl(fd, (int)RNDRESEEDCRNG) < 0 && errno != EINVAL && errno != ENOTTY)
		r = -errno;
	close(fd);
	return r;
}

static int step_clock(const char **note)
{
	struct timespec t = {.tv_sec = (time_t)(id.time_ns / 1000000000), .tv_nsec = (long)(id.time_ns % 1000000000)};
	if (only_files()) {
		*note = "skipped";
		return 0;
	}
	return clock_settime(CLOCK_REALTIME, &t) < 0 ? -errno : 0;
}

static int step_hostname(const char **note)
{
	char line[80];
	if (!only_files() && sethostname(id.hostname, strlen(id.hostname)) < 0)
		return -errno;
	snprintf(line, sizeof line, "%s\n", id.hostname);
	int r = replace_text(rooted("/etc/hostname"), line, 0644);
	if (r != -EROFS && r != -ENOENT)
		return r;
	*note = r == -EROFS ? "read-only root: /etc/hostname is as it was" : "there is no /etc";
	return 0;
}

/* On a read-only root a file from /run is laid over it. */
static int machine_id_into(const char *path)
{
	static const char *const cover = "/run/posada/machine-id";
	char line[40];
	snprintf(line, sizeof line, "%s\n", id.machine_id);
	int r = replace_text(rooted(path), line, 0444);
	if (r != -EROFS)
		return r;
	r = replace_text(cover, line, 0444);
	if (r == 0 && mount(cover, path, NULL, MS_BIND, NULL) < 0)
		r = -errno;
	return r;
}

static int step_machine_id(const char **note)
{
	struct stat st;
	const char *dbus = "/var/lib/dbus/machine-id";
	if (access(rooted("/etc/machine-id"), F_OK) < 0 && access(rooted("/etc/debian_version"), F_OK) < 0) {
		*note = "the guest has none";
		return 0;
	}
	int r = machine_id_into("/etc/machine-id");
	if (r == 0 && lstat(rooted(dbus), &st) == 0 && S_ISREG(st.st_mode))
		r = machine_id_into(dbus);
	return r;
}

static int step_macs(const char **note)
{
	if (only_files() || !id.mac_count) {
		*note = "skipped";
		return 0;
	}
	return net_set_macs((const uint8_t(*)[6])id.macs, id.mac_count);
}

static int step_connections(const char **note)
{
	if (only_files()) {
		*note = "skipped";
		return 0;
	}
	return sockets_destroy_foreign(note);
}

static int step_generation(const char **note)
{
	char text[32];
	(void)note;
	snprintf(text, sizeof text, "%llu\n", (unsigned long long)id.generation);
	int r = make_dirs(rooted("/run/posada"), 0755);
	if (r == 0)
		r = replace_text(rooted("/run/posada/generation"), text, 0644);
	if (r == 0)
		generation = id.generation;
	return r;
}

struct step {
	const char *name;
	int (*run)(const char **note);
	const char *note;
};

static struct step steps[] = {
	{"links", step_links, 0},           {"entropy", step_entropy, 0}, {"clock", step_clock, 0},
	{"hostname", step_hostname, 0},     {"machine_id", step_machine_id, 0}, {"macs", step_macs, 0},
	{"connections", step_connections, 0}, {"ssh_host_keys", NULL, 0}, {"generation", step_generation, 0},
	{"processes", NULL, 0},
};

enum { STEP_KEYS = 7, STEP_GENERATION = 8, STEP_PROCESSES = 9 };

static void failed(size_t step, int error)
{
	char problem[160];
	snprintf(problem, sizeof problem, "identity step %s: %s", steps[step].name, strerror(error));
	id.running = false;
	call_failed(id.to, problem, error);
}

static bool run(size_t first, size_t last)
{
	for (size_t i = first; i <= last; i++) {
		int r = steps[i].run(&steps[i].note);
		timing_step(steps[i].name);
		if (r < 0) {
			failed(i, -r);
			return false;
		}
	}
	return true;
}

/* "ok", or "ok: there were none" */
static void report(struct cbor_out *o, const struct step *s)
{
	char text[96];
	snprintf(text, sizeof text, "ok%s%s", s->note ? ": " : "", s->note ? s->note : "");
	cbor_pair_text(o, s->name, text);
}

static void keys_done(int error, const char *note)
{
	if (error) {
		failed(STEP_KEYS, error);
		return;
	}
	steps[STEP_KEYS].note = note;
	if (!run(STEP_GENERATION, STEP_GENERATION))
		return;
	id.running = false;
	fork_epoch++;
	fork_release(false);
	sshkeys_rest();
	struct cbor_out o;
	struct link *l = call_begin(id.to, &o);
	if (!l)
		return;
	cbor_put_map(&o, 1);
	cbor_put_text(&o, "steps");
	cbor_put_map(&o, COUNT(steps));
	for (size_t i = 0; i < COUNT(steps); i++)
		report(&o, &steps[i]);
	link_send(l, &o, 0, T_REPLY);
}

static void held(int error)
{
	if (error) {
		failed(STEP_PROCESSES, error);
		return;
	}
	timing_step("identity: everything has stopped");
	disks_thaw(); /* a snapshot may have been taken with frozen disks: nothing could be written */
	if (!run(0, STEP_KEYS - 1))
		return;
	if (id.ssh_host_keys)
		sshkeys_renew(keys_done);
	else
		keys_done(0, "skipped");
}

static bool read_mac(const struct cbor *value, uint8_t mac[6])
{
	char text[18];
	unsigned b[6];
	if (cbor_string(value, text, sizeof text) != 17)
		return false;
	if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5]) != 6)
		return false;
	for (int i = 0; i < 6; i++)
		mac[i] = (uint8_t)b[i];
	return true;
}

static const char *read_macs(const struct cbor *macs)
{
	struct cbor one;
	const uint8_t *at = macs->data, *end = macs->data + macs->size;
	if (macs->type != CBOR_NONE && macs->type != CBOR_ARRAY)
		return "macs must be a list";
	id.mac_count = macs->type == CBOR_ARRAY ? (size_t)macs->number : 0;
	if (id.mac_count > MAX_MACS)
		return "more than 8 macs";
	for (size_t i = 0; i < id.mac_count; i++)
		if (!cbor_read(&at, end, &one) || !read_mac(&one, id.macs[i]))
			return "a mac must be like 52:54:00:12:34:56";
	return NULL;
}

/* RFC 1123 names; they end up in files and on terminals. */
static bool good_hostname(const char *name)
{
	return *name && strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") == strlen(name);
}

static const char *read_args(const struct cbor *args)
{
	struct cbor token = cbor_get(args, "token"), entropy = cbor_get(args, "entropy"), macs = cbor_get(args, "macs");
	if (!fork_token_is(&token))
		return "the prepared fork has another token";
	if (entropy.type != CBOR_BYTES || entropy.size != ENTROPY)
		return "entropy must be 64 bytes";
	if (cbor_get_string(args, "hostname", id.hostname, sizeof id.hostname) < 1 || !good_hostname(id.hostname))
		return "hostname must be 1 to 64 letters, digits, - and .";
	if (cbor_get_string(args, "machine_id", id.machine_id, sizeof id.machine_id) != 32 ||
	    strspn(id.machine_id, "0123456789abcdef") != 32)
		return "machine_id must be 32 hexadecimal digits";
	if (cbor_get(args, "generation").type != CBOR_UINT || !cbor_get_uint(args, "time_ns", 0))
		return "generation and time_ns must be numbers";
	memcpy(id.entropy, entropy.data, ENTROPY);
	id.generation = cbor_get_uint(args, "generation", 0);
	id.time_ns = cbor_get_uint(args, "time_ns", 0);
	id.ssh_host_keys = cbor_get_bool(args, "ssh_host_keys", true);
	return read_macs(&macs);
}

int call_identity_reset(struct call *c)
{
	if (id.running) {
		c->problem = "identity.reset is running";
		return -EBUSY;
	}
	c->problem = read_args(&c->args);
	if (c->problem)
		return -EINVAL;
	id.to = c->to;
	id.running = true;
	/* Of a prepared fork the newer links are the fork's own; else all but the caller's may be inherited. */
	id.epoch = fork_waiting() ? fork_epoch : UINT64_MAX;
	for (size_t i = 0; i < COUNT(steps); i++)
		steps[i].note = NULL;
	fork_hold(held);
	return CALL_LATER;
}
