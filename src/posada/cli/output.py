"""What the command line prints: tables or JSON on stdout; errors, in words or as JSON, on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

#: ``table`` or ``json``: what ``--format`` said. It is also how errors are printed.
chosen = "table"


def asked_for(argv: Sequence[str]) -> str:
    """What ``--format`` says, before anything is parsed: errors of parsing are printed so too."""
    for i, arg in enumerate(argv):
        if arg == "--":
            break
        if arg == "--format=json" or (arg == "--format" and list(argv[i + 1 : i + 2]) == ["json"]):
            return "json"
    return "table"


def formatted(function: F) -> F:
    """Give a verb ``--format table|json``."""

    def choose(ctx: click.Context, param: click.Parameter, value: str) -> None:
        global chosen
        chosen = value

    return click.option(
        "--format", type=click.Choice(["table", "json"]), default="table", show_default=True, is_eager=True,
        expose_value=False, callback=choose, help="How to print.",
    )(function)  # fmt: skip


def print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """The callback of ``posada --version``."""
    if value:
        from posada import __version__

        print(f"posada {__version__}")
        ctx.exit()


def emit(data: Any, table: Callable[[], str]) -> None:
    """Print ``data`` as JSON, or what ``table`` makes of it for people."""
    if chosen == "json":
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        text = table()
        if text:
            print(text)


def emit_line(data: Any, text: str) -> None:
    """One item of a stream: a JSON object, or a line of text. It is seen at once."""
    print(json.dumps(data, ensure_ascii=False) if chosen == "json" else text, flush=True)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with aligned columns."""
    lines = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    known = [(name, clean(value)) for name, value in pairs if value != ""]
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in known)


def clean(text: str) -> str:
    """Without control characters: what comes from a guest or a saved state must not drive the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def age(since: float) -> str:
    """How long ago, in one or two letters' precision: ``5s``, ``3m``, ``2h``, ``9d``."""
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length * 2:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def when(moment: float) -> str:
    """A time of day in the local zone: ``2026-01-31 12:00:00``."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) if moment else ""


def note(message: str) -> None:
    """Say something beside the output; not when that is JSON."""
    if chosen != "json":
        print(f"posada: {message}", file=sys.stderr)


def fail(
    message: str, *, kind: str, status: int, hint: str | None = None, more: Mapping[str, Any] | None = None
) -> int:
    """Print an error; the exit status."""
    sys.stdout.flush()
    if chosen == "json":
        error = {"type": kind, "message": message, "hint": hint, "exit_status": status, **(more or {})}
        print(json.dumps({"error": error}, ensure_ascii=False), file=sys.stderr)
    else:
        print(f"posada: error: {message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
    return status


def fail_with(error: Exception) -> int:
    """Print any error that reached the top; the exit status."""
    from posada.errors import ForkError, PosadaError, SpecError

    if isinstance(error, PosadaError):
        more: dict[str, Any] = {}
        if isinstance(error, SpecError):
            more["field"] = error.field
        if isinstance(error, ForkError):
            more["vms"] = [getattr(vm, "uuid", str(vm)) for vm in error.vms]
        return fail(error.message, hint=error.hint, kind=type(error).__name__, status=error.exit_status, more=more)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror}", kind=type(error).__name__, status=1)
    if isinstance(error, (TimeoutError, ValueError, LookupError)) and str(error):
        status = 124 if isinstance(error, TimeoutError) else 1
        return fail(str(error), kind=type(error).__name__, status=status)
    described = f"{type(error).__name__}: {error}"
    return fail(
        f"this is a bug in posada: {described}", kind="Bug", status=1,
        hint="POSADA_DEBUG=1 shows where; please report it",
    )  # fmt: skip


def reader_gone() -> int:
    """Whoever read our output has gone: no error, and nothing more to say. The status is a shell's for SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes at its end
    return 141


def on_terminal() -> bool:
    """Whether progress may be shown."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
