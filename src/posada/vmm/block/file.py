"""A disk's file: whole reads and writes at an offset, straight between the file and the caller's memory."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time

from posada.errors import ImageError
from posada.runtime.files import Identity, identity
from posada.vmm.block.disk import Buffers, Cold, total, zero, zeros

_IOV_MAX = 1024
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
_ZERO_CHUNK = 16 << 20

SLOW = 0.001
"""Seconds: a sync that takes longer is better done by another thread; handing over costs about 50 µs."""

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class File:
    """A regular file or block device by its descriptor. Offsets and lengths in bytes. Methods raise OSError.

    After fdatasync has failed once, the kernel may have dropped what it could not write and report success the next
    time: from then on every `sync` fails, so that nobody believes lost data to be durable.
    """

    __slots__ = ("_lost", "_now", "_unsynced", "fd", "slow", "sparse")

    def __init__(self, fd: int) -> None:
        """Raises ImageError if ``fd`` is neither a regular file nor a block device."""
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError("a disk is neither a file nor a block device")
        self.fd = fd
        self.sparse = stat.S_ISREG(mode)
        """What was never written reads as zeros."""
        self.slow = False
        """The last sync took its time."""
        self._unsynced = False
        self._lost = False
        self._now = os.RWF_NOWAIT

    def length(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def readv(self, offset: int, buffers: Buffers, length: int, wait: bool = True) -> None:
        """Fill ``buffers``, ``length`` bytes in all, with zeros where the file has ended.

        Raises `Cold` if that takes waiting and may not.
        """
        wanted = length
        if len(buffers) <= _IOV_MAX:
            flags = 0 if wait else self._now
            try:
                got = os.preadv(self.fd, buffers, offset, flags)
            except OSError as error:
                if not flags or error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
                if error.errno == errno.EAGAIN:
                    raise Cold(self, offset, wanted) from None
                self._now = 0  # a file system that cannot say: then everything is waited for
                got = os.preadv(self.fd, buffers, offset)
            if got == wanted:
                return
            if flags:
                raise Cold(self, offset, wanted)
            if got:
                buffers, offset = _rest(buffers, got), offset + got
            else:
                zero(buffers)
                return
        for at in range(0, len(buffers), _IOV_MAX):
            part = buffers[at : at + _IOV_MAX]
            length = total(part)
            self.readv(offset, part, length)
            offset += length

    def writev(self, offset: int, buffers: Buffers) -> None:
        """Write all of ``buffers``; the file grows if need be."""
        self._unsynced = True
        if len(buffers) <= _IOV_MAX:
            wanted = sum(map(len, buffers))
            done = os.pwritev(self.fd, buffers, offset)
            if done == wanted:
                return
            if not done:  # a block device's end; a full disk raises
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            buffers, offset = _rest(buffers, done), offset + done
        for at in range(0, len(buffers), _IOV_MAX):
            part = buffers[at : at + _IOV_MAX]
            offset += total(part)
            self.writev(offset - total(part), part)

    def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes, zeros where the file has ended. The caller bounds ``length``."""
        out = bytearray(length)
        self.readv(offset, [memoryview(out)], length)
        return out

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.writev(offset, [memoryview(data)])

    def sync(self) -> None:
        """Everything written is durable when this returns. Costs nothing if it is already."""
        if self._lost:
            raise OSError(errno.EIO, "an earlier flush failed: data was lost")
        if not self._unsynced:
            return
        self._unsynced = False
        began = time.monotonic()
        try:
            os.fdatasync(self.fd)
        except OSError:
            self._lost = self._unsynced = True
            raise
        self.slow = time.monotonic() - began > SLOW

    @property
    def synced(self) -> bool:
        """`sync` has nothing to do, and nothing to complain of."""
        return not self._unsynced and not self._lost

    def punch(self, offset: int, length: int) -> bool:
        """Give the space back; it reads as zeros then. False if that is not possible here."""
        return self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Make a part read as zeros; the file's length stays what it is if that part lies beyond it."""
        if unmap and self.punch(offset, length):
            return
        if self._allocate(_ZERO_RANGE | _KEEP_SIZE, offset, length):
            return
        while length:
            step = min(length, _ZERO_CHUNK)
            self.writev(offset, zeros(step))
            offset += step
            length -= step

    def truncate(self, length: int) -> None:
        self._unsynced = True
        os.ftruncate(self.fd, length)

    def identity(self) -> Identity:
        """Which file it is, whatever its name."""
        return identity(self.fd)

    def replace(self, fd: int) -> None:
        """Go on with another descriptor of the same file."""
        os.close(self.fd)
        self.fd = fd

    def follow(self, other: File) -> None:
        """Take the place of ``other``, which has the same descriptor: what it had not synced, or had lost, is ours."""
        self._unsynced, self._lost = other._unsynced, other._lost

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        self._unsynced = True
        while _fallocate(self.fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ENOSPC):  # btrfs may need room to punch
                return False
            raise OSError(number, os.strerror(number))
        return True


def _rest(buffers: Buffers, done: int) -> list[memoryview]:
    """What follows the first ``done`` bytes."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []
