"""A qcow2 image as a disk, over the disk that backs it.

In memory there are only caches and what `Clusters.commit` has not written yet; all of it may be inherited by fork(2):
after `Qcow2Disk.freeze` parent and child each go on with an overlay of their own above the same frozen disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator

from posada.errors import ImageError
from posada.vmm.block.disk import Buffers, Cursor, Disk, beyond_end, read_only, total, zero, zeros
from posada.vmm.block.file import File
from posada.vmm.block.qcow2 import clearing, resize
from posada.vmm.block.qcow2.clusters import Clusters
from posada.vmm.block.qcow2.image import COMPRESSED, COPIED, OFFSET, ZERO, Image
from posada.vmm.block.qcow2.refcounts import Refcounts
from posada.vmm.block.qcow2.tables import Table

_ALL = (1 << 64) - 1


class Qcow2Disk:
    """The image on ``fd`` (which becomes this object's); what it does not hold is read from ``backing``, or is zeros."""

    def __init__(self, fd: int, backing: Disk | None = None, readonly: bool = False) -> None:
        """Raises ImageError: corrupt, refused, or in need of a backing disk it was not given (or the reverse)."""
        self.file = File(fd)
        self.image = Image(self.file, readonly)
        if (self.image.info.backing is None) != (backing is None):
            raise ImageError("a qcow2 image has a backing file exactly if it names one")
        self.backing = backing
        self.readonly = readonly
        self.size = self.image.info.size
        self.granularity = self.image.cluster
        self.backed = 0 if backing is None else min(backing.size, self.size)
        """The backing disk is read up to here, in bytes."""
        self.clusters = Clusters(self.image, None if readonly else Refcounts(self.image))
        self._tables = self.clusters.tables
        bits = self.image.cluster_bits
        self._bits = bits
        self._inside = self.image.cluster - 1
        self._table_bits = self.image.table_bits
        self._slot_mask = self._tables.slots - 1
        self._odd = self.image.odd

    # Reading.

    def read(self, offset: int, buffers: Buffers, wait: bool = True) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        end = offset + length
        if offset < 0 or end > self.size:
            raise beyond_end()
        if not length:
            return
        entry, run = self.locate(offset, end)
        if run == length:
            self._read_run(offset, run, entry, buffers, wait)
            return
        cursor = Cursor(buffers)
        while True:
            self._read_run(offset, run, entry, cursor.take(run), wait)
            offset += run
            if offset == end:
                return
            entry, run = self.locate(offset, end)

    def locate(self, offset: int, end: int) -> tuple[int, int]:
        """The L2 entry at ``offset``, and how many bytes from there to ``end`` go on as it says."""
        index = offset >> self._table_bits
        table = self._tables.cache.get(index) or self._tables.get(index)
        run = (offset | self._inside) + 1 - offset
        if table is self._tables.empty:
            return 0, min(end, (index + 1) << self._table_bits) - offset
        entries = table.entries
        slot = offset >> self._bits & self._slot_mask
        entry = entries[slot]
        if offset + run >= end:
            return entry, end - offset
        if entry & COMPRESSED:
            return entry, run
        step = self._inside + 1 if entry & OFFSET else 0
        expected = entry
        while offset + run < end and slot < self._slot_mask:
            slot += 1
            expected += step
            if entries[slot] != expected:
                break
            run += self._inside + 1
        return entry, min(run, end - offset)

    def _read_run(self, offset: int, length: int, entry: int, buffers: Buffers, wait: bool) -> None:
        host = entry & ~COPIED
        if not host:
            self._read_backing(offset, length, buffers, wait)
        elif not host & self._odd:
            host += offset & self._inside
            if host + length > self.image.end:
                self.image.check_cluster(host, length, writing=False)
            self.file.readv(host, buffers, length, wait)
        elif host & COMPRESSED:
            start = offset & self._inside
            _fill(buffers, memoryview(self.clusters.compressed.read(entry))[start:])
        elif self.reads_zero(entry, offset):
            zero(buffers)
        else:
            self.image.corrupt(f"an L2 entry makes no sense ({entry:#x})")

    def _read_backing(self, offset: int, length: int, buffers: Buffers, wait: bool) -> None:
        backed = self.backed - offset
        if self.backing is None or backed <= 0:
            zero(buffers)
        elif backed >= length:
            self.backing.read(offset, buffers, wait)
        else:
            cursor = Cursor(buffers)
            self.backing.read(offset, cursor.take(backed), wait)
            zero(cursor.take(length - backed))

    def reads_zero(self, entry: int, offset: int) -> bool:
        """All of the cluster that ``offset`` lies in, from there on, is known to be zeros."""
        host = entry & ~COPIED
        if not host:
            return offset >= self.backed
        return bool(host & ZERO) and not (host ^ ZERO) & self._odd and self.image.info.version >= 3

    # Writing.

    def write(self, offset: int, buffers: Buffers) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        self.check_write(offset, length)
        cursor, end = Cursor(buffers), offset + length
        while offset < end:
            entry, run = self.locate(offset, end)
            if self._in_place(entry):
                host = (entry & OFFSET) + (offset & self._inside)
                self.image.check_cluster(host, run, writing=True)
                self.file.writev(host, buffers if run == length else cursor.take(run))
            else:
                run = self._write_new(offset, end, cursor)
            offset += run

    def check_write(self, offset: int, length: int) -> None:
        """Before every change. Raises OSError, ImageError."""
        if self.readonly:
            raise read_only()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise beyond_end()
        if self.image.damage is not None:
            raise ImageError(f"the qcow2 image is corrupt: {self.image.damage}")
        self.clusters.relieve()

    def _in_place(self, entry: int) -> bool:
        host = entry ^ COPIED
        return entry & COPIED != 0 and host != 0 and not host & self._odd

    def _write_new(self, offset: int, end: int, cursor: Cursor) -> int:
        """Write what lies in a row of clusters that need a new place, or the first of them. Returns bytes of data."""
        refcounts = self.clusters.refcounts
        assert refcounts is not None
        bits = self._bits
        start = offset & self._inside
        slot = offset >> bits & self._slot_mask
        table = self._tables.writable(offset >> self._table_bits)
        wanted = 1
        most = min(((end - 1) >> bits) - (offset >> bits) + 1, self._slot_mask + 1 - slot)
        while wanted < most and not self._in_place(table.entries[slot + wanted]):
            wanted += 1
        fresh = self.image.end if self.file.sparse else _ALL
        first, count = refcounts.allocate(wanted)
        run = min((count << bits) - start, end - offset)
        rest = (count << bits) - start - run
        host = first << bits
        try:
            # What lies behind the end of the file is zeros already.
            head = self._old(offset - start, start, table.entries[slot], host < fresh)
            last = offset + run
            tail = self._old(last, rest, table.entries[slot + count - 1], last - offset + start + host < fresh)
            at = host if head else host + start
            self.file.writev(at, [*head, *cursor.take(run), *tail])
        except BaseException:
            for _ in refcounts.release(first, count):
                pass
            raise
        self.replace(table, slot, array("Q", [host + (n << bits) | COPIED for n in range(count)]))
        return run

    def _old(self, offset: int, length: int, entry: int, dirty: bool) -> list[memoryview]:
        """What a cluster held so far; nothing if that is zeros, and its new place is not ``dirty``."""
        if not length:
            return []
        if self.reads_zero(entry, offset):
            return zeros(length) if dirty else []
        out = memoryview(bytearray(length))
        if offset < self.size:
            length = min(length, self.size - offset)
            self._read_run(offset, length, entry, [out[:length]], True)
        return [out]

    def replace(self, table: Table, slot: int, new: array[int]) -> None:
        """Put ``new`` L2 entries into ``table`` from ``slot`` on, and let go of what the old ones referred to."""
        old = table.entries[slot : slot + len(new)]
        table.entries[slot : slot + len(new)] = new
        self._tables.mark(table, slot, len(new))
        for entry, now in zip(old, new, strict=True):
            if entry and (entry ^ now) & ~ZERO:  # a zero cluster may keep its place
                self.clusters.drop(entry)

    def discard(self, offset: int, length: int) -> None:
        clearing.discard(self, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        clearing.write_zeroes(self, offset, length, unmap)

    def resize(self, size: int) -> None:
        resize.grow(self, size)

    # Life.

    def flush(self) -> None:
        for file in self.flushing():
            file.sync()

    def flushing(self) -> Generator[File, None, None]:
        if self.backing is not None:
            yield from self.backing.flushing()
        yield from self.clusters.flushing()

    def freeze(self) -> None:
        if not self.readonly:
            self.clusters.freeze()
            self.readonly = True

    def descriptors(self) -> list[int]:
        return [*(self.backing.descriptors() if self.backing is not None else []), self.file.fd]

    def close(self) -> None:
        if self.file.fd < 0:
            return
        try:
            if self.image.damage is None:
                self.flush()
        finally:
            self.file.close()
            if self.backing is not None:
                self.backing.close()


def _fill(buffers: Buffers, data: memoryview) -> None:
    at = 0
    for buffer in buffers:
        buffer[:] = data[at : at + len(buffer)]
        at += len(buffer)
