"""Starting one machine, and the handle on one that runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from posada.engine.base import Launch
from posada.engine.common import process
from posada.engine.common.running import current, new_cid, write_running
from posada.engine.qemu import ports, qmp, ram
from posada.engine.qemu.argv import build
from posada.engine.qemu.files import Descriptors
from posada.engine.qemu.layout import Layout, new_layout, read_layout
from posada.engine.qemu.probe import Facts
from posada.engine.qemu.spawn import Spawned, spawn
from posada.engine.qemu.status import status_of
from posada.errors import EngineError, EngineGone, Unsupported
from posada.model.records import Running

NAME = "qemu"


class Machine:
    """A running machine as the engine's modules see it."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.process = running.process
        self.runtime = Path(running.runtime)

    @property
    def layout(self) -> Layout:
        """Its devices now: hot-plug rewrites the record in the runtime directory. Raises EngineError."""
        return read_layout(current(self.running).private)

    def store_layout(self, layout: Layout) -> None:
        """Remember a changed device set."""
        record = current(self.running)
        private = record.private | {"layout": msgspec.to_builtins(layout)}
        write_running(self.runtime, msgspec.structs.replace(record, private=private))

    def require_alive(self) -> None:
        """Raises EngineGone, with how it ended."""
        status = status_of(self.process, self.runtime)
        if not status.alive:
            raise EngineGone("the machine is not running any more", detail=status.ended or "")

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[qmp.Session]:
        """A QMP session. Raises EngineGone."""
        self.require_alive()
        async with qmp.connect(self.runtime / "qmp.sock") as session:
            yield session


def layout_for(launch: Launch, facts: Facts) -> Layout:
    """The devices of a machine at power-on. Raises Unsupported."""
    spec = launch.spec
    if spec.arch != "x86_64":
        raise Unsupported(NAME, f"{spec.arch} guests", hint="use arch: x86_64")
    if spec.firmware == "uefi":
        raise Unsupported(NAME, "UEFI firmware", hint="use firmware: direct or bios")
    if spec.cloud_init is not None:
        raise Unsupported(NAME, "cloud-init", hint="drop cloud_init; set the guest up through exec")
    return new_layout(
        machine=facts.machine,
        accelerator=facts.accelerator,
        cpus=spec.cpus,
        memory=spec.memory,
        nics=len(spec.nics),
        vsock=facts.vsock,
        agent=launch.agent,
        nested=spec.nested,
        disks=[d.name for d in launch.disks],
    )


def version_of(machine: str) -> tuple[int, ...]:
    """(7, 2) of ``pc-i440fx-7.2``. Newer QEMUs know the machine types of older ones, not the other way round."""
    return tuple(int(part) for part in machine.rpartition("-")[2].split(".") if part.isdigit())


async def explain(spawned: Spawned, runtime: Path, error: EngineGone) -> EngineError:
    """``error``, or what QEMU itself said if it has ended."""
    try:
        await process.ended(spawned.process, 2)  # its sockets close some time before it has ended
        await process.ended(spawned.keeper, 5)  # which writes the exit record
    except TimeoutError:
        return error
    record = process.read_exit(runtime)
    detail = (record.stderr.strip() or record.reason) if record else error.message
    return EngineError("QEMU ended at once", detail=detail[-2000:])


async def record(session: qmp.Session, spawned: Spawned, launch: Launch, layout: Layout, *, cid: int) -> Running:
    """What a later process needs to know of a machine that was just started."""
    private: dict[str, Any] = {"layout": msgspec.to_builtins(layout)}
    if cid:
        private["cid"] = cid
    return Running(
        engine=NAME,
        process=spawned.process,
        keeper=spawned.keeper,
        accelerator=layout.accelerator,
        started=time.time(),
        runtime=str(launch.runtime),
        ports=tuple(await ports.bound(session)) if launch.spec.ports else (),
        private=private,
    )


async def start(launch: Launch, facts: Facts) -> Running:
    """From power-on. See `Runner.start`."""
    layout = layout_for(launch, facts)
    ports.check_free(launch.spec.ports)
    cid = new_cid() if layout.vsock else 0
    invocation = build(launch, layout, binary=facts.binary, cid=cid)
    with Descriptors() as files:
        files.give("ram", ram.create(layout.memory))
        spawned = await spawn(launch, invocation, files, layout.accelerator)
    try:
        try:
            async with qmp.connect(launch.runtime / "qmp.sock") as session:
                running = await record(session, spawned, launch, layout, cid=cid)
        except EngineGone as error:
            raise await explain(spawned, launch.runtime, error) from None
        write_running(launch.runtime, running)
        spawned.commit()
    except BaseException:
        await spawned.abandon()
        raise
    return running
