"""The kvm engine: posada's own monitor, one jailed Python process per machine. The contract is `posada.engine.base`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from posada.engine.base import (
    Capture,
    DiskFile,
    Forked,
    Inspection,
    Launch,
    NewLayer,
    Probe,
    SnapshotFiles,
    Status,
    Usage,
)
from posada.engine.common import cgroups, process
from posada.engine.common.running import read_running
from posada.engine.common.usage import usage_of
from posada.engine.kvm import branch, machine, net, probe, stack, tune
from posada.engine.kvm.control import connect
from posada.engine.kvm.files import channels, clear
from posada.engine.kvm.machine import NAME
from posada.model.capabilities import Capabilities, Feature, Verdict
from posada.model.records import PortRecord, Running
from posada.proto.monitor import Op
from posada.vmm.config import MAX_CPUS
from posada.vmm.memory import MAX_SIZE


class KvmEngine:
    """Implements `posada.engine.base.Engine`. ``paths_runtime`` is where the probe's answer is kept."""

    name = NAME

    def __init__(self, paths_runtime: Path | None = None) -> None:
        self._paths_runtime = paths_runtime
        self._facts: probe.Facts | None = None

    def facts(self) -> probe.Facts:
        """What was measured of this host."""
        if self._facts is None:
            self._facts = probe.facts(self._paths_runtime)
        return self._facts

    def probe(self) -> Probe:
        facts = self.facts()
        detail = facts.words
        if probe.usable(facts) and probe.find_passt() is None:
            detail += "; passt is not installed: machines have no network"
        return Probe(
            engine=NAME,
            ok=probe.usable(facts),
            detail=detail,
            hint=probe.hint(facts),
            facts={"rate": facts.rate, "hardware": facts.useful, "passt": probe.find_passt()},
        )

    def capabilities(self) -> Capabilities:
        probe.require(self.facts())
        yes = Verdict(True)
        denied = {
            Feature.BIOS: Verdict(False, hint="use firmware: direct, or the qemu engine"),
            Feature.UEFI: Verdict(False, hint="use firmware: direct, or the qemu engine"),
            Feature.CLOUD_INIT: Verdict(False, hint="set the guest up through exec"),
            Feature.NESTED: Verdict(False, hint="use the qemu engine"),
            Feature.AARCH64: Verdict(False, hint="use arch: x86_64"),
        }
        if probe.find_passt() is None:
            missing = Verdict(False, "passt is not installed", "apt install passt, or nics: []")
            denied |= {Feature.USER_NETWORK: missing, Feature.PORTS: missing}
        return Capabilities(
            engine=NAME,
            accelerator="kvm",
            version="1",
            features={feature: denied.get(feature, yes) for feature in Feature},
            max_cpus=min(MAX_CPUS, 4 * (os.cpu_count() or 1)),
            max_memory=MAX_SIZE,
        )

    async def start(self, launch: Launch) -> Running:
        probe.require(self.facts())
        return await machine.start(launch)

    def status(self, running: Running) -> Status:
        return machine.status_of(running.process, Path(running.runtime))

    async def wait(self, running: Running, timeout: float | None = None) -> Status:
        await process.ended(running.process, timeout)
        return self.status(running)

    async def _ask(self, running: Running, op: Op) -> None:
        machine.require_alive(running)
        async with connect(Path(running.runtime)) as session:
            await session.call(op)

    async def pause(self, running: Running) -> None:
        await self._ask(running, Op.PAUSE)

    async def resume(self, running: Running) -> None:
        await self._ask(running, Op.RESUME)

    async def powerdown(self, running: Running) -> None:
        await self._ask(running, Op.POWERDOWN)

    async def disown(self, running: Running) -> None:
        await self._ask(running, Op.DISOWN)

    async def kill(self, running: Running) -> None:
        await machine.kill(running.process, Path(running.runtime))

    def reap(self, launch_runtime: Path) -> None:
        stack.reap(read_running(launch_runtime))
        net.leave(launch_runtime)
        clear(launch_runtime)
        cgroups.remove(launch_runtime.name)

    async def abandon(self, launch_runtime: Path) -> None:
        await machine.abandon(launch_runtime)
        self.reap(launch_runtime)

    def agent_channels(self, running: Running) -> Sequence[Path]:
        return channels(Path(running.runtime)) if running.private.get("agent") else []

    def console(self, running: Running) -> Path:
        return Path(running.runtime) / "console.sock"

    def usage(self, running: Running) -> Usage:
        return usage_of(running.process)

    async def inspect(self, running: Running, *, registers: bool = False) -> Inspection:
        return await tune.inspect(running, registers=registers)

    async def debug(self, running: Running, listener: int) -> None:
        await tune.debug(running, listener)

    async def capture(self, running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
        return await branch.capture(running, target, layers)

    async def switch(self, running: Running, layers: Sequence[NewLayer]) -> float:
        return await branch.switch(running, layers)

    async def restore(
        self, launches: Sequence[Launch], snapshot: SnapshotFiles, *, paused: bool = False
    ) -> Sequence[Running | Exception]:
        probe.require(self.facts())
        return await branch.restore(launches, snapshot, paused=paused)

    async def fork(self, running: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> Forked:
        return await branch.fork(running, children, layers)

    async def merge(self, running: Running, disk: DiskFile, keep: int) -> tuple[int, ...]:
        return await tune.merge(running, disk, keep)

    async def attach_disk(self, running: Running, disk: DiskFile) -> None:
        await tune.attach_disk(running, disk)

    async def detach_disk(self, running: Running, name: str) -> None:
        await tune.detach_disk(running, name)

    async def resize_disk(self, running: Running, name: str, size: int) -> None:
        await tune.resize_disk(running, name, size)

    async def set_memory(self, running: Running, size: int) -> None:
        await tune.set_memory(running, size)

    async def add_port(self, running: Running, port: PortRecord) -> PortRecord:
        return await tune.add_port(running, port)

    async def remove_port(self, running: Running, port: PortRecord) -> None:
        await tune.remove_port(running, port)
