#include "sshkeys.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "job.h"
#include "util.h"

#define DIRECTORY "/etc/ssh"
#define KEYGEN "/usr/bin/ssh-keygen"

static void (*renewed)(int error, const char *note);
static bool more;

/* Returns how many private keys there were, or -errno. */
static int remove_keys(void)
{
	int keys = 0;
	DIR *dir = opendir(rooted(DIRECTORY));
	if (!dir)
		return errno == ENOENT ? 0 : -errno;
	for (struct dirent *e; (e = readdir(dir));) {
		size_t n = strlen(e->d_name);
		bool private = n > 4 && strcmp(e->d_name + n - 4, "_key") == 0;
		bool public = n > 8 && strcmp(e->d_name + n - 8, "_key.pub") == 0;
		if (strncmp(e->d_name, "ssh_host_", 9) != 0 || (!private && !public))
			continue;
		if (unlinkat(dirfd(dir), e->d_name, 0) < 0) {
			int error = errno;
			closedir(dir);
			return -error;
		}
		keys += private;
	}
	closedir(dir);
	return keys;
}

static int make_ed25519(void *data)
{
	(void)data;
	execl(KEYGEN, KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", rooted(DIRECTORY "/ssh_host_ed25519_key"), (char *)NULL);
	return errno;
}

static int make_all(void *data)
{
	(void)data;
	if (*test_root)
		execl(KEYGEN, KEYGEN, "-A", "-f", test_root, (char *)NULL);
	else
		execl(KEYGEN, KEYGEN, "-A", (char *)NULL);
	return errno;
}

static void ed25519_made(void *data, int error)
{
	(void)data;
	more = error == 0;
	renewed(error ? EIO : 0, NULL);
}

static void all_made(void *data, int error)
{
	(void)data;
	if (error)
		say("posada-agent: ssh-keygen -A failed");
}

void sshkeys_renew(void (*done)(int error, const char *note))
{
	int keys = remove_keys();
	more = false;
	if (keys < 0) {
		done(-keys, NULL);
	} else if (keys == 0) {
		done(0, "the guest has none");
	} else if (access(KEYGEN, X_OK) < 0) {
		done(0, "removed; there is no ssh-keygen to make new ones");
	} else {
		renewed = done;
		job_start(&(struct job){.work = make_ed25519, .done = ed25519_made, .keep_fd = -1});
	}
}

void sshkeys_rest(void)
{
	if (more)
		job_start(&(struct job){.work = make_all, .done = all_made, .keep_fd = -1});
	more = false;
}
