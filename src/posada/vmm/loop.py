"""The monitor's event loop: epoll, timers, and the lock that devices are used under.

Handlers run on the thread in `Loop.run`, one at a time, with `Loop.lock` held; vcpu threads hold the same lock while
they handle an exit. So device code is single-threaded. Handlers must not block. An exception in a handler ends
`run`: the monitor must not go on with a device in an unknown state.
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections import deque
from collections.abc import Callable

from posada.vmm.threads import RLock

Callback = Callable[[int], object]


class Timer:
    """A pending call. `cancel` is idempotent and may come late."""

    __slots__ = ("callback", "cancelled", "deadline")

    def __init__(self, deadline: float, callback: Callable[[], object]) -> None:
        self.deadline = deadline
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __lt__(self, other: Timer) -> bool:
        return self.deadline < other.deadline


class Loop:
    """Watches are keyed by descriptor; unwatch one before it is closed, or its number's next owner inherits it."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._watches: dict[int, tuple[Callback, int]] = {}
        self._timers: list[Timer] = []
        self._soon: deque[Callable[[], object]] = deque()
        self._stopping = False
        self._awake = False
        self._open()

    def watch(self, fd: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Call ``callback(events)`` when ``fd`` is ready (level-triggered). Raises OSError for a regular file."""
        self._epoll.register(fd, events)
        self._watches[fd] = (callback, events)

    def modify(self, fd: int, events: int) -> None:
        """Change what a watched ``fd`` is waited for; 0 leaves hang-up and error only. Raises KeyError."""
        callback, before = self._watches[fd]
        if events != before:
            self._epoll.modify(fd, events)
            self._watches[fd] = (callback, events)

    def unwatch(self, fd: int) -> None:
        """Idempotent."""
        if self._watches.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:  # closed already: the kernel forgot it by itself
                pass

    def timer(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call once, ``seconds`` from now (monotonic clock). From another thread than the loop's: hold the lock."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        if self._timers[0] is timer:
            self._wake()
        return timer

    def soon(self, callback: Callable[[], object]) -> None:
        """Call on the loop's thread as soon as it is free. From any thread, also from a signal handler."""
        self._soon.append(callback)
        self._wake()

    def run(self) -> None:
        """Dispatch until `stop`. Pending `soon` calls made before `stop` are run."""
        self._stopping = False
        while not self._stopping:
            self._awake = False
            with self.lock:  # vcpus make timers
                wait = self._timeout()
            ready = self._epoll.poll(wait)
            self._awake = True
            with self.lock:
                for fd, events in ready:
                    watch = self._watches.get(fd)  # an earlier handler may have dropped it
                    if watch is not None:
                        watch[0](events)
                self._run_timers()
                self._run_soon()

    def stop(self) -> None:
        """Make `run` return. From any thread."""
        self.soon(self._stop)

    def after_fork(self) -> None:
        """In a forked child, before anything else touches the loop: a new epoll and wake-up, the same watches and timers.

        The inherited epoll shares its registrations with the parent's, so it must not be changed, only closed. The lock
        is still held by this thread, as it was when it forked, and nobody waits for it: the others do not exist.
        """
        self._epoll.close()
        os.close(self._wakeup)
        watches, self._watches = self._watches, {}
        self._open()
        for fd, (callback, events) in watches.items():
            if fd not in self._watches:
                self.watch(fd, callback, events)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wakeup)

    def _open(self) -> None:
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Edge-triggered: each write is an event, and nobody has to read the count.
        self._epoll.register(self._wakeup, select.EPOLLIN | select.EPOLLET)

    def _wake(self) -> None:
        if not self._awake:  # else it looks at what there is to do before it sleeps again
            os.eventfd_write(self._wakeup, 1)

    def _stop(self) -> None:
        self._stopping = True

    def _timeout(self) -> float | None:
        if self._soon:
            return 0
        while self._timers and self._timers[0].cancelled:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].deadline - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        if not self._timers:
            return
        now = time.monotonic()
        while self._timers and (self._timers[0].cancelled or self._timers[0].deadline <= now):
            timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                timer.callback()

    def _run_soon(self) -> None:
        for _ in range(len(self._soon)):  # not those that these add: descriptors come first
            self._soon.popleft()()
