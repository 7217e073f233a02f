"""Guest memory, behind one checked door.

RAM lies in one private mapping of this process, so that ``fork(2)`` copies the machine. The guest sees it as one or
two regions: below 3 GiB, and the rest from 4 GiB on; between them are the devices (a PC's classic layout).
Every guest address comes from the guest and is checked in `GuestMemory.view`; nothing else computes an offset.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from typing import NamedTuple

PAGE = 4096
GIB = 1 << 30
GAP_START = 3 * GIB
"""First guest-physical address that is never RAM."""
GAP_END = 4 * GIB
"""RAM that does not fit below the gap goes on here."""
MAX_SIZE = 1 << 40
_HUGE_PAGE = 2 << 20
_MAP_NORESERVE = 0x4000  # mmap(2); Python names it from 3.13 on

# Native formats: one load or store of the whole width, never byte by byte. The guest changes ring indices while we
# read them, and a torn one would be a wrong one. Hosts are little-endian (x86-64, arm64), as virtio is.
_U16 = struct.Struct("@H")
_U32 = struct.Struct("@I")
_U64 = struct.Struct("@Q")


class BadAddress(ValueError):
    """The guest named memory it does not have, or a range that leaves its region."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"no guest memory at {address:#x}+{length:#x}")
        self.address = address
        self.length = length


class Region(NamedTuple):
    """Contiguous RAM: ``base`` is guest-physical, ``address`` this process's own, ``offset`` the place in ``map``."""

    base: int
    size: int
    map: mmap.mmap
    view: memoryview
    address: int
    offset: int


class GuestMemory:
    """The RAM of one machine. Sizes and addresses in bytes."""

    def __init__(self, mapping: mmap.mmap, size: int) -> None:
        """Lay regions over ``mapping``, which may be larger than ``size`` by slack for alignment."""
        self.size = size
        self.mapping = mapping
        self.changed: Callable[[int, int], object] | None = None
        """Told (address, length) of what `write` and `discard` change: KVM's dirty log does not see it. Who writes through
        a `view` tells by itself (`posada.vmm.virtio.queue.Queue.written`)."""
        # SAFETY: the address is only used while `mapping` lives: `_anchor` exports its buffer, so it cannot be closed.
        self._anchor = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        start = ctypes.addressof(self._anchor)  # SAFETY: see above
        slack = -start % _HUGE_PAGE if len(mapping) > size else 0
        whole = memoryview(mapping)
        low = min(size, GAP_START)
        parts = [(0, 0, low), (GAP_END, low, size - low)] if size > low else [(0, 0, low)]
        self.regions = tuple(
            Region(base, length, mapping, whole[slack + at : slack + at + length], start + slack + at, slack + at)
            for base, at, length in parts
        )
        self._low, self._low_size = self.regions[0].view, low
        self._spans = tuple((region.base, region.size, region.view) for region in self.regions)

    @classmethod
    def anonymous(cls, size: int, hugepages: bool = False) -> GuestMemory:
        """Fresh zeroed RAM, private to this process; pages cost the host nothing until they are touched.

        ``hugepages`` asks for transparent huge pages: unlike hugetlbfs they need no reservation, so a forked child
        never dies of an empty pool. Raises OSError (ENOMEM) if the host has no room, ValueError for an odd size.
        """
        _check_size(size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # Room to begin at a multiple of 2 MiB: KVM maps huge pages only where guest and host addresses agree modulo it.
        mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        if hugepages:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(mapping, size)

    @classmethod
    def from_file(cls, fd: int, size: int) -> GuestMemory:
        """RAM whose first content is a memory file's, mapped privately: read when touched, never written to.

        Raises OSError if it cannot be mapped and ValueError if the file is shorter than ``size``.
        """
        _check_size(size)
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return cls(mapping, size)

    def view(self, address: int, length: int) -> memoryview:
        """The one door: a writable view of guest memory that lies wholly in one region.

        ``length`` 0 gives an empty view, also one past the end of a region. Raises BadAddress.
        """
        end = address + length
        if 0 <= address <= end <= self._low_size:  # the usual case first: devices call this for each descriptor
            return self._low[address:end]
        for base, size, view in self._spans:
            offset = address - base
            if 0 <= offset <= size and 0 <= length <= size - offset:
                return view[offset : offset + length]
        raise BadAddress(address, length)

    def views(self, addresses: list[int], lengths: list[int]) -> list[memoryview] | None:
        """`view` of each pair, in one go if all of them lie in low memory; None otherwise: ask for each."""
        if max(addresses) + max(lengths) > self._low_size:
            return None
        low = self._low
        return [low[address : address + length] for address, length in zip(addresses, lengths, strict=True)]

    def read(self, address: int, length: int) -> bytes:
        """A copy. Raises BadAddress."""
        return bytes(self.view(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """All of ``data`` or nothing. Raises BadAddress."""
        self.view(address, len(data))[:] = data
        if self.changed is not None:
            self.changed(address, len(data))

    def u16(self, address: int) -> int:
        return int(_U16.unpack_from(self.view(address, 2))[0])

    def u32(self, address: int) -> int:
        return int(_U32.unpack_from(self.view(address, 4))[0])

    def u64(self, address: int) -> int:
        return int(_U64.unpack_from(self.view(address, 8))[0])

    def put_u16(self, address: int, value: int) -> None:
        _U16.pack_into(self.view(address, 2), 0, value)

    def put_u32(self, address: int, value: int) -> None:
        _U32.pack_into(self.view(address, 4), 0, value)

    def put_u64(self, address: int, value: int) -> None:
        _U64.pack_into(self.view(address, 8), 0, value)

    def discard(self, address: int, length: int) -> None:
        """Give the whole pages of a range back to the host. What they hold afterwards is not the guest's to expect:
        zeroes for anonymous memory, the memory file's first content after a restore. Raises BadAddress.
        """
        for region in self.regions:
            offset = address - region.base
            if 0 <= offset <= region.size and 0 <= length <= region.size - offset:
                first = -(-offset // PAGE) * PAGE
                count = (offset + length) // PAGE * PAGE - first
                if count > 0:
                    region.map.madvise(mmap.MADV_DONTNEED, region.offset + first, count)
                    if self.changed is not None:
                        self.changed(region.base + first, count)
                return
        raise BadAddress(address, length)


def _check_size(size: int) -> None:
    if not PAGE <= size <= MAX_SIZE or size % PAGE:
        raise ValueError(f"memory size {size} is not a whole number of pages up to {MAX_SIZE}")
