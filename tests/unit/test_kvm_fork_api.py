"""Forks of guests without an agent through the public API, on the kvm engine: toy guests, and the host's own /dev/kvm."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from client_home import paths
from kvm_engine_kit import count, kernel
from kvm_kit import needs_kvm

import posada as values
from posada import aio as api
from posada.engine.kvm import probe
from posada.host.paths import Paths

__all__ = ["paths"]

pytestmark = [needs_kvm, pytest.mark.usefixtures("paths")]


@pytest.fixture
async def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[api.VM]:
    """A machine without image, agent and network; with a disk."""
    monkeypatch.setenv(probe.SLOW, "1")
    file = tmp_path / "kernel"
    file.write_bytes(kernel())
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    disks = [{"name": "root", "source": str(disk)}]
    async with api.run(engine="kvm", boot={"kernel": str(file)}, disks=disks, nics=[], memory="64MiB") as vm:
        yield vm


async def test_copies_of_one_identity_are_made_only_if_one_says_so(toy: api.VM, paths: Paths) -> None:
    with pytest.raises(values.Unsupported, match="would share one identity") as caught:
        await toy.fork(2)
    assert "same_identity" in (caught.value.hint or "")
    async with api.connect() as host:
        assert len(await host.vms.list()) == 1, "nothing is left of the fork that was refused"
        assert await count(paths.machine(toy.uuid), b"+") == 1
        async with contextlib.AsyncExitStack() as stack:
            children = [await stack.enter_async_context(child) for child in await toy.fork(2, same_identity=True)]
            assert [child.state for child in children] == [values.State.RUNNING] * 2
            runtimes = [paths.machine(vm.uuid) for vm in (toy, *children)]
            assert [await count(runtime, b"+" * n) for n, runtime in enumerate(runtimes, 1)] == [2, 3, 4]
            (grandchild,) = await children[1].fork(same_identity=True)
            await stack.enter_async_context(grandchild)
            assert await count(paths.machine(grandchild.uuid)) == 4
            assert grandchild.record.generation == 2
        assert len(await host.vms.list()) == 1


async def test_so_it_is_with_a_snapshot(toy: api.VM, paths: Paths) -> None:
    assert await count(paths.machine(toy.uuid), b"++") == 2
    point = await toy.snapshot("point")
    assert await count(paths.machine(toy.uuid), b"+") == 3
    with pytest.raises(values.Unsupported, match="would share one identity"):
        await point.fork()
    (child,) = await toy.fork(snapshot=point, same_identity=True)
    async with child:
        assert await count(paths.machine(child.uuid)) == 2
