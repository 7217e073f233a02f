#include "pty.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

void pty_resize(int master, const struct cbor *args)
{
	struct winsize size = {
		.ws_row = (unsigned short)cbor_get_uint(args, "rows", 24), .ws_col = (unsigned short)cbor_get_uint(args, "cols", 80),
	};
	ioctl(master, TIOCSWINSZ, &size);
}

int pty_open(const struct cbor *args, int *slave)
{
	int unlock = 0, number;
	char path[32];
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (master < 0)
		return -errno;
	*slave = -1;
	if (ioctl(master, TIOCSPTLCK, &unlock) == 0 && ioctl(master, TIOCGPTN, &number) == 0) {
		snprintf(path, sizeof path, "/dev/pts/%d", number);
		*slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	}
	if (*slave < 0) {
		int error = errno;
		close(master);
		return -error;
	}
	pty_resize(master, args);
	return master;
}

void pty_end_of_file(int master)
{
	struct termios t;
	char c = 4;
	if (tcgetattr(master, &t) == 0)
		c = (char)t.c_cc[VEOF];
	if (write(master, &c, 1) < 0)
		return; /* the program is gone */
}
