"""A command in a guest, joined to this process's stdin, stdout, stderr and terminal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from posada.cli import terminal
from posada.errors import GuestError, PosadaError

if TYPE_CHECKING:
    from posada.aio import VM, Process

#: A command that Ctrl-C interrupted gets so long to end by itself, in seconds.
GRACE = 2.0

#: The interactive shell of a guest: its bash if it has one.
LOGIN_SHELL = ("/bin/sh", "-c", "if command -v bash >/dev/null; then exec bash -l; else exec sh -l; fi")


async def run_joined(
    vm: VM,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    workdir: str | None = None,
    timeout: float | None = None,
    interactive: bool = False,
    tty: bool = False,
) -> int:
    """Run it; returns its status as a shell would say it (128 + the signal)."""
    if tty and interactive and not terminal.stdin_is_terminal():
        raise click.UsageError("-t needs a terminal on stdin; leave it out to feed a pipe or a file with -i")
    pty = terminal.size() if tty else False
    process = await vm.exec(
        *argv, stream=True, env=env, user=user, cwd=workdir, timeout=timeout, stdin=interactive or None, pty=pty
    )
    async with process:
        with contextlib.ExitStack() as stack:
            if tty:
                stack.enter_context(_resizing(process))
            if tty and interactive:
                stack.enter_context(terminal.raw())
            feeder = asyncio.create_task(_feed(process)) if interactive else None
            try:
                async for event in process:
                    _print(event.stream, event.data)
                return (await process.wait()).status
            except asyncio.CancelledError:
                await asyncio.shield(_interrupt(process))
                raise
            finally:
                if feeder is not None:
                    feeder.cancel()
                    await asyncio.wait([feeder])


def _print(stream: str, data: bytes) -> None:
    if stream == "stderr":
        terminal.write(2, data)
    else:
        sys.stdout.flush()
        terminal.write(1, data)


async def _feed(process: Process) -> None:
    with contextlib.suppress(GuestError):  # the command has ended, or does not read any more
        async for data in terminal.read_stdin():
            await process.write(data)
        await process.close_stdin()


@contextlib.contextmanager
def _resizing(process: Process):  # type: ignore[no-untyped-def]
    tasks: set[asyncio.Task[None]] = set()

    def changed() -> None:
        task = asyncio.ensure_future(process.resize(*terminal.size()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    with terminal.on_resize(changed):
        yield


async def _interrupt(process: Process) -> None:
    """Ctrl-C is the command's first: it may clean up. What it still prints is shown."""

    with contextlib.suppress(PosadaError, TimeoutError, OSError):
        await process.signal(signal.SIGINT)
        async with asyncio.timeout(GRACE):
            async for event in process:
                _print(event.stream, event.data)
            await process.wait()
