"""Kernels small enough to read: an ELF file with a PVH note, and a bzImage, around a few bytes of code."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

LOAD = 0x10_0000


def elf(
    code: bytes,
    *,
    pvh: bool = True,
    address: int = LOAD,
    entry: int | None = None,
    memory_size: int | None = None,
    segments: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """An ELF64 kernel that is loaded at ``address`` and starts there, with further ``segments`` (address, data)."""
    entry = address if entry is None else entry
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", entry) if pvh else struct.pack("<III4sQ", 4, 8, 6, b"Xen\0", 1)
    loads = [(address, code, memory_size or len(code)), *((at, data, len(data)) for at, data in segments)]
    table_size = 56 * (len(loads) + 1)
    offset = 64 + table_size
    headers, bodies = b"", b""
    for at, data, size in loads:
        headers += struct.pack("<IIQQQQQQ", 1, 7, offset + len(bodies), at, at, len(data), size, 4096)
        bodies += data
    headers += struct.pack("<IIQQQQQQ", 4, 4, offset + len(bodies), 0, 0, len(note), len(note), 4)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, len(loads) + 1, 0, 0, 0)
    return header + headers + bodies + note


def bzimage(
    code: bytes, *, version: int = 0x20F, flags: int = 1, address: int = LOAD, init_size: int = 1 << 16
) -> bytes:
    """A bzImage whose 64-bit entry point runs ``code``."""
    setup = bytearray(1024)
    setup[0x1F1] = 1  # setup sectors
    setup[0x200:0x202] = b"\xeb\x6a"  # the header ends at 0x26C
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = 1
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<H", setup, 0x236, flags)
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<Q", setup, 0x258, address)
    struct.pack_into("<I", setup, 0x260, init_size)
    return bytes(setup) + bytes(0x200) + code + bytes(16)


def file(data: bytes) -> int:
    """A descriptor of an unnamed file that holds ``data``."""
    fd = os.memfd_create("kernel")
    os.write(fd, data)
    return fd
