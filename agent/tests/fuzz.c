/*
 * Random bytes into everything that reads what a client sends: frames, CBOR, tar headers. As a libFuzzer target
 * (-DLIBFUZZER -fsanitize=fuzzer), or by itself: fuzz [RUNS [SEED]] mutates known good messages. A sanitizer, or a crash,
 * says when something is wrong; the checks here are what must hold whatever comes.
 */
#include <string.h>

#include "../cbor.h"
#include "../frame.h"
#include "../tar.h"
#include "check.h"

static void walk(const struct cbor *value, int depth)
{
	const uint8_t *at = value->data, *end = value->data + value->size;
	struct cbor item;
	char text[32];
	CHECK(depth <= CBOR_MAX_DEPTH + 1);
	int n = cbor_string(value, text, sizeof text);
	CHECK(n < 0 || (n < (int)sizeof text && strlen(text) == (size_t)n));
	if (value->type != CBOR_ARRAY && value->type != CBOR_MAP)
		return;
	uint64_t items = value->type == CBOR_MAP ? value->number * 2 : value->number;
	for (uint64_t i = 0; i < items; i++) {
		CHECK(cbor_read(&at, end, &item)); /* it was all checked when the whole was read */
		walk(&item, depth + 1);
	}
	CHECK(at == end);
}

static void message(const uint8_t *p, size_t n)
{
	struct cbor map;
	if (!cbor_message(p, n, &map))
		return;
	walk(&map, 1);
	cbor_get(&map, "kind");
	cbor_get_uint(&map, "id", 0);
}

static void stream(const uint8_t *p, size_t n)
{
	static struct framer f;
	struct frame frame;
	framer_reset(&f);
	while (n) {
		uint8_t *where;
		size_t k = framer_space(&f, &where);
		CHECK(k > 0);
		k = k < n ? k : n;
		k = k > 97 ? 97 : k;
		memcpy(where, p, k);
		framer_added(&f, k);
		p += k;
		n -= k;
		for (enum frame_event e; (e = framer_next(&f, &frame)) != FRAME_NONE;) {
			CHECK(e != FRAME_GOT || (frame_valid(&frame) && frame.payload + frame.length <= f.data + sizeof f.data));
			if (e == FRAME_GOT)
				message(frame.payload, frame.length);
		}
	}
}

static void tar(const uint8_t *p, size_t n)
{
	static struct tar_entry e;
	bool name = false, link = false, size = false;
	uint8_t block[TAR_BLOCK] = {0};
	memcpy(block, p, n < sizeof block ? n : sizeof block);
	if (tar_parse(block, &e) == TAR_ENTRY)
		CHECK(strlen(e.name) < sizeof e.name && strlen(e.link) < sizeof e.link && e.size <= INT64_MAX);
	char *text = malloc(n + 1); /* so that a sanitizer sees a read behind the end; ended as tarin.c ends it */
	CHECK(text);
	memcpy(text, p, n);
	text[n] = 0;
	tar_pax(text, n, &e, &name, &link, &size);
	CHECK(!name || strlen(e.name) < sizeof e.name);
	free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	if (!n)
		return 0;
	switch (*p % 3) {
	case 0: stream(p + 1, n - 1); break;
	case 1: message(p + 1, n - 1); break;
	default: tar(p + 1, n - 1); break;
	}
	return 0;
}

#ifndef LIBFUZZER
/* In memory of its own size: a sanitizer sees a read behind the end. */
static void one(const uint8_t *p, size_t n)
{
	uint8_t *copy = malloc(n);
	CHECK(copy);
	memcpy(copy, p, n);
	LLVMFuzzerTestOneInput(copy, n);
	free(copy);
}

static uint64_t state;

static uint32_t any(uint32_t below)
{
	state = state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint32_t)(state >> 33) % below;
}

/* One good input of each sort. */
static size_t good(uint8_t *out, uint32_t sort)
{
	static const uint8_t body[] = "\xa4\x64kind\x64" "exec\x64" "argv\x82\x62sh\x62-c\x63" "env\xa1\x61" "A\x61" "b\x65stdin\xf4";
	static const char pax[] = "30 mtime=1700000000.000000000\n12 path=a/b\n17 linkpath=c/d/e\n11 size=99\n";
	static struct tar_entry e = {.name = "a/b", .type = '0', .mode = 0644, .size = 12};
	uint8_t *p = out;
	switch (sort) {
	case 0:
		*p++ = 0;
		memcpy(p, MAGIC_CLIENT, MAGIC_SIZE);
		memset(p + MAGIC_SIZE, 1, NONCE_SIZE);
		p += MAGIC_SIZE + NONCE_SIZE;
		for (uint32_t i = 0; i < 3; i++) {
			frame_header(p, sizeof body - 1, i, i ? T_OPEN : T_CALL, 0);
			memcpy(p + HEADER_SIZE, body, sizeof body - 1);
			p += HEADER_SIZE + sizeof body - 1;
		}
		break;
	case 1:
		*p++ = 1;
		memcpy(p, body, sizeof body - 1);
		p += sizeof body - 1;
		break;
	case 2:
		*p++ = 2;
		p += tar_header(&e, p);
		break;
	default:
		*p++ = 2;
		memcpy(p, pax, sizeof pax - 1);
		p += sizeof pax - 1;
		break;
	}
	return (size_t)(p - out);
}

static size_t mutate(uint8_t *p, size_t n, size_t cap)
{
	static const uint8_t telling[] = {0, 1, 0x17, 0x18, 0x1b, 0x1f, 0x5f, 0x7f, 0x80, 0x9b, 0xa1, 0xbb, 0xbf, 0xf5, 0xfe, 0xff};
	for (uint32_t times = 1 + any(8); times--;) {
		size_t at = 1 + any((uint32_t)(n > 1 ? n - 1 : 1));
		switch (any(5)) {
		case 0: p[at] ^= (uint8_t)(1 << any(8)); break;
		case 1: p[at] = telling[any(sizeof telling)]; break;
		case 2: p[at] = (uint8_t)any(256); break;
		case 3: n = at > 1 ? at : n; break;
		default: {
			size_t k = 1 + any(16);
			if (n + k > cap || at >= n)
				break;
			memmove(p + at + k, p + at, n - at);
			n += k;
		}
		}
	}
	return n;
}

int main(int argc, char **argv)
{
	unsigned long runs = argc > 1 ? strtoul(argv[1], NULL, 10) : 200000;
	state = argc > 2 ? strtoul(argv[2], NULL, 10) : 1;
	static uint8_t input[4096];
	for (unsigned long i = 0; i < runs; i++) {
		size_t n = good(input, any(4));
		one(input, i ? mutate(input, n, sizeof input) : n);
	}
	return 0;
}
#endif
