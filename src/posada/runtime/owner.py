"""Who a machine dies with: its owner, and until it is committed the process that started it."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from posada.runtime.watch import Watcher

COMMIT = b"c"


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def open_owner(pid: int, start: int) -> int:
    """A pidfd of that very process, or -1 when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return -1
    try:
        if start_time(pid) == start:  # asked after opening: so the pidfd is that process's
            return fd
    except OSError:
        pass
    os.close(fd)
    return -1


class Owner:
    """Calls ``gone`` once when the process of a pidfd ends. -1: it is gone already, which is told at once."""

    def __init__(self, watcher: Watcher, pidfd: int, gone: Callable[[], object]) -> None:
        self._watcher, self._fd, self._gone = watcher, pidfd, gone
        if pidfd < 0:
            gone()
        else:
            watcher.watch(pidfd, self._ended)

    def _ended(self, _: int) -> None:
        self.forget()
        self._gone()

    def forget(self) -> None:
        """It is nobody's any more. Idempotent."""
        if self._fd >= 0:
            self._watcher.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1


class Starter:
    """The connection to the process that started this one: until it says `COMMIT`, its end is ours (``gone``)."""

    def __init__(self, watcher: Watcher, fd: int, gone: Callable[[], object]) -> None:
        self._watcher, self._fd, self._gone = watcher, fd, gone
        self.committed = False
        os.set_blocking(fd, False)
        watcher.watch(fd, self._ready)

    def tell(self, data: bytes) -> None:
        """Best effort: a starter that is gone is found out by the loop."""
        try:
            os.write(self._fd, data)
        except OSError:
            pass

    def _ready(self, _: int) -> None:
        try:
            data = os.read(self._fd, 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._watcher.unwatch(self._fd)
        if data == COMMIT:
            self.committed = True
            os.close(self._fd)
        else:
            self._gone()
