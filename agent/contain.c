#include "contain.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* One step down. The caller's descriptor is closed. */
static int down(int dir, const char *name)
{
	const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
	int next = openat(dir, name, flags);
	if (next < 0 && errno == ENOENT) {
		if (mkdirat(dir, name, 0755) == 0 || errno == EEXIST)
			next = openat(dir, name, flags);
	}
	int error = errno;
	close(dir);
	if (next >= 0)
		return next;
	return error == ENOTDIR ? -ELOOP : -error;
}

int contain_open(int base, const char *name, char *leaf)
{
	if (*name == '/' || !*name)
		return -EPERM;
	*leaf = 0;
	int dir = fcntl(base, F_DUPFD_CLOEXEC, 3);
	if (dir < 0)
		return -errno;
	for (const char *p = name; *p;) {
		size_t n = strcspn(p, "/");
		int error = 0;
		if (n > NAME_MAX)
			error = -ENAMETOOLONG;
		else if (n == 2 && p[0] == '.' && p[1] == '.')
			error = -EPERM;
		if (error) {
			close(dir);
			return error;
		}
		if (n && !(n == 1 && *p == '.')) {
			/* Only now is it known that the component before was not the last. */
			if (*leaf && (dir = down(dir, leaf)) < 0)
				return dir;
			memcpy(leaf, p, n);
			leaf[n] = 0;
		}
		p += n;
		p += strspn(p, "/");
	}
	return dir;
}
