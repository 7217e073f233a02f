"""The pages a privately mapped machine has written: anonymous memory of its QEMU.

linux: Documentation/admin-guide/mm/pagemap.rst (pagemap bits, PAGEMAP_SCAN since 6.7), process_vm_readv(2).
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import os
import struct
from typing import NamedTuple

from posada.engine.qemu.mapping import Mapping
from posada.engine.qemu.ram import NAME
from posada.errors import EngineError

_PAGE = mmap.PAGESIZE
_PRESENT, _SWAPPED, _FILE = 1 << 63, 1 << 62, 1 << 61

_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS = 4096
#: UIO_MAXIOV
_IOV_MAX = 1024


class Area(NamedTuple):
    """A mapping of guest memory: addresses in QEMU, and the guest's offset of its start. Bytes."""

    start: int
    end: int
    offset: int
    shared: bool


def areas(pid: int) -> list[Area]:
    """Where QEMU maps guest memory. Raises EngineError if it does not, OSError if the process is gone."""
    found = []
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            if f"/memfd:{NAME}" not in line:
                continue
            addresses, access, offset = line.split()[:3]
            start, _, end = addresses.partition("-")
            found.append(Area(int(start, 16), int(end, 16), int(offset, 16), "s" in access))
    if not found:
        raise EngineError("the machine's memory cannot be found", detail=f"process {pid} does not map it")
    return found


def private(pid: int) -> list[tuple[int, int, int]]:
    """(address, guest offset, length) of what the process has written into its private mapping, in bytes."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        out = []
        for area in areas(pid):
            if area.shared:
                continue
            try:
                ranges = _scan(fd, area)
            except OSError:
                ranges = _read(fd, area)  # a kernel older than 6.7
            out += [(start, area.offset + start - area.start, end - start) for start, end in ranges]
        return out
    finally:
        os.close(fd)


def _scan(fd: int, area: Area) -> list[tuple[int, int]]:
    """By PAGEMAP_SCAN: microseconds a gigabyte. Anonymous is: present or swapped, and not of a file."""
    regions = array.array("Q", bytes(_REGIONS * 24))
    found: list[tuple[int, int]] = []
    start = area.start
    while start < area.end:
        out = (regions.buffer_info()[0], _REGIONS, 0)
        wanted = (_PAGE_IS_FILE, _PAGE_IS_FILE, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, 0)
        argument = bytearray(struct.pack("<12Q", 96, 0, start, area.end, 0, *out, *wanted))
        # SAFETY: the kernel writes at most _REGIONS entries of 24 bytes into `regions`, which lives longer.
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
        found += [(regions[3 * i], regions[3 * i + 1]) for i in range(count)]
        if count < _REGIONS:
            break
        # Not from walk_end: Linux 6.18 leaves it at an earlier stop when more than 512 ranges were found.
        start = found[-1][1]
    return found


def _read(fd: int, area: Area) -> list[tuple[int, int]]:
    """By reading the pagemap: 8 bytes a page."""
    count = (area.end - area.start) // _PAGE
    entries = array.array("Q")
    while len(entries) < count:
        data = os.pread(fd, (count - len(entries)) * 8, (area.start // _PAGE + len(entries)) * 8)
        if not data:
            break
        entries.frombytes(data)
    found: list[tuple[int, int]] = []
    for i, entry in enumerate(entries):
        if entry & (_PRESENT | _SWAPPED) and not entry & _FILE:
            address = area.start + i * _PAGE
            if found and found[-1][1] == address:
                found[-1] = (found[-1][0], address + _PAGE)
            else:
                found.append((address, address + _PAGE))
    return found


def read_private(pid: int, target: Mapping) -> int:
    """Copy the process's private pages to where they belong in a copy of its memory. Returns the bytes copied.

    ``target`` is that copy. The process must stand still. Raises OSError when it may not be read, EngineError when it
    changed under our hands.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    regions = private(pid)
    total = 0
    for i in range(0, len(regions), _IOV_MAX):
        part = regions[i : i + _IOV_MAX]
        if any(offset + length > target.size for _, offset, length in part):
            raise EngineError("the machine maps more memory than it has")
        local = array.array("Q", [x for _, offset, length in part for x in (target.address + offset, length)])
        remote = array.array("Q", [x for address, _, length in part for x in (address, length)])
        # SAFETY: each local range lies inside `target` (checked above).
        got = libc.process_vm_readv(
            pid,
            ctypes.c_void_p(local.buffer_info()[0]),
            ctypes.c_ulong(len(part)),
            ctypes.c_void_p(remote.buffer_info()[0]),
            ctypes.c_ulong(len(part)),
            ctypes.c_ulong(0),
        )
        if got < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"process_vm_readv: {os.strerror(number)}")
        if got != sum(length for _, _, length in part):
            raise EngineError("the machine's memory changed while it was copied")
        total += got
    return total
