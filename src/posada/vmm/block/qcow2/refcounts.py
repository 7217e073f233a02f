"""Refcounts: for each host cluster, how many references there are to it. Zero: it is free.

Changes stay in memory until `write_blocks`; a new refcount block is named by the table only in `write_table`, after a
sync. Until then the file says *free* for clusters that are taken, but nothing in the file refers to them either.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator

from posada.proto.qcow2 import MAX_REFCOUNT_TABLE
from posada.vmm.block.qcow2.image import OFFSET, Image, to_big
from posada.vmm.block.qcow2.widths import pack, unpack

_CACHE_BYTES = 1 << 20
_TABLE_AT = 48  # in the header: offset (8 bytes) and clusters (4) of the refcount table


class _Block:
    """One refcount block. ``low`` and ``high`` enclose the changed counts; equal: none."""

    __slots__ = ("at", "counts", "high", "low")

    def __init__(self, at: int, counts: array[int]) -> None:
        self.at = at
        self.counts = counts
        self.low = self.high = 0

    def changed(self, slot: int, count: int) -> None:
        if self.low == self.high:
            self.low, self.high = slot, slot + count
        else:
            self.low, self.high = min(self.low, slot), max(self.high, slot + count)


class Refcounts:
    """The refcounts of an image that is open for writing. Methods raise OSError, ImageError."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._order = image.info.refcount_order
        self._per_block = (image.cluster * 8) >> self._order
        self._at = image.info.refcounts_at
        self._table = image.read_table(self._at, (image.info.refcount_clusters << image.cluster_bits) // 8)
        for entry in filter(None, self._table):
            image.claim_table(entry, "refcount block")
        self._blocks: dict[int, _Block] = {}  # by index in the table
        self._limit = max(2, _CACHE_BYTES >> image.cluster_bits)
        self._dirty: set[int] = set()
        self.staged: list[int] = []
        """Entries of the table that are not in the file yet."""
        self._hint = 0  # no free cluster lies before this one

    @property
    def crowded(self) -> bool:
        return len(self._dirty) * 2 > self._limit

    def get(self, cluster: int) -> int:
        """References to ``cluster``."""
        index, slot = divmod(cluster, self._per_block)
        block = self._block(index) if index < len(self._table) else None
        return block.counts[slot] if block else 0

    def allocate(self, wanted: int) -> tuple[int, int]:
        """Take up to ``wanted`` free clusters in a row, at least one. Returns the first and how many."""
        cluster = self._hint
        while True:
            index, slot = divmod(cluster, self._per_block)
            if index >= len(self._table):
                self._grow_table(index)
            block = self._block(index) or self._new_block(index, cluster)
            try:
                slot = block.counts.index(0, slot)
                break
            except ValueError:
                cluster = (index + 1) * self._per_block
        count, limit = 1, min(wanted, self._per_block - slot)
        while count < limit and not block.counts[slot + count]:
            count += 1
        first = index * self._per_block + slot
        self._take(block, index, slot, count)
        self._hint = first + count
        return first, count

    def allocate_run(self, wanted: int) -> int:
        """Take ``wanted`` clusters in a row. Raises OSError (EFBIG): more than one refcount block covers."""
        if wanted >= self._per_block:
            raise OSError(errno.EFBIG, "the clusters of this image are too small for such a large table")
        hint, self._hint = self._hint, self.image.end >> self.image.cluster_bits
        while True:
            first, count = self.allocate(wanted)
            if count == wanted:
                self._hint = hint
                return first
            for _ in self.release(first, count):
                pass
            self._hint = first + count

    def release(self, first: int, count: int) -> Iterator[int]:
        """Drop one reference to each of ``count`` clusters; yields those that are free now. Run it to its end."""
        for cluster in range(first, first + count):
            index, slot = divmod(cluster, self._per_block)
            block = self._block(index) if index < len(self._table) else None
            if block is None or not block.counts[slot]:
                self.image.corrupt(
                    f"the cluster at {cluster << self.image.cluster_bits:#x} is in use and counted as free"
                )
            block.counts[slot] -= 1
            block.changed(slot, 1)
            self._dirty.add(index)
            if not block.counts[slot]:
                self._hint = min(self._hint, cluster)
                yield cluster

    def write_blocks(self) -> None:
        """Write every changed count."""
        for index in list(self._dirty):
            block = self._blocks[index]
            at, data = pack(block.counts, block.low, block.high, self._order)
            self.image.file.write(block.at + at, data)
            block.low = block.high = 0
            self._dirty.discard(index)

    def write_table(self) -> bool:
        """Name new blocks, whose content must be durable. False if there are none."""
        if not self.staged:
            return False
        while self.staged:
            index = self.staged[-1]
            self.image.file.write(self._at + index * 8, self._table[index].to_bytes(8, "big"))
            self.staged.pop()
        return True

    def _block(self, index: int) -> _Block | None:
        """None: the table has none there, all its counts are zero."""
        block = self._blocks.get(index)
        if block is None and self._table[index]:
            at = self._table[index] & OFFSET
            block = _Block(at, unpack(bytes(self.image.file.read(at, self.image.cluster)), self._order))
            self._add(index, block)
        return block

    def _add(self, index: int, block: _Block) -> None:
        if len(self._blocks) >= self._limit:
            clean = next((i for i in self._blocks if i not in self._dirty), None)
            if clean is not None:
                del self._blocks[clean]
        self._blocks[index] = block

    def _new_block(self, index: int, cluster: int) -> _Block:
        """A block in the first free cluster of those it counts itself: all of them are free, no other block is needed."""
        block = _Block(cluster << self.image.cluster_bits, unpack(bytes(self.image.cluster), self._order))
        self._take(block, index, cluster % self._per_block, 1)
        block.changed(0, self._per_block)
        self._table[index] = block.at
        self.staged.append(index)
        self.image.metadata.add(cluster)
        self._add(index, block)
        return block

    def _take(self, block: _Block, index: int, slot: int, count: int) -> None:
        bits = self.image.cluster_bits
        first = index * self._per_block + slot
        if (first + count) << bits > OFFSET:
            raise OSError(errno.EFBIG, "the image file is as large as the format allows")
        if not self.image.metadata.isdisjoint(range(first, first + count)):
            self.image.corrupt("a cluster of metadata is counted as free")
        for i in range(slot, slot + count):
            block.counts[i] = 1
        block.changed(slot, count)
        self._dirty.add(index)
        self.image.end = max(self.image.end, (first + count) << bits)

    def _grow_table(self, index: int) -> None:
        """Move the table to a place where it has room for entry ``index``; durable.

        The new table and the blocks that count it lie together in clusters the old table did not reach.
        """
        image, bits = self.image, self.image.cluster_bits
        old, old_at = len(self._table), self._at
        if index * 8 >= MAX_REFCOUNT_TABLE:
            raise OSError(errno.EFBIG, "the image file is as large as its refcount table can count")
        size = min(max((index + 1) * 8, old * 16), MAX_REFCOUNT_TABLE)
        clusters = -(-size >> bits)
        blocks = -(-clusters // (self._per_block - 1))  # each counts itself, too
        first = old * self._per_block
        if old + blocks > (clusters << bits) // 8:
            raise OSError(errno.EFBIG, "the image file is as large as its refcount table can count")
        table = self._table[:] + from_zeros((clusters << bits) // 8 - old)
        fresh: list[_Block] = []
        for number in range(blocks):
            block = _Block((first + clusters + number) << bits, unpack(bytes(image.cluster), self._order))
            table[old + number] = block.at
            fresh.append(block)
        for number in range(clusters + blocks):
            fresh[number // self._per_block].counts[number % self._per_block] = 1
        image.end = max(image.end, (first + clusters + blocks) << bits)
        self.write_blocks()  # the table names the staged ones
        for block in fresh:
            image.file.write(block.at, pack(block.counts, 0, self._per_block, self._order)[1])
        image.file.write(first << bits, to_big(table))
        image.file.sync()
        image.file.write(_TABLE_AT, (first << bits).to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        image.file.sync()
        image.metadata.update(range(first, first + clusters + blocks))
        self._table, self._at = table, first << bits
        self.staged.clear()
        for number, block in enumerate(fresh):
            self._add(old + number, block)
        was = range(old_at >> bits, (old_at >> bits) + (old * 8 >> bits))
        image.metadata.difference_update(was)
        for _ in self.release(was.start, len(was)):
            pass


def from_zeros(count: int) -> array[int]:
    """That many zeros."""
    return array("Q", bytes(count * 8))
