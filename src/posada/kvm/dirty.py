"""`DirtyRing`: the pages a vcpu has written, one entry each, in a ring shared with the kernel (API section 8.29).

Unlike the dirty log, collecting costs as much as was written, not as much as there is. An entry goes round::

    empty (0) ── the kernel wrote ──► DIRTY (1) ── harvest ──► RESET (2) ── Vm.reset_dirty_rings ──► empty
"""

from __future__ import annotations

import mmap
import struct

from posada.kvm.numbers import DIRTY_RING_PAGE
from posada.kvm.vcpu import Vcpu

ENTRY = struct.Struct("<IIQ")
_FLAGS = struct.Struct("<I")
_DIRTY, _RESET = 1, 2


class DirtyRing:
    """The reader's end of a vcpu's ring. ``entries`` is what `Vm.enable_dirty_ring` was given."""

    def __init__(self, vcpu: Vcpu, entries: int) -> None:
        self._map = mmap.mmap(vcpu.fd, entries * ENTRY.size, offset=DIRTY_RING_PAGE * 4096)
        self._entries = entries
        self._next = 0

    def harvest(self) -> list[tuple[int, int]]:
        """(slot, page within it) of each write since the last time, in order. The vcpu may go on running.

        `Vm.reset_dirty_rings` afterwards makes room; only then are further writes to these pages reported again.
        """
        found = []
        for _ in range(self._entries):
            at = self._next % self._entries * ENTRY.size
            flags, slot, page = ENTRY.unpack_from(self._map, at)
            if not flags & _DIRTY:
                break
            found.append((slot & 0xFFFF, page))  # the upper half is the address space (SMM), which we don't use
            _FLAGS.pack_into(self._map, at, _RESET)
            self._next += 1
        return found

    def close(self) -> None:
        """Idempotent."""
        self._map.close()
