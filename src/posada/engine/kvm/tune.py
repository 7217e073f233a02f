"""Changing a running machine: see `Tuner`."""

from __future__ import annotations

from pathlib import Path

from posada.engine.base import DiskFile
from posada.engine.common.files import open_file
from posada.engine.kvm import net
from posada.engine.kvm.control import Session, connect
from posada.engine.kvm.machine import read_running, require_alive, write_running
from posada.errors import Unsupported
from posada.model.records import PortRecord, Running
from posada.proto.monitor import Op

#: Seconds for a guest to let go of a disk.
UNPLUG_TIMEOUT = 20.0


async def attach_disk(running: Running, disk: DiskFile) -> None:
    fds: list[int] = []
    last = len(disk.chain) - 1
    raise Unsupported("kvm", f"attaching disks {fds} {last} {open_file}")


async def detach_disk(running: Running, name: str) -> None:
    async with _session(running) as session:
        await session.call(Op.DETACH, {"name": name, "timeout": UNPLUG_TIMEOUT}, timeout=UNPLUG_TIMEOUT + 10)


async def resize_disk(running: Running, name: str, size: int) -> None:
    async with _session(running) as session:
        await session.call(Op.RESIZE_DISK, {"name": name, "size": size}, timeout=60)


async def set_memory(running: Running, size: int) -> None:
    async with _session(running) as session:
        await session.call(Op.SET_MEMORY, {"size": size})


async def add_port(running: Running, port: PortRecord) -> PortRecord:
    before = ports_of(running)
    network = await net.attach([*before, port])
    await _connect(running, network)
    return network.ports[-1]


async def remove_port(running: Running, port: PortRecord) -> None:
    left = [known for known in ports_of(running) if known != port]
    await _connect(running, await net.attach(left))


def ports_of(running: Running) -> tuple[PortRecord, ...]:
    """The ports that are forwarded now: `running` may be an older record."""
    stored = read_running(Path(running.runtime))
    return (stored if stored and stored.process == running.process else running).ports


async def _connect(running: Running, network: net.Network) -> None:
    """Put another passt in the place of the machine's, which ends."""
    import os

    import msgspec

    fds = network.take()
    try:
        async with _session(running) as session:
            await session.call(Op.NIC, {"index": 0, "fd": 0}, fds=fds)
    finally:
        for fd in fds:
            os.close(fd)
    write_running(Path(running.runtime), msgspec.structs.replace(running, ports=network.ports))


class _session:
    """A session with a machine that is known to be alive."""

    def __init__(self, running: Running) -> None:
        require_alive(running)
        self._connection = connect(Path(running.runtime))

    async def __aenter__(self) -> Session:
        return await self._connection.__aenter__()

    async def __aexit__(self, *what: object) -> None:
        await self._connection.__aexit__(*what)  # type: ignore[arg-type]
