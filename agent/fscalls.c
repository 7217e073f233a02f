/* Calls on files: stat, list, mkdir, remove, rename, chmod, chown, symlink. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "calls.h"
#include "disks.h"
#include "job.h"
#include "util.h"

#define LIST_MOST 500
#define LIST_BYTES (MAX_PAYLOAD - 2048) /* an entry takes less than that */

static const char *type_name(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFDIR: return "dir";
	case S_IFLNK: return "link";
	case S_IFCHR: return "char";
	case S_IFBLK: return "block";
	case S_IFIFO: return "fifo";
	case S_IFSOCK: return "sock";
	default: return "file";
	}
}

static int64_t mtime_ns(const struct stat *st)
{
	return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

/* Frozen disks would hold the agent up until they are thawed, by the agent. */
static int writable_path(struct call *c, const char *key, char *path, size_t cap)
{
	if (disks_frozen()) {
		c->problem = "the disks are frozen";
		return -EBUSY;
	}
	return call_path(c, key, path, cap);
}

int call_stat(struct call *c)
{
	char path[PATH_MAX], target[PATH_MAX];
	struct stat st;
	int r = call_path(c, "path", path, sizeof path);
	if (r < 0)
		return r;
	bool follow = cbor_get_bool(&c->args, "follow", true);
	if (fstatat(AT_FDCWD, path, &st, follow ? 0 : AT_SYMLINK_NOFOLLOW) < 0)
		return -errno;
	ssize_t n = S_ISLNK(st.st_mode) ? readlink(path, target, sizeof target - 1) : -1;
	cbor_put_map(c->ok, n < 0 ? 6 : 7);
	cbor_pair_text(c->ok, "type", type_name(st.st_mode));
	cbor_pair_uint(c->ok, "mode", st.st_mode & 07777);
	cbor_pair_uint(c->ok, "uid", st.st_uid);
	cbor_pair_uint(c->ok, "gid", st.st_gid);
	cbor_pair_uint(c->ok, "size", (uint64_t)st.st_size);
	cbor_put_text(c->ok, "mtime_ns");
	cbor_put_int(c->ok, mtime_ns(&st));
	if (n >= 0) {
		target[n] = 0;
		cbor_pair_text(c->ok, "target", target);
	}
	return 0;
}

static int compare(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/*
 * The first LIST_MOST+1 names after `after`, sorted. Twice as many are held at most, however large the directory is: when
 * they are, they are sorted and the later half is dropped. Returns how many.
 */
static size_t first_names(DIR *dir, const char *after, char **names)
{
	size_t n = 0;
	for (struct dirent *e; (e = readdir(dir));) {
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || strcmp(e->d_name, after) <= 0)
			continue;
		names[n++] = xstrdup(e->d_name);
		if (n < 2 * (LIST_MOST + 1))
			continue;
		qsort(names, n, sizeof *names, compare);
		while (n > LIST_MOST + 1)
			free(names[--n]);
	}
	qsort(names, n, sizeof *names, compare);
	return n;
}

int call_list(struct call *c)
{
	char path[PATH_MAX], after[NAME_MAX + 1] = "";
	static char *names[2 * (LIST_MOST + 1)];
	int r = call_path(c, "path", path, sizeof path);
	if (r < 0)
		return r;
	if (cbor_get_string(&c->args, "after", after, sizeof after) == -2)
		return -EINVAL;
	DIR *dir = opendir(path);
	if (!dir)
		return -errno;
	size_t n = first_names(dir, after, names), shown = 0, entries = 0;
	cbor_put_map(c->ok, 2);
	cbor_put_text(c->ok, "entries");
	size_t mark = cbor_begin_array(c->ok);
	for (; shown < n && shown < LIST_MOST && c->ok->len < LIST_BYTES; shown++) {
		struct stat st;
		if (fstatat(dirfd(dir), names[shown], &st, AT_SYMLINK_NOFOLLOW) < 0)
			continue; /* it has gone meanwhile */
		entries++;
		cbor_put_map(c->ok, 5);
		cbor_pair_text(c->ok, "name", names[shown]);
		cbor_pair_text(c->ok, "type", type_name(st.st_mode));
		cbor_pair_uint(c->ok, "mode", st.st_mode & 07777);
		cbor_pair_uint(c->ok, "size", (uint64_t)st.st_size);
		cbor_put_text(c->ok, "mtime_ns");
		cbor_put_int(c->ok, mtime_ns(&st));
	}
	cbor_end_array(c->ok, mark, entries);
	cbor_pair_bool(c->ok, "more", shown < n);
	for (size_t i = 0; i < n; i++)
		free(names[i]);
	closedir(dir);
	return 0;
}

int call_mkdir(struct call *c)
{
	char path[PATH_MAX];
	int r = writable_path(c, "path", path, sizeof path);
	if (r < 0)
		return r;
	mode_t mode = (mode_t)cbor_get_uint(&c->args, "mode", 0755) & 07777;
	if (cbor_get_bool(&c->args, "parents", false))
		return make_dirs(path, mode);
	if (mkdir(path, mode) < 0 || chmod(path, mode) < 0)
		return -errno;
	return 0;
}

struct removal {
	struct reply_to to;
	char path[PATH_MAX];
};

/* Empties a directory that is open; symlinks are removed, never followed. Returns 0 or a positive errno. */
static int empty(int dir, int depth)
{
	DIR *d = fdopendir(dir);
	int error = d ? 0 : errno;
	if (!d) {
		close(dir);
		return error;
	}
	for (struct dirent *e; error == 0 && (e = readdir(d));) {
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		if (unlinkat(dir, e->d_name, 0) == 0 || errno == ENOENT)
			continue;
		if (errno != EISDIR && errno != EPERM) {
			error = errno;
			break;
		}
		int below = depth ? openat(dir, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
		error = below >= 0 ? empty(below, depth - 1) : depth ? errno : ELOOP;
		if (error == 0 && unlinkat(dir, e->d_name, AT_REMOVEDIR) < 0)
			error = errno;
	}
	closedir(d);
	return error;
}

static int remove_tree(void *data)
{
	struct removal *r = data;
	int fd = open(r->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	int error = fd < 0 ? errno : empty(fd, 900); /* each level holds a descriptor open */
	return error == 0 && rmdir(r->path) < 0 ? errno : error;
}

static void removed(void *data, int error)
{
	struct removal *r = data;
	if (error)
		call_failed(r->to, NULL, error);
	else
		call_done(r->to);
	free(r);
}

int call_remove(struct call *c)
{
	char path[PATH_MAX];
	struct stat st;
	int r = writable_path(c, "path", path, sizeof path);
	if (r < 0)
		return r;
	if (lstat(path, &st) < 0)
		return -errno;
	if (!S_ISDIR(st.st_mode))
		return unlink(path) < 0 ? -errno : 0;
	if (rmdir(path) == 0)
		return 0;
	if (errno != ENOTEMPTY && errno != EEXIST)
		return -errno;
	if (!cbor_get_bool(&c->args, "recursive", false))
		return -ENOTEMPTY;
	struct removal *tree = xcalloc(1, sizeof *tree);
	tree->to = c->to;
	strcpy(tree->path, path);
	job_start(&(struct job){.work = remove_tree, .done = removed, .data = tree, .keep_fd = -1});
	return CALL_LATER;
}

int call_rename(struct call *c)
{
	char from[PATH_MAX], to[PATH_MAX];
	int r = writable_path(c, "old", from, sizeof from);
	if (r == 0)
		r = call_path(c, "new", to, sizeof to);
	return r < 0 ? r : rename(from, to) < 0 ? -errno : 0;
}

int call_chmod(struct call *c)
{
	char path[PATH_MAX];
	int r = writable_path(c, "path", path, sizeof path);
	struct cbor mode = cbor_get(&c->args, "mode");
	if (r == 0 && (mode.type != CBOR_UINT || mode.number > 07777))
		r = -EINVAL;
	return r < 0 ? r : chmod(path, (mode_t)mode.number) < 0 ? -errno : 0;
}

int call_chown(struct call *c)
{
	char path[PATH_MAX];
	int r = writable_path(c, "path", path, sizeof path);
	uid_t uid = (uid_t)cbor_get_uint(&c->args, "uid", (uint64_t)-1);
	gid_t gid = (gid_t)cbor_get_uint(&c->args, "gid", (uint64_t)-1);
	return r < 0 ? r : chown(path, uid, gid) < 0 ? -errno : 0;
}

int call_symlink(struct call *c)
{
	char target[PATH_MAX], path[PATH_MAX];
	int r = writable_path(c, "path", path, sizeof path);
	if (r == 0)
		r = call_path(c, "target", target, sizeof target);
	return r < 0 ? r : symlink(target, path) < 0 ? -errno : 0;
}
