"""The state a machine has in the kernel beside its vcpus: interrupt chips, PIT, kvm-clock. Loaded as untrusted.

Save and load only while no vcpu runs. Load it after the vcpus (`posada.vmm.cpustate`): an interrupt that waits in the
IOAPIC is delivered to a local APIC at once, and a later load of that would lose it; and the clock starts last, so that
no time passes for the guest meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import sizeof
from typing import Any

from posada.kvm.numbers import Chip
from posada.kvm.structs import ClockData, IrqChip, PitState
from posada.kvm.vm import Vm
from posada.vmm.state import blob, integer

VERSION = 1
CLOCK_LIMIT = 1 << 62
"""Nanoseconds; about 146 years. The kernel adds to it as a signed number."""


def save(vm: Vm) -> dict[str, Any]:
    """Raises KvmError."""
    document: dict[str, Any] = {"version": VERSION, "clock": int(vm.get_clock().clock)}
    if vm.has_irqchip:
        document |= {chip.name.lower(): bytes(vm.get_irqchip(chip)) for chip in Chip}
    if vm.has_pit:
        document["pit"] = bytes(vm.get_pit())
    return document


def load(vm: Vm, document: Mapping[str, Any]) -> None:
    """Into a vm with the same chips. The guest's clock goes on from what it was when saved, never from less.

    Raises StateError for a document that cannot be right, KvmError.
    """
    integer(document, "version", VERSION, VERSION)
    clock = integer(document, "clock", 0, CLOCK_LIMIT)
    if vm.has_irqchip:
        for chip in Chip:
            state = IrqChip.from_buffer_copy(blob(document, chip.name.lower(), sizeof(IrqChip)))
            state.chip_id = chip
            vm.set_irqchip(state)
    if vm.has_pit:
        vm.set_pit(PitState.from_buffer_copy(blob(document, "pit", sizeof(PitState))))
    vm.set_clock(ClockData(clock=clock))
