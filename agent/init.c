#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "cgroup.h"
#include "cmdline.h"
#include "folders.h"
#include "listen.h"
#include "modules.h"
#include "netconf.h"
#include "ports.h"
#include "util.h"

#define ROOT "/root"
#define DEVICE_MS 10000 /* a disk that is not there by then does not come */

int initramfs_fd = -1;

static int mount_at(const char *what, const char *where, const char *type, unsigned long flags, const char *data)
{
	mkdir(where, 0755);
	if (mount(what, where, type, flags, data) == 0 || errno == EBUSY)
		return 0;
	return -errno;
}

static void mount_kernel(void)
{
	mount_at("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
	mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
}

/* 0, 1 and 2 must be something: the kernel opens the console for init only where the initramfs has one. */
static void settle_console(void)
{
	int fd;
	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd < 3);
	if (fd >= 3)
		close(fd);
	say_open_console();
}

/* Most devices are there when their module is loaded; some buses find theirs later. */
static bool wait_for(const char *device)
{
	for (int64_t until = now_ms() + DEVICE_MS; access(device, F_OK) < 0; usleep(1000))
		if (now_ms() > until)
			return false;
	return true;
}

static const char *mount_root(void)
{
	static char why[256];
	const char *device = cmdline_get("posada.root", NULL), *type = cmdline_get("posada.rootfs", "ext4");
	const char *rw = cmdline_get("posada.rw", "1");
	if (!device)
		return "no posada.root= on the kernel command line";
	if (device[0] == '/' && !wait_for(device)) {
		snprintf(why, sizeof why, "the root device %s does not exist", device);
		return why;
	}
	mkdir(ROOT, 0755);
	unsigned long flags = *rw == '0' ? MS_RDONLY : 0;
	if (mount(device, ROOT, type, flags, cmdline_get("posada.rootflags", NULL)) < 0) {
		snprintf(why, sizeof why, "cannot mount %s (%s): %s", device, type, strerror(errno));
		return why;
	}
	return NULL;
}

/* The initramfs stays reachable by one descriptor: modules that are needed rarely are loaded from it later. */
static const char *enter_root(void)
{
	static const char *const moved[] = {"/dev", "/proc", "/sys"};
	initramfs_fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	for (size_t i = 0; i < COUNT(moved); i++) {
		char where[32];
		snprintf(where, sizeof where, ROOT "%s", moved[i]);
		mkdir(where, 0755);
		if (mount(moved[i], where, NULL, MS_MOVE, NULL) < 0)
			return "cannot move /dev, /proc and /sys into the root";
	}
	if (chdir(ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		return "cannot move into the root";
	return NULL;
}

static void mount_rest(void)
{
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"}, {"fd/0", "/dev/stdin"}, {"fd/1", "/dev/stdout"}, {"fd/2", "/dev/stderr"},
	};
	mount_at("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
	mount_at("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	mount_at("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
	mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	for (size_t i = 0; i < COUNT(links); i++)
		if (symlink(links[i][0], links[i][1]) < 0 && errno != EEXIST)
			break;
	mkdir("/run/lock", 01777);
	mkdir("/run/posada", 0755);
}

static void set_hostname(const char *name)
{
	char text[65];
	if (!name && read_line("/etc/hostname", text, sizeof text) > 0)
		name = text;
	if (name && sethostname(name, strlen(name)) < 0)
		say("posada-agent: hostname %s: %s", name, strerror(errno));
	if (is_init || !name || name == text)
		return;
	/* The image's init sets the name again, from the file. */
	char line[80];
	snprintf(line, sizeof line, "%s\n", name);
	if (read_text("/etc/hostname", text, sizeof text) < 0 || strcmp(text, line) != 0)
		replace_text("/etc/hostname", line, 0644);
}

/* An image has an empty /etc/machine-id: its init fills it at the first boot, and in fast mode that is the agent. */
static void fill_machine_id(void)
{
	static const char *const path = "/etc/machine-id";
	struct stat st;
	uint8_t random[16];
	char line[40];
	if (!is_init || stat(path, &st) < 0 || st.st_size > 1 || getrandom(random, sizeof random, GRND_NONBLOCK) != sizeof random)
		return;
	random[6] = (random[6] & 0x0f) | 0x40; /* a version 4 UUID, as machine-id(5) has it */
	random[8] = (random[8] & 0x3f) | 0x80;
	for (size_t i = 0; i < sizeof random; i++)
		snprintf(line + 2 * i, sizeof line - 2 * i, "%02x\n", random[i]);
	write_text(path, line);
}

/* What systemd gives as well: programs ask for more than 1024 where they need it, and find the hard limit high. */
static void raise_limits(void)
{
	struct rlimit files = {1024, 524288};
	setrlimit(RLIMIT_NOFILE, &files);
}

/* Full mode: PID 1 becomes the image's init, and the agent goes on as its child. */
static void hand_over(void)
{
	static const char *const inits[] = {"/sbin/init", "/lib/systemd/systemd", "/bin/init", "/bin/sh"};
	pid_t pid = fork();
	if (pid == 0) {
		setsid();
		loop_forked();
		return;
	}
	if (pid > 0) {
		loop_unblock_signals();
		for (size_t i = 0; i < COUNT(inits); i++) {
			char *const args[] = {(char *)inits[i], NULL};
			int console = open("/dev/console", O_RDWR | O_NOCTTY);
			for (int fd = 0; console >= 0 && fd < 3; fd++)
				dup2(console, fd);
			execv(inits[i], args);
		}
	}
	say("posada-agent: the root has no init: the agent stays PID 1");
	is_init = true;
}

static void open_channels(void)
{
	const char *port = cmdline_get("posada.vsock", NULL);
	if (port) {
		int r = listen_vsock(strtoul(port, NULL, 10));
		if (r < 0)
			say("posada-agent: cannot listen on vsock port %s: %s", port, strerror(-r));
	} else if (!ports_open()) {
		say("posada-agent: there is no virtio port named org.posada.agent.*");
	}
}

void init_run(void)
{
	mount_kernel();
	settle_console();
	cmdline_read();
	timing = *cmdline_get("posada.timing", "0") == '1';
	timing_step("devtmpfs, proc, sysfs, since the kernel began");
	int modules = open("/modules", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (modules >= 0) {
		modules_load(modules);
		close(modules);
	}
	timing_step("order");
	is_init = strcmp(cmdline_get("posada.mode", "fast"), "full") != 0;
	loop_init();
	open_channels();
	timing_step("channels");
	boot_failed = mount_root();
	timing_step("root");
	if (!boot_failed)
		boot_failed = enter_root();
	if (boot_failed) {
		say("posada-agent: boot failed: %s", boot_failed);
		is_init = true;
		return;
	}
	mount_rest();
	boot_failed = folders_mount();
	if (boot_failed)
		say("posada-agent: boot failed: %s", boot_failed);
	timing_step("other mounts");
	set_hostname(cmdline_get("posada.hostname", NULL));
	fill_machine_id();
	timing_step("names");
	net_start(cmdline_get("posada.net", NULL), cmdline_get("posada.gw", NULL));
	if (cmdline_get("posada.dns", NULL))
		net_resolver(cmdline_get("posada.dns", ""));
	timing_step("network");
	raise_limits();
	reboot(RB_DISABLE_CAD);
	if (!is_init)
		hand_over();
	cgroups_init();
	timing_step("cgroups");
	say("posada-agent: ready");
}
