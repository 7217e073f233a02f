"""The same suite on every engine, through `Host`. ``POSADA_ENGINES=fake,qemu`` chooses; default: all that work here.

The fake engine's machines are made anew for each test. Real guests take seconds to boot, so one *master* is booted for
the session, and each test gets a fork of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from host_kit import add_image, check_consistent, open_host

from posada.host.db import Database
from posada.host.host import Host
from posada.model.exec import ExecResult
from posada.model.machine import MachineSpec, make_spec
from posada.model.records import VmRecord

ROOT = Path(__file__).parents[2]
IMAGE = "debian:12"
MASTER = "master"


def engines() -> list[Any]:
    chosen = os.environ.get("POSADA_ENGINES", "fake,qemu").split(",")
    return [pytest.param(n, marks=[pytest.mark.guest, pytest.mark.timeout(300)] if n != "fake" else []) for n in chosen]


@pytest.fixture(params=engines(), scope="session")
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def debian_image() -> Path:
    """The images directory of the cache that e2e/ uses too, with debian:12 in it: found, or built once."""
    from posada.images.store import ImageStore

    home = Path(os.environ.get("POSADA_TEST_HOME", ROOT / ".cache/e2e"))
    home.mkdir(parents=True, exist_ok=True)
    database = Database(home / "state.db")
    try:
        asyncio.run(ImageStore(home / "images", database).ensure(IMAGE))
    finally:
        database.close()
    return home / "images"


@pytest.fixture(scope="session")
def base(engine: str, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The directory of the session's state, one for each engine; a real engine's holds the running master."""
    memory = "/dev/shm" if engine == "fake" and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pc-", dir=memory) as scratch:
        base = Path(scratch)
        if engine != "fake":
            (base / "home").mkdir()
            (base / "home/images").symlink_to(request.getfixturevalue("debian_image"))
        asyncio.run(_begin(base, engine))
        yield base
        asyncio.run(_end(base))


async def _begin(base: Path, engine: str) -> None:
    async with await open_host(base) as host:
        if engine == "fake":
            add_image(host)
            return
        host.images.collect_garbage()  # finds the images that are there
        await host.vms.create(make_spec(name=MASTER, image=IMAGE, engine=engine, memory="256MiB"))
        await host.vms.start(MASTER)
        await host.vms.wait_ready(MASTER, timeout=120)


async def _end(base: Path) -> None:
    async with await open_host(base) as host:
        for vm in host.vms.list():
            await host.vms.delete(vm.uuid, force=True)
        check_consistent(host)


@dataclass
class Inn:
    """What a test works with: an open host, and short ways to do and to see things."""

    host: Host
    engine: str
    base: Path

    def __post_init__(self) -> None:
        self.vms = self.host.vms

    def spec(self, **fields: Any) -> MachineSpec:
        return make_spec({"image": IMAGE, "engine": self.engine, "memory": "256MiB", **fields})

    async def boot(self, name: str = "one", **fields: Any) -> VmRecord:
        """A new machine, ready."""
        await self.vms.create(self.spec(name=name, **fields))
        await self.vms.start(name)
        await self.vms.wait_ready(name, timeout=120)
        return self.vms.get(name)

    async def machine(self, name: str = "one") -> VmRecord:
        """A running machine, ready; a fork of the master where booting takes long."""
        if self.engine == "fake":
            return await self.boot(name)
        return (await self.vms.fork(MASTER, 1, names=[name]))[0]

    async def sh(self, ref: str, *argv: str) -> ExecResult:
        return await self.vms.run(ref, argv)

    async def put(self, ref: str, path: str, text: str) -> None:
        await (await self.vms.guest(ref)).write_file(path, text, mkdir=True)

    async def see(self, ref: str, path: str) -> str | None:
        """A file's text; None when there is none."""
        from posada.errors import GuestError

        try:
            return (await (await self.vms.guest(ref)).read_file(path)).decode()
        except GuestError as error:
            if error.errno_name == "ENOENT":
                return None
            raise

    async def until(self, condition: Any, timeout: float = 20.0) -> None:
        """Wait until ``condition()`` is true; for what other processes do, and tell nobody of."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the condition did not become true")
            await asyncio.sleep(0.02)


#: One file in the guest's memory, one on its disk.
RAM, DISK = "/dev/shm/note", "/root/note"


@pytest.fixture
async def inn(engine: str, base: Path) -> AsyncIterator[Inn]:
    host = await open_host(base)
    try:
        yield Inn(host, engine, base)
        for vm in host.vms.list():
            if vm.name != MASTER:
                with contextlib.suppress(LookupError):
                    await host.vms.delete(vm.uuid, force=True)
        check_consistent(host)
    finally:
        await host.close()
    assert not any(host.paths.listeners.iterdir())
