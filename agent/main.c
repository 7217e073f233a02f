/*
 * posada-agent: runs inside a guest and does what the host asks over a byte channel. docs/AGENT-PROTOCOL.md is the contract.
 *
 *   as PID 1                    boots the guest first (init.c)
 *   --ports                     serves the virtio ports of a system that is already running
 *   --listen PATH               serves a unix socket; what changes the machine is refused, unless …
 *   --test-root DIR             … it is to be changed below DIR only
 *   --version
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "cgroup.h"
#include "exec.h"
#include "init.h"
#include "job.h"
#include "listen.h"
#include "ports.h"
#include "power.h"
#include "util.h"

static void child_ended(pid_t pid, int status)
{
	if (pid == 0)
		power_alone();
	else if (!exec_reaped(pid, status))
		job_reaped(pid, status);
}

/* The agent's own standard descriptors: nothing it opens may become 0, 1 or 2, and nobody types at it. */
static void settle_descriptors(void)
{
	int fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd < 2)
		fd = dup(fd);
	if (fd > 2)
		close(fd);
}

static int usage(void)
{
	say("usage: posada-agent --ports | --listen PATH [--test-root DIR] | --version");
	return 2;
}

int main(int argc, char **argv)
{
	const char *path = NULL;
	bool ports = false;
	for (int i = 1; i < argc && getpid() != 1; i++) {
		if (strcmp(argv[i], "--listen") == 0 && i + 1 < argc)
			path = argv[++i];
		else if (strcmp(argv[i], "--test-root") == 0 && i + 1 < argc)
			test_root = argv[++i];
		else if (strcmp(argv[i], "--ports") == 0)
			ports = true;
		else if (strcmp(argv[i], "--version") == 0)
			return printf("posada-agent %s\n", AGENT_VERSION) < 0;
		else
			return usage();
	}
	umask(022);
	loop_child = child_ended;
	loop_idle = links_turn;
	loop_signal = power_signal;
	if (getpid() == 1) {
		in_guest = true;
		init_run();
	} else if (ports) {
		in_guest = true;
		settle_descriptors();
		loop_init();
		cgroups_init();
		if (!ports_open()) {
			say("posada-agent: there is no virtio port named org.posada.agent.*");
			return 1;
		}
	} else if (path) {
		in_guest = *test_root != 0;
		settle_descriptors();
		loop_init();
		int r = listen_open(path);
		if (r < 0) {
			say("posada-agent: cannot listen on %s: %s", path, strerror(-r));
			return 1;
		}
	} else {
		return usage();
	}
	loop_run();
}
