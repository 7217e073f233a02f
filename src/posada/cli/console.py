"""Verbs of the serial console: console, logs."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

import click

from posada.cli import output
from posada.cli.arguments import vm_argument
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import VM, Console, Host

#: Ctrl-], as in telnet and virsh.
DETACH = b"\x1d"


@click.command()
@vm_argument
@hosted
async def console(host: Host, vm: str) -> int:
    """Join a machine's serial console; Ctrl-] leaves it. Recent output comes first."""
    return await join_console(await host.vms.get(vm))


async def join_console(vm: VM) -> int:
    """Until the detach key, the end of stdin, or the end of the machine."""
    from posada.cli import terminal

    live = terminal.stdin_is_terminal()
    async with vm.console() as stream:
        with contextlib.ExitStack() as stack:
            if live:
                output.note(f"joined the console of {vm.record.name}; Ctrl-] leaves it")
                stack.enter_context(terminal.raw())
            reading = asyncio.create_task(_show(stream))
            typing = asyncio.create_task(_type(stream, live))
            try:
                await asyncio.wait([reading, typing] if live else [reading], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reading, typing):
                    task.cancel()
                await asyncio.wait([reading, typing])
        for task in (reading, typing):
            if not task.cancelled():
                task.result()
    if live:
        output.note("left the console")
    return 0


async def _show(stream: Console) -> None:
    from posada.cli import terminal

    async for data in stream:
        terminal.write(1, data)


async def _type(stream: Console, live: bool) -> None:
    from posada.cli import terminal

    async for data in terminal.read_stdin():
        before, key, _ = data.partition(DETACH) if live else (data, b"", b"")
        if before:
            await stream.write(before)
        if key:
            return


@click.command()
@vm_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the machine ends.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last lines.")
@hosted
async def logs(host: Host, vm: str, follow: bool, lines: int | None) -> None:
    """Print what a machine's console has said."""
    from posada.cli import terminal

    found = await host.vms.get(vm)
    shown = _harmless if sys.stdout.isatty() else bytes
    if not follow:
        terminal.write(1, shown(_last((await found.logs()).encode(), lines)))
        return
    first = True
    async for data in found.follow_logs():
        terminal.write(1, shown(_last(data, lines) if first else data))
        first = False


def _last(text: bytes, lines: int | None) -> bytes:
    if lines is None:
        return text
    return b"".join(text.splitlines(keepends=True)[-lines:] if lines else [])


def _harmless(text: bytes) -> bytes:
    """For a terminal, which a guest must not drive: colours go, too."""
    return b"\n".join(output.clean(line.decode(errors="replace").expandtabs()).encode() for line in text.split(b"\n"))
