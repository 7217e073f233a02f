#include "folders.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>

#include "cmdline.h"
#include "util.h"

static char why[256];

static const char *refuse(const char *tag, const char *target, int error)
{
	snprintf(why, sizeof why, "cannot mount %s at %s: %s%s", tag, target, strerror(error),
		 error == ENODEV ? " (the image has no virtiofs module: build it again)" : "");
	return why;
}

const char *folders_mount(void)
{
	const char *failed = NULL;
	for (unsigned i = 0;; i++) {
		char key[32], target[256];
		snprintf(key, sizeof key, "posada.folder%u", i);
		const char *given = cmdline_get(key, NULL), *tag = key + strlen("posada.");
		if (!given)
			return failed;
		snprintf(target, sizeof target, "%s", given);
		char *option = strchr(target, ':');
		if (option)
			*option++ = 0;
		unsigned long flags = MS_NOSUID | MS_NODEV | (option && strcmp(option, "ro") == 0 ? MS_RDONLY : 0);
		int r = make_dirs(target, 0755);
		/* A root that is read-only must have the directory already. */
		if (r < 0 && r != -EROFS)
			failed = refuse(tag, target, -r);
		else if (mount(tag, target, "virtiofs", flags, NULL) < 0)
			failed = refuse(tag, target, errno);
	}
}
