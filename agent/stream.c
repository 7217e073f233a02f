#include "stream.h"

#include <stdlib.h>
#include <string.h>

#include "util.h"

/* Credit is given back in pieces of this size: a quarter of the window keeps a sender busy, and frames few. */
#define CREDIT_STEP (WINDOW / 4)

static const struct {
	const char *name;
	void (*open)(struct stream *s, const struct cbor *args);
} kinds[] = {
	{"exec", exec_open},       {"attach", attach_open}, {"read", read_open},       {"write", write_open},
	{"tar-out", tar_out_open}, {"tar-in", tar_in_open}, {"connect", connect_open}, {"watch", watch_open},
};

struct stream *stream_find(struct link *l, uint32_t id)
{
	for (size_t i = 0; i < MAX_STREAMS; i++)
		if (l->streams[i] && l->streams[i]->id == id)
			return l->streams[i];
	return NULL;
}

static void refuse(struct link *l, uint32_t id, const char *why)
{
	struct cbor_out o;
	link_begin(l, &o);
	cbor_put_map(&o, 1);
	cbor_pair_text(&o, "error", why);
	link_send(l, &o, id, T_CLOSE);
}

void stream_open(struct link *l, uint32_t id, const uint8_t *body, size_t n)
{
	struct cbor args;
	if (stream_find(l, id)) {
		link_fail(l, "OPEN of a stream that is open");
		return;
	}
	if (!cbor_message(body, n, &args)) {
		link_fail(l, "OPEN is not a CBOR map");
		return;
	}
	size_t slot = 0;
	while (slot < MAX_STREAMS && l->streams[slot])
		slot++;
	if (slot == MAX_STREAMS) {
		refuse(l, id, "too many streams on this link (64)");
		return;
	}
	struct cbor kind = cbor_get(&args, "kind");
	for (size_t i = 0; i < COUNT(kinds); i++) {
		if (!cbor_is(&kind, kinds[i].name))
			continue;
		struct stream *s = l->streams[slot] = xcalloc(1, sizeof *s);
		s->link = l;
		s->id = id;
		kinds[i].open(s, &args);
		return;
	}
	refuse(l, id, "no such kind of stream");
}

static void credit_frame(struct stream *s, const struct frame *f)
{
	uint32_t n = get_u32(f->payload);
	if (n > s->unacked[f->flags]) {
		link_fail(s->link, "CREDIT for more than was sent");
		return;
	}
	s->unacked[f->flags] -= n;
	if (s->kind->credit)
		s->kind->credit(s, f->flags, n);
	else if (s->kind->resume)
		s->kind->resume(s);
}

static void data_frame(struct stream *s, const struct frame *f)
{
	if (f->length > WINDOW - s->received || s->in_eof) {
		link_fail(s->link, s->in_eof ? "DATA after EOF" : "more DATA than the window allows");
		return;
	}
	s->received += f->length;
	if (s->kind->data)
		s->kind->data(s, f->payload, f->length);
	else
		stream_consumed(s, f->length);
}

void stream_frame(struct link *l, const struct frame *f)
{
	/* A stream that has just ended may still be written to: the client has not seen its CLOSE yet. */
	struct stream *s = stream_find(l, f->stream);
	struct cbor args;
	if (!s)
		return;
	switch (f->type) {
	case T_DATA:
		data_frame(s, f);
		break;
	case T_EOF:
		if (!s->in_eof && s->kind->eof) {
			s->in_eof = true;
			s->kind->eof(s);
		}
		break;
	case T_CREDIT:
		credit_frame(s, f);
		break;
	case T_SIGNAL:
	case T_RESIZE:
		if (!cbor_message(f->payload, f->length, &args))
			link_fail(l, "SIGNAL or RESIZE is not a CBOR map");
		else if (f->type == T_SIGNAL && s->kind->signal)
			s->kind->signal(s, &args);
		else if (f->type == T_RESIZE && s->kind->resize)
			s->kind->resize(s, &args);
		break;
	case T_CLOSE:
		if (s->kind->drop)
			s->kind->drop(s, true);
		stream_close(s, NULL, 0);
		break;
	default:
		break;
	}
}

size_t stream_room(const struct stream *s, uint8_t flags)
{
	size_t room = s->link->congested ? 0 : WINDOW - s->unacked[flags];
	return room < MAX_PAYLOAD ? room : MAX_PAYLOAD;
}

uint8_t *stream_buffer(struct stream *s, size_t n)
{
	return buf_reserve(&s->link->out, HEADER_SIZE + n) + HEADER_SIZE;
}

void stream_sent(struct stream *s, uint8_t flags, size_t n)
{
	if (!n)
		return;
	s->unacked[flags] += (uint32_t)n;
	link_data(s->link, s->id, flags, n);
}

void stream_eof(struct stream *s, uint8_t flags)
{
	link_frame(s->link, s->id, T_EOF, flags, NULL, 0);
}

void stream_opened(struct stream *s, struct cbor_out *body)
{
	link_send(s->link, body, s->id, T_OPENED);
}

void stream_consumed(struct stream *s, size_t n)
{
	s->owed += (uint32_t)n;
	if (s->owed < CREDIT_STEP)
		return;
	uint8_t body[4];
	put_u32(body, s->owed);
	s->received -= s->owed;
	s->owed = 0;
	link_frame(s->link, s->id, T_CREDIT, 0, body, sizeof body);
}

static void forget(struct stream *s)
{
	for (size_t i = 0; i < MAX_STREAMS; i++)
		if (s->link->streams[i] == s)
			s->link->streams[i] = NULL;
	free(s);
}

void stream_close(struct stream *s, const char *why, int error)
{
	struct cbor_out o;
	link_begin(s->link, &o);
	cbor_put_map(&o, (size_t)(!!why + !!error));
	if (why)
		cbor_pair_text(&o, "error", why);
	if (error)
		cbor_pair_text(&o, "errno", errno_name(error));
	link_send(s->link, &o, s->id, T_CLOSE);
	forget(s);
}

void stream_drop(struct stream *s, bool asked)
{
	if (s->kind && s->kind->drop)
		s->kind->drop(s, asked);
	forget(s);
}
