"""Start a keeper, and through it a QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess

from posada.engine.base import CONSOLE_LOG_MAX, Launch
from posada.engine.common import process
from posada.engine.common.bootstrap import python
from posada.engine.common.identity import jail_uid
from posada.engine.qemu import cgroups
from posada.engine.qemu.argv import Invocation
from posada.engine.qemu.files import Descriptors, clear, listen
from posada.errors import EngineError, EngineGone
from posada.model.records import Process

#: Descriptors QEMU may have open: slirp opens one per guest connection.
NOFILE = 8192
#: Seconds for the keeper to start QEMU; it takes 15 ms.
START_TIMEOUT = 20.0


def _groups(accelerator: str) -> list[int]:
    """QEMU opens /dev/kvm by itself: it is let into the device's group, where that is what opens it."""
    if accelerator != "kvm":
        return []
    info = os.stat("/dev/kvm")
    return [] if info.st_mode & stat.S_IWOTH else [info.st_gid]


class Spawned:
    """A QEMU that runs, and whose end is still ours: until `commit` it dies with us."""

    def __init__(self, qemu: Process, keeper: Process, control: socket.socket) -> None:
        self.process, self.keeper = qemu, keeper
        self._control = control

    def commit(self) -> None:
        """From now on it outlives us. Raises EngineGone if the keeper is gone."""
        try:
            self._control.send(b"c")
        except OSError as error:
            raise EngineGone("the machine's keeper is gone", detail=str(error)) from None
        finally:
            self._control.close()

    async def abandon(self) -> None:
        """End it, and wait until nothing of it is left."""
        self._control.close()
        process.send(self.process, signal.SIGKILL)
        for each in (self.process, self.keeper):
            with contextlib.suppress(TimeoutError):
                await process.ended(each, 10)


async def spawn(launch: Launch, invocation: Invocation, files: Descriptors, accelerator: str) -> Spawned:
    """Start it. ``files`` holds what was opened in advance; the rest of the invocation's roles is opened here.

    On failure or cancellation nothing is left. Raises EngineError, HostError, ImageError.
    """
    uid = jail_uid(launch.uuid)
    clear(launch.runtime)
    monitor, console = files.pair("monitor"), files.pair("console")
    listener = files.own(listen(launch.runtime / "console.sock"))
    files.open_all(launch, invocation.fds, readable_by_all=uid is not None)
    (launch.runtime / "activity").touch(0o600)
    control, theirs = socket.socketpair()
    groups = cgroups.create(launch.uuid, cpus=launch.spec.cpus, memory=launch.spec.memory)
    given = {
        "runtime": launch.runtime,
        "log": launch.log,
        "log_max": CONSOLE_LOG_MAX,
        "control": theirs.fileno(),
        "console": console,
        "listener": listener,
        "monitor": monitor,
        "fds": ",".join(f"{files.by_role[role]}:{number}" for role, number in invocation.fds.items()),
        "uid": "" if uid is None else uid,
        "groups": ",".join(map(str, _groups(accelerator))),
        "nofile": NOFILE,
        "cgroups": ",".join(map(str, groups)),
        "owner": f"{launch.owner.pid}:{launch.owner.start}" if launch.owner else "",
        "lifetime": launch.spec.limits.lifetime or "",
        "idle": launch.spec.limits.idle or "",
        "action": launch.spec.limits.action,
    }
    words = python("posada.engine.qemu.keeper.main")
    words += [*(f"{key}={value}" for key, value in given.items()), "--", *invocation.argv]
    passed = {files.by_role[role] for role in invocation.fds} | {theirs.fileno(), console, listener, monitor}
    null = subprocess.DEVNULL
    spawned: Spawned | None = None
    try:
        with theirs:
            # Not asyncio's: the keeper is nobody's child once it has forked, and Popen returns after 1 ms.
            starter = subprocess.Popen(  # noqa: ASYNC220
                words, stdin=null, stdout=null, stderr=null, pass_fds=tuple(passed), cwd="/"
            )
        try:
            answer = await _answer(control)
        finally:
            starter.wait()  # it has forked and left long before it answers
        spawned = _parse(answer, control)
        return spawned
    finally:
        if spawned is None:
            await _gone(control)
            cgroups.remove(launch.uuid)


async def _gone(control: socket.socket) -> None:
    """Tell the keeper that nobody waits for it, and wait until it has ended what it started."""
    with control, contextlib.suppress(OSError, TimeoutError):
        control.setblocking(False)
        control.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(START_TIMEOUT):
            while await asyncio.get_running_loop().sock_recv(control, 8192):
                pass


async def _answer(control: socket.socket) -> str:
    """The keeper's line."""
    control.setblocking(False)
    loop = asyncio.get_running_loop()
    data = b""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not data.endswith(b"\n"):
                chunk = await loop.sock_recv(control, 8192)
                if not chunk:
                    raise EngineError("the machine's keeper ended before QEMU ran", detail=data.decode("utf-8", "replace"))
                data += chunk
    except TimeoutError:
        raise EngineGone(f"the machine's keeper did not start QEMU within {START_TIMEOUT:g} s") from None
    return data.decode(errors="replace").strip()


def _parse(answer: str, control: socket.socket) -> Spawned:
    word, _, rest = answer.partition(" ")
    if word != "ok":
        raise EngineError("QEMU could not be started", detail=rest, hint="posada doctor says what is missing")
    pid, start, keeper, keeper_start = map(int, rest.split())
    return Spawned(Process(pid, start), Process(keeper, keeper_start), control)
