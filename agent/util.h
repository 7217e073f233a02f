/* Small things everybody needs: memory, time, short files, messages. */
#ifndef POSADA_UTIL_H
#define POSADA_UTIL_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* They end the process when there is no memory: an agent that cannot allocate a few KiB has no work left to do. */
void *xcalloc(size_t n, size_t size);
void *xrealloc(void *p, size_t size);
char *xstrdup(const char *s);
char *xstrndup(const char *s, size_t n);

int64_t now_ms(void); /* CLOCK_MONOTONIC */
int64_t now_us(void);

/* Says one line on the console (init) or on stderr (--listen). */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say_open_console(void);

/* posada.timing=1: says what has taken how long since the last call. */
extern bool timing;
void timing_step(const char *what);

/* Reads at most cap-1 bytes and ends them with NUL. Returns the length or -errno. */
ssize_t read_text(const char *path, char *text, size_t cap);
/* As read_text, without trailing white space. */
ssize_t read_line(const char *path, char *text, size_t cap);
/* Writes a file that exists already (sysfs, procfs, cgroups). Returns 0 or -errno. */
int write_text(const char *path, const char *text);
/* Makes or replaces a file: temporary name beside it, then rename. Returns 0 or -errno. */
int replace_text(const char *path, const char *text, mode_t mode);
/* mkdir -p. Returns 0 or -errno. */
int make_dirs(const char *path, mode_t mode);
int write_all(int fd, const void *p, size_t n);

/* "ENOENT" for ENOENT; "E123" for what has no name here. */
const char *errno_name(int error);

/* In --listen mode: the directory that stands for the guest's root in what changes the machine, or "". Else "". */
extern const char *test_root;
/* The agent is in a guest of its own (or has a test root), and so may change the machine. */
extern bool in_guest;

/* test_root + path, in a static buffer (two of them, used in turn). */
const char *rooted(const char *path);

#endif
