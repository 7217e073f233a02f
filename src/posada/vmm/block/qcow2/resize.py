"""Growing a qcow2 image."""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING

from posada.vmm.block.qcow2.image import MAX_L1, MAX_SIZE, to_big

if TYPE_CHECKING:
    from posada.vmm.block.qcow2.disk import Qcow2Disk

_SIZE_AT = 24
"""In the header: size (8 bytes), encryption (4, zero), entries of L1 (4), place of L1 (8): changed in one write."""


def grow(disk: Qcow2Disk, size: int) -> None:
    """Give the disk ``size`` bytes; durable. Raises OSError: it would shrink, has snapshots, or is too large for it."""
    disk.check_write(0, 0)
    if size < disk.size or size % 512:
        raise OSError(errno.EINVAL, "a disk can only grow, by whole sectors")
    image, tables, refcounts = disk.image, disk.clusters.tables, disk.clusters.refcounts
    assert refcounts is not None
    if image.info.snapshots:
        raise OSError(errno.EINVAL, "a disk with internal snapshots cannot change its size")
    entries = -(-size >> image.table_bits)
    if size > MAX_SIZE or entries * 8 > MAX_L1:
        raise OSError(errno.EFBIG, "the disk would be too large for its clusters")
    disk.clusters.flush()
    old, bits = image.l1, image.cluster_bits
    at, l1 = tables.l1_at, old
    if entries > len(old):
        clusters = -(-entries * 8 >> bits)
        first = refcounts.allocate_run(clusters)
        at, l1 = first << bits, old + array("Q", bytes((entries - len(old)) * 8))
        image.file.write(at, to_big(l1).ljust(clusters << bits, b"\0"))
        disk.clusters.commit()
        image.metadata.update(range(first, first + clusters))
    image.file.sync()
    image.file.write(_SIZE_AT, size.to_bytes(8, "big") + bytes(4) + len(l1).to_bytes(4, "big") + at.to_bytes(8, "big"))
    image.file.sync()
    was = range(tables.l1_at >> bits, (tables.l1_at + len(old) * 8 - 1 >> bits) + 1)
    image.l1, tables.l1_at = l1, at
    if l1 is not old:
        image.metadata.difference_update(was)
        disk.clusters.retire(was.start, len(was))
    before, disk.size = disk.size, size
    if disk.backing is not None and disk.backing.size > before:
        # A backing disk that is larger would shine through in the new part.
        disk.backed = min(disk.backing.size, size)
        disk.write_zeroes(before, disk.backed - before, unmap=True)
        disk.clusters.flush()
