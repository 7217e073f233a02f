#include "listen.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "link.h"

static struct watch door, vsock_door;

static void door_ready(struct watch *w, uint32_t events)
{
	(void)events;
	int fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd >= 0 && !link_open(fd, false))
		close(fd);
}

/* Only the host is served: any process of the guest could connect here too (by loopback), and would be root. */
static void vsock_ready(struct watch *w, uint32_t events)
{
	struct sockaddr_vm peer = {0};
	socklen_t size = sizeof peer;
	(void)events;
	int fd = accept4(w->fd, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd >= 0 && (peer.svm_cid != VMADDR_CID_HOST || !link_open(fd, false)))
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

/* The host has its clients wait until somebody listens; a call for its own port of that number says that it is so. */
static void knock(unsigned port)
{
	struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return;
	connect(fd, (struct sockaddr *)&host, sizeof host);
	close(fd);
}

int listen_vsock(unsigned port)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 8) < 0) {
		int error = errno;
		close(fd);
		return -error;
	}
	vsock_door = (struct watch){.fd = fd, .ready = vsock_ready};
	watch_set(&vsock_door, EPOLLIN);
	knock(port);
	return 0;
}
