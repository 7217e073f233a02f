#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "init.h"
#include "modules.h"
#include "netconf.h"
#include "util.h"

/* States that end by themselves and can carry nothing: TIME_WAIT, CLOSE. LISTEN is no connection. */
static bool carries(unsigned state)
{
	return state != TCP_TIME_WAIT && state != TCP_CLOSE && state != TCP_LISTEN;
}

static bool is_loopback(const uint32_t *a, bool six)
{
	if (!six)
		return (ntohl(a[0]) >> 24) == 127;
	if (a[0] || a[1])
		return false;
	return (a[2] == 0 && a[3] == htonl(1)) || (a[2] == htonl(0xffff) && (ntohl(a[3]) >> 24) == 127);
}

/* To itself: over loopback, or from one of its addresses to the same. */
static bool is_local(const uint32_t *from, const uint32_t *to, bool six)
{
	return is_loopback(to, six) || memcmp(from, to, six ? 16 : 4) == 0;
}

/* The kernel prints addresses as words in host order. */
static bool read_words(const char *text, uint32_t *words, bool six)
{
	for (int i = 0; i < (six ? 4 : 1); i++)
		if (sscanf(text + 8 * i, "%8x", &words[i]) != 1)
			return false;
	return true;
}

/* Whether /proc/net/tcp lists a connection with another host. This needs no module, and most forks have none. */
static bool foreign_in(const char *path, bool six)
{
	char line[512], from[40], to[40];
	unsigned state;
	uint32_t a[4], b[4];
	bool found = false;
	FILE *file = fopen(path, "re");
	while (file && !found && fgets(line, sizeof line, file)) {
		if (sscanf(line, " %*u: %39[0-9A-F]:%*x %39[0-9A-F]:%*x %x", from, to, &state) != 3)
			continue;
		found = carries(state) && read_words(from, a, six) && read_words(to, b, six) && !is_local(a, b, six);
	}
	if (file)
		fclose(file);
	return found;
}

static bool foreign(void)
{
	return foreign_in("/proc/net/tcp", false) || foreign_in("/proc/net/tcp6", true);
}

struct request {
	struct nlmsghdr header;
	struct inet_diag_req_v2 body;
};

static int ask(int fd, uint8_t family, uint16_t type, uint16_t flags, const struct inet_diag_msg *one)
{
	struct request r = {
		.header = {.nlmsg_len = sizeof r, .nlmsg_type = type, .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags)},
		.body = {.sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~0U},
	};
	if (one)
		r.body.id = one->id;
	return send(fd, &r, sizeof r, 0) < 0 ? -errno : 0;
}

static int destroy(int fd, const struct inet_diag_msg *one)
{
	char answer[512];
	int r = ask(fd, one->idiag_family, SOCK_DESTROY, NLM_F_ACK, one);
	ssize_t n = r < 0 ? 0 : recv(fd, answer, sizeof answer, 0);
	const struct nlmsghdr *h = (const void *)answer;
	if (r == 0 && n >= (ssize_t)(sizeof *h + sizeof(struct nlmsgerr)) && h->nlmsg_type == NLMSG_ERROR)
		r = ((const struct nlmsgerr *)NLMSG_DATA(h))->error;
	return r == -ENOENT ? 0 : r; /* it has gone by itself */
}

/* Lists the sockets of a family on one descriptor, and destroys the foreign ones by another. */
static int destroy_family(int list, int kill, uint8_t family)
{
	static char buffer[32768] __attribute__((aligned(8)));
	int r = ask(list, family, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, NULL), result = 0;
	while (r == 0) {
		ssize_t n = recv(list, buffer, sizeof buffer, 0);
		if (n < 0)
			return -errno;
		for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, n); h = NLMSG_NEXT(h, n)) {
			if (h->nlmsg_type == NLMSG_DONE)
				return result;
			if (h->nlmsg_type == NLMSG_ERROR)
				return ((struct nlmsgerr *)NLMSG_DATA(h))->error;
			const struct inet_diag_msg *m = NLMSG_DATA(h);
			if (!carries(m->idiag_state) || is_local(m->id.idiag_src, m->id.idiag_dst, family == AF_INET6))
				continue;
			int error = destroy(kill, m);
			if (error < 0 && result == 0)
				result = error;
		}
	}
	return r;
}

static int destroy_all(void)
{
	int list = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	int kill = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	int r = list < 0 || kill < 0 ? -errno : destroy_family(list, kill, AF_INET);
	if (r == 0) {
		r = destroy_family(list, kill, AF_INET6);
		if (r == -ENOENT || r == -EAFNOSUPPORT)
			r = 0; /* no IPv6 */
	}
	if (list >= 0)
		close(list);
	if (kill >= 0)
		close(kill);
	return r;
}

int sockets_destroy_foreign(const char **note)
{
	if (!foreign()) {
		*note = "there were none";
		return 0;
	}
	int dir = initramfs_fd < 0 ? -1 : openat(initramfs_fd, "modules", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir >= 0) {
		modules_load_rare(dir);
		close(dir);
	}
	/* With the cards down no RST leaves: the source's peer must not take it for the source's. */
	struct net_pause p;
	net_pause(&p);
	int r = destroy_all();
	net_resume(&p);
	return r == 0 && foreign() ? -EBUSY : r;
}
