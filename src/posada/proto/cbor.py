"""The part of CBOR (RFC 8949) the agent protocol uses, and nothing more of it.

Integers of 64 bits, floats, byte and text strings, arrays, maps with text keys, false, true, null; definite lengths;
bounded depth. General CBOR libraries go further than a hostile peer should be let: tags build regular expressions,
bignums, dates and shared references while decoding, and indefinite items hide their size.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 8

_UINT, _NEGINT, _BYTES, _TEXT, _ARRAY, _MAP, _SIMPLE = 0, 1, 2, 3, 4, 5, 7
_SIMPLE_VALUES = {20: False, 21: True, 22: None}
_FLOATS = {25: struct.Struct(">e"), 26: struct.Struct(">f"), 27: struct.Struct(">d")}
_UINTS = {24: struct.Struct(">B"), 25: struct.Struct(">H"), 26: struct.Struct(">I"), 27: struct.Struct(">Q")}


class CborError(ValueError):
    """Not CBOR, or CBOR the protocol does not allow."""


def encode(value: Any) -> bytes:
    """CBOR of a value made of dict, list, tuple, str, bytes, int, float, bool and None. Raises CborError."""
    out = bytearray()
    _encode(value, out, 1)
    return bytes(out)


def decode(data: bytes) -> Any:
    """The one value ``data`` holds. Raises CborError, also for bytes that follow it."""
    reader = _Reader(data)
    value = reader.item(1)
    if reader.position != len(data):
        raise CborError(f"{len(data) - reader.position} bytes after the value")
    return value


def decode_map(data: bytes) -> dict[str, Any]:
    """As `decode`, for the bodies of frames: a map. Raises CborError."""
    value = decode(data)
    if not isinstance(value, dict):
        raise CborError("the body is not a map")
    return value


def _head(major: int, number: int, out: bytearray) -> None:
    if number < 24:
        out.append(major << 5 | number)
        return
    for info, size in ((24, 8), (25, 16), (26, 32), (27, 64)):
        if number < 1 << size:
            out.append(major << 5 | info)
            out += number.to_bytes(size // 8, "big")
            return
    raise CborError(f"{number} does not fit into 64 bits")


def _encode(value: Any, out: bytearray, depth: int) -> None:
    if isinstance(value, str):
        try:
            data = value.encode()
        except UnicodeEncodeError as error:
            raise CborError(f"{value!r} is not UTF-8 text") from error
        _head(_TEXT, len(data), out)
        out += data
    elif isinstance(value, bool) or value is None:
        out.append(_SIMPLE << 5 | (22 if value is None else 21 if value else 20))
    elif isinstance(value, int):
        _head(_UINT if value >= 0 else _NEGINT, value if value >= 0 else -1 - value, out)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _head(_BYTES, len(value), out)
        out += value
    elif isinstance(value, float):
        out.append(_SIMPLE << 5 | 27)
        out += _FLOATS[27].pack(value)
    elif isinstance(value, (list, tuple, Mapping)):
        if depth > MAX_DEPTH:
            raise CborError(f"deeper than {MAX_DEPTH}")
        if not isinstance(value, Mapping):
            _head(_ARRAY, len(value), out)
            for item in value:
                _encode(item, out, depth + 1)
            return
        _head(_MAP, len(value), out)
        for key, item in value.items():
            if not isinstance(key, str):
                raise CborError(f"the key {key!r} is not text")
            _encode(key, out, depth + 1)
            _encode(item, out, depth + 1)
    else:
        raise CborError(f"cannot encode a {type(value).__name__}")


class _Reader:
    __slots__ = ("data", "position")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        start, end = self.position, self.position + size
        if end > len(self.data):
            raise CborError("truncated")
        self.position = end
        return self.data[start:end]

    def item(self, depth: int) -> Any:
        initial = self.take(1)[0]
        major, info = initial >> 5, initial & 31
        if major == _SIMPLE:
            if info in _SIMPLE_VALUES:
                return _SIMPLE_VALUES[info]
            if info in _FLOATS:
                return _FLOATS[info].unpack(self.take(_FLOATS[info].size))[0]
            raise CborError(f"simple value or break {info}")
        if info < 24:
            number = info
        elif info in _UINTS:
            number = _UINTS[info].unpack(self.take(_UINTS[info].size))[0]
        else:
            raise CborError("indefinite or reserved length")
        if major == _UINT:
            return number
        if major == _TEXT:
            return self.text(number)
        if major == _NEGINT:
            return -1 - number
        if major == _BYTES:
            return self.take(number)
        if major in (_ARRAY, _MAP):
            return self.container(major, number, depth)
        raise CborError("tags are not allowed")

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise CborError("text that is not UTF-8") from error

    def container(self, major: int, count: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CborError(f"deeper than {MAX_DEPTH}")
        if major == _ARRAY:
            return [self.item(depth + 1) for _ in range(self.bounded(count, 1))]
        result: dict[str, Any] = {}
        for _ in range(self.bounded(count, 2)):
            key = self.item(depth + 1)
            if not isinstance(key, str):
                raise CborError("a key that is not text")
            if key in result:
                raise CborError(f"the key {key!r} twice")
            result[key] = self.item(depth + 1)
        return result

    def bounded(self, count: int, least: int) -> int:
        """``count`` items of at least ``least`` bytes each must fit into what is left."""
        if count * least > len(self.data) - self.position:
            raise CborError("truncated")
        return count
