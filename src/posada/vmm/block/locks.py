"""Who writes to a disk's file holds a lock on it, so that nobody else does: another monitor, here or on another host.

POSIX locks (fcntl(2), F_SETLK): they belong to the process, so none is left by one that was killed, a forked child has
none of its parent's, and NFS carries them between hosts. They end when the process closes *any* descriptor of that file:
a monitor has one of each. The byte is far from those that QEMU's tools lock.
"""

from __future__ import annotations

import errno
import fcntl

from posada.errors import Busy
from posada.runtime.files import lock_holder

_BYTE = 1 << 62
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock(fd: int) -> bool:
    """Take the lock, if it is not ours already. False: this file system has none. Raises Busy (somebody has it), OSError."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BYTE)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Busy(f"{_who(fd)} writes to the disk", hint="stop it first") from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def unlock(fd: int) -> None:
    """Idempotent. Raises OSError."""
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, _BYTE)


def _who(fd: int) -> str:
    pid = lock_holder(fd, _BYTE, 1)
    return f"process {pid}" if pid is not None and pid > 0 else "another host or process"
