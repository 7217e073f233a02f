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
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posada.engine.base import (
    Capture,
    CaptureFailed,
    DiskFile,
    Forked,
    Launch,
    NewLayer,
    Probe,
    SnapshotFiles,
    Status,
    Usage,
)
from posada.errors import EngineError, EngineGone, HostError, PosadaError, Timeout
from posada.guest.fake_agent import FakeGuest
from posada.model.capabilities import Capabilities, Feature, Verdict
from posada.model.machine import PortSpec
from posada.model.records import PortRecord, Process, Running
from posada.model.units import GIB, MIB

CHANNELS = 4
_PAYLOAD = struct.Struct(">8sQ")
_MAGIC, _PAYLOAD_AT = b"FAKETREE", 1 * MIB
#: What of a guest's tree is memory, and does not survive a power off.
_MEMORY = ("run", "dev/shm")


@dataclass
class _Machine:
    """One machine that this process runs."""

    launch: Launch
    body: subprocess.Popen[bytes]
    guest: FakeGuest
    console: asyncio.Server
    active: dict[str, int]
    """Each writable disk's top layer, open: its file may be renamed while the machine runs."""
    paused: bool = False
    ports: dict[PortRecord, socket.socket] = field(default_factory=dict)


class FakeEngine:
    """See the top of this file. ``fail`` maps the name of a method to the error that it raises next (tests)."""

    name = "fake"

    def __init__(self) -> None:
        self._machines: dict[str, _Machine] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self.fail: dict[str, PosadaError] = {}

    def probe(self) -> Probe:
        return Probe(engine=self.name, ok=True, detail="pretends to run machines, for tests")

    def capabilities(self) -> Capabilities:
        return Capabilities(
            engine=self.name,
            accelerator="fake",
            version="1",
            features={feature: Verdict(ok=True) for feature in Feature if feature is not Feature.AARCH64},
            max_cpus=64,
            max_memory=64 * GIB,
        )

    # Runner

    async def start(self, launch: Launch) -> Running:
        self._maybe_fail("start")
        tree = launch.runtime / "tree"
        _clear(tree)
        tree.mkdir()
        if launch.disks:
            _load_disk(launch.disks[0], tree)
        return await self._run(launch, "booted", {})

    async def _run(self, launch: Launch, how: str, guest_state: dict[str, Any], paused: bool = False) -> Running:
        """Bring a machine up over the tree in its runtime directory. Nothing is left of it on failure."""
        for name in ("exit.json", "paused", "kept", "owner-gone"):
            (launch.runtime / name).unlink(missing_ok=True)
        async with contextlib.AsyncExitStack() as undo:
            ports: dict[PortRecord, socket.socket] = {}
            for port in launch.spec.ports:
                bound, listener = _bind(port)
                undo.callback(listener.close)
                ports[bound] = listener
            body = _spawn_body(launch.runtime)
            undo.callback(_end, body)
            _log(launch, f"{launch.name} {how}: {launch.append}\n")
            console = await asyncio.start_unix_server(_console(launch.log), launch.runtime / "console.sock")
            undo.callback(console.close)
            guest = FakeGuest(launch.runtime / "tree", on_power=lambda _: self._power_off(launch.uuid))
            for key, value in guest_state.items():
                setattr(guest, key, value)
            undo.push_async_callback(guest.close)
            if launch.agent:
                await guest.serve(_channels(launch.runtime))
            active: dict[str, int] = {}
            for disk in launch.disks:
                if not disk.readonly:
                    active[disk.name] = os.open(disk.chain[-1][0], os.O_RDWR | os.O_CLOEXEC)
                    undo.callback(os.close, active[disk.name])
            process = _process(body.pid)
            if process is None:
                raise EngineGone("the fake machine died at once")
            undo.pop_all()
        machine = _Machine(launch, body, guest, console, active, ports=ports)
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
        if _process(running.process.pid) == running.process:
            return Status(alive=True, paused=(runtime / "paused").exists())
        try:
            return Status(alive=False, **json.loads((runtime / "exit.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return Status(alive=False, ended="killed by signal 9", crashed=True)

    async def wait(self, running: Running, timeout: float | None = None) -> Status:
        try:
            async with asyncio.timeout(timeout):
                await _gone(running.process)
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
        elif _process(running.process.pid) == running.process:
            os.kill(running.process.pid, signal.SIGKILL)
        await _gone(running.process)

    async def _finish(self, machine: _Machine, ended: str) -> None:
        """The end of a machine, in this process: its disk is written, its process goes, its sockets close."""
        if self._machines.pop(machine.launch.uuid, None) is None:
            return
        if machine.body.poll() is None:
            _save_disk(machine.launch, machine.active)
            record = {"ended": ended, "crashed": False}
            (machine.launch.runtime / "exit.json").write_text(json.dumps(record), "utf-8")
        await _dismantle(machine)

    def reap(self, launch_runtime: Path) -> None:
        machine = self._machines.pop(launch_runtime.name, None)
        if machine is not None:  # it was killed from outside
            self._soon(_dismantle(machine))
        shutil.rmtree(launch_runtime, ignore_errors=True)

    async def abandon(self, launch_runtime: Path) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            pid, start = json.loads((launch_runtime / "body.json").read_bytes())
            if _process(pid) == Process(pid, start):
                os.kill(pid, signal.SIGKILL)
                await _gone(Process(pid, start))
        machine = self._machines.pop(launch_runtime.name, None)
        if machine is not None:
            await _dismantle(machine)
        self.reap(launch_runtime)

    async def disown(self, running: Running) -> None:
        (Path(running.runtime) / "kept").touch()

    def agent_channels(self, running: Running) -> Sequence[Path]:
        return _channels(Path(running.runtime))

    def console(self, running: Running) -> Path:
        return Path(running.runtime) / "console.sock"

    def usage(self, running: Running) -> Usage:
        if _process(running.process.pid) != running.process:
            return Usage(cpu_seconds=0.0, rss=0)
        pages = int(Path(f"/proc/{running.process.pid}/statm").read_text("ascii").split()[1])
        return Usage(cpu_seconds=0.0, rss=pages * os.sysconf("SC_PAGESIZE"))

    # Capturer

    async def capture(self, running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
        machine = self._mine(running)
        began = time.monotonic()
        try:
            self._maybe_fail("capture")
            shutil.copytree(machine.launch.runtime / "tree", target / "tree", symlinks=True)
            state = _guest_state(machine.guest)
            state["token"] = (state["token"] or b"").hex()
            (target / "guest.json").write_text(json.dumps(state), "utf-8")
        except (OSError, PosadaError) as error:
            raise CaptureFailed(str(error), switched=()) from error
        self._switch(machine, layers)
        return Capture(
            pause=time.monotonic() - began,
            memory_bytes=_tree_size(target / "tree"),
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

    def _switch(self, machine: _Machine, layers: Sequence[NewLayer]) -> None:
        _save_disk(machine.launch, machine.active)
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
        state = _guest_state(machine.guest)
        made = [await self._copy(child, tree, state, False) for child in children]
        return Forked(children=tuple(made), pause=time.monotonic() - began)

    async def _copy(self, launch: Launch, tree: Path, state: dict[str, Any], paused: bool) -> Running | Exception:
        try:
            self._maybe_fail(f"child {launch.name}")
            own = launch.runtime / "tree"
            _clear(own)
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
        spec = PortSpec(guest=port.guest, host=port.host or None, address=port.address, protocol=_protocol(port))
        bound, listener = _bind(spec)
        machine.ports[bound] = listener
        return bound

    async def remove_port(self, running: Running, port: PortRecord) -> None:
        listener = self._mine(running).ports.pop(port, None)
        if listener is not None:
            listener.close()

    # details

    def _mine(self, running: Running) -> _Machine:
        """The machine, if this process runs it. A fake machine whose maker died can only be looked at and killed."""
        machine = self._machines.get(running.private["uuid"])
        if machine is None or machine.body.poll() is not None:
            raise EngineGone("the fake machine is not run by this process")
        return machine

    def _maybe_fail(self, what: str) -> None:
        error = self.fail.pop(what, None)
        if error is not None:
            raise error


async def _dismantle(machine: _Machine) -> None:
    """Process, sockets and ports of a machine are gone when this returns."""
    _end(machine.body)
    machine.console.close()
    for listener in machine.ports.values():
        listener.close()
    while machine.active:
        os.close(machine.active.popitem()[1])
    await machine.guest.close()


def _guest_state(guest: FakeGuest) -> dict[str, Any]:
    """What a guest's memory holds besides its tree."""
    return {
        "hostname": guest.hostname,
        "machine_id": guest.machine_id,
        "generation": guest.generation,
        "boot_id": guest.boot_id,
        "token": guest.token,
    }


def _channels(runtime: Path) -> tuple[Path, ...]:
    return tuple(runtime / f"agent{i}.sock" for i in range(CHANNELS))


def _protocol(port: PortRecord) -> Any:
    return port.protocol


def _clear(tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)


def _log(launch: Launch, text: str) -> None:
    with open(launch.log, "a", encoding="utf-8") as file:
        file.write(text)


def _console(log: Path) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What was said so far, then whatever is typed comes back."""
        with contextlib.suppress(OSError):
            writer.write(log.read_bytes())
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        writer.close()

    return serve


def _bind(port: PortSpec) -> tuple[PortRecord, socket.socket]:
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    listener = socket.socket(socket.AF_INET, kind)
    try:
        listener.bind((port.address, port.host or 0))
        if kind == socket.SOCK_STREAM:
            listener.listen(1)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot forward {port.address}:{port.host}: {error.strerror}", hint="choose another"
        ) from error
    return PortRecord(port.guest, listener.getsockname()[1], port.address, port.protocol), listener


def _spawn_body(runtime: Path) -> subprocess.Popen[bytes]:
    """The process that stands for the machine. It goes on living only once its pid is on record (see `abandon`)."""
    body = subprocess.Popen(
        ["/bin/sh", "-c", "read go && exec sleep infinity"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={"POSADA_FAKE_MACHINE": str(runtime)},  # by which tests find what is left
    )
    process = _process(body.pid)
    (runtime / "body.json").write_text(json.dumps([body.pid, process.start if process else 0]), "utf-8")
    with contextlib.suppress(BrokenPipeError):
        if body.stdin is not None:
            body.stdin.write(b"go\n")
            body.stdin.close()
    return body


def _end(body: subprocess.Popen[bytes]) -> None:
    if body.poll() is None:
        body.kill()
        body.wait()


def _process(pid: int) -> Process | None:
    """By /proc, as the contract wants it: pid and start time; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else Process(pid, int(fields[19]))


async def _gone(process: Process) -> None:
    """Wait until it has ended; it need not be a child of this process."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if _process(process.pid) != process:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
    finally:
        os.close(fd)


def _files(tree: Path) -> Iterator[Path]:
    return (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def _tree_size(tree: Path) -> int:
    return sum(path.stat().st_size for path in _files(tree))


def _save_disk(launch: Launch, active: dict[str, int]) -> None:
    """Write the disk part of the tree into the active layer of the root disk."""
    if not launch.disks or launch.disks[0].name not in active:
        return

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        memory = any(entry.name == m or entry.name.startswith(m + "/") for m in _MEMORY)
        return None if memory or not (entry.isreg() or entry.isdir() or entry.issym()) else entry

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted((launch.runtime / "tree").iterdir()):
            tar.add(path, arcname=path.name, filter=keep)
    data = buffer.getvalue()
    os.pwrite(active[launch.disks[0].name], _PAYLOAD.pack(_MAGIC, len(data)) + data, _PAYLOAD_AT)


def _load_disk(disk: DiskFile, tree: Path) -> None:
    """Unpack the topmost tree of the chain."""
    for path, _ in reversed(disk.chain):
        try:
            with open(path, "rb") as file:
                file.seek(_PAYLOAD_AT)
                head = file.read(_PAYLOAD.size)
                if len(head) < _PAYLOAD.size or head[:8] != _MAGIC:
                    continue
                data = file.read(_PAYLOAD.unpack(head)[1])
        except OSError as error:
            raise EngineError(f"cannot open disk {disk.name}", detail=str(error)) from error
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(tree, filter="fully_trusted")
        return
