"""Verbs that change a machine's devices: resize, attach, detach, port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from posada.cli import output, shapes
from posada.cli.arguments import vm_argument
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host


@click.command()
@vm_argument
@click.option("--cpus", type=int, metavar="N", help="Virtual processors.")
@click.option("-m", "--memory", metavar="SIZE", help="Memory, like 1GiB.")
@click.option("--disk", metavar="[NAME=]SIZE", help="Grow a disk (root when no name is given).")
@formatted
@hosted
async def resize(host: Host, vm: str, cpus: int | None, memory: str | None, disk: str | None) -> None:
    """Change a machine's processors, memory, or the size of a disk."""
    if cpus is None and memory is None and disk is None:
        raise click.UsageError("say what to change: --cpus, --memory or --disk")
    found = await host.vms.get(vm)
    grown = None
    if disk is not None:
        name, equals, size = disk.partition("=")
        root = found.record.disks[0].name if found.record.disks else "root"
        grown = (name, size) if equals else (root, name)
    await found.resize(cpus=cpus, memory=memory, disk=grown)
    output.emit(shapes.vm_in_full(found.record), lambda: found.record.name)


@click.command()
@vm_argument
@click.argument("name")
@click.option("--size", metavar="SIZE", help="An empty disk of this size.")
@click.option("--source", metavar="FILE", type=click.Path(exists=True, dir_okay=False),
              help="A copy of this qcow2 or raw file.")
@click.option("--readonly", is_flag=True, help="The guest cannot write to it.")
@formatted
@hosted
async def attach(host: Host, vm: str, name: str, size: str | None, source: str | None, readonly: bool) -> None:
    """Add the disk NAME to a machine, running or not."""
    if size is None and source is None:
        raise click.UsageError("an empty disk needs --size; a copy of a file needs --source")
    found = await host.vms.get(vm)
    await found.attach_disk(name, size=size, source=source, readonly=readonly)
    output.emit(shapes.vm_in_full(found.record), lambda: name)


@click.command()
@vm_argument
@click.argument("name")
@formatted
@hosted
async def detach(host: Host, vm: str, name: str) -> None:
    """Take the disk NAME away from a machine, and delete it (snapshots keep theirs)."""
    found = await host.vms.get(vm)
    await found.detach_disk(name)
    output.emit(shapes.vm_in_full(found.record), lambda: name)


@click.command()
@vm_argument
@click.option("-a", "--add", multiple=True, metavar="[[ADDRESS:]HOST:]GUEST[/udp]", help="Forward one. Repeatable.")
@click.option("--rm", "remove", multiple=True, type=int, metavar="GUEST", help="Stop forwarding. Repeatable.")
@formatted
@hosted
async def port(host: Host, vm: str, add: tuple[str, ...], remove: tuple[int, ...]) -> None:
    """Show which ports of this host lead to the machine, and change that."""
    found = await host.vms.get(vm)
    for guest in remove:
        await found.remove_port(guest)
    for text in add:
        await found.add_port(text)
    ports = list(found.ports.values())
    header = ("GUEST", "HOST", "URL")
    output.emit(
        [{**shapes.port(p.record), "url": p.url} for p in ports],
        lambda: output.columns(header, ((f"{p.guest}/{p.protocol}", f"{p.address}:{p.host}", p.url) for p in ports)),
    )
