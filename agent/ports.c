#include "ports.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "link.h"
#include "util.h"

#define SYSFS "/sys/class/virtio-ports"
#define NAME "org.posada.agent."

int ports_open(void)
{
	int opened = 0;
	DIR *dir = opendir(SYSFS);
	for (struct dirent *e; dir && (e = readdir(dir));) {
		char path[320], name[64];
		if (e->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, SYSFS "/%s/name", e->d_name);
		if (read_line(path, name, sizeof name) < 0 || strncmp(name, NAME, strlen(NAME)) != 0)
			continue;
		snprintf(path, sizeof path, "/dev/%s", e->d_name);
		int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
		if (fd < 0)
			continue;
		if (link_open(fd, true))
			opened++;
		else
			close(fd);
	}
	if (dir)
		closedir(dir);
	return opened;
}
