"""Capture, restore and fork of the qemu engine on real guests: one instant for memory and disk, and nobody sees another."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from qemu_kit import ROOT, Box, Kit

from posada.engine.base import CaptureFailed, NewLayer
from posada.engine.qemu import pages
from posada.errors import EngineError, ImageError

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kit(places: tuple[Path, Path], image: str) -> AsyncIterator[Kit]:
    found = await Kit.open(*places, image)
    yield found
    await found.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def source(kit: Kit) -> Box:
    """Booted once."""
    return await kit.boot()


#: Appends 1, 2, 3… to a file, each on disk before the same number is in memory (tmpfs); so at any instant the disk is at
#: most one ahead of the memory, and never behind.
WRITER = """i=0; : > /numbers; while :; do i=$((i+1)); echo $i >> /numbers; sync /numbers; echo $i > /run/n.new;
mv /run/n.new /run/number; done"""

#: Stops the writer, and prints what memory and disk hold. The file is read from the disk, not from the page cache.
LOOK = """kill -STOP $(cat /run/writer); cat /run/number; echo 3 > /proc/sys/vm/drop_caches; tail -n 1 /numbers;
wc -l < /numbers; seq $(wc -l < /numbers) | cmp - /numbers && echo whole"""


async def look(kit: Kit, box: Box) -> int:
    """The number the machine has come to, its memory and disk being of one instant. The writer is stopped."""
    memory, disk, lines, whole = (await kit.sh(box, LOOK)).split()
    assert int(disk) == int(lines)
    assert int(disk) - int(memory) in (0, 1)
    assert whole == "whole"
    return int(memory)


async def test_disk_and_memory_agree_in_every_fork_and_nobody_sees_later_writes(kit: Kit, source: Box) -> None:
    async with await kit.client(source) as client:
        writer = await client.exec(["sh", "-c", f"echo $$ > /run/writer; {WRITER}"])
        await client.run(["sh", "-c", "until [ -s /run/number ]; do sleep 0.05; done"], check=True)
        numbers = []
        for _ in range(4):
            children = await kit.fork(source, 2)
            seen = [await look(kit, child) for child in children]
            # The children's writers ran until they were stopped, each on its own disk.
            await kit.sh(children[0], f"echo {'x' * 10} >> /numbers; sync")
            assert (await kit.sh(children[1], "tail -n 1 /numbers")).strip().isdigit()
            numbers.append(min(seen))
            for child in children:
                await kit.end(child)
        assert numbers == sorted(numbers)
        # The source goes on, and its disk has only its own lines.
        now = await look(kit, source)
        assert now > numbers[-1]
        await writer.signal(9)
        await writer.close()


async def test_memory_is_its_own_on_all_sides(kit: Kit, source: Box) -> None:
    nonce = secrets.token_hex(16)
    await kit.sh(source, f"head -c 20000000 /dev/urandom > /run/big; sha256sum /run/big > /run/sum; echo {nonce} > /run/nonce")
    first, second = await kit.fork(source, 2)
    await kit.sh(source, "echo source > /run/nonce; head -c 20000000 /dev/zero > /run/big; sync")
    await kit.sh(first, f"[ $(cat /run/nonce) = {nonce} ] && echo first > /run/nonce; head -c 20000000 /dev/zero > /run/big")
    assert await kit.sh(second, "cat /run/nonce; sha256sum -c /run/sum") == f"{nonce}\n/run/big: OK\n"
    assert await kit.sh(first, "cat /run/nonce") == "first\n"
    assert await kit.sh(source, "cat /run/nonce") == "source\n"
    # A fork of a fork: its base and the pages it wrote itself.
    await kit.sh(second, "echo more > /run/more; mkdir /run/d")
    (grandchild,) = await kit.fork(second)
    await kit.sh(second, "echo later > /run/more; echo later > /run/nonce; rm /run/big")
    wanted = f"more\n{nonce}\n/run/big: OK\n"
    assert await kit.sh(grandchild, "cat /run/more /run/nonce; sha256sum -c /run/sum") == wanted
    # And a fork of that, of the same kind.
    (great,) = await kit.fork(grandchild)
    assert await kit.sh(great, "cat /run/more /run/nonce; sha256sum -c /run/sum") == wanted
    for box in (first, second, grandchild, great):
        await kit.end(box)
    await kit.sh(source, "rm /run/big")


async def test_a_hostile_balloon_reaches_no_sibling(kit: Kit, source: Box) -> None:
    """Inflating makes QEMU punch holes into the memory file; the file of forks is sealed."""
    await kit.sh(source, "head -c 30000000 /dev/urandom > /run/big; sha256sum /run/big > /run/sum")
    hostile, sibling = await kit.fork(source, 2)
    await kit.sh(source, "rm /run/big")
    await kit.engine.set_memory(hostile.running, 128 << 20)
    # It holds its own tmpfs file, frees it, and so reports and balloons pages that siblings still use.
    await kit.sh(hostile, "rm /run/big; sleep 2; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory")
    assert await kit.sh(sibling, "sha256sum -c /run/sum") == "/run/big: OK\n"
    (again,) = await kit.fork(sibling)
    assert await kit.sh(again, "sha256sum -c /run/sum") == "/run/big: OK\n"
    for box in (hostile, sibling, again):
        await kit.end(box)


async def test_connections_of_the_source_survive_and_a_childs_links_are_dropped(kit: Kit, source: Box) -> None:
    async with await kit.client(source) as client:
        echo = await client.exec(["cat"], stdin=True)
        await echo.write(b"before\n")
        events = aiter(echo)
        assert (await anext(events)).data == b"before\n"
        (child,) = await kit.fork(source)
        await echo.write(b"after\n")
        assert (await anext(events)).data == b"after\n"
        # In the child nobody is connected: its agent has seen the ports close, and all four are free.
        links = [await kit.client(child) for _ in range(4)]
        assert [(await link.run(["echo", str(i)])).stdout for i, link in enumerate(links)] == ["0\n", "1\n", "2\n", "3\n"]
        for link in links:
            await link.close()
        await echo.close()
    await kit.end(child)


async def test_forks_while_a_client_floods_the_guest(kit: Kit, source: Box) -> None:
    """What clients send goes into guest memory even while it is stopped; the copy must not be torn by it."""
    async with await kit.client(source) as client:
        sink = await client.exec(["sh", "-c", "cat > /dev/null"], stdin=True)

        async def flood() -> None:
            while True:
                await sink.write(os.urandom(60_000))

        flooding = asyncio.create_task(flood())
        for _ in range(6):
            (child,) = await kit.fork(source)
            assert await kit.sh(child, "echo alive") == "alive\n"
            await kit.end(child)
        flooding.cancel()
        await asyncio.wait([flooding])
        assert (await client.run(["echo", "source"])).stdout == "source\n"
        await sink.close()


async def test_capture_and_restore(kit: Kit, source: Box) -> None:
    nonce = secrets.token_hex(16)
    await kit.sh(source, f"echo {nonce} > /run/nonce; echo {nonce} > /nonce; sync")
    snapshot, chain = await kit.capture(source, "snapshot")
    await kit.sh(source, "echo later > /run/nonce; echo later > /nonce; sync")
    for _ in range(2):  # it can be restored any number of times
        box = await kit.restore(snapshot, chain)
        assert await kit.sh(box, "cat /run/nonce /nonce") == f"{nonce}\n{nonce}\n"
        await kit.sh(box, "echo mine > /run/nonce; echo mine > /nonce; sync")
        await kit.end(box)
    paused = await kit.restore(snapshot, chain, paused=True)
    assert kit.engine.status(paused.running).paused
    # A paused machine is forked as it is, and stays paused; its child runs.
    (child,) = await kit.fork(paused)
    assert await kit.sh(child, "cat /run/nonce") == f"{nonce}\n"
    assert kit.engine.status(paused.running).paused
    await kit.engine.resume(paused.running)
    assert await kit.sh(paused, "cat /run/nonce") == f"{nonce}\n"
    for box in (child, paused):
        await kit.end(box)
    assert await kit.sh(source, "cat /run/nonce /nonce") == "later\nlater\n"


async def test_damaged_snapshots_are_refused(kit: Kit, source: Box) -> None:
    snapshot, chain = await kit.capture(source, "damaged")
    devices = snapshot.path / "devices"
    good = devices.read_bytes()
    for bad in (b"", good[:1000], os.urandom(len(good)), good[: len(good) // 2]):
        devices.write_bytes(bad)
        with pytest.raises(EngineError):
            await kit.restore(snapshot, chain)
    devices.write_bytes(good)
    layout = snapshot.private["layout"]
    for change in ({"machine": "none"}, {"disks": []}, {"memory": 1 << 20}, {"accelerator": "x"}):
        with pytest.raises(EngineError):
            await kit.restore(msgspec.structs.replace(snapshot, private={"layout": {**layout, **change}}), chain)
    os.truncate(snapshot.path / "memory", 4096)
    with pytest.raises(ImageError, match="not the memory of this machine"):
        await kit.restore(snapshot, chain)
    os.truncate(snapshot.path / "memory", snapshot.memory)
    # Zeros of the right size: QEMU may notice (by the devices' rings), or the guest may crash. Nobody else is harmed.
    try:
        await kit.end(await kit.restore(snapshot, chain))
    except EngineError as error:
        assert "load of migration failed" in str(error)
    _nothing_runs(kit, source)


def _nothing_runs(kit: Kit, source: Box) -> None:
    """No machine of this test's folder is there but those that are known."""
    known = {box.launch.uuid for box in kit.boxes}
    for folder in kit.folder.iterdir():
        if folder.is_dir() and (folder / "running.json").exists():
            assert folder.name in known
    assert source in kit.boxes


async def test_a_capture_without_space_leaves_the_machine_running(kit: Kit, source: Box) -> None:
    layer = kit.overlay(source.chain)
    with pytest.raises(CaptureFailed, match="cannot write the guest's memory") as caught:
        await kit.engine.capture(source.running, kit.folder / "missing", [NewLayer(disk=ROOT, path=layer)])
    assert caught.value.switched == (ROOT,)
    source.chain = (*source.chain, (layer, "qcow2"))
    assert await kit.sh(source, "echo fine > /f; sync; cat /f") == "fine\n"


async def test_a_bad_layer_changes_nothing(kit: Kit, source: Box) -> None:
    bad = kit.folder / "bad-layer.qcow2"
    bad.write_bytes(b"x" * 100_000)
    launch = kit.child_launch(source)
    with pytest.raises(CaptureFailed) as caught:
        await kit.engine.fork(source.running, [launch], [NewLayer(disk=ROOT, path=bad)])
    assert caught.value.switched == ()
    assert not (launch.runtime / "running.json").exists()
    with pytest.raises(CaptureFailed, match="no disk named 'other'"):
        await kit.engine.switch(source.running, [NewLayer(disk="other", path=kit.overlay(source.chain))])
    (child,) = await kit.fork(source)
    assert await kit.sh(child, "echo fine") == "fine\n"
    await kit.end(child)


async def test_one_bad_child_spoils_only_itself(kit: Kit, source: Box) -> None:
    good = kit.child_launch(source)
    bad = kit.child_launch(source)
    bad = msgspec.structs.replace(bad, disks=())
    torn = kit.child_launch(source)
    torn.disks[0].chain[-1][0].write_bytes(b"x" * 70_000)
    layer = kit.overlay(source.chain)
    forked = await kit.engine.fork(source.running, [bad, good, torn], [NewLayer(disk=ROOT, path=layer)])
    source.chain = (*source.chain, (layer, "qcow2"))
    first, second, third = forked.children
    assert isinstance(first, EngineError)
    assert "disks root, and it was given none" in str(first)
    assert isinstance(third, EngineError)
    assert "not in qcow2 format" in str(third)
    assert not isinstance(second, Exception)
    box = kit.keep(second, good, good.disks[0].chain)
    assert await kit.sh(box, "echo fine") == "fine\n"
    await kit.end(box)


async def test_a_cancelled_fork_leaves_no_child_and_a_running_source(kit: Kit, source: Box) -> None:
    for delay in (0.0, 0.02, 0.05, 0.08, 0.11):
        launch = kit.child_launch(source)
        layer = kit.overlay(source.chain)
        task = asyncio.create_task(kit.engine.fork(source.running, [launch], [NewLayer(disk=ROOT, path=layer)]))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            done = await task
            switched: tuple[str, ...] = (ROOT,)
            (outcome,) = done.children
            assert not isinstance(outcome, Exception)
            await kit.engine.kill(outcome)
        except asyncio.CancelledError:
            switched = ()
        except CaptureFailed as failure:
            switched = failure.switched
        if switched:
            source.chain = (*source.chain, (layer, "qcow2"))
        await kit.engine.abandon(launch.runtime)
        assert await kit.sh(source, "echo fine > /f; sync; cat /f") == "fine\n"
        (child,) = await kit.fork(source)  # which fails if `switched` was a lie
        await kit.end(child)


async def test_disks_are_switched_without_memory(kit: Kit, source: Box) -> None:
    await kit.sh(source, "echo before > /f; sync")
    layer = kit.overlay(source.chain)
    frozen = source.chain[-1][0]
    pause = await kit.engine.switch(source.running, [NewLayer(disk=ROOT, path=layer)])
    source.chain = (*source.chain, (layer, "qcow2"))
    assert 0 < pause < 5
    size = frozen.stat().st_blocks
    await kit.sh(source, "head -c 3000000 /dev/urandom > /f; sync")
    assert frozen.stat().st_blocks == size
    assert layer.stat().st_blocks * 512 > 2_900_000


async def test_several_processors_and_memory_above_four_gigabytes(kit: Kit) -> None:
    """The PC splits memory around the PCI hole; the copy does not."""
    box = await kit.boot(cpus=2, memory="5GiB")
    assert await kit.sh(box, "nproc") == "2\n"
    assert int(await kit.sh(box, "awk '/MemTotal/{print $2}' /proc/meminfo")) > 4_700_000
    await kit.sh(box, "head -c 40000000 /dev/urandom > /run/big; sha256sum /run/big > /run/sum")
    (child,) = await kit.fork(box)
    assert await kit.sh(child, "nproc; sha256sum -c /run/sum") == "2\n/run/big: OK\n"
    (grandchild,) = await kit.fork(child)
    assert await kit.sh(grandchild, "nproc; sha256sum -c /run/sum") == "2\n/run/big: OK\n"
    assert pages.private(grandchild.running.process.pid)
    for each in (grandchild, child, box):
        await kit.end(each)
