/* Streams: what is common to all kinds. Flow control is here, and nowhere else. */
#ifndef POSADA_STREAM_H
#define POSADA_STREAM_H

#include "link.h"

/* Takes the OPEN apart and has its kind open it. */
void stream_open(struct link *l, uint32_t id, const uint8_t *body, size_t n);
void stream_frame(struct link *l, const struct frame *f);
struct stream *stream_find(struct link *l, uint32_t id);

/* The kinds' openers, each in its own file. They take the stream over by setting kind and owner, or call stream_close. */
void exec_open(struct stream *s, const struct cbor *args);
void attach_open(struct stream *s, const struct cbor *args);
void read_open(struct stream *s, const struct cbor *args);
void write_open(struct stream *s, const struct cbor *args);
void tar_out_open(struct stream *s, const struct cbor *args);
void tar_in_open(struct stream *s, const struct cbor *args);
void connect_open(struct stream *s, const struct cbor *args);
void watch_open(struct stream *s, const struct cbor *args);

/* How many bytes may be sent now, at most MAX_PAYLOAD; 0: wait for resume. */
size_t stream_room(const struct stream *s, uint8_t flags);
/* Where to put up to stream_room bytes; then stream_sent says how many they became (0: none). */
uint8_t *stream_buffer(struct stream *s, size_t n);
void stream_sent(struct stream *s, uint8_t flags, size_t n);
void stream_eof(struct stream *s, uint8_t flags);
void stream_opened(struct stream *s, struct cbor_out *body);
/* The receiving side: n bytes of DATA have been consumed. */
void stream_consumed(struct stream *s, size_t n);
/* Sends CLOSE, with an error where why is not NULL (errno name added where error is not 0), and frees the stream. */
void stream_close(struct stream *s, const char *why, int error);
/* Frees without a word: the link is gone. */
void stream_drop(struct stream *s, bool asked);

#endif
