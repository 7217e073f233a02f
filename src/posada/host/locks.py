"""One lock per vm, across processes and within one.

flock(2) on ``<runtime>/locks/<name>``: it goes with its holder, however that dies. Each attempt opens the file anew, so
that two holders inside one process exclude each other as well. The file names its holder, for the message of `Busy`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from posada.errors import Busy

#: Seconds to wait for a vm that another process is working on.
DEFAULT_TIMEOUT = 30.0


class Locks:
    """The locks of one house. Not reentrant.

    ``known`` says whether there is something of that name. Who waited for the lock of what was deleted meanwhile has made
    its file anew: a file that nothing belongs to goes when it is released.
    """

    def __init__(self, directory: Path, known: Callable[[str], bool] = lambda name: True) -> None:
        self._directory, self._known = directory, known
        self._queues: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def hold(
        self, name: str, why: str, *, timeout: float | None = DEFAULT_TIMEOUT, new: bool = False
    ) -> AsyncIterator[None]:
        """Hold the lock. ``why`` is what others are told. Raises Busy after ``timeout`` seconds.

        ``new``: it is of something that is being made; if the block fails nothing has that name, nor a lock file.
        """
        queue = self._queues.setdefault(name, asyncio.Lock())
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            # The queue is for tasks of this process: fair, and no polling.
            async with asyncio.timeout(timeout):
                await queue.acquire()
        except TimeoutError:
            raise self._busy(name) from None
        try:
            fd = await self._wait(name, deadline)
            try:
                self._sign(fd, why)
                yield
            except BaseException:
                if new:
                    self.forget(name)
                raise
            finally:
                self._release(name, fd)
        finally:
            queue.release()
            if not queue.locked() and self._queues.get(name) is queue:
                del self._queues[name]

    @contextmanager
    def attempt(self, name: str, why: str) -> Iterator[bool]:
        """Hold the lock if it is free; yields whether it is held. Never waits."""
        queue = self._queues.get(name)
        fd = None if queue is not None and queue.locked() else self._try(name)
        try:
            if fd is not None:
                self._sign(fd, why)
            yield fd is not None
        finally:
            if fd is not None:
                self._release(name, fd)

    def _release(self, name: str, fd: int) -> None:
        try:
            if not self._known(name):
                self.forget(name)
        finally:
            os.close(fd)

    def forget(self, name: str) -> None:
        """Remove the lock's file, by its holder. Whoever waits on the old file notices and opens a new one."""
        (self._directory / name).unlink(missing_ok=True)

    async def _wait(self, name: str, deadline: float | None) -> int:
        pause = 0.002
        while (fd := self._try(name)) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise self._busy(name)
            # The kernel cannot wake a task for a flock; another process holds it, so ask again, less and less often.
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return fd

    def _try(self, name: str) -> int | None:
        path = self._directory / name
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            try:
                current = os.stat(path)
            except FileNotFoundError:
                current = None
            if current is not None and os.path.samestat(os.fstat(fd), current):
                return fd
            os.close(fd)  # it was forgotten between our open and our flock

    @staticmethod
    def _sign(fd: int, why: str) -> None:
        os.pwrite(fd, f"{os.getpid()} {why}\n".encode()[:200].ljust(200), 0)

    def _busy(self, name: str) -> Busy:
        try:
            pid, _, why = (self._directory / name).read_text("utf-8", "replace").strip().partition(" ")
        except OSError:
            pid, why = "?", "working"
        return Busy(f"process {pid} is busy with it: {why}", hint="wait for it, see: posada op ls; or end that process")
