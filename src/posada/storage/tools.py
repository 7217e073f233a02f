"""Run a host tool (qemu-img, mmdebstrap) that dies with posada, whatever happens to posada.

The tool is a child of a tiny watcher, whose standard input is a pipe that only this process holds open: when posada is
killed (even with SIGKILL) or cancels, the pipe closes and the watcher ends the tool's whole session. A parent-death
signal would do for one process; mmdebstrap is a tree of them, some in other namespaces.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress

from posada.errors import HostError

#: argv: file descriptors to pass on (comma separated), then the tool. Exits with the tool's status.
_WATCHER = """
import os, select, signal, subprocess, sys
fds = [int(n) for n in sys.argv[1].split(",") if n]
tool = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True)
ended = os.pidfd_open(tool.pid)
poll = select.poll()
poll.register(ended, select.POLLIN)
poll.register(0, select.POLLIN | select.POLLHUP)
if not any(fd == ended for fd, _ in poll.poll()):
    poll.unregister(0)
    # TERM first: mmdebstrap unmounts and removes its chroot then.
    for number, grace in ((signal.SIGTERM, 15000), (signal.SIGKILL, None)):
        try:
            os.killpg(tool.pid, number)
        except ProcessLookupError:
            pass
        if poll.poll(grace):
            break
    try:
        os.killpg(tool.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
status = tool.wait()
sys.exit(status if status >= 0 else 128 - status)
"""

_LINE_MAX = 1 << 16
_KEEP_LINES = 200
_NO_SPACE = ("No space left on device", "not enough free space", "Disk quota exceeded")


class ToolFailed(Exception):
    """A tool ended with a non-zero status. ``output`` is the end of what it printed."""

    def __init__(self, tool: str, status: int, output: str) -> None:
        super().__init__(f"{tool} ended with status {status}: {output.strip()[-600:]}")
        self.tool, self.status, self.output = tool, status, output


def find_tool(name: str, package: str) -> str:
    """The path of a host tool. Raises HostError that names the Debian package it comes in."""
    # Users' PATH lacks the sbin directories on Debian; mke2fs lives there.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise HostError(f"{name} is not installed", hint=f"install it with: apt install {package}")
    return path


async def run_tool(
    argv: Sequence[str],
    *,
    package: str,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run a tool to its end; returns the last lines of its stdout and stderr together.

    ``on_line`` sees each line as it comes. Cancelling ends the tool and everything it started before it raises.
    Raises HostError (not installed; disk full) and ToolFailed.
    """
    tool = find_tool(argv[0], package)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _WATCHER, ",".join(map(str, pass_fds)), tool, *argv[1:],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        pass_fds=tuple(pass_fds), start_new_session=True, limit=_LINE_MAX,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
    )  # fmt: skip
    lines: list[str] = []
    try:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("asyncio made no pipes")
        async for line in _lines(process.stdout):
            lines = [*lines[-_KEEP_LINES:], line]
            if on_line is not None:
                on_line(line)
        status = await process.wait()
    finally:
        if process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            await _outlast(process)
    output = "\n".join(lines)
    if status != 0:
        if any(text in output for text in _NO_SPACE):
            raise HostError("the disk is full", hint="free some space and try again")
        raise ToolFailed(argv[0], status, output)
    return output


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their ends; one that never ends is cut into pieces."""
    rest = b""
    while data := await stream.read(_LINE_MAX):
        *whole, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in (*whole, *([rest] if len(rest) > _LINE_MAX else [])):
            yield line.decode("utf-8", "replace")
        rest = b"" if len(rest) > _LINE_MAX else rest
    if rest:
        yield rest.decode("utf-8", "replace")


async def _outlast(process: asyncio.subprocess.Process) -> None:
    """Wait for the watcher, which is bound to end, even while this task is being cancelled again and again."""
    waiter = asyncio.ensure_future(process.wait())
    while not waiter.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(waiter)
