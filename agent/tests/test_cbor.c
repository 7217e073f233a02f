#include <string.h>

#include "../cbor.h"
#include "check.h"

static bool message(const char *bytes, size_t n, struct cbor *map)
{
	return cbor_message((const uint8_t *)bytes, n, map);
}

#define MESSAGE(literal, map) message(literal, sizeof(literal) - 1, map)

static void reads_what_rfc_8949_says(void)
{
	struct cbor map, list, item;
	/* {"a": 1, "b": [2, -3], "c": "xy", "d": h'00ff', "e": true, "f": null, "g": 1.5, "h": 2**40} */
	CHECK(MESSAGE("\xa8\x61" "a\x01\x61" "b\x82\x02\x22\x61" "c\x62xy\x61" "d\x42\x00\xff\x61" "e\xf5\x61" "f\xf6\x61"
		      "g\xfb\x3f\xf8\x00\x00\x00\x00\x00\x00\x61" "h\x1b\x00\x00\x01\x00\x00\x00\x00\x00", &map));
	CHECK(map.number == 8 && cbor_get_uint(&map, "a", 9) == 1 && cbor_get_uint(&map, "z", 9) == 9);
	CHECK(cbor_get_uint(&map, "h", 0) == 1ULL << 40 && cbor_get_bool(&map, "e", false));
	CHECK(cbor_get(&map, "f").type == CBOR_NULL && cbor_get(&map, "g").type == CBOR_FLOAT);
	list = cbor_get(&map, "b");
	CHECK(list.type == CBOR_ARRAY && list.number == 2);
	const uint8_t *at = list.data, *end = at + list.size;
	CHECK(cbor_read(&at, end, &item) && item.type == CBOR_UINT && item.number == 2);
	CHECK(cbor_read(&at, end, &item) && item.type == CBOR_NEGATIVE && item.number == 2 && at == end);
	struct cbor bytes = cbor_get(&map, "d");
	CHECK(bytes.type == CBOR_BYTES && bytes.size == 2 && bytes.data[1] == 0xff);
}

static void strings_become_c_strings_or_are_refused(void)
{
	struct cbor map;
	char out[4];
	CHECK(MESSAGE("\xa4\x61" "a\x63xyz\x61" "b\x64wxyz\x61" "c\x62x\x00\x61" "d\x01", &map));
	CHECK(cbor_get_string(&map, "a", out, sizeof out) == 3 && strcmp(out, "xyz") == 0);
	CHECK(cbor_get_string(&map, "b", out, sizeof out) == -2); /* does not fit */
	CHECK(cbor_get_string(&map, "c", out, sizeof out) == -2); /* NUL inside */
	CHECK(cbor_get_string(&map, "d", out, sizeof out) == -2); /* no string */
	CHECK(cbor_get_string(&map, "e", out, sizeof out) == -1); /* not there */
}

static void refuses_what_the_protocol_forbids(void)
{
	struct cbor map;
	CHECK(!MESSAGE("", &map));
	CHECK(!MESSAGE("\x01", &map));                 /* no map */
	CHECK(!MESSAGE("\xa0\x00", &map));             /* something behind it */
	CHECK(!MESSAGE("\xa1\x01\x02", &map));         /* a key that is no text */
	CHECK(!MESSAGE("\xa1\x61" "a", &map));         /* cut short */
	CHECK(!MESSAGE("\xa1\x61" "a\x62x", &map));    /* a string cut short */
	CHECK(!MESSAGE("\xbf\x61" "a\x01\xff", &map)); /* indefinite map */
	CHECK(!MESSAGE("\xa1\x61" "a\x5f\x41x\xff", &map));
	CHECK(!MESSAGE("\xa1\x61" "a\xc0\x01", &map));           /* a tag */
	CHECK(!MESSAGE("\xa1\x61" "a\x1c", &map));               /* reserved */
	CHECK(!MESSAGE("\xbb\xff\xff\xff\xff\xff\xff\xff\xff", &map)); /* 2**64-1 pairs */
	CHECK(!MESSAGE("\xa1\x61" "a\x9b\x7f\xff\xff\xff\xff\xff\xff\xff", &map));
	CHECK(!MESSAGE("\xa1\x61" "a\x7b\xff\xff\xff\xff\xff\xff\xff\xff", &map)); /* a length that wraps */
}

static void depth_is_bounded(void)
{
	struct cbor map;
	uint8_t deep[64] = {0xa1, 0x61, 'a'};
	for (int nested = 1; nested < 20; nested++) {
		memset(deep + 3, 0x81, (size_t)nested);
		deep[3 + nested] = 0;
		CHECK(cbor_message(deep, (size_t)nested + 4, &map) == (nested < CBOR_MAX_DEPTH));
	}
}

static void what_is_written_can_be_read(void)
{
	uint8_t bytes[256];
	struct cbor_out o = {.p = bytes, .cap = sizeof bytes};
	struct cbor map;
	cbor_put_map(&o, 5);
	cbor_pair_uint(&o, "big", UINT64_MAX);
	cbor_pair_text(&o, "name", "\xc3\xa9");
	cbor_pair_text(&o, "odd", "\xff\xfe"); /* a file name that is not UTF-8 is sent as bytes */
	cbor_put_text(&o, "list");
	size_t mark = cbor_begin_array(&o);
	cbor_put_int(&o, -1);
	cbor_put_int(&o, INT64_MIN);
	cbor_end_array(&o, mark, 2);
	cbor_put_text(&o, "half");
	cbor_put_double(&o, 0.5);
	CHECK(!o.full && cbor_message(bytes, o.len, &map));
	CHECK(cbor_get_uint(&map, "big", 0) == UINT64_MAX);
	CHECK(cbor_get(&map, "name").type == CBOR_TEXT && cbor_get(&map, "odd").type == CBOR_BYTES);
	CHECK(cbor_get(&map, "list").number == 2 && cbor_get(&map, "half").type == CBOR_FLOAT);
	struct cbor_out tight = {.p = bytes, .cap = 4};
	cbor_put_text(&tight, "does not fit");
	CHECK(tight.full && tight.len <= 4);
}

static void utf8(void)
{
	static const char *const good[] = {"", "a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf"};
	static const char *const bad[] = {"\x80", "\xc0\x80", "\xc3", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\xff"};
	for (size_t i = 0; i < sizeof good / sizeof *good; i++)
		CHECK(utf8_valid((const uint8_t *)good[i], strlen(good[i])));
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		CHECK(!utf8_valid((const uint8_t *)bad[i], strlen(bad[i])));
}

int main(void)
{
	reads_what_rfc_8949_says();
	strings_become_c_strings_or_are_refused();
	refuses_what_the_protocol_forbids();
	depth_is_bounded();
	what_is_written_can_be_read();
	utf8();
	return 0;
}
