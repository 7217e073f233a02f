"""snapshot create | ls | tree | restore | rm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from posada.cli import output, shapes
from posada.cli.arguments import vm_argument
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host
    from posada.model.records import SnapshotRecord


@click.group()
def snapshot() -> None:
    """Points of a machine to return to."""


@snapshot.command()
@vm_argument
@click.argument("name", required=False)
@click.option("--kind", type=click.Choice(["full", "disks"]),
              help="With memory, or disks only (default: full for a machine that runs).")
@formatted
@hosted
async def create(host: Host, vm: str, name: str | None, kind: str | None) -> None:
    """Take a snapshot; its name is made up when left out."""
    from posada.cli.progress import Bar

    found = await host.vms.get(vm)
    with Bar(f"taking a snapshot of {vm}") as bar:
        taken = await found.snapshot(name, kind=kind, progress=bar)
    output.emit(shapes.snapshot(taken.record), lambda: taken.name)


@snapshot.command()
@vm_argument
@formatted
@hosted
async def ls(host: Host, vm: str) -> None:
    """List a machine's snapshots."""
    from posada.model.units import format_size

    found = await host.vms.get(vm)
    records = [s.record for s in found.snapshots]
    names = {record.id: record.name for record in records}

    def row(record: SnapshotRecord) -> tuple[str, ...]:
        return (
            record.name,
            record.kind.value,
            output.age(record.created),
            f"{record.pause * 1000:.0f}ms",
            format_size(record.memory_bytes) if record.memory_bytes else "-",
            names.get(record.parent or "", "-"),
            record.id[:12],
        )

    header = ("NAME", "KIND", "AGE", "PAUSE", "MEMORY", "PARENT", "ID")
    output.emit([shapes.snapshot(record) for record in records], lambda: output.columns(header, map(row, records)))


@snapshot.command()
@vm_argument
@formatted
@hosted
async def tree(host: Host, vm: str) -> None:
    """Draw a machine's snapshots as a tree; the machine descends from the one that is marked."""
    found = await host.vms.get(vm)
    records = [s.record for s in found.snapshots]
    data = {"head": found.record.head, "snapshots": [shapes.snapshot(record) for record in records]}
    output.emit(data, lambda: draw(found.record.name, records, found.record.head))


def draw(title: str, records: list[SnapshotRecord], head: str | None) -> str:
    """The tree as text."""
    known = {record.id for record in records}
    children: dict[str | None, list[SnapshotRecord]] = {}
    for record in records:
        children.setdefault(record.parent if record.parent in known else None, []).append(record)
    lines = [output.clean(title)]
    stack: list[tuple[SnapshotRecord, str, bool]] = []

    def push(parent: str | None, indent: str) -> None:
        some = children.get(parent, [])
        stack.extend((record, indent, i == len(some) - 1) for i, record in reversed(list(enumerate(some))))

    push(None, "")
    while stack:
        record, indent, last = stack.pop()
        mark = "  ← the machine" if record.id == head else ""
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{output.clean(record.name)} ({record.kind.value}){mark}")
        push(record.id, indent + ("   " if last else "│  "))
    return "\n".join(lines)


@snapshot.command()
@vm_argument
@click.argument("name")
@formatted
@hosted
async def restore(host: Host, vm: str, name: str) -> None:
    """Return a machine to a snapshot, in place. What came after it is lost."""
    from posada.cli.progress import Bar

    found = await host.vms.get(vm)
    with Bar(f"restoring {vm}") as bar:
        await found.restore(name, progress=bar)
    output.emit(shapes.vm(found.record), lambda: found.record.name)


@snapshot.command()
@vm_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("-r", "--recursive", is_flag=True, help="Also all that descend from it.")
@formatted
@hosted
async def rm(host: Host, vm: str, names: tuple[str, ...], recursive: bool) -> None:
    """Delete snapshots. One that others descend from is refused unless --recursive."""
    found = await host.vms.get(vm)
    for name in names:
        await found.delete_snapshot(name, recursive=recursive)
    output.emit(list(names), lambda: "\n".join(names))
