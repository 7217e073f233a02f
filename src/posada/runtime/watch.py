"""The least of an event loop: who is called when a descriptor is ready.

`posada.vmm.loop.Loop` is one too, so what is written against `Watcher` runs in a monitor as in a keeper. The events are
those of poll(2), which epoll(7) shares.
"""

from __future__ import annotations

import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Watcher(Protocol):
        """Descriptors are watched level-triggered; unwatch one before it is closed."""

        def watch(self, fd: int, callback: Callable[[int], object], events: int = select.POLLIN) -> None: ...

        def modify(self, fd: int, events: int) -> None: ...

        def unwatch(self, fd: int) -> None:
            """Idempotent."""


READ, WRITE = select.POLLIN, select.POLLOUT


class Poll:
    """A `Watcher` for a process that has nothing else to do: call `once` again and again."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[int], object]] = {}

    def watch(self, fd: int, callback: Callable[[int], object], events: int = READ) -> None:
        self._callbacks[fd] = callback
        self._poll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._poll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def watched(self, fd: int) -> bool:
        return fd in self._callbacks

    def once(self, timeout: float | None) -> None:
        """Wait for at most ``timeout`` seconds and call whoever is concerned."""
        for fd, events in self._poll.poll(None if timeout is None else max(1.0, timeout * 1000)):
            callback = self._callbacks.get(fd)  # an earlier one may have dropped it
            if callback is not None:
                callback(events)
