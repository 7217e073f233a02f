"""The parts of a fake machine: its process, its disk in a layer, its console, its ports."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posada.engine.base import DiskFile, Launch
from posada.errors import EngineError, HostError
from posada.guest.fake_agent import FakeGuest
from posada.model.records import PortRecord, Process
from posada.model.units import MIB

CHANNELS = 4
_PAYLOAD = struct.Struct(">8sQ")
_MAGIC, _PAYLOAD_AT = b"FAKETREE", 1 * MIB
#: What of a guest's tree is memory, and does not survive a power off.
_MEMORY = ("run", "dev/shm")


@dataclass
class Machine:
    """One machine that this process runs."""

    launch: Launch
    body: subprocess.Popen[bytes]
    guest: FakeGuest
    console: asyncio.Server
    active: dict[str, int]
    """Each writable disk's top layer, open: its file may be renamed while the machine runs."""
    paused: bool = False
    ports: dict[PortRecord, socket.socket] = field(default_factory=dict)


async def dismantle(machine: Machine) -> None:
    """Process, sockets and ports of a machine are gone when this returns."""
    end(machine.body)
    machine.console.close()
    for listener in machine.ports.values():
        listener.close()
    while machine.active:
        os.close(machine.active.popitem()[1])
    await machine.guest.close()


def guest_state(guest: FakeGuest) -> dict[str, Any]:
    """What a guest's memory holds besides its tree."""
    return {
        "hostname": guest.hostname,
        "machine_id": guest.machine_id,
        "generation": guest.generation,
        "boot_id": guest.boot_id,
        "token": guest.token,
    }


def channels(runtime: Path) -> tuple[Path, ...]:
    return tuple(runtime / f"agent{i}.sock" for i in range(CHANNELS))


def clear(tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)


def say(launch: Launch, text: str) -> None:
    with open(launch.log, "a", encoding="utf-8") as file:
        file.write(text)


def console_server(log: Path) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What was said so far, then whatever is typed comes back."""
        with contextlib.suppress(OSError):
            writer.write(log.read_bytes())
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        writer.close()

    return serve


def bind(port: PortRecord) -> tuple[PortRecord, socket.socket]:
    """Take the host's port (0: any free one). Raises HostError."""
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    listener = socket.socket(socket.AF_INET, kind)
    try:
        listener.bind((port.address, port.host))
        if kind == socket.SOCK_STREAM:
            listener.listen(1)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot forward {port.address}:{port.host}: {error.strerror}", hint="choose another"
        ) from error
    return PortRecord(port.guest, listener.getsockname()[1], port.address, port.protocol), listener


def spawn_body(runtime: Path) -> subprocess.Popen[bytes]:
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
    process = process_of(body.pid)
    (runtime / "body.json").write_text(json.dumps([body.pid, process.start if process else 0]), "utf-8")
    with contextlib.suppress(BrokenPipeError):
        if body.stdin is not None:
            body.stdin.write(b"go\n")
            body.stdin.close()
    return body


def end(body: subprocess.Popen[bytes]) -> None:
    if body.poll() is None:
        body.kill()
        body.wait()


def process_of(pid: int) -> Process | None:
    """By /proc, as the contract wants it: pid and start time; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else Process(pid, int(fields[19]))


async def gone(process: Process) -> None:
    """Wait until it has ended; it need not be a child of this process."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process_of(process.pid) != process:
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


def files_of(tree: Path) -> Iterator[Path]:
    return (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def tree_size(tree: Path) -> int:
    return sum(path.stat().st_size for path in files_of(tree))


def save_disk(launch: Launch, active: dict[str, int]) -> None:
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


def load_disk(disk: DiskFile, tree: Path) -> None:
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
            tar.extraction_filter = lambda member, _path: member  # as filter="fully_trusted", which 3.11.4 brought
            tar.extractall(tree)
        return
