"""Which pages of a machine change, whoever changes them: the guest and the kernel (KVM's dirty log), and our devices.

The kernel finds the guest's writes by taking away the right to write to a page until the next one, so tracking costs the
guest a fault for each page it writes; nothing is tracked but while somebody asks. Places are offsets in RAM without the
gap below 4 GiB (`posada.vmm.memfile.linear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from posada.kvm.numbers import MemFlag
from posada.vmm.machine import Machine
from posada.vmm.memory import PAGE
from posada.vmm.pagemap import Run

_NOT_ZERO = bytes([0, *[1] * 255])
_BITS = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


class DirtyPages:
    """Tracks from its making to `close`. One at a time for a machine: the kernel keeps one log."""

    def __init__(self, machine: Machine) -> None:
        """While the vcpus stand still, or what they write meanwhile may be missed. Raises KvmError."""
        self._machine = machine
        self._vm = machine.vm
        self._marked: set[int] = set()
        self._regions = [(slot, region) for slot, region in enumerate(machine.memory.regions)]
        first = machine.memory.regions[0].offset
        self._places = [(region.base, region.size, region.offset - first) for region in machine.memory.regions]
        self._log(MemFlag.LOG_DIRTY_PAGES)
        machine.memory.changed = self.mark
        for queue in self._queues():
            queue.written = self.mark

    def mark(self, address: int, length: int) -> None:
        """A device wrote there, in guest-physical addresses."""
        for base, size, offset in self._places:
            if base <= address < base + size and length:
                first, last = address - base + offset, address - base + offset + length - 1
                self._marked.update(range(first // PAGE, last // PAGE + 1))

    def collect(self) -> list[int]:
        """Numbers of the pages changed since the last time, ascending; they are clean again. Raises KvmError.

        The loop's lock must be held; the vcpus may run.
        """
        pages, self._marked = self._marked, set()
        for (slot, _), (_, _, offset) in zip(self._regions, self._places, strict=True):
            pages.update(set_bits(self._vm.dirty_log(slot), offset // PAGE))
        return sorted(pages)

    def close(self) -> None:
        """Idempotent. Raises KvmError."""
        if self._regions:
            self._log(MemFlag(0))
        self.forget()

    def forget(self) -> None:
        """`close` in a forked child, whose vm has no log."""
        self._regions = []
        self._machine.memory.changed = None
        for queue in self._queues():
            queue.written = None

    def _log(self, flags: MemFlag) -> None:
        for slot, region in self._regions:
            self._vm.set_memory(slot, region.base, region.size, region.address, flags)

    def _queues(self) -> Iterable:  # type: ignore[type-arg]
        return (queue for slot in self._machine.slots.values() for queue in slot.transport.queues)


def set_bits(bitmap: bytearray, first: int = 0) -> list[int]:
    """The numbers of the bits that are set, counted from ``first``. Cheap where few are."""
    found: list[int] = []
    flags = bitmap.translate(_NOT_ZERO)
    at = flags.find(1)
    while at >= 0:
        start = first + 8 * at
        found += [start + bit for bit in _BITS[bitmap[at]]]
        at = flags.find(1, at + 1)
    return found


def as_runs(pages: Sequence[int]) -> list[Run]:
    """Runs of neighbours, in bytes. ``pages`` ascend."""
    found: list[Run] = []
    start = end = -1
    for page in pages:
        if page != end:
            if end > start:
                found.append((start * PAGE, (end - start) * PAGE))
            start = page
        end = page + 1
    if end > start:
        found.append((start * PAGE, (end - start) * PAGE))
    return found
