"""What a disk promises to whoever stands in front of it: a virtio device, or an overlay on top of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from posada.vmm.block.file import File

Buffers = Sequence[memoryview]
"""A scatter list: writable views of bytes, usually of guest memory."""


class Disk(Protocol):
    """A disk of ``size`` bytes. Offsets and lengths are bytes, of any alignment; one caller at a time.

    Methods raise OSError (EIO, ENOSPC, EROFS, EINVAL for what lies beyond the end) or ImageError (the image is
    corrupt); the request has then failed and may have been done in part. Nothing is durable before `flush` returns.
    """

    size: int
    readonly: bool
    granularity: int
    """The smallest aligned piece that a discard gives back."""

    def read(self, offset: int, buffers: Buffers, wait: bool = True) -> None:
        """Fill ``buffers``. Raises `Cold` if the data is not in memory and may not be waited for."""

    def write(self, offset: int, buffers: Buffers) -> None:
        """Write what ``buffers`` hold."""

    def flush(self) -> None:
        """Make every write that has returned survive a crash of the monitor, of the host and of the power supply."""

    def flushing(self) -> Generator[File, None, None]:
        """`flush` in steps: each file that this yields has to be synced before the next step, by any thread.

        The disk may be read, but not changed, until the last step. An error of the sync goes into the iterator.
        """

    def discard(self, offset: int, length: int) -> None:
        """The content is not needed any more: give the space back if that is possible. What is read then is undefined."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make it read as zeros; ``unmap``: space may be given back."""

    def resize(self, size: int) -> None:
        """Grow; the new part reads as zeros. Raises OSError (EINVAL) for shrinking. Durable."""

    def freeze(self) -> None:
        """Nothing is written from now on, and the file holds all of it: others may open it as a lower layer.

        Durable only after the next `flush`, which stays possible, also of an overlay above it.
        """

    def descriptors(self) -> list[int]:
        """One for each layer of this disk, the lowest first."""

    def close(self) -> None:
        """`flush` and close the descriptors, also when that raises. Idempotent."""


class Cold(BlockingIOError):
    """What was to be read is not in the host's memory."""

    def __init__(self, file: File, offset: int, length: int) -> None:
        super().__init__(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.file = file
        self.offset = offset
        self.length = length

    def prefetch(self) -> None:
        """Have the host read it, without waiting."""
        with suppress(OSError):
            os.posix_fadvise(self.file.fd, self.offset, self.length, os.POSIX_FADV_WILLNEED)


def total(buffers: Buffers) -> int:
    """Bytes in a scatter list."""
    return sum(map(len, buffers))


class Cursor:
    """Takes a scatter list apart, from the front."""

    __slots__ = ("_at", "_buffers", "_index")

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._index = self._at = 0

    def take(self, length: int) -> list[memoryview]:
        """The next ``length`` bytes, which must be there."""
        out: list[memoryview] = []
        while length:
            buffer = self._buffers[self._index]
            piece = buffer[self._at : self._at + length] if self._at or length < len(buffer) else buffer
            out.append(piece)
            length -= len(piece)
            self._at += len(piece)
            if self._at == len(buffer):
                self._index += 1
                self._at = 0
        return out


ZEROS = memoryview(bytes(1 << 16))


def zero(buffers: Buffers) -> None:
    """Fill with zeros."""
    for buffer in buffers:
        for at in range(0, len(buffer), len(ZEROS)):
            piece = buffer[at : at + len(ZEROS)]
            piece[:] = ZEROS[: len(piece)]


def zeros(length: int) -> list[memoryview]:
    """``length`` bytes of zeros as a scatter list, for writing."""
    whole, rest = divmod(length, len(ZEROS))
    return [ZEROS] * whole + ([ZEROS[:rest]] if rest else [])


def beyond_end() -> OSError:
    """The error of a request that does not lie within the disk."""
    return OSError(errno.EINVAL, "beyond the end of the disk")


def read_only() -> OSError:
    """The error of a write to a disk that is read-only."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS))
