"""Opening the state: paths, reboots, ephemeral machines of dead owners, a database that is lost."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from host_kit import add_image, check_consistent, open_host, place, spec

from posada.errors import HostError, NotFound, StateError
from posada.host import faults, names, process
from posada.host.bootline import command_line
from posada.host.paths import MAX_RUNTIME, Paths
from posada.host.process import NOBODY, Process
from posada.model.states import State

__all__ = ["place"]


def test_paths_from_the_environment(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    for name in ("POSADA_HOME", "POSADA_RUNTIME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Paths.default() == Paths(Path("/var/lib/posada"), Path("/run/posada"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/d")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/r")
    assert Paths.default() == Paths(Path("/d/posada"), Path("/r/posada"))
    monkeypatch.setenv("POSADA_HOME", "/h")
    monkeypatch.setenv("POSADA_RUNTIME", "/x")
    assert Paths.default() == Paths(Path("/h"), Path("/x"))
    assert Paths.default(Path("/a"), Path("/b")) == Paths(Path("/a"), Path("/b"))


def test_a_runtime_directory_of_somebody_else_is_refused(place: Path) -> None:
    paths = Paths(place / "home", place / "run")
    paths.make()
    assert stat.S_IMODE(paths.runtime.stat().st_mode) == 0o700
    paths.runtime.chmod(0o777)
    with pytest.raises(StateError, match="private"):
        paths.make()
    with pytest.raises(HostError, match="POSADA_RUNTIME"):
        Paths(place / "home", place / ("x" * MAX_RUNTIME)).make()
    (place / "file").touch()
    with pytest.raises(HostError, match="cannot make"):
        Paths(place / "file/home", place / "run2").make()


def test_recorded_paths_stay_inside(place: Path) -> None:
    paths = Paths(place / "home", place / "run")
    assert paths.absolute("layers/x") == place / "home/layers/x"
    for bad in ("../x", "/etc/passwd", "layers/../../x"):
        with pytest.raises(StateError):
            paths.absolute(bad)


def test_processes() -> None:
    mine = process.me()
    assert process.alive(mine)
    assert not process.alive(Process(mine.pid, mine.start + 1)), "the pid was given to somebody else"
    assert not process.alive(NOBODY)
    assert not process.alive(None)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert process.start_time(pid) is None, "a zombie is dead"
    os.waitpid(pid, 0)


def test_names() -> None:
    taken: set[str] = set()
    for _ in range(200):
        taken.add(names.generate(lambda name: name in taken))
    assert len(taken) == 200
    busy = iter([True] * 25)
    assert names.generate(lambda name: next(busy, False)).count("-") == 2


def test_command_line() -> None:
    line = command_line(
        agent=True, root=True, hostname="one", network=True, emulated=True, image_append="a=1", user_append=" b=2 "
    )
    assert line == (
        "console=ttyS0 quiet mitigations=off norandmaps posada.root=/dev/vda posada.rootfs=ext4 posada.rw=1 posada.hostname=one "
        "posada.net=10.0.2.15/24 posada.gw=10.0.2.2 posada.dns=10.0.2.3 a=1 b=2"
    )
    plain = command_line(
        agent=False,
        root=True,
        hostname="x",
        network=True,
        emulated=False,
        image_append="",
        user_append="root=/dev/vda1",
    )
    assert plain == "console=ttyS0 quiet root=/dev/vda1"


async def test_after_a_reboot_nothing_is_alive(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = await open_host(place)
    add_image(host)
    for name in ("runs", "rests", "mortal"):
        await host.vms.create(spec(name=name, ephemeral=name == "mortal"))
    await host.vms.start("runs")
    running = host.vms.get("runs")
    # A process that has the pid and start time of the machine, by chance, after the reboot: this one.
    faked = msgspec.structs.replace(running.running, process=process.me())
    await host.vms.kill("runs")
    host.db.put_vm(msgspec.structs.replace(running, running=faked))
    await host.close()

    monkeypatch.setattr("posada.host.host.boot_id", lambda: "another")
    monkeypatch.setattr("posada.host.recovery.boot_id", lambda: "another")
    host = await open_host(place)
    assert host.vms.get("runs").state is State.CRASHED
    assert "restarted" in (host.vms.get("runs").exit or "")
    assert host.vms.get("rests").state is State.CREATED
    with pytest.raises(NotFound):
        host.vms.get("mortal")
    await host.vms.start("runs")
    for name in ("runs", "rests"):
        await host.vms.delete(name, force=True)
    await host.close()
    host = await open_host(place)
    check_consistent(host)
    assert host.db.vms() == []
    await host.close()


async def test_an_ephemeral_machine_of_a_dead_owner_is_deleted(place: Path) -> None:
    host = await open_host(place)
    add_image(host)
    vm = await host.vms.create(spec(name="mortal", ephemeral=True))
    await host.vms.start("mortal")
    assert host.vms.get("mortal").owner == process.me()
    host.db.put_vm(msgspec.structs.replace(host.vms.get("mortal"), owner=Process(1, 1)))
    assert host.vms.list() == [], "it is not shown any more"
    with pytest.raises(NotFound):
        host.vms.get(vm.uuid)
    await host.close()
    host = await open_host(place)
    check_consistent(host)
    assert host.db.vm(vm.uuid) is None
    await host.close()


async def test_a_lost_database_is_rebuilt(place: Path) -> None:
    host = await open_host(place)
    add_image(host)
    await host.vms.create(spec(name="one", labels={"a": "b"}, disks=[{"name": "root"}, {"name": "d", "size": "1MiB"}]))
    await host.vms.start("one")
    await (await host.vms.guest("one")).write_file("/root/note", "kept", mkdir=True)
    await host.vms.snapshot("one", "point")
    await host.vms.fork("one", names=["kid"])
    for name in ("one", "kid"):
        await host.vms.kill(name)
    before, points = host.vms.list(), host.vms.snapshots("one")
    await host.close()
    (place / "home/state.db").write_bytes(b"\0garbage" * 1000)
    for extra in place.glob("home/state.db-*"):
        extra.unlink()

    with pytest.raises(StateError, match="rebuild"):
        await open_host(place)
    from posada.host.host import Host

    host = await Host.open(place / "home", place / "run", salvage=True)
    add_image(host)
    report = await host.recover(rebuild=True)
    assert set(report.rebuilt) == {"one", "kid"} and report.problems == ()
    assert host.vms.list() == before
    assert host.vms.snapshots("one") == points
    check_consistent(host)
    await host.vms.restore("one", "point")
    assert await (await host.vms.guest("one")).read_file("/root/note") == b"kept"
    for name in ("one", "kid"):
        await host.vms.delete(name, force=True)
    check_consistent(host)
    await host.close()


async def test_a_rebuild_takes_only_what_is_whole(place: Path) -> None:
    host = await open_host(place)
    add_image(host)
    for name in ("good", "no-disk", "bad-json", "other-uuid"):
        await host.vms.create(spec(name=name))
    records = {vm.name: vm for vm in host.vms.list()}
    paths = host.paths
    next(paths.disks(records["no-disk"].uuid).iterdir()).unlink()
    paths.vm_json(records["bad-json"].uuid).write_text("{")
    paths.vm_json(records["other-uuid"].uuid).write_bytes(paths.vm_json(records["good"].uuid).read_bytes())
    host.db.forget_all()
    report = await host.recover(rebuild=True)
    assert report.rebuilt == ("good",)
    assert len(report.problems) == 3
    assert all(paths.vm(vm.uuid).is_dir() for vm in records.values()), "nothing is deleted"
    again = await host.recover(rebuild=True)
    assert again.rebuilt == ()
    await host.close()


async def test_a_rebuild_from_an_old_vm_json_never_writes_to_a_frozen_layer(place: Path) -> None:
    host = await open_host(place)
    add_image(host)
    vm = await host.vms.create(spec(name="one"))
    old = host.paths.vm_json(vm.uuid).read_bytes()
    await host.vms.snapshot("one", "point")
    host.paths.vm_json(vm.uuid).write_bytes(old)
    host.db.forget_all()
    await host.recover(rebuild=True)
    (disk,), (point,) = host.vms.get("one").disks, host.vms.snapshots("one")
    assert disk.chain[:-1] == point.disks[0].chain
    for path in host.paths.disks(vm.uuid).iterdir():  # the top that the old vm.json did not know
        if path.name != f"root-{disk.chain[-1][:8]}.qcow2":
            path.unlink()
    check_consistent(host)
    await host.vms.delete("one")
    await host.close()


async def test_one_state_directory_has_one_runtime_directory(place: Path) -> None:
    from posada.host.host import Host

    host = await open_host(place)
    add_image(host)
    await host.vms.create(spec(name="one"))
    await host.close()
    elsewhere = await Host.open(place / "home", place / "other")
    await elsewhere.vms.start("one")
    with pytest.raises(StateError, match="POSADA_RUNTIME"):
        await open_host(place)
    await elsewhere.vms.delete("one", force=True)
    await elsewhere.close()
    await (await open_host(place)).close()


async def test_two_hosts_do_the_same_thing_at_once(place: Path) -> None:
    first, second = await open_host(place), await open_host(place)
    add_image(first)
    await first.vms.create(spec(name="one"))
    results = await asyncio.gather(*(host.vms.start("one") for host in (first, second)), return_exceptions=True)
    assert sorted(type(r).__name__ for r in results) == ["InvalidState", "VmRecord"]
    results = await asyncio.gather(
        *(host.vms.delete("one", force=True) for host in (first, second)), return_exceptions=True
    )
    assert sorted(type(r).__name__ for r in results) == ["NoneType", "NotFound"]
    check_consistent(first)
    await first.close()
    await second.close()


async def test_doctor(place: Path) -> None:
    host = await open_host(place)
    checks = {check.name: check for check in host.doctor()}
    assert checks["python"].ok
    assert checks["state directory"].ok
    assert "disk space" in checks and "memory" in checks
    assert all(check.hint for check in checks.values() if check.ok is False)
    await host.close()


async def test_who_stays_open_puts_right_what_others_left(place: Path) -> None:
    """A long-lived process does not wait for somebody to open the state anew."""
    host = await open_host(place)
    add_image(host)
    await host.vms.create(spec(name="one"))
    pid = os.fork()
    if pid == 0:
        faults.arm("clone.grown")
        _in_a_new_loop(_clone(place))
    await asyncio.to_thread(os.waitpid, pid, 0)
    assert len(host.vms.list()) == 2, "the half clone is seen once, by who notices"
    async for event in host.events.follow(after=0):
        if event.kind == "operation.recovered":
            break
    assert [vm.name for vm in host.vms.list()] == ["one"]
    check_consistent(host)
    await host.close()


async def _clone(place: Path) -> None:
    host = await open_host(place)
    await host.vms.clone("one")


def _in_a_new_loop(work: Coroutine[Any, Any, None]) -> None:
    """In a fork of a process whose loop runs: as if that had never been."""
    asyncio._set_running_loop(None)
    try:
        asyncio.new_event_loop().run_until_complete(work)
    finally:
        os._exit(1)
