"""op ls | show | cancel | watch, and events: what goes on and what went on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from posada.cli import output, shapes
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host
    from posada.model.records import Event, OperationRecord

operation_argument = click.argument("id", metavar="OPERATION")


@click.group()
def op() -> None:
    """Long-running actions of any process on this host."""


@op.command()
@formatted
@hosted
async def ls(host: Host) -> None:
    """List the recent ones, newest first."""
    records = [operation.record for operation in await host.operations.list()]
    header = ("ID", "KIND", "TARGET", "STATE", "DONE", "AGE", "MESSAGE")
    output.emit([shapes.operation(record) for record in records], lambda: output.columns(header, map(_row, records)))


def _row(record: OperationRecord) -> tuple[str, ...]:
    return (
        record.id,
        record.kind,
        record.target,
        record.state.value,
        f"{record.progress:.0%}",
        output.age(record.created),
        (record.error or record.message)[:60],
    )


@op.command()
@operation_argument
@formatted
@hosted
async def show(host: Host, id: str) -> None:
    """Show one."""
    record = (await host.operations.get(id)).record
    pairs = [
        ("id", record.id),
        ("kind", record.kind),
        ("target", record.target),
        ("state", record.state.value),
        ("done", f"{record.progress:.0%}"),
        ("message", record.message),
        ("error", record.error or ""),
        ("created", output.when(record.created)),
        ("updated", output.when(record.updated)),
        ("by", f"process {record.owner.pid}"),
    ]
    output.emit(shapes.operation(record), lambda: output.fields(pairs))


@op.command()
@operation_argument
@formatted
@hosted
async def cancel(host: Host, id: str) -> None:
    """Ask whoever does it to stop and undo what was done."""
    operation = await host.operations.get(id)
    await operation.cancel()
    output.emit(shapes.operation(operation.refresh()), lambda: operation.record.id)


@op.command()
@operation_argument
@formatted
@hosted
async def watch(host: Host, id: str) -> int:
    """Follow one until it is finished; exits with 1 if it failed, 130 if it was cancelled."""
    from posada.model.records import OperationState

    state = None
    async for record in await host.operations.get(id):
        state = record.state
        text = f"{record.progress:4.0%}  {record.state.value}  {output.clean(record.error or record.message)}"
        output.emit_line(shapes.operation(record), text.rstrip())
    return {OperationState.DONE: 0, OperationState.CANCELLED: 130}.get(state, 1) if state else 1


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, for ever.")
@click.option("--after", type=int, metavar="ID", help="Only those after this one.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="At most so many.")
@formatted
@hosted
async def events(host: Host, follow: bool, after: int | None, limit: int) -> None:
    """Print what happened on this host, oldest first. With --format json, one object a line."""
    last = after
    for event in await host.events.list(after=after or 0, limit=limit):
        last = event.id
        output.emit_line(shapes.event(event), _line(event))
    if follow:
        async for event in host.events.follow(after=last):
            output.emit_line(shapes.event(event), _line(event))


def _line(event: Event) -> str:
    data = " ".join(f"{key}={value}" for key, value in event.data.items())
    text = f"{event.id:>6}  {output.when(event.time)}  {event.kind:<24}  {event.name or '-'}  {data}"
    return output.clean(text.rstrip())
