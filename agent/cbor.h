/*
 * CBOR (RFC 8949), the part the protocol uses: definite lengths, unsigned and negative integers, byte and text strings,
 * arrays, maps, booleans, null, floats (skipped only). Tags and indefinite lengths are refused. Nothing is copied or
 * allocated when reading: a value is a view into the message.
 */
#ifndef POSADA_CBOR_H
#define POSADA_CBOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CBOR_MAX_DEPTH 8

enum cbor_type { CBOR_NONE, CBOR_UINT, CBOR_NEGATIVE, CBOR_BYTES, CBOR_TEXT, CBOR_ARRAY, CBOR_MAP, CBOR_BOOL, CBOR_NULL, CBOR_FLOAT };

struct cbor {
	enum cbor_type type;
	uint64_t number;     /* uint, bool, -1-n of a negative, number of items or pairs */
	const uint8_t *data; /* string: its bytes; array and map: the first item */
	size_t size;         /* string: bytes; array and map: bytes of all items */
};

/* Reads one item and all below it from *p, and moves *p behind it. false: malformed, too deep, or cut short. */
bool cbor_read(const uint8_t **p, const uint8_t *end, struct cbor *value);
/* The whole message must be one map with text keys. */
bool cbor_message(const uint8_t *p, size_t n, struct cbor *map);

/* The value of a key; its type is CBOR_NONE where the map has no such key or is no map. */
struct cbor cbor_get(const struct cbor *map, const char *key);
uint64_t cbor_get_uint(const struct cbor *map, const char *key, uint64_t otherwise);
bool cbor_get_bool(const struct cbor *map, const char *key, bool otherwise);
/*
 * A text (or bytes: names on Linux need not be UTF-8) as a C string, copied into out. Returns its length, -1 if there is
 * none, -2 if it is of the wrong type, holds a NUL or does not fit.
 */
int cbor_get_string(const struct cbor *map, const char *key, char *out, size_t cap);
int cbor_string(const struct cbor *value, char *out, size_t cap);
bool cbor_is(const struct cbor *value, const char *text);

/* Writing: into a fixed buffer. What does not fit sets `full`, and the message must not be sent. */
struct cbor_out {
	uint8_t *p;
	size_t len, cap;
	bool full;
};

void cbor_put_uint(struct cbor_out *o, uint64_t n);
void cbor_put_int(struct cbor_out *o, int64_t n);
void cbor_put_double(struct cbor_out *o, double d);
void cbor_put_bool(struct cbor_out *o, bool b);
void cbor_put_bytes(struct cbor_out *o, const void *p, size_t n);
void cbor_put_text(struct cbor_out *o, const char *text);
/* A name from the guest: text where it is valid UTF-8, else bytes (the reader's decoder must not stumble). */
void cbor_put_name(struct cbor_out *o, const char *name);
void cbor_put_map(struct cbor_out *o, size_t pairs);
/* An array whose length is not known yet: begin returns a mark, end fills in the count. */
size_t cbor_begin_array(struct cbor_out *o);
void cbor_end_array(struct cbor_out *o, size_t mark, size_t items);
size_t cbor_begin_map(struct cbor_out *o);
void cbor_end_map(struct cbor_out *o, size_t mark, size_t pairs);

static inline void cbor_pair_uint(struct cbor_out *o, const char *key, uint64_t n)
{
	cbor_put_text(o, key);
	cbor_put_uint(o, n);
}

static inline void cbor_pair_bool(struct cbor_out *o, const char *key, bool b)
{
	cbor_put_text(o, key);
	cbor_put_bool(o, b);
}

static inline void cbor_pair_text(struct cbor_out *o, const char *key, const char *text)
{
	cbor_put_text(o, key);
	cbor_put_name(o, text);
}

bool utf8_valid(const uint8_t *p, size_t n);

#endif
