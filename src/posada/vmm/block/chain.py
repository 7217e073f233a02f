"""A disk made of layers: the lowest is raw or qcow2, each one above it a qcow2 overlay. Only the top is written to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from posada.errors import ImageError
from posada.vmm.block.disk import Disk
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.block.raw import RawDisk

MAX_LAYERS = 64


def open_chain(chain: Sequence[tuple[int, str]], size: int | None = None, readonly: bool = False) -> Disk:
    """The disk of these (descriptor, format) layers, the lowest first; formats are ``raw`` and ``qcow2``.

    ``size`` is what the top must have, in bytes. The descriptors are closed with the disk, and if this raises.
    Raises ImageError, naming the layer; OSError.
    """
    disk: Disk | None = None
    opened = 0
    try:
        if not 0 < len(chain) <= MAX_LAYERS:
            raise ImageError(f"a disk has 1 to {MAX_LAYERS} layers, not {len(chain)}")
        for number, (fd, format) in enumerate(chain):
            top = number == len(chain) - 1
            try:
                disk = _layer(fd, format, disk, size if top else None, readonly or not top)
            except ImageError as error:
                raise ImageError(f"layer {number} of {len(chain)}: {error.message}", hint=error.hint) from None
            opened += 1
    except BaseException:
        if disk is not None:
            disk.close()
        for fd, _ in chain[opened:]:
            with suppress(OSError):
                os.close(fd)
        raise
    assert disk is not None
    return disk


def _layer(fd: int, format: str, below: Disk | None, size: int | None, readonly: bool) -> Disk:
    if format == "raw":
        if below is not None:
            raise ImageError("a raw file cannot be an overlay")
        return RawDisk(fd, size, readonly)
    if format != "qcow2":
        raise ImageError(f"{format!r} is not a format of disks")
    disk = Qcow2Disk(fd, below, readonly)
    if size is not None and disk.size != size:
        raise ImageError(f"it is a disk of {disk.size} bytes, not of {size}")
    return disk


def overlay(disk: Disk, fd: int) -> Disk:
    """Freeze ``disk`` and go on with the empty qcow2 image on ``fd`` above it. Raises ImageError, OSError.

    If it raises, ``disk`` may be frozen; ``fd`` stays the caller's.
    """
    disk.freeze()
    top = Qcow2Disk(fd, disk)
    if top.size != disk.size:
        raise ImageError(f"the new layer is a disk of {top.size} bytes, not of {disk.size}")
    return top
