/*
 * A link: one byte channel with one client at a time, and the streams on it.
 *
 *            open                preamble              HELLO
 *   (closed) ────▶ HUNTING ────────────────▶ GREETING ───────▶ UP
 *                     ▲   reset: close, hang-up, bad header,    │
 *                     └── protocol error, another preamble ─────┘
 */
#ifndef POSADA_LINK_H
#define POSADA_LINK_H

#include "buf.h"
#include "cbor.h"
#include "frame.h"
#include "loop.h"

#define MAX_STREAMS 64
#define MAX_LINKS 16
#define PROTOCOL_VERSION 1

enum link_state { LINK_HUNTING, LINK_GREETING, LINK_UP };

struct stream;

struct link {
	struct watch watch;
	struct timer absent; /* a port whose host seems to be away */
	enum link_state state;
	bool host;       /* a port: its host has been seen connected, since it was last seen away */
	bool port;       /* a virtio port: it is never freed, and hunts for its next client */
	bool blocked;    /* the channel takes no more bytes now */
	bool unread;     /* the turn's share is used up, or too many answers wait: more may be there to read */
	bool congested;  /* so much waits to be written that streams must not add to it */
	uint64_t session; /* a number of its own for every preamble; 0 while hunting */
	uint64_t since;  /* fork_epoch at the preamble: older than now means inherited */
	struct framer in;
	struct buf out;
	struct stream *streams[MAX_STREAMS];
};

/* What a kind of stream does. Each may be NULL. */
struct stream_kind {
	void (*data)(struct stream *s, const uint8_t *p, size_t n);
	void (*eof)(struct stream *s);
	void (*credit)(struct stream *s, uint8_t flags, size_t n); /* in place of resume, where the kind must know how much */
	void (*resume)(struct stream *s);           /* there is room to send again; with `pumping`: each turn */
	void (*drop)(struct stream *s, bool asked); /* the stream goes: by the client's CLOSE (asked) or with its link */
	void (*signal)(struct stream *s, const struct cbor *args);
	void (*resize)(struct stream *s, const struct cbor *args);
};

struct stream {
	struct link *link;
	uint32_t id;
	const struct stream_kind *kind;
	void *owner;
	uint32_t unacked[2]; /* bytes sent and not yet credited, by flags */
	uint32_t received;   /* bytes received and not yet credited */
	uint32_t owed;       /* of those: consumed, credit not yet sent */
	bool pumping;        /* has data at hand without a descriptor that would say so */
	bool in_eof;
};

/* Begins to serve a channel; the descriptor must be non-blocking. NULL when there are too many. */
struct link *link_open(int fd, bool port);
/* Drops the streams and hunts. Processes go on where `keep` or a fork asks for it. */
void link_reset(struct link *l);
/* Resets every link but one whose client came before `epoch`. */
void links_reset_older(struct link *except, uint64_t epoch);
/* The link a session is still alive on, or NULL. For answers that come late. */
struct link *link_by_session(uint64_t session);
/* Writes what waits; lets pumping streams send. Returns true if one has more to send at once. */
bool links_turn(void);
/* Tries for at most ms milliseconds to get everything written out: before a power-off. */
void links_drain(int ms);

void link_frame(struct link *l, uint32_t stream, uint8_t type, uint8_t flags, const void *payload, size_t n);
/* A DATA frame whose n bytes lie behind a header's room at the tail of `out` already. */
void link_data(struct link *l, uint32_t stream, uint8_t flags, size_t n);
/* A frame whose payload is written in place: *o has MAX_PAYLOAD bytes of room; send ends it. */
void link_begin(struct link *l, struct cbor_out *o);
void link_send(struct link *l, struct cbor_out *o, uint32_t stream, uint8_t type);
/* Says why, and resets. */
void link_fail(struct link *l, const char *why);
void link_event(struct link *l, const char *event, const char *key, const char *text);
void links_event(const char *event, const char *key, const char *text);

#endif
