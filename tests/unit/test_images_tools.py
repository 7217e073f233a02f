"""Host tools die with posada, however posada dies, and their failures are told in words."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys

import pytest

from posada.errors import HostError
from posada.storage.tools import ToolFailed, run_tool


async def test_output_and_lines() -> None:
    lines: list[str] = []
    output = await run_tool(["sh", "-c", "echo one; echo two >&2; printf three"], package="dash", on_line=lines.append)
    assert output.splitlines() == lines == ["one", "two", "three"]


async def test_a_line_without_end_is_bounded() -> None:
    lines: list[str] = []
    await run_tool(["sh", "-c", "yes | head -c 1000000 | tr -d '\\n'"], package="dash", on_line=lines.append)
    assert sum(map(len, lines)) == 500_000
    assert max(map(len, lines)) < 200_000


async def test_failure_carries_status_and_output() -> None:
    with pytest.raises(ToolFailed) as caught:
        await run_tool(["sh", "-c", "echo why; exit 7"], package="dash")
    assert caught.value.status == 7
    assert caught.value.output == "why"
    with pytest.raises(ToolFailed) as caught:
        await run_tool(["sh", "-c", "kill -9 $$"], package="dash")
    assert caught.value.status == 128 + 9


async def test_a_missing_tool_names_its_package() -> None:
    with pytest.raises(HostError, match="apt install nosuch-package"):
        await run_tool(["no-such-tool-anywhere"], package="nosuch-package")


async def test_a_full_disk_is_a_host_error() -> None:
    with pytest.raises(HostError, match="the disk is full"):
        await run_tool(["sh", "-c", "echo 'write error: No space left on device' >&2; exit 1"], package="dash")


async def test_descriptors_are_passed_on() -> None:
    read, write = os.pipe()
    try:
        await run_tool(["sh", "-c", f"echo hello > /proc/self/fd/{write}"], package="dash", pass_fds=(write,))
        assert os.read(read, 100) == b"hello\n"
    finally:
        os.close(read)
        os.close(write)


#: Ignores TERM in the grandchild, and tells both pids: killing the child alone would not do.
STUBBORN = "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' & echo $$; wait; sleep 60"


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_dead(*pids: int) -> None:
    """Up to 20 seconds each; a zombie counts as dead."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], 20)[0], f"process {pid} lives on"
        finally:
            os.close(fd)


async def test_cancelling_ends_the_whole_tree() -> None:
    pids: list[int] = []
    both = asyncio.Event()

    def line(text: str) -> None:
        pids.append(int(text))
        if len(pids) == 2:
            both.set()

    task = asyncio.create_task(run_tool(["sh", "-c", STUBBORN], package="dash", on_line=line))
    await both.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_until_dead(*pids)


def test_killing_the_caller_ends_the_whole_tree() -> None:
    program = f"""
import asyncio
from posada.storage.tools import run_tool
asyncio.run(run_tool(["sh", "-c", {STUBBORN!r}], package="dash", on_line=lambda line: print(line, flush=True)))
"""
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    with caller.stdout:
        pids = [int(caller.stdout.readline()) for _ in range(2)]
        assert all(alive(pid) for pid in pids)
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        wait_until_dead(*pids)
