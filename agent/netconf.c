#include "netconf.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util.h"

static int name_it(struct ifreq *r, const char *name)
{
	memset(r, 0, sizeof *r);
	size_t n = strlen(name);
	if (n >= sizeof r->ifr_name)
		return -ENAMETOOLONG;
	memcpy(r->ifr_name, name, n + 1);
	return 0;
}

static void up(int fd, const char *name)
{
	struct ifreq r;
	if (name_it(&r, name) < 0 || ioctl(fd, SIOCGIFFLAGS, &r) < 0)
		return;
	r.ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &r) < 0)
		say("posada-agent: %s: %s", name, strerror(errno));
}

static int set_address(int fd, const char *name, unsigned long request, uint32_t address)
{
	struct ifreq r;
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
	int error = name_it(&r, name);
	memcpy(&r.ifr_addr, &in, sizeof in);
	if (error == 0 && ioctl(fd, (int)request, &r) < 0)
		error = -errno;
	return error;
}

/* "10.0.2.15/24" */
static int configure(int fd, const char *name, const char *spec)
{
	char text[32];
	struct in_addr address;
	snprintf(text, sizeof text, "%s", spec);
	char *slash = strchr(text, '/');
	long prefix = slash ? strtol(slash + 1, NULL, 10) : 24;
	if (slash)
		*slash = 0;
	if (inet_pton(AF_INET, text, &address) != 1 || prefix < 1 || prefix > 32)
		return -EINVAL;
	int r = set_address(fd, name, SIOCSIFADDR, address.s_addr);
	return r < 0 ? r : set_address(fd, name, SIOCSIFNETMASK, htonl(0xffffffffU << (32 - prefix)));
}

static int default_route(int fd, char *name, const char *gateway)
{
	struct sockaddr_in any = {.sin_family = AF_INET}, via = any;
	struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = name};
	if (inet_pton(AF_INET, gateway, &via.sin_addr) != 1)
		return -EINVAL;
	memcpy(&route.rt_dst, &any, sizeof any);
	memcpy(&route.rt_genmask, &any, sizeof any);
	memcpy(&route.rt_gateway, &via, sizeof via);
	return ioctl(fd, (int)SIOCADDRT, &route) < 0 && errno != EEXIST ? -errno : 0;
}

static int by_index(const void *a, const void *b)
{
	unsigned x = if_nametoindex(a), y = if_nametoindex(b);
	return x < y ? -1 : x > y;
}

size_t net_cards(char names[][16], size_t most)
{
	size_t n = 0;
	DIR *dir = opendir("/sys/class/net");
	for (struct dirent *e; dir && n < most && (e = readdir(dir));) {
		char path[300];
		if (e->d_name[0] == '.' || strlen(e->d_name) > 15)
			continue;
		snprintf(path, sizeof path, "/sys/class/net/%s/device", e->d_name);
		if (access(path, F_OK) == 0)
			strcpy(names[n++], e->d_name);
	}
	if (dir)
		closedir(dir);
	qsort(names, n, sizeof names[0], by_index);
	return n;
}

void net_start(const char *address, const char *gateway)
{
	char cards[8][16];
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	up(fd, "lo");
	if (address && net_cards(cards, COUNT(cards))) {
		int r = configure(fd, cards[0], address);
		up(fd, cards[0]);
		if (r == 0 && gateway)
			r = default_route(fd, cards[0], gateway);
		if (r < 0)
			say("posada-agent: network %s gateway %s: %s", address, gateway ? gateway : "-", strerror(-r));
	}
	close(fd);
}

void net_resolver(const char *servers)
{
	const char *path = "/etc/resolv.conf";
	char text[512] = "";
	struct stat st;
	if (stat(path, &st) == 0 && st.st_size > 0)
		return;
	if (lstat(path, &st) == 0 && S_ISLNK(st.st_mode))
		unlink(path);
	for (const char *p = servers; *p;) {
		int n = (int)strcspn(p, ",");
		size_t used = strlen(text);
		snprintf(text + used, sizeof text - used, "nameserver %.*s\n", n, p);
		p += n + (p[n] == ',');
	}
	int r = replace_text(path, text, 0644);
	if (r < 0 && r != -EROFS)
		say("posada-agent: %s: %s", path, strerror(-r));
}
