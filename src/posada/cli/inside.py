"""Verbs that run something in a guest: exec, shell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from posada.cli.arguments import TrailingCommand, command_options, vm_argument
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host


@click.command(name="exec", cls=TrailingCommand)
@command_options
@vm_argument
@click.argument("command", nargs=-1, required=False, metavar="[--] COMMAND...", type=click.UNPROCESSED)
@hosted
async def exec_(
    host: Host,
    vm: str,
    command: tuple[str, ...],
    env: Mapping[str, str],
    user: str | None,
    workdir: str | None,
    timeout: float | None,
    interactive: bool,
    tty: bool,
) -> int:
    """Run a command in a machine, without a shell; exits with its status.

    \b
    posada exec web uname -a
    posada exec -it web bash
    echo hello | posada exec -i web -- tee /root/greeting
    """
    from posada.cli.streams import run_joined

    if not command:
        raise click.UsageError("which command? posada exec VM COMMAND...; posada shell VM opens a shell")
    found = await host.vms.get(vm)
    return await run_joined(
        found, command, env=env, user=user, workdir=workdir, timeout=timeout, interactive=interactive, tty=tty
    )


@click.command(cls=TrailingCommand)
@command_options
@vm_argument
@click.argument("command", nargs=-1, metavar="[--] [SCRIPT...]", type=click.UNPROCESSED)
@hosted
async def shell(
    host: Host,
    vm: str,
    command: tuple[str, ...],
    env: Mapping[str, str],
    user: str | None,
    workdir: str | None,
    timeout: float | None,
    interactive: bool,
    tty: bool,
) -> int:
    """Open a shell in a machine, or run a script with its /bin/sh; exits with its status.

    \b
    posada shell web
    posada shell web 'cd /srv && ls | wc -l'
    posada shell web < setup.sh
    """
    from posada.cli import terminal
    from posada.cli.streams import LOGIN_SHELL, run_joined

    found = await host.vms.get(vm)
    argv: tuple[str, ...]
    if command:
        argv = ("/bin/sh", "-c", " ".join(command))
    elif terminal.both_are_terminals():
        argv, interactive, tty = LOGIN_SHELL, True, True
    else:
        argv, interactive = ("/bin/sh", "-s"), True
    return await run_joined(
        found, argv, env=env, user=user, workdir=workdir, timeout=timeout, interactive=interactive, tty=tty
    )
