/* The two ends every pipe-like stream is made of: a source (descriptor → DATA) and a sink (DATA → descriptor). */
#ifndef POSADA_FLOW_H
#define POSADA_FLOW_H

#include "stream.h"

struct source {
	struct watch watch;
	struct stream *stream; /* NULL: nobody listens now */
	uint8_t flags;
	bool keep;      /* what is not credited yet is kept for the next listener */
	bool discard;   /* read and thrown away: whoever still writes must not die of it */
	bool last;      /* an empty read counts as the end */
	bool eof;       /* no more will be read */
	bool eof_sent;
	size_t sent;    /* of `kept`, how much has been sent to this stream */
	struct buf kept;
	void (*ended)(struct source *src); /* eof is sent, or would have been were there a listener */
	void *owner;
};

/* Moves what can be moved. Call it on resume, and after any of the fields above has changed. */
void source_pump(struct source *src);
void source_credit(struct source *src, size_t n);
/* Another stream takes over; kept bytes go to it first. */
void source_attach(struct source *src, struct stream *s);
void source_start(struct source *src, int fd, struct stream *s, uint8_t flags);
void source_free(struct source *src);
/* eof, and everything kept has been sent */
bool source_done(const struct source *src);

struct sink {
	struct watch watch;
	struct stream *stream;
	struct buf waiting;
	size_t debt;                       /* of `waiting`: came by an earlier stream, so no credit is due for it */
	bool hold;                         /* nothing can be written yet (sink_writable) */
	bool eof;                          /* close when all is written */
	void (*finish)(struct sink *sink); /* instead of closing: shutdown(2), or ^D on a terminal */
};

void sink_start(struct sink *sink, int fd, struct stream *s);
void sink_data(struct sink *sink, const uint8_t *p, size_t n);
void sink_eof(struct sink *sink);
void sink_writable(struct sink *sink);
void sink_attach(struct sink *sink, struct stream *s);
void sink_free(struct sink *sink);

#endif
