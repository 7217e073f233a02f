#include "frame.h"

#include <string.h>

const uint8_t MAGIC_CLIENT[MAGIC_SIZE] = {'P', 'O', 'S', 'A', 'D', 'A', 0xff, 0xfe, 'A', 'G', 'E', 'N', 'T', '-', '0', '1'};
const uint8_t MAGIC_AGENT[MAGIC_SIZE] = {'P', 'O', 'S', 'A', 'D', 'A', 0xff, 0xfd, 'A', 'G', 'E', 'N', 'T', '-', '0', '1'};

void framer_reset(struct framer *f)
{
	f->hunting = true;
	f->head = f->len = 0;
}

size_t framer_space(struct framer *f, uint8_t **where)
{
	if (f->head) {
		memmove(f->data, f->data + f->head, f->len);
		f->head = 0;
	}
	*where = f->data + f->len;
	return sizeof f->data - f->len;
}

void framer_added(struct framer *f, size_t n)
{
	f->len += n;
}

static void take(struct framer *f, size_t n)
{
	f->head += n;
	f->len -= n;
	if (!f->len)
		f->head = 0;
}

/* Finds the magic byte by byte. What cannot be its beginning any more is thrown away. */
static enum frame_event hunt(struct framer *f, struct frame *frame)
{
	for (;;) {
		const uint8_t *p = f->data + f->head;
		const uint8_t *start = f->len ? memchr(p, MAGIC_CLIENT[0], f->len) : NULL;
		if (!start) {
			take(f, f->len);
			return FRAME_NONE;
		}
		take(f, (size_t)(start - p));
		size_t n = f->len < MAGIC_SIZE ? f->len : MAGIC_SIZE;
		if (memcmp(start, MAGIC_CLIENT, n) != 0) {
			take(f, 1);
			continue;
		}
		if (f->len < MAGIC_SIZE + NONCE_SIZE)
			return FRAME_NONE;
		frame->payload = start + MAGIC_SIZE;
		frame->length = NONCE_SIZE;
		f->hunting = false;
		take(f, MAGIC_SIZE + NONCE_SIZE);
		return FRAME_PREAMBLE;
	}
}

bool frame_valid(const struct frame *frame)
{
	if (frame->length > MAX_PAYLOAD || frame->flags > 1)
		return false;
	switch (frame->type) {
	case T_HELLO:
	case T_CALL:
		return frame->stream == 0 && frame->flags == 0;
	case T_PING:
	case T_PONG:
		return frame->stream == 0 && frame->flags == 0 && frame->length <= 64;
	case T_OPEN:
	case T_SIGNAL:
	case T_RESIZE:
		return frame->stream != 0 && frame->flags == 0;
	case T_DATA:
		return frame->stream != 0 && frame->flags == 0;
	case T_EOF:
		return frame->stream != 0 && frame->flags == 0 && frame->length == 0;
	case T_CREDIT:
		return frame->stream != 0 && frame->length == 4;
	case T_CLOSE:
		return frame->flags == 0;
	default:
		return false;
	}
}

enum frame_event framer_next(struct framer *f, struct frame *frame)
{
	if (f->hunting)
		return hunt(f, frame);
	if (f->len < HEADER_SIZE)
		return FRAME_NONE;
	const uint8_t *p = f->data + f->head;
	*frame = (struct frame){.length = get_u32(p), .stream = get_u32(p + 4), .type = p[8], .flags = p[9]};
	if (!frame_valid(frame)) {
		f->hunting = true; /* the bytes stay: they may be the beginning of a preamble */
		return FRAME_BROKEN;
	}
	if (f->len < HEADER_SIZE + frame->length)
		return FRAME_NONE;
	frame->payload = p + HEADER_SIZE;
	take(f, HEADER_SIZE + frame->length);
	return FRAME_GOT;
}

void frame_header(uint8_t out[HEADER_SIZE], uint32_t length, uint32_t stream, uint8_t type, uint8_t flags)
{
	put_u32(out, length);
	put_u32(out + 4, stream);
	out[8] = type;
	out[9] = flags;
}
