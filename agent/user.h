/* Users and groups from /etc/passwd and /etc/group. Not from libc: no NSS, no nscd, and bounded. */
#ifndef POSADA_USER_H
#define POSADA_USER_H

#include <sys/types.h>

#define MAX_GROUPS 64

struct user {
	uid_t uid;
	gid_t gid;
	gid_t groups[MAX_GROUPS];
	size_t group_count;
	char name[64], home[256], shell[256];
};

/*
 * spec: NULL for root, else "name", "uid", "name:group", "uid:gid". A number need not be in the file. Returns 0, or -ENOENT
 * for a name that is not there.
 */
int user_find(const char *spec, struct user *u);

#endif
