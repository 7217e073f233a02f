#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cmdline.h"
#include "util.h"

/* inet_diag: destroys inherited connections (sockets.c). */
static const char *const rare[] = {"inet_diag.ko", "tcp_diag.ko"};

static const char *file_name(const char *path)
{
	const char *slash = strrchr(path, '/');
	return slash ? slash + 1 : path;
}

/* Modules of channels and buses that this machine does not have. */
static bool is_idle(const char *path)
{
	const char *name = file_name(path);
	bool vsock = cmdline_get("posada.vsock", NULL) != NULL;
	return !vsock && (strncmp(name, "vsock", 5) == 0 || strncmp(name, "vmw_vsock", 9) == 0);
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
		if (*line && is_rare(line) == rare_ones && !is_idle(line))
			load(dir, line);
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
