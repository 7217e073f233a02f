"""A machine's disks on their way from one monitor to another, on storage that both see. Never do both write.

::

    source   take ──► release ──────────────────────────► (gone)        lock held │ files complete, durable, unlocked
                         │                                  │
                         └── take_back: it stays here ◄─────┘ only if nobody holds the lock, and nobody has written

The destination opens its disks, which takes the locks (`posada.vmm.block.chain.open_chain`), after `release` and before it
says that it is ready; what it found there must be what the source has left (`fingerprints`).
"""

from __future__ import annotations

import os
import time
import zlib

from posada.errors import Busy, EngineError, StateError, Unsupported
from posada.vmm.block import locks
from posada.vmm.block.chain import layers_of, thaw
from posada.vmm.block.disk import Disk
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.machine import Machine
from posada.vmm.state import Document, child, integer
from posada.vmm.tuning import blks
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.spare import NoDisk

PATIENCE = 10.0
"""Seconds for a destination that failed to let go of the locks: it has been told, or is gone."""
_HEAD = 1 << 16

Stamp = tuple[int, int, int]


class Handover:
    """The disks of one machine that is about to leave."""

    def __init__(self, machine: Machine) -> None:
        """Takes the locks, which are held already but on odd file systems. Raises Unsupported, Busy, OSError."""
        self._machine = machine
        self._released: dict[Blk, Stamp] = {}
        for blk in _disks(machine).values():
            if not blk.disk.readonly and not locks.lock(_top(blk.disk)):
                hint = "stop it, and start it there"
                raise Unsupported("kvm", "migration of a machine with a disk on storage without file locks", hint=hint)

    def prepare(self) -> None:
        """Make durable what can be while the machine still runs. Raises OSError, ImageError."""
        for blk in _disks(self._machine).values():
            blk.quiesce()
            blk.disk.flush()

    def release(self) -> dict[str, int]:
        """The vcpus stand still: the files are complete and durable, and others may write to them from now on.

        Returns `fingerprints`. Raises OSError, ImageError: then `take_back`.
        """
        for blk in _disks(self._machine).values():
            blk.quiesce()
            writable = not blk.disk.readonly
            blk.freeze()
            blk.disk.flush()
            if writable:
                self._machine.given_up = self.take_back
                fd = _top(blk.disk)
                self._released[blk] = _stamp(fd)
                locks.unlock(fd)
        return fingerprints(self._machine)

    def take_back(self, patience: float = 0.0) -> None:
        """The machine stays here, and may write again. Idempotent. Raises Busy: the other one has not let go after
        ``patience`` seconds; EngineError: it has written, so the memory here is of no use any more; OSError, ImageError.
        """
        deadline = time.monotonic() + patience
        for blk in self._released:
            _lock_within(_top(blk.disk), deadline)
        for blk, stamp in self._released.items():
            if _stamp(_top(blk.disk)) != stamp:
                hint = "it runs elsewhere, or did: end this one, and start it from its disks"
                raise EngineError(f"disk {blk.serial.decode()!r} was written to by the machine's other half", hint=hint)
        for blk in self._released:
            blk.disk = thaw(blk.disk)
        self._released = {}
        self._machine.given_up = None


def fingerprints(machine: Machine) -> dict[str, int]:
    """A number for each disk, which another file, or an older state of that file, does not have."""
    return {name: _fingerprint(blk.disk) for name, blk in _disks(machine).items()}


def check(machine: Machine, document: Document) -> None:
    """The disks opened here are those that the source has left. Raises StateError."""
    here, there = fingerprints(machine), child(document, "disks")
    if here.keys() != there.keys():
        raise StateError(f"the machine's disks are {', '.join(there) or 'none'}, and here {', '.join(here) or 'none'}")
    for name, number in here.items():
        if integer(there, name, 0, 0xFFFF_FFFF) != number:
            raise StateError(f"{name} is not what the machine was using: another file, or an older state of it")


def _fingerprint(disk: Disk) -> int:
    number = 0
    for layer in layers_of(disk):
        length = layer.file.length()
        facts = f"{type(layer).__name__} {layer.size} {length}".encode()
        number = zlib.crc32(bytes(layer.file.read(0, min(_HEAD, length))), zlib.crc32(facts, number))
        if isinstance(layer, Qcow2Disk):
            number = zlib.crc32(layer.image.l1, number)
    return number


def _disks(machine: Machine) -> dict[str, Blk]:
    return {name: blk for name, blk in blks(machine).items() if not isinstance(blk.disk, NoDisk)}


def _top(disk: Disk) -> int:
    return disk.descriptors()[-1]


def _stamp(fd: int) -> Stamp:
    found = os.fstat(fd)
    return found.st_mtime_ns, found.st_size, found.st_blocks


def _lock_within(fd: int, deadline: float) -> None:
    while True:
        try:
            locks.lock(fd)
            return
        except Busy:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)  # the kernel has no way to wait for a lock with a time limit
