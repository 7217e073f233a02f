"""The protocol's CBOR: what it takes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from posada.proto import cbor


@pytest.mark.parametrize(
    ("value", "data"),
    [  # From RFC 8949, appendix A.
        (0, "00"), (23, "17"), (24, "1818"), (100, "1864"), (1000, "1903e8"), (1000000, "1a000f4240"),
        (1000000000000, "1b000000e8d4a51000"), (18446744073709551615, "1bffffffffffffffff"),
        (-18446744073709551616, "3bffffffffffffffff"), (-1, "20"), (-1000, "3903e7"), (1.1, "fb3ff199999999999a"),
        (False, "f4"), (True, "f5"), (None, "f6"), (b"", "40"), (b"\x01\x02\x03\x04", "4401020304"), ("", "60"),
        ("IETF", "6449455446"), ("ü", "62c3bc"), ("水", "63e6b0b4"), ([], "80"), ([1, 2, 3], "83010203"),
        ([1, [2, 3], [4, 5]], "8301820203820405"), ({}, "a0"), ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
    ],
)  # fmt: skip
def test_rfc_examples(value: Any, data: str) -> None:
    assert cbor.encode(value).hex() == data
    decoded = cbor.decode(bytes.fromhex(data))
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize(("data", "value"), [("f93c00", 1.0), ("fa47c35000", 100000.0), ("1800", 0)])
def test_other_spellings_are_read(data: str, value: Any) -> None:
    assert cbor.decode(bytes.fromhex(data)) == value


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "truncated"),
        ("18", "truncated"),
        ("6261", "truncated"),
        ("9b00ffffffffffffff", "truncated"),  # an array of 2**56 items must not be made room for
        ("bb7fffffffffffffff", "truncated"),
        ("5bffffffffffffffff", "truncated"),
        ("0000", "1 bytes after"),
        ("5f42010243030405ff", "indefinite"),
        ("9fff", "indefinite"),
        ("bfff", "indefinite"),
        ("c11a514b67b0", "tags"),
        ("c249010000000000000000", "tags"),
        ("d82363282b29", "tags"),  # a regular expression, in general decoders
        ("a10102", "not text"),
        ("a2616101616102", "twice"),
        ("61ff", "UTF-8"),
        ("ff", "break"),
        ("f7", "simple"),
        ("1c", "reserved"),
        ("81" * 9 + "00", "deeper"),
    ],
)
def test_refused(data: str, why: str) -> None:
    with pytest.raises(cbor.CborError, match=why):
        cbor.decode(bytes.fromhex(data))


def test_depth_of_eight_is_allowed() -> None:
    value: Any = 1
    for _ in range(cbor.MAX_DEPTH):
        value = [value]
    assert cbor.decode(cbor.encode(value)) == value
    with pytest.raises(cbor.CborError, match="deeper"):
        cbor.encode([value])


@pytest.mark.parametrize("value", [1 << 64, -(1 << 64) - 1, {1: 2}, object(), "\udcff", {1, 2}])
def test_cannot_be_encoded(value: Any) -> None:
    with pytest.raises(cbor.CborError):
        cbor.encode(value)


def test_bodies_are_maps() -> None:
    assert cbor.decode_map(cbor.encode({"a": 1})) == {"a": 1}
    with pytest.raises(cbor.CborError, match="not a map"):
        cbor.decode_map(cbor.encode([1]))
