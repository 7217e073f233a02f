"""Verbs that branch machines: fork, clone."""

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
@click.argument("forks", nargs=-1, metavar="[N | NAME...]")
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many.")
@click.option("-s", "--snapshot", metavar="NAME", help="Fork this snapshot of it instead of the machine as it runs.")
@click.option("--name", "names", multiple=True, metavar="NAME", help="Name of a fork. Repeatable.")
@click.option(
    "--same-identity",
    is_flag=True,
    help="Change nothing inside: same random numbers, names, keys, addresses. Needs no agent.",
)
@formatted
@hosted
async def fork(
    host: Host,
    vm: str,
    forks: tuple[str, ...],
    count: int,
    snapshot: str | None,
    names: tuple[str, ...],
    same_identity: bool,
) -> int:
    """Make new machines from a running one: memory shared, identity new. It goes on running.

    \b
    posada fork web 8
    posada fork web red green blue
    posada fork web --snapshot base trial
    """
    from posada.cli.progress import Bar
    from posada.errors import ForkError

    if len(forks) == 1 and forks[0].isdecimal():
        count = int(forks[0])
        if not 1 <= count <= 1000:
            raise click.UsageError(f"{count} forks are not between 1 and 1000")
    else:
        names = (*forks, *names)
    if names:
        if count not in (1, len(names)):
            raise click.UsageError(f"{len(names)} names for {count} forks")
        count = len(names)
    source = await host.vms.get(vm)
    failed: ForkError | None = None
    with Bar(f"forking {vm}") as bar:
        try:
            # The forks outlive this process, even those of an ephemeral machine of another one.
            made = await source.fork(
                count,
                snapshot=snapshot,
                names=names or None,
                ephemeral=False,
                same_identity=same_identity,
                progress=bar,
            )
        except ForkError as error:
            failed, made = error, error.vms
    records = [child.record for child in made]
    output.emit([shapes.vm(record) for record in records], lambda: "\n".join(record.name for record in records))
    return output.fail_with(failed) if failed is not None else 0


@click.command()
@vm_argument
@click.argument("name", required=False)
@click.option("-s", "--snapshot", metavar="NAME", help="Clone the disks of this snapshot of it.")
@formatted
@hosted
async def clone(host: Host, vm: str, name: str | None, snapshot: str | None) -> None:
    """Make a new machine, off, with the disks of one that is off (or of a snapshot)."""
    source = await host.vms.get(vm)
    made = await (await source.clone(name, snapshot=snapshot)).keep()
    output.emit(shapes.vm(made.record), lambda: made.record.name)
