#include "cbor.h"

#include <string.h>

/* Reads an initial byte and its argument. */
static bool read_head(const uint8_t **p, const uint8_t *end, unsigned *major, unsigned *info, uint64_t *number)
{
	if (*p >= end)
		return false;
	uint8_t first = *(*p)++;
	*major = first >> 5;
	*info = first & 31;
	if (*info < 24) {
		*number = *info;
		return true;
	}
	if (*info > 27)
		return false; /* reserved, or an indefinite length */
	size_t width = (size_t)1 << (*info - 24);
	if ((size_t)(end - *p) < width)
		return false;
	*number = 0;
	for (size_t i = 0; i < width; i++)
		*number = *number << 8 | *(*p)++;
	return true;
}

static bool read_simple(unsigned info, uint64_t number, struct cbor *value)
{
	value->number = 0;
	if (info == 20 || info == 21) {
		value->type = CBOR_BOOL;
		value->number = number == 21;
	} else if (info == 22 || info == 23) {
		value->type = CBOR_NULL;
	} else if (info >= 25 && info <= 27) {
		value->type = CBOR_FLOAT;
	} else {
		return false;
	}
	return true;
}

static bool read_item(const uint8_t **p, const uint8_t *end, struct cbor *value, int depth)
{
	static const enum cbor_type types[] = {CBOR_UINT, CBOR_NEGATIVE, CBOR_BYTES, CBOR_TEXT, CBOR_ARRAY, CBOR_MAP};
	unsigned major, info;
	uint64_t number;
	if (!read_head(p, end, &major, &info, &number))
		return false;
	*value = (struct cbor){.number = number, .data = *p};
	if (major == 7)
		return read_simple(info, number, value);
	if (major == 6)
		return false;
	value->type = types[major];
	size_t left = (size_t)(end - *p);
	if (major == 2 || major == 3) {
		if (number > left)
			return false;
		value->size = (size_t)number;
		*p += number;
	} else if (major == 4 || major == 5) {
		/* Every item takes a byte at least: a lying count ends here and not in a long loop. */
		if (depth <= 0 || number > left)
			return false;
		uint64_t items = major == 5 ? number * 2 : number;
		struct cbor below;
		for (uint64_t i = 0; i < items; i++)
			if (!read_item(p, end, &below, depth - 1))
				return false;
		value->size = (size_t)(*p - value->data);
	}
	return true;
}

bool cbor_read(const uint8_t **p, const uint8_t *end, struct cbor *value)
{
	return read_item(p, end, value, CBOR_MAX_DEPTH);
}

bool cbor_message(const uint8_t *p, size_t n, struct cbor *map)
{
	const uint8_t *end = p + n;
	if (!cbor_read(&p, end, map) || p != end || map->type != CBOR_MAP)
		return false;
	const uint8_t *at = map->data;
	for (uint64_t i = 0; i < map->number; i++) {
		struct cbor key, value;
		if (!cbor_read(&at, end, &key) || key.type != CBOR_TEXT || !cbor_read(&at, end, &value))
			return false;
	}
	return true;
}

bool cbor_is(const struct cbor *value, const char *text)
{
	return value->type == CBOR_TEXT && value->size == strlen(text) && memcmp(value->data, text, value->size) == 0;
}

struct cbor cbor_get(const struct cbor *map, const char *key)
{
	struct cbor name, value, none = {0};
	if (map->type != CBOR_MAP)
		return none;
	const uint8_t *at = map->data, *end = map->data + map->size;
	for (uint64_t i = 0; i < map->number; i++) {
		if (!cbor_read(&at, end, &name) || !cbor_read(&at, end, &value))
			return none;
		if (cbor_is(&name, key))
			return value;
	}
	return none;
}

uint64_t cbor_get_uint(const struct cbor *map, const char *key, uint64_t otherwise)
{
	struct cbor value = cbor_get(map, key);
	return value.type == CBOR_UINT ? value.number : otherwise;
}

bool cbor_get_bool(const struct cbor *map, const char *key, bool otherwise)
{
	struct cbor value = cbor_get(map, key);
	return value.type == CBOR_BOOL ? value.number != 0 : otherwise;
}

int cbor_string(const struct cbor *value, char *out, size_t cap)
{
	if (value->type == CBOR_NONE || value->type == CBOR_NULL)
		return -1;
	if ((value->type != CBOR_TEXT && value->type != CBOR_BYTES) || value->size >= cap)
		return -2;
	if (memchr(value->data, 0, value->size))
		return -2;
	memcpy(out, value->data, value->size);
	out[value->size] = 0;
	return (int)value->size;
}

int cbor_get_string(const struct cbor *map, const char *key, char *out, size_t cap)
{
	struct cbor value = cbor_get(map, key);
	return cbor_string(&value, out, cap);
}

/* RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF. */
bool utf8_valid(const uint8_t *p, size_t n)
{
	for (size_t i = 0; i < n;) {
		uint8_t c = p[i++];
		if (c < 0x80)
			continue;
		size_t more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
		if (c < 0xc2 || c > 0xf4 || n - i < more)
			return false;
		uint8_t low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
		uint8_t high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
		if (p[i] < low || p[i] > high)
			return false;
		for (size_t k = 1; k < more; k++)
			if ((p[i + k] & 0xc0) != 0x80)
				return false;
		i += more;
	}
	return true;
}

static void put(struct cbor_out *o, const void *p, size_t n)
{
	if (o->full || o->cap - o->len < n) {
		o->full = true;
		return;
	}
	if (n)
		memcpy(o->p + o->len, p, n);
	o->len += n;
}

static void put_head(struct cbor_out *o, unsigned major, uint64_t number)
{
	uint8_t head[9];
	unsigned width = number < 24 ? 0 : number <= 0xff ? 1 : number <= 0xffff ? 2 : number <= 0xffffffff ? 4 : 8;
	unsigned info = width == 0 ? (unsigned)number : width == 1 ? 24 : width == 2 ? 25 : width == 4 ? 26 : 27;
	head[0] = (uint8_t)(major << 5 | info);
	for (unsigned i = 0; i < width; i++)
		head[1 + i] = (uint8_t)(number >> (8 * (width - 1 - i)));
	put(o, head, 1 + width);
}

void cbor_put_uint(struct cbor_out *o, uint64_t n)
{
	put_head(o, 0, n);
}

void cbor_put_int(struct cbor_out *o, int64_t n)
{
	if (n < 0)
		put_head(o, 1, (uint64_t)(-1 - n));
	else
		put_head(o, 0, (uint64_t)n);
}

void cbor_put_double(struct cbor_out *o, double d)
{
	uint8_t item[9] = {7 << 5 | 27};
	uint64_t bits;
	memcpy(&bits, &d, sizeof bits);
	for (int i = 0; i < 8; i++)
		item[1 + i] = (uint8_t)(bits >> (56 - 8 * i));
	put(o, item, sizeof item);
}

void cbor_put_bool(struct cbor_out *o, bool b)
{
	put_head(o, 7, b ? 21 : 20);
}

void cbor_put_bytes(struct cbor_out *o, const void *p, size_t n)
{
	put_head(o, 2, n);
	put(o, p, n);
}

void cbor_put_text(struct cbor_out *o, const char *text)
{
	size_t n = strlen(text);
	put_head(o, 3, n);
	put(o, text, n);
}

void cbor_put_name(struct cbor_out *o, const char *name)
{
	size_t n = strlen(name);
	if (utf8_valid((const uint8_t *)name, n))
		cbor_put_text(o, name);
	else
		cbor_put_bytes(o, name, n);
}

void cbor_put_map(struct cbor_out *o, size_t pairs)
{
	put_head(o, 5, pairs);
}

/* The count is always written in two bytes, so that it can be filled in afterwards. */
static size_t begin(struct cbor_out *o, unsigned major)
{
	uint8_t head[3] = {(uint8_t)(major << 5 | 25), 0, 0};
	put(o, head, sizeof head);
	return o->len - 2;
}

static void end(struct cbor_out *o, size_t mark, size_t items)
{
	if (o->full)
		return;
	o->p[mark] = (uint8_t)(items >> 8);
	o->p[mark + 1] = (uint8_t)items;
}

size_t cbor_begin_array(struct cbor_out *o)
{
	return begin(o, 4);
}

void cbor_end_array(struct cbor_out *o, size_t mark, size_t items)
{
	end(o, mark, items);
}

size_t cbor_begin_map(struct cbor_out *o)
{
	return begin(o, 5);
}

void cbor_end_map(struct cbor_out *o, size_t mark, size_t pairs)
{
	end(o, mark, pairs);
}
