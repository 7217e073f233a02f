"""Changing a running machine: see `Tuner`."""

from __future__ import annotations

from posada.engine.base import DiskFile, Inspection
from posada.engine.qemu import disks, merging, ports
from posada.engine.qemu.argv import device_blk
from posada.engine.qemu.machine import Machine
from posada.errors import EngineError, SpecError, Timeout
from posada.model.records import PortRecord, Running
from posada.model.units import format_size

#: Seconds for a guest to let go of a disk; Linux takes 0.1 s.
UNPLUG_TIMEOUT = 20.0


async def attach_disk(running: Running, disk: DiskFile) -> None:
    machine = Machine(running)
    layout = machine.layout.with_disk(disk.name)
    slot = layout.slot(disk.name)
    async with machine.session() as session:
        nodes = await disks.add_chain(session, disk, slot)
        try:
            await session.execute("device_add", **device_blk(disk.name, slot, nodes[-1]))
        except BaseException:
            await disks.remove_chain(session, nodes)
            raise
        machine.store_layout(layout)


async def detach_disk(running: Running, name: str) -> None:
    machine = Machine(running)
    layout = machine.layout
    slot = layout.slot(name)
    device = f"disk-{name}"
    async with machine.session() as session:
        await session.execute("device_del", id=device)
        try:
            while True:
                event = await session.next_event(
                    "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", timeout=UNPLUG_TIMEOUT
                )
                if event["data"].get("device") == device:
                    break
        except TimeoutError:
            hint = "unmount it in the guest and try again"
            raise Timeout(f"the guest has not let go of disk {name!r} within {UNPLUG_TIMEOUT:g} s", hint=hint) from None
        if event["event"] != "DEVICE_DELETED":
            raise EngineError(f"the guest refuses to let go of disk {name!r}")
        machine.store_layout(layout.without_disk(name))
        await disks.remove_disk_nodes(session, slot)
        await disks.close_unused(session)


async def merge(running: Running, disk: DiskFile, keep: int) -> tuple[int, ...]:
    async with Machine(running).session() as session:
        return await merging.merge(session, running.process.pid, disk, keep)


async def resize_disk(running: Running, name: str, size: int) -> None:
    async with Machine(running).session() as session:
        node = await disks.current_node(session, name)
        await session.execute("block_resize", timeout=60, node_name=node, size=size)


async def set_memory(running: Running, size: int) -> None:
    machine = Machine(running)
    most = machine.layout.memory
    if not 0 < size <= most:
        hint = f"it was started with {format_size(most)}; restart it with more"
        raise SpecError("memory", f"{format_size(size)} is out of the running machine's range", hint=hint)
    async with machine.session() as session:
        await session.execute("balloon", value=size)


async def add_port(running: Running, port: PortRecord) -> PortRecord:
    machine = Machine(running)
    if port.host:
        ports.probe(port.address, port.host, port.protocol)
    async with machine.session() as session:
        return await ports.add(session, port)


async def remove_port(running: Running, port: PortRecord) -> None:
    async with Machine(running).session() as session:
        await ports.remove(session, port)


async def inspect(running: Running, *, registers: bool) -> Inspection:
    """Registers as QEMU's human monitor prints them, and what it counts of disks."""
    async with Machine(running).session() as session:
        text = await session.human("info registers -a") if registers else ""
        stats = {}
        for entry in await session.execute("query-blockstats", query_nodes=False):
            name = str(entry.get("qdev", "")).split("/")[-2:-1]
            counted = {k: v for k, v in entry.get("stats", {}).items() if type(v) is int and v}
            if name:
                stats[name[0]] = counted
    each = text.replace("\r", "").split("\nCPU#")
    return Inspection(registers=tuple(part.strip() for part in each if part.strip()), devices=stats)
