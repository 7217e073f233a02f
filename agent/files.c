/* The streams `read` and `write`. */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "disks.h"
#include "job.h"
#include "stream.h"
#include "util.h"

struct reader {
	int fd;
	uint64_t left;
};

static void reader_drop(struct stream *s, bool asked)
{
	struct reader *r = s->owner;
	(void)asked;
	close(r->fd);
	free(r);
}

static void reader_end(struct stream *s, int error)
{
	reader_drop(s, false);
	if (error) {
		stream_close(s, strerror(error), error);
		return;
	}
	stream_eof(s, 0);
	stream_close(s, NULL, 0);
}

/* One piece a turn, so that a large file holds nobody up. */
static void reader_resume(struct stream *s)
{
	struct reader *r = s->owner;
	size_t room = stream_room(s, 0);
	if (!room)
		return;
	if (room > r->left)
		room = (size_t)r->left;
	ssize_t n = room ? read(r->fd, stream_buffer(s, room), room) : 0;
	if (n < 0 && errno == EINTR)
		return;
	if (n <= 0) {
		reader_end(s, n < 0 ? errno : 0);
		return;
	}
	r->left -= (uint64_t)n;
	stream_sent(s, 0, (size_t)n);
}

static const struct stream_kind reader_kind = {.resume = reader_resume, .drop = reader_drop};

void read_open(struct stream *s, const struct cbor *args)
{
	char path[PATH_MAX];
	struct stat st;
	struct cbor_out o;
	uint64_t offset = cbor_get_uint(args, "offset", 0);
	if (cbor_get_string(args, "path", path, sizeof path) < 1) {
		stream_close(s, "path is missing or not a text", EINVAL);
		return;
	}
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC), error = errno;
	if (fd >= 0) {
		error = fstat(fd, &st) < 0 ? errno : S_ISDIR(st.st_mode) ? EISDIR : 0;
		if (!error && offset && (offset > INT64_MAX || lseek(fd, (off_t)offset, SEEK_SET) < 0))
			error = EINVAL;
	}
	if (error && fd >= 0)
		close(fd);
	if (fd < 0 || error) {
		stream_close(s, strerror(error), error);
		return;
	}
	struct reader *r = xcalloc(1, sizeof *r);
	r->fd = fd;
	r->left = cbor_get_uint(args, "length", UINT64_MAX);
	s->kind = &reader_kind;
	s->owner = r;
	s->pumping = true;
	link_begin(s->link, &o);
	cbor_put_map(&o, 2);
	cbor_pair_uint(&o, "size", (uint64_t)st.st_size);
	cbor_pair_uint(&o, "mode", st.st_mode & 07777);
	stream_opened(s, &o);
}

struct writer {
	struct stream *stream; /* NULL: closed early */
	int fd;
	bool atomic, syncing;
	int64_t mode, uid, gid; /* -1: as it is */
	char path[PATH_MAX], temporary[PATH_MAX];
};

static void writer_free(struct writer *w)
{
	if (w->temporary[0])
		unlink(w->temporary);
	close(w->fd);
	free(w);
}

static void writer_end(struct writer *w, int error)
{
	struct stream *s = w->stream;
	writer_free(w);
	if (s)
		stream_close(s, error ? strerror(error) : NULL, error);
}

static void writer_data(struct stream *s, const uint8_t *p, size_t n)
{
	struct writer *w = s->owner;
	int r = disks_frozen() ? -EBUSY : write_all(w->fd, p, n);
	if (r < 0)
		writer_end(w, -r);
	else
		stream_consumed(s, n);
}

static void writer_drop(struct stream *s, bool asked)
{
	struct writer *w = s->owner;
	(void)asked;
	w->stream = NULL;
	if (!w->syncing)
		writer_free(w);
}

static int sync_file(void *data)
{
	struct writer *w = data;
	return fsync(w->fd) < 0 ? errno : 0;
}

static void synced(void *data, int error)
{
	struct writer *w = data;
	if (!error && w->stream && rename(w->temporary, w->path) < 0)
		error = errno;
	else if (!error && w->stream)
		w->temporary[0] = 0;
	writer_end(w, error);
}

static void writer_eof(struct stream *s)
{
	struct writer *w = s->owner;
	int error = 0;
	if ((w->uid >= 0 || w->gid >= 0) && fchown(w->fd, (uid_t)w->uid, (gid_t)w->gid) < 0)
		error = errno;
	if (!error && w->mode >= 0 && fchmod(w->fd, (mode_t)w->mode & 07777) < 0)
		error = errno;
	if (error || !w->atomic) {
		writer_end(w, error);
		return;
	}
	w->syncing = true; /* fsync may take as long as the disk likes */
	job_start(&(struct job){.work = sync_file, .done = synced, .data = w, .keep_fd = w->fd});
}

static const struct stream_kind writer_kind = {.data = writer_data, .eof = writer_eof, .drop = writer_drop};

static void split_path(const char *path, char *dir, char *base)
{
	char copy[PATH_MAX];
	snprintf(copy, sizeof copy, "%s", path);
	snprintf(dir, PATH_MAX, "%s", dirname(copy));
	snprintf(copy, sizeof copy, "%s", path);
	snprintf(base, NAME_MAX + 1, "%.*s", NAME_MAX, basename(copy));
}

/* A file beside the target, which will be renamed over it; it starts with the target's mode and owner. */
static int open_temporary(struct writer *w, const struct stat *old)
{
	static unsigned counter;
	char dir[PATH_MAX], base[NAME_MAX + 1];
	split_path(w->path, dir, base);
	if (snprintf(w->temporary, PATH_MAX, "%s/.%.200s.posada-%d-%u", dir, base, (int)getpid(), ++counter) >= PATH_MAX) {
		w->temporary[0] = 0;
		return -ENAMETOOLONG;
	}
	w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (w->fd < 0) {
		w->temporary[0] = 0;
		return -errno;
	}
	if (w->mode < 0)
		w->mode = old ? old->st_mode & 07777 : 0644;
	if (old && w->uid < 0 && old->st_uid != geteuid())
		w->uid = old->st_uid;
	if (old && w->gid < 0 && old->st_gid != getegid())
		w->gid = old->st_gid;
	return 0;
}

static int open_target(struct writer *w, const struct cbor *args)
{
	struct stat st;
	char real[PATH_MAX], dir[PATH_MAX], base[NAME_MAX + 1];
	uint64_t offset = cbor_get_uint(args, "offset", UINT64_MAX);
	bool append = cbor_get_bool(args, "append", false), there;
	if (offset != UINT64_MAX && (append || offset > INT64_MAX))
		return -EINVAL;
	if (cbor_get_bool(args, "mkdir", false)) {
		split_path(w->path, dir, base);
		int r = make_dirs(dir, 0755);
		if (r < 0)
			return r;
	}
	if (realpath(w->path, real))
		strcpy(w->path, real); /* a symlink stays one: what it points to is replaced */
	there = stat(w->path, &st) == 0;
	if (there && S_ISDIR(st.st_mode))
		return -EISDIR;
	w->atomic = cbor_get_bool(args, "atomic", true) && !append && offset == UINT64_MAX && (!there || S_ISREG(st.st_mode));
	if (w->atomic)
		return open_temporary(w, there ? &st : NULL);
	int flags = append ? O_APPEND : offset == UINT64_MAX ? O_TRUNC : 0;
	w->fd = open(w->path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags, 0644);
	if (w->fd < 0)
		return -errno;
	return offset != UINT64_MAX && lseek(w->fd, (off_t)offset, SEEK_SET) < 0 ? -errno : 0;
}

static int64_t optional(const struct cbor *args, const char *key)
{
	struct cbor value = cbor_get(args, key);
	return value.type == CBOR_UINT && value.number <= INT32_MAX ? (int64_t)value.number : -1;
}

void write_open(struct stream *s, const struct cbor *args)
{
	struct cbor_out o;
	struct writer *w = xcalloc(1, sizeof *w);
	*w = (struct writer){
		.stream = s, .fd = -1, .mode = optional(args, "mode"), .uid = optional(args, "uid"), .gid = optional(args, "gid"),
	};
	int r = disks_frozen() ? -EBUSY : -EINVAL;
	if (r == -EINVAL && cbor_get_string(args, "path", w->path, sizeof w->path) > 0)
		r = open_target(w, args);
	if (r < 0) {
		writer_end(w, -r);
		return;
	}
	s->kind = &writer_kind;
	s->owner = w;
	link_begin(s->link, &o);
	cbor_put_map(&o, 0);
	stream_opened(s, &o);
}
