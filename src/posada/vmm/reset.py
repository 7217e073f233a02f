"""Putting a machine back to a point in time, in place: thousands of times a second, for tests and fuzzing.

A `Point` keeps a copy of the pages that were touched when it was made. `Point.reset` puts back only what has changed
since (`posada.vmm.dirty`), the kernel's part as it was recorded (`posada.vmm.replay`), and the devices that are not as
they were. It costs what the guest did, not what it is.

Disks are not put back: a machine that has written to one since the point is refused, because its memory would not
know of what its disk holds.
"""

from __future__ import annotations

import mmap
from typing import Any

from posada.errors import EngineError
from posada.vmm import memfile
from posada.vmm.dirty import DirtyPages, as_runs
from posada.vmm.machine import Machine
from posada.vmm.memory import PAGE
from posada.vmm.pagemap import PageMap
from posada.vmm.replay import Replay
from posada.vmm.virtio.blk import Blk

_MAP_NORESERVE = 0x4000
_WRITES = ("writes", "discards", "zeroes")


class Point:
    """A moment of ``machine``: the one at which it is made. It costs as much memory again as the guest has touched."""

    def __init__(self, machine: Machine, pages: PageMap) -> None:
        """The vcpus stand still for as long as the copy takes. Raises KvmError, OSError."""
        self._machine = machine
        with machine.loop.lock, machine.vcpus.quiesced():
            self._ram, address = memfile.linear(machine.memory)
            own = pages.own(address, machine.memory.size)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self._copy = memoryview(mmap.mmap(-1, machine.memory.size, flags=flags))
            for at, length in own:
                self._copy[at : at + length] = self._ram[at : at + length]
            # On memory files, what was not the machine's own is brought back by forgetting what it has made of it.
            self._own = (
                {at // PAGE for run in own for at in range(run[0], sum(run), PAGE)}
                if machine.layers is not None
                else None
            )
            vcpus = [thread.vcpu for thread in machine.vcpus.threads]
            self._replay = Replay(machine.system, machine.vm, vcpus)
            self._replay.record()
            self._devices = {name: slot.transport.save() for name, slot in machine.slots.items()}
            self._legacy = self._save_legacy()
            self._written = self._disk_writes()
            self._dirty = DirtyPages(machine)

    def reset(self) -> int:
        """Go back. The vcpus run on from the point if they ran. Returns how many pages were put back.

        Raises EngineError (a disk was written to; nothing has changed), KvmError.
        """
        machine = self._machine
        with machine.loop.lock, machine.vcpus.quiesced():
            return self.put_back()

    def put_back(self) -> int:
        """`reset` for a caller that holds the loop's lock, while the vcpus stand still and no access is half done."""
        if self._disk_writes() != self._written:
            raise EngineError(
                "a disk was written to since the point",
                hint="put the machine back by restoring a snapshot with its disks",
            )
        machine = self._machine
        pages = self._dirty.collect()
        self._put_back_pages(pages)
        for name, slot in machine.slots.items():
            before = self._devices[name]
            if slot.transport.pending or slot.transport.save() != before:
                slot.transport.load(before)
        if self._save_legacy() != self._legacy:
            serial, rtc, power = self._legacy
            machine.serial.load(serial)
            machine.rtc.load(rtc)
            machine.power.load(power)
        self._replay.put_back()
        return len(pages)

    def close(self) -> None:
        """The machine goes on from where it is. Idempotent. Raises KvmError."""
        with self._machine.loop.lock, self._machine.vcpus.quiesced():
            self._dirty.close()

    def forget(self) -> None:
        """`close` in a forked child: the point is its parent's."""
        self._dirty.forget()

    def _put_back_pages(self, pages: list[int]) -> None:
        ram, copy, own = self._ram, self._copy, self._own
        kept = pages if own is None else [page for page in pages if page in own]
        for at, length in as_runs(kept):
            ram[at : at + length] = copy[at : at + length]
        if own is not None:
            first = self._machine.memory.regions[0].offset
            for at, length in as_runs([page for page in pages if page not in own]):
                self._machine.memory.mapping.madvise(mmap.MADV_DONTNEED, first + at, length)

    def _save_legacy(self) -> tuple[dict[str, Any], ...]:
        machine = self._machine
        return machine.serial.save(), machine.rtc.save(), machine.power.save()

    def _disk_writes(self) -> list[int]:
        devices = [slot.transport.device for slot in self._machine.slots.values()]
        return [device.metrics()[name] for device in devices if isinstance(device, Blk) for name in _WRITES]
