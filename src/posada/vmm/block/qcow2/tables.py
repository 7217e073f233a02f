"""L1 and L2 tables: for each guest cluster, where it is. L2 tables are cached; changes wait in the cache to be written.

An entry that refers to a new cluster must not reach the file before that cluster's content and refcount have: so the
disk writes changes in two steps (`write_new`, then `write_linked`) with a sync between them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache

from posada.vmm.block.qcow2.image import COPIED, OFFSET, Image, from_big, to_big
from posada.vmm.block.qcow2.refcounts import Refcounts

_CACHE_BYTES = 2 << 20
"""Of clean and changed L2 tables: with 64 KiB clusters that is a map of 16 GiB."""


class Table:
    """One L2 table. ``low`` and ``high`` enclose the changed slots; equal: none."""

    __slots__ = ("at", "entries", "high", "linked", "low")

    def __init__(self, at: int, entries: array[int], linked: bool) -> None:
        self.at = at
        self.entries = entries
        self.linked = linked
        """The L1 table in the file names it."""
        self.low = self.high = 0

    def changed(self, slot: int, count: int) -> None:
        if self.low == self.high:
            self.low, self.high = slot, slot + count
        else:
            self.low, self.high = min(self.low, slot), max(self.high, slot + count)


@cache
def _zeros(slots: int) -> array[int]:
    """Shared by all images, and never changed: making 64 KiB takes longer than all else in opening an overlay."""
    return array("Q", bytes(slots * 8))


class Tables:
    """The tables of one image."""

    def __init__(self, image: Image, refcounts: Refcounts | None, retire: Callable[[int, int], object]) -> None:
        """``retire(cluster, count)`` is called for tables that are not referred to any more."""
        self.image = image
        self.slots = image.cluster // 8
        self.empty = Table(0, _zeros(self.slots), True)
        """Stands for every table that is not there."""
        self.cache: dict[int, Table] = {}
        """By index in L1."""
        self.l1_at = image.info.l1_at
        self._refcounts = refcounts
        self._retire = retire
        self._limit = max(2, _CACHE_BYTES >> image.cluster_bits)
        self._dirty: set[Table] = set()
        self._unlinked: set[int] = set()  # L1 indices whose new value is not in the file

    @property
    def dirty(self) -> bool:
        """Something is not in the file yet."""
        return bool(self._dirty or self._unlinked)

    @property
    def crowded(self) -> bool:
        """Half of the cache waits to be written."""
        return len(self._dirty) * 2 > self._limit

    def get(self, index: int) -> Table:
        """The table of L1 entry ``index``, for reading. Raises OSError, ImageError."""
        table = self.cache.get(index)
        if table is not None:
            return table
        entry = self.image.l1[index]
        if entry:
            at = entry & OFFSET
            entries = from_big(bytes(self.image.file.read(at, self.image.cluster)))
            if not entry & COPIED:
                # Shared with a snapshot, so is all it refers to: nothing may be written in place, whatever it says.
                for slot, value in enumerate(entries):
                    entries[slot] = value & ~COPIED
            table = Table(at, entries, True)
        else:
            table = self.empty
        self._make_room()
        self.cache[index] = table
        return table

    def writable(self, index: int) -> Table:
        """The table of L1 entry ``index``, made or copied if need be; tell it with `mark` what changed."""
        table = self.get(index)
        l1 = self.image.l1
        if table is not self.empty and l1[index] & COPIED:
            return table
        assert self._refcounts is not None
        cluster, _ = self._refcounts.allocate(1)
        new = Table(cluster << self.image.cluster_bits, table.entries[:], False)
        if l1[index]:
            old = (l1[index] & OFFSET) >> self.image.cluster_bits
            self.image.metadata.discard(old)  # it is some snapshot's now, whose L2 tables are not tracked
            self._retire(old, 1)
        l1[index] = new.at | COPIED
        self.image.metadata.add(cluster)
        self._unlinked.add(index)
        self.cache[index] = new
        self._dirty.add(new)
        return new

    def mark(self, table: Table, slot: int, count: int) -> None:
        """``count`` entries from ``slot`` on were changed."""
        table.changed(slot, count)
        self._dirty.add(table)

    def write_new(self) -> None:
        """Write the tables that nothing in the file refers to yet."""
        for table in [table for table in self._dirty if not table.linked]:
            self.image.file.write(table.at, to_big(table.entries))
            table.low = table.high = 0

    def write_linked(self) -> None:
        """Write what makes new clusters reachable. Everything that it refers to must be durable."""
        write = self.image.file.write
        for table in list(self._dirty):
            if table.linked:
                write(table.at + table.low * 8, to_big(table.entries[table.low : table.high]))
                table.low = table.high = 0
                self._dirty.discard(table)
        for index in list(self._unlinked):
            write(self.l1_at + index * 8, self.image.l1[index].to_bytes(8, "big"))
            self._unlinked.discard(index)
            table = self.cache[index]
            table.linked = True
            self._dirty.discard(table)

    def _make_room(self) -> None:
        if len(self.cache) < self._limit:
            return
        # The oldest that may go. If none may, the cache grows for a moment: the disk looks at `crowded` before each write.
        for index, table in self.cache.items():
            if table not in self._dirty:
                del self.cache[index]
                return
