/* The stream `tar-out`: a tree as a tar, made piece by piece as the window allows. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "stream.h"
#include "tar.h"
#include "util.h"

#define MAX_DEPTH 400 /* each level holds a descriptor open */
#define PIECE 32768

struct level {
	DIR *dir;
	size_t name; /* length of the name above */
};

struct packer {
	struct level levels[MAX_DEPTH];
	size_t depth;
	struct tar_entry entry;
	uint8_t header[TAR_HEADER_MAX];
	size_t header_at, header_size;
	int file;      /* being read, or -1 */
	uint64_t left; /* of it, as its header says */
	size_t zeros;  /* padding, or the end of the archive */
	bool ended;
};

static void packer_free(struct packer *t)
{
	while (t->depth)
		closedir(t->levels[--t->depth].dir);
	if (t->file >= 0)
		close(t->file);
	free(t);
}

static void describe(struct tar_entry *e, const struct stat *st, char type)
{
	e->type = type;
	e->mode = st->st_mode & 07777;
	e->uid = st->st_uid;
	e->gid = st->st_gid;
	e->mtime = st->st_mtim.tv_sec;
	e->size = type == '0' ? (uint64_t)st->st_size : 0;
	e->major = major(st->st_rdev);
	e->minor = minor(st->st_rdev);
	e->link[0] = 0;
}

static void emit(struct packer *t)
{
	t->header_size = tar_header(&t->entry, t->header);
	t->header_at = 0;
}

static int add_directory(struct packer *t, int fd, const struct stat *st)
{
	size_t n = strlen(t->entry.name);
	DIR *dir = t->depth < MAX_DEPTH && n + 1 < sizeof t->entry.name ? fdopendir(fd) : NULL;
	if (!dir) {
		close(fd);
		return -ENAMETOOLONG;
	}
	describe(&t->entry, st, '5');
	t->entry.name[n] = '/';
	t->entry.name[n + 1] = 0;
	t->levels[t->depth++] = (struct level){dir, n + 1};
	emit(t);
	return 0;
}

static int add_file(struct packer *t, int fd, const struct stat *st)
{
	describe(&t->entry, st, '0');
	t->file = fd;
	t->left = t->entry.size;
	t->zeros = tar_padding(t->left);
	emit(t);
	return 0;
}

/* Adds what `at`/`name` is, under the name that is in t->entry. Sockets, and what has gone meanwhile, are left out. */
static int add(struct packer *t, int at, const char *name, bool follow)
{
	struct stat st;
	if (fstatat(at, name, &st, follow ? 0 : AT_SYMLINK_NOFOLLOW) < 0)
		return errno == ENOENT && t->depth ? 0 : -errno;
	if (S_ISDIR(st.st_mode) || S_ISREG(st.st_mode)) {
		int kind = S_ISDIR(st.st_mode) ? O_DIRECTORY : O_NONBLOCK | O_NOCTTY;
		int fd = openat(at, name, O_RDONLY | O_CLOEXEC | kind | (follow ? 0 : O_NOFOLLOW));
		if (fd < 0)
			return errno == ENOENT && t->depth ? 0 : -errno;
		if (fstat(fd, &st) < 0 || S_ISDIR(st.st_mode) != (kind == O_DIRECTORY)) {
			close(fd);
			return -EAGAIN;
		}
		return S_ISDIR(st.st_mode) ? add_directory(t, fd, &st) : add_file(t, fd, &st);
	}
	if (S_ISLNK(st.st_mode)) {
		describe(&t->entry, &st, '2');
		ssize_t n = readlinkat(at, name, t->entry.link, sizeof t->entry.link - 1);
		if (n < 0)
			return errno == ENOENT ? 0 : -errno;
		t->entry.link[n] = 0;
	} else if (S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode) || S_ISFIFO(st.st_mode)) {
		describe(&t->entry, &st, S_ISCHR(st.st_mode) ? '3' : S_ISBLK(st.st_mode) ? '4' : '6');
	} else {
		return 0;
	}
	emit(t);
	return 0;
}

/* Goes on to the next entry; when there is none, to the two blocks of zeros that end a tar. */
static int advance(struct packer *t)
{
	while (t->depth) {
		struct level *l = &t->levels[t->depth - 1];
		errno = 0;
		struct dirent *e = readdir(l->dir);
		if (!e) {
			if (errno)
				return -errno;
			closedir(l->dir);
			t->depth--;
			continue;
		}
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		size_t n = strlen(e->d_name);
		if (l->name + n + 1 >= sizeof t->entry.name)
			return -ENAMETOOLONG;
		memcpy(t->entry.name + l->name, e->d_name, n + 1);
		t->header_size = t->header_at = 0;
		int r = add(t, dirfd(l->dir), e->d_name, false);
		if (r < 0 || t->header_size)
			return r;
	}
	t->ended = true;
	t->zeros = 2 * TAR_BLOCK;
	return 0;
}

/* A file that has become shorter since its header was written is filled up with zeros; of a longer one the rest is left. */
static ssize_t read_file(struct packer *t, uint8_t *out, size_t cap)
{
	if (cap > t->left)
		cap = (size_t)t->left;
	ssize_t n = read(t->file, out, cap);
	if (n < 0)
		return -errno;
	if (n == 0) {
		memset(out, 0, cap);
		n = (ssize_t)cap;
	}
	t->left -= (uint64_t)n;
	return n;
}

/* Fills out. Less than cap only at the end; then, and only then, 0 may come. */
static ssize_t pack(struct packer *t, uint8_t *out, size_t cap)
{
	size_t len = 0;
	while (len < cap) {
		size_t room = cap - len, head = t->header_size - t->header_at;
		if (head) {
			size_t n = head < room ? head : room;
			memcpy(out + len, t->header + t->header_at, n);
			t->header_at += n;
			len += n;
		} else if (t->left) {
			ssize_t n = read_file(t, out + len, room);
			if (n < 0)
				return n;
			len += (size_t)n;
		} else if (t->zeros) {
			size_t n = t->zeros < room ? t->zeros : room;
			memset(out + len, 0, n);
			t->zeros -= n;
			len += n;
		} else if (t->ended) {
			break;
		} else {
			if (t->file >= 0)
				close(t->file);
			t->file = -1;
			int r = advance(t);
			if (r < 0)
				return r;
		}
	}
	return (ssize_t)len;
}

static void packer_resume(struct stream *s)
{
	struct packer *t = s->owner;
	size_t room = stream_room(s, 0);
	if (!room)
		return;
	ssize_t n = pack(t, stream_buffer(s, PIECE), room < PIECE ? room : PIECE);
	if (n > 0) {
		stream_sent(s, 0, (size_t)n);
		return;
	}
	char why[sizeof t->entry.name + 64];
	snprintf(why, sizeof why, "%s: %s", t->entry.name, strerror((int)-n));
	packer_free(t);
	if (n == 0)
		stream_eof(s, 0);
	stream_close(s, n < 0 ? why : NULL, (int)-n);
}

static void packer_drop(struct stream *s, bool asked)
{
	(void)asked;
	packer_free(s->owner);
}

static const struct stream_kind packer_kind = {.resume = packer_resume, .drop = packer_drop};

/* The top entry's name: the path's base name, or that of what "." or ".." stands for. */
static void top_name(const char *path, char *name)
{
	char copy[PATH_MAX], real[PATH_MAX];
	snprintf(copy, sizeof copy, "%s", path);
	char *base = basename(copy);
	if ((strcmp(base, ".") == 0 || strcmp(base, "..") == 0) && realpath(path, real))
		base = basename(real);
	snprintf(name, PATH_MAX, "%s", strcmp(base, "/") == 0 ? "." : base);
}

void tar_out_open(struct stream *s, const struct cbor *args)
{
	char path[PATH_MAX];
	struct cbor_out o;
	if (cbor_get_string(args, "path", path, sizeof path) < 1) {
		stream_close(s, "path is missing or not a text", EINVAL);
		return;
	}
	struct packer *t = xcalloc(1, sizeof *t);
	t->file = -1;
	top_name(path, t->entry.name);
	int r = add(t, AT_FDCWD, path, true);
	if (r < 0) {
		packer_free(t);
		stream_close(s, strerror(-r), -r);
		return;
	}
	s->kind = &packer_kind;
	s->owner = t;
	s->pumping = true;
	link_begin(s->link, &o);
	cbor_put_map(&o, 0);
	stream_opened(s, &o);
}
