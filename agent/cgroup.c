#include "cgroup.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "util.h"

#define TOP "/sys/fs/cgroup"
#define OURS TOP "/posada"
#define AGENT "posada.agent"
#define SPARE 4 /* empty groups kept for the next execs: making one takes longer than starting a program */

static int top_fd = -1; /* of OURS */
static struct cgroup spare[SPARE];
static unsigned spares, last_number;

void cgroups_init(void)
{
	if (mkdir(OURS, 0755) < 0 && errno != EEXIST)
		return;
	top_fd = open(OURS, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (is_init || top_fd < 0)
		return;
	/* systemd moves whatever it finds in the root group into its own scope: the agent must be elsewhere by then. */
	mkdir(TOP "/" AGENT, 0755);
	write_text(TOP "/" AGENT "/cgroup.procs", "0");
}

static bool says(int dir, const char *wanted)
{
	char text[128];
	int fd = openat(dir, "cgroup.events", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	text[n < 0 ? 0 : n] = 0;
	return strstr(text, wanted) != NULL;
}

struct cgroup cgroup_take(void)
{
	struct cgroup c = {.fd = -1};
	char name[16];
	if (top_fd < 0)
		return c;
	if (spares)
		return spare[--spares];
	c.number = ++last_number;
	snprintf(name, sizeof name, "%u", c.number);
	if (mkdirat(top_fd, name, 0755) == 0)
		c.fd = openat(top_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return c;
}

/* Removes the groups whose last process has ended since. Only when there are more than a few: it reads the directory. */
static void sweep(void)
{
	int fd = openat(top_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	for (struct dirent *e; dir && (e = readdir(dir));) {
		bool kept = e->d_name[0] < '0' || e->d_name[0] > '9';
		for (unsigned i = 0; i < spares; i++) {
			char name[16];
			snprintf(name, sizeof name, "%u", spare[i].number);
			kept |= strcmp(name, e->d_name) == 0;
		}
		if (!kept)
			unlinkat(top_fd, e->d_name, AT_REMOVEDIR); /* refused where there are processes */
	}
	if (dir)
		closedir(dir);
}

void cgroup_give(struct cgroup *c)
{
	static unsigned left;
	if (c->fd < 0)
		return;
	if (spares < SPARE && says(c->fd, "populated 0")) {
		spare[spares++] = *c;
	} else {
		close(c->fd);
		if (++left % 8 == 0)
			sweep();
	}
	c->fd = -1;
}

/* Calls f with every group that is to stop: posada/, and in full mode whatever else is at the top. */
static int each(int (*f)(int dir))
{
	if (top_fd < 0)
		return -ENOSYS;
	int r = f(top_fd);
	if (is_init)
		return r;
	DIR *dir = opendir(TOP);
	for (struct dirent *e; dir && r == 0 && (e = readdir(dir));) {
		if (e->d_type != DT_DIR || e->d_name[0] == '.' || strcmp(e->d_name, AGENT) == 0 || strcmp(e->d_name, "posada") == 0)
			continue;
		int fd = openat(dirfd(dir), e->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (fd < 0)
			continue;
		r = f(fd);
		close(fd);
	}
	if (dir)
		closedir(dir);
	return r;
}

static int set_freeze(int dir, const char *value)
{
	int fd = openat(dir, "cgroup.freeze", O_WRONLY | O_CLOEXEC);
	int r = fd < 0 || write(fd, value, 1) < 0 ? -errno : 0;
	if (fd >= 0)
		close(fd);
	return r;
}

static int freeze(int dir)
{
	return set_freeze(dir, "1");
}

static int thaw(int dir)
{
	set_freeze(dir, "0"); /* go on: one that fails must not keep the others stopped */
	return 0;
}

static int frozen(int dir)
{
	return says(dir, "frozen 1") ? 0 : -EAGAIN;
}

int cgroups_freeze(void)
{
	int r = each(freeze);
	if (r < 0) {
		each(thaw);
		return r == -ENOENT ? -ENOSYS : r;
	}
	return cgroups_frozen();
}

int cgroups_frozen(void)
{
	return each(frozen);
}

void cgroups_thaw(void)
{
	each(thaw);
}
