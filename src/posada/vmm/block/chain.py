"""A disk made of layers: the lowest is raw or qcow2, each one above it a qcow2 overlay. Only the top is written to."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

from posada.errors import ImageError
from posada.runtime.files import identity
from posada.vmm.block import locks
from posada.vmm.block.disk import Disk
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.block.raw import RawDisk

MAX_LAYERS = 64


Layer = RawDisk | Qcow2Disk


def open_chain(chain: Sequence[tuple[int, str]], size: int | None = None, readonly: bool = False) -> Disk:
    """The disk of these (descriptor, format) layers, the lowest first; formats are ``raw`` and ``qcow2``.

    ``size`` is what the top must have, in bytes. The descriptors are closed with the disk, and if this raises.
    Raises ImageError, naming the layer; Busy: somebody else writes to the top; OSError.
    """
    disk: Disk | None = None
    opened = 0
    try:
        if not 0 < len(chain) <= MAX_LAYERS:
            raise ImageError(f"a disk has 1 to {MAX_LAYERS} layers, not {len(chain)}")
        if not readonly:
            locks.lock(chain[-1][0])  # before anything is read that another may change
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


def layers_of(top: Disk) -> list[Layer]:
    """The layers of a disk, lowest first, itself last."""
    layers: list[Layer] = []
    at: Disk | None = top
    while at is not None:
        assert isinstance(at, RawDisk | Qcow2Disk)
        layers.append(at)
        at = at.backing if isinstance(at, Qcow2Disk) else None
    return layers[::-1]


def reopen(disk: Disk, fds: Sequence[int]) -> None:
    """Use these descriptors of the disk's layers instead; those it has, and those it has no use for, are closed.

    For a forked child: they are its own, and read-only for what its parent still has open. Each layer takes the one
    that is the same file, in whatever order they come: more may be given than it has (`posada.host.layers` says why).
    Raises OSError (EINVAL) if a layer finds none; the disk is of no use then.
    """
    given = dict(zip(map(identity, fds), fds, strict=True))
    try:
        for layer in layers_of(disk):
            fd = given.pop(layer.file.identity(), None)
            if fd is None:
                raise OSError(errno.EINVAL, "no descriptor was given for one of the disk's layers")
            layer.file.replace(fd)
    finally:
        for fd in given.values():
            os.close(fd)


def thaw(disk: Disk) -> Disk:
    """The same disk, writable again, and read anew from its file. Raises ImageError, OSError.

    For one that was frozen and got nothing above it; ``disk`` is of no use any more.
    """
    top = layers_of(disk)[-1]
    fd = top.file.fd
    fresh = RawDisk(fd, top.size) if isinstance(top, RawDisk) else Qcow2Disk(fd, top.backing)
    fresh.file.follow(top.file)
    return fresh


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
    """Freeze ``disk`` and go on with the empty qcow2 image on ``fd`` above it. Raises ImageError, Busy, OSError.

    If it raises, ``disk`` may be frozen; ``fd`` stays the caller's.
    """
    locks.lock(fd)
    disk.freeze()
    top = Qcow2Disk(fd, disk)
    if top.size != disk.size:
        raise ImageError(f"the new layer is a disk of {top.size} bytes, not of {disk.size}")
    return top
