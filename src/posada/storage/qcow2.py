"""qcow2 files: write empty images and overlays in under a millisecond, and look at headers of files of others.

The format itself is `posada.proto.qcow2`. `inspect` opens nothing that a header names.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from posada.errors import HostError, ImageError
from posada.model.machine import MAX_DISK
from posada.proto import qcow2 as codec
from posada.proto.qcow2 import CLUSTER, MAGIC, Qcow2Info, empty_length

__all__ = [
    "CLUSTER",
    "MAGIC",
    "Qcow2Info",
    "create_empty",
    "create_overlay",
    "empty_length",
    "inspect",
    "is_qcow2",
    "parse_header",
]


def create_overlay(path: Path, *, size: int, backing: Path, backing_format: str, durable: bool = True) -> None:
    """A new image of ``size`` bytes that reads from ``backing`` wherever nothing was written to it.

    The name is stored for people and tools; engines open the chain they are given, never this name. On the disk
    (fsync) when this returns, unless it need not be ``durable`` yet: then it is so once its engine first flushes it.
    Raises HostError (the file exists; no space), ImageError (a name the format cannot hold).
    """
    name = os.fsencode(backing)
    if not name:
        raise ImageError("an overlay needs a backing file")
    _write(path, codec.empty_image(size, MAX_DISK, name, backing_format.encode()), durable)


def create_empty(path: Path, *, size: int) -> None:
    """A new image of ``size`` bytes that reads as zeros. Durable, and raises, as `create_overlay`."""
    _write(path, codec.empty_image(size, MAX_DISK), durable=True)


def _write(path: Path, parts: list[tuple[int, bytes]], durable: bool) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot create {path}: {error.strerror}") from error
    try:
        os.ftruncate(fd, parts[-1][0])
        for offset, data in parts:
            if os.pwrite(fd, data, offset) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fsync(fd)
    except OSError as error:
        os.unlink(path)
        raise HostError(f"cannot write {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def is_qcow2(path: Path) -> bool:
    """The file begins with qcow2's magic number. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def inspect(path: Path) -> Qcow2Info:
    """What the header says, once it has been found to make sense. Reads the first cluster only.

    Raises ImageError, naming what is wrong, for a file that is not qcow2, truncated, corrupt, or of a kind QEMU 7.2
    does not know. Backing files, data files and encryption are reported, not refused: that is for who imports it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            return parse_header(file.read(codec.HEAD), length)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error.message}", hint=error.hint) from None


def parse_header(head: bytes, length: int) -> Qcow2Info:
    """`inspect` on the first bytes (64 KiB, or all there is) of a file of ``length`` bytes. Raises ImageError."""
    return codec.parse_header(head, length, MAX_DISK)
