#include "power.h"

#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "agent.h"
#include "calls.h"
#include "cgroup.h"
#include "loop.h"
#include "util.h"

#define TERM_MS 3000 /* between SIGTERM and SIGKILL */
#define KILL_MS 1000 /* what SIGKILL does not end by then (a process stuck in the kernel) is left behind */

static enum { STAYING, TERMINATING, KILLING } phase;
static int command; /* of reboot(2) */
static struct timer timer;

/* Everything that has a disk below it, last mounted first; the root can only become read-only. */
static void unmount_all(void)
{
	char *targets[256];
	size_t n = 0;
	FILE *mounts = setmntent("/proc/self/mounts", "re");
	for (struct mntent *m; mounts && n < COUNT(targets) && (m = getmntent(mounts));)
		if (m->mnt_fsname[0] == '/' && strcmp(m->mnt_dir, "/") != 0)
			targets[n++] = xstrdup(m->mnt_dir);
	if (mounts)
		endmntent(mounts);
	while (n--)
		umount2(targets[n], MNT_DETACH);
	mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
}

static void end(void)
{
	sync();
	unmount_all();
	links_drain(200);
	reboot(command);
	say("posada-agent: reboot(2): %s", strerror(errno));
	_exit(1);
}

static void next_phase(struct timer *t)
{
	if (phase != TERMINATING)
		end();
	phase = KILLING;
	kill(-1, SIGKILL);
	timer_set(t, KILL_MS);
}

void power_alone(void)
{
	if (phase != STAYING)
		end();
}

/* The image's own init ends its services, and the machine. */
static int ask_init(bool off)
{
	if (access("/run/systemd/system", F_OK) == 0)
		return kill(1, 34 + (off ? 4 : 5)); /* systemd(1), SIGNALS; glibc's SIGRTMIN is 34 */
	return kill(1, off ? SIGUSR2 : SIGTERM); /* busybox init and its kin */
}

static void begin(bool off)
{
	if (*test_root || phase != STAYING)
		return;
	if (!is_init) {
		cgroups_thaw();
		ask_init(off);
		return;
	}
	phase = TERMINATING;
	command = off ? RB_POWER_OFF : RB_AUTOBOOT;
	cgroups_thaw(); /* a stopped process could not end */
	kill(-1, SIGTERM);
	kill(-1, SIGCONT);
	timer.fire = next_phase;
	timer_set(&timer, TERM_MS);
	loop_reap();
}

int call_poweroff(struct call *c)
{
	call_done(c->to);
	links_drain(200);
	begin(true);
	return CALL_LATER;
}

int call_reboot(struct call *c)
{
	call_done(c->to);
	links_drain(200);
	begin(false);
	return CALL_LATER;
}

void power_signal(int signal)
{
	if (!is_init) {
		if (signal == SIGTERM || signal == SIGINT)
			exit(0);
		return;
	}
	begin(signal == SIGUSR1 || signal == SIGUSR2 || signal == SIGPWR || signal == 34 + 4);
}
