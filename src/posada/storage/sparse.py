"""Sparse files: copied and hashed without touching their holes.

Holes are found with lseek(2) SEEK_DATA and SEEK_HOLE. Everything here blocks and is meant for a thread; ``stop`` is
looked at every few megabytes, so that a cancelled caller gets its thread back at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator

_FICLONE = 0x40049409
_CHUNK = 4 << 20
BLOCK = 1 << 16
"""The unit of `digest`, in bytes."""
_ZEROS = bytes(BLOCK)


class Stopped(Exception):
    """``stop`` was set."""


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of data. A file system that knows no holes has one run."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size:
            return
        yield start, min(at, size)


def allocated(fd: int) -> int:
    """Bytes the file takes on its file system."""
    return os.fstat(fd).st_blocks * 512


def copy(
    source: int, target: int, size: int, *, stop: threading.Event, done: Callable[[int], None] | None = None
) -> None:
    """Copy ``size`` bytes to ``target``, an empty file, holes kept. A file system that can share blocks shares them.

    ``done`` is told the offset reached. Raises Stopped, OSError (ENOSPC among others).
    """
    os.ftruncate(target, size)
    try:
        if os.fstat(source).st_size == size:
            fcntl.ioctl(target, _FICLONE, source)
            return
    except OSError:
        pass  # another file system, or one that cannot: copy
    for start, end in extents(source, size):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            if stop.is_set():
                raise Stopped
            count = os.sendfile(target, source, start, min(end - start, _CHUNK))
            if count == 0:  # truncated by somebody else meanwhile
                raise OSError(errno.EIO, "the file became shorter while it was being copied")
            start += count
            if done is not None:
                done(start)


def digest(fd: int, *, stop: threading.Event | None = None, done: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, the same however its holes lie, in the time its data takes.

    Defined over blocks of 64 KiB: for each one that is not all zero, in order, its index (u64, little-endian) and its
    bytes (the last one as short as it is); then the file's size (u64). Raises Stopped, OSError.
    """
    size = os.fstat(fd).st_size
    sha = hashlib.sha256()
    index = -1
    for start, end in extents(fd, size):
        at = max(start // BLOCK, index + 1) * BLOCK
        while at < end:
            if stop is not None and stop.is_set():
                raise Stopped
            data = os.pread(fd, _CHUNK, at)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was being read")
            for offset in range(0, len(data), BLOCK):
                block = data[offset : offset + BLOCK]
                if at + offset >= end:
                    break
                index = (at + offset) // BLOCK
                if block != _ZEROS[: len(block)]:
                    sha.update(struct.pack("<Q", index))
                    sha.update(block)
            at += len(data)
            if done is not None:
                done(min(at, end))
    sha.update(struct.pack("<Q", size))
    return sha.hexdigest()
