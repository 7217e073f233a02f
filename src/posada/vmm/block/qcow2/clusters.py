"""The clusters of a writable image: changes of the tables, and the order in which they reach the file.

Whatever instant the monitor is killed or the power fails at, the file is a correct image that holds everything flushed;
at worst clusters are counted that nothing refers to (leaks). For that, with a sync at each line::

    data, refcounts, L2 tables that nothing refers to yet       (nothing in the file leads there)
    entries of the refcount table for new blocks                (only if there are any)
    entries of L2 and L1                                        now the data is reachable: `commit` ends here
    refcounts of clusters given back, and holes in their place  only after a sync nothing leads there any more

So what was written but not flushed may be lost when the monitor is killed, as it may on a real disk with a write cache.
"""

from __future__ import annotations

from collections.abc import Generator

from posada.errors import ImageError
from posada.vmm.block.file import File
from posada.vmm.block.qcow2.compressed import Compressed
from posada.vmm.block.qcow2.image import COMPRESSED, COPIED, OFFSET, ZERO, Image
from posada.vmm.block.qcow2.refcounts import Refcounts
from posada.vmm.block.qcow2.tables import Tables

_MAX_RETIRED = 1 << 14
"""Runs of clusters that wait to be given back."""


class Clusters:
    """The tables and refcounts of one image. Without refcounts it is read-only."""

    def __init__(self, image: Image, refcounts: Refcounts | None) -> None:
        self.image = image
        self.refcounts = refcounts
        self.tables = Tables(image, refcounts, self.retire)
        self.compressed = Compressed(image)
        self._retired: list[tuple[int, int]] = []
        """Runs of clusters the tables have let go of; the file may still refer to them."""

    def retire(self, cluster: int, count: int) -> None:
        """Nothing refers to these clusters any more: give back one reference to each, once that is durable."""
        if self._retired:
            first, length = self._retired[-1]
            if first + length == cluster:
                self._retired[-1] = (first, length + count)
                return
        self._retired.append((cluster, count))

    def drop(self, entry: int) -> None:
        """An L2 entry was replaced: retire what it referred to."""
        bits = self.image.cluster_bits
        if entry & COMPRESSED:
            at, length = self.compressed.place(entry)
            self._retire_data(at >> bits, (at + length - 1) >> bits)
        elif entry & ~COPIED & ~ZERO & self.image.odd:
            self.image.corrupt(f"an L2 entry makes no sense ({entry:#x})")
        elif entry & OFFSET:
            self._retire_data((entry & OFFSET) >> bits, (entry & OFFSET) >> bits)

    def _retire_data(self, first: int, last: int) -> None:
        for cluster in range(first, last + 1):
            if cluster in self.image.metadata:
                self.image.corrupt(f"guest data at {cluster << self.image.cluster_bits:#x} lies on metadata")
            self.retire(cluster, 1)

    def relieve(self) -> None:
        """Write changes if too many wait. Called before each request that makes new ones."""
        if len(self._retired) > _MAX_RETIRED:
            self.flush()
        elif self.tables.crowded or (self.refcounts is not None and self.refcounts.crowded):
            self.commit()

    def commit(self) -> None:
        """Everything written can be found in the file: survives the monitor, not yet the power supply.

        On OSError what was not written stays and is tried again by the next call.
        """
        for file in self._committing():
            file.sync()

    def flush(self) -> None:
        """`commit`, durably; then give back what was let go of."""
        for file in self.flushing():
            file.sync()

    def _committing(self) -> Generator[File, None, None]:
        """`commit` in steps: what this yields has to be synced before the next one."""
        if self.refcounts is None:
            return
        if self.image.damage is not None:
            raise ImageError(f"the qcow2 image is corrupt: {self.image.damage}")
        self.refcounts.write_blocks()
        if self.tables.dirty:
            self.tables.write_new()
            yield self.image.file
        elif self.refcounts.staged:
            yield self.image.file
        if self.refcounts.write_table() and self.tables.dirty:
            yield self.image.file
        self.tables.write_linked()

    def flushing(self) -> Generator[File, None, None]:
        """`flush` in steps, likewise."""
        yield from self._committing()
        if not self.image.file.synced:
            yield self.image.file
        retired, self._retired = self._retired, []
        if self.refcounts is None:
            return
        bits = self.image.cluster_bits
        for first, count in retired:
            hole = length = 0
            for cluster in self.refcounts.release(first, count):
                if hole + length != cluster or not length:
                    self._punch(hole << bits, length << bits)
                    hole, length = cluster, 0
                length += 1
            self._punch(hole << bits, length << bits)
        self.refcounts.write_blocks()

    def freeze(self) -> None:
        """The file is complete, and nothing is written to it any more but what `flush` has to make durable."""
        self.commit()
        if self._retired:
            self.flush()
        self.image.readonly = True
        self.refcounts = None

    def _punch(self, at: int, length: int) -> None:
        if length:
            self.image.file.punch(at, length)
