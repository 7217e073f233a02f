"""How long a machine may live (``lifetime``) and do nothing (``idle``). Seconds; None: for ever."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LIFETIME_OVER = "its lifetime is over"
IDLE_TOO_LONG = "it was idle for too long"


class Deadlines:
    """Idleness counts from the mtime of ``activity``, a path or a descriptor that clients touch.

    The loop asks `left` how long it may sleep, and calls `check` when it wakes; ``expired`` is called with the reason.
    """

    def __init__(
        self,
        lifetime: float | None,
        idle: float | None,
        activity: str | int,
        expired: Callable[[str], object],
        *,
        repeat: bool,
    ) -> None:
        self._end = None if lifetime is None else time.monotonic() + lifetime
        self._idle, self._activity, self._expired = idle, activity, expired
        self._since = 0.0
        """When it was last told that the machine was idle for too long."""
        self._repeat = repeat
        """The machine goes on (it is paused): idle time counts afresh, so that a resumed one gets all of it."""

    def left(self) -> float | None:
        """Seconds until a deadline may have come; None: there is none."""
        waits = []
        if self._end is not None:
            waits.append(self._end - time.monotonic())
        if self._idle is not None:
            waits.append(self._idle_left(self._idle))
        return max(0.0, min(waits)) if waits else None

    def check(self) -> None:
        if self._end is not None and time.monotonic() >= self._end:
            self._end = None
            self._expired(LIFETIME_OVER)
        elif self._idle is not None and self._idle_left(self._idle) <= 0:
            self._since = time.time()
            if not self._repeat:
                self._idle = None
            self._expired(IDLE_TOO_LONG)

    def _idle_left(self, idle: float) -> float:
        """A clock that jumped back counts as activity."""
        try:
            passed = time.time() - max(os.stat(self._activity).st_mtime, self._since)
        except OSError:
            passed = 0.0
        return min(idle, idle - passed) if passed >= 0 else idle
