"""Which pages of memory are this process's own: touched, and not merely read from a file it maps privately.

/proc/PID/pagemap has 64 bits per page (Documentation/admin-guide/mm/pagemap.rst): bit 63 in memory, 62 in swap, 61 the
page is a file's (or shared). A page of a private mapping that was written is in memory or swap, and no file's any more.
So the own pages of anonymous memory are those ever touched, and those of a machine that was restored from a memory file
are exactly those that differ from it, whoever wrote them: guest, kernel or device.

The descriptor speaks of the process whose file was opened, also after a fork: a child needs one of its own, and since
a monitor opens nothing by path, the engine opens ``/proc/PID/pagemap`` for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from posada.vmm.memory import PAGE

Run = tuple[int, int]
"""(offset, length) in bytes, whole pages."""

_CHUNK = 1 << 17
"""Pages looked at in one go: 1 MiB of the map, 512 MiB of memory."""
_OWN = bytes(int(bool(top & 0xC0) and not top & 0x20) for top in range(256))
"""By the top byte of an entry: 1 for an own page."""


class PageMap:
    """An open pagemap of this process. Takes over ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def open(cls) -> PageMap:
        """This process's, by path: outside the jail only. Raises OSError."""
        return cls(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))

    def own(self, address: int, size: int) -> list[Run]:
        """Runs of own pages in ``size`` bytes at ``address``, relative to it, in order. Raises OSError.

        About 4 ns a page; nobody may change the memory meanwhile.
        """
        found: list[Run] = []
        pages = size // PAGE
        buffer = bytearray(8 * min(pages, _CHUNK))
        for first in range(0, pages, _CHUNK):
            count = min(_CHUNK, pages - first)
            part = memoryview(buffer)[: 8 * count]
            if os.preadv(self.fd, [part], (address // PAGE + first) * 8) != len(part):
                raise OSError(f"the page map ends before {address + size:#x}")
            _add(found, runs(buffer[7 : 8 * count : 8].translate(_OWN)), first * PAGE)
        return found

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def runs(flags: bytes | bytearray) -> list[Run]:
    """The runs of pages whose byte in ``flags`` is 1; the others are 0."""
    found = []
    at = flags.find(1)
    while at >= 0:
        end = flags.find(0, at)
        if end < 0:
            end = len(flags)
        found.append((at * PAGE, (end - at) * PAGE))
        at = flags.find(1, end)
    return found


def _add(found: list[Run], more: Sequence[Run], offset: int) -> None:
    for at, length in more:
        if found and sum(found[-1]) == offset + at:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset + at, length))


def coalesce(some: list[Run], limit: int) -> list[Run]:
    """At most ``limit`` runs that cover ``some``, by closing the smallest gaps first (by powers of two)."""
    gap = PAGE
    while len(some) > limit:
        merged = [some[0]]
        for at, length in some[1:]:
            start, before = merged[-1]
            if at - (start + before) <= gap:
                merged[-1] = (start, at + length - start)
            else:
                merged.append((at, length))
        some, gap = merged, gap * 2
    return some


def total(some: Sequence[Run]) -> int:
    """Bytes."""
    return sum(length for _, length in some)
