"""Guest memory as memfds: making, copying, sealing, saving and loading it.

A machine that booted has one memfd, mapped shared. A capture copies it; the copy is sealed, so that neither the source
nor a guest's balloon can change it, and is mapped privately by any number of machines. What such a machine wrote lies
in anonymous memory, found in /proc/PID/pagemap and read with process_vm_readv(2): see `pages`.

Everything here blocks; callers use a thread. The copies release the interpreter's lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from posada.errors import EngineError, HostError, ImageError

NAME = "posada-ram"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
#: Seconds that a seal waits for whoever holds the memory; usually it is taken in one.
SEAL_PATIENCE = 5.0
#: Bytes per sendfile(2), which is not interruptible: cancellation waits for at most this much.
_CHUNK = 1 << 28


def create(size: int, name: str = NAME) -> int:
    """An empty memfd of ``size`` bytes that can be sealed, and whose size cannot be changed."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def seal(fd: int, patience: float = SEAL_PATIENCE) -> None:
    """Nobody can change it any more.

    Raises OSError (EBUSY) when after ``patience`` seconds it is still mapped shared and writable, or the kernel still
    holds pages of it: it does for a moment when it moves them (compaction) or has them in another processor's LRU
    batch, waits 150 ms for itself (memfd_wait_for_pins in mm/memfd.c), and then gives up, which we do not.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole, in bytes."""
    start = end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def copy(source: int, target: int) -> int:
    """Lay everything of ``source`` that is not a hole over ``target``. Returns the bytes copied.

    Holes leave ``target`` as it is. The offsets of both descriptors are used up.
    """
    total = 0
    for start, end in extents(source):
        os.lseek(target, start, os.SEEK_SET)
        offset = start
        while offset < end:
            sent = os.sendfile(target, source, offset, min(end - offset, _CHUNK))
            if not sent:
                raise HostError(f"guest memory ended at {offset}, not at {end}: its file was truncated")
            offset += sent
        total += end - start
    return total


def of_process(pid: int, size: int) -> int:
    """A new read-only descriptor of the guest memory QEMU has open. Raises EngineError if there is none of ``size`` bytes.

    The process is a guest's jail and not trusted: it is only believed what is checked on the opened file.
    """
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        try:
            if not os.readlink(f"{directory}/{name}").startswith(f"/memfd:{NAME}"):
                continue
            fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_size == size:
            return fd
        os.close(fd)
    raise EngineError("the machine's memory cannot be found", detail=f"process {pid} has no memory file of {size} bytes")


def save(source: int, path: Path, size: int) -> int:
    """Write ``source`` to a new sparse file, durably. Returns the bytes of data in it. Raises HostError (no space)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            written = copy(source, fd)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"cannot write the guest's memory to {path}: {error.strerror}") from error
    return written


def load(path: Path, target: int, size: int) -> None:
    """Fill the empty memfd ``target`` from a file that `save` wrote. Raises ImageError, HostError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size != size:
            raise ImageError(f"{path} is not the memory of this machine: {info.st_size} bytes instead of {size}")
        copy(fd, target)
    finally:
        os.close(fd)
