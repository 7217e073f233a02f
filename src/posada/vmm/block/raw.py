"""A raw disk: byte n of the disk is byte n of the file."""

from __future__ import annotations

import errno
from collections.abc import Generator

from posada.errors import ImageError
from posada.vmm.block.disk import Buffers, beyond_end, read_only, total
from posada.vmm.block.file import File

_SECTOR = 512


class RawDisk:
    """A file or block device as a disk. Where a regular file ends before the disk does, zeros are read."""

    def __init__(self, fd: int, size: int | None = None, readonly: bool = False) -> None:
        """``size`` in bytes; None: the file's, in whole sectors. Raises ImageError (a device smaller than that)."""
        self.file = File(fd)
        length = self.file.length()
        self.size = -(-length // _SECTOR) * _SECTOR if size is None else size
        self.readonly = readonly
        self.granularity = 4096
        if self.size <= 0 or (not self.file.sparse and length < self.size):
            raise ImageError(f"a block device of {length} bytes cannot be a disk of {self.size}")

    def read(self, offset: int, buffers: Buffers, wait: bool = True) -> None:
        length = sum(map(len, buffers))
        if offset < 0 or offset + length > self.size:
            raise beyond_end()
        self.file.readv(offset, buffers, length, wait)

    def write(self, offset: int, buffers: Buffers) -> None:
        self._check(offset, total(buffers))
        self.file.writev(offset, buffers)

    def flush(self) -> None:
        self.file.sync()

    def flushing(self) -> Generator[File, None, None]:
        if not self.file.synced:
            yield self.file

    def discard(self, offset: int, length: int) -> None:
        self._check(offset, length)
        if length:
            self.file.punch(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._check(offset, length)
        if length:
            self.file.zero(offset, length, unmap)

    def resize(self, size: int) -> None:
        self._check(0, 0)
        if size < self.size or size % _SECTOR:
            raise OSError(errno.EINVAL, "a disk can only grow, by whole sectors")
        length = self.file.length()
        if not self.file.sparse and length < size:
            raise OSError(errno.ENOSPC, f"the block device has {length} bytes")
        if self.file.sparse and length != size:
            # Bytes behind the old end, if there are any, are nobody's, and the new part must read as zeros.
            self.file.truncate(min(length, self.size))
            self.file.truncate(size)
            self.file.sync()
        self.size = size

    def freeze(self) -> None:
        self.readonly = True

    def descriptors(self) -> list[int]:
        return [self.file.fd]

    def close(self) -> None:
        if self.file.fd < 0:
            return
        try:
            self.file.sync()
        finally:
            self.file.close()

    def _check(self, offset: int, length: int) -> None:
        if self.readonly:
            raise read_only()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise beyond_end()
