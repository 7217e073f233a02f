"""ACPI Machine Language: each function gives the bytes of one term. Pure.

Source: ACPI 6.5, chapter 20 (grammar) and 6.4 (resource descriptors); names are the grammar's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_ZERO, _ONE, _BYTE, _WORD, _DWORD, _STRING, _QWORD = 0x00, 0x01, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_EXT = 0x5B

LOCAL0 = b"\x60"


def package_length(body: bytes) -> bytes:
    """PkgLength (20.2.4) followed by ``body``. The length counts its own bytes."""
    size = len(body)
    if size + 1 < 1 << 6:
        return bytes([size + 1]) + body
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0x0F]) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"an AML package of {size} bytes is too long")


def path(name: str) -> bytes:
    r"""NameString: ``\_SB.GED`` or ``_HID``; segments are padded to four characters."""
    root = b"\\" if name.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode("ascii") for segment in name.lstrip("\\").split(".") if segment]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"{name!r} has a segment of more than four characters")
    prefix = {0: b"\0", 1: b"", 2: b"\x2e"}.get(len(segments), bytes([0x2F, len(segments)]))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest constant."""
    if value in (0, 1):
        return bytes([_ZERO if value == 0 else _ONE])
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit into 64 bits")


def string(text: str) -> bytes:
    return bytes([_STRING]) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """``PNP0501`` as the compressed integer that _HID takes (6.1.5; 19.6.36 EISAID)."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return bytes([_DWORD]) + value.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    return b"\x11" + package_length(integer(len(data)) + data)


def package(items: Iterable[bytes]) -> bytes:
    elements = list(items)
    return b"\x12" + package_length(bytes([len(elements)]) + b"".join(elements))


def name(what: str, value: bytes) -> bytes:
    return b"\x08" + path(what) + value


def scope(where: str, *terms: bytes) -> bytes:
    return b"\x10" + package_length(path(where) + b"".join(terms))


def device(what: str, *terms: bytes) -> bytes:
    return bytes([_EXT, 0x82]) + package_length(path(what) + b"".join(terms))


def method(what: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    return b"\x14" + package_length(path(what) + bytes([arguments | serialized << 3]) + b"".join(terms))


def io_region(what: str, port: int, size: int) -> bytes:
    """OperationRegion in SystemIO."""
    return bytes([_EXT, 0x80]) + path(what) + b"\x01" + integer(port) + integer(size)


def byte_field(region: str, *fields: str) -> bytes:
    """Field (ByteAcc, NoLock, WriteAsZeros) of consecutive bytes."""
    units = b"".join(field.ljust(4, "_").encode("ascii") + b"\x08" for field in fields)
    return bytes([_EXT, 0x81]) + package_length(path(region) + b"\x41" + units)


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def bit_and(left: bytes, right: bytes) -> bytes:
    """And (left, right), the result used at once."""
    return b"\x7b" + left + right + b"\0"


def if_(condition: bytes, *terms: bytes) -> bytes:
    return b"\xa0" + package_length(condition + b"".join(terms))


def notify(what: str, value: int) -> bytes:
    return b"\x86" + path(what) + integer(value)


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate: the descriptors, and an end tag whose checksum 0 means *not checked* (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io_ports(port: int, size: int) -> bytes:
    """IO (Decode16), fixed (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def memory(address: int, size: int) -> bytes:
    """Memory32Fixed, read-write (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, address, size)


def interrupt(gsi: int, *, shared: bool = False) -> bytes:
    """Extended interrupt: consumer, edge, active high (6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03 | shared << 3, 1, gsi)
