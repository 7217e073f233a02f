"""Verbs about this host: doctor, capabilities, recover, version, completion."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from posada.cli import output
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host


@click.command()
@formatted
def version() -> None:
    """Print the version."""
    from posada import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    output.emit({"posada": __version__, "python": python}, lambda: f"posada {__version__}")


@click.command()
@formatted
@hosted
async def doctor(host: Host) -> int:
    """Measure what this host can do, and say what would help. Exits with 1 if something needed is missing."""
    checks = await host.doctor()
    words = {True: "ok", False: "no", None: "-"}
    rows = [(words[check.ok], check.name, check.detail) for check in checks]
    hints = [f"{check.name}: {check.hint}" for check in checks if check.hint and not check.ok]
    data = [{"name": c.name, "ok": c.ok, "detail": c.detail, "hint": c.hint} for c in checks]

    def table() -> str:
        return "\n".join([output.columns(("", "CHECK", "FOUND"), rows), *(f"hint: {hint}" for hint in hints)])

    output.emit(data, table)
    return 1 if any(check.ok is False for check in checks) else 0


@click.command()
@click.argument("engine", required=False)
@formatted
@hosted
async def capabilities(host: Host, engine: str | None) -> None:
    """Show what an engine can do on this host (default: the one posada chooses)."""
    can = await host.capabilities(engine)
    rows = [("yes" if v.ok else "no", feature.value, v.note or v.hint or "") for feature, v in can.features.items()]
    data = {
        "engine": can.engine,
        "accelerator": can.accelerator,
        "version": can.version,
        "max_cpus": can.max_cpus,
        "max_memory": can.max_memory,
        "features": {f.value: {"ok": v.ok, "note": v.note, "hint": v.hint} for f, v in can.features.items()},
    }
    title = f"{can.engine} {can.version} {can.accelerator}".strip()
    output.emit(data, lambda: f"{title}\n{output.columns(('', 'FEATURE', 'NOTE'), rows)}")


@click.command()
@click.option("--rebuild", is_flag=True, help="Make the database anew from the vm.json files beside the disks.")
@formatted
@hosted
async def recover(host: Host, rebuild: bool) -> None:
    """Finish or roll back whatever was interrupted, and clear away what was left behind."""
    import msgspec

    report = await host.recover(rebuild=rebuild)
    data = msgspec.to_builtins(report)

    def table() -> str:
        known = [(key.replace("_", " "), _text(value)) for key, value in data.items() if value]
        return output.fields(known) or "nothing was left undone"

    output.emit(data, table)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes verbs, options and names in your shell.

    \b
    bash:  eval "$(posada completion bash)"                  in ~/.bashrc
    zsh:   eval "$(posada completion zsh)"                   in ~/.zshrc
    fish:  posada completion fish > ~/.config/fish/completions/posada.fish
    """
    from click.shell_completion import get_completion_class

    from posada.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"this click does not know {shell}")
    maker = kind(cli, {}, "posada", "_POSADA_COMPLETE")
    print(maker.source_template % maker.source_vars())
