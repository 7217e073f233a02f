"""The fake engine: the contract's semantics without a hypervisor, for tests and as its reference.

A fake machine is a real process that does nothing (so that liveness, kill, adoption and leaks are real) plus, inside
the process that started it, a fake agent over a directory: the *tree*, which is the guest's memory and disks in one.
What of the tree is disk (all but ``/run`` and ``/dev/shm``) is written into the active layer of the root disk whenever
that layer is frozen or the machine ends, as a tar behind the qcow2 structures; a machine boots from the topmost layer
of its chain that has one. So chains, snapshots and forks mean here what they mean with real disks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from posada.engine.base import (
    Capture,
    CaptureFailed,
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
from posada.engine.fake_machine import (
    Machine,
    bind,
    channels,
    clear,
    console_server,
    dismantle,
    end,
    gone,
    guest_state,
    load_disk,
    process_of,
    save_disk,
    say,
    spawn_body,
    tree_size,
)
from posada.errors import EngineGone, PosadaError, Timeout, Unsupported
from posada.guest.fake_agent import FakeGuest
from posada.model.capabilities import Capabilities, Feature, Verdict
from posada.model.records import PortRecord, Process, Running
from posada.model.units import GIB

_CANNOT = (Feature.AARCH64, Feature.DEBUG)


class FakeEngine:
    """See the top of this file. ``fail`` maps the name of a method to the error that it raises next (tests)."""

    name = "fake"

    def __init__(self) -> None:
        self._machines: dict[str, Machine] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self.fail: dict[str, PosadaError] = {}

    def probe(self) -> Probe:
        return Probe(engine=self.name, ok=True, detail="pretends to run machines, for tests")

    def capabilities(self) -> Capabilities:
        return Capabilities(
            engine=self.name,
            accelerator="fake",
            version="1",
            features={feature: Verdict(ok=True) for feature in Feature if feature not in _CANNOT},
            max_cpus=64,
            max_memory=64 * GIB,
        )

    # Runner

    async def start(self, launch: Launch) -> Running:
        self._maybe_fail("start")
        tree = launch.runtime / "tree"
        clear(tree)
        tree.mkdir()
        if launch.disks:
            load_disk(launch.disks[0], tree)
        return await self._run(launch, "booted", {})

    async def _run(self, launch: Launch, how: str, guest_state: dict[str, Any], paused: bool = False) -> Running:
        """Bring a machine up over the tree in its runtime directory. Nothing is left of it on failure."""
        for name in ("exit.json", "paused", "kept", "owner-gone"):
            (launch.runtime / name).unlink(missing_ok=True)
        async with contextlib.AsyncExitStack() as undo:
            ports: dict[PortRecord, socket.socket] = {}
            for port in launch.spec.ports:
                bound, listener = bind(PortRecord(port.guest, port.host or 0, port.address, port.protocol))
                undo.callback(listener.close)
                ports[bound] = listener
            body = spawn_body(launch.runtime)
            undo.callback(end, body)
            say(launch, f"{launch.name} {how}: {launch.append}\n")
            console = await asyncio.start_unix_server(console_server(launch.log), launch.runtime / "console.sock")
            undo.callback(console.close)
            guest = FakeGuest(launch.runtime / "tree", on_power=lambda _: self._power_off(launch.uuid))
            for key, value in guest_state.items():
                setattr(guest, key, value)
            undo.push_async_callback(guest.close)
            if launch.agent:
                await guest.serve(channels(launch.runtime))
            active: dict[str, int] = {}
            for disk in launch.disks:
                if not disk.readonly:
                    active[disk.name] = os.open(disk.chain[-1][0], os.O_RDWR | os.O_CLOEXEC)
                    undo.callback(os.close, active[disk.name])
            process = process_of(body.pid)
            if process is None:
                raise EngineGone("the fake machine died at once")
            undo.pop_all()
        machine = Machine(launch, body, guest, console, active, ports=ports)
        self._machines[launch.uuid] = machine
        running = Running(
            engine=self.name,
            process=process,
            accelerator="fake",
            started=time.time(),
            runtime=str(launch.runtime),
            ports=tuple(ports),
            private={"uuid": launch.uuid},
        )
        if paused:
            await self.pause(running)
        return running

    def status(self, running: Running) -> Status:
        runtime = Path(running.runtime)
        machine = self._machines.get(running.private["uuid"])
        if machine is not None and machine.body.pid == running.process.pid:
            machine.body.poll()  # takes the exit status, lest it stays a zombie
        if process_of(running.process.pid) == running.process:
            return Status(alive=True, paused=(runtime / "paused").exists())
        try:
            return Status(alive=False, **json.loads((runtime / "exit.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return Status(alive=False, ended="killed by signal 9", crashed=True)

    async def wait(self, running: Running, timeout: float | None = None) -> Status:
        try:
            async with asyncio.timeout(timeout):
                await gone(running.process)
        except TimeoutError:
            raise Timeout(f"the machine still runs after {timeout:g} s") from None
        return self.status(running)

    async def pause(self, running: Running) -> None:
        (Path(running.runtime) / "paused").touch()
        self._mine(running).paused = True

    async def resume(self, running: Running) -> None:
        (Path(running.runtime) / "paused").unlink(missing_ok=True)
        machine = self._machines.get(running.private["uuid"])
        if machine is not None:
            machine.paused = False

    async def powerdown(self, running: Running) -> None:
        machine = self._mine(running)
        if not machine.paused:
            self._power_off(machine.launch.uuid)

    def _power_off(self, uuid: str) -> None:
        machine = self._machines.get(uuid)
        if machine is not None:
            self._soon(self._finish(machine, "guest powered off"))

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def kill(self, running: Running) -> None:
        machine = self._machines.get(running.private["uuid"])
        if machine is not None and machine.body.pid == running.process.pid:
            await self._finish(machine, "killed")
        elif process_of(running.process.pid) == running.process:
            os.kill(running.process.pid, signal.SIGKILL)
        await gone(running.process)

    async def _finish(self, machine: Machine, ended: str) -> None:
        """The end of a machine, in this process: its disk is written, its process goes, its sockets close."""
        if self._machines.pop(machine.launch.uuid, None) is None:
            return
        if machine.body.poll() is None:
            save_disk(machine.launch, machine.active)
            record = {"ended": ended, "crashed": False}
            (machine.launch.runtime / "exit.json").write_text(json.dumps(record), "utf-8")
        await dismantle(machine)

    def reap(self, launch_runtime: Path) -> None:
        machine = self._machines.pop(launch_runtime.name, None)
        if machine is not None:  # it was killed from outside
            self._soon(dismantle(machine))
        shutil.rmtree(launch_runtime, ignore_errors=True)

    async def abandon(self, launch_runtime: Path) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            pid, start = json.loads((launch_runtime / "body.json").read_bytes())
            if process_of(pid) == Process(pid, start):
                os.kill(pid, signal.SIGKILL)
                await gone(Process(pid, start))
        machine = self._machines.pop(launch_runtime.name, None)
        if machine is not None:
            await dismantle(machine)
        self.reap(launch_runtime)

    async def disown(self, running: Running) -> None:
        (Path(running.runtime) / "kept").touch()

    def agent_channels(self, running: Running) -> Sequence[Path]:
        return channels(Path(running.runtime))

    def console(self, running: Running) -> Path:
        return Path(running.runtime) / "console.sock"

    def usage(self, running: Running) -> Usage:
        if process_of(running.process.pid) != running.process:
            return Usage(cpu_seconds=0.0, rss=0)
        pages = int(Path(f"/proc/{running.process.pid}/statm").read_text("ascii").split()[1])
        return Usage(cpu_seconds=0.0, rss=pages * os.sysconf("SC_PAGESIZE"))

    # Inspector

    async def inspect(self, running: Running, *, registers: bool = False) -> Inspection:
        self._mine(running)
        return Inspection(
            registers=("rip 0000000000000000",) if registers else (),
            exits=({"HLT": 1},),
            devices={"disk:root": {"reads": 0}},
            jail=("nothing",),
        )

    async def debug(self, running: Running, listener: int) -> None:
        raise Unsupported(self.name, str(Feature.DEBUG), hint="there is no guest to debug")

    # Capturer

    async def capture(self, running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
        machine = self._mine(running)
        began = time.monotonic()
        try:
            self._maybe_fail("capture")
            shutil.copytree(machine.launch.runtime / "tree", target / "tree", symlinks=True)
            state = guest_state(machine.guest)
            state["token"] = (state["token"] or b"").hex()
            (target / "guest.json").write_text(json.dumps(state), "utf-8")
        except (OSError, PosadaError) as error:
            raise CaptureFailed(str(error), switched=()) from error
        self._switch(machine, layers)
        return Capture(
            pause=time.monotonic() - began,
            memory_bytes=tree_size(target / "tree"),
            private={"engine": "fake"},
        )

    async def switch(self, running: Running, layers: Sequence[NewLayer]) -> float:
        began = time.monotonic()
        try:
            self._maybe_fail("switch")
        except PosadaError as error:
            raise CaptureFailed(str(error), switched=()) from error
        self._switch(self._mine(running), layers)
        return time.monotonic() - began

    def _switch(self, machine: Machine, layers: Sequence[NewLayer]) -> None:
        save_disk(machine.launch, machine.active)
        for layer in layers:
            os.close(machine.active[layer.disk])
            machine.active[layer.disk] = os.open(layer.path, os.O_RDWR | os.O_CLOEXEC)

    async def restore(
        self, launches: Sequence[Launch], snapshot: SnapshotFiles, *, paused: bool = False
    ) -> Sequence[Running | Exception]:
        state = json.loads((snapshot.path / "guest.json").read_bytes())
        state["token"] = bytes.fromhex(state["token"]) or None
        return [await self._copy(launch, snapshot.path / "tree", state, paused) for launch in launches]

    async def fork(self, running: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> Forked:
        machine = self._mine(running)
        began = time.monotonic()
        try:
            self._maybe_fail("fork")
        except PosadaError as error:
            raise CaptureFailed(str(error), switched=()) from error
        self._switch(machine, layers)
        tree = machine.launch.runtime / "tree"
        state = guest_state(machine.guest)
        made = [await self._copy(child, tree, state, False) for child in children]
        return Forked(children=tuple(made), pause=time.monotonic() - began)

    async def merge(self, running: Running, disk: DiskFile, keep: int) -> tuple[int, ...]:
        self._maybe_fail("merge")
        machine = self._mine(running)
        save_disk(machine.launch, machine.active)  # the top layer holds the whole tree
        return tuple(range(keep))

    async def _copy(self, launch: Launch, tree: Path, state: dict[str, Any], paused: bool) -> Running | Exception:
        try:
            self._maybe_fail(f"child {launch.name}")
            own = launch.runtime / "tree"
            clear(own)
            shutil.copytree(tree, own, symlinks=True)
            return await self._run(launch, "forked", state, paused)
        except (OSError, PosadaError) as error:
            return error

    # Tuner

    async def attach_disk(self, running: Running, disk: DiskFile) -> None:
        self._maybe_fail("attach_disk")
        machine = self._mine(running)
        if not disk.readonly:
            machine.active[disk.name] = os.open(disk.chain[-1][0], os.O_RDWR | os.O_CLOEXEC)

    async def detach_disk(self, running: Running, name: str) -> None:
        self._maybe_fail("detach_disk")
        fd = self._mine(running).active.pop(name, None)
        if fd is not None:
            os.close(fd)

    async def resize_disk(self, running: Running, name: str, size: int) -> None:
        self._maybe_fail("resize_disk")

    async def set_memory(self, running: Running, size: int) -> None:
        self._maybe_fail("set_memory")

    async def add_port(self, running: Running, port: PortRecord) -> PortRecord:
        machine = self._mine(running)
        bound, listener = bind(port)
        machine.ports[bound] = listener
        return bound

    async def remove_port(self, running: Running, port: PortRecord) -> None:
        listener = self._mine(running).ports.pop(port, None)
        if listener is not None:
            listener.close()

    # details

    def _mine(self, running: Running) -> Machine:
        """The machine, if this process runs it. A fake machine whose maker died can only be looked at and killed."""
        machine = self._machines.get(running.private["uuid"])
        if machine is None or machine.body.poll() is not None:
            raise EngineGone("the fake machine is not run by this process")
        return machine

    def _maybe_fail(self, what: str) -> None:
        error = self.fail.pop(what, None)
        if error is not None:
            raise error
