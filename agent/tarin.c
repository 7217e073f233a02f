/* The stream `tar-in`: a tar unpacked below a directory, as it comes. What it names is never trusted to stay there. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "contain.h"
#include "disks.h"
#include "stream.h"
#include "tar.h"
#include "util.h"

#define TEXT_MAX 65536 /* of a long name or a pax header */

/* Writing into a directory changes its time, and it may be made read-only: both are set when the archive has ended. */
struct late {
	struct late *next;
	uint32_t mode;
	int64_t mtime;
	char name[];
};

struct unpacker {
	int base;
	uint8_t block[TAR_BLOCK];
	size_t have;
	struct tar_entry entry;
	uint64_t left;     /* of the entry's contents */
	size_t padding;
	int file;          /* being written, or -1: the contents are skipped, or go to text */
	char *text;        /* contents of a 'L', 'K' or 'x' entry */
	size_t text_size;
	bool has_name, has_link, has_size; /* given for the next entry by such an entry */
	bool ended;
	struct late *late;
};

static void unpacker_free(struct unpacker *t)
{
	while (t->late) {
		struct late *l = t->late;
		t->late = l->next;
		free(l);
	}
	if (t->file >= 0)
		close(t->file);
	if (t->base >= 0)
		close(t->base);
	free(t->text);
	free(t);
}

static int set_owner(int dir, const char *leaf, const struct tar_entry *e)
{
	if (geteuid() != 0)
		return 0;
	return fchownat(dir, leaf, e->uid, e->gid, AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
}

static int set_time(int dir, const char *leaf, int64_t mtime)
{
	struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = (time_t)mtime}};
	return utimensat(dir, leaf, times, AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
}

static int make_directory(struct unpacker *t, int dir, const char *leaf)
{
	const struct tar_entry *e = &t->entry;
	struct stat st;
	if (mkdirat(dir, leaf, 0700) < 0) {
		if (errno != EEXIST)
			return -errno;
		if (fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) < 0)
			return -errno;
		if (!S_ISDIR(st.st_mode))
			return -ELOOP;
	}
	size_t n = strlen(e->name) + 1;
	struct late *l = xcalloc(1, sizeof *l + n);
	*l = (struct late){.next = t->late, .mode = e->mode, .mtime = e->mtime};
	memcpy(l->name, e->name, n);
	t->late = l;
	return set_owner(dir, leaf, e);
}

static int make_file(struct unpacker *t, int dir, const char *leaf)
{
	const struct tar_entry *e = &t->entry;
	t->file = openat(dir, leaf, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (t->file < 0)
		return -errno;
	int r = geteuid() == 0 && fchown(t->file, e->uid, e->gid) < 0 ? -errno : 0;
	return r == 0 && fchmod(t->file, e->mode) < 0 ? -errno : r;
}

static int make_link(struct unpacker *t, int dir, const char *leaf)
{
	char from_leaf[NAME_MAX + 1];
	int from = contain_open(t->base, t->entry.link, from_leaf);
	if (from < 0)
		return from;
	int r = linkat(from, from_leaf, dir, leaf, 0) < 0 ? -errno : 0;
	close(from);
	return r;
}

static int make_node(struct unpacker *t, int dir, const char *leaf)
{
	const struct tar_entry *e = &t->entry;
	mode_t type = e->type == '3' ? S_IFCHR : e->type == '4' ? S_IFBLK : S_IFIFO;
	if (mknodat(dir, leaf, type | e->mode, makedev(e->major, e->minor)) < 0 || fchmodat(dir, leaf, e->mode, 0) < 0)
		return -errno;
	return 0;
}

/* Makes what the entry says; of a file only the beginning. */
static int make(struct unpacker *t)
{
	const struct tar_entry *e = &t->entry;
	char leaf[NAME_MAX + 1];
	int dir = contain_open(t->base, e->name, leaf);
	if (dir < 0)
		return dir;
	int r = 0;
	if (!*leaf) { /* "./": the directory itself, which is there */
		close(dir);
		return e->type == '5' ? 0 : -EPERM;
	}
	if (e->type != '5' && unlinkat(dir, leaf, 0) < 0 && errno != ENOENT)
		r = -errno;
	else if (e->type == '5')
		r = make_directory(t, dir, leaf);
	else if (e->type == '0' || e->type == '7')
		r = make_file(t, dir, leaf);
	else if (e->type == '1')
		r = make_link(t, dir, leaf);
	else if (e->type == '2')
		r = symlinkat(e->link, dir, leaf) < 0 ? -errno : set_owner(dir, leaf, e);
	else if (e->type == '3' || e->type == '4' || e->type == '6')
		r = make_node(t, dir, leaf);
	else
		r = -EOPNOTSUPP;
	if (r == 0 && e->type != '5' && e->type != '1' && t->file < 0)
		r = set_time(dir, leaf, e->mtime);
	close(dir);
	return r;
}

static int header_got(struct unpacker *t)
{
	static struct tar_entry e;
	enum tar_parsed parsed = tar_parse(t->block, &e);
	if (parsed == TAR_BAD)
		return -EBADMSG;
	t->ended = parsed == TAR_END;
	if (t->ended)
		return 0;
	bool extension = e.type == 'L' || e.type == 'K' || e.type == 'x';
	if (extension || e.type == 'g') {
		t->left = e.size;
		t->padding = tar_padding(e.size);
		if (e.type == 'g')
			return 0;
		if (e.size > TEXT_MAX)
			return -ENAMETOOLONG;
		t->entry.type = e.type;
		t->text = xcalloc(1, (size_t)e.size + 1);
		t->text_size = 0;
		return 0;
	}
	/* The kernel's file system decides about what is too long for it; here only what was said before is put in. */
	if (t->has_name)
		memcpy(e.name, t->entry.name, sizeof e.name);
	if (t->has_link)
		memcpy(e.link, t->entry.link, sizeof e.link);
	if (t->has_size)
		e.size = t->entry.size;
	t->has_name = t->has_link = t->has_size = false;
	memcpy(&t->entry, &e, sizeof e);
	/* Only files have contents; others may state a size nevertheless. */
	t->left = e.type == '0' || e.type == '7' ? e.size : 0;
	t->padding = tar_padding(t->left);
	return make(t);
}

/* The contents of an entry are complete. */
static int contents_got(struct unpacker *t)
{
	int r = 0;
	if (t->file >= 0) {
		struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = (time_t)t->entry.mtime}};
		if (futimens(t->file, times) < 0)
			r = -errno;
		close(t->file);
		t->file = -1;
	} else if (t->text) {
		char *target = t->entry.type == 'L' ? t->entry.name : t->entry.link;
		if (t->entry.type == 'x')
			r = tar_pax(t->text, t->text_size, &t->entry, &t->has_name, &t->has_link, &t->has_size) ? 0 : -EBADMSG;
		else if (snprintf(target, PATH_MAX, "%s", t->text) >= PATH_MAX)
			r = -ENAMETOOLONG;
		else if (target == t->entry.name)
			t->has_name = true;
		else
			t->has_link = true;
		free(t->text);
		t->text = NULL;
	}
	return r;
}

static int contents(struct unpacker *t, const uint8_t *p, size_t n)
{
	if (t->file >= 0)
		return write_all(t->file, p, n);
	if (t->text) {
		memcpy(t->text + t->text_size, p, n);
		t->text_size += n;
	}
	return 0;
}

static int feed(struct unpacker *t, const uint8_t *p, size_t n)
{
	while (n && !t->ended) {
		size_t k;
		int r = 0;
		if (t->left) {
			k = n < t->left ? n : (size_t)t->left;
			r = contents(t, p, k);
			t->left -= k;
		} else if (t->padding) {
			k = n < t->padding ? n : t->padding;
			t->padding -= k;
		} else {
			k = TAR_BLOCK - t->have;
			k = n < k ? n : k;
			memcpy(t->block + t->have, p, k);
			t->have += k;
			if (t->have == TAR_BLOCK) {
				t->have = 0;
				r = header_got(t);
			}
		}
		if (r == 0 && !t->left && (t->file >= 0 || t->text))
			r = contents_got(t);
		if (r < 0)
			return r;
		p += k;
		n -= k;
	}
	return 0;
}

static int apply_late(struct unpacker *t)
{
	char leaf[NAME_MAX + 1];
	for (struct late *l = t->late; l; l = l->next) {
		int dir = contain_open(t->base, l->name, leaf);
		if (dir < 0)
			return dir;
		int fd = openat(dir, leaf, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		close(dir);
		if (fd < 0)
			return -errno;
		struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = (time_t)l->mtime}};
		int r = fchmod(fd, l->mode) < 0 || futimens(fd, times) < 0 ? -errno : 0;
		close(fd);
		if (r < 0)
			return r;
	}
	return 0;
}

static void finish(struct stream *s, int error)
{
	struct unpacker *t = s->owner;
	char why[sizeof t->entry.name + 96];
	const char *text = error == EPERM   ? "the entry would leave the directory"
			   : error == ELOOP  ? "a component of its path is a symlink or no directory"
			   : error == EBADMSG ? "this is not a tar, or it is damaged or cut short"
					      : strerror(error);
	snprintf(why, sizeof why, "%s: %s", t->entry.name, text);
	unpacker_free(t);
	stream_close(s, error ? why : NULL, error);
}

static void unpacker_data(struct stream *s, const uint8_t *p, size_t n)
{
	int r = disks_frozen() ? -EBUSY : feed(s->owner, p, n);
	if (r < 0)
		finish(s, -r);
	else
		stream_consumed(s, n);
}

static void unpacker_eof(struct stream *s)
{
	struct unpacker *t = s->owner;
	bool cut = t->left || t->padding || t->have || t->text;
	finish(s, cut ? EBADMSG : -apply_late(t));
}

static void unpacker_drop(struct stream *s, bool asked)
{
	(void)asked;
	unpacker_free(s->owner);
}

static const struct stream_kind unpacker_kind = {.data = unpacker_data, .eof = unpacker_eof, .drop = unpacker_drop};

void tar_in_open(struct stream *s, const struct cbor *args)
{
	char path[PATH_MAX];
	struct cbor_out o;
	int r = disks_frozen() ? -EBUSY : cbor_get_string(args, "path", path, sizeof path) < 1 ? -EINVAL : make_dirs(path, 0755);
	struct unpacker *t = xcalloc(1, sizeof *t);
	t->file = -1;
	t->base = r < 0 ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (r == 0 && t->base < 0)
		r = -errno;
	if (r < 0) {
		unpacker_free(t);
		stream_close(s, strerror(-r), -r);
		return;
	}
	s->kind = &unpacker_kind;
	s->owner = t;
	link_begin(s->link, &o);
	cbor_put_map(&o, 0);
	stream_opened(s, &o);
}
