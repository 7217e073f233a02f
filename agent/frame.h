/* The byte stream of a link: preambles and frames. No I/O: bytes are put in, events come out. */
#ifndef POSADA_FRAME_H
#define POSADA_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_PAYLOAD 65536
#define HEADER_SIZE 10
#define MAGIC_SIZE 16
#define NONCE_SIZE 16
#define WINDOW (256 * 1024)

extern const uint8_t MAGIC_CLIENT[MAGIC_SIZE];
extern const uint8_t MAGIC_AGENT[MAGIC_SIZE];

enum frame_type {
	T_HELLO = 1, T_CALL, T_REPLY, T_OPEN, T_OPENED, T_DATA, T_EOF, T_CREDIT, T_EXIT, T_CLOSE, T_SIGNAL, T_RESIZE,
	T_PING, T_PONG, T_EVENT,
};

struct frame {
	uint32_t stream;
	uint8_t type, flags;
	uint32_t length;
	const uint8_t *payload; /* valid until more bytes are put in */
};

enum frame_event {
	FRAME_NONE,     /* more bytes are needed */
	FRAME_GOT,      /* *frame is a frame */
	FRAME_PREAMBLE, /* frame->payload is the nonce; frames follow */
	FRAME_BROKEN,   /* an invalid header: hunting for a preamble from here on */
};

struct framer {
	bool hunting;
	size_t head, len;
	uint8_t data[HEADER_SIZE + MAX_PAYLOAD];
};

void framer_reset(struct framer *f);
/* Where to put bytes, and how many fit (≥ 1 once framer_next has said FRAME_NONE). */
size_t framer_space(struct framer *f, uint8_t **where);
void framer_added(struct framer *f, size_t n);
enum frame_event framer_next(struct framer *f, struct frame *frame);

void frame_header(uint8_t out[HEADER_SIZE], uint32_t length, uint32_t stream, uint8_t type, uint8_t flags);
/* Whether a client may send such a header at all. */
bool frame_valid(const struct frame *frame);

static inline uint32_t get_u32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline void put_u32(uint8_t *p, uint32_t n)
{
	p[0] = (uint8_t)n;
	p[1] = (uint8_t)(n >> 8);
	p[2] = (uint8_t)(n >> 16);
	p[3] = (uint8_t)(n >> 24);
}

#endif
