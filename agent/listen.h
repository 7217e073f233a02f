/* A unix socket in place of a virtio port: for tests, and for engines whose channel is one. */
#ifndef POSADA_LISTEN_H
#define POSADA_LISTEN_H

/* Makes the socket (an old one of that name is removed) and serves who connects. Returns 0 or -errno. */
int listen_open(const char *path);

/* Serves the host on that vsock port. Returns 0 or -errno. */
int listen_vsock(unsigned port);

#endif
