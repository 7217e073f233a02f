#include "disks.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <mntent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "calls.h"
#include "job.h"
#include "loop.h"
#include "util.h"

#define MAX_DISKS 32
#define THAW_MS 30000
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t) /* fs/ext4/ext4.h */

static bool frozen;
static struct timer thaw_timer;

/* What a job was started for; freed when it is done. */
struct task {
	struct reply_to to;
	char path[256];
};

bool disks_frozen(void)
{
	return frozen;
}

/* A directory on every writable file system that has a disk below it; one for each disk. */
static size_t disks(char paths[][256])
{
	dev_t seen[MAX_DISKS];
	size_t n = 0;
	struct stat st;
	FILE *mounts = setmntent("/proc/self/mounts", "re");
	for (struct mntent *m; mounts && n < MAX_DISKS && (m = getmntent(mounts));) {
		bool known = false;
		if (m->mnt_fsname[0] != '/' || hasmntopt(m, "ro") || strlen(m->mnt_dir) >= sizeof paths[0])
			continue;
		if (stat(m->mnt_dir, &st) < 0 || !S_ISDIR(st.st_mode))
			continue;
		for (size_t i = 0; i < n; i++)
			known |= seen[i] == st.st_dev;
		if (known)
			continue;
		seen[n] = st.st_dev;
		strcpy(paths[n++], m->mnt_dir);
	}
	if (mounts)
		endmntent(mounts);
	return n;
}

static int disk_ioctl(const char *path, unsigned long request, void *argument)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return errno;
	int error = ioctl(fd, (int)request, argument) < 0 ? errno : 0;
	close(fd);
	return error;
}

/* The last mounted first: one may lie in a file of another. */
static int freeze_all(void *data)
{
	static char paths[MAX_DISKS][256];
	size_t n = disks(paths);
	(void)data;
	for (size_t i = n; i--;) {
		int error = disk_ioctl(paths[i], FIFREEZE, NULL);
		if (error == 0 || error == EOPNOTSUPP)
			continue;
		for (size_t k = i + 1; k < n; k++)
			disk_ioctl(paths[k], FITHAW, NULL);
		return error;
	}
	return 0;
}

/* FITHAW never blocks: no job is needed. */
void disks_thaw(void)
{
	static char paths[MAX_DISKS][256];
	if (!frozen)
		return;
	timer_clear(&thaw_timer);
	frozen = false;
	size_t n = disks(paths);
	for (size_t i = 0; i < n; i++)
		disk_ioctl(paths[i], FITHAW, NULL);
}

static void thaw_now(struct timer *t)
{
	(void)t;
	disks_thaw();
}

static void answer(void *data, int error)
{
	struct task *t = data;
	if (error)
		call_failed(t->to, NULL, error);
	else
		call_done(t->to);
	free(t);
}

static void freeze_done(void *data, int error)
{
	if (error) {
		timer_clear(&thaw_timer);
		frozen = false;
	} else if (!frozen) {
		frozen = true; /* thaw was called while the job was freezing */
		disks_thaw();
	}
	answer(data, error);
}

static struct task *task(struct call *c)
{
	struct task *t = xcalloc(1, sizeof *t);
	t->to = c->to;
	return t;
}

int call_freeze(struct call *c)
{
	if (*test_root)
		return 0;
	if (frozen) {
		c->problem = "the disks are frozen already";
		return -EBUSY;
	}
	frozen = true; /* from now on: a write of the agent's would wait for the thaw, and the thaw for the agent */
	thaw_timer.fire = thaw_now;
	timer_set(&thaw_timer, THAW_MS);
	job_start(&(struct job){.work = freeze_all, .done = freeze_done, .data = task(c), .keep_fd = -1});
	return CALL_LATER;
}

int call_thaw(struct call *c)
{
	(void)c;
	disks_thaw();
	return 0;
}

static int sync_all(void *data)
{
	(void)data;
	sync();
	return 0;
}

int call_sync(struct call *c)
{
	job_start(&(struct job){.work = sync_all, .done = answer, .data = task(c), .keep_fd = -1});
	return CALL_LATER;
}

/* Where a block device is mounted. Compared by number: /dev/root, by-uuid links and the like name the same device. */
static bool mounted_at(dev_t device, char *path, size_t cap)
{
	char line[1024], target[512];
	unsigned major, minor;
	bool found = false;
	FILE *file = fopen("/proc/self/mountinfo", "re");
	while (file && !found && fgets(line, sizeof line, file)) {
		if (sscanf(line, "%*d %*d %u:%u %*s %511s", &major, &minor, target) != 3)
			continue;
		found = makedev(major, minor) == device && strlen(target) < cap;
		if (found)
			strcpy(path, target);
	}
	if (file)
		fclose(file);
	return found;
}

static int grow(void *data)
{
	struct task *t = data;
	struct stat st;
	struct statvfs fs;
	uint64_t bytes;
	char target[512];
	int fd = open(t->path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		return errno;
	if (!S_ISBLK(st.st_mode))
		return ENOTBLK;
	if (ioctl(fd, (int)BLKGETSIZE64, &bytes) < 0)
		return errno;
	if (!mounted_at(st.st_rdev, target, sizeof target))
		return ENOENT;
	if (statvfs(target, &fs) < 0)
		return errno;
	uint64_t blocks = bytes / fs.f_bsize;
	return disk_ioctl(target, EXT4_IOC_RESIZE_FS, &blocks);
}

int call_disk_grow(struct call *c)
{
	struct task *t = task(c);
	int r = *test_root ? -EPERM : call_path(c, "device", t->path, sizeof t->path);
	if (r < 0) {
		free(t);
		return r;
	}
	job_start(&(struct job){.work = grow, .done = answer, .data = t, .keep_fd = -1});
	return CALL_LATER;
}
