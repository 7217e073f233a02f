"""Changing a running machine: see `Tuner`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec

from posada.engine.base import DiskFile, Inspection
from posada.engine.common.files import open_file
from posada.engine.common.running import current, write_running
from posada.engine.kvm import net
from posada.engine.kvm.config import Shape, disk_config
from posada.engine.kvm.control import Session, connect
from posada.engine.kvm.machine import require_alive
from posada.errors import EngineGone, Unsupported
from posada.model.records import PortRecord, Running
from posada.proto.monitor import Op
from posada.runtime.files import identity

#: Seconds for a guest to let go of a disk.
UNPLUG_TIMEOUT = 20.0
#: Seconds for copying layers that are small beside what was written.
MERGE_TIMEOUT = 600.0


async def attach_disk(running: Running, disk: DiskFile) -> None:
    running = current(running)
    shape = Shape.from_private(running.private).with_disk(disk.name)
    with contextlib.ExitStack() as stack:
        fds: list[int] = []

        def give(role: str) -> int:
            index, access = role.split(":")[2:]
            fds.append(open_file(disk.chain[int(index)][0], writable=access == "rw"))
            stack.callback(os.close, fds[-1])
            return len(fds) - 1

        document = dataclasses.asdict(disk_config(disk, give, shape.inserted[disk.name]))
        async with session_of(running) as session:
            await session.call(Op.ATTACH, {"disk": document}, fds=fds)
    _store(running, shape)


async def detach_disk(running: Running, name: str) -> None:
    running = current(running)
    shape = Shape.from_private(running.private)
    if name not in shape.inserted:
        hint = "stop the machine first; only disks that were attached while it ran can be detached"
        raise Unsupported("kvm", f"detaching disk {name!r}, which was there when the machine started", hint=hint)
    async with session_of(running) as session:
        args = {"name": name, "timeout": UNPLUG_TIMEOUT}
        await session.call(Op.DETACH, args, timeout=UNPLUG_TIMEOUT + 10)
    _store(running, shape.without_disk(name))


def _store(running: Running, shape: Shape) -> None:
    private = {**running.private, **shape.to_private()}
    write_running(Path(running.runtime), msgspec.structs.replace(running, private=private))


async def resize_disk(running: Running, name: str, size: int) -> None:
    async with session_of(running) as session:
        await session.call(Op.RESIZE_DISK, {"name": name, "size": size}, timeout=60)


async def merge(running: Running, disk: DiskFile, keep: int) -> tuple[int, ...]:
    files = []
    for path, format in disk.chain:
        device, inode = identity(path)
        files.append({"device": device, "inode": inode, "name": str(path), "format": format})
    async with session_of(running) as session:
        answer = await session.call(Op.MERGE, {"name": disk.name, "files": files, "keep": keep}, timeout=MERGE_TIMEOUT)
    try:
        kept = msgspec.convert(answer["kept"], tuple[int, ...])
    except (KeyError, msgspec.ValidationError) as error:
        raise EngineGone("the monitor speaks nonsense", detail=str(error)) from None
    if not kept or any(not 0 <= place < len(disk.chain) - 1 for place in kept) or list(kept) != sorted(set(kept)):
        raise EngineGone(f"the monitor speaks nonsense: it stands on layers {kept}")
    return kept


async def set_memory(running: Running, size: int) -> None:
    async with session_of(running) as session:
        await session.call(Op.SET_MEMORY, {"size": size})


async def add_port(running: Running, port: PortRecord) -> PortRecord:
    return (await _forward(running, lambda before: [*before, port]))[-1]


async def remove_port(running: Running, port: PortRecord) -> None:
    await _forward(running, lambda before: [known for known in before if known != port])


async def _forward(
    running: Running, change: Callable[[Sequence[PortRecord]], Sequence[PortRecord]]
) -> Sequence[PortRecord]:
    """Forward other ports than before."""
    running = current(running)
    async with session_of(running) as session:

        async def give(fd: int | None) -> None:
            if fd is None:
                await session.call(Op.NIC, {"index": 0})
            else:
                await session.call(Op.NIC, {"index": 0, "fd": 0}, fds=[fd])

        mac = (running.private.get("macs") or [""])[0]
        if not mac:
            raise Unsupported("kvm", "forwarded ports of a machine without network", hint="leave nics out of the spec")
        ports = await net.change(Path(running.runtime), mac, running.ports, change(running.ports), give)
    write_running(Path(running.runtime), msgspec.structs.replace(running, ports=ports))
    return ports


async def inspect(running: Running, *, registers: bool) -> Inspection:
    async with session_of(running) as session:
        info = await session.call(Op.INFO)
        metrics = await session.call(Op.METRICS)
        seen = await session.call(Op.REGISTERS) if registers else {"vcpus": []}
    try:
        return msgspec.convert(
            {
                "registers": seen["vcpus"],
                "exits": metrics["exits"],
                "devices": metrics["devices"],
                "jail": info["jail"],
                "notes": info["notes"],
            },
            Inspection,
        )
    except (KeyError, msgspec.ValidationError) as error:
        raise EngineGone("the monitor speaks nonsense", detail=str(error)) from None


async def debug(running: Running, listener: int) -> None:
    async with session_of(running) as session:
        await session.call(Op.DEBUG, {"listener": 0}, fds=[listener])


@contextlib.asynccontextmanager
async def session_of(running: Running) -> AsyncIterator[Session]:
    """A session with a machine that is known to be alive. Raises EngineGone."""
    require_alive(running)
    async with connect(Path(running.runtime)) as session:
        yield session
