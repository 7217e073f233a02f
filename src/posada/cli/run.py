"""Verbs that make machines: run, create."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from posada.cli import output, shapes
from posada.cli.arguments import TrailingCommand, command_options, complete_image, pairs, seconds
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import VM, Host
    from posada.model.machine import MachineSpec

F = TypeVar("F", bound=Callable[..., Any])

image_argument = click.argument("image", metavar="IMAGE", required=False, shell_complete=complete_image)


def spec_options(function: F) -> F:
    """Options that say what machine is wanted."""
    for decorate in reversed(
        [
            click.option("--name", help="Its name; made up when left out."),
            click.option("--cpus", type=int, metavar="N", help="Virtual processors (default: 1)."),
            click.option("-m", "--memory", metavar="SIZE", help="Memory, like 1GiB (default: 512MiB)."),
            click.option("--nested", is_flag=True, help="Let it run machines of its own."),
            click.option("--disk", "disks", multiple=True, metavar="[NAME=]SIZE",
                         help="Size of the root disk, or with a name an empty disk more. Repeatable."),
            click.option("--folder", "folders", multiple=True, metavar="HOST:GUEST[:ro]",
                         help="Share a directory of this host; ro: the guest only reads it. Repeatable."),
            click.option("-p", "--port", "ports", multiple=True, metavar="[[ADDRESS:]HOST:]GUEST[/udp]",
                         help="Forward a port of this host to the guest. Repeatable."),
            click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", callback=pairs,
                         help="Label it; posada ps -l finds it. Repeatable."),
            click.option("--lifetime", metavar="TIME", help="End it after so long, like 10m."),
            click.option("--idle", metavar="TIME", help="End it when nobody used it for so long."),
            click.option("--engine", metavar="ENGINE", help="qemu, kvm, xen, or auto: the best one here (default)."),
            click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="Of the guest (default: x86_64)."),
            click.option("--hostname", help="Of the guest; its name when left out."),
            click.option("--append", metavar="ARGS", help="More kernel arguments."),
            click.option("--no-network", is_flag=True, help="Without a network interface."),
            click.option("-f", "--file", "file", metavar="SPEC", type=click.Path(dir_okay=False, allow_dash=True),
                         help="A spec in YAML or JSON (- for stdin); the options overrule it."),
        ]
    ):  # fmt: skip
        function = decorate(function)
    return function


def read_spec(options: Mapping[str, Any], image: str | None) -> MachineSpec:
    """The spec that the options describe. Raises SpecError, OSError."""
    from posada.client._fields import build_spec

    base = _read_file(options["file"]) if options["file"] else {}
    fields = {key: options[key] for key in ("name", "cpus", "memory", "lifetime", "idle", "engine", "arch", "hostname")}
    if options["ports"]:
        fields["ports"] = list(options["ports"])
    if options["folders"]:
        fields["folders"] = [*base.get("folders", []), *map(_folder, options["folders"])]
    if options["labels"]:
        fields["labels"] = {**base.get("labels", {}), **options["labels"]}
    if options["append"]:
        fields["boot"] = {**base.get("boot", {}), "append": options["append"]}
    if options["nested"]:
        fields["nested"] = True
    if options["no_network"]:
        fields["nics"] = []
    disks = [dict(disk) for disk in base.get("disks", [])]
    for text in options["disks"]:
        name, equals, size = text.partition("=")
        if not equals:
            disks = [{**(disks[0] if disks else {}), "size": name}, *disks[1:]]
        else:
            disks = disks or [{}]
            disks.append({"name": name, "size": size})
    if disks:
        fields["disks"] = disks
    return build_spec(image, base, fields)


def _folder(text: str) -> dict[str, Any]:
    """``HOST:GUEST[:ro]``, where HOST may be relative to where we are. Raises SpecError."""
    import os

    from posada.model.machine import parse_folder

    folder: dict[str, Any] = parse_folder(text, field="folders")
    return {**folder, "source": os.path.abspath(os.path.expanduser(folder["source"]))}


def _read_file(path: str) -> dict[str, Any]:
    """A spec file as a mapping, checked."""
    import sys
    from pathlib import Path

    import msgspec

    from posada.model.machine import spec_from_json, spec_from_yaml

    text = sys.stdin.read() if path == "-" else Path(path).read_text()
    spec = spec_from_json(text) if path.endswith(".json") or text.lstrip().startswith("{") else spec_from_yaml(text)
    data: dict[str, Any] = msgspec.to_builtins(spec)
    return data


@click.command(cls=TrailingCommand)
@spec_options
@command_options
@click.option("-d", "--detach", is_flag=True, help="Leave it running, a command too, and print its name.")
@click.option("--keep", is_flag=True, help="Keep the machine when the command has ended.")
@click.option("--boot-timeout", metavar="TIME", default="120", show_default=True, callback=seconds,
              help="Give the guest so long to be ready.")
@formatted
@image_argument
@click.argument("command", nargs=-1, metavar="[[--] COMMAND...]", type=click.UNPROCESSED)
@hosted
async def run(
    host: Host,
    /,
    image: str | None,
    command: tuple[str, ...],
    detach: bool,
    keep: bool,
    boot_timeout: float,
    env: Mapping[str, str],
    user: str | None,
    workdir: str | None,
    timeout: float | None,
    interactive: bool,
    tty: bool,
    **options: Any,
) -> int:
    """Make a machine, boot it, and open a shell or run a command in it.

    The image is built if it is not there. The machine is deleted when the shell or the command ends, and the exit
    status is the command's; --keep keeps it. With -d it is left running, and what the command prints goes to the console
    (posada logs).

    \b
    posada run debian:12
    posada run debian:12 -- uname -a
    posada run -d --name web -p 8080:80 --memory 1GiB debian:12
    """
    from posada.cli.progress import Bar

    spec = read_spec(options, image)
    with Bar() as bar:
        vm = await host.vms.run(spec=spec, keep=keep or detach, timeout=boot_timeout, progress=bar)
    if keep or detach:
        status = await _in_it(vm, command, detach, env, user, workdir, timeout, interactive, tty)
        if keep and not detach:
            output.note(f"{vm.record.name} is kept; posada rm -f {vm.record.name} deletes it")
        return status
    async with vm:
        return await _in_it(vm, command, detach, env, user, workdir, timeout, interactive, tty)


async def _in_it(
    vm: VM,
    command: Sequence[str],
    detach: bool,
    env: Mapping[str, str],
    user: str | None,
    workdir: str | None,
    timeout: float | None,
    interactive: bool,
    tty: bool,
) -> int:
    from posada.cli import terminal
    from posada.cli.console import join_console
    from posada.cli.streams import LOGIN_SHELL, run_joined

    if detach:
        if command:
            await vm.spawn(*command, cwd=workdir, env=env, user=user)
        output.emit(shapes.vm(vm.record), lambda: vm.record.name)
        return 0
    argv: Sequence[str] = command
    if not command and not vm.has_agent:
        return await join_console(vm)
    if not command:
        if terminal.both_are_terminals():
            argv, interactive, tty = LOGIN_SHELL, True, True
        else:
            argv, interactive = ("/bin/sh", "-s"), True
    return await run_joined(
        vm, argv, env=env, user=user, workdir=workdir, timeout=timeout, interactive=interactive, tty=tty
    )


@click.command()
@spec_options
@formatted
@image_argument
@hosted
async def create(host: Host, /, image: str | None, **options: Any) -> None:
    """Make a machine and leave it off.

    \b
    posada create debian:12 --name db --memory 2GiB --disk 20GiB
    posada create -f db.yaml
    """
    from posada.cli.progress import Bar

    with Bar() as bar:
        vm = await host.vms.create(spec=read_spec(options, image), progress=bar)
    output.emit(shapes.vm(vm.record), lambda: vm.record.name)
