#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

static void load(int dir, const char *path)
{
	int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
		say("posada-agent: module %s: %s", path, strerror(errno));
	close(fd);
}

void modules_load(int dir, const char *list)
{
	static char text[16384];
	int fd = openat(dir, list, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	text[n < 0 ? 0 : n] = 0;
	for (char *rest = text, *line; (line = strsep(&rest, "\n"));)
		if (*line && *line != '#')
			load(dir, line);
}
