/* TCP connections a fork has inherited. */
#ifndef POSADA_SOCKETS_H
#define POSADA_SOCKETS_H

/* Destroys every TCP connection with another host. Returns 0 or -errno; *note says what was found, where that is of interest. */
int sockets_destroy_foreign(const char **note);

#endif
