"""A bay for a disk: a block device that is there from power-on, and empty until a disk is put in.

virtio-mmio knows no hot-plug. What it has is a capacity that may change: to the guest an empty bay is a disk of no bytes,
and one that gets a disk is a disk that grew.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Sequence

from posada.errors import EngineError
from posada.vmm.block.disk import Buffers, Disk
from posada.vmm.block.file import File
from posada.vmm.virtio.blk import SECTOR, Blk
from posada.vmm.virtio.device import SETTLE


class NoDisk:
    """The disk in an empty bay."""

    size = 0
    readonly = False
    granularity = 4096

    def read(self, offset: int, buffers: Buffers, wait: bool = True) -> None:
        raise OSError(errno.ENXIO, "there is no disk")

    def write(self, offset: int, buffers: Buffers) -> None:
        raise OSError(errno.ENXIO, "there is no disk")

    def flush(self) -> None:
        pass

    def flushing(self) -> Generator[File, None, None]:
        yield from ()

    def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.ENXIO, "there is no disk")

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        raise OSError(errno.ENXIO, "there is no disk")

    def resize(self, size: int) -> None:
        raise OSError(errno.ENXIO, "there is no disk")

    def freeze(self) -> None:
        pass

    def reopen(self, fds: Sequence[int]) -> None:
        pass

    def descriptors(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


class Bay(Blk):
    """``disk`` None: empty. One that is there from the start is one that was put in before a capture."""

    def __init__(self, disk: Disk | None = None, serial: str = "") -> None:
        super().__init__(disk or NoDisk(), serial)
        # What the driver may do does not depend on what is in the bay now.
        self.features = Blk(NoDisk(), "").features
        self._seen: Callable[[], object] = lambda: None

    @property
    def empty(self) -> bool:
        return isinstance(self.disk, NoDisk)

    def insert(self, disk: Disk, serial: str, seen: Callable[[], object]) -> None:
        """``seen`` is called when the guest has looked at it. Raises EngineError when there is a disk already."""
        if not self.empty:
            raise EngineError("there is a disk in that bay already")
        self.serial = serial.encode()[:20]
        self._change(disk, seen)

    def eject(self, seen: Callable[[], object]) -> None:
        """What the guest still does to it fails. ``seen``: as for `insert`."""
        before = self.disk
        self._change(NoDisk(), seen)
        before.close()

    def _change(self, disk: Disk, seen: Callable[[], object]) -> None:
        self.quiesce()
        self.disk = disk
        self._capacity = disk.size // SECTOR
        self._seen = seen
        self.config_changed()

    def config_noticed(self) -> None:
        self.loop.timer(SETTLE, self._seen)
        self._seen = lambda: None

    def reset(self) -> None:
        super().reset()
        self._seen()  # there is nobody left to look
        self._seen = lambda: None
