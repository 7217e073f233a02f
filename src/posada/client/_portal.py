"""The portal: an event loop in a thread of its own, through which the sync API runs what the async API awaits.

One per process. It starts at the first use, ends with the process (closing what is still open), and never crosses a
fork: a forked child gets a portal of its own, and objects made before the fork refuse to work in it, because their
database and sockets belong to the parent.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from posada.errors import StateError

T = TypeVar("T")

#: How long the end of the process waits for machines and connections to be closed, in seconds.
CLOSE_TIMEOUT = 15.0


class _Call(Generic[T]):
    """One coroutine on its way through the portal."""

    def __init__(self, coro: Coroutine[Any, Any, T]) -> None:
        self.coro = coro
        self.done = threading.Event()
        self.task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        if not self.done.is_set():
            self.task = asyncio.get_running_loop().create_task(self.coro)
            self.task.add_done_callback(lambda _: self.done.set())

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
        else:  # interrupted before the loop came to it
            self.coro.close()
            self.done.set()

    def result(self) -> T:
        if self.task is None:
            raise asyncio.CancelledError
        return self.task.result()


class Portal:
    """See the module. Thread-safe: any number of threads may call at once."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="posada-portal", daemon=True)
        self._closed = False
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _check(self) -> None:
        if os.getpid() != self.pid:
            raise StateError(
                "this posada object was made before os.fork() and belongs to the parent process",
                hint="call posada.connect() again in the child",
            )
        if self._closed:
            raise StateError("posada is closed: the process is ending")

    @property
    def inside(self) -> bool:
        """Whether the caller is the portal's own thread (the garbage collector may run anything there)."""
        return threading.current_thread() is self._thread

    @property
    def usable(self) -> bool:
        """Whether `run` would do its work here and now."""
        return os.getpid() == self.pid and not self._closed and not self.inside

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run it and wait. An interruption (Ctrl-C) cancels it, waits for its clean-up, and is then raised.

        A second Ctrl-C stops the waiting.
        """
        try:
            self._check()
            if self.inside:
                raise RuntimeError("posada's sync API was called from inside its own event loop; use posada.aio there")
        except BaseException:
            coro.close()
            raise
        call = _Call(coro)
        try:
            self._loop.call_soon_threadsafe(call.begin)
            call.done.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(call.cancel)
            call.done.wait()
            raise
        return call.result()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in the portal's thread and wait."""

        async def invoke() -> T:
            return function(*args, **kwargs)

        return self.run(invoke())

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> None:
        """Run it without waiting; its errors are dropped. Never raises: it is for finalisers."""
        if os.getpid() != self.pid or self._closed:
            coro.close()
            return

        def begin() -> None:
            task = self._loop.create_task(coro)
            _LOOSE.add(task)
            task.add_done_callback(_finish)

        self._loop.call_soon_threadsafe(begin)

    def close(self) -> None:
        """End what goes on, close what is open (`posada.client._core` holds it in tasks), and end the thread."""
        if os.getpid() != self.pid or self._closed:
            return

        async def shut() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await asyncio.gather(*others, return_exceptions=True)
                    await self._loop.shutdown_asyncgens()
                    await self._loop.shutdown_default_executor()
            except TimeoutError:
                pass

        try:
            self.run(shut())
        finally:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT)
            if not self._thread.is_alive():
                self._loop.close()


#: Tasks nobody waits for: the loop itself holds tasks only weakly.
_LOOSE: set[asyncio.Task[Any]] = set()


def _finish(task: asyncio.Task[Any]) -> None:
    _LOOSE.discard(task)
    if not task.cancelled():
        task.exception()  # mark it as seen


_lock = threading.Lock()
_portal: Portal | None = None


def portal() -> Portal:
    """This process's portal."""
    global _portal
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = Portal()
            _at_exit(_portal.close)
        return _portal


def close_portal() -> None:
    """Close this process's portal now; the next use opens another. For tests."""
    global _portal
    with _lock:
        current, _portal = _portal, None
    if current is not None:
        current.close()


def _at_exit(function: Callable[[], None]) -> None:
    # Executor threads can no longer be started when atexit handlers run; the threading module's own hook comes before.
    register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
    register(function)


def _after_fork() -> None:
    global _portal, _lock
    _portal = None
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)
