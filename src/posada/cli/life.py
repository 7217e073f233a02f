"""Verbs of a machine's life: start, stop, kill, pause, resume, restart, wait, rm, rename. Most take several."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import click

from posada.cli import output, shapes
from posada.cli.arguments import complete_vm, seconds, vm_argument, vms_argument
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import VM, Host


async def each(host: Host, refs: Sequence[str], act: Callable[[VM], Awaitable[object]]) -> int:
    """Do it to every machine, one after the other; one that fails does not stop the rest. Prints the names."""
    from posada.errors import PosadaError

    status, done = 0, []
    for ref in refs:
        try:
            vm = await host.vms.get(ref)
            await act(vm)
        except PosadaError as error:
            status = status or output.fail_with(error)
        else:
            done.append(vm.record)
    output.emit([shapes.vm(record) for record in done], lambda: "\n".join(record.name for record in done))
    return status


@click.command()
@vms_argument
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the guest is ready.")
@click.option("--timeout", metavar="TIME", default="60", show_default=True, callback=seconds,
              help="Wait at most so long.")
@formatted
@hosted
async def start(host: Host, vms: Sequence[str], wait: bool, timeout: float) -> int:
    """Start machines."""
    from posada.cli.progress import Bar

    async def act(vm: VM) -> None:
        with Bar(f"starting {vm.record.name}") as bar:
            await vm.start(wait=wait, timeout=timeout, progress=bar)

    return await each(host, vms, act)


@click.command()
@vms_argument
@click.option("--timeout", metavar="TIME", default="30", show_default=True, callback=seconds,
              help="Give the guest so long to power off.")
@click.option("--force/--no-force", default=True, show_default=True, help="Kill it if it does not power off in time.")
@formatted
@hosted
async def stop(host: Host, vms: Sequence[str], timeout: float, force: bool) -> int:
    """Ask guests to power off."""
    from posada.cli.progress import Bar

    async def act(vm: VM) -> None:
        with Bar(f"waiting for {vm.record.name} to power off"):
            await vm.stop(timeout=timeout, force=force)

    return await each(host, vms, act)


@click.command()
@vms_argument
@formatted
@hosted
async def kill(host: Host, vms: Sequence[str]) -> int:
    """End machines at once, as if their power was cut."""
    return await each(host, vms, lambda vm: vm.kill())


@click.command()
@vms_argument
@formatted
@hosted
async def pause(host: Host, vms: Sequence[str]) -> int:
    """Stop the processors of machines; their memory stays."""
    return await each(host, vms, lambda vm: vm.pause())


@click.command()
@vms_argument
@formatted
@hosted
async def resume(host: Host, vms: Sequence[str]) -> int:
    """Let paused machines go on."""
    return await each(host, vms, lambda vm: vm.resume())


@click.command()
@vms_argument
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the guest is ready.")
@formatted
@hosted
async def restart(host: Host, vms: Sequence[str], wait: bool) -> int:
    """Stop machines and start them again."""
    from posada.cli.progress import Bar

    async def act(vm: VM) -> None:
        with Bar(f"restarting {vm.record.name}"):
            await vm.restart(wait=wait)

    return await each(host, vms, act)


@click.command()
@vm_argument
@click.option("--timeout", metavar="TIME", callback=seconds, help="Give up after so long, with exit status 124.")
@formatted
@hosted
async def wait(host: Host, vm: str, timeout: float | None) -> None:
    """Wait until a machine does not run any more; print the state it is in then."""
    found = await host.vms.get(vm)
    state = await found.wait(timeout=timeout)
    output.emit(shapes.vm(found.record), lambda: state.value)


@click.command()
@click.argument("vms", metavar="VM...", nargs=-1, shell_complete=complete_vm)
@click.option("-f", "--force", is_flag=True, help="Kill those that run first.")
@click.option("--all", "everything", is_flag=True, help="All machines of this host.")
@formatted
@hosted
async def rm(host: Host, vms: Sequence[str], force: bool, everything: bool) -> int:
    """Delete machines, their disks and their snapshots."""
    if everything == bool(vms):
        raise click.UsageError("name the machines to delete, or say --all")
    refs = [vm.uuid for vm in await host.vms.list()] if everything else vms
    return await each(host, refs, lambda vm: vm.delete(force=force))


@click.command()
@vm_argument
@click.argument("name")
@formatted
@hosted
async def rename(host: Host, vm: str, name: str) -> None:
    """Give a machine another name."""
    found = await host.vms.get(vm)
    await found.rename(name)
    output.emit(shapes.vm(found.record), lambda: found.record.name)
