"""The verb that opens a machine to a debugger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from posada.cli import output
from posada.cli.arguments import vm_argument
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host


@click.command()
@vm_argument
@click.option("-p", "--port", type=click.IntRange(0, 65535), default=0, metavar="N",
              help="The port gdb connects to. Default: any free one.")
@click.option("--address", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Where to listen. Whoever can connect there owns the guest.")
@formatted
@hosted
async def debug(host: Host, vm: str, port: int, address: str) -> None:
    """Let gdb attach to a running machine, kernel and all."""
    found = await host.vms.get(vm)
    bound = await found.debug(port, address=address)
    data = {"name": found.record.name, "address": address, "port": bound}
    output.emit(data, lambda: f"gdb -ex 'target remote {address}:{bound}' VMLINUX")
