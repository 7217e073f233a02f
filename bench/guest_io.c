/* What `bench.lab` measures with, in a guest and beside it. A static program, so that every guest runs the same code.
 *
 *   guest_io random PATH SECONDS DEPTH   4 KiB reads a second at random places, DEPTH at a time, past the page cache
 *   guest_io stream PATH SECONDS         MiB a second, 1 MiB reads in order, past the page cache
 *   guest_io loop SECONDS                million turns a second of a loop in user space
 *   guest_io send ADDRESS PORT SECONDS   MiB a second of TCP to `serve`, until it has read all of it
 *   guest_io receive ADDRESS PORT SECONDS   the other way
 *   guest_io serve                       their other end; says its port, serves one after the other
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

static char block[128 << 10];

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

/* One TCP connection, one way. `serve` closes when it has read all, so that what is counted has arrived. */
static int stream_tcp(const char *address, int port, double seconds, char way)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	uint64_t count = 0;
	ssize_t n;
	if (inet_pton(AF_INET, address, &to.sin_addr) != 1 || connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
		return 1;
	if (write(fd, &way, 1) != 1)
		return 1;
	double begun = now(), t = begun;
	for (; t < begun + seconds; t = now(), count += n) {
		n = way == 's' ? send(fd, block, sizeof block, 0) : recv(fd, block, sizeof block, 0);
		if (n <= 0)
			return 1;
	}
	if (way == 's' && (shutdown(fd, SHUT_WR) < 0 || read(fd, block, 1) != 0))
		return 1;
	printf("%.3f\n", count / (now() - begun) / (1 << 20));
	return 0;
}

static int serve(void)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof at;
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd;
	char way;
	signal(SIGPIPE, SIG_IGN);
	if (bind(listener, (struct sockaddr *)&at, size) < 0 || listen(listener, 8) < 0)
		return 1;
	getsockname(listener, (struct sockaddr *)&at, &size);
	printf("%d\n", ntohs(at.sin_port));
	fflush(stdout);
	while ((fd = accept(listener, NULL, NULL)) >= 0) {
		if (read(fd, &way, 1) == 1 && way == 's')
			while (recv(fd, block, sizeof block, MSG_TRUNC) > 0) /* read, not copied */
				;
		else
			while (send(fd, block, sizeof block, 0) > 0)
				;
		close(fd);
	}
	return 1;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	if (argc == 5 && strcmp(what, "random") == 0 && atoi(argv[4]) <= 64)
		return random_reads(argv[2], atof(argv[3]), atoi(argv[4]));
	if (argc == 4 && strcmp(what, "stream") == 0) {
		double rate = reads(argv[2], atof(argv[3]), 1 << 20, 1, 0);
		return rate < 0 || printf("%.2f\n", rate) < 0;
	}
	if (argc == 3 && strcmp(what, "loop") == 0)
		return loop(atof(argv[2]));
	if (argc == 5 && (strcmp(what, "send") == 0 || strcmp(what, "receive") == 0))
		return stream_tcp(argv[2], atoi(argv[3]), atof(argv[4]), *what);
	if (argc == 2 && strcmp(what, "serve") == 0)
		return serve();
	fprintf(stderr, "usage: see the top of bench/guest_io.c\n");
	return 2;
}
