"""cp: files and directories between this host and a machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from posada.cli import output
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host
    from posada.model.files import Transfer


def place(text: str) -> tuple[str | None, str]:
    """(machine, path) of ``VM:PATH``; machine None for a path of this host (one with a / before its first colon)."""
    vm, colon, path = text.partition(":")
    if not colon or "/" in vm or not vm:
        return None, text
    return vm, path or "/root"


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@formatted
@hosted
async def cp(host: Host, source: str, target: str) -> None:
    """Copy files and directories into or out of a machine, or between two.

    One side is VM:PATH. A target that is a directory (or ends in /) takes the copy in. With - on the other side it is
    a tar archive on stdin or stdout.

    \b
    posada cp ./src web:/srv/app
    posada cp web:/var/log ./logs
    tar c . | posada cp - web:/srv
    posada cp web:/etc - | tar t
    """
    from posada.cli.progress import Bar

    from_vm, from_path = place(source)
    to_vm, to_path = place(target)
    if from_vm is None and to_vm is None:
        raise click.UsageError("neither side is a machine: write VM:PATH for one of them")
    done: Transfer | None = None
    with Bar(f"copying {source}"):
        if from_vm is not None and to_vm is not None:
            done = await _between(host, from_vm, from_path, to_vm, to_path)
        elif to_vm is not None:
            vm = await host.vms.get(to_vm)
            if from_path == "-":
                await vm.files.write_tar(to_path, _archive())
            else:
                done = await vm.files.upload(from_path, to_path)
        elif from_vm is not None:
            vm = await host.vms.get(from_vm)
            if to_path == "-":
                await _to_stdout(vm.files.read_tar(from_path))
            else:
                done = await vm.files.download(from_path, to_path)
    if done is not None:
        _report(done)


def _report(done: Transfer) -> None:
    for name in done.skipped:
        output.note(f"left out: {output.clean(name)}")
    data = {"files": done.files, "bytes": done.bytes, "skipped": list(done.skipped)}
    output.emit(data, lambda: "")


async def _archive() -> AsyncIterator[bytes]:
    from posada.cli import terminal

    if terminal.stdin_is_terminal():
        raise click.UsageError("- reads a tar archive from stdin, and stdin is a terminal")
    async for data in terminal.read_stdin():
        yield data


async def _to_stdout(pieces: AsyncIterator[bytes]) -> None:
    import sys

    from posada.cli import terminal

    if sys.stdout.isatty():
        raise click.UsageError("- writes a tar archive to stdout, and stdout is a terminal")
    async for data in pieces:
        terminal.write(1, data)


async def _between(host: Host, from_vm: str, from_path: str, to_vm: str, to_path: str) -> Transfer:
    import tempfile
    from pathlib import Path

    source, target = await host.vms.get(from_vm), await host.vms.get(to_vm)
    with tempfile.TemporaryDirectory(prefix="posada-cp-") as scratch:
        await source.files.download(from_path, scratch + "/")
        (copy,) = Path(scratch).iterdir()
        return await target.files.upload(copy, to_path)
