"""What the monitor needs of threads, without the module ``threading``: that renews its own locks in every forked child,
which costs the child 120 page faults, an eighth of the time to its first instruction.

Threads are started with ``_thread.start_new_thread``. None of them is waited for when the process ends.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threading import RLock
else:
    RLock = _thread.RLock

__all__ = ["Condition", "RLock"]


class Condition:
    """Waiting for a change of what ``lock`` guards, which is held at every call. As threading.Condition."""

    def __init__(self, lock: RLock) -> None:
        self._lock = lock
        self._waiting: list[_thread.LockType] = []

    def wait(self) -> None:
        """Give the lock up, however often it is held, until `notify_all`; then hold it again."""
        bell = _thread.allocate_lock()
        bell.acquire()
        self._waiting.append(bell)
        held = self._lock._release_save()  # type: ignore[attr-defined]
        try:
            bell.acquire()
        finally:
            self._lock._acquire_restore(held)  # type: ignore[attr-defined]

    def wait_for(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.wait()

    def notify_all(self) -> None:
        while self._waiting:
            self._waiting.pop().release()

    def forget(self) -> None:
        """In a forked child: who waited does not exist."""
        self._waiting.clear()
