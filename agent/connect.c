/* The stream `connect`: a TCP or unix connection from inside the guest. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "flow.h"
#include "util.h"

#define CONNECT_MS 30000

struct connection {
	struct watch watch; /* while connecting; its descriptor becomes the source's */
	struct timer deadline;
	struct stream *stream;
	struct source in;
	struct sink out;
	bool up;
};

static void connection_free(struct connection *c)
{
	timer_clear(&c->deadline);
	watch_close(&c->watch);
	source_free(&c->in);
	sink_free(&c->out);
	free(c);
}

static void end(struct connection *c, int error)
{
	struct stream *s = c->stream;
	connection_free(c);
	stream_close(s, error ? strerror(error) : NULL, error);
}

/* Both directions have ended. */
static void check(struct connection *c)
{
	if (c->in.eof && c->out.watch.fd < 0)
		end(c, 0);
}

static void source_ended(struct source *src)
{
	check(src->owner);
}

static void half_close(struct sink *sink)
{
	struct connection *c = (struct connection *)((char *)sink - offsetof(struct connection, out));
	shutdown(sink->watch.fd, SHUT_WR);
	watch_close(&sink->watch);
	if (c->up)
		check(c);
}

static void connection_up(struct connection *c)
{
	struct cbor_out o;
	timer_clear(&c->deadline);
	watch_set(&c->watch, 0);
	int fd = c->watch.fd;
	c->watch.fd = -1;
	link_begin(c->stream->link, &o);
	cbor_put_map(&o, 0);
	stream_opened(c->stream, &o);
	c->up = true;
	c->in.owner = c;
	c->in.ended = source_ended;
	source_start(&c->in, fd, c->stream, 0);
	sink_writable(&c->out);
}

static void connecting_ready(struct watch *w, uint32_t events)
{
	struct connection *c = (struct connection *)w;
	int error = 0;
	socklen_t size = sizeof error;
	(void)events;
	if (getsockopt(w->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
		error = errno;
	if (error)
		end(c, error);
	else
		connection_up(c);
}

static void too_late(struct timer *t)
{
	end((struct connection *)((char *)t - offsetof(struct connection, deadline)), ETIMEDOUT);
}

static void connection_data(struct stream *s, const uint8_t *p, size_t n)
{
	struct connection *c = s->owner;
	sink_data(&c->out, p, n);
}

static void connection_eof(struct stream *s)
{
	struct connection *c = s->owner;
	sink_eof(&c->out);
}

static void connection_resume(struct stream *s)
{
	struct connection *c = s->owner;
	if (c->up)
		source_pump(&c->in);
}

static void connection_drop(struct stream *s, bool asked)
{
	(void)asked;
	connection_free(s->owner);
}

static const struct stream_kind connection_kind = {
	.data = connection_data, .eof = connection_eof, .resume = connection_resume, .drop = connection_drop,
};

/* Numbers, and localhost; a name server is not asked: the answer might be long in coming. Returns the size or 0. */
static socklen_t address(const struct cbor *args, struct sockaddr_storage *out)
{
	struct sockaddr_un *un = (void *)out;
	struct sockaddr_in *in = (void *)out;
	struct sockaddr_in6 *in6 = (void *)out;
	char host[64];
	*out = (struct sockaddr_storage){0};
	if (cbor_get_string(args, "unix", un->sun_path, sizeof un->sun_path) > 0) {
		un->sun_family = AF_UNIX;
		return sizeof *un;
	}
	uint64_t port = cbor_get_uint(args, "port", 0);
	int n = cbor_get_string(args, "host", host, sizeof host);
	if (n == -2 || port < 1 || port > 65535)
		return 0;
	if (n < 1 || strcmp(host, "localhost") == 0)
		strcpy(host, "127.0.0.1");
	memset(out, 0, sizeof *out);
	if (inet_pton(AF_INET, host, &in->sin_addr) == 1) {
		in->sin_family = AF_INET;
		in->sin_port = htons((uint16_t)port);
		return sizeof *in;
	}
	memset(out, 0, sizeof *out);
	if (inet_pton(AF_INET6, host, &in6->sin6_addr) != 1)
		return 0;
	in6->sin6_family = AF_INET6;
	in6->sin6_port = htons((uint16_t)port);
	return sizeof *in6;
}

void connect_open(struct stream *s, const struct cbor *args)
{
	struct sockaddr_storage to;
	socklen_t size = address(args, &to);
	if (!size) {
		stream_close(s, "needs unix, or port (1-65535) and host as an IP address", EINVAL);
		return;
	}
	int fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int other = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3); /* each direction is watched by a descriptor of its own */
	int r = fd < 0 || other < 0 ? -errno : connect(fd, (struct sockaddr *)&to, size) < 0 ? -errno : 0;
	if (r < 0 && r != -EINPROGRESS) {
		if (fd >= 0)
			close(fd);
		if (other >= 0)
			close(other);
		stream_close(s, strerror(-r), -r);
		return;
	}
	struct connection *c = xcalloc(1, sizeof *c);
	c->stream = s;
	s->kind = &connection_kind;
	s->owner = c;
	c->in.watch.fd = -1;
	c->watch = (struct watch){.fd = fd, .ready = connecting_ready};
	sink_start(&c->out, other, s);
	c->out.finish = half_close;
	if (r == 0) {
		connection_up(c);
		return;
	}
	c->out.hold = true;
	c->deadline.fire = too_late;
	timer_set(&c->deadline, CONNECT_MS);
	watch_set(&c->watch, EPOLLOUT);
}
