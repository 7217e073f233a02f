/* Paths of an archive, kept below one directory whatever they say. */
#ifndef POSADA_CONTAIN_H
#define POSADA_CONTAIN_H

#include <limits.h>

/*
 * Opens the directory an entry lies in, going down from base by one component at a time, never through a symlink, and
 * making what is missing (0755). leaf (NAME_MAX+1 bytes) gets the last component; "" where name is base itself.
 * Returns a descriptor, or -EPERM where name is absolute or has "..", -ELOOP where a component is no directory (a symlink,
 * above all), -ENAMETOOLONG, or another -errno.
 */
int contain_open(int base, const char *name, char *leaf);

#endif
