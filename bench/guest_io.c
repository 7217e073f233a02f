/*
 * What a guest can get out of its disk and processor, without an interpreter in between. One number on stdout.
 *
 *   guest_io random PATH SECONDS DEPTH   4 KiB reads a second at random places, DEPTH processes, past the page cache
 *   guest_io stream PATH SECONDS         MiB a second, 1 MiB reads in order, past the page cache
 *   guest_io loop SECONDS                million turns a second of a loop in user space
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* Reads until the time is over. Returns reads a second, or -1. */
static double reads(const char *path, double seconds, size_t length, int in_order, uint64_t seed)
{
	int fd = open(path, O_RDONLY | O_DIRECT);
	uint64_t size = 0, at = 0, count = 0;
	char *buffer = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) < 0 || size < length || buffer == MAP_FAILED)
		return -1;
	uint64_t places = size / length;
	double begun = now(), end = begun + seconds, t = begun;
	for (; t < end; t = now(), count++) {
		seed = seed * 6364136223846793005u + 1442695040888963407u;
		at = in_order ? count % places : (seed >> 24) % places;
		if (pread(fd, buffer, length, at * length) != (ssize_t)length)
			return -1;
	}
	return count / (t - begun);
}

static int random_reads(const char *path, double seconds, int depth)
{
	double *each = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), sum = 0;
	for (int i = 0; i < depth; i++)
		if (fork() == 0) {
			each[i] = reads(path, seconds, 4096, 0, i * 7919 + 1);
			_exit(0);
		}
	while (wait(NULL) > 0)
		;
	for (int i = 0; i < depth; i++) {
		if (each[i] <= 0)
			return 1;
		sum += each[i];
	}
	printf("%.1f\n", sum);
	return 0;
}

static int loop(double seconds)
{
	double begun = now(), t = begun;
	uint64_t turns = 0;
	for (; t < begun + seconds; t = now(), turns++)
		for (volatile int i = 0; i < 1000000; i++)
			;
	printf("%.3f\n", turns / (t - begun));
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 5 && strcmp(argv[1], "random") == 0 && atoi(argv[4]) <= 64)
		return random_reads(argv[2], atof(argv[3]), atoi(argv[4]));
	if (argc == 4 && strcmp(argv[1], "stream") == 0) {
		double rate = reads(argv[2], atof(argv[3]), 1 << 20, 1, 0);
		return rate < 0 || printf("%.2f\n", rate) < 0;
	}
	if (argc == 3 && strcmp(argv[1], "loop") == 0)
		return loop(atof(argv[2]));
	fprintf(stderr, "usage: guest_io random PATH SECONDS DEPTH | stream PATH SECONDS | loop SECONDS\n");
	return 2;
}
