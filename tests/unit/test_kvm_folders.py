"""Folders of a machine of the kvm engine, as far as a toy guest shows them: servers come, serve nobody, and go."""

from __future__ import annotations

import os
import select
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


def _ends(pid: int) -> bool:
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([end], [], [], 10)[0])
    finally:
        os.close(end)


async def test_what_cannot_follow_is_refused_in_words(inn: Inn, shared: tuple[Path, Path], tmp_path: Path) -> None:
    running = await inn.start(folders=[f"{shared[0]}:/work"])
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(CaptureFailed, match="capture of a machine that shares folders"):
        await inn.engine.capture(running, tmp_path / "snapshot", [])
    with pytest.raises(CaptureFailed, match="fork of a machine that shares folders"):
        await inn.engine.fork(running, [inn.launch()], [])
    with pytest.raises(CaptureFailed, match="folders"):  # a child cannot have what its parent has not either
        await inn.engine.fork(running, [inn.launch(folders=[f"{shared[0]}:/work"])], [])
    async with connect(runtime(running)) as session:
        with pytest.raises(EngineError, match="reset of a machine"):
            await session.call(Op.RESET, {})
    await inn.engine.switch(running, [])
