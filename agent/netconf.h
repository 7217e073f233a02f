/* Network interfaces by ioctl: no netlink, no tools. */
#ifndef POSADA_NETCONF_H
#define POSADA_NETCONF_H

#include <stddef.h>

/* lo up; eth0 (the first card) with address/prefix and default gateway, each of which may be NULL. */
void net_start(const char *address, const char *gateway);
/* /etc/resolv.conf, where it is missing, empty or a dangling link. Servers separated by commas. */
void net_resolver(const char *servers);
/* The names of the network cards (what has a device), in the order the kernel found them. Returns how many. */
size_t net_cards(char names[][16], size_t most);

#endif
