"""Putting a machine back to a point in time, in place: thousands of times a second, for tests and fuzzing.

A `Point` keeps a copy of the pages that were touched when it was made. `Point.reset` puts back only what has changed
since (`posada.vmm.dirty`), the kernel's part as it was recorded (`posada.vmm.replay`), and the devices that are not as
they were. It costs what the guest did, not what it is.

A disk is put back by throwing away the layer that it is written to since the point (`posada.vmm.block.throwaway`). One
that was given none is not: a machine that has written to it is refused, because its memory would not know of what its disk
holds. So is one whose disks went on to other layers, were resized, came or went.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from posada.errors import EngineError
from posada.vmm import memfile
from posada.vmm.block.disk import Disk
from posada.vmm.block.throwaway import Throwaway
from posada.vmm.dirty import DirtyPages, as_runs
from posada.vmm.machine import Machine
from posada.vmm.memory import PAGE
from posada.vmm.pagemap import PageMap
from posada.vmm.replay import Replay
from posada.vmm.tuning import blks, find_disk
from posada.vmm.virtio.blk import Blk

_MAP_NORESERVE = 0x4000
_WRITES = ("writes", "discards", "zeroes", "errors")
"""Counters of what changes a disk; a request that failed may have been done in part."""


class _Written:
    """A disk as it was at the point: which one, how large, and how often it had been written to."""

    def __init__(self, blk: Blk, layer: Throwaway | None) -> None:
        self.blk, self.layer = blk, layer
        self.note()

    def note(self) -> None:
        self._disk: Disk = self.blk.disk
        self._size = self.blk.disk.size
        self._writes = self._count()

    @property
    def written(self) -> bool:
        return self._count() != self._writes

    def check(self) -> None:
        """Raises EngineError if it cannot be put back."""
        blk = self.blk
        same = blk.disk is self._disk and blk.disk.size == self._size
        if not same or (self.layer is not None and not self.layer.is_in(blk.disk)):
            raise EngineError(f"disk {blk.serial.decode()!r} is not what it was at the point", hint="make a new point")
        if self.written and self.layer is None:
            raise EngineError(
                "a disk was written to since the point",
                hint="give the point a layer for it, or restore a snapshot with its disks",
            )

    def put_back(self) -> None:
        if self.layer is not None and self.written:
            self.blk.disk = self.layer.renew()
            self.note()

    def _count(self) -> list[int]:
        metrics = self.blk.metrics()
        return [metrics[name] for name in _WRITES]


class Point:
    """A moment of ``machine``: the one at which it is made. It costs as much memory again as the guest has touched."""

    def __init__(self, machine: Machine, pages: PageMap, layers: Mapping[str, int] = MappingProxyType({})) -> None:
        """The vcpus stand still for as long as the copy takes. Raises KvmError, OSError, ImageError, EngineError.

        ``layers``: for disks by name, descriptors of empty qcow2 images of their size, to write to from now on. They stay
        the caller's. If this raises, disks may be on their new layers.
        """
        self._machine = machine
        with machine.loop.lock, machine.vcpus.quiesced():
            self._quiesce()
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
            self._dirty = DirtyPages(machine)
            try:
                self._disks = self._switch(layers)
            except BaseException:
                self._dirty.close()
                raise

    def reset(self) -> int:
        """Go back. The vcpus run on from the point if they ran. Returns how many pages were put back.

        Raises EngineError (a disk cannot be put back; nothing has changed), OSError, KvmError.
        """
        machine = self._machine
        with machine.loop.lock, machine.vcpus.quiesced():
            return self.put_back()

    def put_back(self) -> int:
        """`reset` for a caller that holds the loop's lock, while the vcpus stand still and no access is half done."""
        self._quiesce()
        for disk in self._disks:
            disk.check()
        machine = self._machine
        for disk in self._disks:
            disk.put_back()
        pages = self._dirty.collect()
        self._put_back_pages(pages)
        # Before the devices: what they raise would be lost with the interrupt controllers' state.
        self._replay.put_back()
        for name, slot in machine.slots.items():
            before, transport = self._devices[name], slot.transport
            changed = transport.pending or transport.save() != before
            if changed:
                transport.load(before)
            if changed or before["interrupt_status"]:
                transport.kick()  # what it had raised may not have reached the controllers that were recorded
        if self._save_legacy() != self._legacy:
            serial, rtc, power = self._legacy
            machine.serial.load(serial)
            machine.rtc.load(rtc)
            machine.power.load(power)
        return len(pages)

    def close(self) -> None:
        """The machine goes on from where it is. Idempotent. Raises KvmError."""
        with self._machine.loop.lock, self._machine.vcpus.quiesced():
            self._dirty.close()

    def forget(self) -> None:
        """`close` in a forked child: the point is its parent's."""
        self._dirty.forget()

    def _quiesce(self) -> None:
        """What is under way would otherwise be answered into memory that is put back already."""
        for slot in self._machine.slots.values():
            slot.transport.device.quiesce()

    def _switch(self, layers: Mapping[str, int]) -> list[_Written]:
        """Disks go on, on their new layers. All are looked at before any is."""
        new: dict[Blk, Throwaway] = {}
        put: dict[Blk, Throwaway] = {}
        try:
            for blk, fd in self._given(layers):
                new[blk] = Throwaway(blk.disk, fd)
            while new:
                blk, layer = next(iter(new.items()))
                blk.disk = layer.put()
                put[blk] = new.pop(blk)
        finally:
            for layer in new.values():
                layer.discard()
        return [_Written(blk, put.get(blk)) for blk in blks(self._machine).values()]

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

    def _given(self, layers: Mapping[str, int]) -> list[tuple[Blk, int]]:
        """Raises EngineError for a disk that the machine does not have, or does not write to."""
        found = [(find_disk(self._machine, name), fd) for name, fd in layers.items()]
        for blk, _ in found:
            if blk.disk.readonly:
                raise EngineError(f"disk {blk.serial.decode()!r} is not written to, and needs no layer")
        return found
