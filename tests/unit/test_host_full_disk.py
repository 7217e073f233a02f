"""A full disk at any moment: a clear error, nothing lost, nothing left. On a small tmpfs, so for root only."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from host_kit import add_image, check_consistent, open_host, place, spec

from posada.errors import PosadaError
from posada.host.host import Host
from posada.model.machine import DiskSpec

__all__ = ["place"]


@pytest.fixture
async def small(place: Path) -> AsyncIterator[Host]:
    """A host whose state directory is nearly full already; its runtime directory is elsewhere."""
    home = place / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "posada-test", str(home)]
    if os.geteuid() != 0 or (await asyncio.to_thread(subprocess.run, mount, capture_output=True)).returncode:
        pytest.skip("only root can mount a tmpfs")
    try:
        host = await open_host(place)
        add_image(host)
        await host.vms.create(spec(name="one"))
        await host.vms.start("one")
        guest = await host.vms.guest("one")
        await guest.write_file("/root/note", "x" * 1_000_000, mkdir=True)
        yield host
        fill(host, leave=None)
        for vm in host.vms.list():
            await host.vms.delete(vm.name, force=True)
        check_consistent(host)
        await host.close()
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(home)], check=True)


def fill(host: Host, *, leave: int | None) -> None:
    """Use up all space but ``leave`` bytes; None: give it back."""
    filler = host.paths.home / "filler"
    filler.unlink(missing_ok=True)
    if leave is not None:
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(host.paths.home).free - leave)


ACTIONS: dict[str, Callable[[Host], Awaitable[object]]] = {
    "create": lambda host: host.vms.create(spec(name="two")),
    "snapshot": lambda host: host.vms.snapshot("one"),
    "fork": lambda host: host.vms.fork("one", 8),
    "attach": lambda host: host.vms.attach_disk("one", DiskSpec(name="data", size=1 << 20)),
}


@pytest.mark.parametrize("leave", [0, 32 << 10, 256 << 10, 1 << 20])
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_full_disk(small: Host, action: str, leave: int) -> None:
    before = small.vms.get("one")
    fill(small, leave=leave)
    failed: PosadaError | None = None
    try:
        await ACTIONS[action](small)
    except PosadaError as error:
        failed = error
    fill(small, leave=None)
    assert failed is None or failed.message
    assert failed is not None or leave > 0, "it cannot have worked"
    await small.recover()
    assert small.vms.get("one").uuid == before.uuid
    assert await (await small.vms.guest("one")).read_file("/root/note") == b"x" * 1_000_000
    check_consistent(small)
    if failed is not None:
        await ACTIONS[action](small)
