#include "tar.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct header {
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100], magic[6], version[2];
	char uname[32], gname[32], major[8], minor[8], prefix[155], rest[12];
};

_Static_assert(sizeof(struct header) == TAR_BLOCK, "a tar header is one block");

/* Octal where it fits, else GNU's base-256. */
static void put_number(char *field, size_t width, uint64_t n)
{
	if (n >> (3 * (width - 1)) == 0) {
		for (size_t i = width - 1; i--; n >>= 3)
			field[i] = (char)('0' + (n & 7));
		return;
	}
	for (size_t i = width; i--; n >>= 8)
		field[i] = (char)(n & 0xff);
	field[0] = (char)(field[0] | (char)0x80);
}

static bool get_number(const char *field, size_t width, uint64_t *n)
{
	size_t i = 0;
	*n = 0;
	if ((uint8_t)field[0] & 0x80) {
		if ((uint8_t)field[0] == 0xff)
			return false; /* negative */
		for (; i < width; i++) {
			if (*n >> 55)
				return false;
			*n = *n << 8 | (uint8_t)(i ? field[i] : field[i] & 0x7f);
		}
		return true;
	}
	while (i < width && field[i] == ' ')
		i++;
	for (; i < width && field[i] >= '0' && field[i] <= '7'; i++)
		*n = *n << 3 | (uint64_t)(field[i] - '0');
	return i == width || field[i] == 0 || field[i] == ' ';
}

static unsigned checksum(const struct header *h)
{
	const uint8_t *p = (const uint8_t *)h;
	unsigned sum = 0;
	for (size_t i = 0; i < sizeof *h; i++) {
		bool own = i >= offsetof(struct header, checksum) && i < offsetof(struct header, checksum) + sizeof h->checksum;
		sum += own ? ' ' : p[i];
	}
	return sum;
}

static void seal(struct header *h)
{
	memcpy(h->magic, "ustar ", 6); /* with this and the version " \0": GNU, whose long names may come before it */
	memcpy(h->version, " ", 2);
	snprintf(h->checksum, sizeof h->checksum, "%06o", checksum(h));
	h->checksum[7] = ' ';
}

/* An entry whose contents are the name of the next. */
static size_t put_long(char type, const char *text, uint8_t *out)
{
	struct header h = {.name = "././@LongLink", .type = type};
	size_t n = strlen(text) + 1, padded = n + tar_padding(n);
	put_number(h.mode, sizeof h.mode, 0644);
	put_number(h.uid, sizeof h.uid, 0);
	put_number(h.gid, sizeof h.gid, 0);
	put_number(h.size, sizeof h.size, n);
	put_number(h.mtime, sizeof h.mtime, 0);
	seal(&h);
	memcpy(out, &h, sizeof h);
	memset(out + sizeof h, 0, padded);
	memcpy(out + sizeof h, text, n);
	return sizeof h + padded;
}

size_t tar_header(const struct tar_entry *e, uint8_t *out)
{
	struct header h = {.type = e->type};
	size_t n = 0, name = strlen(e->name), link = strlen(e->link);
	if (link > sizeof h.link)
		n += put_long('K', e->link, out + n);
	if (name > sizeof h.name)
		n += put_long('L', e->name, out + n);
	memcpy(h.name, e->name, name < sizeof h.name ? name : sizeof h.name);
	memcpy(h.link, e->link, link < sizeof h.link ? link : sizeof h.link);
	put_number(h.mode, sizeof h.mode, e->mode & 07777);
	put_number(h.uid, sizeof h.uid, e->uid);
	put_number(h.gid, sizeof h.gid, e->gid);
	put_number(h.size, sizeof h.size, e->size);
	put_number(h.mtime, sizeof h.mtime, e->mtime < 0 ? 0 : (uint64_t)e->mtime);
	if (e->type == '3' || e->type == '4') {
		put_number(h.major, sizeof h.major, e->major);
		put_number(h.minor, sizeof h.minor, e->minor);
	}
	seal(&h);
	memcpy(out + n, &h, sizeof h);
	return n + sizeof h;
}

static bool get_u32(const char *field, size_t width, uint32_t *n)
{
	uint64_t wide;
	if (!get_number(field, width, &wide) || wide > UINT32_MAX)
		return false;
	*n = (uint32_t)wide;
	return true;
}

enum tar_parsed tar_parse(const uint8_t block[TAR_BLOCK], struct tar_entry *e)
{
	static const uint8_t zeros[TAR_BLOCK];
	struct header h;
	uint64_t sum, mtime;
	if (memcmp(block, zeros, TAR_BLOCK) == 0)
		return TAR_END;
	memcpy(&h, block, sizeof h);
	if (!get_number(h.checksum, sizeof h.checksum, &sum) || sum != checksum(&h))
		return TAR_BAD;
	if (!get_u32(h.mode, sizeof h.mode, &e->mode) || !get_u32(h.uid, sizeof h.uid, &e->uid) ||
	    !get_u32(h.gid, sizeof h.gid, &e->gid) || !get_number(h.size, sizeof h.size, &e->size) ||
	    !get_u32(h.major, sizeof h.major, &e->major) || !get_u32(h.minor, sizeof h.minor, &e->minor))
		return TAR_BAD;
	if (!get_number(h.mtime, sizeof h.mtime, &mtime))
		mtime = 0; /* before 1970 */
	if (e->size > INT64_MAX)
		return TAR_BAD;
	e->mtime = (int64_t)mtime;
	e->type = h.type ? h.type : '0';
	e->mode &= 07777;
	/* The prefix is POSIX's; in a GNU header those bytes mean other things. */
	if (memcmp(h.magic, "ustar", 6) == 0 && h.prefix[0])
		snprintf(e->name, sizeof e->name, "%.*s/%.*s", (int)sizeof h.prefix, h.prefix, (int)sizeof h.name, h.name);
	else
		snprintf(e->name, sizeof e->name, "%.*s", (int)sizeof h.name, h.name);
	snprintf(e->link, sizeof e->link, "%.*s", (int)sizeof h.link, h.link);
	if (e->type == '0' && *e->name && e->name[strlen(e->name) - 1] == '/')
		e->type = '5'; /* before POSIX a directory was a file with a slash */
	return TAR_ENTRY;
}

static bool take_text(const char *value, size_t n, char *out)
{
	if (n >= PATH_MAX || memchr(value, 0, n))
		return false;
	memcpy(out, value, n);
	out[n] = 0;
	return true;
}

bool tar_pax(const char *text, size_t n, struct tar_entry *e, bool *has_name, bool *has_link, bool *has_size)
{
	const char *end = text + n;
	while (text < end && *text) {
		size_t length = 0, digits = 0;
		for (; text + digits < end && text[digits] >= '0' && text[digits] <= '9' && digits < 8; digits++)
			length = length * 10 + (size_t)(text[digits] - '0');
		if (!digits || length <= digits + 1 || length > (size_t)(end - text) || text[digits] != ' ' || text[length - 1] != '\n')
			return false;
		const char *key = text + digits + 1, *stop = text + length - 1;
		const char *equals = memchr(key, '=', (size_t)(stop - key));
		if (!equals)
			return false;
		size_t width = (size_t)(equals - key), size = (size_t)(stop - equals - 1);
		if (width == 4 && memcmp(key, "path", 4) == 0)
			*has_name = take_text(equals + 1, size, e->name);
		else if (width == 8 && memcmp(key, "linkpath", 8) == 0)
			*has_link = take_text(equals + 1, size, e->link);
		else if (width == 4 && memcmp(key, "size", 4) == 0) {
			char number[24] = "";
			if (size >= sizeof number || !size)
				return false;
			memcpy(number, equals + 1, size);
			if (strspn(number, "0123456789") != size)
				return false;
			e->size = strtoull(number, NULL, 10);
			*has_size = e->size <= INT64_MAX;
			if (!*has_size)
				return false;
		}
		if ((width == 4 && memcmp(key, "path", 4) == 0 && !*has_name) || (width == 8 && memcmp(key, "linkpath", 8) == 0 && !*has_link))
			return false;
		text += length;
	}
	return true;
}
