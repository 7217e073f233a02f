"""kill -9 at every step of every action: the next who opens the state finds all of it or nothing, and nothing left over.

The points are found by reading them out of the source, so that a new one is tried without anybody's thinking of it. The
victim is a fork of this process: it is quick, and it dies as any other.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import traceback
from pathlib import Path

import pytest
from host_kit import add_image, check_consistent, machines_of, open_host, place, spec
from host_verbs import VERBS

from posada.host import faults, recovery
from posada.model.states import AT_REST, State

__all__ = ["place"]

SOURCE = Path(faults.__file__).parent


def points() -> list[str]:
    found = set()
    for path in SOURCE.rglob("*.py"):
        found |= set(re.findall(r'faults\.point\("([^"]+)"\)', path.read_text()))
    kinds = {point.partition(".")[0] for point in found} - {"layers"}
    return sorted(found | {f"{kind}.{step}" for kind in kinds for step in ("begun", "ending")})


#: Points in `posada.host.layers` and `merging`, which are not of one action, are tried in these.
LAYERS = {
    "layers.made": ("snapshot", "snapshot_at_rest", "fork", "clone"),
    "layers.recorded": ("snapshot", "snapshot_at_rest", "fork", "clone"),
    "layers.merged": ("merge",),
    "layers.merge-recorded": ("merge",),
    "layers.dropped": ("restore", "restore_at_rest", "delete", "delete_snapshot", "detach"),
}


def cases() -> list[tuple[str, str]]:
    chosen = []
    for point in points():
        kind = point.partition(".")[0].replace("-", "_")
        verbs = LAYERS[point] if kind == "layers" else [v for v in VERBS if v.startswith(kind)]
        if kind in ("snapshot", "delete"):
            verbs = [v for v in verbs if v != "delete_snapshot"]
        chosen += [(verb, point) for verb in verbs]
    return chosen


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake guest dies with its process; nobody is there to be told to go on."""
    monkeypatch.setattr(recovery, "WAKE_TIMEOUT", 0.02)


async def prepare(base: Path) -> None:
    host = await open_host(base)
    add_image(host)
    await host.vms.create(spec(name="one"))
    await host.close()


async def act(verb: str, base: Path) -> None:
    host = await open_host(base)
    try:
        await VERBS[verb](host)
    finally:
        await host.close()


def run(verb: str, base: Path, fault: str) -> int:
    """Do it in a child that meets the fault. Returns its wait status."""
    pid = os.fork()
    if pid == 0:
        faults.arm(fault)
        try:
            asyncio.run(act(verb, base))
        except BaseException:
            if not fault.endswith(("!", "~")):
                traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def reopened(base: Path) -> None:
    """What must hold whatever was interrupted."""
    host = await open_host(base)
    try:
        vms = host.vms.list()
        check_consistent(host)
        assert all(vm.state in AT_REST | {State.RUNNING} for vm in vms)
        for vm in vms:
            await host.vms.delete(vm.name, force=True)
        check_consistent(host)
        assert not any(host.paths.vms.iterdir())
        assert not any(host.paths.layers.iterdir())
    finally:
        await host.close()
    assert not any(host.paths.listeners.iterdir()), "a listener is left"
    assert not machines_of(base), "a machine's process is left"


HOW = {"killed": "", "failed": "!", "cancelled": "~"}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("verb", "point"), cases())
def test_all_or_nothing(verb: str, point: str, how: str, place: Path) -> None:
    asyncio.run(prepare(place))
    status = run(verb, place, point + HOW[how])
    if status == 0 and how != "cancelled":  # a cancellation takes effect at the next await, if there is one
        pytest.skip("this action does not pass that point")
    assert status in (0, -signal.SIGKILL if how == "killed" else 3)
    asyncio.run(reopened(place))


def test_every_point_is_passed_by_some_action(place: Path) -> None:
    """A point that nothing passes is a step that is not tested."""
    passed: set[str] = set()
    original = faults.point
    faults.point = passed.add  # type: ignore[assignment]
    try:
        for verb in VERBS:
            base = place / verb
            asyncio.run(prepare(base))
            asyncio.run(act(verb, base))
            asyncio.run(reopened(base))
    finally:
        faults.point = original
    assert passed >= set(points())
