"""kill -9 in the middle of an action on real machines: the next who opens the state puts everything right.

What tests/unit/test_host_faults.py does with fake machines at every step; here at those where an engine is involved.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from contract_kit import DISK, MASTER, RAM, Inn

from posada.host import merging
from posada.host.host import Host
from posada.model.capabilities import Feature
from posada.model.states import AT_REST, State

VICTIM = """
import asyncio, sys
from pathlib import Path
from posada.host.host import Host

async def main():
    host = await Host.open(Path(sys.argv[1]) / "home", Path(sys.argv[1]) / "run")
    await eval(sys.argv[2], {"vms": host.vms})

asyncio.run(main())
"""

ACTIONS = {
    "start": "vms.start('rests')",
    "snapshot": "vms.snapshot('one')",
    "restore": "vms.restore('one', 'point')",
    "fork": "vms.fork('one', 2)",
    "fork-snapshot": "vms.fork('one', 2, snapshot='point')",
    "delete": "vms.delete('one', force=True)",
}

CASES = [
    ("start", "start.started"),
    ("snapshot", "layers.recorded"),
    ("snapshot", "snapshot.captured"),
    ("snapshot", "snapshot.written"),
    ("restore", "restore.killed"),
    ("restore", "restore.started"),
    ("restore", "restore.recorded"),
    ("fork", "fork.grown"),
    ("fork", "fork.switched"),
    ("fork", "fork.reset"),
    ("fork", "fork.ready"),
    ("fork-snapshot", "fork.switched"),
    ("delete", "delete.killed"),
]


@pytest.fixture(autouse=True)
def only_where_machines_outlive_processes(inn: Inn) -> None:
    if inn.engine == "fake":
        pytest.skip("a fake guest dies with the process that made it")


def processes(base: Path) -> set[int]:
    """Every other process that has this state in its command line (keepers) or a disk of it open (monitors)."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            opened = [os.readlink(link) for link in (folder / "fd").iterdir()]
            if f"{base}/run/vms/".encode() in (folder / "cmdline").read_bytes() or any(
                path.startswith((f"{base}/home/vms/", f"{base}/home/layers/")) for path in opened
            ):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


async def killed(inn: Inn, action: str, point: str) -> None:
    """A process that does ``action``, and dies at ``point``."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "POSADA_FAULT": point}
    argv = [sys.executable, "-c", VICTIM, str(inn.base), ACTIONS[action]]
    victim = await asyncio.to_thread(subprocess.run, argv, env=env, capture_output=True, timeout=120)
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()


@pytest.mark.parametrize(("action", "point"), CASES)
async def test_a_kill_in_the_middle(inn: Inn, action: str, point: str) -> None:
    await inn.machine()
    await inn.put("one", RAM, "then")
    await inn.put("one", DISK, "then")
    await inn.sh("one", "sync")
    await inn.vms.snapshot("one", "point")
    if action == "start":
        await inn.vms.create(inn.spec(name="rests"))
    await killed(inn, action, point)
    async with await Host.open(inn.base / "home", inn.base / "run") as host:
        assert not host.db.open_operations()
        names = {vm.name for vm in host.vms.list()}
        assert names >= ({MASTER} if action == "delete" else {MASTER, "one"})
        assert all(vm.state in AT_REST | {State.RUNNING} for vm in host.vms.list())
    if action == "delete":
        assert "one" not in names
    else:
        if inn.vms.get("one").state is not State.RUNNING:
            await inn.vms.restore("one", "point")
        assert (await inn.see("one", RAM), await inn.see("one", DISK)) == ("then", "then")
        await inn.put("one", DISK, "works")
        (kid,) = await inn.vms.fork("one")
        assert await inn.see(kid.name, DISK) == "works"
    for vm in inn.vms.list():
        if vm.name != MASTER:
            await inn.vms.delete(vm.uuid, force=True)
    expected = {r.process.pid for vm in inn.vms.list() if (r := vm.running)}
    expected |= {r.keeper.pid for vm in inn.vms.list() if (r := vm.running) and r.keeper}
    await inn.until(lambda: processes(inn.base) <= expected)
    assert processes(inn.base) == expected, "a process of the master is not seen: this test sees nothing"


async def test_a_layer_the_machine_never_got_hides_nothing(inn: Inn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names an empty layer that the machine does not have, below others that it has. They are merged."""
    await inn.machine()
    await killed(inn, "fork", "layers.recorded")
    async with await Host.open(inn.base / "home", inn.base / "run"):
        pass
    for number in range(3):
        await inn.put("one", f"{DISK}{number}", str(number))
        await inn.sh("one", "sync")
        (kid,) = await inn.vms.fork("one")
        assert await inn.see(kid.name, f"{DISK}{number}") == str(number)
        await inn.vms.delete(kid.uuid, force=True)
    before = len(inn.vms.get("one").disks[0].chain)
    monkeypatch.setattr(merging, "DEEP", 2)
    await inn.vms.snapshot("one", "late")
    if inn.host.house.engine(inn.engine).capabilities().has(Feature.MERGE_LAYERS):
        assert len(inn.vms.get("one").disks[0].chain) < before
    await inn.vms.stop("one")
    await inn.vms.start("one")
    await inn.vms.wait_ready("one", timeout=120)
    assert [await inn.see("one", f"{DISK}{number}") for number in range(3)] == ["0", "1", "2"]
