#include "buf.h"

#include <stdlib.h>
#include <string.h>

#include "util.h"

/* A queue that was once large gives its memory back when it is empty: forks share what is not touched. */
#define KEEP_CAP 16384

uint8_t *buf_reserve(struct buf *b, size_t n)
{
	if (b->head + b->len + n > b->cap) {
		if (b->head) {
			memmove(b->data, b->data + b->head, b->len);
			b->head = 0;
		}
		if (b->len + n > b->cap) {
			size_t cap = b->cap ? b->cap : 1024;
			while (cap < b->len + n)
				cap *= 2;
			b->data = xrealloc(b->data, cap);
			b->cap = cap;
		}
	}
	return b->data + b->head + b->len;
}

void buf_append(struct buf *b, const void *p, size_t n)
{
	if (!n)
		return;
	memcpy(buf_reserve(b, n), p, n);
	b->len += n;
}

void buf_take(struct buf *b, size_t n)
{
	b->head += n;
	b->len -= n;
	if (b->len)
		return;
	b->head = 0;
	if (b->cap > KEEP_CAP)
		buf_free(b);
}

void buf_free(struct buf *b)
{
	free(b->data);
	*b = (struct buf){0};
}
