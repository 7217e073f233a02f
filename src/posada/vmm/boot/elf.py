"""ELF kernels (``vmlinux``): segments and the PVH note. Pure but for reading the file; the file is untrusted.

Sources: ELF-64 Object File Format 1.5; xen/include/public/elfnote.h (PHYS32_ENTRY).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from posada.errors import ImageError

MAX_SEGMENTS = 64
MAX_NOTES = 1 << 20

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_PT_LOAD, _PT_NOTE = 1, 4
_ET_EXEC, _ET_DYN = 2, 3
_X86_64 = 62
_PHYS32_ENTRY = 18


@dataclass(frozen=True, slots=True)
class Segment:
    """``file_size`` bytes at ``offset`` of the file go to guest-physical ``address``; zeroes up to ``size``."""

    address: int
    offset: int
    file_size: int
    size: int


@dataclass(frozen=True, slots=True)
class ElfKernel:
    """``entry``: 64-bit, physical. ``pvh_entry``: 32-bit, physical, or None when the kernel has no PVH note."""

    segments: tuple[Segment, ...]
    entry: int
    pvh_entry: int | None

    @property
    def start(self) -> int:
        return min(segment.address for segment in self.segments)

    @property
    def end(self) -> int:
        return max(segment.address + segment.size for segment in self.segments)


def parse(fd: int, size: int) -> ElfKernel:
    """Read the headers of an ELF kernel of ``size`` bytes. Raises ImageError for anything that is not one."""
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        raise ImageError("the kernel is cut short: its ELF header is incomplete")
    ident, kind, machine, _, entry, table, _, _, _, entry_size, count, _, _, _ = _HEADER.unpack(header)
    if ident[:7] != b"\x7fELF\x02\x01\x01" or kind not in (_ET_EXEC, _ET_DYN) or machine != _X86_64:
        raise ImageError("the kernel is not a 64-bit x86 ELF executable")
    if entry_size != _PROGRAM.size or not 0 < count <= MAX_SEGMENTS:
        raise ImageError(f"the kernel has {count} program headers of {entry_size} bytes each")
    headers = os.pread(fd, count * _PROGRAM.size, table) if table + count * _PROGRAM.size <= size else b""
    if len(headers) != count * _PROGRAM.size:
        raise ImageError("the kernel is cut short: its program headers lie outside the file")
    segments = []
    pvh_entry = None
    for kind, _, offset, virtual, physical, file_size, memory_size, _ in _PROGRAM.iter_unpack(headers):
        if kind not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + file_size > size:
            raise ImageError("the kernel is cut short: a segment lies outside the file")
        if kind == _PT_NOTE:
            if file_size > MAX_NOTES:
                raise ImageError(f"the kernel's notes take {file_size} bytes, and may take {MAX_NOTES}")
            pvh_entry = _find_pvh(os.pread(fd, file_size, offset)) or pvh_entry
        elif memory_size:
            if file_size > memory_size or physical + memory_size >= 1 << 63:
                raise ImageError(f"the kernel's segment at {physical:#x} has impossible sizes")
            segments.append(Segment(physical, offset, file_size, memory_size))
            if virtual <= entry < virtual + memory_size:
                entry = physical + entry - virtual
    if not segments:
        raise ImageError("the kernel has nothing to load")
    kernel = ElfKernel(tuple(segments), entry, pvh_entry)
    for address in (entry, pvh_entry):
        if address is not None and not any(s.address <= address < s.address + s.size for s in segments):
            raise ImageError(f"the kernel's entry point {address:#x} lies outside its segments")
    return kernel


def _find_pvh(notes: bytes) -> int | None:
    """The PHYS32_ENTRY note's address. Notes are 4-byte aligned; a damaged list just ends."""
    at = 0
    while at + _NOTE.size <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, at)
        name_at = at + _NOTE.size
        data_at = name_at + (name_size + 3 & ~3)
        if kind == _PHYS32_ENTRY and notes[name_at : name_at + name_size] == b"Xen\0" and size in (4, 8):
            data = notes[data_at : data_at + size]
            return int.from_bytes(data, "little") if len(data) == size else None
        at = data_at + (size + 3 & ~3)
    return None
