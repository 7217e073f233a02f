"""``posada``: the tree of verbs and the way out of it (exit statuses, errors).

Modules of verbs import only click and their neighbours at the top; everything else is imported by the verb that runs,
so that ``posada version`` starts in the time Python and click need.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from posada.cli import output

#: Sections of the help, and in each the verbs with the module that holds them.
SECTIONS: dict[str, dict[str, str]] = {
    "Machines": {
        "run": "run", "create": "run", "ps": "listing", "info": "listing", "start": "life", "stop": "life",
        "kill": "life", "pause": "life", "resume": "life", "restart": "life", "wait": "life", "rm": "life",
        "rename": "life",
    },
    "Inside a machine": {
        "exec": "inside", "shell": "inside", "cp": "copy", "console": "console", "logs": "console", "port": "devices",
    },
    "Branches": {"fork": "branch", "clone": "branch", "snapshot": "snapshot"},
    "Devices": {"resize": "devices", "attach": "devices", "detach": "devices"},
    "Looking inside": {"debug": "debug"},
    "Images": {"image": "image"},
    "This host": {
        "doctor": "system", "capabilities": "system", "top": "listing", "op": "operation", "events": "operation",
        "recover": "system", "spec": "spec", "version": "system", "completion": "system", "help": "spec",
    },
}  # fmt: skip
VERBS = {verb: module for section in SECTIONS.values() for verb, module in section.items()}
ALIASES = {"ls": "ps", "list": "ps", "delete": "rm", "inspect": "info", "snap": "snapshot"}


class Tree(click.Group):
    """The verbs, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = ALIASES.get(cmd_name, cmd_name)
        module = VERBS.get(verb)
        if module is None:
            return None
        name = verb if verb not in ("exec", "help") else f"{verb}_"
        command: click.Command = getattr(import_module(f"posada.cli.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], [*VERBS, *ALIASES], n=1)
            hint = f"did you mean: posada {close[0]}" if close else "posada help lists the verbs"
            raise UnknownVerb(f"there is no verb {args[0]!r}", hint) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, verbs in SECTIONS.items():
            rows = []
            for verb in verbs:
                command = self.get_command(ctx, verb)
                if command is not None and not command.hidden:
                    rows.append((verb, command.get_short_help_str(90)))
            with formatter.section(section):
                formatter.write_dl(rows)


class UnknownVerb(click.UsageError):
    """A verb that does not exist, with what may have been meant."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@click.group(cls=Tree, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=output.print_version,
              help="Print the version and exit.")
def cli() -> None:
    """Create, branch, rewind and throw away virtual machines.

    \b
    posada run debian:12                  build the image if needed, boot, open a shell
    posada run debian:12 -- uname -a      one command; its status; the machine gone
    posada run -d --name web -p 80 debian:12
    posada exec web -- ls /               a command in a running machine
    posada fork web -n 8                  eight branches of it, memory shared
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Never returns, never prints a traceback (unless POSADA_DEBUG is set)."""
    sys.exit(execute(sys.argv[1:] if argv is None else argv))


def execute(argv: Sequence[str]) -> int:
    """Run one command line; the exit status."""
    output.chosen = output.asked_for(argv)
    debug = bool(os.environ.get("POSADA_DEBUG"))
    try:
        status = cli.main(args=list(argv), prog_name="posada", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.UsageError as error:
        hint = getattr(error, "hint", None) or (f"{error.ctx.command_path} --help" if error.ctx else None)
        return output.fail(error.format_message(), hint=hint, kind="UsageError", status=2)
    except click.ClickException as error:
        return output.fail(error.format_message(), kind=type(error).__name__, status=1)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError as error:
        return output.fail_with(error) if hasattr(error, "hint") else output.reader_gone()
    except Exception as error:
        if debug:
            raise
        return output.fail_with(error)
    return status if isinstance(status, int) and not isinstance(status, bool) else 0
