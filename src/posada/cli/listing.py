"""Verbs that show machines: ps, info, top."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from posada.cli import output, shapes
from posada.cli.arguments import pairs, vm_argument
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import VM, Host
    from posada.model.records import VmRecord


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="All machines; that is the default.")
@click.option("-r", "--running", is_flag=True, help="Only those that run.")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", callback=pairs,
              help="Only those with this label. Repeatable.")
@click.option("-q", "--quiet", is_flag=True, help="Only the names.")
@formatted
@hosted
async def ps(host: Host, everything: bool, running: bool, labels: dict[str, str], quiet: bool) -> None:
    """List machines (also: ls)."""
    from posada.model.states import State

    records = [vm.record for vm in await host.vms.list(labels=labels)]
    if running:
        records = [record for record in records if record.state in (State.RUNNING, State.PAUSED)]

    def table() -> str:
        if quiet:
            return "\n".join(record.name for record in records)
        header = ("NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "UP", "PORTS", "UUID")
        return output.columns(header, (_row(record) for record in records))

    output.emit([shapes.vm(record) for record in records], table)


def _row(record: VmRecord) -> tuple[str, ...]:
    from posada.model.units import format_size

    spec, running = record.spec, record.running
    return (
        record.name,
        record.state.value,
        spec.image or "-",
        str(spec.cpus),
        format_size(spec.memory),
        output.age(running.started) if running and running.started else "-",
        shapes.ports_text(record),
        record.uuid[:8],
    )


@click.command()
@vm_argument
@click.option("--spec", "only_spec", is_flag=True, help="Only its spec, as YAML: what `posada create -f` reads.")
@click.option("--registers", is_flag=True, help="What its processors do at this instant; it stands still for that.")
@formatted
@hosted
async def info(host: Host, vm: str, only_spec: bool, registers: bool) -> None:
    """Show all there is to know of a machine."""
    from posada.model.machine import spec_to_yaml

    found = await host.vms.get(vm)
    record = found.record
    if only_spec:
        text = spec_to_yaml(record.spec).decode().rstrip()
        output.emit(shapes.vm_in_full(record)["spec"], lambda: text)
        return
    snapshots = [shapes.snapshot(s.record) for s in found.snapshots]
    usage = await _usage(found) if record.running else None
    inside = await _inspect(found, registers) if record.running else None
    data = {**shapes.vm_in_full(record), "snapshots": snapshots, "usage": usage, "inside": inside}

    def shown() -> str:
        parts = [output.fields(_pairs(record, data)), *(inside["registers"] if inside else [])]
        return "\n\n".join(parts)

    output.emit(data, shown)


def _pairs(record: VmRecord, data: dict[str, Any]) -> list[tuple[str, str]]:
    from posada.model.units import format_size

    spec, running, usage = record.spec, record.running, data["usage"]
    image = f"{spec.image or ''} ({record.image[:12]})" if record.image else spec.image or ""
    rows = [
        ("name", record.name),
        ("uuid", record.uuid),
        ("state", record.state.value + (f": {record.exit}" if record.exit and not running else "")),
        ("image", image),
        ("engine", record.engine + (f" ({running.accelerator})" if running and running.accelerator else "")),
        ("cpus", str(spec.cpus)),
        ("memory", format_size(spec.memory)),
        *(("disk", f"{d.name}, {format_size(d.size)}" + (", read-only" if d.readonly else "")) for d in record.disks),
        *(("nic", mac) for mac in record.macs),
        *(("port", f"{p['address']}:{p['host']} -> {p['guest']}/{p['protocol']}") for p in data["ports"]),
        *(("label", f"{key}={value}") for key, value in spec.labels.items()),
        *(("snapshot", f"{s['name']} ({s['kind']})") for s in data["snapshots"]),
        ("created", output.when(record.created)),
        ("parent", record.parent or ""),
        ("ephemeral", "yes" if spec.ephemeral else ""),
    ]
    if running:
        rows += [("started", output.when(running.started)), ("pid", str(running.process.pid))]
    if usage:
        memory = usage["pss"] if usage["pss"] is not None else usage["rss"]
        rows.append(("uses", f"{usage['cpu_seconds']:.1f} s of processor, {format_size(memory)} of the host's memory"))
    if data["inside"]:
        rows += _inside_rows(data["inside"])
    return rows


def _inside_rows(inside: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("exits", f"vcpu {n}: {_counts(counts)}") for n, counts in enumerate(inside["exits"]) if any(counts.values())]
    rows += [("device", f"{name}: {_counts(counts)}") for name, counts in inside["devices"].items() if any(counts.values())]
    if inside["jail"]:
        rows.append(("jail", ", ".join(inside["jail"])))
    return rows + [("note", line) for line in inside["notes"].splitlines()[-5:]]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items() if n)


async def _inspect(vm: VM, registers: bool) -> dict[str, Any] | None:
    """None when it ended meanwhile, or its engine cannot tell and nobody insists on registers."""
    from posada.errors import PosadaError

    try:
        inside = await vm.inspect(registers=registers)
    except PosadaError:
        if registers:
            raise
        return None
    return {
        "registers": list(inside.registers),
        "exits": [dict(counts) for counts in inside.exits],
        "devices": dict(inside.devices),
        "jail": list(inside.jail),
        "notes": inside.notes,
    }


async def _usage(vm: VM) -> dict[str, Any] | None:
    """None when it ended meanwhile."""
    from posada.errors import PosadaError

    try:
        usage = await vm.usage()
    except PosadaError:
        return None
    return {"cpu_seconds": usage.cpu_seconds, "rss": usage.rss, "pss": usage.pss}


@click.command()
@click.option("-d", "--delay", type=click.FloatRange(min=0.1), default=2.0, show_default=True,
              help="Seconds between two looks.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="Look so often, then end.")
@formatted
@hosted
async def top(host: Host, delay: float, count: int | None) -> None:
    """Show what the machines use of the host, again and again (Ctrl-C ends it)."""
    import asyncio
    import sys
    import time

    live = sys.stdout.isatty() and output.chosen != "json"
    before: dict[str, tuple[float, float]] = {}
    left = count if count is not None else (None if live else 1)
    while left is None or left > 0:
        rows = []
        for vm in await host.vms.list():
            usage = await _usage(vm) if vm.record.running else None
            if usage is None:
                continue
            moment, cpu = time.monotonic(), usage["cpu_seconds"]
            then = before.get(vm.uuid)
            percent = None if then is None else 100 * (cpu - then[1]) / max(moment - then[0], 1e-6)
            before[vm.uuid] = (moment, cpu)
            rows.append({"name": vm.record.name, "uuid": vm.uuid, "cpu_percent": percent, **usage})
        rows.sort(key=lambda row: -(row["cpu_percent"] or 0.0))
        if live:
            print("\x1b[H\x1b[J", end="")
        if output.chosen == "json":
            output.emit_line(rows, "")
        else:
            print(_top_table(rows), flush=True)
        left = None if left is None else left - 1
        if left is None or left > 0:
            await asyncio.sleep(delay)


def _top_table(rows: list[dict[str, Any]]) -> str:
    from posada.model.units import format_size

    return output.columns(
        ("NAME", "CPU %", "CPU TIME", "MEMORY", "RESIDENT"),
        (
            (
                row["name"],
                "-" if row["cpu_percent"] is None else f"{row['cpu_percent']:.1f}",
                f"{row['cpu_seconds']:.1f}s",
                "-" if row["pss"] is None else format_size(row["pss"]),
                format_size(row["rss"]),
            )
            for row in rows
        ),
    )
