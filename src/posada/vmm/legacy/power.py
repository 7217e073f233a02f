"""Power: the registers behind the ACPI tables (events, sleep, reset), and the keyboard controller's reset line.

The event register serves the generic event device (ACPI 6.5, 5.6.9): an edge on EVENT_GSI makes the guest run _EVT, which
reads and so clears it. Sleep registers are those of hardware-reduced ACPI (4.8.3.7). The guest is the only caller here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from posada.vmm import state

EVENTS, SLEEP_CONTROL, SLEEP_STATUS, RESET = range(4)
"""Register offsets, one byte each."""
SIZE = 4
SLEEP_TYPE_S5 = 5
RESET_VALUE = 1
_SLEEP_ENABLE = 0x20


def reset_code(port: int) -> bytes:
    """16-bit code that writes RESET_VALUE to the reset register at ``port``, for the reset vector.

    Linux takes hardware-reduced ACPI for a sign of EFI, finds none, and resets the machine by a jump to the BIOS.
    """
    # mov dx, port; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt
    return bytes([0xBA, port & 0xFF, port >> 8, 0xB0, RESET_VALUE, 0xEE, 0xF4, 0xEB, 0xFD])


class Event(enum.IntFlag):
    """Bits of the event register; the DSDT's _EVT knows them."""

    POWER_BUTTON = 1
    GENERATION = 2


class PowerRegisters:
    """``power_off`` and ``reset`` are called on a vcpu's thread, the lock held: they may only note what is wanted."""

    def __init__(
        self, interrupt: Callable[[], object], power_off: Callable[[], object], reset: Callable[[], object]
    ) -> None:
        self._interrupt = interrupt
        self._power_off = power_off
        self._reset = reset
        self._events = Event(0)

    def notify(self, event: Event) -> None:
        """Tell the guest. Several before it looks are one."""
        self._events |= event
        self._interrupt()

    def read(self, offset: int, size: int) -> int:
        if offset != EVENTS:
            return 0
        events, self._events = self._events, Event(0)
        return int(events)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == SLEEP_CONTROL and value & _SLEEP_ENABLE and value >> 2 & 7 == SLEEP_TYPE_S5:
            self._power_off()
        elif offset == RESET and value == RESET_VALUE:
            self._reset()

    def save(self) -> dict[str, Any]:
        return {"events": int(self._events)}

    def load(self, document: state.Document) -> None:
        """Raises StateError."""
        self._events = Event(state.integer(document, "events", 0, 3))


class KeyboardReset:
    """The i8042's command port. There is no keyboard: it is never busy, and command 0xFE pulls the reset line."""

    def __init__(self, reset: Callable[[], object]) -> None:
        self._reset = reset

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value & 0xFF == 0xFE:
            self._reset()
