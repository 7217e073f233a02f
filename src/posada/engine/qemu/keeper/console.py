"""The serial console: one stream from QEMU, a bounded log, any number of clients.

A client first receives the recent output. One that does not read is dropped: nothing here ever blocks the guest for a
client's sake.
"""

from __future__ import annotations

import os

#: Bytes of recent output kept for new clients.
RECENT = 16 << 10
#: Bytes that may wait for one client before it is dropped.
BACKLOG = 1 << 20


class Log:
    """A file of at most ``limit`` bytes, and its predecessor ``.1``. Trouble with the disk only loses log."""

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._limit = path, limit
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._fd).st_size
        except OSError:
            self._fd = -1

    def write(self, data: bytes) -> None:
        try:
            if self._size + len(data) > self._limit:
                os.close(self._fd)
                os.replace(self._path, self._path + ".1")
                self._open()
            self._size += os.write(self._fd, data)
        except OSError:
            pass  # a full disk, or a log directory that was deleted: the machine matters more


class Client:
    """One reader of the console, with what it has not taken yet."""

    def __init__(self, fd: int, recent: bytes) -> None:
        self.fd = fd
        self._waiting = bytearray(recent)

    def send(self, data: bytes) -> bool:
        """False: drop the client."""
        self._waiting += data
        return len(self._waiting) <= BACKLOG and self.flush()

    def flush(self) -> bool:
        try:
            while self._waiting:
                del self._waiting[: os.write(self.fd, self._waiting)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    @property
    def pending(self) -> bool:
        return bool(self._waiting)


class Recent:
    """The last bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > 2 * self._limit:
            del self._data[: -self._limit]

    def get(self) -> bytes:
        return bytes(self._data[-self._limit :])
