#include "link.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"
#include "stream.h"
#include "util.h"

/* Streams send only while less than this waits; a client that never reads costs this and a window per stream at most. */
#define OUT_HIGH (128 * 1024)
#define OUT_LOW (32 * 1024)
/* Answers pile up when a client asks and never reads: past this the agent stops listening to it. */
#define OUT_STOP (1024 * 1024)
#define ABSENT_MS 50
/* A client that never pauses must not keep the others from their turn. */
#define TURN_SHARE (256 * 1024)

static struct link *links[MAX_LINKS];
static uint64_t last_session;

static void link_ready(struct watch *w, uint32_t events);

struct link *link_open(int fd, bool port)
{
	for (size_t i = 0; i < COUNT(links); i++) {
		if (links[i])
			continue;
		struct link *l = links[i] = xcalloc(1, sizeof *l);
		l->port = port;
		l->watch = (struct watch){.fd = fd, .ready = link_ready};
		framer_reset(&l->in);
		/*
		 * Edge-triggered: a virtio port says POLLHUP for as long as the host is away, and a level-triggered wait would
		 * spin on it. The driver wakes waiters when the host comes and goes, when data comes, and when there is room.
		 */
		watch_set(&l->watch, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
		return l;
	}
	return NULL;
}

/* What is on its way is of no use to the next client; of a frame that is half sent the rest must not go out. */
static void drop_output(struct link *l)
{
	l->blocked = l->congested = false;
	buf_free(&l->out);
}

void link_reset(struct link *l)
{
	l->state = LINK_HUNTING;
	l->session = 0;
	for (size_t i = 0; i < MAX_STREAMS; i++)
		if (l->streams[i])
			stream_drop(l->streams[i], false);
}

struct link *link_by_session(uint64_t session)
{
	for (size_t i = 0; i < COUNT(links); i++)
		if (links[i] && links[i]->session == session)
			return links[i];
	return NULL;
}

void links_reset_older(struct link *except, uint64_t epoch)
{
	for (size_t i = 0; i < COUNT(links); i++) {
		struct link *l = links[i];
		if (!l || l == except || l->state == LINK_HUNTING || l->since >= epoch)
			continue;
		link_reset(l);
		drop_output(l);
		l->in.hunting = true;
	}
}

/* Whoever was at the other end is gone. */
static void link_gone(struct link *l)
{
	timer_clear(&l->absent);
	l->host = false;
	link_reset(l);
	drop_output(l);
	framer_reset(&l->in);
	if (l->port)
		return;
	for (size_t i = 0; i < COUNT(links); i++)
		if (links[i] == l)
			links[i] = NULL;
	watch_close(&l->watch);
	free(l);
}

static void still_absent(struct timer *t)
{
	struct link *l = (struct link *)((char *)t - offsetof(struct link, absent));
	struct pollfd p = {.fd = l->watch.fd};
	if (poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR)))
		link_gone(l);
}

/*
 * The other end seems to be gone. Of a port that has not been seen connected yet this is known only after a moment: the driver
 * takes in data at once, and the news that the host has connected a little later, so that a new client's first bytes may come
 * from a port that says it has none.
 */
static void link_lost(struct link *l)
{
	if (!l->port || l->host) {
		link_gone(l);
	} else if (!l->absent.armed) {
		l->absent.fire = still_absent;
		timer_set(&l->absent, ABSENT_MS);
	}
}

/* Returns false when the link is lost. */
static bool flush(struct link *l)
{
	while (l->out.len && !l->blocked) {
		ssize_t n = write(l->watch.fd, buf_head(&l->out), l->out.len);
		if (n > 0)
			buf_take(&l->out, (size_t)n);
		else if (n < 0 && (errno == EAGAIN || errno == EINTR))
			l->blocked = errno == EAGAIN;
		else
			return false;
	}
	if (l->congested && l->out.len < OUT_LOW) {
		l->congested = false;
		for (size_t i = 0; i < MAX_STREAMS && !l->congested; i++)
			if (l->streams[i] && l->streams[i]->kind->resume)
				l->streams[i]->kind->resume(l->streams[i]);
	}
	return true;
}

void link_frame(struct link *l, uint32_t stream, uint8_t type, uint8_t flags, const void *payload, size_t n)
{
	uint8_t *p = buf_reserve(&l->out, HEADER_SIZE + n);
	frame_header(p, (uint32_t)n, stream, type, flags);
	if (n)
		memcpy(p + HEADER_SIZE, payload, n);
	l->out.len += HEADER_SIZE + n;
	if (l->out.len >= OUT_HIGH)
		l->congested = true;
}

void link_data(struct link *l, uint32_t stream, uint8_t flags, size_t n)
{
	frame_header(buf_reserve(&l->out, HEADER_SIZE + n), (uint32_t)n, stream, T_DATA, flags);
	l->out.len += HEADER_SIZE + n;
	if (l->out.len >= OUT_HIGH)
		l->congested = true;
}

void link_begin(struct link *l, struct cbor_out *o)
{
	/* A message that is sent while another is being written would overwrite it: so it is built aside. */
	static uint8_t scratch[MAX_PAYLOAD];
	(void)l;
	*o = (struct cbor_out){.p = scratch, .cap = sizeof scratch};
}

void link_send(struct link *l, struct cbor_out *o, uint32_t stream, uint8_t type)
{
	if (!o->full)
		link_frame(l, stream, type, 0, o->p, o->len);
}

void link_event(struct link *l, const char *event, const char *key, const char *text)
{
	struct cbor_out o;
	link_begin(l, &o);
	cbor_put_map(&o, key ? 2 : 1);
	cbor_pair_text(&o, "event", event);
	if (key)
		cbor_pair_text(&o, key, text);
	link_send(l, &o, 0, T_EVENT);
}

void links_event(const char *event, const char *key, const char *text)
{
	for (size_t i = 0; i < COUNT(links); i++)
		if (links[i] && links[i]->state == LINK_UP)
			link_event(links[i], event, key, text);
}

void link_fail(struct link *l, const char *why)
{
	struct cbor_out o;
	link_reset(l);
	l->in.hunting = true;
	link_begin(l, &o);
	cbor_put_map(&o, 1);
	cbor_pair_text(&o, "error", why);
	link_send(l, &o, 0, T_CLOSE);
}

static void frame_got(struct link *l, const struct frame *f)
{
	struct cbor body;
	if (f->type == T_HELLO && l->state == LINK_GREETING) {
		if (!cbor_message(f->payload, f->length, &body)) {
			link_fail(l, "HELLO is not a CBOR map");
		} else if (cbor_get_uint(&body, "min", 1) > PROTOCOL_VERSION) {
			link_fail(l, "this agent speaks version 1 only");
		} else {
			l->state = LINK_UP;
			hello_send(l);
		}
	} else if (l->state != LINK_UP || f->type == T_HELLO) {
		link_fail(l, "HELLO must come first, and once");
	} else if (f->type == T_PING) {
		link_frame(l, 0, T_PONG, 0, f->payload, f->length);
	} else if (f->type == T_CALL) {
		call_frame(l, f->payload, f->length);
	} else if (f->type == T_OPEN) {
		stream_open(l, f->stream, f->payload, f->length);
	} else if (f->type == T_CLOSE && f->stream == 0) {
		link_reset(l);
		l->in.hunting = true;
	} else if (f->stream != 0) {
		stream_frame(l, f);
	}
}

/* Works off what was read; it stops early when answers pile up. */
static void parse(struct link *l)
{
	struct frame f;
	while (l->out.len < OUT_STOP) {
		switch (framer_next(&l->in, &f)) {
		case FRAME_NONE:
			return;
		case FRAME_GOT:
			frame_got(l, &f);
			break;
		case FRAME_BROKEN:
			link_reset(l);
			break;
		case FRAME_PREAMBLE:
			link_reset(l);
			drop_output(l);
			l->state = LINK_GREETING;
			l->session = ++last_session;
			l->since = fork_epoch;
			buf_append(&l->out, MAGIC_AGENT, MAGIC_SIZE);
			buf_append(&l->out, f.payload, NONCE_SIZE);
			break;
		}
	}
}

/*
 * Reads until there is nothing left (the wait is edge-triggered), or the turn's share is used up: then `unread` brings
 * links_turn back here. Returns false when the link is lost.
 */
static bool receive(struct link *l)
{
	l->unread = true;
	for (size_t total = 0; total < TURN_SHARE;) {
		uint8_t *where;
		parse(l);
		if (l->out.len >= OUT_STOP)
			return true;
		size_t space = framer_space(&l->in, &where);
		ssize_t n = read(l->watch.fd, where, space);
		if (n > 0) {
			framer_added(&l->in, (size_t)n);
			total += (size_t)n;
		} else if (n == 0 || errno != EINTR) {
			l->unread = false;
			return n < 0 && errno == EAGAIN; /* 0 from a port: the host has closed it */
		}
	}
	return true;
}

static void link_ready(struct watch *w, uint32_t events)
{
	struct link *l = (struct link *)w;
	if (events & (EPOLLOUT | EPOLLHUP))
		l->blocked = false;
	bool alive = receive(l);
	if (!alive || (events & (EPOLLHUP | EPOLLERR))) {
		link_lost(l);
	} else {
		timer_clear(&l->absent);
		l->host = true;
	}
}

bool links_turn(void)
{
	bool more = false;
	for (size_t i = 0; i < COUNT(links); i++) {
		struct link *l = links[i];
		if (!l)
			continue;
		if (!flush(l)) {
			link_gone(l);
			continue;
		}
		if (l->unread && !receive(l)) {
			link_lost(l);
			continue;
		}
		for (size_t k = 0; k < MAX_STREAMS && !l->congested; k++)
			if (l->streams[k] && l->streams[k]->pumping)
				l->streams[k]->kind->resume(l->streams[k]);
		for (size_t k = 0; k < MAX_STREAMS && !l->congested; k++)
			more |= l->streams[k] && l->streams[k]->pumping && stream_room(l->streams[k], 0);
		more |= (l->out.len && !l->blocked) || (l->unread && l->out.len < OUT_STOP);
	}
	return more;
}

void links_drain(int ms)
{
	int64_t until = now_ms() + ms;
	for (size_t i = 0; i < COUNT(links); i++) {
		struct link *l = links[i];
		while (l && l->out.len && now_ms() < until && flush(l)) {
			struct pollfd p = {.fd = l->watch.fd, .events = POLLOUT};
			if (l->out.len && poll(&p, 1, 50) > 0)
				l->blocked = false;
		}
	}
}
