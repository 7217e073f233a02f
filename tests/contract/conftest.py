"""The same suite on every engine, through `Host`. ``POSADA_ENGINES=fake,qemu,kvm`` chooses; default: all that work here.

The fake engine's machines are made anew for each test. Real guests take seconds to boot, so one *master* is booted for
the session, and each test gets a fork of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_kit import IMAGE, MASTER, Inn
from host_kit import add_image, check_consistent, open_host

from posada.engine.registry import probe
from posada.host.db import Database
from posada.model.machine import make_spec

ROOT = Path(__file__).parents[2]


def engines() -> list[Any]:
    given = os.environ.get("POSADA_ENGINES")
    chosen = given.split(",") if given else ["fake", "qemu", *(["kvm"] if probe("kvm").ok else [])]
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
