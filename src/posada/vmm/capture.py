"""A snapshot of a running machine: it stands still for as long as fork(2) takes, whatever the size of its memory.

In the pause the state is collected, the pages to write are found, disks go on on new layers, and the process forks. The
copy, in which guest memory stands as it was, writes the files and makes them durable while the machine runs on; pages
that the guest writes meanwhile are copied by the kernel, once. The copy has no thread, no vm and no descriptor but those
of the files and a pipe; when the machine's process dies it gives up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posada.errors import EngineError, HostError
from posada.vmm import memfile
from posada.vmm.fork import freeze
from posada.vmm.machine import Machine, State
from posada.vmm.memfile import MAX_LAYERS, MAX_RUNS
from posada.vmm.pagemap import PageMap, Run, coalesce, total
from posada.vmm.snapshot import Document
from posada.vmm.virtio.blk import Blk

_DONE = b"\0done"
_MESSAGE = 4096


@dataclass(frozen=True)
class Files:
    """Where a capture goes: descriptors, taken over.

    ``memory`` is empty, or for a machine that stands on memory files a copy of all of them: then what is written makes
    it whole (``complete``), and the snapshot needs no other file.
    """

    memory: int
    devices: int
    pagemap: int
    complete: bool = False

    def close(self) -> None:
        for fd in (self.memory, self.devices, self.pagemap):
            os.close(fd)


@dataclass(frozen=True)
class Captured:
    """``pause``: seconds that the vcpus stood still; ``bytes``: memory written."""

    pause: float
    bytes: int


def capture(
    machine: Machine,
    files: Files,
    done: Callable[[Captured | Exception], object],
    switch: Callable[[], object] = lambda: None,
) -> None:
    """Begin; ``done`` is called on the loop once the files are durable, or could not be written.

    ``switch`` puts the disks, frozen by then, on their new layers. The machine runs on, or stays paused, when this
    returns or raises (KvmError, OSError, ImageError, EngineError).
    """
    begun = time.monotonic()
    running = machine.state is State.RUNNING
    reader = writer = -1
    try:
        machine.pause()
        some = _pages(machine, files)
        layers = machine.layers if machine.layers is not None and not files.complete else None
        document = Document(machine.memory.size, () if layers is None else (*layers, tuple(some)), machine.save())
        try:
            freeze(machine)
        finally:
            switch()  # also after a failure: a disk that is frozen takes no write
        disks = _disks(machine)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        if not os.fork():
            _write(machine, files, document, some, disks, writer)
    except BaseException:
        for fd in {reader, writer} - {-1}:
            os.close(fd)
        raise
    finally:
        files.close()
        if running:
            machine.resume()
    os.close(writer)
    captured = Captured(time.monotonic() - begun, total(some))

    def ready(_: int) -> None:
        machine.loop.unwatch(reader)
        message = os.read(reader, _MESSAGE)
        os.close(reader)
        done(captured if message == _DONE else HostError(_reason(message)))

    machine.loop.watch(reader, ready)


def _reason(message: bytes) -> str:
    return message.decode(errors="replace") or "the process that wrote the snapshot was killed"


def _pages(machine: Machine, files: Files) -> list[Run]:
    """What to write: what the machine does not share with the files it stands on."""
    _, address = memfile.linear(machine.memory)
    own = PageMap(files.pagemap).own(address, machine.memory.size)
    if machine.layers is None or files.complete:
        return own
    if len(machine.layers) + 2 > MAX_LAYERS:
        raise EngineError(f"the machine stands on {len(machine.layers) + 1} memory files already: capture all of it")
    return coalesce(own, MAX_RUNS)


def _disks(machine: Machine) -> list[int]:
    """What must be durable with the snapshot: frozen layers, and the new ones that say what they stand on."""
    devices = [slot.transport.device for slot in machine.slots.values()]
    return [fd for device in devices if isinstance(device, Blk) for fd in device.disk.descriptors()]


def _write(
    machine: Machine, files: Files, document: Document, some: Sequence[Run], disks: Sequence[int], writer: int
) -> None:
    """In the copy. Does not return."""
    try:
        parent = os.getppid()
        _close_all_but({files.memory, files.devices, writer, *disks})

        def check() -> None:
            if os.getppid() != parent:
                os._exit(1)

        memfile.write(files.memory, machine.memory, some, check)
        document.write(files.devices)
        for fd in (files.memory, files.devices, *disks):
            os.fsync(fd)
        message = _DONE
    except BaseException as error:
        message = (str(error) or repr(error)).encode(errors="replace")[:_MESSAGE]
    try:
        os.write(writer, message)
    finally:
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    """Standard input, output and error stay too: they are the host's nothing."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = max(first, fd + 1)
    os.closerange(first, 1 << 20)
