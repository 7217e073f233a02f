"""Locks: between tasks, between processes, and gone with their holder."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from posada.errors import Busy
from posada.host.locks import Locks

HOLDER = """
    import asyncio, sys
    from pathlib import Path
    from posada.host.locks import Locks
    async def main():
        async with Locks(Path(sys.argv[1])).hold("vm", "a long snapshot"):
            print("held", flush=True)
            await asyncio.sleep(60)
    asyncio.run(main())
"""


def holder(folder: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)], stdout=subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.stdout.close()
    return process


async def test_one_at_a_time_in_the_order_of_asking(tmp_path: Path) -> None:
    locks, seen, inside = Locks(tmp_path), [], 0

    async def work(number: int) -> None:
        nonlocal inside
        async with locks.hold("vm", f"work {number}"):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            seen.append(number)
            inside -= 1

    await asyncio.gather(*(work(n) for n in range(20)))
    assert seen == list(range(20))


async def test_two_openers_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    async with Locks(tmp_path).hold("vm", "first"):
        with pytest.raises(Busy, match=f"process {os.getpid()} .*first"):
            async with Locks(tmp_path).hold("vm", "second", timeout=0.02):
                pytest.fail("two hold it")
        async with Locks(tmp_path).hold("another", "second", timeout=0.02):
            pass


async def test_another_process_holds_it_until_it_dies(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(Busy, match=f"process {process.pid} .*a long snapshot"):
            async with Locks(tmp_path).hold("vm", "mine", timeout=0.05):
                pytest.fail("two hold it")
        with Locks(tmp_path).attempt("vm", "mine") as held:
            assert not held
        os.kill(process.pid, signal.SIGKILL)
        async with Locks(tmp_path).hold("vm", "mine", timeout=10):
            pass
    finally:
        process.kill()
        process.wait()


async def test_attempt_does_not_wait(tmp_path: Path) -> None:
    locks = Locks(tmp_path)
    with locks.attempt("vm", "first") as held:
        assert held
        with locks.attempt("vm", "second") as again:
            assert not again
    async with locks.hold("vm", "task"):
        with locks.attempt("vm", "second") as again:
            assert not again
    with locks.attempt("vm", "third") as held:
        assert held


async def test_a_forgotten_lock_is_not_shared(tmp_path: Path) -> None:
    """Whoever waits on the file that is removed must not believe that it holds the new one."""
    locks, other = Locks(tmp_path), Locks(tmp_path)
    entered = asyncio.Event()

    async def wait_for_it() -> None:
        async with other.hold("vm", "waiting"):
            entered.set()
            await asyncio.sleep(0.05)

    async with locks.hold("vm", "deleting"):
        waiter = asyncio.create_task(wait_for_it())
        await asyncio.sleep(0.02)
        locks.forget("vm")
    await asyncio.wait_for(entered.wait(), 5)
    with Locks(tmp_path).attempt("vm", "third") as held:
        assert not held, "it is on the new file that the waiter holds its lock"
    await waiter


async def test_a_cancelled_waiter_leaves_nothing(tmp_path: Path) -> None:
    locks = Locks(tmp_path)
    async with locks.hold("vm", "first"):
        waiters = [asyncio.create_task(_take(locks)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
    async with locks.hold("vm", "second", timeout=1):
        pass
    assert locks._queues == {}


async def _take(locks: Locks) -> None:
    async with locks.hold("vm", "waiting"):
        pass


async def test_the_file_of_what_is_gone_goes_when_it_is_released(tmp_path: Path) -> None:
    known = {"kept"}
    locks = Locks(tmp_path, known.__contains__)
    async with locks.hold("kept", "work"), locks.hold("deleted", "it waited for this"):
        pass
    with locks.attempt("deleted", "refresh") as held:
        assert held
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
