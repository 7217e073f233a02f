"""The portal: how the sync API waits, is interrupted, forks and ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from client_home import own_portal, paths

from posada.client._pending import pending
from posada.client._portal import Portal, close_portal, portal
from posada.client._runtime import SyncRuntime
from posada.errors import StateError
from posada.host.paths import Paths

__all__ = ["paths"]

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    with own_portal():
        yield


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_results_and_errors_come_through() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    assert portal().run(give(3)) == 3
    assert portal().call(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(ZeroDivisionError):
        portal().run(fail())


def test_one_portal_for_all_threads() -> None:
    seen: list[tuple[Portal, int]] = []
    threads = [threading.Thread(target=lambda i=i: seen.append((portal(), portal().run(give(i))))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {value for _, value in seen} == set(range(8))
    assert len({id(one) for one, _ in seen}) == 1


def test_ctrl_c_cancels_and_waits_for_the_clean_up() -> None:
    cleaned = threading.Event()
    started = threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()

    def interrupt() -> None:
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        portal().run(work())
    assert cleaned.is_set()
    assert portal().run(give(1)) == 1  # it still works


def test_the_sync_api_inside_its_own_loop_is_refused() -> None:
    async def inside() -> None:
        with pytest.raises(RuntimeError, match=r"posada\.aio"):
            portal().run(give(1))

    portal().run(inside())


def test_an_iterator_that_is_left_is_closed() -> None:
    closed = threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for i in range(10):
                yield i
        finally:
            closed.set()

    runtime = SyncRuntime()
    assert list(zip(runtime.iterate(numbers()), range(3), strict=False)) == [(0, 0), (1, 1), (2, 2)]
    gc.collect()
    assert closed.wait(5)
    assert list(runtime.iterate(numbers())) == list(range(10))


def test_an_iterator_that_is_collected_after_the_end_does_no_harm() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    iterator = SyncRuntime().iterate(numbers())
    assert next(iterator) == 1
    close_portal()
    del iterator
    gc.collect()


def test_objects_made_before_a_fork_refuse_to_work_in_the_child() -> None:
    mine = portal()
    assert mine.run(give(1)) == 1
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = b"wrong"
        try:
            mine.run(give(1))
        except StateError:
            answer = b"%d" % portal().run(give(7))  # a new one works
        finally:
            os.write(write, answer)
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"7"
    os.close(read)
    os.close(write)
    assert mine.run(give(2)) == 2


def test_a_closed_portal_says_so() -> None:
    one = portal()
    close_portal()
    with pytest.raises(StateError, match="closed"):
        one.run(give(1))
    assert portal() is not one


async def test_pending_is_awaited_or_entered() -> None:
    class Thing:
        entered = False

        async def __aenter__(self) -> Thing:
            self.entered = True
            return self

        async def __aexit__(self, *_: object) -> None:
            self.entered = False

    @pending
    async def make() -> Thing:
        """Doc."""
        return Thing()

    assert make.__doc__ == "Doc."
    assert isinstance(await make(), Thing)
    async with make() as thing:
        assert thing.entered
    assert not thing.entered


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import posada
vm = posada.run("toy:1", engine="fake", name="script")
kept = posada.run("toy:1", engine="fake", name="kept", keep=True)
print(vm.exec("echo", "ready").stdout, end="", flush=True)
{rest}
"""


def run_script(rest: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "default", "-c", SCRIPT.format(here=str(HERE), rest=rest)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def machines(paths: Paths) -> set[str]:
    """Names of the machines in the database, as they are."""
    from posada.host.db import Database

    database = Database(paths.database)
    names = {vm.name for vm in database.vms()}
    database.close()
    return names


def test_the_end_of_the_process_deletes_ephemeral_machines(paths: Paths) -> None:
    process = run_script("")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "ready\n", "")
    assert machines(paths) == {"kept"}


def test_ctrl_c_in_a_script_ends_the_command_and_the_machine(paths: Paths) -> None:
    process = run_script("vm.exec('sleep', '60')")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in err
    assert time.monotonic() - began < 10
    assert machines(paths) == {"kept"}


def test_a_forked_child_that_ends_leaves_the_parents_machines_alone(paths: Paths) -> None:
    rest = "import os; pid = os.fork()\nif pid == 0: sys.exit(0)\nos.waitpid(pid, 0)\nprint(vm.exec('echo', 'alive').stdout)"
    process = run_script(rest)
    out, err = process.communicate(timeout=30)
    assert out.split() == ["ready", "alive"], err
