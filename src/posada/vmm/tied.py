"""What ties a machine to a process that cannot follow it.

What a guest has open in a folder of the host (files, the numbers it knows them by) is known to the folder's server alone,
and FUSE has no word for *begin anew*: a guest that came back to an earlier moment, or to life elsewhere, would speak to a
server that never heard of it. So such a machine is not copied, saved with its memory, reset or moved.
"""

from __future__ import annotations

from posada.errors import EngineError, Unsupported
from posada.proto.monitor import Op
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


def whole(machine: Machine, op: Op, handler: Handler) -> Handler:
    """``op``'s handler, for machines that nothing ties. A disk alone may go on to another layer with folders too."""

    def handle(call: Call) -> Result | None:
        require_disks(machine)
        if op is not Op.SWITCH:
            require_free(machine, op.value)
        return handler(call)

    return handle
