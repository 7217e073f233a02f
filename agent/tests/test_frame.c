#include <string.h>

#include "../frame.h"
#include "check.h"

static struct framer f;

/* Puts bytes in, `step` at a time, and writes down what comes out: n(othing) is left out. */
static void feed(const uint8_t *p, size_t n, size_t step, char *log, uint8_t *last)
{
	struct frame frame;
	size_t used = strlen(log);
	while (n) {
		uint8_t *where;
		size_t k = framer_space(&f, &where);
		k = k < step ? k : step;
		k = k < n ? k : n;
		CHECK(k > 0);
		memcpy(where, p, k);
		framer_added(&f, k);
		p += k;
		n -= k;
		for (enum frame_event e; (e = framer_next(&f, &frame)) != FRAME_NONE;) {
			log[used++] = e == FRAME_GOT ? 'F' : e == FRAME_PREAMBLE ? 'P' : 'B';
			log[used] = 0;
			if (last && frame.length && e != FRAME_BROKEN)
				*last = frame.payload[0];
		}
	}
}

static size_t preamble(uint8_t *out, uint8_t nonce)
{
	memcpy(out, MAGIC_CLIENT, MAGIC_SIZE);
	memset(out + MAGIC_SIZE, nonce, NONCE_SIZE);
	return MAGIC_SIZE + NONCE_SIZE;
}

static size_t data(uint8_t *out, uint8_t fill, uint32_t n)
{
	frame_header(out, n, 7, T_DATA, 0);
	memset(out + HEADER_SIZE, fill, n);
	return HEADER_SIZE + n;
}

static void frames_in_pieces_of_any_size(void)
{
	static uint8_t bytes[200000];
	for (size_t step = 1; step < 100000; step = step * 3 + 1) {
		char log[64] = "";
		uint8_t last = 0;
		size_t n = preamble(bytes, 1);
		n += data(bytes + n, 'a', 5);
		n += data(bytes + n, 'b', 0);
		n += data(bytes + n, 'c', MAX_PAYLOAD);
		n += data(bytes + n, 'd', 1);
		framer_reset(&f);
		feed(bytes, n, step, log, &last);
		CHECK(strcmp(log, "PFFFF") == 0 && last == 'd');
	}
}

static void hunts_through_garbage(void)
{
	uint8_t bytes[300];
	char log[64] = "";
	uint8_t last = 0;
	size_t n = 0;
	/* Beginnings of a preamble that are none. */
	memcpy(bytes, "xxPPOSADAPOSADA\xff\xfd", 17);
	n = 17;
	memcpy(bytes + n, MAGIC_CLIENT, MAGIC_SIZE - 1);
	n += MAGIC_SIZE - 1;
	n += preamble(bytes + n, 9);
	n += data(bytes + n, 'z', 3);
	framer_reset(&f);
	feed(bytes, n, 1, log, &last);
	CHECK(strcmp(log, "PF") == 0 && last == 'z');
}

static void a_preamble_between_frames_starts_anew(void)
{
	uint8_t bytes[300];
	char log[64] = "";
	uint8_t last = 0;
	size_t n = preamble(bytes, 1);
	n += data(bytes + n, 'a', 3);
	n += preamble(bytes + n, 2);
	n += data(bytes + n, 'b', 3);
	framer_reset(&f);
	feed(bytes, n, 7, log, &last);
	CHECK(strcmp(log, "PFBPF") == 0 && last == 'b');
}

/* The client's way out of a torn frame: zeros that finish any payload, then a preamble. At every place it may be torn. */
static void zeros_resynchronise(void)
{
	static uint8_t bytes[3 * (MAX_PAYLOAD + 100)];
	for (size_t torn = 0; torn <= HEADER_SIZE + 40; torn++) {
		char log[64] = "";
		uint8_t last = 0;
		size_t n = preamble(bytes, 1);
		data(bytes + n, 'a', MAX_PAYLOAD);
		n += torn;
		memset(bytes + n, 0, MAX_PAYLOAD + 10);
		n += MAX_PAYLOAD + 10;
		n += preamble(bytes + n, 5);
		n += data(bytes + n, 'q', 1);
		framer_reset(&f);
		feed(bytes, n, 4096, log, &last);
		size_t length = strlen(log);
		CHECK(length >= 3 && strcmp(log + length - 3, "BPF") == 0 && last == 'q');
	}
}

static void bad_headers(void)
{
	static const struct frame bad[] = {
		{.length = MAX_PAYLOAD + 1, .stream = 1, .type = T_DATA}, {.stream = 1, .type = T_DATA, .flags = 2},
		{.stream = 0, .type = T_DATA}, {.stream = 1, .type = T_HELLO}, {.stream = 1, .type = T_CALL},
		{.length = 65, .type = T_PING}, {.length = 1, .stream = 1, .type = T_EOF}, {.length = 3, .stream = 1, .type = T_CREDIT},
		{.stream = 0, .type = T_OPEN}, {.type = 0}, {.stream = 1, .type = 16}, {.type = T_REPLY}, {.stream = 1, .type = T_EXIT},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		CHECK(!frame_valid(&bad[i]));
	CHECK(frame_valid(&(struct frame){.length = 4, .stream = 1, .type = T_CREDIT, .flags = 1}));
	CHECK(frame_valid(&(struct frame){.length = 64, .type = T_PING}));
}

int main(void)
{
	frames_in_pieces_of_any_size();
	hunts_through_garbage();
	a_preamble_between_frames_starts_anew();
	zeros_resynchronise();
	bad_headers();
	return 0;
}
