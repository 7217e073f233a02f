#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../contain.h"
#include "../tar.h"
#include "check.h"

static struct tar_entry in, out;

static void headers_come_back(void)
{
	static uint8_t bytes[TAR_HEADER_MAX];
	in = (struct tar_entry){.name = "a/b", .link = "c", .type = '2', .mode = 04755, .uid = 7, .gid = 8, .mtime = 1700000000};
	CHECK(tar_header(&in, bytes) == TAR_BLOCK && tar_parse(bytes, &out) == TAR_ENTRY);
	CHECK(strcmp(out.name, "a/b") == 0 && strcmp(out.link, "c") == 0 && out.type == '2' && out.mode == 04755);
	CHECK(out.uid == 7 && out.gid == 8 && out.mtime == 1700000000);
	/* Numbers that octal has no room for. */
	in = (struct tar_entry){.name = "big", .type = '0', .size = 1ULL << 40, .uid = 4000000000U, .mtime = 1LL << 35};
	CHECK(tar_header(&in, bytes) == TAR_BLOCK && tar_parse(bytes, &out) == TAR_ENTRY);
	CHECK(out.size == 1ULL << 40 && out.uid == 4000000000U && out.mtime == 1LL << 35);
	/* 100 bytes fill the field without a NUL; 101 need an entry of their own. */
	memset(in.name, 'n', 100);
	in.name[100] = 0;
	CHECK(tar_header(&in, bytes) == TAR_BLOCK && tar_parse(bytes, &out) == TAR_ENTRY && strcmp(out.name, in.name) == 0);
	memset(in.name, 'n', PATH_MAX - 1);
	memset(in.link, 'l', PATH_MAX - 1);
	size_t n = tar_header(&in, bytes);
	CHECK(n <= TAR_HEADER_MAX && n % TAR_BLOCK == 0 && n > 3 * TAR_BLOCK);
	CHECK(tar_parse(bytes, &out) == TAR_ENTRY && out.type == 'K' && out.size == PATH_MAX);
}

static void damage_is_seen(void)
{
	uint8_t block[TAR_HEADER_MAX], zeros[TAR_BLOCK] = {0};
	CHECK(tar_parse(zeros, &out) == TAR_END);
	in = (struct tar_entry){.name = "x", .type = '0'};
	for (size_t i = 0; i < TAR_BLOCK - 12; i++) {
		tar_header(&in, block);
		block[i] ^= 0x15;
		bool checksum = i >= 148 && i < 156;
		CHECK(tar_parse(block, &out) == TAR_BAD || checksum);
	}
}

static bool pax(const char *text, size_t n)
{
	bool name = false, link = false, size = false;
	out.name[0] = 0;
	return tar_pax(text, n, &out, &name, &link, &size) && (name || link || size);
}

#define PAX(literal) pax(literal, sizeof(literal) - 1)

static void pax_records(void)
{
	CHECK(PAX("12 path=a/b\n") && strcmp(out.name, "a/b") == 0);
	CHECK(PAX("20 atime=1234567890\n12 path=a/c\n") && strcmp(out.name, "a/c") == 0);
	CHECK(PAX("11 size=99\n") && out.size == 99);
	CHECK(!PAX("13 path=a/b\n") && !PAX("11 path=a/b\n") && !PAX("path=a/b\n") && !PAX("99999999 path=a/b\n"));
	CHECK(!PAX("12 path-a/b\n") && !PAX("0 \n") && !PAX("1 \n") && !PAX("12 path=a\0b\n") && !PAX("11 size=-1\n"));
}

/* What contain_open says of a name, below a directory with: sub/, link → /, loop → sub, file. */
static int contain(int base, const char *name)
{
	char leaf[NAME_MAX + 1];
	int fd = contain_open(base, name, leaf);
	if (fd >= 0)
		close(fd);
	return fd < 0 ? fd : 0;
}

static void entries_stay_inside(void)
{
	char place[] = "/tmp/posada-contain-XXXXXX", leaf[NAME_MAX + 1], command[128];
	struct stat a, b;
	CHECK(mkdtemp(place));
	int base = open(place, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CHECK(base >= 0 && mkdirat(base, "sub", 0755) == 0 && symlinkat("/", base, "link") == 0);
	CHECK(symlinkat("sub", base, "loop") == 0 && close(openat(base, "file", O_CREAT | O_WRONLY, 0644)) == 0);
	static const char *const outside[] = {"/etc/passwd", "..", "../x", "sub/../../x", "sub/..", "", "a/../b", "./.."};
	for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
		CHECK(contain(base, outside[i]) == -EPERM);
	static const char *const through[] = {"link/etc", "link/etc/passwd", "loop/x", "file/x", "sub/../link/x"};
	for (size_t i = 0; i < 4; i++)
		CHECK(contain(base, through[i]) == -ELOOP);
	CHECK(contain(base, through[4]) == -EPERM);
	CHECK(contain(base, "link") == 0); /* the link itself may be replaced */
	int fd = contain_open(base, "./sub//new/./leaf/", leaf);
	CHECK(fd >= 0 && strcmp(leaf, "leaf") == 0);
	CHECK(fstat(fd, &a) == 0 && fstatat(base, "sub/new", &b, 0) == 0 && a.st_ino == b.st_ino);
	close(fd);
	fd = contain_open(base, "./", leaf);
	CHECK(fd >= 0 && !*leaf);
	close(fd);
	char longest[NAME_MAX + 3];
	memset(longest, 'x', sizeof longest - 1);
	longest[sizeof longest - 1] = 0;
	CHECK(contain(base, longest) == -ENAMETOOLONG);
	close(base);
	snprintf(command, sizeof command, "rm -rf %s", place);
	CHECK(system(command) == 0);
}

int main(void)
{
	headers_come_back();
	damage_is_seen();
	pax_records();
	entries_stay_inside();
	return 0;
}
