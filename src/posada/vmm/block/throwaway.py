"""A layer whose content is thrown away, again and again: what a disk is written to between one reset and the next."""

from __future__ import annotations

import os

from posada.errors import ImageError
from posada.vmm.block.disk import Disk
from posada.vmm.block.qcow2.disk import Qcow2Disk

_MAX_EMPTY = 8 << 20
"""Bytes of an image that holds nothing: one of 64 TiB has tables of 1.2 MiB."""


class Throwaway:
    """An empty qcow2 image, to be put above ``below``. Nothing is changed before `put`."""

    def __init__(self, below: Disk, fd: int) -> None:
        """``fd`` stays the caller's. Raises ImageError, OSError: it is no empty image of the same size."""
        self._below = below
        self._fd = os.dup(fd)
        try:
            self._look()
        except BaseException:
            os.close(self._fd)
            raise

    def _look(self) -> None:
        self._top = top = Qcow2Disk(self._fd, self._below)
        image = top.image
        if top.size != self._below.size:
            raise ImageError(f"the new layer is a disk of {top.size} bytes, not of {self._below.size}")
        if any(image.l1) or top.file.length() > _MAX_EMPTY:
            raise ImageError("a layer to be thrown away holds something already")
        self._length = top.file.length()
        self._at = image.cluster
        self._tables = bytes(top.file.read(self._at, self._length - self._at))
        self._l1_at, self._l1 = image.info.l1_at, bytes(image.info.l1_entries * 8)

    def put(self) -> Disk:
        """The disk to go on with; ``below`` is frozen. Raises OSError, ImageError: then it is not."""
        self._below.freeze()
        return self._top

    def discard(self) -> None:
        """It is not put above anything."""
        os.close(self._fd)

    def is_in(self, disk: Disk) -> bool:
        """``disk`` is what `put` or `renew` returned last, and still stands on what it stood on."""
        return disk is self._top and self._top.backing is self._below

    def renew(self) -> Disk:
        """Empty again: the disk to go on with, in place of what it was. Nothing may be under way. Raises OSError.

        Whenever the monitor is killed in here, the image is a correct one: first nothing refers to what it held, then
        that is not counted any more, then it is cut off. (Not so when the power fails: it is a layer to throw away.)
        """
        file = self._top.file
        file.write(self._l1_at, self._l1)
        file.write(self._at, self._tables)
        file.truncate(self._length)
        self._top = Qcow2Disk(self._fd, self._below)
        self._top.file.follow(file)
        return self._top
