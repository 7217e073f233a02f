"""What ties a machine to a process that cannot follow it.

What a guest has open in a folder of the host (files, the numbers it knows them by) is known to the folder's server alone,
and FUSE has no word for *begin anew*: a guest that came back to an earlier moment, or to life elsewhere, would speak to a
server that never heard of it. So such a machine is not saved with its memory, reset or moved. It is forked: its servers
are processes too, and fork with it (`fork_servers`).
"""

from __future__ import annotations

from collections.abc import Iterable

from posada.errors import EngineError, Unsupported
from posada.proto.monitor import Op
from posada.vmm.config import MonitorConfig
from posada.vmm.control import Call, Handler, Result
from posada.vmm.machine import Machine
from posada.vmm.virtio.fs import Fs


def require_free(machine: Machine, what: str) -> None:
    """Raises Unsupported."""
    if any(isinstance(slot.transport.device, Fs) for slot in machine.slots.values()):
        hint = "take a snapshot of its disks only, or use a machine without folders"
        raise Unsupported("kvm", f"{what} of a machine that shares folders of the host", hint=hint)


def require_disks(machine: Machine) -> None:
    """Raises EngineError if they were handed over to another monitor, and did not come back."""
    if machine.given_up is not None:
        raise EngineError(
            "the machine's disks are another monitor's since it was migrated", hint="resume it first, or end it"
        )


def fork_servers(machine: Machine, configs: Iterable[MonitorConfig]) -> None:
    """For each child its servers, while the machine stands still; a child whose server cannot fork has a folder that fails."""
    for config in configs:
        for folder in config.folders:
            slot = machine.slots.get(folder.tag)
            device = slot.transport.device if slot is not None else None
            if isinstance(device, Fs) and folder.server >= 0:
                try:
                    device.fork_server(folder.server)
                except OSError as error:
                    machine.life.note(f"{folder.tag}: its server did not fork: {error}")


def whole(machine: Machine, op: Op, handler: Handler) -> Handler:
    """``op``'s handler, for machines that nothing ties. Forked they may be, and their disks go on to other layers."""

    def handle(call: Call) -> Result | None:
        require_disks(machine)
        if op not in (Op.SWITCH, Op.FORK):
            require_free(machine, op.value)
        return handler(call)

    return handle
