"""Wake whoever waits for a change of the state, in this process or another: no polling.

A listener is a datagram socket in ``<runtime>/listeners``; a writer sends one empty datagram to each after it has
committed. A full socket means that a wake-up is pending already; a dead one is removed by the writer that meets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from pathlib import Path

#: sun_path holds 107 bytes; names relative to an open directory stay below it however long the runtime path is.
_PROC = "/proc/self/fd/{}/{}"


class Wakeups:
    """Both sides. `ring` after a commit; ``async with listen() as changed: await changed()`` to wait for one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def ring(self) -> None:
        """Wake all listeners. Never blocks, never raises."""
        try:
            names = os.listdir(self._directory)
        except OSError:
            return
        if not names:
            return
        try:
            folder = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                for name in names:
                    try:
                        sender.sendto(b"\0", _PROC.format(folder, name))
                    except ConnectionRefusedError:
                        with contextlib.suppress(OSError):
                            os.unlink(name, dir_fd=folder)
                    except OSError:
                        pass
        finally:
            os.close(folder)

    def listen(self) -> Listener:
        return Listener(self._directory)


class Listener:
    """One waiter's socket; a context manager."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / uuid.uuid4().hex
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.bind(_PROC.format(folder, self._path.name))
        except BaseException:
            self._socket.close()
            raise
        finally:
            os.close(folder)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.close()

    async def changed(self) -> None:
        """Return at the next ring, or at once when one came since the last call."""
        loop = asyncio.get_running_loop()
        await loop.sock_recv(self._socket, 16)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
