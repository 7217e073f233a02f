#include "flow.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

bool source_done(const struct source *src)
{
	return src->eof && (!src->stream || src->sent == src->kept.len || !src->keep);
}

static void source_end(struct source *src)
{
	watch_close(&src->watch);
	src->eof = true;
}

/* Sends what is kept and was not sent on this stream yet. Returns false when the window ends first. */
static bool replay(struct source *src)
{
	while (src->sent < src->kept.len) {
		size_t n = src->kept.len - src->sent, room = stream_room(src->stream, src->flags);
		if (!room)
			return false;
		if (n > room)
			n = room;
		uint8_t *p = stream_buffer(src->stream, n);
		const uint8_t *from = buf_head(&src->kept) + src->sent;
		memcpy(p, from, n);
		stream_sent(src->stream, src->flags, n);
		src->sent += n;
	}
	return true;
}

/* Reads once. Returns what read(2) did, with errno; 0 also when there is no room (then *full is set). */
static ssize_t read_once(struct source *src, bool *full)
{
	static uint8_t waste[4096];
	if (src->discard)
		return read(src->watch.fd, waste, sizeof waste);
	size_t room = src->stream ? stream_room(src->stream, src->flags) : src->keep ? WINDOW - src->kept.len : 0;
	if (src->keep && room > WINDOW - src->kept.len)
		room = WINDOW - src->kept.len;
	*full = room == 0;
	if (*full)
		return 0;
	if (room > 32768)
		room = 32768; /* others want their turn, and a pipe holds 64 KiB at most */
	uint8_t *p = src->stream ? stream_buffer(src->stream, room) : buf_reserve(&src->kept, room);
	ssize_t n = read(src->watch.fd, p, room);
	if (n <= 0)
		return n;
	if (!src->stream) {
		src->kept.len += (size_t)n;
		return n;
	}
	if (src->keep) {
		buf_append(&src->kept, p, (size_t)n);
		src->sent += (size_t)n;
	}
	stream_sent(src->stream, src->flags, (size_t)n);
	return n;
}

void source_pump(struct source *src)
{
	if (src->stream && src->keep && !replay(src)) {
		if (!src->eof)
			watch_set(&src->watch, 0);
		return;
	}
	while (!src->eof) {
		bool full = false;
		ssize_t n = read_once(src, &full);
		if (full) {
			watch_set(&src->watch, 0);
			return;
		}
		if (n > 0 && src->last)
			continue; /* it must be read empty now */
		if (n > 0 || (n < 0 && errno == EINTR) || (n < 0 && errno == EAGAIN && !src->last)) {
			watch_set(&src->watch, EPOLLIN);
			return;
		}
		if (n < 0 && errno == EAGAIN) {
			src->eof = src->discard = true; /* to the client this is the end; whoever writes later must not die of it */
			watch_set(&src->watch, EPOLLIN);
			break;
		}
		source_end(src); /* EOF, or EIO: a terminal nobody has open */
	}
	if (src->stream && !src->eof_sent) {
		src->eof_sent = true;
		stream_eof(src->stream, src->flags);
	}
	if (src->ended)
		src->ended(src);
}

void source_credit(struct source *src, size_t n)
{
	if (src->keep) {
		buf_take(&src->kept, n);
		src->sent -= n;
	}
	source_pump(src);
}

void source_attach(struct source *src, struct stream *s)
{
	src->stream = s;
	src->sent = 0;
	src->eof_sent = false;
}

static void source_ready(struct watch *w, uint32_t events)
{
	(void)events;
	struct source *src = (struct source *)w;
	bool full;
	if (!src->eof) {
		source_pump(src);
		return;
	}
	ssize_t n = read_once(src, &full);
	if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
		return;
	source_end(src);
	if (src->ended)
		src->ended(src);
}

void source_start(struct source *src, int fd, struct stream *s, uint8_t flags)
{
	src->watch = (struct watch){.fd = fd, .ready = source_ready};
	src->stream = s;
	src->flags = flags;
	watch_set(&src->watch, EPOLLIN);
}

void source_free(struct source *src)
{
	watch_close(&src->watch);
	buf_free(&src->kept);
}

static void sink_flush(struct sink *sink)
{
	while (sink->waiting.len && sink->watch.fd >= 0) {
		ssize_t n = write(sink->watch.fd, buf_head(&sink->waiting), sink->waiting.len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			watch_set(&sink->watch, EPOLLOUT);
			return;
		}
		size_t done = n < 0 ? sink->waiting.len : (size_t)n;
		if (n < 0)
			watch_close(&sink->watch); /* nobody reads any more: the rest is swallowed */
		buf_take(&sink->waiting, done);
		size_t old = done < sink->debt ? done : sink->debt;
		sink->debt -= old;
		if (sink->stream)
			stream_consumed(sink->stream, done - old);
	}
	if (sink->watch.fd < 0)
		return;
	watch_set(&sink->watch, 0);
	if (!sink->eof)
		return;
	if (sink->finish)
		sink->finish(sink);
	else
		watch_close(&sink->watch);
}

static void sink_ready(struct watch *w, uint32_t events)
{
	(void)events;
	sink_flush((struct sink *)w);
}

void sink_start(struct sink *sink, int fd, struct stream *s)
{
	sink->watch = (struct watch){.fd = fd, .ready = sink_ready};
	sink->stream = s;
}

void sink_data(struct sink *sink, const uint8_t *p, size_t n)
{
	if (sink->watch.fd < 0) {
		stream_consumed(sink->stream, n);
		return;
	}
	buf_append(&sink->waiting, p, n);
	if (!sink->watch.events && !sink->hold)
		sink_flush(sink);
}

void sink_writable(struct sink *sink)
{
	sink->hold = false;
	sink_flush(sink);
}

void sink_eof(struct sink *sink)
{
	sink->eof = true;
	if (!sink->watch.events && !sink->hold)
		sink_flush(sink);
}

void sink_attach(struct sink *sink, struct stream *s)
{
	sink->stream = s;
	sink->debt = sink->waiting.len;
}

void sink_free(struct sink *sink)
{
	watch_close(&sink->watch);
	buf_free(&sink->waiting);
}
