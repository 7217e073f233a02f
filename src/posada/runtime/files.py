"""Which file is it, by whatever name or descriptor, and who holds a lock on it?"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

Identity = tuple[int, int]
"""A file, as nobody can mistake it for another: device and inode; of a block device, 0 and which."""


_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


def identity(file: int | str | os.PathLike[str]) -> Identity:
    """Of a descriptor or a path. Raises OSError."""
    info = os.stat(file)
    return (0, info.st_rdev) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)


def lock_holder(fd: int, start: int = 0, length: int = 0) -> int | None:
    """The pid of who else holds a POSIX lock on any of these bytes (0: to the end of the file); None: nobody does.

    Not positive where it has none here: another host, or a lock of an open file description. Raises OSError.
    """
    asked = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
    kind, _, _, _, pid = _FLOCK.unpack(asked)
    return None if kind == fcntl.F_UNLCK else pid
