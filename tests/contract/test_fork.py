"""Forks: other machines than their source, made of one instant of it, and nothing of theirs is ever seen by another."""

from __future__ import annotations

import asyncio
import os

import pytest
from contract_kit import DISK, RAM, Inn

from posada.errors import EngineError, ForkError, SpecError, Unsupported
from posada.host import merging
from posada.model.capabilities import Feature
from posada.model.machine import PortSpec
from posada.model.records import SnapshotKind
from posada.model.states import State


async def note(inn: Inn, name: str, text: str) -> None:
    await inn.put(name, RAM, text)
    await inn.put(name, DISK, text)


async def notes(inn: Inn, name: str) -> tuple[str | None, str | None]:
    return await inn.see(name, RAM), await inn.see(name, DISK)


async def test_children_have_the_memory_and_disk_and_another_identity(inn: Inn) -> None:
    source = await inn.machine()
    await note(inn, "one", "of the source")
    kids = await inn.vms.fork("one", 3, names=["a", "b", "c"])
    assert [kid.name for kid in kids] == ["a", "b", "c"]
    seen = set()
    for kid in [inn.vms.get("one"), *kids]:
        assert kid.state is State.RUNNING
        assert await notes(inn, kid.name) == ("of the source", "of the source")
        seen.add((kid.uuid, *kid.macs))
    assert len(seen) == 4
    for kid in kids:
        assert kid.parent == source.uuid and kid.generation == source.generation + 1
        assert await inn.see(kid.name, "/etc/hostname") == kid.name + "\n"
        assert await inn.see(kid.name, "/etc/machine-id") == kid.uuid.replace("-", "") + "\n"
        assert await inn.see(kid.name, "/run/posada/generation") == f"{kid.generation}\n"


async def test_later_writes_stay_where_they_are_made(inn: Inn) -> None:
    await inn.machine()
    await note(inn, "one", "before")
    a, b = await inn.vms.fork("one", 2)
    for name in ("one", a.name, b.name):
        await note(inn, name, f"by {name}")
    for name in ("one", a.name, b.name):
        assert await notes(inn, name) == (f"by {name}", f"by {name}")


async def test_a_fork_of_a_fork(inn: Inn) -> None:
    await inn.machine()
    await note(inn, "one", "first")
    (child,) = await inn.vms.fork("one")
    await note(inn, child.name, "second")
    (grandchild,) = await inn.vms.fork(child.name)
    assert grandchild.generation == child.generation + 1
    await note(inn, child.name, "third")
    await inn.vms.delete("one", force=True)
    assert await notes(inn, grandchild.name) == ("second", "second")
    await inn.vms.delete(child.name, force=True)
    assert await notes(inn, grandchild.name) == ("second", "second"), "it stands on its own"
    (last,) = await inn.vms.fork(grandchild.name)
    assert await notes(inn, last.name) == ("second", "second")


async def test_forks_of_a_snapshot(inn: Inn) -> None:
    await inn.machine()
    await note(inn, "one", "then")
    await inn.vms.snapshot("one", "point")
    await note(inn, "one", "later")
    kids = await inn.vms.fork("one", 2, snapshot="point")
    for kid in kids:
        assert await notes(inn, kid.name) == ("then", "then")
        assert await inn.see(kid.name, "/etc/hostname") == kid.name + "\n"
    await note(inn, kids[0].name, "mine")
    assert await notes(inn, kids[1].name) == ("then", "then")
    assert await notes(inn, "one") == ("later", "later")
    await inn.vms.delete_snapshot("one", "point")
    assert await notes(inn, kids[1].name) == ("then", "then"), "a fork outlives its snapshot"


async def test_snapshots_and_restores_of_a_fork(inn: Inn) -> None:
    await inn.machine()
    (kid,) = await inn.vms.fork("one", names=["kid"])
    await note(inn, "kid", "then")
    await inn.vms.snapshot("kid", "point")
    await note(inn, "kid", "later")
    await inn.vms.restore("kid", "point")
    assert await notes(inn, "kid") == ("then", "then")
    assert inn.vms.get("kid").macs == kid.macs


async def test_a_stopped_fork_starts_again_from_its_own_disk(inn: Inn) -> None:
    await inn.machine()
    await note(inn, "one", "source")
    (kid,) = await inn.vms.fork("one", names=["kid"])
    await inn.put("kid", DISK, "kid's")
    await inn.vms.stop("kid")
    await inn.vms.start("kid")
    await inn.vms.wait_ready("kid", timeout=120)
    assert await inn.see("kid", DISK) == "kid's"
    assert await inn.see("kid", "/etc/machine-id") == kid.uuid.replace("-", "") + "\n"


async def test_an_exec_stream_of_the_source_survives(inn: Inn) -> None:
    await inn.machine()
    process = await inn.vms.exec("one", ["cat"], stdin=True)
    await process.write(b"before\n")
    kids = await inn.vms.fork("one", 2)
    await process.write(b"after\n")
    await process.close_stdin()
    result = await process.wait()
    assert result.stdout == "before\nafter\n" and result.exit_code == 0
    for kid in kids:
        assert (await inn.sh(kid.name, "echo", "alive")).stdout == "alive\n"


async def test_many_at_once_from_several_tasks(inn: Inn) -> None:
    await inn.machine()
    made = await asyncio.gather(inn.vms.fork("one", 2), inn.vms.fork("one", 2), inn.vms.snapshot("one"))
    kids = [*made[0], *made[1]]
    assert len({kid.name for kid in kids}) == 4
    assert {vm.state for vm in inn.vms.list()} == {State.RUNNING}


async def test_a_paused_source_stays_paused(inn: Inn) -> None:
    await inn.machine()
    await note(inn, "one", "then")
    await inn.vms.pause("one")
    (kid,) = await inn.vms.fork("one")
    assert inn.vms.get("one").state is State.PAUSED
    assert kid.state is State.RUNNING
    assert await notes(inn, kid.name) == ("then", "then")
    assert await inn.see(kid.name, "/etc/hostname") == kid.name + "\n"


async def test_ports_of_the_children_are_their_own(inn: Inn) -> None:
    await inn.machine()
    mine = await inn.vms.add_port("one", PortSpec(guest=8080))
    kids = await inn.vms.fork("one", 2)
    ports = {mine.host} | {port.host for kid in kids for port in inn.vms.ports(kid.name)}
    assert len(ports) == 3 and 0 not in ports
    assert all(port.guest == 8080 for kid in kids for port in inn.vms.ports(kid.name))


async def test_refused(inn: Inn) -> None:
    await inn.machine()
    for n in (0, -1, 100_000):
        with pytest.raises(SpecError):
            await inn.vms.fork("one", n)
    with pytest.raises(SpecError):
        await inn.vms.fork("one", 2, names=["just-one"])
    await inn.vms.snapshot("one", "disks", kind=SnapshotKind.DISKS)
    with pytest.raises(Unsupported, match="clone"):
        await inn.vms.fork("one", snapshot="disks")


async def test_a_child_that_fails_is_removed_and_the_others_live(inn: Inn) -> None:
    if inn.engine != "fake":
        pytest.skip("only the fake engine fails on demand")
    fake = inn.host.house.engine("fake")
    fake.fail["child b"] = EngineError("no room")  # type: ignore[attr-defined]
    await inn.machine()
    with pytest.raises(ForkError, match="no room") as failed:
        await inn.vms.fork("one", 3, names=["a", "b", "c"])
    assert [vm.name for vm in failed.value.vms] == ["a", "c"]
    assert list(failed.value.failures) == [1]
    assert {vm.name for vm in inn.vms.list()} == {"one", "a", "c"}


async def test_a_fork_that_fails_as_a_whole_changes_nothing(inn: Inn) -> None:
    if inn.engine != "fake":
        pytest.skip("only the fake engine fails on demand")
    await inn.machine()
    before = inn.vms.get("one")
    fake = inn.host.house.engine("fake")
    fake.fail["fork"] = EngineError("refused")  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="refused"):
        await inn.vms.fork("one", 2)
    assert [vm.name for vm in inn.vms.list()] == ["one"]
    after = inn.vms.get("one")
    assert after.disks == before.disks
    await note(inn, "one", "works")
    (kid,) = await inn.vms.fork("one")
    assert await notes(inn, kid.name) == ("works", "works")


async def test_chains_stay_short_however_often_it_is_forked(inn: Inn, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is lost when layers are merged: not what was written before, between or after; not an old snapshot."""
    if not inn.host.house.engine(inn.engine).capabilities().has(Feature.MERGE_LAYERS):
        pytest.skip(f"the engine {inn.engine} does not merge layers")
    monkeypatch.setattr(merging, "DEEP", 3)
    await inn.machine()
    await inn.put("one", "/root/first", "first")
    point = await inn.vms.snapshot("one", "point")
    (keeper,) = await inn.vms.fork("one", names=["keeper"])
    running = inn.vms.get("one").running
    assert running is not None
    merged, opened, depth = 0, [], len(inn.vms.get("one").disks[0].chain)
    for number in range(7):
        await inn.put("one", DISK, f"then {number}")
        await inn.put("one", f"/root/at-{number}", "x" * 100_000)
        (kid,) = await inn.vms.fork("one")
        assert await notes(inn, kid.name) == (None, f"then {number}")
        await inn.vms.delete(kid.name, force=True)
        now = len(inn.vms.get("one").disks[0].chain)
        if now <= depth:
            merged += 1
            opened.append(len(os.listdir(f"/proc/{running.process.pid}/fd")))
        depth = now
        assert depth <= 5
    assert merged >= 2
    assert max(opened) - min(opened) < 4, "merged layers stay open"
    await inn.sh("one", "sync")
    if inn.engine != "fake":
        await inn.sh("one", "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
    assert await inn.see("one", "/root/first") == "first"
    assert [len(await inn.see("one", f"/root/at-{n}") or "") for n in range(7)] == [100_000] * 7
    assert await notes(inn, keeper.name) == (None, None)
    await inn.vms.restore("one", "point")
    assert (await inn.see("one", "/root/first"), await inn.see("one", "/root/at-0")) == ("first", None)
    assert inn.vms.get("one").disks[0].chain[:-1] == point.disks[0].chain
    await inn.vms.delete_snapshot("one", "point")
    (kid,) = await inn.vms.fork("one")
    assert await inn.see(kid.name, "/root/first") == "first"
