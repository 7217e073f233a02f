"""What several verbs share: arguments that complete, options, and commands with options of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


def _names(what: str) -> list[str]:
    """Names on this host, for completion. Completion never complains: no names on any error."""
    import asyncio

    async def collect() -> list[str]:
        from posada.client._async.host import connect

        async with connect() as host:
            if what == "vm":
                return [vm.record.name for vm in await host.vms.list()]
            return [name for image in await host.images.list() for name in image.names]

    try:
        return asyncio.run(collect())
    except Exception:
        return []


def complete_vm(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in _names("vm") if name.startswith(incomplete)]


def complete_image(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in _names("image") if name.startswith(incomplete)]


vm_argument = click.argument("vm", metavar="VM", shell_complete=complete_vm)
vms_argument = click.argument("vms", metavar="VM...", nargs=-1, required=True, shell_complete=complete_vm)


def seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A duration option: ``90``, ``10m``, ``2h``."""
    if value is None:
        return None
    from posada.model.units import parse_duration

    return parse_duration(value, field=param.name or "duration")


def pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """A repeated ``KEY=VALUE`` option."""
    out = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", ctx=ctx, param=param)
        out[key] = rest
    return out


def environment(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """A repeated ``KEY=VALUE`` option, where ``KEY`` alone takes the value from here."""
    import os

    known = [v if "=" in v else f"{v}={os.environ[v]}" for v in values if "=" in v or v in os.environ]
    return pairs(ctx, param, known)


def command_options(function: F) -> F:
    """Options of verbs that run a command in a guest."""
    for decorate in reversed(
        [
            click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", callback=environment,
                         help="Set a variable (KEY alone: as it is here). Repeatable."),
            click.option("-u", "--user", metavar="USER[:GROUP]", help="Run as this user of the guest (default: root)."),
            click.option("-w", "--workdir", metavar="DIR", help="Run in this directory of the guest."),
            click.option("--timeout", metavar="TIME", callback=seconds,
                         help="Kill the command after so long (90, 10m) and exit with 124."),
            click.option("-i", "--interactive", is_flag=True, help="Feed this command's stdin to it."),
            click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
        ]
    ):  # fmt: skip
        function = decorate(function)
    return function


class TrailingCommand(click.Command):
    """A verb whose last argument, ``command``, is a command line of its own.

    Options are the verb's until the command begins: after ``--``, or else at the first word beyond the verb's own
    arguments. So ``posada run debian:12 --cpus 2 -- ls -l`` and ``posada exec web ls -l`` both mean what they say.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        split = self._command_at(args)
        if split is None:
            return super().parse_args(ctx, args)
        own, command = args[:split], args[split:]
        rest = super().parse_args(ctx, own)
        ctx.params["command"] = tuple(command[1:] if command[:1] == ["--"] else command)
        return rest

    def _command_at(self, args: Sequence[str]) -> int | None:
        takes_value = {
            name: not option.is_flag and not option.count
            for option in self.params
            if isinstance(option, click.Option)
            for name in (*option.opts, *option.secondary_opts)
        }
        words = sum(isinstance(p, click.Argument) and p.name != "command" for p in self.params)
        i = 0
        while i < len(args):
            arg = args[i]
            if arg == "--":
                return i
            if arg.startswith("--") and "=" not in arg:
                i += takes_value.get(arg, False)
            elif arg.startswith("-") and len(arg) > 1 and not arg.startswith("--"):
                # A cluster of short options: the first that takes a value takes the rest, or else the next word.
                for at, letter in enumerate(arg[1:], 2):
                    if takes_value.get(f"-{letter}", False):
                        i += at == len(arg)
                        break
            elif not arg.startswith("-") or arg == "-":
                if words == 0:
                    return i
                words -= 1
            i += 1
        return None
