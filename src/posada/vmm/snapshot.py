"""A machine at one instant, as files: its state (one CBOR document) and its memory (`posada.vmm.memfile`).

The document::

    {"format": "posada machine", "version": 1,
     "memory": {"size": bytes, "layers": [runs, …]},     one for each upper memory file, lowest first
     "machine": {…}}                                     `Machine.save`: device by device, each checked by itself

Its last layer is what the capture wrote; the files below are those that the captured machine stood on itself. A capture
of a machine that stands on none has no layers: its one memory file is all there is.

Everything read here is untrusted, also after years on disk: sizes are bounded before anything is allocated, and a
document that is wrong anywhere raises StateError before a vcpu has run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posada.errors import StateError
from posada.proto import cbor
from posada.vmm import cpustate, memfile, state
from posada.vmm.builder import prepare, wire
from posada.vmm.config import MonitorConfig
from posada.vmm.cpuid import missing_features
from posada.vmm.machine import Machine
from posada.vmm.memfile import MAX_LAYERS, MAX_RUNS, Layer
from posada.vmm.memory import MAX_SIZE, PAGE
from posada.vmm.pagemap import Run

FORMAT = "posada machine"
VERSION = 1
MAX_DOCUMENT = 64 << 20

Layers = tuple[tuple[Run, ...], ...]


@dataclass(frozen=True)
class Document:
    """What the state file holds. ``layers`` are the runs of the upper memory files."""

    size: int
    layers: Layers
    machine: dict[str, Any]

    def encode(self) -> bytes:
        memory = {"size": self.size, "layers": [memfile.pack_runs(some) for some in self.layers]}
        return cbor.encode({"format": FORMAT, "version": VERSION, "memory": memory, "machine": self.machine})

    @classmethod
    def decode(cls, data: bytes) -> Document:
        """Raises StateError."""
        try:
            document = cbor.decode_map(data)
        except cbor.CborError as error:
            raise StateError(f"the saved state is damaged: {error}") from None
        state.choice(document, "format", (FORMAT,))
        version = state.integer(document, "version", 0, 1 << 32)
        if version != VERSION:
            raise StateError(f"the saved state has version {version}, and this posada reads {VERSION}")
        memory = state.child(document, "memory")
        size = state.integer(memory, "size", PAGE, MAX_SIZE)
        packed = {"layer": None}
        layers = []
        for packed["layer"] in state.items(memory, "layers", MAX_LAYERS - 1):
            layers.append(memfile.unpack_runs(state.blob(packed, "layer", limit=16 * MAX_RUNS), size))
        return cls(size, tuple(layers), state.child(document, "machine"))

    @classmethod
    def read(cls, fd: int) -> Document:
        """From the beginning of a file. Raises StateError, OSError."""
        size = os.fstat(fd).st_size
        if size > MAX_DOCUMENT:
            raise StateError(f"a saved state of {size} bytes; at most {MAX_DOCUMENT}")
        return cls.decode(os.pread(fd, MAX_DOCUMENT, 0))

    def write(self, fd: int) -> None:
        """At the beginning of an empty file. Not durable yet. Raises OSError."""
        data = memoryview(self.encode())
        at = 0
        while at < len(data):
            at += os.pwrite(fd, data[at:], at)


def restore(config: MonitorConfig, document: Document, files: Sequence[int]) -> Machine:
    """A machine that goes on where the document's was, BUILT and not started yet.

    ``config`` is its new life: descriptors, MACs, generation id. ``files`` are the memory files, lowest first; they are
    closed. Raises StateError (also: a host that lacks what the guest uses), KvmError, OSError.
    """
    try:
        if config.memory != document.size:
            raise StateError(f"the saved machine has {document.size} bytes of memory, and this one {config.memory}")
        if len(files) != len(document.layers) + 1:
            raise StateError(f"{len(files)} memory files for a state that needs {len(document.layers) + 1}")
        memory = memfile.open_stack(list(map(Layer, files, (None, *document.layers))), document.size)
    finally:
        for fd in files:
            os.close(fd)
    machine = prepare(config, memory)
    machine.layers = document.layers
    check_processors(machine, document.machine)
    wire(machine)
    machine.load(document.machine)
    wake(machine)
    return machine


def wake(machine: Machine) -> None:
    """Tell the guest what happened, before its vcpus run: that it is a copy, and whatever was lost on the way."""
    if machine.config.generation_id:
        machine.new_generation(machine.config.generation_id)
    for slot in machine.slots.values():
        slot.transport.kick()


def check_processors(machine: Machine, saved: dict[str, Any]) -> None:
    """Raises StateError, naming them, if the guest has seen processor features that this host does not offer."""
    supported = machine.system.supported_cpuid()
    lost: list[str] = []
    for document in state.children(saved, "cpus", 256)[:1]:  # all vcpus are of one kind
        lost = missing_features(cpustate.saved_cpuid(document), supported)
    if lost:
        raise StateError(
            f"this host's processor lacks what the guest uses: CPUID {', '.join(lost)}",
            hint="restore it on the kind of host it was saved on",
        )
