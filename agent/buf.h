/* A byte queue that grows: bytes are appended at the tail and taken from the head. */
#ifndef POSADA_BUF_H
#define POSADA_BUF_H

#include <stddef.h>
#include <stdint.h>

struct buf {
	uint8_t *data;
	size_t head; /* first byte not yet taken */
	size_t len;  /* bytes between head and tail */
	size_t cap;
};

/* Room for n bytes at the tail; valid until the next call. Memory that cannot be had ends the process (xalloc). */
uint8_t *buf_reserve(struct buf *b, size_t n);
void buf_append(struct buf *b, const void *p, size_t n);
void buf_take(struct buf *b, size_t n);
void buf_free(struct buf *b);

static inline uint8_t *buf_head(struct buf *b)
{
	return b->data + b->head;
}

#endif
