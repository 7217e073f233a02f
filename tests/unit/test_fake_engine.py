"""The fake engine as the contract's reference: what each method leaves behind, also when it fails."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from host_kit import machines_of, place

from posada.engine.base import CaptureFailed, DiskFile, Engine, Launch, NewLayer, SnapshotFiles
from posada.engine.fake import FakeEngine
from posada.errors import EngineError, HostError, Timeout
from posada.guest.client import GuestClient
from posada.model.machine import make_spec
from posada.model.records import PortRecord, Running
from posada.storage import qcow2

__all__ = ["place"]

ENGINE: type[Engine] = FakeEngine
"""mypy: it is one."""


class Stand:
    """An engine and what its machines stand on."""

    def __init__(self, place: Path) -> None:
        self.engine = FakeEngine()
        self.place = place
        self.running: list[Running] = []

    def layer(self, name: str) -> Path:
        path = self.place / name
        if not path.exists():
            qcow2.create_empty(path, size=16 << 20)
        return path

    def launch(self, name: str, *chain: str, **fields: object) -> Launch:
        runtime = self.place / "run" / name
        runtime.mkdir(parents=True, exist_ok=True)
        files = tuple((self.layer(layer), "qcow2") for layer in chain)
        return Launch(
            uuid=name,
            name=name,
            spec=make_spec({"image": "x", "memory": "64MiB", **fields}),
            runtime=runtime,
            log=self.place / f"{name}.log",
            disks=(DiskFile(name="root", size=16 << 20, chain=files),) if chain else (),
            agent=True,
        )

    async def start(self, name: str, *chain: str, **fields: object) -> Running:
        self.running.append(await self.engine.start(self.launch(name, *chain, **fields)))
        return self.running[-1]

    async def guest(self, running: Running) -> GuestClient:
        return await GuestClient.connect(self.engine.agent_channels(running), timeout=5)


@pytest.fixture
async def stand(place: Path) -> AsyncIterator[Stand]:
    stand = Stand(place)
    yield stand
    for folder in {*(place / "run").glob("*"), *(Path(running.runtime) for running in stand.running)}:
        await stand.engine.abandon(folder)
    assert machines_of(place) == []


async def test_start_and_kill(stand: Stand) -> None:
    running = await stand.start("a", "base")
    assert stand.engine.status(running).alive
    with pytest.raises(Timeout):
        await stand.engine.wait(running, 0.01)
    await stand.engine.kill(running)
    status = stand.engine.status(running)
    assert (status.alive, status.ended, status.crashed) == (False, "killed", False)
    assert await stand.engine.wait(running) == status
    await stand.engine.kill(running)  # idempotent
    stand.engine.reap(Path(running.runtime))
    stand.engine.reap(Path(running.runtime))
    assert not Path(running.runtime).exists()


async def test_a_start_that_fails_leaves_nothing(stand: Stand) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(HostError):
            await stand.start("a", "base", ports=[{"guest": 80, "host": taken.getsockname()[1]}])
    assert machines_of(stand.place) == []
    assert not list((stand.place / "run/a").glob("*.sock"))


async def test_power_off_by_the_guest_and_by_acpi(stand: Stand) -> None:
    for ask in ("agent", "acpi"):
        running = await stand.start(ask, "base")
        if ask == "agent":
            async with await stand.guest(running) as guest:
                await guest.call("poweroff")
        else:
            await stand.engine.powerdown(running)
        assert (await stand.engine.wait(running, 5)).ended == "guest powered off"


async def test_a_machine_killed_from_outside_has_crashed(stand: Stand) -> None:
    running = await stand.start("a")
    os.kill(running.process.pid, signal.SIGKILL)
    status = await stand.engine.wait(running, 5)
    assert status.crashed and status.ended == "killed by signal 9"


async def test_abandon_finds_what_nobody_recorded(stand: Stand) -> None:
    running = await stand.start("a")
    other = FakeEngine()  # as another process would see it
    assert other.status(running).alive
    await other.abandon(Path(running.runtime))
    await stand.engine.wait(running, 5)
    assert not Path(running.runtime).exists()
    await other.abandon(Path(running.runtime))


async def test_disks_outlive_a_power_off_and_memory_does_not(stand: Stand) -> None:
    for run in range(2):
        running = await stand.start("a", "base", "top")
        async with await stand.guest(running) as guest:
            if run == 0:
                for path in ("/etc/note", "/dev/shm/note", "/run/note"):
                    await guest.write_file(path, "x", mkdir=True)
            else:
                assert await guest.read_file("/etc/note") == b"x"
                for path in ("/dev/shm/note", "/run/note"):
                    with pytest.raises(Exception, match=r"(?i)no such file"):
                        await guest.read_file(path)
        await stand.engine.kill(running)


async def test_capture_restore_and_fork(stand: Stand) -> None:
    running = await stand.start("a", "base", "a1")
    async with await stand.guest(running) as guest:
        await guest.write_file("/dev/shm/note", "then", mkdir=True)
        folder = stand.place / "snapshot"
        folder.mkdir()
        capture = await stand.engine.capture(running, folder, [NewLayer(disk="root", path=stand.layer("a2"))])
        assert capture.memory_bytes > 0
        await guest.write_file("/dev/shm/note", "later")
        forked = await stand.engine.fork(
            running,
            [stand.launch(name, "base", "a1", "a2", name) for name in ("b", "c")],
            [NewLayer(disk="root", path=stand.layer("a3"))],
        )
        assert await guest.read_file("/dev/shm/note") == b"later", "the source's connection survives"
    (restored,) = await stand.engine.restore(
        [stand.launch("d", "base", "a1", "d1")],
        SnapshotFiles(path=folder, memory=64 << 20, private=capture.private),
    )
    for child, text in ((forked.children[0], b"later"), (forked.children[1], b"later"), (restored, b"then")):
        assert isinstance(child, Running)
        async with await stand.guest(child) as guest:
            assert await guest.read_file("/dev/shm/note") == text


async def test_failures_on_demand(stand: Stand) -> None:
    running = await stand.start("a", "base")
    stand.engine.fail["capture"] = EngineError("no")
    folder = stand.place / "snapshot"
    folder.mkdir()
    with pytest.raises(CaptureFailed) as failed:
        await stand.engine.capture(running, folder, [NewLayer(disk="root", path=stand.layer("a2"))])
    assert failed.value.switched == () and isinstance(failed.value.__cause__, EngineError)
    stand.engine.fail["child c"] = EngineError("no room")
    forked = await stand.engine.fork(
        running, [stand.launch("b"), stand.launch("c")], [NewLayer(disk="root", path=stand.layer("a2"))]
    )
    assert isinstance(forked.children[0], Running) and isinstance(forked.children[1], EngineError)


async def test_ports(stand: Stand) -> None:
    running = await stand.start("a", ports=[80])
    assert running.ports[0].host > 0
    added = await stand.engine.add_port(running, PortRecord(81, 0, "127.0.0.1", "tcp"))
    with pytest.raises(HostError):
        await stand.engine.add_port(running, PortRecord(82, added.host, "127.0.0.1", "tcp"))
    await stand.engine.remove_port(running, added)
    again = await stand.engine.add_port(running, added)
    assert again == added


async def test_the_console_gives_what_was_said_to_everybody(stand: Stand) -> None:
    running = await stand.start("a")
    for _ in range(2):
        reader, writer = await asyncio.open_unix_connection(stand.engine.console(running))
        assert b"a booted" in await reader.readline()
        writer.write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        writer.close()
        await writer.wait_closed()
