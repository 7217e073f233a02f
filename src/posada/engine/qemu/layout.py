"""``Layout``: the guest-visible devices of one machine, as saved device state knows them.

Device state can be loaded only by a QEMU with the same devices at the same PCI addresses, whatever was plugged in
meanwhile. So a layout is made once, at power-on, is changed by hot-plug alone, travels in `Running.private` and
`Capture.private`, and every QEMU that goes on with that guest is started from it.

The PCI bus (``pc``, bus 0; 0 and 1 are the chipset): 2 serial ports, 3 balloon, 4 rng, 5 vsock, 6–9 NICs, 10–31 disks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from posada.engine.base import DiskFile
from posada.errors import EngineError, Unsupported

VERSION = 1

SLOT_SERIAL, SLOT_BALLOON, SLOT_RNG, SLOT_VSOCK = 2, 3, 4, 5
NIC_SLOTS = range(6, 10)
DISK_SLOTS = range(10, 32)
AGENT_PORTS = 4


class DiskSlot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk and the PCI slot it sits in."""

    name: str
    slot: int


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module. ``memory`` in bytes; ``machine`` is QEMU's versioned type, such as ``pc-i440fx-7.2``."""

    version: int = VERSION
    machine: str
    accelerator: str
    cpus: int
    memory: int
    nics: int = 0
    vsock: bool = False
    agent: bool = False
    nested: bool = False
    disks: tuple[DiskSlot, ...] = ()

    def slot(self, disk: str) -> int:
        """Raises EngineError if there is no such disk."""
        for entry in self.disks:
            if entry.name == disk:
                return entry.slot
        raise EngineError(f"the machine has no disk named {disk!r}", hint=", ".join(d.name for d in self.disks) or None)

    def with_disk(self, name: str) -> Layout:
        """With one more disk, in the lowest free slot. Raises Unsupported when the bus is full."""
        taken = {d.slot for d in self.disks}
        slot = next((s for s in DISK_SLOTS if s not in taken), None)
        if slot is None:
            raise Unsupported("qemu", f"more than {len(DISK_SLOTS)} disks", hint="detach one first")
        return msgspec.structs.replace(self, disks=(*self.disks, DiskSlot(name, slot)))

    def without_disk(self, name: str) -> Layout:
        self.slot(name)
        return msgspec.structs.replace(self, disks=tuple(d for d in self.disks if d.name != name))


def new_layout(
    *,
    machine: str,
    accelerator: str,
    cpus: int,
    memory: int,
    nics: int,
    vsock: bool,
    agent: bool,
    nested: bool = False,
    disks: Sequence[str],
) -> Layout:
    """The layout of a machine at power-on. Raises Unsupported when it has too many NICs or disks."""
    if nics > len(NIC_SLOTS):
        raise Unsupported("qemu", f"more than {len(NIC_SLOTS)} network interfaces", hint="drop some from nics")
    layout = Layout(
        machine=machine,
        accelerator=accelerator,
        cpus=cpus,
        memory=memory,
        nics=nics,
        vsock=vsock,
        agent=agent,
        nested=nested,
    )
    for name in disks:
        layout = layout.with_disk(name)
    return layout


def read_layout(private: dict[str, Any]) -> Layout:
    """The layout in a `Running.private` or `SnapshotFiles.private`. Raises EngineError for anything malformed.

    A snapshot's record is data from disk: everything that reaches a command line from it is checked here.
    """
    try:
        layout = msgspec.convert(private.get("layout"), Layout)
    except msgspec.ValidationError as error:
        raise EngineError("the saved machine's device layout is damaged", detail=str(error)) from None
    machine = layout.machine.replace(".", "").replace("-", "")
    slots = [d.slot for d in layout.disks]
    names = {d.name for d in layout.disks}
    if (
        layout.version != VERSION
        or not machine.isascii()
        or not machine.isalnum()
        or layout.accelerator not in ("tcg", "kvm")
        or not 1 <= layout.cpus <= 255
        or layout.memory <= 0
        or not 0 <= layout.nics <= len(NIC_SLOTS)
        or not len(set(slots)) == len(slots) == len(names)
        or any(s not in DISK_SLOTS for s in slots)
        or any(not n.replace("-", "").isalnum() or len(n) > 20 for n in names)
    ):
        raise EngineError("the saved machine's device layout is damaged", detail=str(layout))
    return layout


def match_disks(layout: Layout, disks: Sequence[DiskFile]) -> tuple[tuple[int, DiskFile], ...]:
    """(slot, disk) of each disk in the layout's order. Raises EngineError when the names differ."""
    by_name = {d.name: d for d in disks}
    if set(by_name) != {d.name for d in layout.disks}:
        have, want = ", ".join(by_name) or "none", ", ".join(d.name for d in layout.disks) or "none"
        raise EngineError(f"the machine's devices have the disks {want}, and it was given {have}")
    return tuple((d.slot, by_name[d.name]) for d in layout.disks)
