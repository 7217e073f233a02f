"""The qemu engine: one jailed QEMU per machine, each beside its keeper. The contract is `posada.engine.base`."""

from __future__ import annotations

import contextlib
import signal
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
from posada.engine.common import process
from posada.engine.common.running import read_running
from posada.engine.common.usage import usage_of
from posada.engine.qemu import capture, cgroups, fork, machine, probe, tune
from posada.engine.qemu.files import clear
from posada.engine.qemu.layout import AGENT_PORTS, read_layout
from posada.engine.qemu.machine import NAME, Machine
from posada.engine.qemu.status import status_of
from posada.errors import HostError, Unsupported
from posada.model.capabilities import Capabilities, Feature, Verdict
from posada.model.machine import MAX_CPUS, MAX_MEMORY
from posada.model.records import PortRecord, Running

#: Seconds for a keeper to write the exit record after QEMU has ended; it takes 10 ms.
_KEEPER_GRACE = 5.0


class QemuEngine:
    """Implements `posada.engine.base.Engine`. ``paths_runtime`` is where the probe's answer is kept."""

    name = NAME

    def __init__(self, paths_runtime: Path | None = None) -> None:
        self._paths_runtime = paths_runtime
        self._facts: probe.Facts | None = None

    def facts(self) -> probe.Facts:
        """What was measured of this host. Raises HostError when there is no usable QEMU."""
        if self._facts is None:
            self._facts = probe.facts(self._paths_runtime)
        return self._facts

    def probe(self) -> Probe:
        try:
            facts = self.facts()
        except HostError as error:
            return Probe(engine=NAME, ok=False, detail=error.message, hint=error.hint)
        detail = f"QEMU {facts.version} with {facts.accelerator.upper()}; {facts.kvm}"
        values = {"version": facts.version, "accelerator": facts.accelerator, "kvm_rate": facts.kvm_rate}
        return Probe(engine=NAME, ok=True, detail=detail, facts=values | {"binary": facts.binary})

    def capabilities(self) -> Capabilities:
        facts = self.facts()
        yes = Verdict(True)
        denied = {
            Feature.UEFI: Verdict(False, hint="use firmware: direct or bios"),
            Feature.CLOUD_INIT: Verdict(False, hint="set the guest up through exec"),
            Feature.DEBUG: Verdict(False, hint="use the kvm engine"),
            Feature.FOLDERS: Verdict(False, hint="use the kvm engine, or copy what the guest needs: posada cp"),
            Feature.AARCH64: Verdict(False, hint="use arch: x86_64"),
        }
        if not facts.nested:
            hint = "load kvm_amd or kvm_intel with nested=1"
            denied[Feature.NESTED] = Verdict(False, "this host's KVM does not pass it on", hint=hint)
        return Capabilities(
            engine=NAME,
            accelerator=facts.accelerator,
            version=facts.version,
            features={feature: denied.get(feature, yes) for feature in Feature},
            max_cpus=MAX_CPUS,
            max_memory=MAX_MEMORY,
        )

    async def start(self, launch: Launch) -> Running:
        return await machine.start(launch, self.facts())

    def status(self, running: Running) -> Status:
        return status_of(running.process, Path(running.runtime))

    async def wait(self, running: Running, timeout: float | None = None) -> Status:
        await process.ended(running.process, timeout)
        if running.keeper is not None:
            with contextlib.suppress(TimeoutError):
                await process.ended(running.keeper, _KEEPER_GRACE)
        return self.status(running)

    async def pause(self, running: Running) -> None:
        handle = Machine(running)
        async with handle.session() as session:
            await session.execute("stop")
        (handle.runtime / "paused").touch(0o600)

    async def resume(self, running: Running) -> None:
        handle = Machine(running)
        async with handle.session() as session:
            await session.execute("cont")
        (handle.runtime / "paused").unlink(missing_ok=True)

    async def powerdown(self, running: Running) -> None:
        async with Machine(running).session() as session:
            await session.execute("system_powerdown")

    async def kill(self, running: Running) -> None:
        with contextlib.suppress(OSError):
            (Path(running.runtime) / "kill").touch(0o600)  # tells the keeper that this end was asked for
        process.send(running.process, signal.SIGKILL)
        await self.wait(running, timeout=30)

    async def inspect(self, running: Running, *, registers: bool = False) -> Inspection:
        return await tune.inspect(running, registers=registers)

    async def debug(self, running: Running, listener: int) -> None:
        raise Unsupported(NAME, str(Feature.DEBUG), hint="use the kvm engine")

    async def capture(self, running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
        return await capture.capture(running, target, layers)

    async def switch(self, running: Running, layers: Sequence[NewLayer]) -> float:
        return await capture.switch(running, layers)

    async def restore(
        self, launches: Sequence[Launch], snapshot: SnapshotFiles, *, paused: bool = False
    ) -> Sequence[Running | Exception]:
        return await fork.restore(launches, snapshot, self.facts(), paused=paused)

    async def fork(self, running: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> Forked:
        return await fork.fork(running, children, layers, self.facts())

    async def merge(self, running: Running, disk: DiskFile, keep: int) -> tuple[int, ...]:
        return await tune.merge(running, disk, keep)

    def reap(self, launch_runtime: Path) -> None:
        clear(launch_runtime)
        cgroups.remove(launch_runtime.name)

    async def abandon(self, launch_runtime: Path) -> None:
        running = read_running(launch_runtime)
        if running is not None:
            await self.kill(running)
        keeper = process.read_pid(launch_runtime / "keeper.pid")
        if keeper is not None and process.send(keeper, signal.SIGTERM):
            await process.ended(keeper, 30)
        self.reap(launch_runtime)

    async def disown(self, running: Running) -> None:
        (Path(running.runtime) / "disowned").touch(0o600)  # the keeper looks when the owner dies

    def agent_channels(self, running: Running) -> Sequence[Path]:
        ports = AGENT_PORTS if read_layout(running.private).agent else 0
        return [Path(running.runtime) / f"agent{i}.sock" for i in range(ports)]

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

    def console(self, running: Running) -> Path:
        return Path(running.runtime) / "console.sock"

    def usage(self, running: Running) -> Usage:
        return usage_of(running.process)
