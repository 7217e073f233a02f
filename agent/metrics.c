/* The call `metrics`: how the guest is doing, from /proc. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "calls.h"
#include "util.h"

/* "MemTotal:    1234 kB" → bytes */
static uint64_t meminfo(const char *text, const char *key)
{
	const char *p = strstr(text, key);
	return p ? strtoull(p + strlen(key), NULL, 10) * 1024 : 0;
}

static uint64_t count_processes(void)
{
	uint64_t n = 0;
	DIR *dir = opendir("/proc");
	for (struct dirent *e; dir && (e = readdir(dir));)
		n += e->d_name[0] >= '1' && e->d_name[0] <= '9';
	if (dir)
		closedir(dir);
	return n;
}

int call_metrics(struct call *c)
{
	char text[4096] = "";
	unsigned long long user = 0, nice = 0, system = 0;
	double uptime = 0, load = 0;
	struct statvfs fs = {0};
	uint64_t tick = (uint64_t)sysconf(_SC_CLK_TCK);
	if (read_text("/proc/uptime", text, sizeof text) > 0)
		uptime = strtod(text, NULL);
	if (read_text("/proc/loadavg", text, sizeof text) > 0)
		load = strtod(text, NULL);
	if (read_text("/proc/stat", text, sizeof text) > 0)
		sscanf(text, "cpu %llu %llu %llu", &user, &nice, &system);
	read_text("/proc/meminfo", text, sizeof text);
	statvfs("/", &fs);
	cbor_put_map(c->ok, 9);
	cbor_pair_uint(c->ok, "uptime_ms", (uint64_t)(uptime * 1000));
	cbor_put_text(c->ok, "load1");
	cbor_put_double(c->ok, load);
	cbor_pair_uint(c->ok, "mem_total", meminfo(text, "MemTotal:"));
	cbor_pair_uint(c->ok, "mem_available", meminfo(text, "MemAvailable:"));
	cbor_pair_uint(c->ok, "processes", count_processes());
	cbor_pair_uint(c->ok, "cpu_user_ms", (user + nice) * 1000 / tick);
	cbor_pair_uint(c->ok, "cpu_system_ms", system * 1000 / tick);
	cbor_pair_uint(c->ok, "disk_total", (uint64_t)fs.f_blocks * fs.f_frsize);
	cbor_pair_uint(c->ok, "disk_free", (uint64_t)fs.f_bavail * fs.f_frsize);
	return 0;
}
