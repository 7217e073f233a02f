"""The serial console: one stream from the guest, a bounded log, any number of clients.

A client first receives the recent output. One that does not read is dropped: nothing here ever blocks the guest for a
client's sake.
"""

from __future__ import annotations

import _socket
import os

from posada.runtime.watch import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from posada.runtime.watch import Watcher

    class Log(Protocol):
        """Trouble with the disk only loses log; `write` never raises OSError."""

        def write(self, data: bytes) -> None: ...

        def close(self) -> None: ...


#: Bytes of recent output kept for new clients.
RECENT = 16 << 10
#: Bytes that may wait for one client before it is dropped.
BACKLOG = 1 << 20
MAX_CLIENTS = 32
#: Bytes of typed text taken at once.
_TYPED = 4096


class PathLog:
    """A file of at most ``limit`` bytes, and its predecessor ``.1``. Opens its files by path."""

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

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DescriptorLog:
    """The same on two files that are open already, for a process that cannot open any. -1: there is none.

    A full log is copied into ``old`` and begins again, so both keep their inodes.
    """

    def __init__(self, fd: int, old: int, limit: int) -> None:
        self._fd, self._old, self._limit = fd, old, limit
        self._size = os.fstat(fd).st_size if fd >= 0 else 0

    def write(self, data: bytes) -> None:
        if self._fd < 0:
            return
        try:
            if self._size + len(data) > self._limit:
                self._rotate()
            self._size += os.pwrite(self._fd, data, self._size)
        except OSError:
            pass  # a full disk: the machine matters more

    def _rotate(self) -> None:
        size, self._size = self._size, 0
        try:
            if self._old >= 0:
                os.ftruncate(self._old, 0)
                os.lseek(self._old, 0, os.SEEK_SET)
                done = 0
                while done < size:
                    sent = os.sendfile(self._old, self._fd, done, size - done)
                    if not sent:
                        break
                    done += sent
        finally:
            os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Idempotent."""
        for fd in {self._fd, self._old} - {-1}:
            os.close(fd)
        self._fd = self._old = -1


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


class Console:
    """What the guest says goes to the log and to every client; what clients type goes to ``typed``.

    ``listener``: a listening unix socket, or -1. ``typed`` must not block, and may drop what the guest does not take,
    as a real line does.
    """

    def __init__(self, watcher: Watcher, listener: int, log: Log, typed: Callable[[bytes], object]) -> None:
        self._watcher, self._log, self._typed = watcher, log, typed
        self.recent = Recent(RECENT)
        self._clients: dict[int, Client] = {}
        self._listener: _socket.socket | None = None
        self._listen(listener)

    def _listen(self, listener: int) -> None:
        if listener >= 0:
            self._listener = _socket.socket(fileno=listener)
            self._listener.setblocking(False)
            self._watcher.watch(listener, self._accept)

    def output(self, data: bytes) -> None:
        """The guest said something."""
        if not data:
            return
        self._log.write(data)
        self.recent.add(data)
        for client in list(self._clients.values()):
            self._settle(client, client.send(data))

    def flush(self) -> None:
        """A last try to give clients what they wait for: the end is near."""
        for client in list(self._clients.values()):
            client.flush()

    def reopen(self, listener: int, log: Log) -> None:
        """In a forked child: its own listener and log. The clients are the parent's; the recent output is both's."""
        self._log.close()
        for fd in self._clients:
            self._watcher.unwatch(fd)
            os.close(fd)
        self._clients.clear()
        if self._listener is not None:
            self._watcher.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._log = log
        self._listen(listener)

    def _settle(self, client: Client, keep: bool) -> None:
        if keep:
            self._watcher.modify(client.fd, READ | (WRITE if client.pending else 0))
        else:
            self._watcher.unwatch(client.fd)
            del self._clients[client.fd]
            os.close(client.fd)

    def _accept(self, _: int) -> None:
        try:
            fd, _address = self._listener._accept()  # type: ignore[union-attr]
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            os.close(fd)
            return
        os.set_blocking(fd, False)
        client = self._clients[fd] = Client(fd, self.recent.get())
        self._watcher.watch(fd, lambda _: self._ready(client))
        self._settle(client, client.flush())

    def _ready(self, client: Client) -> None:
        try:
            data = os.read(client.fd, _TYPED)
            if data:
                self._typed(data)
        except BlockingIOError:
            data = b"-"  # there was none
        except OSError:
            data = b""
        self._settle(client, bool(data) and client.flush())
