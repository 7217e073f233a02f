"""Starting one machine, and what is remembered of one that runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from posada.engine.base import Launch, Status
from posada.engine.common import cgroups, process
from posada.engine.common.identity import jail_uid
from posada.engine.common.running import new_cid, read_running, write_running
from posada.engine.kvm import config, folders, net, spawn, stack
from posada.engine.kvm.files import Descriptors, clear
from posada.engine.kvm.spawn import Newborn, confined, inherit, limits
from posada.errors import EngineError, EngineGone, Unsupported
from posada.model.records import PortRecord, Process, Running
from posada.runtime.ending import KILLED
from posada.runtime.files import lock_holder
from posada.vmm.life import PAUSED

NAME = "kvm"

#: What faulthandler(3) begins with.
_FATAL = b"Fatal Python error: "


def check(launch: Launch) -> None:
    """Raise Unsupported for what no machine of this engine has."""
    spec = launch.spec
    if spec.arch != "x86_64":
        raise Unsupported(NAME, f"{spec.arch} guests", hint="use arch: x86_64")
    if spec.firmware != "direct":
        raise Unsupported(NAME, f"{spec.firmware} firmware", hint="use firmware: direct, or the qemu engine")
    if spec.cloud_init is not None:
        raise Unsupported(NAME, "cloud-init", hint="drop cloud_init; set the guest up through exec")
    if spec.nested:
        raise Unsupported(NAME, "nested virtualisation", hint="use the qemu engine")


async def start(launch: Launch) -> Running:
    """From power-on. See `Runner.start`."""
    check(launch)
    spawn.prepare()
    async with contextlib.AsyncExitStack() as undo:
        network = await net.connect(launch)
        undo.push_async_callback(network.abandon)
        shared = await folders.serve(launch)
        undo.callback(shared.abandon)
        clear(launch.runtime)
        stack.forget(launch)
        with Descriptors(launch, network.take(), shared.take()) as files:
            document = config.boot(launch, files.inherited, cid=new_cid(), uid=jail_uid(launch.uuid))
            newborn = inherit(document, files)
        running = await settle(launch, newborn, network.ports)
        undo.pop_all()
    return running


async def settle(
    launch: Launch, newborn: Newborn, ports: tuple[PortRecord, ...], private: Mapping[str, Any] = MappingProxyType({})
) -> Running:
    """Wait until a new machine runs, put it into its cgroups, record it, and let go of it. On failure nothing is left."""
    try:
        running = record(launch, await confined(newborn, limits(launch)), ports, private)
        write_running(launch.runtime, running)
        newborn.commit()
    except BaseException:
        await newborn.abandon()
        cgroups.remove(launch.uuid)
        raise
    return running


def record(launch: Launch, found: Process, ports: tuple[PortRecord, ...], private: Mapping[str, Any]) -> Running:
    """What a later process needs to know."""
    return Running(
        engine=NAME,
        process=found,
        accelerator="kvm",
        started=time.time(),
        runtime=str(launch.runtime),
        ports=ports,
        private={"agent": launch.agent, "macs": list(launch.macs), **config.Shape().to_private(), **private},
    )


def status_of(found: Process, runtime: Path) -> Status:
    """What /proc, the status byte and the exit record say. No I/O with the process."""
    if process.alive(found):
        return Status(alive=True, paused=_first_byte(runtime / "status") == PAUSED)
    ended = process.read_exit(runtime)
    if ended is not None:
        return Status(alive=False, ended=ended.reason, crashed=ended.crashed)
    if (runtime / "kill").exists():
        return Status(alive=False, ended=KILLED)
    return Status(alive=False, ended=_last_words(runtime), crashed=True)


def _last_words(runtime: Path) -> str:
    """How a monitor ended that wrote no exit record: it is nobody's child, so nobody was told. Whatever a program can die of,
    it notes (`posada.vmm.life`), except for these two."""
    try:
        with open(runtime / "exit.json", "rb") as file:
            line = file.read(200).partition(b"\n")[0]
    except OSError:
        line = b""
    if line.startswith(_FATAL):
        return f"its monitor crashed: {line.removeprefix(_FATAL).decode('ascii', 'replace')}"
    return "its monitor was killed: by signal 9, or by seccomp (signal 31) for a call it may not make"


def _first_byte(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1)
    except OSError:
        return b""


def require_alive(running: Running) -> None:
    """Raises EngineGone, with how it ended."""
    status = status_of(running.process, Path(running.runtime))
    if not status.alive:
        raise EngineGone("the machine is not running any more", detail=status.ended or "")


async def kill(found: Process, runtime: Path) -> None:
    """See `Runner.kill`."""
    with contextlib.suppress(OSError):
        (runtime / "kill").touch(0o600)  # tells `status_of` that this end was asked for
    process.send(found, signal.SIGKILL)
    await process.ended(found, 30)


def holder(runtime: Path) -> Process | None:
    """The monitor that lives in a runtime directory, recorded or not: it holds a lock there. None: there is none."""
    try:
        with open(runtime / "lock", "rb+") as file:
            pid = lock_holder(file.fileno())
        return None if pid is None else process.find(pid)
    except OSError:
        return None


async def abandon(runtime: Path) -> None:
    """End what runs there; recorded, or holding the lock. What holds none yet ends with its starter, by itself."""
    running = read_running(runtime)
    if running is not None:
        await kill(running.process, runtime)
    for _ in range(3):  # one that was just forked, and had no lock when we looked
        found = holder(runtime)
        if found is None:
            break
        try:
            await kill(found, runtime)
        except TimeoutError as error:
            raise EngineError("a monitor does not end", detail=str(error)) from None
        await asyncio.sleep(0)
