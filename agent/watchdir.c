/* The stream `watch`: inotify on one path. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "stream.h"
#include "util.h"

#define MASK                                                                                                               \
	(IN_CREATE | IN_MODIFY | IN_CLOSE_WRITE | IN_ATTRIB | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF |   \
	 IN_MOVE_SELF)

static const struct {
	uint32_t bit;
	const char *name;
} events[] = {
	{IN_CREATE, "create"},         {IN_MODIFY, "modify"},      {IN_CLOSE_WRITE, "close-write"},
	{IN_ATTRIB, "attrib"},         {IN_DELETE, "delete"},      {IN_MOVED_FROM, "moved-from"},
	{IN_MOVED_TO, "moved-to"},     {IN_DELETE_SELF, "delete"}, {IN_MOVE_SELF, "moved-from"},
	{IN_Q_OVERFLOW, "overflow"},
};

struct watcher {
	struct watch watch;
	struct stream *stream;
};

static void send_event(struct stream *s, const struct inotify_event *e)
{
	struct cbor_out o;
	for (size_t i = 0; i < COUNT(events); i++) {
		if (!(e->mask & events[i].bit))
			continue;
		link_begin(s->link, &o);
		cbor_put_map(&o, 2);
		cbor_pair_text(&o, "event", events[i].name);
		cbor_pair_text(&o, "name", e->len ? e->name : "");
		link_send(s->link, &o, s->id, T_EVENT);
	}
}

/* While the link is full nothing is read: the kernel's queue is bounded, and says when it has overflowed. */
static void watcher_ready(struct watch *watch, uint32_t ready)
{
	struct watcher *w = (struct watcher *)watch;
	char buffer[4096] __attribute__((aligned(8)));
	(void)ready;
	if (!stream_room(w->stream, 0)) {
		watch_set(&w->watch, 0);
		return;
	}
	ssize_t n = read(w->watch.fd, buffer, sizeof buffer);
	for (char *p = buffer; n > 0 && p < buffer + n;) {
		const struct inotify_event *e = (void *)p;
		send_event(w->stream, e);
		p += sizeof *e + e->len;
	}
}

static void watcher_resume(struct stream *s)
{
	struct watcher *w = s->owner;
	watch_set(&w->watch, EPOLLIN);
}

static void watcher_drop(struct stream *s, bool asked)
{
	struct watcher *w = s->owner;
	(void)asked;
	watch_close(&w->watch);
	free(w);
}

static const struct stream_kind watcher_kind = {.resume = watcher_resume, .drop = watcher_drop};

void watch_open(struct stream *s, const struct cbor *args)
{
	char path[PATH_MAX];
	struct cbor_out o;
	int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	int error = fd < 0 ? errno : 0;
	if (!error && cbor_get_string(args, "path", path, sizeof path) < 1)
		error = EINVAL;
	if (!error && inotify_add_watch(fd, path, MASK) < 0)
		error = errno;
	if (error) {
		if (fd >= 0)
			close(fd);
		stream_close(s, strerror(error), error);
		return;
	}
	struct watcher *w = xcalloc(1, sizeof *w);
	*w = (struct watcher){.watch = {.fd = fd, .ready = watcher_ready}, .stream = s};
	s->kind = &watcher_kind;
	s->owner = w;
	watch_set(&w->watch, EPOLLIN);
	link_begin(s->link, &o);
	cbor_put_map(&o, 0);
	stream_opened(s, &o);
}
