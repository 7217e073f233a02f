"""What ties a monitor to its host: who it dies with, how long it may live, and how it says that it ended.

Everything goes through descriptors that the engine opened. `posada.runtime` does the work; this gives it the loop.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass

from posada.runtime import ending
from posada.runtime.console import Console, Recent
from posada.runtime.deadlines import Deadlines
from posada.runtime.owner import Owner, Starter
from posada.vmm import state
from posada.vmm.loop import Loop, Timer

_MAX_FD = 1 << 20
#: Bytes of notes that are kept.
_NOTES = 8 << 10
_ACTIONS = ("kill", "pause")

RUNNING, PAUSED = b"r", b"p"


@dataclass(frozen=True, slots=True)
class LifeConfig:
    """Descriptors, -1 where there is none; seconds, 0 for ever."""

    starter: int = -1
    """Socket to the process that starts us: until it commits, its end is ours."""
    lock: int = -1
    """A file we hold a write lock on as long as we live: fcntl(2) tells anybody who asks for it our pid."""
    status: int = -1
    """A file whose first byte says whether the vcpus run (`RUNNING`, `PAUSED`)."""
    activity: int = -1
    """A file whose mtime is the last use of the machine."""
    owner: int = -1
    """A pidfd of the process the machine dies with."""
    lifetime: float = 0
    idle: float = 0
    action: str = "kill"
    """What happens at a deadline."""

    @classmethod
    def from_dict(cls, d: state.Document) -> LifeConfig:
        names = ("starter", "lock", "status", "activity", "owner")
        return cls(
            **{name: state.integer(d, name, -1, _MAX_FD, -1) for name in names},
            lifetime=state.number(d, "lifetime", 0, 1e9, 0),
            idle=state.number(d, "idle", 0, 1e9, 0),
            action=state.choice({"action": "kill", **d}, "action", _ACTIONS),
        )


class Life:
    """One monitor's. ``exit``: the empty file the exit record goes to. ``pause`` stops the vcpus.

    `end` says why and stops the loop; the first reason stands. After the loop: `finish`.
    """

    def __init__(
        self, loop: Loop, config: LifeConfig, exit: int, console: Console, pause: Callable[[], object]
    ) -> None:
        self._loop, self._console, self._pause = loop, console, pause
        self._timer: Timer | None = None
        self._reason = ""
        self._crashed = False
        self._notes = Recent(_NOTES)
        self._adopt(config, exit)

    def _adopt(self, config: LifeConfig, exit: int) -> None:
        self._config, self._exit = config, exit
        if exit >= 0:
            faulthandler.enable(exit, all_threads=False)  # what kills us at once is noted all the same
        self._owner: Owner | None = None
        self._starter: Starter | None = None
        if config.lock >= 0:
            # Not inherited by a fork, and gone with us however we end. Raises OSError if somebody else lives here.
            fcntl.lockf(config.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if config.starter >= 0:
            self._starter = Starter(self._loop, config.starter, lambda: self.end("the client that started it is gone"))
        if config.owner >= 0:
            self._owner = Owner(self._loop, config.owner, lambda: self.end("its owner is gone"))
        self._deadlines = Deadlines(
            config.lifetime or None,
            config.idle or None if config.activity >= 0 else None,
            config.activity,
            self._expire,
            repeat=config.action == "pause",
        )
        self._arm()

    def started(self) -> None:
        """Tell the starter that the machine is there. It learns our pid from this."""
        if self._starter is not None:
            self._starter.tell(b"ok %d\n" % os.getpid())

    def disown(self) -> None:
        """The machine outlives its owner. Idempotent."""
        if self._owner is not None:
            self._owner.forget()
            self._owner = None

    def paused(self, yes: bool) -> None:
        """Let clients that only look know that the vcpus stand still, or run."""
        if self._config.status >= 0:
            os.pwrite(self._config.status, PAUSED if yes else RUNNING, 0)

    def note(self, text: str) -> None:
        """Something odd, for whoever looks into it later; the last of it goes into the exit record."""
        self._notes.add(f"{text}\n".encode(errors="replace"))

    @property
    def notes(self) -> str:
        return self._notes.get().decode(errors="replace")

    def end(self, reason: str, *, crashed: bool = False, detail: str = "") -> None:
        """From any thread. ``detail``: what a person needs to find out why."""
        if detail:
            self.note(detail)
        if not self._reason:
            self._reason, self._crashed = reason, crashed
        self._loop.stop()

    def finish(self) -> None:
        """Write the exit record. The vcpus stand still for good.

        What a person needs to find out why it crashed goes to the console as well: its log outlives the machine.
        """
        if self._crashed and self.notes:
            report = "".join(f"{line}\r\n" for line in [f"posada: {self._reason}", *self.notes.splitlines()])
            self._console.output(b"\r\n" + report.encode(errors="replace"))
        self._console.flush()
        panic = ending.panic_reason(self._reason, False, self._console.recent.get())
        crashed = self._crashed or panic is not None or not self._reason
        reason = panic or self._reason or "its monitor's loop ended"
        if self._exit >= 0:
            ending.write_descriptor(self._exit, ending.record(reason, crashed=crashed, stderr=self.notes))

    def after_fork(self, config: LifeConfig, exit: int) -> None:
        """In a forked child, on its new loop: its own starter, lock, owner and deadlines, nothing of the parent's."""
        if self._timer is not None:
            self._timer.cancel()
        self.disown()
        if self._starter is not None and not self._starter.committed:
            self._loop.unwatch(self._config.starter)
            os.close(self._config.starter)
        for fd in {self._config.lock, self._config.status, self._config.activity, self._exit} - {-1}:
            os.close(fd)
        self._reason, self._crashed = "", False
        self._adopt(config, exit)

    def _arm(self) -> None:
        left = self._deadlines.left()
        self._timer = None if left is None else self._loop.timer(left, self._look)

    def _look(self) -> None:
        self._deadlines.check()
        self._arm()

    def _expire(self, reason: str) -> None:
        if self._config.action == "pause":
            self._pause()
            self.paused(True)
        else:
            self.end(reason)
