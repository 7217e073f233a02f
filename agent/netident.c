/* What a fork's identity changes on the network cards. */
#include <errno.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "netconf.h"
#include "util.h"

static int set_up(int fd, const char *name, bool up, bool *was_up)
{
	struct ifreq r = {0};
	memcpy(r.ifr_name, name, sizeof r.ifr_name);
	if (ioctl(fd, SIOCGIFFLAGS, &r) < 0)
		return -errno;
	if (was_up)
		*was_up = r.ifr_flags & IFF_UP;
	r.ifr_flags = (short)(up ? r.ifr_flags | IFF_UP : r.ifr_flags & ~IFF_UP);
	return ioctl(fd, SIOCSIFFLAGS, &r) < 0 ? -errno : 0;
}

void net_pause(struct net_pause *p)
{
	*p = (struct net_pause){0};
	read_text("/proc/net/route", p->routes, sizeof p->routes);
	p->count = net_cards(p->cards, NET_CARDS);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	for (size_t i = 0; i < p->count && fd >= 0; i++)
		set_up(fd, p->cards[i], false, &p->was_up[i]);
	if (fd >= 0)
		close(fd);
}

/* "eth0<tab>0002000A<tab>": the card and the destination, as a line of /proc/net/route begins. */
static size_t route_key(const char *line)
{
	const char *tab = strchr(line, '\t');
	tab = tab ? strchr(tab + 1, '\t') : NULL;
	return tab ? (size_t)(tab - line) + 1 : 0;
}

/* Addresses and the routes to their networks come back with the card; the others must be put back. */
static void put_route_back(int fd, const char *line)
{
	char card[16];
	unsigned destination, gateway, flags, mask;
	int metric;
	struct sockaddr_in in = {.sin_family = AF_INET};
	if (sscanf(line, "%15s %x %x %x %*d %*d %d %x", card, &destination, &gateway, &flags, &metric, &mask) != 6)
		return;
	struct rtentry route = {.rt_flags = (unsigned short)flags, .rt_dev = card, .rt_metric = (short)(metric + 1)};
	in.sin_addr.s_addr = destination;
	memcpy(&route.rt_dst, &in, sizeof in);
	in.sin_addr.s_addr = mask;
	memcpy(&route.rt_genmask, &in, sizeof in);
	in.sin_addr.s_addr = gateway;
	memcpy(&route.rt_gateway, &in, sizeof in);
	if (ioctl(fd, (int)SIOCADDRT, &route) < 0 && errno != EEXIST)
		say("posada-agent: route by %s: %s", card, strerror(errno));
}

void net_resume(struct net_pause *p)
{
	char now[sizeof p->routes], key[64];
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	for (size_t i = 0; i < p->count; i++)
		if (p->was_up[i])
			set_up(fd, p->cards[i], true, NULL);
	read_text("/proc/net/route", now, sizeof now);
	for (char *rest = p->routes, *line; (line = strsep(&rest, "\n"));) {
		size_t n = route_key(line);
		snprintf(key, sizeof key, "\n%.*s", (int)n, line);
		if (n && !strstr(now, key))
			put_route_back(fd, line);
	}
	close(fd);
}

/* Its IPv6 addresses are made of the old MAC: off and on again, and there are new ones. */
static void renew_ipv6(const char *name)
{
	char path[80], text[8];
	snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", name);
	if (read_line(path, text, sizeof text) < 1 || *text != '0')
		return;
	write_text(path, "1");
	write_text(path, "0");
}

static int set_mac(int fd, const char *name, const uint8_t mac[6])
{
	struct ifreq r = {0};
	memcpy(r.ifr_name, name, sizeof r.ifr_name);
	if (ioctl(fd, SIOCGIFHWADDR, &r) < 0)
		return -errno;
	if (r.ifr_hwaddr.sa_family != ARPHRD_ETHER || memcmp(r.ifr_hwaddr.sa_data, mac, 6) == 0)
		return 0;
	memcpy(r.ifr_hwaddr.sa_data, mac, 6);
	if (ioctl(fd, SIOCSIFHWADDR, &r) < 0)
		return -errno;
	renew_ipv6(name);
	return 0;
}

int net_set_macs(const uint8_t (*macs)[6], size_t count)
{
	char cards[NET_CARDS][16];
	size_t n = net_cards(cards, NET_CARDS);
	int r = 0, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	for (size_t i = 0; i < n && i < count && r == 0; i++) {
		r = set_mac(fd, cards[i], macs[i]); /* virtio cards can while they are up, and then keep their routes */
		if (r != -EBUSY)
			continue;
		struct net_pause p;
		net_pause(&p);
		r = set_mac(fd, cards[i], macs[i]);
		net_resume(&p);
	}
	close(fd);
	return r;
}
