#include "listen.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "link.h"

static struct watch door;

static void door_ready(struct watch *w, uint32_t events)
{
	(void)events;
	int fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd >= 0 && !link_open(fd, false))
		close(fd);
}

int listen_open(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	/* Made beside it and renamed: whoever sees the socket can connect to it, which is not so between bind and listen. */
	int n = snprintf(address.sun_path, sizeof address.sun_path, "%s.new", path);
	if (n >= (int)sizeof address.sun_path)
		return -ENAMETOOLONG;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	unlink(address.sun_path);
	if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 8) < 0 || rename(address.sun_path, path) < 0) {
		int error = errno;
		close(fd);
		return -error;
	}
	door = (struct watch){.fd = fd, .ready = door_ready};
	watch_set(&door, EPOLLIN);
	return 0;
}
