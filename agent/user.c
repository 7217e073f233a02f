#include "user.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

/* Splits a line at ':' in place. Returns the number of fields, at most `most`. */
static size_t split(char *line, char **fields, size_t most)
{
	size_t n = 0;
	line[strcspn(line, "\n")] = 0;
	for (char *field; n < most && (field = strsep(&line, ":"));)
		fields[n++] = field;
	return n;
}

static bool number(const char *text, unsigned *n)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);
	if (*text < '0' || *text > '9' || *end || value > 0xfffffffeUL)
		return false;
	*n = (unsigned)value;
	return true;
}

static void copy(char *to, size_t cap, const char *from)
{
	snprintf(to, cap, "%s", from);
}

/* Finds by name or, where the name is a number, by uid. */
static bool passwd_find(const char *who, struct user *u)
{
	char line[1024], *f[7];
	unsigned wanted = 0, uid, gid;
	bool by_uid = number(who, &wanted), found = false;
	FILE *file = fopen("/etc/passwd", "re");
	while (file && !found && fgets(line, sizeof line, file)) {
		if (split(line, f, COUNT(f)) < 7 || !number(f[2], &uid) || !number(f[3], &gid))
			continue;
		found = by_uid ? uid == wanted : strcmp(f[0], who) == 0;
		if (!found)
			continue;
		u->uid = uid;
		u->gid = gid;
		copy(u->name, sizeof u->name, f[0]);
		copy(u->home, sizeof u->home, f[5]);
		copy(u->shell, sizeof u->shell, f[6]);
	}
	if (file)
		fclose(file);
	return found;
}

static bool member(char *list, const char *name)
{
	for (char *one; (one = strsep(&list, ","));)
		if (strcmp(one, name) == 0)
			return true;
	return false;
}

/* Fills the supplementary groups of u->name; or, where `group` is given, finds that group only. */
static bool group_read(struct user *u, const char *group)
{
	static char line[16384]; /* a group may have many members; what is longer is read as several lines, and skipped */
	char *f[4];
	unsigned gid;
	bool found = false;
	FILE *file = fopen("/etc/group", "re");
	while (file && fgets(line, sizeof line, file)) {
		if (split(line, f, COUNT(f)) < 4 || !number(f[2], &gid))
			continue;
		if (group && strcmp(f[0], group) == 0) {
			u->gid = gid;
			found = true;
			break;
		}
		if (!group && gid != u->gid && u->group_count < MAX_GROUPS && member(f[3], u->name))
			u->groups[u->group_count++] = gid;
	}
	if (file)
		fclose(file);
	return found;
}

int user_find(const char *spec, struct user *u)
{
	char who[64];
	unsigned gid;
	*u = (struct user){.home = "/", .shell = "/bin/sh"};
	if (spec && *spec)
		copy(who, sizeof who, spec);
	else
		snprintf(who, sizeof who, "%u", geteuid());
	char *group = strchr(who, ':');
	if (group)
		*group++ = 0;
	if (!passwd_find(who, u)) {
		unsigned uid;
		if (!number(who, &uid))
			return -ENOENT;
		u->uid = uid;
		copy(u->name, sizeof u->name, uid == 0 ? "root" : who);
	}
	u->groups[u->group_count++] = u->gid;
	if (!group) {
		if (u->uid != 0)
			group_read(u, NULL);
		else
			u->groups[0] = u->gid;
	} else if (number(group, &gid)) {
		u->gid = gid;
	} else if (!group_read(u, group)) {
		return -ENOENT;
	}
	u->groups[0] = u->gid;
	return 0;
}
