"""Who writes to a disk's file holds a lock on it, so that nobody else does: another monitor, here or on another host.

POSIX locks (fcntl(2), F_SETLK): they belong to the process, so none is left by one that was killed, a forked child has
none of its parent's, and NFS carries them between hosts. They end when the process closes *any* descriptor of that file:
a monitor has one of each. The byte is far from those that QEMU's tools lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from posada.errors import Busy

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock on 64-bit Linux: type, whence, start, length, pid."""
_BYTE = 1 << 62
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock(fd: int) -> bool:
    """Take the lock, if it is not ours already. False: this file system has none. Raises Busy (somebody has it), OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Busy(f"{_who(fd)} writes to the disk", hint="stop it first") from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def unlock(fd: int) -> None:
    """Idempotent. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _BYTE, 1, 0))


def _who(fd: int) -> str:
    found = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0))
    kind, _, _, _, pid = _FLOCK.unpack(found)
    return f"process {pid}" if kind != fcntl.F_UNLCK and pid > 0 else "another host or process"
