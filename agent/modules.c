#include "modules.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "buf.h"
#include "util.h"

/* inet_diag: destroys inherited connections (sockets.c). */
static const char *const rare[] = {"inet_diag.ko", "tcp_diag.ko"};

static const char *file_name(const char *path)
{
	const char *slash = strrchr(path, '/');
	return slash ? slash + 1 : path;
}

/* How the alias of a device begins, and the bus that lists it. */
static struct bus {
	const char *prefix, *path;
	struct buf aliases; /* of all its devices, each ended by NUL; read when a module asks first: the bus's own comes before */
} buses[] = {
	{"virtio:", "/sys/bus/virtio/devices", {0}},
	{"pci:", "/sys/bus/pci/devices", {0}},
	{"acpi", "/sys/bus/platform/devices", {0}},
	{"of:", "/sys/bus/platform/devices", {0}},
};

static void read_aliases(struct bus *bus)
{
	DIR *dir = opendir(bus->path);
	for (struct dirent *e; dir && (e = readdir(dir));) {
		char path[320], alias[256];
		snprintf(path, sizeof path, "%s/%s/modalias", bus->path, e->d_name);
		if (e->d_name[0] != '.' && read_line(path, alias, sizeof alias) > 0)
			buf_append(&bus->aliases, alias, strlen(alias) + 1);
	}
	if (dir)
		closedir(dir);
	buf_append(&bus->aliases, "", 1);
}

/* This machine has a device of that pattern. One of a bus not known here might be there. */
static bool has_device(const char *pattern)
{
	for (size_t i = 0; i < COUNT(buses); i++) {
		if (strncmp(pattern, buses[i].prefix, strlen(buses[i].prefix)) != 0)
			continue;
		if (!buses[i].aliases.len)
			read_aliases(&buses[i]);
		for (const char *alias = (char *)buf_head(&buses[i].aliases); *alias; alias += strlen(alias) + 1)
			if (fnmatch(pattern, alias, 0) == 0)
				return true;
		return false;
	}
	return true;
}

/* patterns: what is left of the module's line. */
static bool is_wanted(char *patterns)
{
	if (!patterns)
		return true;
	for (char *pattern; (pattern = strsep(&patterns, " "));)
		if (*pattern && has_device(pattern))
			return true;
	return false;
}

static bool is_rare(const char *path)
{
	const char *name = file_name(path);
	for (size_t i = 0; i < COUNT(rare); i++)
		if (strcmp(name, rare[i]) == 0)
			return true;
	return false;
}

static void load(int dir, const char *path)
{
	int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
		say("posada-agent: module %s: %s", path, strerror(errno));
	close(fd);
	timing_step(path);
}

static void load_listed(int dir, bool rare_ones)
{
	static char text[16384];
	int fd = openat(dir, "order", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	text[n < 0 ? 0 : n] = 0;
	for (char *rest = text, *line; (line = strsep(&rest, "\n"));) {
		if (strncmp(line, "/modules/", 9) == 0)
			line += 9; /* the root may be another by now */
		const char *path = strsep(&line, " ");
		if (*path && is_rare(path) == rare_ones && is_wanted(line))
			load(dir, path);
	}
}

void modules_load(int dir)
{
	load_listed(dir, false);
}

void modules_load_rare(int dir)
{
	load_listed(dir, true);
}
