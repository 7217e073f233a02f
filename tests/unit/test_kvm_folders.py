"""Folders of a machine of the kvm engine, as far as a toy guest shows them: servers come, serve nobody, and go."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kvm_engine_kit import needs_kvm
from test_kvm_engine import Inn, runtime
from test_kvm_engine import inn as inn

from posada.engine.base import CaptureFailed
from posada.engine.kvm.control import connect
from posada.errors import EngineError, HostError
from posada.proto.monitor import Op

pytestmark = [needs_kvm, pytest.mark.timeout(120)]


def servers(folder: Path) -> list[int]:
    """Processes that have that directory open."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        except OSError:
            continue
        if str(folder) in held:
            found.append(int(pid))
    return found


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


async def test_a_server_for_each_as_long_as_the_machine_lives(inn: Inn, shared: tuple[Path, Path]) -> None:
    one, two = shared
    running = await inn.start(folders=[f"{one}:/work", f"{two}:/data:ro"])
    inspection = await inn.engine.inspect(running)
    assert {"folder0", "folder1"} <= set(inspection.devices)
    pids = [pid for folder in shared for pid in servers(folder)]
    assert len(pids) == 2
    await inn.engine.kill(running)
    assert all(map(_ends, pids))


async def test_a_start_that_fails_leaves_no_server(inn: Inn, shared: tuple[Path, Path]) -> None:
    one, two = shared
    launch = inn.launch(folders=[f"{one}:/work", f"{two}:/data"])
    two.rmdir()
    with pytest.raises(HostError, match="cannot open the folder"):
        await inn.engine.start(launch)
    assert all(map(_ends, servers(one)))
    two.mkdir()
    inn.kernel.write_bytes(b"no kernel")
    with pytest.raises(Exception, match="kernel"):
        await inn.engine.start(inn.launch(folders=[f"{one}:/work"]))
    assert all(map(_ends, servers(one)))


@pytest.mark.parametrize("after", [0.0, 0.02, 0.05, 0.1])
async def test_a_cancelled_start_leaves_no_server(inn: Inn, shared: tuple[Path, Path], after: float) -> None:
    starting = asyncio.ensure_future(inn.engine.start(inn.launch(folders=[f"{each}:/{each.name}" for each in shared])))
    asyncio.get_running_loop().call_later(after, starting.cancel)
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert all(_ends(pid) for folder in shared for pid in servers(folder))


def _ends(pid: int) -> bool:
    try:
        end = os.pidfd_open(pid)
    except OSError as error:  # EINVAL: gone, and its number still names its session (kernels before 6.16)
        assert error.errno in (errno.ESRCH, errno.EINVAL)
        return True
    try:
        return bool(select.select([end], [], [], 10)[0])
    finally:
        os.close(end)


async def test_forks_have_servers_of_their_own(inn: Inn, shared: tuple[Path, Path]) -> None:
    one, two = shared
    spec = [f"{one}:/work", f"{two}:/data:ro"]
    running = await inn.start(folders=spec)
    first = servers(one) + servers(two)
    children = await inn.fork(running, 3, folders=spec)
    await until(lambda: len(servers(one)) == len(servers(two)) == 4)
    twins = [pid for pid in servers(one) + servers(two) if pid not in first]
    (grandchild,) = await inn.fork(children[0], folders=spec)
    await until(lambda: len(servers(one)) == 5)
    await inn.engine.kill(running)
    assert all(map(_ends, first))
    assert len(servers(one)) == 4 and set(twins) <= set(servers(one) + servers(two))
    for each in (*children, grandchild):
        assert (await inn.engine.inspect(each)).devices["folder0"]["pending"] == 0
        await inn.engine.kill(each)
    assert all(map(_ends, servers(one) + servers(two)))


async def until(condition: Callable[[], bool]) -> None:
    """What other processes do by themselves."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


async def test_what_cannot_follow_is_refused_in_words(inn: Inn, shared: tuple[Path, Path], tmp_path: Path) -> None:
    running = await inn.start(folders=[f"{shared[0]}:/work"])
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(CaptureFailed, match="capture of a machine that shares folders"):
        await inn.engine.capture(running, tmp_path / "snapshot", [])
    async with connect(runtime(running)) as session:
        with pytest.raises(EngineError, match="reset of a machine"):
            await session.call(Op.RESET, {})
    await inn.engine.switch(running, [])
