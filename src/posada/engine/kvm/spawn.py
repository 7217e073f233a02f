"""Start a monitor: a process of its own, forked by a bare Python that is nobody's child (`posada.vmm.nursery`).

On the connection that it is given (``starter``) it says ``pid N``, then ``ok N`` or ``error KIND TEXT``, one line each, and
waits for the byte ``c`` (commit). If our end closes before that, we have died or given up, and it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from posada.engine.base import Launch
from posada.engine.common import cgroups, process
from posada.engine.common.bootstrap import python
from posada.engine.common.uncut import in_thread
from posada.engine.kvm.control import error_of
from posada.engine.kvm.files import Descriptors
from posada.errors import EngineError, EngineGone, HostError, PosadaError
from posada.model.records import Process
from posada.model.units import MIB
from posada.proto import cbor
from posada.proto.monitor import Failure
from posada.runtime.owner import COMMIT
from posada.vmm.config import MonitorConfig
from posada.vmm.nursery import GO, MAX_FDS, MORE

#: Seconds for a monitor to start its machine; it takes 0.2 s, of which Python is half.
START_TIMEOUT = 30.0
#: Bytes beside the guest's memory: the interpreter, translation tables of the kernel, buffers of clients.
OVERHEAD = 128 * MIB
THREADS = 16


class Newborn:
    """A monitor that runs, or is about to, and whose end is still ours: until `commit` it dies with us."""

    def __init__(self, starter: socket.socket, pid: int | None = None) -> None:
        self._starter = starter
        starter.setblocking(False)
        self._lines = b""
        self.process: Process | None = _find(pid) if pid is not None else None

    async def born(self, *, timeout: float = START_TIMEOUT) -> Process:
        """Once it runs. Raises EngineError, or what else the monitor says was wrong."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    word, rest = await self._line()
                    if word in ("pid", "ok") and self.process is None:
                        self.process = _find(int(rest))
                    if word == "error":
                        kind, _, text = rest.partition(" ")
                        raise error_of(Failure(kind, text))
                    if word == "ok":
                        break
        except TimeoutError as error:
            if isinstance(error, PosadaError):
                raise
            raise EngineGone(f"the monitor did not start the machine within {timeout:g} s") from None
        except ValueError as error:
            if isinstance(error, PosadaError):
                raise
            raise EngineError("the monitor speaks nonsense", detail=str(error)) from None
        if self.process is None:
            raise EngineGone("the monitor ended as soon as the machine ran")
        return self.process

    async def named(self) -> Process | None:
        """Once its pid is known; None when it ended before."""
        with contextlib.suppress(PosadaError, ValueError):
            while self.process is None:
                word, rest = await self._line()
                if word != "pid":
                    self._lines = f"{word} {rest}\n".encode() + self._lines
                    break
                self.process = _find(int(rest))
        return self.process

    async def _line(self) -> tuple[str, str]:
        loop = asyncio.get_running_loop()
        while b"\n" not in self._lines:
            try:
                chunk = await loop.sock_recv(self._starter, 8192)
            except OSError:
                chunk = b""
            if not chunk:
                raise EngineError("the monitor ended before the machine ran", hint="posada doctor says what is missing")
            self._lines += chunk
        line, _, self._lines = self._lines.partition(b"\n")
        word, _, rest = line.decode(errors="replace").partition(" ")
        return word, rest

    def commit(self) -> None:
        """From now on it outlives us. Raises EngineGone if it is gone."""
        try:
            self._starter.send(COMMIT)
        except OSError as error:
            raise EngineGone("the monitor is gone", detail=str(error)) from None
        finally:
            self._starter.close()

    async def abandon(self) -> None:
        """End it, and wait until nothing of it is left."""
        if self.process is None and self._starter.fileno() >= 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_TIMEOUT):
                    await self.named()
        self._starter.close()
        if self.process is not None:
            process.send(self.process, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await process.ended(self.process, 10)


def _find(pid: int) -> Process | None:
    try:
        return process.find(pid)
    except OSError:
        return None


class _Nursery:
    """The process that forks our monitors (`posada.vmm.nursery`). Raises HostError when there is no Python to run."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = subprocess.DEVNULL
        # The shell is our child, and gone at once; the nursery is init's.
        command = ["/bin/sh", "-c", '"$@" &', "sh", *python("posada.vmm.nursery"), str(theirs.fileno())]
        with theirs:
            subprocess.run(
                command,
                stdin=null,
                stdout=null,
                stderr=null,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                # Libraries' functions are looked up now: not by each forked child, at a page fault or two for each.
                env={"MALLOC_ARENA_MAX": "2", "LD_BIND_NOW": "1"},
                check=False,
            )

    @property
    def ours(self) -> bool:
        """Not that of a process that has forked us: requests of two would mix."""
        return self._pid == os.getpid()

    def ask(self, fds: Sequence[int]) -> None:
        """Raises OSError when it is gone."""
        packets = [fds[at : at + MAX_FDS] for at in range(0, len(fds), MAX_FDS)]
        for number, packet in enumerate(packets, 1):
            socket.send_fds(self._sock, [GO if number == len(packets) else MORE], packet, socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """It ends by itself."""
        self._sock.close()


_nursery: _Nursery | None = None
_turn = threading.Lock()


def prepare() -> None:
    """Have a nursery; it comes up while the caller opens what the machine is to have. Raises HostError."""
    global _nursery  # one per process
    with _turn:
        if _nursery is None or not _nursery.ours:
            _nursery = _Nursery()


def forget() -> None:
    """Let go of the nursery, which ends; the next machine is as slow to start as a process's first."""
    global _nursery
    with _turn:
        if _nursery is not None:
            _nursery.close()
        _nursery = None


def inherit(config: MonitorConfig, files: Descriptors) -> Newborn:
    """Start a monitor that is given what ``files`` opened. Raises HostError when there is no Python to run."""
    global _nursery
    document = os.memfd_create("posada-config", os.MFD_CLOEXEC)
    try:
        os.write(document, cbor.encode({"config": config.to_dict(), "fds": files.given}))
        os.lseek(document, 0, os.SEEK_SET)
        for last in (False, True):
            prepare()
            with _turn:
                try:
                    if _nursery is not None:
                        _nursery.ask([document, *files.given])
                    break
                except OSError as error:
                    if last or _nursery is None:
                        raise HostError(f"cannot start a monitor: {error.strerror}") from error
                    _nursery.close()  # somebody has ended it
                    _nursery = None
    finally:
        os.close(document)
    newborn = Newborn(files.connection())
    files.close()  # its ends of what is ours too must be open nowhere else
    return newborn


async def confined(newborn: Newborn, groups: list[Path]) -> Process:
    """A machine that runs, and is in its cgroups: joining them is 12 ms of waiting in the kernel, done meanwhile."""
    found = await newborn.named()
    if found is None or not groups:
        return await newborn.born()
    joining = asyncio.ensure_future(in_thread(cgroups.join, groups, found.pid))
    try:
        return await newborn.born()
    finally:
        await joining


def limits(launch: Launch) -> list[Path]:
    """The cgroups of a machine, made and limited. Without them it runs too."""
    spec = launch.spec
    return cgroups.create(launch.uuid, cpus=spec.cpus, memory=spec.memory + OVERHEAD, threads=THREADS + spec.cpus)
