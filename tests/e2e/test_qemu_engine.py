"""The qemu engine on real guests: life, ends, faults, hot-plug."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from qemu_kit import ROOT, Box, Kit

from posada.engine.base import DiskFile, NewLayer
from posada.engine.common import process
from posada.engine.qemu import qmp
from posada.errors import EngineError, EngineGone, HostError
from posada.model.records import PortRecord
from posada.storage.qcow2 import create_empty, create_overlay

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kit(places: tuple[Path, Path], image: str) -> AsyncIterator[Kit]:
    found = await Kit.open(*places, image)
    yield found
    await found.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def source(kit: Kit) -> Box:
    """Booted once; tests work on forks of it."""
    box = await kit.boot(ports=[80])
    assert await kit.sh(box, "echo $$") != ""
    return box


@pytest_asyncio.fixture(loop_scope="module")
async def box(kit: Kit, source: Box) -> AsyncIterator[Box]:
    (child,) = await kit.fork(source)
    yield child
    if child in kit.boxes:
        await kit.end(child)


async def test_it_pauses_and_goes_on(kit: Kit, box: Box) -> None:
    async with await kit.client(box) as client:
        await kit.engine.pause(box.running)
        await kit.engine.pause(box.running)
        assert kit.engine.status(box.running).paused
        command = asyncio.create_task(client.run(["true"]))
        done, _ = await asyncio.wait([command], timeout=0.3)
        assert not done
        await kit.engine.resume(box.running)
        await kit.engine.resume(box.running)
        assert (await asyncio.wait_for(command, 30)).ok
    assert not kit.engine.status(box.running).paused


@pytest.mark.parametrize(
    ("script", "reason", "crashed"),
    [
        ("echo o > /proc/sysrq-trigger", "guest powered off", False),
        ("echo b > /proc/sysrq-trigger", "guest rebooted", False),
        ("echo c > /proc/sysrq-trigger", "guest panicked: Kernel panic - not syncing: sysrq triggered crash", True),
    ],
    ids=["off", "reboot", "panic"],
)
async def test_how_a_guest_ends_is_known(kit: Kit, box: Box, script: str, reason: str, crashed: bool) -> None:
    async with await kit.client(box) as client:
        with contextlib.suppress(Exception):
            await client.run(["sh", "-c", script])
        status = await kit.engine.wait(box.running, timeout=30)
    assert (status.alive, status.ended, status.crashed) == (False, reason, crashed)


async def test_a_hung_qemu_is_reported_and_killed(kit: Kit, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(box.running.process.pid, signal.SIGSTOP)
    real = qmp.connect
    monkeypatch.setattr(qmp, "connect", lambda path: real(path, timeout=0.5))
    with pytest.raises(EngineGone, match="does not answer"):
        await kit.engine.pause(box.running)
    await kit.engine.kill(box.running)
    status = kit.engine.status(box.running)
    assert (status.alive, status.ended, status.crashed) == (False, "killed", False)
    await kit.engine.kill(box.running)
    with pytest.raises(EngineGone, match="is not running any more: killed"):
        await kit.engine.pause(box.running)


async def test_a_qemu_killed_from_outside_has_crashed(kit: Kit, box: Box) -> None:
    os.kill(box.running.process.pid, signal.SIGKILL)
    status = await kit.engine.wait(box.running, timeout=10)
    assert (status.ended, status.crashed) == ("QEMU was killed by signal 9", True)


async def test_without_its_keeper_it_goes_on(kit: Kit, box: Box) -> None:
    """The console has no reader any more: the guest must not stand still because of that."""
    assert box.running.keeper is not None
    process.send(box.running.keeper, signal.SIGKILL)
    await process.ended(box.running.keeper, 10)
    assert await kit.sh(box, "yes | head -c 300000 > /dev/ttyS0; echo alive") == "alive\n"
    (grandchild,) = await kit.fork(box)
    assert await kit.sh(grandchild, "echo fine") == "fine\n"
    await kit.end(grandchild)
    await kit.engine.kill(box.running)
    assert not kit.engine.status(box.running).alive


async def test_the_console_is_a_terminal_to_the_guest(kit: Kit, box: Box) -> None:
    reader, writer = await asyncio.open_unix_connection(kit.engine.console(box.running))
    await kit.sh(box, "echo from-the-guest > /dev/ttyS0")
    async with asyncio.timeout(30):
        await reader.readuntil(b"from-the-guest")
        reading = asyncio.create_task(kit.sh(box, "head -n 1 < /dev/ttyS0"))
        while not reading.done():
            writer.write(b"to-the-guest\n")
            await asyncio.wait([reading], timeout=0.2)
        assert reading.result() == "to-the-guest\n"
    writer.close()


async def test_ports_come_and_go(kit: Kit, box: Box, source: Box) -> None:
    """Each machine has its own; the guest sees the connections."""
    (forked,) = box.running.ports
    (original,) = source.running.ports
    assert forked.guest == original.guest == 80
    assert forked.host != original.host
    added = await kit.engine.add_port(box.running, PortRecord(22, 0, "127.0.0.1", "tcp"))
    assert added.host > 0
    with socket.create_connection(("127.0.0.1", added.host), timeout=5):
        pass
    with pytest.raises(HostError, match="in use"):
        await kit.engine.add_port(box.running, PortRecord(23, added.host, "127.0.0.1", "tcp"))
    await kit.engine.remove_port(box.running, added)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", added.host), timeout=5)


async def test_a_disk_is_attached_forked_and_detached(kit: Kit, box: Box) -> None:
    size = 8 << 20
    base = kit.folder / "extra.qcow2"
    create_empty(base, size=size)
    await kit.engine.attach_disk(box.running, DiskFile(name="extra", size=size, chain=((base, "qcow2"),)))
    wait = "i=0; until [ -b /dev/vdb ] || [ $i -ge 100 ]; do i=$((i+1)); sleep 0.1; done"
    await kit.sh(box, f"{wait}; echo first | dd of=/dev/vdb conv=sync oflag=direct bs=512")

    # A fork has it too, in the same slot, and its writes are its own.
    root, extra, own = kit.overlay(box.chain), kit.folder / "extra-1.qcow2", kit.folder / "extra-child.qcow2"
    for path in (extra, own):
        create_overlay(path, size=size, backing=base, backing_format="qcow2")
    chain = ((base, "qcow2"), (own, "qcow2"))
    launch = kit.child_launch(box, None, DiskFile(name="extra", size=size, chain=chain))
    layers = [NewLayer(disk=ROOT, path=root), NewLayer(disk="extra", path=extra)]
    (outcome,) = (await kit.engine.fork(box.running, [launch], layers)).children
    assert not isinstance(outcome, Exception)
    child = kit.keep(outcome, launch, launch.disks[0].chain)
    read = "dd if=/dev/vdb iflag=direct bs=512 count=1 status=none | tr -d '\\0'"
    assert await kit.sh(child, f"{read}; echo child | dd of=/dev/vdb conv=sync oflag=direct bs=512; {read}") == (
        "first\nchild\n"
    )
    assert await kit.sh(box, read) == "first\n"

    await kit.engine.resize_disk(box.running, "extra", 2 * size)
    grown = "i=0; until [ $(blockdev --getsize64 /dev/vdb) = 16777216 ] || [ $i -ge 50 ]; do i=$((i+1)); sleep 0.1; done"
    assert await kit.sh(box, f"{grown}; blockdev --getsize64 /dev/vdb") == "16777216\n"

    for each in (box, child):
        await kit.engine.detach_disk(each.running, "extra")
        assert await kit.sh(each, "[ -b /dev/vdb ] || echo gone") == "gone\n"
        with pytest.raises(EngineError, match="no disk named 'extra'"):
            await kit.engine.detach_disk(each.running, "extra")
    box.chain = (*box.chain, (root, "qcow2"))
    (after,) = await kit.fork(box)
    assert await kit.sh(after, "[ -b /dev/vdb ] || echo gone") == "gone\n"
    await kit.end(after)
    await kit.end(child)


async def test_memory_is_given_back_and_taken_again(kit: Kit, box: Box) -> None:
    free = "awk '/MemFree/{print $2}' /proc/meminfo"
    before = int(await kit.sh(box, free))
    await kit.engine.set_memory(box.running, 160 << 20)
    smaller = f"i=0; until [ $({free}) -lt {before - 60000} ] || [ $i -ge 100 ]; do i=$((i+1)); sleep 0.1; done; {free}"
    assert int(await kit.sh(box, smaller)) < before - 60000
    await kit.engine.set_memory(box.running, 256 << 20)
    larger = f"i=0; until [ $({free}) -ge {before - 9000} ] || [ $i -ge 100 ]; do i=$((i+1)); sleep 0.1; done; {free}"
    assert int(await kit.sh(box, larger)) >= before - 9000


async def test_what_qemu_says_of_a_bad_disk_is_passed_on(kit: Kit) -> None:
    bad = kit.folder / "bad.qcow2"
    bad.write_bytes(b"not a disk at all" * 1000)
    launch = kit.launch(((bad, "qcow2"),), boot=True)
    with pytest.raises(EngineError, match="not in qcow2 format"):
        await kit.engine.start(launch)
    kit.engine.reap(launch.runtime)
    assert list(launch.runtime.iterdir()) == []


async def test_a_cancelled_start_leaves_nothing(kit: Kit) -> None:
    base = ((kit.disk, "raw"),)
    launch = kit.launch((*base, (kit.overlay(base), "qcow2")), boot=True)
    for delay in (0.0, 0.01, 0.03, 0.06):
        task = asyncio.create_task(kit.engine.start(launch))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await kit.engine.abandon(launch.runtime)
        assert list(launch.runtime.iterdir()) == []
        assert not _processes_of(launch.uuid)


async def test_an_interrupted_start_is_found_and_ended(kit: Kit, source: Box) -> None:
    """`start` returned, but nobody recorded it: the runtime directory tells."""
    (child,) = await kit.fork(source)
    kit.boxes.remove(child)
    await kit.engine.abandon(child.launch.runtime)
    assert not kit.engine.status(child.running).alive
    assert list(child.launch.runtime.iterdir()) == []


def _processes_of(uuid: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if uuid.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
