"""Discard and write-zeroes of qcow2 images: whole clusters by their L2 entries, the rest as data."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from posada.vmm.block.disk import zeros
from posada.vmm.block.qcow2.image import COMPRESSED, COPIED, OFFSET, ZERO

if TYPE_CHECKING:
    from posada.vmm.block.qcow2.disk import Qcow2Disk

_CHUNK = 1 << 20


def discard(disk: Qcow2Disk, offset: int, length: int) -> None:
    """Give back the whole clusters in this range. What they hide of a backing disk stays hidden: they read as zeros."""
    disk.check_write(offset, length)
    if disk.backing is not None and disk.image.info.version < 3:
        return  # no zero clusters in version 2: giving back would show the backing disk

    def emptied(entry: int, at: int) -> int:
        if not entry & (OFFSET | COMPRESSED):
            return entry
        return 0 if at >= disk.backed else ZERO

    _each_cluster(disk, offset, offset + length, emptied)


def write_zeroes(disk: Qcow2Disk, offset: int, length: int, unmap: bool) -> None:
    """Make a range read as zeros. Clusters keep their places unless ``unmap``."""
    disk.check_write(offset, length)
    end = offset + length
    if disk.image.info.version < 3:
        _write(disk, offset, end)
        return

    def cleared(entry: int, at: int) -> int:
        if disk.reads_zero(entry, at) and not (unmap and entry & OFFSET):
            return entry
        if entry & COPIED and not unmap:
            return entry | ZERO
        return 0 if at >= disk.backed else ZERO

    first, last = _each_cluster(disk, offset, end, cleared)
    _write(disk, offset, min(first, end))
    _write(disk, max(first, last), end)


def _each_cluster(disk: Qcow2Disk, offset: int, end: int, change: Callable[[int, int], int]) -> tuple[int, int]:
    """Change the L2 entries of all clusters that lie in ``offset`` to ``end`` as a whole; returns where these begin and end.

    ``change(entry, offset)`` gives the new entry.
    """
    bits, table_bits, tables = disk.image.cluster_bits, disk.image.table_bits, disk.clusters.tables
    first = -(-offset >> bits)
    # The disk's end may cut its last cluster short.
    last = -(-end >> bits) if end == disk.size else end >> bits
    at = first << bits
    while at < last << bits:
        index = at >> table_bits
        stop = min(last << bits, (index + 1) << table_bits)
        table = tables.get(index)
        slot = at >> bits & tables.slots - 1
        old = table.entries[slot : slot + (stop - at >> bits)]
        if table is not tables.empty or change(0, at) != 0:
            new = array("Q", map(change, old, range(at, stop, 1 << bits)))
            if new != old:
                disk.clusters.relieve()
                disk.replace(tables.writable(index), slot, new)
        at = stop
    return first << bits, last << bits


def _write(disk: Qcow2Disk, offset: int, end: int) -> None:
    """Write zeros as data, where there are none yet."""
    while offset < end:
        entry, run = disk.locate(offset, end)
        if not disk.reads_zero(entry, offset):
            run = min(run, _CHUNK)
            disk.write(offset, zeros(run))
        offset += run
