/* Network interfaces by ioctl: no netlink, no tools. */
#ifndef POSADA_NETCONF_H
#define POSADA_NETCONF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* lo up; eth0 (the first card) with address/prefix and default gateway, each of which may be NULL. */
void net_start(const char *address, const char *gateway);
/* /etc/resolv.conf, where it is missing, empty or a dangling link. Servers separated by commas. */
void net_resolver(const char *servers);
/* The names of the network cards (what has a device), in the order the kernel found them. Returns how many. */
size_t net_cards(char names[][16], size_t most);

/* Gives the cards these addresses, in the order of net_cards; fewer or more of either are no error. Returns 0 or -errno. */
int net_set_macs(const uint8_t (*macs)[6], size_t count);

#define NET_CARDS 8

/* Takes the cards down and remembers what going up again will not bring back by itself. */
struct net_pause {
	char cards[NET_CARDS][16];
	bool was_up[NET_CARDS];
	size_t count;
	char routes[4096]; /* /proc/net/route */
};

void net_pause(struct net_pause *p);
void net_resume(struct net_pause *p);

#endif
