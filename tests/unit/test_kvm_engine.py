"""The kvm engine with its real monitor in its real jail, on a toy guest. Slow where the host emulates it, and the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kvm_engine_kit import ME, NOWHERE, Console, Kit, count, needs_kvm, say

from posada.engine.base import CaptureFailed, DiskFile, Launch, NewLayer, SnapshotFiles
from posada.engine.common import process
from posada.engine.kvm import machine, probe, stack
from posada.engine.kvm.control import connect
from posada.engine.kvm.engine import KvmEngine
from posada.errors import EngineError, EngineGone, HostError, ImageError, Unsupported
from posada.model.capabilities import Feature
from posada.model.records import PortRecord, Process, Running
from posada.model.units import MIB
from posada.proto.monitor import Op
from posada.storage import qcow2

pytestmark = [needs_kvm, pytest.mark.timeout(120)]


class Inn(Kit):
    """Starts toys, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.engine = KvmEngine(folder / "probe")
        self.running: list[Running] = []
        self.launches: list[Launch] = []

    async def start(self, **spec: Any) -> Running:
        launch = self.launch(**spec)
        return await self.begin(launch)

    async def begin(self, launch: Launch) -> Running:
        self.launches.append(launch)
        self.running.append(await self.engine.start(launch))
        return self.running[-1]

    async def fork(self, source: Running, n: int = 1, layers: Sequence[NewLayer] = (), **spec: Any) -> list[Running]:
        children = [self.launch(**spec) for _ in range(n)]
        return await self.fork_to(source, children, layers)

    async def fork_to(self, source: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> list[Running]:
        self.launches += children
        forked = await self.engine.fork(source, children, layers)
        made = []
        for child in forked.children:
            if isinstance(child, Exception):
                raise child
            made.append(child)
        self.running += made
        return made

    async def close(self) -> None:
        for running in self.running:
            await self.engine.kill(running)
        for launch in self.launches:
            self.engine.reap(launch.runtime)


@pytest.fixture
async def inn(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Inn]:
    monkeypatch.setenv(probe.SLOW, "1")
    with tempfile.TemporaryDirectory(prefix="pk-") as folder:  # a short path: sockets are in it
        found = Inn(Path(folder))
        yield found
        await check(found)


async def check(found: Inn) -> None:
    await found.close()
    assert not [running for running in found.running if process.alive(running.process)]
    assert not [
        path for launch in found.launches for path in launch.runtime.iterdir() if "console.log" not in path.name
    ]


def runtime(running: Running) -> Path:
    return Path(running.runtime)


async def counted(running: Running, text: bytes = b"") -> int:
    return await count(runtime(running), text)


# life


async def test_a_life(inn: Inn) -> None:
    running = await inn.start()
    status = inn.engine.status(running)
    assert status.alive and not status.paused
    assert await counted(running, b"++") == 2
    await inn.engine.pause(running)
    await inn.engine.pause(running)
    assert inn.engine.status(running).paused
    await inn.engine.resume(running)
    await inn.engine.resume(running)
    assert not inn.engine.status(running).paused
    usage = inn.engine.usage(running)
    assert usage.rss > 0 and usage.cpu_seconds > 0
    console = await Console.open(runtime(running))
    console.type(b"q")
    status = await inn.engine.wait(running, 10)
    assert (status.alive, status.ended, status.crashed) == (False, "guest powered off", False)
    console.close()
    with pytest.raises(EngineGone, match="powered off"):
        await inn.engine.pause(running)


@pytest.mark.parametrize("typed", [b"r", b"!"])
async def test_how_it_ends(inn: Inn, typed: bytes) -> None:
    running = await inn.start()
    console = await Console.open(runtime(running))
    console.type(typed)
    status = await inn.engine.wait(running, 10)
    if not (status.crashed and typed == b"!"):  # a host that emulates may not know how to triple-fault
        assert (status.ended, status.crashed) == ("guest rebooted", False)
    else:
        assert status.ended is not None and "KVM gave up" in status.ended
    console.close()


async def test_the_report_of_what_kvm_gave_up_on_is_in_the_log(inn: Inn) -> None:
    running = await inn.start()
    console = await Console.open(runtime(running))
    console.type(b"^")
    status = await inn.engine.wait(running, 10)
    console.close()
    assert status.crashed and status.ended is not None and status.ended.startswith("KVM gave up: INTERNAL_ERROR")
    log = (runtime(running) / "console.log").read_text()
    assert log.startswith(f"toy\n\nposada: {status.ended}\n")
    assert f"rax {NOWHERE:016x}" in log
    assert f"code at {NOWHERE:#x}" in log


async def test_a_kill_that_was_asked_for_and_one_that_was_not(inn: Inn) -> None:
    first, second, third = await inn.start(), await inn.start(), await inn.start()
    await inn.engine.kill(first)
    await inn.engine.kill(first)
    assert inn.engine.status(first).ended == "killed" and not inn.engine.status(first).crashed
    process.send(second.process, signal.SIGKILL)
    status = await inn.engine.wait(second, 10)
    assert status.crashed and status.ended is not None and "signal 9" in status.ended
    process.send(third.process, signal.SIGSEGV)
    status = await inn.engine.wait(third, 10)
    assert status.crashed and status.ended == "its monitor crashed: Segmentation fault"


async def test_a_monitor_that_hangs_can_be_killed(inn: Inn) -> None:
    running = await inn.start()
    process.send(running.process, signal.SIGSTOP)
    await inn.engine.kill(running)
    assert not inn.engine.status(running).alive


async def test_sigterm_ends_it_in_order(inn: Inn) -> None:
    running = await inn.start()
    process.send(running.process, signal.SIGTERM)
    status = await inn.engine.wait(running, 10)
    assert (status.ended, status.crashed) == ("killed", False)


async def test_the_monitor_is_in_its_jail(inn: Inn) -> None:
    running = await inn.start()
    folder = Path(f"/proc/{running.process.pid}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    tasks = {path.name for path in (folder / "task").iterdir()}
    for task in tasks:
        assert "Seccomp:\t2" in (folder / "task" / task / "status").read_text()
    if os.geteuid() == 0:
        assert int(status["Uid"].split()[0]) >= 1_900_000_000
    async with connect(runtime(running)) as session:
        jail = (await session.call(Op.INFO))["jail"]
    assert "seccomp" in jail and "no capabilities" in jail
    if "mount" in jail:
        assert os.listdir(folder / "root") == []
    allowed = ("/dev/", str(inn.folder), "/memfd")
    assert not [path for path in opened(running) if path.startswith("/") and not path.startswith(allowed)]


# what ties it to its maker


async def test_without_a_commit_it_ends_with_its_starter(inn: Inn) -> None:
    program = f"""
import asyncio, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from kvm_engine_kit import Kit
from posada.engine.kvm import machine
from posada.engine.kvm.engine import KvmEngine
machine.write_running = lambda *_: os.kill(os.getpid(), 9)
launch = Kit(Path(sys.argv[1])).launch(owner=None)
print(launch.runtime, flush=True)
asyncio.run(KvmEngine(Path(sys.argv[1])).start(launch))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, str(inn.folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Path(done.stdout.strip())
    await inn.engine.abandon(left)
    assert machine.holder(left) is None
    assert not [path for path in left.iterdir() if "console.log" not in path.name]


async def test_recovery_finds_one_that_was_not_recorded(inn: Inn) -> None:
    running = await inn.start()
    (runtime(running) / "running.json").unlink()
    assert machine.holder(runtime(running)) == running.process
    await inn.engine.abandon(runtime(running))
    assert not process.alive(running.process)
    await inn.engine.abandon(runtime(running))


async def test_it_dies_with_its_owner_unless_disowned(inn: Inn) -> None:
    owner = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220
    mine = process.find(owner.pid)
    mortal, kept = await inn.start(owner=mine), await inn.start(owner=mine)
    await inn.engine.disown(kept)
    owner.kill()
    owner.wait()
    assert (await inn.engine.wait(mortal, 10)).ended == "its owner is gone"
    assert await counted(kept) == 0


async def test_an_owner_that_is_gone_already(inn: Inn) -> None:
    with pytest.raises(EngineError, match="gone"):
        await inn.start(owner=Process(os.getpid(), ME.start + 1))


async def test_deadlines(inn: Inn) -> None:
    short = await inn.start(limits={"lifetime": 0.2})
    paused = await inn.start(limits={"lifetime": 0.2, "action": "pause"})
    assert (await inn.engine.wait(short, 10)).ended == "its lifetime is over"
    async with asyncio.timeout(10):
        while not inn.engine.status(paused).paused:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
    await inn.engine.resume(paused)
    assert await counted(paused) == 0


async def test_a_start_that_fails_leaves_nothing(inn: Inn) -> None:
    inn.kernel.write_bytes(b"no kernel")
    with pytest.raises(ImageError):
        await inn.start()
    inn.kernel.unlink()
    with pytest.raises(HostError):
        await inn.start()
    for launch in inn.launches:
        assert machine.holder(launch.runtime) is None


async def test_a_cancelled_start_leaves_nothing(inn: Inn) -> None:
    launch = inn.launch()
    inn.launches.append(launch)
    starting = asyncio.create_task(inn.engine.start(launch))
    while not (launch.runtime / "lock").exists():  # noqa: ASYNC110 (nobody tells)
        await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert machine.holder(launch.runtime) is None


# looking


async def test_what_can_be_asked_of_it(inn: Inn) -> None:
    running = await inn.start()
    assert await counted(running, b"+") == 1
    async with connect(runtime(running)) as session:
        info = await session.call(Op.INFO)
        assert (info["state"], info["cpus"], info["uuid"]) == ("running", 1, inn.launches[0].uuid)
        metrics = await session.call(Op.METRICS)
        assert metrics["exits"][0]["IO"] > 10
        registers = await session.call(Op.REGISTERS)
        assert "rip 00000000001000" in registers["vcpus"][0]
        await session.call(Op.TRACE, {"limit": 100})
        await counted(running)
        traced = await session.call(Op.TRACE, {"limit": 0})
        assert "0x3fd" in str(traced["vcpus"][0])
    assert not inn.engine.status(running).paused


async def test_several_clients_of_the_console(inn: Inn) -> None:
    running = await inn.start()
    first, second = [await Console.open(runtime(running)) for _ in range(2)]
    await first.until(b"toy\n")
    first.type(b"x")
    assert await first.until(b"x") == b"x"
    assert await second.until(b"x") == b"toy\nx"
    first.close()
    second.close()
    assert inn.launches[0].log.read_bytes() == b"toy\nx"


# forks


async def test_children_have_the_memory_and_go_their_own_way(inn: Inn) -> None:
    source = await inn.start()
    assert await counted(source, b"+++") == 3
    kids = await inn.fork(source, 3)
    assert len({kid.process.pid for kid in [source, *kids]}) == 4
    for kid in kids:
        assert (await say(runtime(kid), b"")).startswith(b"toy\n"), "recent output is shared"
        assert await counted(kid) == 3
    assert await counted(kids[0], b"++") == 5
    assert await counted(source, b"+") == 4
    assert await counted(kids[1]) == 3
    assert await counted(source) == 4
    for launch, kid in zip(inn.launches[1:], kids, strict=True):
        assert b"toy" not in launch.log.read_bytes(), "its log begins with itself"
        assert machine.holder(runtime(kid)) == kid.process


async def test_a_fork_of_a_fork_outlives_both(inn: Inn) -> None:
    source = await inn.start()
    assert await counted(source, b"+") == 1
    (child,) = await inn.fork(source)
    assert await counted(child, b"+") == 2
    (grandchild,) = await inn.fork(child)
    await inn.engine.kill(source)
    await inn.engine.kill(child)
    assert await counted(grandchild, b"+") == 3
    (last,) = await inn.fork(grandchild)
    assert await counted(last) == 3


async def test_a_paused_source_stays_paused_and_its_children_run(inn: Inn) -> None:
    source = await inn.start()
    assert await counted(source, b"+") == 1
    await inn.engine.pause(source)
    (kid,) = await inn.fork(source)
    assert inn.engine.status(source).paused
    assert not inn.engine.status(kid).paused
    assert await counted(kid) == 1


async def test_a_childs_end_is_its_own(inn: Inn) -> None:
    source = await inn.start()
    (one, two) = await inn.fork(source, 2)
    console = await Console.open(runtime(one))
    console.type(b"q")
    assert (await inn.engine.wait(one, 10)).ended == "guest powered off"
    console.close()
    assert inn.engine.status(source).alive and inn.engine.status(two).alive
    await inn.engine.pause(two)
    assert inn.engine.status(two).paused and not inn.engine.status(source).paused


async def test_the_jail_holds_for_children(inn: Inn) -> None:
    source = await inn.start()
    (kid,) = await inn.fork(source)
    status = Path(f"/proc/{kid.process.pid}/status").read_text()
    assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status
    assert not [path for path in opened(kid) if path.startswith(source.runtime)], "nothing of its parent's is open"


# disks


def disk(inn: Inn, name: str = "root") -> DiskFile:
    base = inn.folder / f"{name}.raw"
    base.write_bytes(bytes(MIB))
    top = inn.folder / f"{name}-0.qcow2"
    qcow2.create_overlay(top, size=MIB, backing=base, backing_format="raw")
    return DiskFile(name=name, size=MIB, chain=((base, "raw"), (top, "qcow2")))


def on_top(inn: Inn, below: DiskFile) -> DiskFile:
    path = inn.folder / f"{below.name}-{uuid.uuid4().hex[:8]}.qcow2"
    qcow2.create_overlay(path, size=below.size, backing=below.chain[-1][0], backing_format=below.chain[-1][1])
    return DiskFile(name=below.name, size=below.size, chain=(*below.chain, (path, "qcow2")))


def with_disks(launch: Launch, *disks: DiskFile) -> Launch:
    return msgspec.structs.replace(launch, disks=disks)


def opened(running: Running) -> dict[str, set[str]]:
    """Path → access modes, of what a monitor has open."""
    folder = Path(f"/proc/{running.process.pid}")
    found: dict[str, set[str]] = {}
    for fd in os.listdir(folder / "fd"):
        with contextlib.suppress(FileNotFoundError):  # our own connection, which it closes now
            flags = int((folder / "fdinfo" / fd).read_text().split("flags:\t")[1].split()[0], 8)
            mode = "rw" if flags & os.O_ACCMODE == os.O_RDWR else "ro"
            found.setdefault(os.readlink(folder / "fd" / fd), set()).add(mode)
    return found


async def test_forks_stand_on_frozen_layers(inn: Inn) -> None:
    root = disk(inn)
    source = await inn.begin(with_disks(inn.launch(), root))
    grown, of_child = on_top(inn, root), on_top(inn, root)
    layer = NewLayer(disk="root", path=grown.chain[-1][0])
    (kid,) = await inn.fork_to(source, [with_disks(inn.launch(), of_child)], [layer])
    frozen, base = str(root.chain[1][0]), str(root.chain[0][0])
    for running, top in ((source, grown), (kid, of_child)):
        files = opened(running)
        assert files[frozen] == {"ro"} and files[base] == {"ro"}
        assert files[str(top.chain[-1][0])] == {"rw"}
    assert str(of_child.chain[-1][0]) not in opened(source)
    assert str(grown.chain[-1][0]) not in opened(kid)


async def test_a_switch(inn: Inn) -> None:
    root = disk(inn)
    source = await inn.begin(with_disks(inn.launch(), root))
    grown = on_top(inn, root)
    pause = await inn.engine.switch(source, [NewLayer(disk="root", path=grown.chain[-1][0])])
    assert 0 < pause < 5
    assert opened(source)[str(grown.chain[-1][0])] == {"rw"}
    with pytest.raises(CaptureFailed, match="no disk named") as failed:
        await inn.engine.switch(source, [NewLayer(disk="data", path=on_top(inn, disk(inn, "other")).chain[-1][0])])
    assert failed.value.switched == ()
    assert not inn.engine.status(source).paused


async def test_disks_come_and_go(inn: Inn) -> None:
    root = disk(inn)
    source = await inn.begin(with_disks(inn.launch(), root))
    data = disk(inn, "data")
    await inn.engine.attach_disk(source, data)
    assert opened(source)[str(data.chain[-1][0])] == {"rw"}
    layers = [NewLayer(disk=below.name, path=on_top(inn, below).chain[-1][0]) for below in (root, data)]
    child = with_disks(inn.launch(), on_top(inn, root), on_top(inn, data))
    (kid,) = await inn.fork_to(source, [child], layers)
    assert opened(kid)[str(child.disks[1].chain[-1][0])] == {"rw"}
    await inn.engine.resize_disk(source, "data", 2 * MIB)
    await inn.engine.detach_disk(source, "data")
    assert not [path for path in opened(source) if "/data" in path]
    with pytest.raises(Unsupported, match="stop the machine"):
        await inn.engine.detach_disk(source, "root")
    for n in range(4):
        await inn.engine.attach_disk(source, disk(inn, f"more{n}"))
    with pytest.raises(Unsupported, match="more than 4"):
        await inn.engine.attach_disk(source, disk(inn, "last"))


async def test_memory(inn: Inn) -> None:
    source = await inn.start()
    await inn.engine.set_memory(source, 32 * MIB)
    with pytest.raises(EngineError):
        await inn.engine.set_memory(source, 128 * MIB)


# networks


def listens(port: PortRecord) -> bool:
    with socket.socket() as sock:
        sock.settimeout(5)
        return sock.connect_ex((port.address, port.host)) == 0


async def until_free(port: PortRecord) -> None:
    async with asyncio.timeout(10):
        while listens(port):  # noqa: ASYNC110 (nobody tells when a process that is not ours has ended)
            await asyncio.sleep(0.01)


@pytest.mark.skipif(probe.find_passt() is None, reason="passt is not installed")
async def test_ports_come_and_go_and_end_with_the_machine(inn: Inn) -> None:
    launch = msgspec.structs.replace(inn.launch(nics=[{}], ports=[80]), macs=("52:54:00:11:22:33",))
    running = await inn.begin(launch)
    (first,) = running.ports
    assert first.guest == 80 and listens(first)
    second = await inn.engine.add_port(running, PortRecord(81, 0, "127.0.0.1", "tcp"))
    assert listens(first) and listens(second)
    with pytest.raises(HostError, match="in use"):
        await inn.engine.add_port(running, PortRecord(82, second.host, "127.0.0.1", "tcp"))
    assert listens(first) and listens(second)
    await inn.engine.remove_port(running, first)
    assert not listens(first) and listens(second)
    child = msgspec.structs.replace(inn.launch(nics=[{}], ports=[80]), macs=("52:54:00:11:22:44",))
    (kid,) = await inn.fork_to(running, [child], [])
    assert listens(kid.ports[0]) and kid.ports[0].host not in (first.host, second.host)
    await inn.engine.kill(running)
    await until_free(second)
    assert listens(kid.ports[0])
    await inn.engine.kill(kid)
    await until_free(kid.ports[0])


async def test_without_passt_a_network_is_refused_in_words(inn: Inn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSADA_PASST", "passt-that-is-not-there")
    assert not inn.engine.capabilities().has(Feature.USER_NETWORK)
    with pytest.raises(Unsupported, match="passt"):
        await inn.begin(msgspec.structs.replace(inn.launch(nics=[{}]), macs=("52:54:00:11:22:33",)))


# snapshots


async def test_a_snapshot_and_machines_from_it(inn: Inn, tmp_path: Path) -> None:
    source = await inn.start()
    assert await counted(source, b"++") == 2
    target = tmp_path / "point"
    target.mkdir()
    captured = await inn.engine.capture(source, target, [])
    assert 0 < captured.pause < 5 and captured.memory_bytes > 0
    assert not inn.engine.status(source).paused
    assert await counted(source, b"+") == 3
    files = SnapshotFiles(path=target, memory=64 * MIB, private=captured.private)
    launches = [inn.launch(), inn.launch()]
    inn.launches += launches
    outcomes = await inn.engine.restore(launches, files)
    for outcome in outcomes:
        assert isinstance(outcome, Running), outcome
        inn.running.append(outcome)
        assert await counted(outcome) == 2
    # A machine that was restored is captured, and that is restored, when the first snapshot is gone.
    restored = inn.running[1]
    assert await counted(restored, b"+++") == 5
    second = tmp_path / "second"
    second.mkdir()
    captured = await inn.engine.capture(restored, second, [])
    for path in target.iterdir():
        path.unlink()
    await inn.engine.kill(restored)
    launch = inn.launch()
    inn.launches.append(launch)
    files = SnapshotFiles(path=second, memory=64 * MIB, private=captured.private)
    (outcome,) = await inn.engine.restore([launch], files, paused=True)
    assert isinstance(outcome, Running), outcome
    inn.running.append(outcome)
    assert inn.engine.status(outcome).paused
    await inn.engine.resume(outcome)
    assert await counted(outcome) == 5
    (kid,) = await inn.fork(outcome)
    assert await counted(kid, b"+") == 6


async def test_a_deep_stack_of_memory_files_is_laid_into_one(
    inn: Inn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "DEEP", 2)
    running, counts = await inn.start(), []
    for n in range(4):
        assert await counted(running, b"+") == n + 1
        target = tmp_path / f"point{n}"
        target.mkdir()
        captured = await inn.engine.capture(running, target, [])
        counts.append(captured.private["files"])
        await inn.engine.kill(running)
        launch = inn.launch()
        inn.launches.append(launch)
        files = SnapshotFiles(path=target, memory=64 * MIB, private=captured.private)
        (outcome,) = await inn.engine.restore([launch], files)
        assert isinstance(outcome, Running), outcome
        inn.running.append(outcome)
        running = outcome
        for path in target.iterdir():
            path.unlink()
    assert counts == [1, 2, 1, 2]
    assert await counted(running) == 4


async def test_a_damaged_snapshot_is_refused(inn: Inn, tmp_path: Path) -> None:
    source = await inn.start()
    target = tmp_path / "point"
    target.mkdir()
    captured = await inn.engine.capture(source, target, [])
    (target / "devices").write_bytes(b"nonsense")
    launch = inn.launch()
    inn.launches.append(launch)
    files = SnapshotFiles(path=target, memory=64 * MIB, private=captured.private)
    (outcome,) = await inn.engine.restore([launch], files)
    assert isinstance(outcome, Exception) and "damaged" in str(outcome)
    with pytest.raises(EngineError, match="record is damaged"):
        await inn.engine.restore([launch], SnapshotFiles(path=target, memory=64 * MIB, private={"files": 900}))


# the probe


def test_what_the_probe_says_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(probe.SLOW, raising=False)
    engine = KvmEngine(tmp_path)
    found = engine.probe()
    assert found.ok is found.facts["hardware"]
    assert "instructions/s" in found.detail or "does not run" in found.detail
    if not found.ok:
        with pytest.raises(HostError, match="kvm engine cannot run machines here"):
            engine.capabilities()


def test_every_feature_has_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probe.SLOW, "1")
    features = KvmEngine(tmp_path).capabilities().features
    assert set(features) == set(Feature)
    assert all(verdict.ok or verdict.hint for verdict in features.values())
