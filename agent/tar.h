/* tar headers: POSIX ustar with GNU long names and base-256 numbers. No I/O. */
#ifndef POSADA_TAR_H
#define POSADA_TAR_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TAR_BLOCK 512
/* A header with two long names before it. */
#define TAR_HEADER_MAX (TAR_BLOCK * (3 + 2 * (PATH_MAX / TAR_BLOCK + 1)))

struct tar_entry {
	char name[PATH_MAX], link[PATH_MAX];
	char type; /* '0' file, '1' hard link, '2' symlink, '3' char, '4' block, '5' directory, '6' fifo; others as they came */
	uint32_t mode, uid, gid, major, minor;
	uint64_t size;
	int64_t mtime;
};

/* Writes the header blocks of an entry. Returns how many bytes; at most TAR_HEADER_MAX. */
size_t tar_header(const struct tar_entry *e, uint8_t *out);

enum tar_parsed { TAR_ENTRY, TAR_END, TAR_BAD };

/* Reads a header block: TAR_END for one of zeros, TAR_BAD for a wrong checksum or number. */
enum tar_parsed tar_parse(const uint8_t block[TAR_BLOCK], struct tar_entry *e);
/* Applies the records of a pax header ("27 path=…\n") that are of use here: path, linkpath, size. false: malformed. */
bool tar_pax(const char *text, size_t n, struct tar_entry *e, bool *has_name, bool *has_link, bool *has_size);

static inline size_t tar_padding(uint64_t size)
{
	return (size_t)((TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK);
}

#endif
