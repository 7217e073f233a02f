"""Snapshots: a tree of points, memory and disks of one instant, and what depends on what."""

from __future__ import annotations

import pytest
from contract_kit import DISK, RAM, Inn

from posada.errors import AlreadyExists, InUse, InvalidState, NotFound, PosadaError, SpecError, Unsupported
from posada.model.records import SnapshotKind
from posada.model.states import State


async def both(inn: Inn, text: str, name: str = "one") -> None:
    await inn.put(name, RAM, text)
    await inn.put(name, DISK, text)


async def test_restore_returns_memory_and_disk_to_one_instant(inn: Inn) -> None:
    before = await inn.machine()
    await both(inn, "then")
    point = await inn.vms.snapshot("one", "point")
    assert point.kind is SnapshotKind.FULL and 0 < point.pause < 5 and point.memory_bytes > 0
    await both(inn, "later")
    after = await inn.vms.restore("one", "point")
    assert after.state is State.RUNNING and after.uuid == before.uuid and after.head == point.id
    assert after.generation > before.generation, "programs that watch it must notice"
    assert (await inn.see("one", RAM), await inn.see("one", DISK)) == ("then", "then")
    assert (await inn.sh("one", "echo", "works")).stdout == "works\n"
    hostname = await inn.see("one", "/etc/hostname")
    assert hostname is None or hostname.strip() == "one", "identity is kept"


async def test_a_tree(inn: Inn) -> None:
    await inn.machine()
    await both(inn, "a")
    a = await inn.vms.snapshot("one", "a")
    await both(inn, "b")
    b = await inn.vms.snapshot("one", "b")
    await inn.vms.restore("one", "a")
    await both(inn, "c")
    c = await inn.vms.snapshot("one", "c")
    assert (a.parent, b.parent, c.parent) == (None, a.id, a.id)
    for name in ("b", "c", "a", "b"):
        await inn.vms.restore("one", name)
        assert (await inn.see("one", RAM), await inn.see("one", DISK)) == (name, name)
    with pytest.raises(InUse) as refused:
        await inn.vms.delete_snapshot("one", "a")
    assert set(refused.value.users) == {"b", "c"}
    await inn.vms.delete_snapshot("one", "b")
    assert inn.vms.get("one").head == a.id, "the head moves to the parent"
    await inn.vms.restore("one", "c")
    assert await inn.see("one", DISK) == "c", "what others stand on is still there"
    await inn.vms.delete_snapshot("one", "a", recursive=True)
    assert inn.vms.snapshots("one") == []
    assert await inn.see("one", DISK) == "c", "the machine itself stands on what it always did"


async def test_restoring_a_machine_that_does_not_run(inn: Inn) -> None:
    await inn.machine()
    await both(inn, "then")
    await inn.vms.snapshot("one", "point")
    await inn.vms.kill("one")
    assert (await inn.vms.restore("one", "point")).state is State.RUNNING
    assert (await inn.see("one", RAM), await inn.see("one", DISK)) == ("then", "then")


async def test_disks_only(inn: Inn) -> None:
    await inn.machine()
    await both(inn, "then")
    live = await inn.vms.snapshot("one", "live", kind=SnapshotKind.DISKS)
    assert live.kind is SnapshotKind.DISKS
    await inn.put("one", DISK, "later")
    with pytest.raises(Unsupported, match="stop"):
        await inn.vms.restore("one", "live")
    await inn.vms.stop("one")
    rest = await inn.vms.snapshot("one")
    assert (rest.kind, rest.parent) == (SnapshotKind.DISKS, live.id)
    with pytest.raises(PosadaError, match="memory"):
        await inn.vms.snapshot("one", kind=SnapshotKind.FULL)
    assert (await inn.vms.restore("one", "live")).state is State.STOPPED
    await inn.vms.start("one")
    await inn.vms.wait_ready("one", timeout=120)
    assert await inn.see("one", DISK) == "then"
    await inn.vms.stop("one")
    await inn.vms.restore("one", rest.name)
    await inn.vms.start("one")
    await inn.vms.wait_ready("one", timeout=120)
    assert await inn.see("one", DISK) == "later"


async def test_a_paused_machine(inn: Inn) -> None:
    await inn.machine()
    await both(inn, "then")
    await inn.vms.pause("one")
    await inn.vms.snapshot("one", "point")
    assert inn.vms.get("one").state is State.PAUSED, "a snapshot does not wake it"
    await inn.vms.resume("one")
    await both(inn, "later")
    await inn.vms.restore("one", "point")
    assert await inn.see("one", RAM) == "then"


async def test_names(inn: Inn) -> None:
    await inn.vms.create(inn.spec(name="one"))
    first = await inn.vms.snapshot("one")
    second = await inn.vms.snapshot("one")
    assert first.name != second.name
    with pytest.raises(AlreadyExists):
        await inn.vms.snapshot("one", first.name)
    with pytest.raises(SpecError):
        await inn.vms.snapshot("one", "a/b")
    with pytest.raises(NotFound):
        await inn.vms.restore("one", "nothing")
    await inn.vms.delete_snapshot("one", second.id[:8])
    assert [s.name for s in inn.vms.snapshots("one")] == [first.name]


async def test_clone(inn: Inn) -> None:
    await inn.machine()
    await both(inn, "then")
    with pytest.raises(InvalidState, match="stop it first"):
        await inn.vms.clone("one")
    await inn.vms.snapshot("one", "point")
    await inn.put("one", DISK, "later")
    old = await inn.vms.clone("one", name="old", snapshot="point")
    await inn.vms.stop("one")
    new = await inn.vms.clone("one", name="new")
    assert old.state is new.state is State.CREATED
    await inn.vms.delete("one", force=True)  # clones stand on their own
    for name, text in (("old", "then"), ("new", "later")):
        await inn.vms.start(name)
        await inn.vms.wait_ready(name, timeout=120)
        assert await inn.see(name, DISK) == text
        assert await inn.see(name, RAM) is None
        assert await inn.see(name, "/etc/machine-id") == inn.vms.get(name).uuid.replace("-", "") + "\n"
