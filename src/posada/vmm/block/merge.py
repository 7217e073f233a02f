"""Merging layers of a disk into its top one, so that chains stay short however often a machine is forked.

The disk reads the same before, in between and afterwards: what is copied hides exactly what it is a copy of. So it may
be cut at any instant, and done again.
"""

from __future__ import annotations

from posada.errors import ImageError
from posada.vmm.block.chain import layers_of
from posada.vmm.block.disk import Disk
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.block.qcow2.image import COPIED

_CHUNK = 1 << 20


def merge(top: Disk, keep: int) -> int:
    """Copy into ``top`` what the layers above the lowest ``keep`` hold, and put it on those. Durable when it returns.

    The files of the layers in between are closed. Returns how many layers ``top`` stands on now: ``keep``, or fewer if
    it has no more. Raises ImageError, OSError: then the chain is as it was.
    """
    layers = layers_of(top)
    between = [layer for layer in layers[max(keep, 1) : -1] if isinstance(layer, Qcow2Disk)]
    if not between or not isinstance(top, Qcow2Disk):
        return len(layers) - 1
    base = layers[keep - 1]
    # A layer that ends below the base's end hides the rest of it; disks only grow, so nobody has such a layer.
    if any(layer.size < base.size for layer in between):
        raise ImageError("a layer of the disk is smaller than what it stands on")
    for layer in reversed(between):  # the uppermost first: what it holds is newer
        _copy(layer, top)
    top.flush()
    top.backing = base
    top.backed = min(base.size, top.size)
    for layer in between:
        layer.file.close()
    return keep


def _copy(layer: Qcow2Disk, top: Qcow2Disk) -> None:
    """What ``layer`` itself holds, where ``top`` holds nothing."""
    buffer = memoryview(bytearray(_CHUNK))
    at, end = 0, min(layer.size, top.size)
    while at < end:
        entry, run = layer.locate(at, end)
        if entry & ~COPIED:
            own, run = top.locate(at, at + run)
            if own & ~COPIED == 0:
                if layer.reads_zero(entry, at):
                    top.write_zeroes(at, run, True)
                else:
                    run = min(run, _CHUNK)
                    layer.read(at, [buffer[:run]])
                    top.write(at, [buffer[:run]])
        at += run
