"""Which device answers at an address. One `Bus` for port I/O, one for MMIO."""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol


class Device(Protocol):
    """What sits on a bus. Offsets are from its base; an access never leaves its range; values are unsigned."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class Bus:
    """Ranges never overlap. Where no device is, reads give all ones and writes vanish, as on a PC."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, Device]] = []
        self.unclaimed = 0
        """How often the guest touched an address that no device has."""

    def add(self, base: int, size: int, device: Device) -> None:
        """Raises ValueError if the range is empty or overlaps another."""
        at = bisect_right(self._bases, base)
        before = self._ranges[at - 1] if at else None
        after = self._ranges[at] if at < len(self._ranges) else None
        if size <= 0 or base < 0 or (before and before[1] > base) or (after and after[0] < base + size):
            raise ValueError(f"bus range {base:#x}+{size:#x} is empty or overlaps another")
        self._bases.insert(at, base)
        self._ranges.insert(at, (base, base + size, device))

    def remove(self, base: int) -> None:
        """Take the device at ``base`` off. Raises ValueError if there is none."""
        at = self._bases.index(base)
        del self._bases[at], self._ranges[at]

    def read(self, address: int, size: int) -> int:
        at = bisect_right(self._bases, address)
        if at:
            base, end, device = self._ranges[at - 1]
            if address + size <= end:
                return device.read(address - base, size)
        self.unclaimed += 1
        return (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        at = bisect_right(self._bases, address)
        if at:
            base, end, device = self._ranges[at - 1]
            if address + size <= end:
                device.write(address - base, size, value)
                return
        self.unclaimed += 1


class Ignore:
    """Takes writes, reads as ``value`` repeated: ports that guests poke for the delay (0x80) or by habit."""

    def __init__(self, value: int = 0xFF) -> None:
        self._value = value

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes([self._value]) * size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        pass
