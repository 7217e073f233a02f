"""An agent without a guest: it speaks the whole protocol for real, over unix sockets, inside this process.

Commands are real processes of this host, files live in a private directory that stands for the guest's root. It is no
sandbox. It carries the fake engine and the tests, and states what the real agent (``agent/``) does.
"""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posada.errors import GuestError
from posada.guest.fake_exec import FakeExec
from posada.guest.fake_link import FakeLink
from posada.model.exec import IdentityReset

_PREPARED_FOR = 30.0
"""Seconds after which a prepared fork undoes itself."""


class FakeGuest:
    """One guest: its files, identity and processes. `serve` is its agent; `copy` is what a fork of it is.

    ``root`` is its directory; None makes a temporary one, that `close` removes. Absolute paths of requests are below
    it; commands start there, and see this host. ``failures`` maps an ``op`` to (error, errno) to be answered instead.
    """

    def __init__(self, root: Path | None = None, *, on_power: Callable[[str], None] | None = None) -> None:
        self._own_root = root is None
        self.root = root or Path(tempfile.mkdtemp(prefix="posada-fake-"))
        self.hostname = "fake"
        self.machine_id = "0" * 32
        self.generation = 0
        self.token: bytes | None = None
        """That of a prepared fork; while it is set, processes stand still."""
        self.resets: list[IdentityReset] = []
        self.failures: dict[str, tuple[str, str]] = {}
        self.clock_offset_ns = 0
        self.boot_id = secrets.token_hex(16)
        self.execs: dict[int, FakeExec] = {}
        self.links: set[FakeLink] = set()
        self.on_power = on_power
        """Called with ``poweroff`` or ``reboot``."""
        self._last_exec = 0
        self.endings: dict[asyncio.Future[None], FakeExec] = {}
        """Processes that are on their way out."""
        self.tasks: set[asyncio.Future[None]] = set()
        """One for each stream and call."""
        self._servers: list[tuple[asyncio.Server, Path]] = []
        self._thaw: asyncio.TimerHandle | None = None

    async def serve(self, channels: Sequence[Path]) -> None:
        """Answer on these unix sockets until `close`. What is left of an earlier socket there is removed."""
        loop = asyncio.get_running_loop()
        for channel in channels:
            channel.unlink(missing_ok=True)
            server = await loop.create_unix_server(lambda: FakeLink(self), str(channel))
            self._servers.append((server, channel))

    def copy(self) -> FakeGuest:
        """A fork: files and identity as they are now, in a directory of its own. Processes are not copied."""
        child = FakeGuest(on_power=self.on_power)
        shutil.copytree(self.root, child.root, symlinks=True, dirs_exist_ok=True)
        child.hostname, child.machine_id, child.generation = self.hostname, self.machine_id, self.generation
        child.token, child.boot_id, child.clock_offset_ns = self.token, self.boot_id, self.clock_offset_ns
        child.failures = dict(self.failures)
        return child

    async def close(self) -> None:
        """The guest's power is cut: sockets and processes are gone at once, files too if they are its own."""
        for server, channel in self._servers:
            server.close()
            channel.unlink(missing_ok=True)
        self._servers.clear()
        if self._thaw is not None:
            self._thaw.cancel()
        for link in list(self.links):
            link.abort()
        while self.links or self.tasks or self.execs or self.endings:
            while self.execs:
                self._end(self.execs.popitem()[1], hang_up=False)
            for process in self.endings.values():
                process.kill(signal.SIGKILL)
            for task in self.tasks:
                task.cancel()
            await asyncio.wait([*self.tasks, *self.endings, *(link.ended for link in self.links)])
        if self._own_root:
            shutil.rmtree(self.root, ignore_errors=True)

    # -- for the links ----------------------------------------------------------------------------------------------

    def path(self, path: str) -> Path:
        """Where a path of the guest is on this host."""
        if not path.startswith("/"):
            raise GuestError(f"{path!r} is not absolute", errno_name="EINVAL")
        return Path(f"{self.root}{os.path.normpath(path)}")

    def hello(self) -> dict[str, Any]:
        return {
            "name": "posada fake agent",
            "boot_id": self.boot_id,
            "generation": self.generation,
            "init": False,
            "kernel": platform.release(),
            "arch": platform.machine(),
            "hostname": self.hostname,
            "window": 256 << 10,
        }

    def register(self, process: FakeExec) -> int:
        self._last_exec += 1
        self.execs[self._last_exec] = process
        return self._last_exec

    def forget(self, process: FakeExec) -> None:
        """It has ended, and its client knows."""
        if self.execs.pop(process.number, None) is not None:
            self._end(process, hang_up=False)

    def hang_up(self, process: FakeExec) -> None:
        """Its client has gone: SIGHUP, then SIGKILL."""
        if self.execs.pop(process.number, None) is not None:
            self._end(process, hang_up=True)

    def _end(self, process: FakeExec, *, hang_up: bool) -> None:
        task = asyncio.ensure_future(process.hang_up() if hang_up else process.destroy())
        self.endings[task] = process
        task.add_done_callback(self.endings.pop)

    def fork_prepare(self, token: bytes) -> None:
        self.token = token
        self._stop_processes(True)
        self._thaw = asyncio.get_running_loop().call_later(_PREPARED_FOR, self._thawed)

    def fork_done(self, token: bytes) -> None:
        if token != self.token:
            raise GuestError("no fork with this token is prepared", errno_name="EINVAL")
        self._thawed()

    def identity_reset(self, identity: IdentityReset) -> dict[str, str]:
        if identity.token is not None and identity.token != self.token:
            raise GuestError("no fork with this token is prepared", errno_name="EINVAL")
        self.resets.append(identity)
        self.hostname, self.machine_id = identity.hostname, identity.machine_id
        self.generation = identity.generation
        self.clock_offset_ns = identity.time_ns - time.time_ns()
        for path, content in (
            ("etc/hostname", self.hostname),
            ("etc/machine-id", self.machine_id),
            ("run/posada/generation", str(self.generation)),
        ):
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".new")
            temporary.write_text(content + "\n")
            temporary.replace(target)
        self._thawed()
        return dict.fromkeys(("links", "entropy", "time", "hostname", "machine-id", "macs", "generation", "thaw"), "ok")

    def _thawed(self) -> None:
        self.token = None
        if self._thaw is not None:
            self._thaw.cancel()
            self._thaw = None
        self._stop_processes(False)

    def _stop_processes(self, stop: bool) -> None:
        for process in self.execs.values():
            process.freeze(stop)
